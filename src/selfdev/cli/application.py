"""What the commands share: the application, options that several take, and how they print."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import selfdev

if TYPE_CHECKING:
    from selfdev.report.terminal import Terminal
    from selfdev.results import Run

UNSAFE = "--unsafe-sandbox"

app = typer.Typer(
    help="A language model invents model-merging algorithms, and trains itself on what worked.",
    rich_markup_mode=None,  # plain help, and rich need not be imported for it
    add_completion=False,
    pretty_exceptions_enable=False,
)

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run, such as runs/quickstart-1.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout; progress goes to stderr.")]
Again = Annotated[
    bool,
    typer.Option(
        "--again", help="Open a test split that has been opened once more, measure anew, and mark it."
    ),
]
Unsafe = Annotated[
    bool, typer.Option(UNSAFE, help="Run model-written code with resource limits alone, without the jail.")
]


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


def terminal(unsafe: bool = False, *, to_stderr: bool = False) -> "Terminal":
    """Where people read; without the jail, a notice comes first."""
    from selfdev.report.terminal import Terminal

    made = Terminal(to_stderr=to_stderr, unsafe=unsafe)
    if unsafe:
        from selfdev.sandbox import UNSAFE_NOTICE

        made.say(UNSAFE_NOTICE)
    return made


def print_run(opened: "Run", unsafe: bool, as_json: bool) -> None:
    """Print what a run or a transfer came to."""
    from selfdev.report.result import result
    from selfdev.report.terminal import Terminal
    from selfdev.report.transfer import transfer_result
    from selfdev.results import Transfer

    if as_json:
        print_json(opened.summary())
    else:
        page = transfer_result(opened) if isinstance(opened, Transfer) else result(opened)
        Terminal(unsafe=unsafe).say("", page)


def print_json(value: Any) -> None:
    """Print a value for other programs."""
    typer.echo(json.dumps(value, indent=2))
