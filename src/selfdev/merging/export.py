"""Discovered programs as files that need nothing of this project.

The program's text is copied as its factory wrote it; nothing here runs it. Read it before you do.
"""

import ast
import re
from pathlib import Path

from selfdev.algorithms.source import ENTRY
from selfdev.errors import SelfdevError, UserError
from selfdev.merging.discovered import Discovered, load_candidate
from selfdev.merging.targets import LAYER, pattern_of

_WRITTEN = f"{ENTRY}_as_written"

_MERGEKIT = '''
MERGED = re.compile({pattern!r})
LEAST_DIMENSIONS = {dimensions}
FACTOR = {factor!r}
PROGRAM = """\\
{program}"""
{context_of}

def program_for(name: str) -> Callable[..., torch.Tensor]:
    """The program, in a namespace of its own for each tensor, with the random numbers that it drew in its run."""
    drawn = hashlib.sha256(f"{stream}/{{name}}".encode()).digest()
    torch.manual_seed(int.from_bytes(drawn[:8], "big") >> 1)
    namespace: dict[str, Any] = {{"__name__": "candidate"}}
    exec(compile(PROGRAM, {candidate!r}, "exec"), namespace)
    return namespace["{entry}"]


@merge_method(
    name={name!r},
    pretty_name={title!r},
    contract=InputContract(base=BasePolicy.REQUIRED, min_inputs=2),
)
def discovered(group: TensorGroup{parameter}) -> torch.Tensor:
    """The base model, plus what the program makes of the others' differences from it; other tensors stay the base's."""
    base, name = group.base.tensor, group.metadata.name or ""
    if not MERGED.search(name) or base.ndim < LEAST_DIMENSIONS:
        return base
    seed = base.float()
    task_vectors = {{str(entry.id): entry.tensor.float() - seed for entry in group.non_base}}
    merged = program_for(name)(task_vectors, base.device.type{argument})
    return (seed + FACTOR * merged.detach()).to(base.dtype)


register(discovered)

if __name__ == "__main__":
    from mergekit.scripts.run_yaml import main

    main()
'''

# In the exported module: what the contract's third argument holds, from what mergekit tells of a tensor.
_MERGEKIT_CONTEXT = '''LAYER = re.compile({layer!r})


@dataclass(frozen=True)
class TensorContext:
    """The base model's tensor, its name, its layer from 0 (-1 if it has none), and the number of layers."""

    seed: torch.Tensor
    name: str
    layer: int
    layers: int


@cache
def layers_of(model: ModelReference) -> int:
    """How many layers a model's config names."""
    return model.config().get_text_config().num_hidden_layers


def context_of(group: TensorGroup, layers: int) -> TensorContext:
    """What the program is told; a copy, since it may write into it."""
    name = group.metadata.name
    found = LAYER.search(name)
    layers = layers or layers_of(group.base.id)
    return TensorContext(group.base.tensor.float().clone(), name, int(found[1]) if found else -1, layers)
'''


def to_python(run: Path, name: str) -> str:
    """One file with `merge_models(model_dict, device)`, or with a third argument `context`, which needs torch alone.

    Args:
        run: folder of the run.
        name: of the candidate.

    Raises:
        UserError: as `load_candidate`.
    """
    found = load_candidate(run, name)
    context = _takes_context(found.origin.source)
    use = (
        f"`{ENTRY}({_arguments(context=context)})` takes each expert's task vector of one tensor by name (expert "
        "minus seed,\nfloat32) and returns what is to be added to the seed's tensor."
    )
    if context:
        use += (
            " `context` is any object with these attributes:\n`seed`, the seed's tensor (float32); `name`, the "
            "parameter's; `layer`, the index of its layer from 0, -1 if\nit has none; `layers`, how many the model has."
        )
    use += "\nIf it draws random numbers: the run seeded torch anew for each tensor."
    return _docstring(found, use) + _program(found)


