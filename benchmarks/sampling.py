"""Sampling as `quickstart` does it against transformers' `generate`, and against vLLM, in one run on the same weights.

    python benchmarks/sampling.py --programs 128 --turns 2 --vllm /path/to/its/python
    python benchmarks/sampling.py --picture docs/images/sampling.png

All write the same number of programs to four of the quickstart's prompts (three drawn examples each, warm-started
factory) with the same temperature, top-p, limit and stop, in float32. They take turns. `generate` has the rows of one
prompt in a batch, vLLM all at once with prefix caching, in a process of its own whose start is not counted. Seconds are
the clock's; seconds of CPU are printed too, since they say more on a busy machine. A row of its own has ours with the
linear layers in torch's int8; what that costs in programs that work, `help.py` says. The picture shows tokens a second
by rows and by length of the prompt, without a stop.
"""

import argparse
import json
import math
import re
import statistics
import string
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.ao.quantization import per_channel_dynamic_qconfig, quantize_dynamic
from transformers import StoppingCriteria, StoppingCriteriaList

from selfdev.config import load_config
from selfdev.factory.factory import LocalFactory
from selfdev.factory.prompt import STOP
from selfdev.factory.sampling import Sampler
from selfdev.models import shared_prefix

NEVER = re.compile(r"(?!)")
VLLM = """
import json, os, sys, time
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
from vllm import LLM, SamplingParams
task = json.load(open(sys.argv[1]))
model = LLM(task["folder"], dtype="float32", max_model_len=1024, max_num_seqs=128, enable_prefix_caching=True)
settings = SamplingParams(stop=task["stop"], seed=task["seed"], **task["sampling"])
prompts = [{"prompt_token_ids": ids} for ids in task["prompts"]]
model.generate(prompts[:1], SamplingParams(max_tokens=2))
began = time.perf_counter()
out = model.generate(prompts, settings)
seconds = time.perf_counter() - began
tokens = sum(len(o.outputs[0].token_ids) for o in out)
json.dump([seconds, tokens], open(sys.argv[2], "w"))
"""


class AtFunctionsEnd(StoppingCriteria):  # type: ignore[misc]
    """The same stop as ours, by decoding the tail of every row."""

    def __init__(self, tokenizer: Any, prompt: int, stop: re.Pattern[str]):
        self.tokenizer, self.prompt, self.stop = tokenizer, prompt, stop

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:
        tails = self.tokenizer.batch_decode(input_ids[:, self.prompt :][:, -8:])
        return torch.tensor([self.stop.search(tail) is not None for tail in tails])


def generate(
    factory: LocalFactory, model: Any, prompts: Sequence[list[int]], rows: int, sampler: Sampler
) -> int:
    """Let transformers write `rows` programs to each prompt; returns how many tokens."""
    written = 0
    for prompt in prompts:
        stop = AtFunctionsEnd(factory.tokenizer, len(prompt), sampler.stop)
        out = model.generate(
            torch.tensor([prompt] * rows),
            attention_mask=torch.ones(rows, len(prompt), dtype=torch.long),
            do_sample=True,
            temperature=sampler.temperature,
            top_p=sampler.top_p,
            top_k=0,
            max_new_tokens=sampler.max_new_tokens,
            pad_token_id=factory.tokenizer.eos_token_id,
            stopping_criteria=StoppingCriteriaList([] if sampler.stop is NEVER else [stop]),
        )
        written += int((out[:, len(prompt) :] != factory.tokenizer.eos_token_id).sum())
    return written


def vllm(
    python: str, folder: Path, prompts: Sequence[list[int]], rows: int, sampler: Sampler, turn: int
) -> tuple[float, int]:
    """Let vLLM write; returns its seconds without the start, and its tokens."""
    task = {
        "folder": str(folder),
        "prompts": [prompt for prompt in prompts for _ in range(rows)],
        # The pattern of the function's end, spelled out for a peer that knows no patterns.
        "stop": ["\n\n\n", *("\n" + sign for sign in string.printable if not sign.isspace())],
        "seed": None,
        "sampling": {
            "temperature": sampler.temperature,
            "top_p": sampler.top_p,
            "max_tokens": sampler.max_new_tokens,
        },
    }
    given, answer = folder / f"task{turn}.json", folder / f"answer{turn}.json"
    given.write_text(json.dumps(task))
    subprocess.run([python, "-c", VLLM, str(given), str(answer)], check=True, stdout=subprocess.DEVNULL)
    seconds, tokens = json.loads(answer.read_text())
    return seconds, tokens


def measured(work: Callable[[], int]) -> tuple[float, float, int]:
    """Returns seconds, seconds of CPU, and tokens."""
    began, cpu = time.perf_counter(), time.process_time()
    tokens = work()
    return time.perf_counter() - began, time.process_time() - cpu, tokens


