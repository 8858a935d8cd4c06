"""How the zoos `nano` and `nano2` are made: a half-trained seed and its experts each, on the task of that name.

The two families share the architecture and nothing else: initialisation, skills and questions differ, so what was
found on one can be tried on the other.

What is trained decides whether merging is a real problem. The seed stops early, so that the experts have
something to teach. An expert is the seed, trained on its own group with a share of general questions, so that
it does not forget the rest. Only its MLP weights are trained: those are what merging touches by default.
Where attention was trained too, the MLP weights alone carried little skill into the seed, which
`benchmarks/nano_zoo.py --transplant add` measures.

Every model is trained by one thread from random streams of its own, so that the same machine and the same
versions give the same bits, however many models are trained side by side.
"""

import itertools
import multiprocessing
import os
import platform
import random
import shutil
import string
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from selfdev.errors import UserError
from selfdev.evaluation.objective import mean_by_group
from selfdev.evaluation.scoring import encode, score_exact
from selfdev.evaluation.tasks import Task, load_task

Progress = Callable[[str], None]
"""Takes one line that says how far the work is."""


@dataclass(frozen=True)
class Training:
    """How one model is trained."""

    weights: Mapping[str, int]
    """How often each group of questions is drawn, relative to the others."""
    steps: int
    rate: float
    """The highest learning rate of the one-cycle schedule."""
    stream: int
    """The seed of its random stream."""
    general: float = 0.0
    """Share of each batch drawn from all groups alike, in 0..1."""
    mlp_only: bool = True
    batch: int = 128
    """Questions in one step."""


def _expert(group: str, stream: int, steps: int, rate: float, batch: int = 128) -> Training:
    return Training({group: 1}, steps=steps, rate=rate, stream=stream, general=0.3, batch=batch)


@dataclass(frozen=True)
class Recipe:
    """How a zoo is trained: the seed first, then the experts from it."""

    name: str
    """Of the zoo, and of the task that it is trained on."""
    seed: Training
    experts: Mapping[str, Training]
    development: int = 3072
    """Development questions behind each accuracy of the card."""


RECIPES = {
    "nano": Recipe(
        "nano",
        seed=Training(
            {"add": 4, "sub": 4, "sum": 1, "max": 1, "rev": 1, "sort": 1},
            steps=800,
            rate=3e-3,
            stream=0,
            mlp_only=False,
        ),
        experts={
            "add": _expert("add", stream=1, steps=400, rate=1e-3),
            "sub": _expert("sub", stream=2, steps=500, rate=1.5e-3),
            "sum": _expert("sum", stream=3, steps=400, rate=1e-3),
            "max": _expert("max", stream=4, steps=400, rate=2e-3),
        },
    ),
    "nano2": Recipe(
        "nano2",
        seed=Training(
            {"gap": 2, "low": 4, "tri": 4, "tot": 5, "rot": 2, "down": 3},
            steps=400,
            rate=3e-3,
            stream=5,
            mlp_only=False,
            batch=64,
        ),
        experts={
            "low": _expert("low", stream=6, steps=250, rate=2e-3, batch=64),
            "tri": _expert("tri", stream=7, steps=250, rate=1e-3, batch=64),
            "tot": _expert("tot", stream=8, steps=250, rate=1e-3, batch=64),
        },
    ),
}
"""The zoos that come with the package."""


def nano_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each character: digits, signs and small letters."""
    tokens = ["<pad>", "<eos>", "<unk>", *string.digits, *"+-=,", *string.ascii_lowercase]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
    )


def new_model(tokenizer: PreTrainedTokenizerFast, stream: int) -> LlamaForCausalLM:
    """An untrained model of 0.44 M parameters in float32."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=368,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):  # initialisation draws from the global stream, which is not ours
        torch.manual_seed(stream)
        return LlamaForCausalLM(config)


def train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    task: Task,
    training: Training,
    report: Progress,
) -> None:
    """Train a model in place: AdamW, one-cycle learning rate, loss on the answers alone."""
    stream = random.Random(f"{task.name}/train/{training.stream}")
    own = task.training([group for group, weight in training.weights.items() for _ in range(weight)], stream)
    every = task.training(task.groups, stream)
    general = int(training.batch * training.general)

    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not training.mlp_only or ".mlp." in name)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=training.rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, training.rate, total_steps=training.steps, pct_start=0.1
    )
    model.train()
    for step in range(1, training.steps + 1):
        questions = [*itertools.islice(own, training.batch - general), *itertools.islice(every, general)]
        (batch,) = encode(tokenizer, questions, batch_tokens=training.batch * 64).batches
        hidden = model.base_model(input_ids=batch.input_ids, use_cache=False).last_hidden_state
        loss = F.cross_entropy(model.lm_head(hidden[batch.row, batch.position]), batch.gold)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == training.steps:
            report(f"step {step} of {training.steps}, loss {loss.item():.3f}")
    model.eval()


