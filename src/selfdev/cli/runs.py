"""Commands that run the cycle, carry it over to other models, and show what came of it."""

from pathlib import Path
from typing import Annotated

import typer

from selfdev.cli.application import Again, AsJson, RunFolder, Unsafe, app, print_json, print_run, terminal
from selfdev.errors import UserError


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
    with Progress(terminal(unsafe_sandbox, to_stderr=as_json), config) as watch:
        finished = start(config, out, preset=preset, watch=watch, unsafe_sandbox=unsafe_sandbox)
    print_run(finished, unsafe_sandbox, as_json)


@app.command()
def resume(
    folder: RunFolder,
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Change a budget, how a server is reached, or the name of a device.",
        ),
    ] = None,
    again: Again = False,
    unsafe_sandbox: Unsafe = False,
    as_json: AsJson = False,
) -> None:
    """Go on with an interrupted or killed run.

    Of a run that is done the result is shown.
    """
    from selfdev.report.progress import Progress
    from selfdev.results import open_run
    from selfdev.runs import resume as go_on

    earlier = open_run(folder)
    if earlier.archive.run.status == "done" and not (again or changes):
        print_run(earlier, unsafe_sandbox, as_json)
        return
    with Progress(terminal(unsafe_sandbox, to_stderr=as_json), earlier.config) as watch:
        watch.recall(earlier)
        earlier.archive.close()
        finished = go_on(
            folder, changes=changes or (), watch=watch, unsafe_sandbox=unsafe_sandbox, again=again
        )
    print_run(finished, unsafe_sandbox, as_json)


@app.command()
def show(
    folder: RunFolder,
    candidate: Annotated[
        str | None, typer.Argument(metavar="CANDIDATE", help="One program, such as learning/2/017.")
    ] = None,
    programs: Annotated[
        bool, typer.Option("--programs", help="List all programs that were written, in short.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show a run, or one of its programs."""
    from selfdev.report.candidate import describe, describe_all, page, programs_page
    from selfdev.results import open_run

    opened = open_run(folder)
    if programs and candidate is not None:
        raise UserError("--programs lists all of them; leave it out, or the name of one")
    if programs:
        listed = describe_all(opened)
        if as_json:
            print_json(listed)
        else:
            terminal().say(programs_page(listed))
        return
    if candidate is None:
        print_run(opened, False, as_json)
        return
    known = describe(opened, candidate)
    if as_json:
        print_json(known)
    else:
        terminal().say(page(known))


@app.command()
def pairs(
    folder: RunFolder,
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Folder of the dataset; it must not exist.")
    ],
) -> None:
    """Export the preference pairs of a run as a Hugging Face dataset."""
    from selfdev.report.dataset import export_pairs
    from selfdev.results import open_run

    count = export_pairs(open_run(folder), out)
    terminal().say(f"{count} pairs in {out}")


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
    from selfdev.results import open_run
    from selfdev.transfers import transfer as carry_over

    experts = read_experts(expert)
    with Progress(terminal(unsafe_sandbox, to_stderr=as_json), open_run(folder).config) as watch:
        finished = carry_over(
            folder, seed, experts, task, out, again=again, watch=watch, unsafe_sandbox=unsafe_sandbox
        )
    print_run(finished, unsafe_sandbox, as_json)
