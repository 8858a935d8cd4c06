"""Run pytest as an ordinary user: `python tests/unprivileged.py PATH...`. Root first becomes uid 65534."""

import os
import subprocess
import sys
import tempfile

NOBODY = 65534


def main() -> int:
    with tempfile.TemporaryDirectory() as home:
        os.chmod(home, 0o777)  # it is the new user's
        privileged = os.geteuid() == 0
        user = {"user": NOBODY, "group": NOBODY, "extra_groups": []} if privileged else {}
        return subprocess.run(
            [
                sys.executable,
                "-m",
                "pytest",
                "-p",
                "no:cacheprovider",
                f"--basetemp={home}/tests",
                *sys.argv[1:],
            ],
            env=os.environ
            | {"HOME": home, "TMPDIR": home, "HYPOTHESIS_STORAGE_DIRECTORY": f"{home}/hypothesis"},
            check=False,
            **user,  # type: ignore[call-overload]
        ).returncode


if __name__ == "__main__":
    sys.exit(main())
