"""Root's tests once more as an ordinary user: `python tests/unprivileged.py PATH...` becomes uid 65534.

Who is not root has run them as an ordinary user already; nothing is repeated, and that is said.

Where the interpreter lies in a folder of root's that others cannot enter, the tests keep the one capability that
lets them read it; the jail drops that as every other.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

NOBODY = 65534


def main() -> int:
    if os.geteuid() != 0:
        return _skipped("this is an ordinary user, as whom `make test` has run them")
    if shutil.which("setpriv") is None:
        return _skipped("root needs setpriv, of util-linux, to become an ordinary user")
    with tempfile.TemporaryDirectory() as home:
        os.chmod(home, 0o777)  # it is the new user's
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "no:cacheprovider",
            f"--basetemp={home}/tests",
            *sys.argv[1:],
        ]
        environment = {"HOME": home, "TMPDIR": home, "HYPOTHESIS_STORAGE_DIRECTORY": f"{home}/hypothesis"}
        return subprocess.run(_as_nobody() + command, env=os.environ | environment, check=False).returncode


def _skipped(reason: str) -> int:
    print(f"tests as an ordinary user: skipped; {reason}")
    return 0


def _as_nobody() -> list[str]:
    reading = ["--inh-caps=-all,+dac_read_search", "--ambient-caps=-all,+dac_read_search"]
    kept = [] if _everybody_enters(Path(sys.executable).resolve()) else reading
    return ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", *kept]


def _everybody_enters(path: Path) -> bool:
    return all(parent.stat().st_mode & 0o001 for parent in path.parents)


if __name__ == "__main__":
    sys.exit(main())
