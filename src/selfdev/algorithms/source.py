"""From the text that a factory wrote to a program in the contract's form, and to its canonical identity.

The contract is `merge_models(model_dict, device) -> Tensor` (see `docs/algorithms.md`). A small factory writes
a short form, one function `merge_NAME(deltas)`; it is wrapped here, so that archive, jail and export hold the
contract's form alone. Nothing in this module runs a program.
"""

import ast
import hashlib
import re
from enum import StrEnum

ENTRY = "merge_models"
OPENING = "def merge_"
"""How a short program begins; it ends the prompt, so that the factory writes on from here."""

_END_OF_FUNCTION = re.compile(r"\n(?=\S)|\n\n\n")
_FENCE = re.compile(r"```[^\n`]*\n(.*?)(?:```|\Z)", re.DOTALL)
_NAME = re.compile(r"def (merge_\w*)\s*\(")
_HEAD = "import torch\n\n\n"
_TAIL = f"\n\n\ndef {ENTRY}(model_dict, device):\n    return {{}}(torch.stack(list(model_dict.values())))\n"


class Form(StrEnum):
    """The form in which a factory is asked to write."""

    SHORT = "short"
    """One function `merge_NAME(deltas)` of the stacked task vectors."""
    CONTRACT = "contract"
    """A Python block with `merge_models(model_dict, device)`, as in the paper."""


class Unreadable(ValueError):
    """No function could be read from what the factory wrote."""


def read_program(text: str, form: Form) -> str:
    """Read a program from what the factory wrote.

    Args:
        text: the completion: for `SHORT` what follows `OPENING`, for `CONTRACT` an answer with a code block, after what
            the model thought in `<think>` and `</think>`.
        form: what was asked for.

    Returns:
        Source in the contract's form, neither parsed nor run.

    Raises:
        Unreadable: there is no function in it.
    """
    if form is Form.SHORT:
        return wrap_short(OPENING + text)
    # What a reasoning model thinks aloud comes first; cut off in it, it has answered nothing.
    answer = text.rpartition("</think>")[2].partition("<think>")[0]
    fenced = _FENCE.findall(answer)
    # The last one that defines it: an answer may begin with the example that it improves on.
    source = next(
        (block for block in reversed(fenced) if f"def {ENTRY}" in block), fenced[0] if fenced else answer
    )
    if f"def {ENTRY}" not in source:
        raise Unreadable(f"no function {ENTRY} in {len(text)} characters")
    return source.strip() + "\n"


def wrap_short(source: str) -> str:
    """Give a short program `merge_NAME(deltas)` the contract's form; what follows the function is cut off.

    Raises:
        Unreadable: it does not begin with such a function, or the function has no body.
    """
    function = _END_OF_FUNCTION.split(source, maxsplit=1)[0].rstrip()
    name = _NAME.match(function)
    if name is None or "\n" not in function:
        raise Unreadable("it does not begin with a function `merge_NAME(...)` and a body")
    called = name[1]
    if called == ENTRY:
        called = f"{ENTRY}_short"
        function = function.replace(ENTRY, called, 1)
    return _HEAD + function + _TAIL.format(called)


def rewrite(text: str, form: Form, source: str) -> str:
    """What the factory would have written if its program had been this one.

    Args:
        text: the completion as it was written.
        form: what was asked for.
        source: the other program, in the contract's form.

    Returns:
        A completion from which `read_program` reads that program.
    """
    if form is Form.SHORT:
        return unwrap_short(source).removeprefix(OPENING).rstrip("\n") + "\n\n\n"
    written = read_program(text, form)
    return (
        text.replace(written.strip(), source.strip())
        if written.strip() in text
        else f"```python\n{source}```"
    )


def unwrap_short(source: str) -> str:
    """The short program inside a wrapped one, or the source itself: what people are shown."""
    body = source.removeprefix(_HEAD)
    name = _NAME.match(body)
    short = body.removesuffix(_TAIL.format(name[1])) if name else body
    return source if short == body else short + "\n"


def canonical(source: str) -> str:
    """Identify a program with names, constants, docstrings, annotations, comments and the order of sums aside.

    Two programs with one identity differ at most in what they call things, in their numbers, and in the order of the
    terms of a sum or the factors of a product. Names of modules, attributes, keyword arguments and builtins stay.

    Args:
        source: a program that parses.

    Returns:
        32 hexadecimal digits.
    """
    tree = _Canonical(_bound_names(ast.parse(source))).visit(ast.parse(source))
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()[:32]


def _bound_names(tree: ast.AST) -> set[str]:
    """Names that the program itself gives: functions, arguments, assigned variables."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


class _Canonical(ast.NodeTransformer):
    """Numbers the program's own names in the order of their appearance and blanks its constants."""

    def __init__(self, own: set[str]):
        self.own = own
        self.numbers: dict[str, str] = {}

    def rename(self, name: str) -> str:
        if name not in self.own:
            return name
        return self.numbers.setdefault(name, f"_{len(self.numbers)}")

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.name = self.rename(node.name)
        node.returns = None
        if ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
        return self.generic_visit(node)

    def visit_arg(self, node: ast.arg) -> ast.AST:
        node.arg, node.annotation = self.rename(node.arg), None
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        if node.value is None:
            return ast.Pass()
        return self.generic_visit(ast.Assign(targets=[node.target], value=node.value))

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        if not isinstance(node.op, ast.Add | ast.Mult):
            return self.generic_visit(node)
        # A name is bound before it is used, so its number does not hang on where in the sum it stands.
        terms: list[ast.expr] = [self.visit(term) for term in _terms(node, type(node.op))]
        ordered, *others = sorted(terms, key=ast.dump)
        for other in others:
            ordered = ast.BinOp(ordered, node.op, other)
        return ordered

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return ast.Name(id=self.rename(node.id), ctx=ast.Load())

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        number = isinstance(node.value, int | float) and not isinstance(node.value, bool)
        return ast.Constant(value=0 if number else node.value)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.AST:
        operand = self.visit(node.operand)
        if isinstance(node.op, ast.USub) and isinstance(operand, ast.Constant):
            return operand  # a negative number is a number
        node.operand = operand
        return node


def _terms(node: ast.expr, operation: type[ast.operator]) -> list[ast.expr]:
    """The terms of a sum of sums, or the factors of a product of products."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, operation):
        return _terms(node.left, operation) + _terms(node.right, operation)
    return [node]
