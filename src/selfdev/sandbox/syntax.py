"""The syntax-tree check: a fast, labelled rejection of programs that could not work anyway.

No security rests on it. It stops nothing that a hostile program does; it saves a call and names the fault.
"""

import ast
from types import CodeType

ALLOWED_IMPORTS = frozenset(
    {"torch", "math", "functools", "itertools", "collections", "typing", "dataclasses"}
)
ENTRY = "merge_models"
FILENAME = "<candidate>"


class Rejected(Exception):
    """The source is not run.

    Attributes:
        failure: the class of the fault.
    """

    def __init__(self, failure: str, message: str):
        super().__init__(message)
        self.failure = failure


def compile_program(source: str) -> CodeType:
    """Parse, check and compile a program.

    Raises:
        Rejected: not Python, nested too deeply, an import from outside of `ALLOWED_IMPORTS`, or not exactly
            one top-level function `merge_models` of two or three parameters.
    """
    try:
        tree = ast.parse(source, FILENAME)
        check(tree)
        return compile(tree, FILENAME, "exec", dont_inherit=True)
    except SyntaxError as error:
        raise Rejected("SyntaxError", f"{error.msg} (line {error.lineno})") from None
    except (MemoryError, RecursionError):
        raise Rejected("TooComplex", "nested too deeply to be parsed") from None
    except ValueError as error:  # a null byte, a lone surrogate, an integer of too many digits
        raise Rejected("SyntaxError", str(error)) from None


def check(tree: ast.Module) -> None:
    """Raise `Rejected` unless the imports and the entry point are as they must be."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                _check_import(name.name, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            _check_import("." * node.level + (node.module or ""), node.lineno)
    entries = [
        node
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == ENTRY
    ]
    if len(entries) != 1 or not isinstance(entries[0], ast.FunctionDef):
        raise Rejected(
            "NoEntryPoint", f"the program must define exactly one function {ENTRY}, not {len(entries)}"
        )
    arguments = entries[0].args
    positional = len(arguments.posonlyargs) + len(arguments.args)
    required = positional - len(arguments.defaults)
    if required > 3 or (positional < 2 and not arguments.vararg) or None in arguments.kw_defaults:
        message = f"{ENTRY} must take (model_dict, device) or (model_dict, device, context)"
        raise Rejected("WrongSignature", message)


def _check_import(module: str, line: int) -> None:
    if module.partition(".")[0] not in ALLOWED_IMPORTS:
        allowed = ", ".join(sorted(ALLOWED_IMPORTS))
        raise Rejected("ImportNotAllowed", f"import of {module!r} (line {line}); allowed: {allowed}")
