"""The command `selfdev`: each command parses, calls one function, and prints.

What takes long to import is imported inside the commands, so that `selfdev --help` answers at once.

Exit codes: 0 done, 1 failed, 2 the user's mistake, 3 interrupted and resumable.
"""

import errno
import gc
import json
import os
import signal
import sqlite3
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

import selfdev
from selfdev.errors import Interrupted, SelfdevError, UserError

if TYPE_CHECKING:
    from selfdev.report.terminal import Terminal
    from selfdev.runs import Run

# Before torch is imported: OpenMP threads that spin at barriers made sampling 8 times slower whenever another
# process used one of the cores (29 s against 3.8 s measured, 2 cores).
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# Libraries that would draw progress bars and print advice into the display.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

_UNSAFE = "--unsafe-sandbox"

app = typer.Typer(
    help="A language model invents model-merging algorithms, and trains itself on what worked.",
    rich_markup_mode=None,  # plain help, and rich need not be imported for it
    add_completion=False,
    pretty_exceptions_enable=False,
)
zoo_app = typer.Typer(help="Seeds and experts that come with the project.")
app.add_typer(zoo_app, name="zoo")

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run, such as runs/quickstart-1.")]
Zoo = Annotated[str, typer.Argument(metavar="NAME", help="Which zoo; `selfdev zoo list` names them.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout; progress goes to stderr.")]
Again = Annotated[
    bool,
    typer.Option(
        "--again", help="Open a test split that has been opened once more, measure anew, and mark it."
    ),
]
Unsafe = Annotated[
    bool, typer.Option(_UNSAFE, help="Run model-written code with resource limits alone, without the jail.")
]


class Beside(StrEnum):
    """Who else may judge an evaluation."""

    LM_EVAL = "lm-eval"


class Export(StrEnum):
    """What a discovered program may become."""

    PY = "py"
    MERGEKIT = "mergekit"
    MODEL = "model"


