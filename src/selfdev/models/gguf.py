"""GGUF files of llama.cpp, dequantised into a folder of transformers' format.

The work is done in a process of its own, since it prints progress bars that cannot be turned off from within. Tensors
are dequantised and written one at a time; mixtures of experts, of which transformers puts tensors together from
several, are taken whole and need three times the model's memory. As a script: `python -m selfdev.models.gguf FILE.gguf
FOLDER`.
"""

import json
import logging
import math
import os
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from selfdev.errors import UserError
from selfdev.models.digest import FileDigest

_log = logging.getLogger(__name__)

_NOTE = "gguf.sha256"
"""File of a dequantised model's folder that holds the hash of what it was made of."""


def gguf_model(gguf: Path, cache: Path) -> Path:
    """The folder of a GGUF file's model: from the cache, or dequantised into it.

    Args:
        gguf: the file.
        cache: the folder of model folders; each one's name says the file's hash.

    Raises:
        UserError: as `dequantise` does, or the cache cannot be written.
    """
    digest = FileDigest(gguf).finish()
    target = cache / f"gguf-{digest[:32]}"
    if (target / "config.json").is_file():
        with suppress(OSError):  # older caches have no note, and need not be writable
            note_source(target, digest)
        return target
    _log.info("dequantising %s; this takes a minute, once", gguf.name)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=cache) as aside:
            dequantise(gguf, Path(aside) / "model")
            note_source(Path(aside) / "model", digest)
            try:
                (Path(aside) / "model").rename(target)
            except OSError:
                if not (target / "config.json").is_file():  # else another process was faster
                    raise
    except OSError as error:
        raise UserError(
            f"the model of '{gguf}' cannot be put into '{cache}': {error.strerror or error}; "
            "make room, or point SELFDEV_CACHE elsewhere"
        ) from error
    return target


def note_source(folder: Path, digest: str) -> None:
    """Note in a dequantised model's folder the sha256 of its GGUF file, unless it is noted."""
    note = folder / _NOTE
    if not note.is_file():
        note.write_text(digest + "\n")


def noted_source(folder: Path) -> str | None:
    """The sha256 of the GGUF file that a folder was made of; None if it was not, or nobody noted it."""
    try:
        return (folder / _NOTE).read_text().strip()
    except OSError:
        return None


def dequantise(gguf: Path, out: Path) -> None:
    """Write the model in a GGUF file and its tokenizer as float32 safetensors.

    The same file and the same versions of transformers and gguf give the same bits.

    Args:
        gguf: of an architecture that transformers reads from GGUF (Llama, Mistral, Qwen, ...).
        out: the folder to write, which need not exist.

    Raises:
        UserError: the file is damaged or of another architecture, or there is no room for the result.
    """
    # -P: a folder `selfdev` in the working directory must not stand in for the package.
    work = [sys.executable, "-P", "-m", "selfdev.models.gguf", str(gguf), str(out)]
    offline = {**os.environ, "HF_HUB_OFFLINE": "1"}  # everything is in the file
    done = subprocess.run(
        work, env=offline, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace"
    )
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() if done.returncode > 0 else []
        reason = lines[-1] if lines else f"killed by signal {-done.returncode}, perhaps for want of memory"
        raise UserError(
            f"'{gguf.name}' cannot be dequantised: {reason}; "
            "see that the cache has room, or give a folder with safetensors instead"
        )


def _convert(gguf: Path, out: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    out.mkdir(parents=True)
    if _streamed(gguf, model, out / "model.safetensors"):
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(out)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(out)
    else:
        _convert_whole(gguf, out)
    tokenizer.save_pretrained(out)


def _streamed(gguf: Path, model: Any, file: Path) -> bool:
    """Write the weights one at a time, where save_pretrained would put them.

    Returns:
        False for the architectures of which transformers puts tensors together from several (mixtures of experts).
    """
    import torch
    from gguf import GGUFReader, dequantize
    from transformers import modeling_gguf_pytorch_utils as transformers_gguf

    reader = GGUFReader(gguf)
    parts = reader.fields.get("split.count")
    if parts is not None and parts.contents() > 1:
        sys.exit(
            f"it is one of {parts.contents()} parts; join them with llama.cpp's llama-gguf-split --merge"
        )
    architecture = reader.fields["general.architecture"].contents()
    kind = transformers_gguf.TENSOR_PROCESSORS.get(architecture, transformers_gguf.TensorProcessor)
    processor = kind(config=model.config.to_dict())
    names = transformers_gguf.get_gguf_hf_weights_map(model, processor)
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    stored = {tensor.name: names[tensor.name] for tensor in reader.tensors if tensor.name in names}
    tied = model.all_tied_weights_keys if model.config.tie_word_embeddings else {}
    if set(stored.values()) | set(tied) != set(shapes):
        return False
    places, end = {}, 0
    for name in sorted(stored.values()):
        size = 4 * math.prod(shapes[name])
        places[name] = {"dtype": "F32", "shape": shapes[name], "data_offsets": [end, end + size]}
        end += size
    header = json.dumps({"__metadata__": {"format": "pt"}, **places}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with file.open("xb") as writing:
        writing.write(len(header).to_bytes(8, "little") + header)
        for tensor in reader.tensors:
            if tensor.name not in stored:
                continue
            put_together: dict[str, dict[str, Any]] = {"tensors": {}}
            result = processor.process(
                weights=dequantize(tensor.data, tensor.tensor_type),
                name=tensor.name,
                tensor_key_mapping=names,
                parsed_parameters=put_together,
            )
            place = places[stored[tensor.name]]
            if put_together["tensors"] or list(result.weights.shape) != place["shape"]:
                file.unlink()
                return False
            writing.seek(8 + len(header) + place["data_offsets"][0])
            writing.write(torch.from_numpy(result.weights.copy()).to(torch.float32).numpy().data)
    return True


def _convert_whole(gguf: Path, out: Path) -> None:
    """All at once, which takes three times the model's memory."""
    import torch
    from transformers import AutoModelForCausalLM

    loaded, found = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, output_loading_info=True
    )
    # What is missing transformers fills with random numbers.
    if missing := sorted(set(found["missing_keys"]) - set(loaded.all_tied_weights_keys)):
        sys.exit(f"it lacks {len(missing)} tensors of its architecture, such as {missing[0]}")
    # A model loaded from GGUF calls itself quantised, although it no longer is, and refuses to be saved.
    described = loaded.config.to_dict()
    described.pop("quantization_config", None)
    model = AutoModelForCausalLM.from_config(type(loaded.config).from_dict(described), dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(out)


if __name__ == "__main__":
    _convert(Path(sys.argv[1]), Path(sys.argv[2]))