def to_mergekit(run: Path, name: str) -> str:
    """A module that registers the program as a merge method of mergekit (0.1.5), and can be called as mergekit-yaml.

    Args:
        run: folder of the run.
        name: of the candidate.

    Raises:
        UserError: as `load_candidate`.
    """
    found = load_candidate(run, name)
    context = _takes_context(found.origin.source)
    method = method_name(found)
    use = (
        "mergekit finds no methods by itself, so run this file in the place of mergekit-yaml:\n\n"
        f"    python THIS_FILE.py CONFIG.yml OUT\n\nwith `merge_method: {method}` and the seed as `base_model`."
    )
    if context:
        use += (
            " The program asks for the number of\nlayers, which comes from the base model's config; where that cannot "
            "be read, say it yourself\n(`parameters: {layers: 30}`)."
        )
    pattern, dimensions = pattern_of(found.config.merge.targets)
    imports = [
        "import hashlib",
        "import re",
        "from collections.abc import Callable",
        *(["from dataclasses import dataclass", "from functools import cache"] if context else []),
        "from typing import Any",
        "",
        "import torch",
        *(["from mergekit.common import ModelReference"] if context else []),
        "from mergekit.merge_methods.base import BasePolicy, InputContract, TensorGroup",
        "from mergekit.merge_methods.easy_define import merge_method",
        "from mergekit.merge_methods.registry import register",
        "",
    ]
    registered = _MERGEKIT.format(
        pattern=pattern,
        dimensions=dimensions,
        context_of=_MERGEKIT_CONTEXT.format(layer=LAYER.pattern) if context else "",
        candidate=found.candidate.name,
        entry=ENTRY,
        factor=float(found.factor),
        name=method,
        program=_quoted(found.origin.source.strip() + "\n"),
        stream="/".join(map(str, (found.config.seed, *found.stream))),
        title=found.origin.title,
        parameter=", layers: int = 0" if context else "",
        argument=", context_of(group, layers)" if context else "",
    )
    return _docstring(found, use) + "\n".join(imports) + registered


def write_export(text: str, out: Path) -> None:
    """Write an exported program; what fails leaves nothing.

    Raises:
        UserError: there is such a file, or there can be none.
        SelfdevError: it cannot be written.
    """
    try:
        file = out.open("x", encoding="utf-8")
    except FileExistsError:
        raise UserError(f"'{out}' exists already and is not overwritten; choose another --out") from None
    except OSError as error:
        raise UserError(f"'{out}' cannot be written: {error.strerror}; choose another --out") from error
    try:
        with file:
            file.write(text)
    except OSError as error:
        out.unlink(missing_ok=True)
        raise SelfdevError(
            f"'{out}' cannot be written: {error.strerror}; make room, or choose another --out"
        ) from error


def method_name(found: Discovered) -> str:
    """What mergekit's YAML calls it, such as `selfdev_learning_2_017`."""
    return "selfdev_" + re.sub(r"\W+", "_", found.candidate.name)


def _docstring(found: Discovered, use: str) -> str:
    title = found.origin.title[0].upper() + found.origin.title[1:]
    text = "\n".join([f"{title}.", "", use, "", *found.origin.evidence]).strip()
    return f'"""{_quoted(text)}\n"""\n\n'


def _quoted(text: str) -> str:
    """As it stands between triple quotes."""
    return text.replace("\\", "\\\\").replace('"""', r"\"\"\"")


def _program(found: Discovered) -> str:
    """The source, under its tuned scale if it has one."""
    source = found.origin.source.strip() + "\n"
    if found.factor == 1:
        return source
    source = re.sub(rf"\b{ENTRY}\b", _WRITTEN, source)
    arguments = _arguments(context=_takes_context(found.origin.source))
    return (
        f"{source}\n\ndef {ENTRY}({arguments}):\n"
        f'    """The program at {found.factor:g} times its scale, where it was best on development."""\n'
        f"    return {found.factor!r} * {_WRITTEN}({arguments})\n"
    )


def _arguments(*, context: bool) -> str:
    return "model_dict, device, context" if context else "model_dict, device"


def _takes_context(source: str) -> bool:
    """As the jail decides it of the function: the third parameter is named so, or has no default of its own."""
    functions = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    entry = next(function for function in functions if function.name == ENTRY)
    positional = entry.args.posonlyargs + entry.args.args
    if len(positional) < 3:
        return False
    # A decorator mostly makes a function of other parameters, which is then called with those that it must have.
    named = positional[2].arg == "context" and not entry.decorator_list
    return named or len(positional) - len(entry.args.defaults) >= 3