@app.callback(invoke_without_command=True)
def selfdev_(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Without a command: the version, or the help."""
    if version:
        typer.echo(f"selfdev {selfdev.__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def run(
    preset: Annotated[
        str,
        typer.Argument(
            metavar="PRESET|FILE.yaml", help="A preset, such as quickstart, or a file of your own."
        ),
    ],
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one field, such as seed=2.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Folder; runs/NAME-SEED by default.")
    ] = None,
    unsafe_sandbox: Unsafe = False,
    as_json: AsJson = False,
) -> None:
    """Start a run and carry it to its verdict."""
    from selfdev.config import load_config
    from selfdev.report.progress import Progress
    from selfdev.runs import run as start

    config = load_config(preset, changes or ())
    with Progress(_terminal(unsafe_sandbox, to_stderr=as_json), config) as watch:
        finished = start(config, out, preset=preset, watch=watch, unsafe_sandbox=unsafe_sandbox)
    _print_run(finished, unsafe_sandbox, as_json)


@app.command()
def resume(
    folder: RunFolder,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a budget, or how a server is reached."),
    ] = None,
    again: Again = False,
    unsafe_sandbox: Unsafe = False,
    as_json: AsJson = False,
) -> None:
    """Go on with an interrupted or killed run.

    Of a run that is done the result is shown.
    """
    from selfdev.report.progress import Progress
    from selfdev.runs import open_run
    from selfdev.runs import resume as go_on

    earlier = open_run(folder)
    if earlier.archive.run.status == "done" and not again:
        _print_run(earlier, unsafe_sandbox, as_json)
        return
    with Progress(_terminal(unsafe_sandbox, to_stderr=as_json), earlier.config) as watch:
        watch.recall(earlier)
        earlier.archive.close()
        finished = go_on(
            folder, changes=changes or (), watch=watch, unsafe_sandbox=unsafe_sandbox, again=again
        )
    _print_run(finished, unsafe_sandbox, as_json)


@app.command()
def show(
    folder: RunFolder,
    candidate: Annotated[
        str | None, typer.Argument(metavar="CANDIDATE", help="One program, such as learning/2/017.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show a run, or one of its programs."""
    from selfdev.report.candidate import describe, page
    from selfdev.runs import open_run

    opened = open_run(folder)
    if candidate is None:
        _print_run(opened, False, as_json)
        return
    known = describe(opened, candidate)
    if as_json:
        _print_json(known)
    else:
        _terminal().say(page(known))


@app.command()
def transfer(
    folder: RunFolder,
    seed: Annotated[str, typer.Option(metavar="MODEL", help="Where the seed comes from.")],
    expert: Annotated[
        list[str], typer.Option(metavar="NAME=MODEL", help="One of the experts, which the run has not seen.")
    ],
    task: Annotated[
        str | None, typer.Option(metavar="NAME|FILE.yaml", help="Whose questions; the run's by default.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder; one under RUN/transfers by default.")
    ] = None,
    again: Again = False,
    unsafe_sandbox: Unsafe = False,
    as_json: AsJson = False,
) -> None:
    """Apply a finished run's best algorithms unchanged to other models, beside rivals tuned for these.

    One that was interrupted goes on when the same command is given again.
    """
    from selfdev.merging.recipe import read_experts
    from selfdev.report.progress import Progress
    from selfdev.runs import open_run
    from selfdev.transfers import transfer as carry_over

    experts = read_experts(expert)
    with Progress(_terminal(unsafe_sandbox, to_stderr=as_json), open_run(folder).config) as watch:
        finished = carry_over(
            folder, seed, experts, task, out, again=again, watch=watch, unsafe_sandbox=unsafe_sandbox
        )
    _print_run(finished, unsafe_sandbox, as_json)


@app.command()
def methods(as_json: AsJson = False) -> None:
    """List the human-designed merging methods."""
    from selfdev.report.methods import describe_methods, methods_table

    listed = describe_methods()
    if as_json:
        _print_json(listed)
    else:
        _terminal().say(methods_table(listed))


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
def merge(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder to write; must not exist.")],
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
    trust: Annotated[
        bool, typer.Option("--trust", help="Run a FILE.py of your own without the jail, with your rights.")
    ] = False,
) -> None:
    """Merge experts into a seed, and write a model that transformers loads."""
    from selfdev.merging.head_start import HeadStart

    ahead = HeadStart([seed or "", *(each.partition("=")[2] for each in expert or ())])
    with _importing():
        from selfdev.merging.checkpoint import merge_checkpoints
        from selfdev.merging.recipe import Recipe, read_experts, read_parameters
        from selfdev.report.bar import Bar

    if config is not None:
        from selfdev.merging.mergekit_config import read_config

        if method or seed or expert or parameter or targets or dtype or trust:
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
        recipe = Recipe(method, seed, *read, targets, dtype, embeddings, trust)
    with Bar("merging") as bar:
        merged = merge_checkpoints(recipe, out, tick=bar, ahead=ahead)
    typer.echo(merged.summary)


@app.command()
def pairs(
    folder: RunFolder,
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Folder of the dataset; it must not exist.")
    ],
) -> None:
    """Export the preference pairs of a run as a Hugging Face dataset."""
    from selfdev.report.dataset import export_pairs
    from selfdev.runs import open_run

    count = export_pairs(open_run(folder), out)
    _terminal().say(f"{count} pairs in {out}")


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
    from selfdev.merging.export import to_mergekit, to_python

    if to is Export.MODEL:
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
    try:
        with out.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise UserError(f"'{out}' exists already and is not overwritten; choose another --out") from None
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
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Measure, though the same model was asked the same before.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Score a model on a task, question by question."""
    from selfdev.evaluation.harness import compare
    from selfdev.evaluation.measure import measure
    from selfdev.evaluation.score_cache import ScoreCache
    from selfdev.report.measurement import measurement_json, measurement_text

    if beside is None:
        measured, agreement = measure(model, task, split, limit, None if fresh else ScoreCache()), None
    else:
        measured, agreement = compare(model, task, split, limit)
    if as_json:
        _print_json(measurement_json(measured, agreement))
    else:
        typer.echo(measurement_text(measured, agreement))


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Try whether this machine can run a run.

    Exit code 1 if something is missing.
    """
    from selfdev.doctor import checks, report

    found = checks()
    typer.echo(report(found, as_json=as_json))
    if not all(check.ok for check in found):
        raise typer.Exit(1)


