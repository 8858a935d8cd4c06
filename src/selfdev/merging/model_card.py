"""The README.md of a merged model: how it was made, of what, and what is known of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import yaml

from selfdev import __version__
from selfdev.merging.algorithm import Origin
from selfdev.merging.recipe import Recipe
from selfdev.models.sources import hub_name


@dataclass(frozen=True)
class Input:
    """A model that went into the merge.

    Attributes:
        name: `seed`, or the expert's.
        source: as the user gave it.
        files: sha256 by name of its config, of each of its files of weights, of a GGUF file that they were made of,
            and of what else of it was copied, such as the tokenizer. Of an adapter on the seed its own files alone.
    """

    name: str
    source: str
    files: Mapping[str, str]


def model_card(
    recipe: Recipe, targets: str, counts: tuple[int, int], origin: Origin, inputs: Sequence[Input]
) -> str:
    """The card, in the Hub's format.

    Args:
        recipe: what was merged, and how.
        targets: that were merged.
        counts: how many tensors were merged, and how many there are.
        origin: of the algorithm.
        inputs: all that went in, the seed first; one that is named twice has more files.
    """
    names = list(dict.fromkeys(name for each in inputs if (name := hub_name(each.source))))
    front = {
        **({"base_model": names} if names else {}),
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["merge", "selfdev"],
    }
    merged, tensors = counts
    counted = "1 expert" if len(recipe.experts) == 1 else f"{len(recipe.experts)} experts"
    rest = "" if merged == tensors else " The others are the seed's."
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        "# Merged model",
        f"Made by selfdev {__version__}: {counted} merged into a seed by {origin.title}. "
        f"{merged} of {tensors} tensors were merged (targets `{targets}`), in float32.{rest}",
        "## Recipe",
        _block(recipe.command(targets), "sh"),
        *([_block(recipe.schedule.text.rstrip(), "yaml")] if recipe.schedule else []),
        "## Inputs",
        "\n".join(
            [
                "| model | source | file | sha256 |",
                "| --- | --- | --- | --- |",
                *(
                    f"| {each.name} | `{_cell(each.source)}` | {_cell(file)} | `{digest}` |"
                    for each in inputs
                    for file, digest in each.files.items()
                ),
            ]
        ),
        "## Algorithm",
        _block(origin.source.rstrip(), "python"),
    ]
    if origin.evidence:
        parts += ["## Evidence", "\n".join(origin.evidence)]
    return "\n\n".join(parts) + "\n"


def _cell(text: str) -> str:
    """As it can stand in a table: the names of files are anybody's."""
    return " ".join(text.split()).replace("|", r"\|")


def _block(text: str, language: str) -> str:
    """A fenced block that no fence inside the text can end: programs are written by models."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}{language}\n{text}\n{fence}"
