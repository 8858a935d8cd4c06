"""Memory of the methods that take a matrix apart, against what merging promises: four tensors for each expert.

    python benchmarks/matrix_memory.py [--methods wudi knots] [--shapes 768x2064 1200x1200] [--experts 2 3]

A process for each; prints Markdown: the highest memory while one tensor is merged, in tensors of its size in float32,
the task vectors among them. It scales with the tensor, but for some MB of the linear algebra libraries. Freed blocks go
back to the system at once (MALLOC_MMAP_THRESHOLD_), as those of large tensors always do.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

METHODS = ["doge_ta", "iso_c", "iso_cts", "knots", "svc", "tsv_m", "wudi"]
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "500000"}


def status(field: str) -> float:
    """Of this process, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


def measure(name: str, shape: tuple[int, int], experts: int) -> None:
    """Print how many tensors of memory a merge takes at its peak."""
    import torch

    from selfdev.algorithms.library import method

    small = torch.randn(2, 400, 500)
    method(name).merge(small, small[0])  # what libraries keep for themselves
    before = status("VmRSS")
    vectors = torch.empty(experts, *shape).normal_(generator=torch.Generator().manual_seed(0))
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    method(name).merge(vectors, vectors[0])
    print((status("VmHWM") - before) / (vectors[0].nbytes / 2**20))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--shapes", nargs="+", default=["768x2064", "2064x768", "1200x1200"])
    parser.add_argument("--experts", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        height, width = map(int, options.shapes[0].split("x"))
        measure(options.methods[0], (height, width), options.experts[0])
        return
    columns = [(shape, experts) for shape in options.shapes for experts in options.experts]
    print(f"| method | {' | '.join(f'{shape}, {experts} experts' for shape, experts in columns)} |")
    print("| --- " * (len(columns) + 1) + "|")
    print(f"| *promised, and 500 MB* | {' | '.join(str(4 * experts) for _, experts in columns)} |")
    for name in options.methods:
        cells = []
        for shape, experts in columns:
            words = ["--measure", "--methods", name, "--shapes", shape, "--experts", str(experts)]
            command = [sys.executable, __file__, *words]
            done = subprocess.run(
                command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | ENVIRONMENT
            )
            cells.append(f"{float(done.stdout):.1f}")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
