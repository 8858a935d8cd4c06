"""Commands on this machine: what it can do, and the models that it has."""

from pathlib import Path
from typing import Annotated

import typer

from selfdev.cli.application import AsJson, app

zoo_app = typer.Typer(help="Seeds and experts that come with the project.")
app.add_typer(zoo_app, name="zoo")

Zoo = Annotated[str, typer.Argument(metavar="NAME", help="Which zoo, such as nano.")]


@app.command()
def doctor(
    endpoint: Annotated[
        str, typer.Option(metavar="URL", help="Try this server too, as factory.endpoint.url names it.")
    ] = "",
    as_json: AsJson = False,
) -> None:
    """Try whether this machine can run a run.

    Exit code 1 if something is missing.
    """
    from selfdev.doctor import checks, report

    found = checks(endpoint)
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
    """Print the folder of a zoo, or of one of its models (zoo:nano/seed)."""
    from selfdev.models.sources import resolve
    from selfdev.zoo import zoo_path as path

    bare = name.removeprefix("zoo:")
    typer.echo(resolve(f"zoo:{bare}") if "/" in bare else path(bare))


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
