"""Discovered programs as files that need nothing of this project.

The program's text is copied as its factory wrote it; nothing here runs it. Read it before you do.
"""

import ast
import re
from pathlib import Path

from selfdev.algorithms.source import ENTRY
from selfdev.errors import UserError
from selfdev.merging.discovered import Discovered, load_candidate
from selfdev.merging.targets import pattern_of

_WRITTEN = f"{ENTRY}_as_written"

_MERGEKIT = '''

MERGED = re.compile({pattern!r})
LEAST_DIMENSIONS = {dimensions}


@merge_method(
    name={name!r},
    pretty_name={pretty!r},
    contract=InputContract(base=BasePolicy.REQUIRED, min_inputs=2),
)
def discovered(group: TensorGroup) -> torch.Tensor:
    """The base model, plus what the program makes of the others' differences from it; other tensors stay the base's."""
    base = group.base.tensor
    if not MERGED.search(group.metadata.name or "") or base.ndim < LEAST_DIMENSIONS:
        return base
    seed = base.float()
    task_vectors = {{str(entry.id): entry.tensor.float() - seed for entry in group.non_base}}
    return (seed + merge_models(task_vectors, base.device.type)).to(base.dtype)


register(discovered)

if __name__ == "__main__":
    from mergekit.scripts.run_yaml import main

    main()
'''


def to_python(run: Path, name: str) -> str:
    """One file with `merge_models(model_dict, device)`, which needs torch alone.

    Args:
        run: folder of the run.
        name: of the candidate.

    Raises:
        UserError: as `load_candidate`.
    """
    found = load_candidate(run, name)
    use = (
        f"`{ENTRY}(model_dict, device)` takes each expert's task vector of one tensor by name (expert minus seed, "
        "float32)\nand returns what is to be added to the seed's tensor."
    )
    return _docstring(found, use) + _program(found)


def to_mergekit(run: Path, name: str) -> str:
    """A module that registers the program as a merge method of mergekit (0.1.5), and can be called as mergekit-yaml.

    Args:
        run: folder of the run.
        name: of the candidate.

    Raises:
        UserError: as `load_candidate`; a program that asks for its context, which mergekit does not tell.
    """
    found = load_candidate(run, name)
    if _takes_context(found.origin.source):
        raise UserError(
            f"candidate '{name}' asks for its context (layer, number of layers), which mergekit does not tell; "
            "export it --to py or --to model"
        )
    method = method_name(found)
    use = (
        "mergekit finds no methods by itself, so run this file in the place of mergekit-yaml:\n\n"
        f"    python THIS_FILE.py CONFIG.yml OUT\n\nwith `merge_method: {method}` and the seed as `base_model`."
    )
    pattern, dimensions = pattern_of(found.config.merge.targets)
    imports = (
        "import re\n\n"
        "from mergekit.merge_methods.base import BasePolicy, InputContract, TensorGroup\n"
        "from mergekit.merge_methods.easy_define import merge_method\n"
        "from mergekit.merge_methods.registry import register\n\n"
    )
    registered = _MERGEKIT.format(
        pattern=pattern, dimensions=dimensions, name=method, pretty=found.origin.title
    )
    return _docstring(found, use) + imports + _program(found) + registered


def method_name(found: Discovered) -> str:
    """What mergekit's YAML calls it, such as `selfdev_learning_2_017`."""
    return "selfdev_" + re.sub(r"\W+", "_", found.candidate.name)


def _docstring(found: Discovered, use: str) -> str:
    title = found.origin.title[0].upper() + found.origin.title[1:]
    text = "\n".join([f"{title}.", "", use, "", *found.origin.evidence]).strip()
    quoted = text.replace("\\", "\\\\").replace('"""', r"\"\"\"")
    return f'"""{quoted}\n"""\n\n'


def _program(found: Discovered) -> str:
    """The source, under its tuned scale if it has one."""
    source = found.origin.source.strip() + "\n"
    if found.factor == 1:
        return source
    source = re.sub(rf"\b{ENTRY}\b", _WRITTEN, source)
    arguments = "model_dict, device, context" if _takes_context(found.origin.source) else "model_dict, device"
    return (
        f"{source}\n\ndef {ENTRY}({arguments}):\n"
        f'    """The program at {found.factor:g} times its scale, where it was best on development."""\n'
        f"    return {found.factor!r} * {_WRITTEN}({arguments})\n"
    )


def _takes_context(source: str) -> bool:
    functions = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    entry = next(function for function in functions if function.name == ENTRY)
    return len(entry.args.posonlyargs + entry.args.args) > 2
