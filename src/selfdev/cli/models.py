"""Commands that work on models: merge them, export what merges them, and score them."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from selfdev.cli.application import AsJson, RunFolder, app, print_json, terminal
from selfdev.errors import UserError


class Beside(StrEnum):
    """Who else may judge an evaluation."""

    LM_EVAL = "lm-eval"


class Where(StrEnum):
    """The devices on which a model may compute."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"
    MPS = "mps"


class Export(StrEnum):
    """What a discovered program may become."""

    PY = "py"
    MERGEKIT = "mergekit"
    MODEL = "model"


@contextmanager
def _importing() -> Iterator[None]:
    """Let no garbage be looked for among what torch's import makes, then or at the end: a third of a second."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@app.command()
def methods(as_json: AsJson = False) -> None:
    """List the human-designed merging methods."""
    from selfdev.report.methods import describe_methods, methods_table

    listed = describe_methods()
    if as_json:
        print_json(listed)
    else:
        terminal().say(methods_table(listed))


@app.command()
def merge(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder to write; must not exist, or be empty.")],
    method: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE.py|RUN:CANDIDATE",
            help="`selfdev methods` lists the names; a run's program; a file.",
        ),
    ] = None,
    seed: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Folder, GGUF file or Hub name of the seed.")
    ] = None,
    expert: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=MODEL", help="One of the experts, which may be a LoRA adapter."),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.yml", help="A mergekit configuration, in the place of all that says what."
        ),
    ] = None,
    parameter: Annotated[
        list[str] | None,
        typer.Option("-p", metavar="KEY=VALUE", help="Parameter of the method, such as density=0.3."),
    ] = None,
    targets: Annotated[
        str | None,
        typer.Option(
            metavar="mlp|attention|all|REGEX", help="Which tensors; mlp, or what the run merged, by default."
        ),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(metavar="bf16|fp16|fp32", help="Of what is written; the seed's by default.")
    ] = None,
    embeddings: Annotated[
        str | None,
        typer.Option(
            metavar="seed|crop",
            help="Where vocabularies differ: keep the seed's, or merge the rows all have.",
        ),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            metavar="EXPERT|MODEL",
            help="Whose tokenizer and chat template are written; the seed's by default.",
        ),
    ] = None,
    trust: Annotated[
        bool, typer.Option("--trust", help="Run a FILE.py of your own without the jail, with your rights.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Merge experts into a seed, and write a model that transformers loads."""
    from selfdev.merging.head_start import HeadStart
    from selfdev.merging.heap import return_large_blocks

    return_large_blocks()
    ahead = HeadStart([seed or "", *(each.partition("=")[2] for each in expert or ())])
    with _importing():
        from selfdev.merging.checkpoint import merge_checkpoints
        from selfdev.merging.recipe import Recipe, read_experts, read_parameters
        from selfdev.report.bar import Bar

    if config is not None:
        from selfdev.merging.mergekit_config import read_config

        if method or seed or expert or parameter or targets or dtype or tokenizer or trust:
            raise UserError(
                f"'{config}' says what is merged and how; beside --config only --out and --embeddings go"
            )
        recipe = read_config(config, embeddings)
    elif method is None or seed is None or not expert:
        raise UserError(
            "name --method, --seed and at least one --expert NAME=MODEL, or a --config of mergekit's"
        )
    else:
        read = read_experts(expert), read_parameters(parameter or ())
        recipe = Recipe(method, seed, *read, targets, dtype, embeddings, trust, tokenizer)
    with Bar("merging") as bar:
        merged = merge_checkpoints(recipe, out, tick=bar, ahead=ahead)
    if as_json:
        print_json(merged.described())
    else:
        typer.echo(merged.summary)


@app.command()
def export(
    folder: RunFolder,
    candidate: Annotated[
        str, typer.Argument(metavar="CANDIDATE", help="One program, such as learning/2/017.")
    ],
    to: Annotated[
        Export, typer.Option(help="A Python file, a merge method for mergekit, or the run's merged model.")
    ],
    out: Annotated[Path, typer.Option(metavar="PATH", help="File or folder to write; must not exist.")],
) -> None:
    """Write a discovered program as a file that needs nothing of this project, or merge the run's models by it."""
    from selfdev.merging.discovered import load_candidate
    from selfdev.merging.export import to_mergekit, to_python, write_export

    if to is Export.MODEL:
        from selfdev.merging.heap import return_large_blocks

        return_large_blocks()
        from selfdev.merging.checkpoint import merge_checkpoints
        from selfdev.merging.recipe import Recipe
        from selfdev.report.bar import Bar

        models = load_candidate(folder, candidate).config.merge
        with Bar("merging") as bar:
            merged = merge_checkpoints(
                Recipe(f"{folder}:{candidate}", models.seed, models.experts), out, tick=bar
            )
        typer.echo(merged.summary)
        return
    text = (to_python if to is Export.PY else to_mergekit)(folder, candidate)
    write_export(text, out)
    typer.echo(f"wrote {out}: a model wrote what is in it, so read it before you run it")


@app.command()
def evaluate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Where it comes from: a folder, zoo:nano/seed, ...")
    ],
    task: Annotated[
        str,
        typer.Option(metavar="NAME|FILE.yaml", help="A built-in task, gsm8k:FOLDER, or a file of your own."),
    ],
    split: Annotated[
        str, typer.Option(metavar="development|test", help="The test split opens only if it is named.")
    ] = "development",
    limit: Annotated[
        int | None, typer.Option(metavar="N", help="Questions; all of the split by default.")
    ] = None,
    beside: Annotated[
        Beside | None, typer.Option("--with", help="Let lm-evaluation-harness judge the same questions.")
    ] = None,
    device: Annotated[
        Where, typer.Option(help="Where it computes; auto: CUDA's GPU if there is one, else the CPU.")
    ] = Where.AUTO,
    dtype: Annotated[
        str,
        typer.Option(
            metavar="float32|bfloat16|float16",
            help="Type of its weights; on most CPUs only float32 is fast.",
        ),
    ] = "float32",
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Measure, though the same model was asked the same before.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Score a model on a task, question by question."""
    from selfdev.evaluation.harness import compare
    from selfdev.evaluation.measure import measure
    from selfdev.evaluation.score_cache import ScoreCache
    from selfdev.merging.recipe import NAMES_IN_TORCH, TORCH_DTYPES
    from selfdev.models.device import Place
    from selfdev.report.measurement import measurement_json, measurement_text

    if fresh and beside is not None:
        raise UserError("--fresh: with --with nothing is taken from the cache; leave one out")
    its_type = NAMES_IN_TORCH.get(dtype, dtype)
    if its_type not in TORCH_DTYPES:
        raise UserError(f"--dtype: {dtype}; give one of {', '.join(TORCH_DTYPES)}")
    place = Place.of(device.value, its_type, "--device")
    if beside is None:
        measured, agreement = measure(model, task, split, limit, None if fresh else ScoreCache(), place), None
    else:
        measured, agreement = compare(model, task, split, limit, place=place)
    if as_json:
        print_json(measurement_json(measured, agreement))
    else:
        typer.echo(measurement_text(measured, agreement))
