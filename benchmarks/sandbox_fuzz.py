"""Thousands of mutated programs through one jail: nothing may leak, grow, hang or get out.

    python benchmarks/sandbox_fuzz.py [--programs 10000] [--seed 0] [--json]

Each program is a benign one or an attack, mutated: lines swapped, dropped or doubled, tokens exchanged
between programs, constants changed, characters damaged. Afterwards there must be no zombie, no child, no
descriptor and no memory file more than before, and the forkserver must have the size it had. Exit code 1
where one of these fails.
"""

import argparse
import collections
import gc
import json
import os
import random
import re
import sys
import time
from pathlib import Path

import torch

from selfdev.sandbox import Limits, Sandbox, Status

SEEDS = (
    """
import torch

def merge_models(model_dict, device):
    return sum(model_dict.values()) / len(model_dict)
""",
    """
import torch

def merge_models(model_dict, device):
    vectors = torch.stack(list(model_dict.values()))
    flat = vectors.flatten(1)
    weights = 1 / (torch.cdist(flat, flat).sum(1) + 1e-8)
    weights = weights / weights.sum()
    return torch.tensordot(weights, vectors, dims=1)
""",
    """
import torch

def merge_models(model_dict, device):
    mean = torch.stack(list(model_dict.values())).mean(0)
    u, s, v = torch.linalg.svd(mean, full_matrices=False)
    s[2:] = 0
    return u @ torch.diag(s) @ v
""",
    """
import torch
import math

def merge_models(model_dict, device):
    out = torch.zeros(8, 6)
    for name, v in model_dict.items():
        k = int(0.2 * v.numel())
        threshold = v.abs().flatten().topk(k).values[-1]
        out += torch.where(v.abs() >= threshold, v, 0.0)
    return out * math.sqrt(2)
""",
    """
import torch

def merge_models(model_dict, device):
    w = torch.zeros(len(model_dict), requires_grad=True)
    x = torch.stack(list(model_dict.values()))
    optimizer = torch.optim.Adam([w], lr=0.1)
    for _ in range(3):
        loss = (torch.tensordot(w.softmax(0), x, dims=1) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return torch.tensordot(w.detach().softmax(0), x, dims=1)
""",
    """
import torch

def merge_models(model_dict, device):
    torch.os.system('touch canary')
    torch.os.fork()
    return model_dict['a']
""",
    """
import torch

def merge_models(model_dict, device):
    open('canary', 'w').write('x')
    torch.save(model_dict, 'canary')
    return model_dict['a'] * float('nan')
""",
    """
import torch

def merge_models(model_dict, device):
    for fd in range(64):
        try:
            torch.os.close(fd)
        except OSError:
            pass
    torch.os._exit(0)
""",
    """
import torch

def merge_models(model_dict, device):
    frame = torch.sys._getframe()
    while frame:
        for value in list(frame.f_locals.values()):
            try:
                value[:] = bytes(len(value))
            except Exception:
                pass
        frame = frame.f_back
    return model_dict['b']
""",
    """
import torch

def merge_models(model_dict, device):
    x = [0]
    for i in range(10 ** 9):
        x += x
    raise ValueError(x)
""",
)
TOKEN = re.compile(r"\w+|\s+|[^\w\s]")


def mutated(random_: random.Random) -> str:
    """One program: a seed program with one or two random changes."""
    source = random_.choice(SEEDS)
    for _ in range(random_.randint(1, 2)):
        lines = source.split("\n")
        i = random_.randrange(len(lines))
        match random_.choice((0, 1, 2, 3, 3, 3, 4, 5, 6)):
            case 0:
                del lines[i]
            case 1:
                lines.insert(i, lines[random_.randrange(len(lines))])
            case 2:
                lines[i] = random_.choice(random_.choice(SEEDS).split("\n"))
            case 3:
                lines[i] = re.sub(
                    r"\d+", lambda _: str(random_.choice((-1, 0, 1, 7, 2**31, 10**12))), lines[i]
                )
            case 4:
                tokens = TOKEN.findall(lines[i]) or [""]
                tokens[random_.randrange(len(tokens))] = random_.choice(TOKEN.findall(random_.choice(SEEDS)))
                lines[i] = "".join(tokens)
            case 5:
                at = random_.randrange(len(lines[i]) + 1)
                lines[i] = (
                    lines[i][:at] + chr(random_.choice((0, 9, 27, 40, 91, 0x202E, 0x1F600))) + lines[i][at:]
                )
            case _:
                lines[i] = "    " * random_.randrange(4) + lines[i].lstrip()
        source = "\n".join(lines) or "\n"
    return source


def held(box: Sandbox) -> dict[str, int]:
    """What could leak, here and in the forkserver: descriptors, memory files, children, its memory."""
    gc.collect()  # what the caller dropped before is not ours to count
    ours, theirs = Path("/proc/self"), Path(f"/proc/{box.pid}")
    descriptors = [os.readlink(entry) for side in (ours, theirs) for entry in _links(side / "fd")]
    children = [
        child
        for pid in (os.getpid(), box.pid)
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    ]
    anonymous = re.search(r"RssAnon:\s+(\d+)", (theirs / "status").read_text())
    return {
        "descriptors": len(descriptors),
        "memory_files": sum("memfd:" in target for target in descriptors),
        "children": len(children),
        "forkserver_kb": int(anonymous[1]) if anonymous else 0,
    }


def _links(folder: Path) -> list[Path]:
    return [entry for entry in folder.iterdir() if entry.is_symlink() and os.path.lexists(entry)]


def fuzz(programs: int, seed: int) -> tuple[dict[str, object], list[str]]:
    """Run the programs. Returns figures and what went wrong."""
    random_ = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    model_dict = {name: torch.randn(8, 6, generator=generator) for name in "abc"}
    statuses: collections.Counter[str] = collections.Counter()
    limits = Limits(wall_seconds=1.0, cpu_seconds=2, memory_bytes=256 * 1024**2)
    with Sandbox(limits) as box:
        for _ in range(20):
            box.merge(mutated(random_), model_dict)
        before, pid, start = held(box), box.pid, time.perf_counter()
        for _ in range(programs):
            outcome = box.merge(mutated(random_), model_dict)
            statuses[str(outcome.status)] += 1
        seconds = time.perf_counter() - start
        after = held(box)
        faults = [
            f"{name} went from {before[name]} to {after[name]}"
            for name in ("descriptors", "memory_files", "children")
            if after[name] != before[name]
        ]
        if after["forkserver_kb"] > before["forkserver_kb"] + 1024:
            faults.append(
                f"the forkserver grew from {before['forkserver_kb']} to {after['forkserver_kb']} kB"
            )
        if box.pid != pid:
            faults.append("the forkserver died and was started anew")
        if not box.merge(SEEDS[0], model_dict).ok:
            faults.append("the jail is not usable afterwards")
    if Path("canary").exists() or Path("/canary").exists():
        faults.append("a canary was touched")
    figures: dict[str, object] = {
        "programs": programs,
        "seconds": seconds,
        "programs_per_second": programs / seconds,
        "statuses": {str(status): statuses[str(status)] for status in Status},
        "before": before,
        "after": after,
        "load": os.getloadavg()[0],
    }
    return figures, faults


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--programs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    figures, faults = fuzz(arguments.programs, arguments.seed)
    if arguments.json:
        print(json.dumps({**figures, "faults": faults}, indent=2))
    else:
        for name, value in figures.items():
            print(f"{name:20} {value}")
        print("faults:", "; ".join(faults) or "none")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
