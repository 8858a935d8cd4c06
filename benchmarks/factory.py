"""The factory against its peers in one run: sampling (`sampling.py`), then a round of refinement (`refinement.py`).

    python benchmarks/factory.py --vllm /path/to/its/python

Each of the two is a script of its own with options of its own; here they take those of docs/results.md, where each was
called by itself. Nothing else should run on the machine meanwhile.
"""

import argparse
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--vllm", help="the Python of an environment that has vLLM; left out without it")
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--pairs-a-step", type=int, default=8)
    arguments = parser.parse_args()
    turns = ["--turns", str(arguments.turns)]
    sampling = [*turns, *(["--vllm", arguments.vllm] if arguments.vllm else [])]
    pairs = ["--pairs", str(arguments.pairs), "--pairs-a-step", str(arguments.pairs_a_step)]
    refinement = [*turns, *pairs, "--peers", "trl"]
    for script, options in (("sampling.py", sampling), ("refinement.py", refinement)):
        print(f"## {script} {' '.join(options)}", flush=True)
        subprocess.run([sys.executable, HERE / script, *options], check=True)


if __name__ == "__main__":
    main()