def race(arguments: argparse.Namespace, factory: LocalFactory, model: Any) -> None:
    """Print a line for everyone in every turn, and the median ratios."""
    config = factory.config
    prompts = [prompt.tokens(factory.tokenizer) for prompt in factory.prompts(0)]
    rows = arguments.programs // len(prompts)
    sampler = Sampler(
        config.factory.temperature,
        config.factory.top_p,
        config.factory.max_new_tokens,
        STOP[config.prompt.form],
        batch=arguments.batch,
    )
    ratios: dict[str, list[float]] = {}
    int8 = quantize_dynamic(model, {torch.nn.Linear: per_channel_dynamic_qconfig})
    with tempfile.TemporaryDirectory() as folder:
        if arguments.vllm:
            model.save_pretrained(folder)
            factory.tokenizer.save_pretrained(folder)
        for turn in range(arguments.turns):
            seeds = [[1000 * turn + 100 * number + i for i in range(rows)] for number in range(len(prompts))]

            def ours(model: Any, seeds: list[list[int]] = seeds) -> int:
                written = sampler(model, factory.tokenizer, prompts, seeds)
                return sum(len(sample.tokens) for group in written for sample in group)

            results = {"ours": measured(lambda: ours(model))}
            # Its activations have one scale for the whole batch: the sampler's own test of a model does not pass.
            with patch.dict(shared_prefix.TOLERANCE, {torch.float32: math.inf}):
                results["int8"] = measured(lambda: ours(int8))
            torch.manual_seed(turn)
            results["generate"] = measured(lambda: generate(factory, model, prompts, rows, sampler))
            if arguments.vllm:
                seconds, tokens = vllm(arguments.vllm, Path(folder), prompts, rows, sampler, turn)
                results["vllm"] = seconds, float("nan"), tokens
            for name, (seconds, cpu, tokens) in results.items():
                ratio, cpu_ratio = seconds / results["ours"][0], cpu / results["ours"][1]
                ratios.setdefault(name, []).append(ratio)
                print(
                    f"turn {turn + 1}, {name:8}: {rows * len(prompts) / seconds:6.2f} programs/s, "
                    f"{tokens / seconds:6.0f} tokens/s, {tokens / rows / len(prompts):4.0f} tokens a program, "
                    f"{seconds:6.1f} s, {cpu:6.1f} s of CPU; times ours: {ratio:.1f}, in CPU {cpu_ratio:.1f}",
                    flush=True,
                )
    for name in [name for name in ratios if name != "ours"]:
        print(f"median over {name}: {statistics.median(ratios[name]):.1f} times its programs a second")


def picture(arguments: argparse.Namespace, factory: LocalFactory, model: Any) -> None:
    """Draw tokens a second by rows and by length of the prompt."""
    import matplotlib.pyplot as plt

    text = factory.prompts(0)[0].tokens(factory.tokenizer)
    sampler = Sampler(1.0, 0.95, arguments.picture_tokens, NEVER)
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.5), sharey=True)
    sweeps = [
        ("rows, prompt of 300 tokens", [(300, rows) for rows in (4, 8, 16, 32, 64, 128)], 1),
        ("tokens of the prompt, 32 rows", [(length, 32) for length in (50, 100, 300, 600, 1200)], 0),
    ]
    for panel, (label, cases, shown) in zip(panels, sweeps, strict=True):
        speeds: dict[str, list[float]] = {"ours": [], "generate": []}
        for length, rows in cases:
            prompt = (text * (length // len(text) + 1))[:length]
            for name, work in {
                "ours": lambda: sum(
                    len(s.tokens)
                    for s in sampler(model, factory.tokenizer, [prompt], [list(range(rows))])[0]  # noqa: B023
                ),
                "generate": lambda: generate(factory, model, [prompt], rows, sampler),  # noqa: B023
            }.items():
                _, cpu, _ = measured(work)
                speeds[name].append(rows * arguments.picture_tokens / cpu)
            print(label, length, rows, {name: round(v[-1], 1) for name, v in speeds.items()}, flush=True)
        for name, values in speeds.items():
            panel.plot([case[shown] for case in cases], values, marker="o", label=name)
        panel.set(xscale="log", yscale="log", xlabel=label)
    panels[0].set_ylabel("tokens a second of CPU")
    panels[0].legend()
    figure.tight_layout()
    figure.savefig(arguments.picture, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--programs", type=int, default=128)
    parser.add_argument("--batch", type=int, default=0, help="rows at once of ours; 0: all")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--vllm", help="the Python of an environment that has vLLM")
    parser.add_argument("--picture", type=Path, help="draw the scaling instead")
    parser.add_argument("--picture-tokens", type=int, default=32, help="tokens of each row in the picture")
    arguments = parser.parse_args()
    factory = LocalFactory(load_config("quickstart", ["prompt.prompts=4"]))
    factory.prepare(lambda done, total, note: None)
    model = factory.model([])
    (picture if arguments.picture else race)(arguments, factory, model)


if __name__ == "__main__":
    main()
