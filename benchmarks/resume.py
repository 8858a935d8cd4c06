"""Kill -9 in every phase of a small quickstart with the real language model, resume, and compare the archives.

    OMP_NUM_THREADS=1 python benchmarks/resume.py --out runs/resume

Both runs must have the same number of threads: sums of floating-point numbers depend on it.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

from selfdev.results import open_run

SMALL = [
    "programs=8",
    "iterations=2",
    "factory.max_new_tokens=64",
    "prompt.prompts=2",
    "task.development=120",
    "task.test=240",
    "rivals=[task_arithmetic, weighted_task_arithmetic, dare_ties]",
    "preferences.pairs=6",
    "scaling.programs=1",
]
PHASES = [
    "write learning 1",
    "judge learning 1",
    "refine learning 1",
    "write learning 2",
    "rivals",
    "verdict",
]


def start(*arguments: str) -> "subprocess.Popen[str]":
    """The command line, its progress on a pipe."""
    command = [sys.executable, "-m", "selfdev", *arguments, "--json"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def carry_out(folder: Path, kills: list[str]) -> None:
    """Begin the run, kill it once in each of these phases, and carry it to its end."""
    begin = [
        "run",
        "quickstart",
        *(part for change in SMALL for part in ("--set", change)),
        "--out",
        str(folder),
    ]
    waiting = list(kills)
    while True:
        process = start(*(["resume", str(folder)] if (folder / "archive.db").exists() else begin))
        assert process.stderr is not None
        for line in process.stderr:
            if waiting and waiting[0] in line and line.rstrip().endswith("..."):
                time.sleep(0.5)  # into the phase; where exactly does not matter
                process.kill()
                print(f"killed in: {waiting.pop(0)}", flush=True)
                break
        if process.wait() == 0:
            break
        if process.returncode != -9:
            sys.exit(f"the run ended with exit code {process.returncode}")
    if waiting:
        sys.exit(f"these phases were never seen: {waiting}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the two runs")
    out = parser.parse_args().out
    for name, kills in (("unbroken", []), ("killed", PHASES)):
        carry_out(out / name / "run", kills)
    unbroken, killed = (open_run(out / name / "run").archive.digest() for name in ("unbroken", "killed"))
    print(f"unbroken {unbroken}\nkilled   {killed}\n{'equal' if unbroken == killed else 'DIFFERENT'}")
    sys.exit(unbroken != killed)


if __name__ == "__main__":
    main()