@zoo_app.command("list")
def zoo_list() -> None:
    """Name the zoos and their models, as --set merge.seed=... and the config's experts take them."""
    from selfdev.zoo import zoo_models, zoos

    for name in zoos():
        for model in ("seed", *zoo_models(name)["experts"]):
            typer.echo(f"zoo:{name}/{model}")


@zoo_app.command("path")
def zoo_path(name: Zoo) -> None:
    """Print the folder of a zoo."""
    from selfdev.zoo import zoo_path as path

    typer.echo(path(name))


@zoo_app.command("build")
def zoo_build(
    name: Zoo,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Folder; zoo-NAME by default.")
    ] = None,
) -> None:
    """Train a zoo anew; takes minutes."""
    from selfdev.zoo import build

    out = out or Path(f"zoo-{name}")
    build(name, out, typer.echo)
    typer.echo(f"built in {out}; {out / 'seed'} can stand in a config where zoo:{name}/seed does")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: without the program's name; those of the process by default.

    Returns:
        The exit code.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # libraries' advice to programmers; `python -W` brings it back
    mark = _unsafe_mark() if _UNSAFE in arguments else ""
    with _interruptible():
        try:
            code = app(args=arguments, prog_name="selfdev", standalone_mode=False) or 0
        except Interrupted as stopped:
            return _say(mark, str(stopped), stopped.exit_code)
        except SelfdevError as error:
            return _say(mark, f"error: {error}", error.exit_code)
        except _UsageError as error:
            hint = "`selfdev --help` and `selfdev COMMAND --help` tell more"
            return _say(mark, f"error: {error.format_message()} {hint}", 2)
        except (OSError, sqlite3.OperationalError) as error:
            return _say(mark, f"error: {_explain(error)}", 1)
        except (KeyboardInterrupt, typer.Abort):
            code = _STOPPED
        if code == _STOPPED:
            return _say(mark, "stopped before there was anything to resume; give the same command again", 3)
        return int(code)


_STOPPED = 130
"""Typer's exit code for a KeyboardInterrupt, which older versions turn into `typer.Abort`."""

# What typer raises for a wrong command line: click's class, or its own copy of it in newer versions.
_UsageError: Any = typer.BadParameter.__base__


def _unsafe_mark() -> str:
    from selfdev.report.terminal import UNSAFE_MARK

    return UNSAFE_MARK


def _say(mark: str, message: str, code: int) -> int:
    for line in message.splitlines():
        print(f"{mark}{line}", file=sys.stderr)
    return code


def _explain(error: OSError | sqlite3.OperationalError) -> str:
    if getattr(error, "errno", None) == errno.ENOSPC or "disk is full" in str(error):
        return "the disk is full; make room. What a run has archived is safe: `selfdev resume RUN` goes on with it"
    return str(error)


def _terminal(unsafe: bool = False, *, to_stderr: bool = False) -> "Terminal":
    from selfdev.report.terminal import Terminal

    terminal = Terminal(to_stderr=to_stderr, unsafe=unsafe)
    if unsafe:
        from selfdev.sandbox import UNSAFE_NOTICE

        terminal.say(UNSAFE_NOTICE)
    return terminal


def _print_run(opened: "Run", unsafe: bool, as_json: bool) -> None:
    from selfdev.report.result import result
    from selfdev.report.terminal import Terminal
    from selfdev.report.transfer import transfer_result
    from selfdev.transfers import Transfer, is_transfer

    if is_transfer(opened):
        opened = Transfer(opened.folder)
    if as_json:
        _print_json(opened.summary())
    else:
        page = transfer_result(opened) if isinstance(opened, Transfer) else result(opened)
        Terminal(unsafe=unsafe).say("", page)


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2))


@contextmanager
def _interruptible() -> Iterator[None]:
    """The first Ctrl-C ends the command in order, the second at once: nothing archived is lost by either."""
    before = signal.getsignal(signal.SIGINT)

    def first(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, second)
        raise KeyboardInterrupt

    def second(number: int, frame: FrameType | None) -> None:
        if sys.stdout.isatty():
            os.write(1, b"\x1b[?25h\n")  # the live display hides the cursor
        os._exit(3)

    try:
        signal.signal(signal.SIGINT, first)
    except ValueError:  # not the main thread: whoever runs that one handles its signals
        yield
        return
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGINT) is first:
            signal.signal(signal.SIGINT, before)