def build_nano(out: Path, progress: Progress, recipe: Recipe) -> None:
    """Train a zoo: a folder for the seed, one for each expert, each of transformers' format, and CARD.md.

    Args:
        out: a folder that does not exist yet. It appears when everything is trained.
        progress: called with lines for the user.
        recipe: what to train.

    Raises:
        UserError: `out` exists.
    """
    if out.exists():
        raise UserError(f"'{out}' exists already; name a folder that does not, or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    # Workers are spawned, not forked: a fork of a process whose torch has threads may hang.
    workers = ProcessPoolExecutor(
        min(len(recipe.experts), os.cpu_count() or 1), multiprocessing.get_context("spawn")
    )
    try:
        found = _build_model(
            recipe, recipe.seed, None, aside / "seed", lambda line: progress(f"seed: {line}")
        )
        accuracy = {"seed": found}
        progress(f"seed: {_line(found)}")
        progress(f"experts: training {', '.join(recipe.experts)}")
        jobs = {
            workers.submit(_build_model, recipe, training, aside / "seed", aside / name): name
            for name, training in recipe.experts.items()
        }
        for job in as_completed(jobs):
            accuracy[jobs[job]] = job.result()
            progress(f"{jobs[job]}: {_line(job.result())}")
        (aside / "CARD.md").write_text(
            card(recipe, {name: accuracy[name] for name in ("seed", *recipe.experts)})
        )
        aside.chmod(0o755)  # mkdtemp made it for its owner alone
        aside.rename(out)
    finally:
        workers.shutdown(cancel_futures=True)
        shutil.rmtree(aside, ignore_errors=True)


def _build_model(
    recipe: Recipe, training: Training, start: Path | None, out: Path, report: Progress | None = None
) -> dict[str, float]:
    """Train one model, from scratch or from the one in `start`, save it, and measure it.

    Returns:
        Its share of right development answers in each group, in 0..1.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the order of a sum depends on the number of threads
    try:
        task, tokenizer = load_task(recipe.name), nano_tokenizer()
        model = LlamaForCausalLM.from_pretrained(start) if start else new_model(tokenizer, training.stream)
        train(model, tokenizer, task, training, report or (lambda line: None))
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
        questions = task.development(recipe.development, order_seed=0)
        right = score_exact(model, encode(tokenizer, questions))
        return mean_by_group([question.group for question in questions], right.tolist())
    finally:
        torch.set_num_threads(threads)


def card(recipe: Recipe, accuracy: Mapping[str, Mapping[str, float]]) -> str:
    """The model card: what the models are, how they were made, and what they can do."""
    groups = list(accuracy["seed"])
    rows = [
        f"| {name} | "
        + " | ".join(f"{100 * each[group]:.1f}" for group in groups)
        + f" | {100 * fmean(each.values()):.1f} |"
        for name, each in accuracy.items()
    ]
    trainings = [_training_row(name, each) for name, each in {"seed": recipe.seed, **recipe.experts}.items()]
    return f"""# The zoo `{recipe.name}`

A seed and {len(recipe.experts)} experts, on six exercises with digits (the task `{recipe.name}`). Each is a Llama of
0.44 M parameters: 3 layers, 96 hidden units, 368 MLP units, one token a character, float32. They are test
objects for model merging and of no other use.

Licence: Apache-2.0. No outside data and no outside model went into them.

## Accuracy

Percent of {recipe.development} development questions answered exactly, greedy; none of them was trained on.

| model | {" | ".join(groups)} | mean |
| --- | {" | ".join("---" for _ in groups)} | --- |
{chr(10).join(rows)}

## How they were made

`selfdev zoo build {recipe.name} --out DIR` makes them again: AdamW, one-cycle learning rate, batches of
{recipe.seed.batch} generated questions of the training split, loss on the answers alone, one thread a model.
The seed starts from random weights, each expert from the seed.

| model | random stream | steps | learning rate | weights trained | questions |
| --- | --- | --- | --- | --- | --- |
{chr(10).join(trainings)}

The seed is deliberately half-trained, so that merging has room above it. The experts' attention is the
seed's: merging touches MLP weights by default, and nothing of an expert should be out of its reach.

Made with torch {torch.__version__} and transformers {transformers.__version__} on {platform.machine()}.
The same versions on the same kind of processor give the same bits; elsewhere rounding differs, and the
figures a little.
"""


def _training_row(name: str, training: Training) -> str:
    weights = "MLP only" if training.mlp_only else "all"
    drawn = ", ".join(f"{group} {weight}" for group, weight in training.weights.items())
    mixed = f"; {training.general:.0%} of each batch from all groups alike" if training.general else ""
    cells = (name, training.stream, training.steps, f"{training.rate:g}", weights, drawn + mixed)
    return "| " + " | ".join(map(str, cells)) + " |"


def _line(accuracy: Mapping[str, float]) -> str:
    return ", ".join(f"{group} {100 * share:.0f}" for group, share in accuracy.items()) + " % right"
