"""What the jail costs: one program on small tensors, bare, in the jail, and in a fresh interpreter each time.

    python benchmarks/sandbox.py [--calls 100] [--json]

Prints medians and the ratios, then the cost of large inputs and how often their bytes are copied.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from selfdev.sandbox import Limits, Sandbox

SOURCE = """
import torch

def merge_models(model_dict, device):
    vectors = torch.stack([v.to(device) for v in model_dict.values()])
    flat = vectors.flatten(1)
    weights = 1 / (torch.cdist(flat, flat).sum(1) + 1e-8)
    return torch.tensordot(weights / weights.sum(), vectors, dims=1)
"""
NOTHING = (
    "def merge_models(model_dict, device):\n    return model_dict['a'][::1000].sum() + model_dict['b'].sum()"
)
FIRST = "def merge_models(model_dict, device):\n    return model_dict['a']"
FRESH = f"""
import torch
namespace = {{}}
exec({SOURCE!r}, namespace)
namespace["merge_models"]({{name: torch.randn(64, 64) for name in "abcd"}}, torch.device("cpu"))
"""


def median_ms(action: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)


def bare(model_dict: dict[str, torch.Tensor]) -> object:
    namespace: dict[str, object] = {}
    exec(SOURCE, namespace)
    return namespace["merge_models"](model_dict, torch.device("cpu"))  # type: ignore[operator]


def shared_memory() -> int:
    """Bytes of all memory files and shared memory of this machine."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("Shmem:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/meminfo names no Shmem")


def processor_seconds(pid: int) -> float:
    """Processor time of a process and of its children that have ended."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def small(calls: int) -> dict[str, float]:
    """One call, and twelve that share a child, on four tensors of 64 x 64."""
    generator = torch.Generator().manual_seed(0)
    model_dict = {name: torch.randn(64, 64, generator=generator) for name in "abcd"}
    probes = [model_dict] * 12
    start = time.perf_counter()
    with Sandbox() as box:
        figures = {"warm_seconds": time.perf_counter() - start}
        figures["bare_ms"] = median_ms(lambda: bare(model_dict), calls)
        before = processor_seconds(box.pid)
        figures["jail_ms"] = median_ms(lambda: box.merge(SOURCE, model_dict), calls)
        figures["jail_processor_ms"] = 1000 * (processor_seconds(box.pid) - before) / calls
        figures["bare_12_ms"] = median_ms(lambda: [bare(probe) for probe in probes], calls)
        figures["jail_12_ms"] = median_ms(lambda: box.merge_many(SOURCE, probes), calls)
    figures["fresh_ms"] = median_ms(lambda: subprocess.run([sys.executable, "-c", FRESH], check=True), 5)
    figures["above_bare_ms"] = figures["jail_ms"] - figures["bare_ms"]
    figures["above_bare_12_ms"] = figures["jail_12_ms"] - figures["bare_12_ms"]
    figures["jail_to_bare"] = figures["jail_ms"] / figures["bare_ms"]
    figures["fresh_to_jail"] = figures["fresh_ms"] / figures["jail_ms"]
    return figures


def large() -> dict[str, float]:
    """Two inputs of 200 MB, of which the program reads a part: all else is transport."""
    model_dict = {name: torch.ones(50_000_000) for name in "ab"}
    size = sum(4 * tensor.numel() for tensor in model_dict.values())
    with Sandbox(Limits(wall_seconds=60, cpu_seconds=60)) as box:
        seconds = median_ms(lambda: box.merge(FIRST, model_dict), 3) / 1000
        with Peak(shared_memory) as copied:
            box.merge(NOTHING, model_dict)  # no result, so the memory files hold the inputs alone
    return {"inputs_mb": size / 1e6, "large_seconds": seconds, "copies_of_inputs": copied.peak / size}


class Peak:
    """The largest growth of a figure while the block runs."""

    def __init__(self, figure: Callable[[], int]):
        self.figure = figure
        self.start = 0
        self.peak = 0
        self.done = threading.Event()
        self.watcher = threading.Thread(target=self.watch)

    def watch(self) -> None:
        """Look until the block ends."""
        while not self.done.is_set():
            self.peak = max(self.peak, self.figure() - self.start)

    def __enter__(self) -> "Peak":
        self.start = self.figure()
        self.watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.watcher.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=100)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    figures = {**small(arguments.calls), **large(), "load": os.getloadavg()[0]}
    if arguments.json:
        print(json.dumps(figures, indent=2))
        return
    for name, value in figures.items():
        print(f"{name:20} {value:10.2f}")


if __name__ == "__main__":
    main()
