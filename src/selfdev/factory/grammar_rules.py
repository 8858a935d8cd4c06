"""The grammar of one line of a short program, in the notation of llguidance (Lark's, with parameters).

A line is what fits between two newlines: the part of Python that merging algorithms are written in. Names are those in
scope, attributes of `torch` and methods of tensors those that there are, what must be called is called, and a keyword
comes once. Not in it: definitions, imports, lambdas, `while`, `try` and `with`, dicts, strings with quotes in them,
brackets over several lines. No working program of the quickstart's factory had any of these.

In the element of a comprehension names come before the `for` that gives them. So its rules (`_e`) take any name, and
when the `for` has been written the grammar is made again, with a target that gives them all (`grammar_place.Inside`).
The same goes for its condition (`_c`) when the `if` has been written.
"""

import keyword
from collections.abc import Iterable, Iterator
from functools import cache
from inspect import isroutine
from string import Template
from types import ModuleType

import torch

from selfdev.factory.grammar_place import BUILTINS, CONSUMERS, STEP, Inside, Place

KEYWORDS = (
    *("dim", "keepdim", "axis", "descending", "largest", "sorted", "stable", "reverse", "strict", "right"),
    *(
        "min",
        "max",
        "p",
        "ord",
        "k",
        "q",
        "eps",
        "rtol",
        "atol",
        "alpha",
        "beta",
        "value",
        "weight",
        "weights",
    ),
    *(
        "correction",
        "unbiased",
        "full_matrices",
        "diagonal",
        "dims",
        "shifts",
        "decimals",
        "base",
        "fill_value",
    ),
    *("input", "other", "index", "src", "start", "end", "steps", "size", "nan", "posinf", "neginf"),
    *("dtype", "device"),
)
"""Of arguments; their places are bits of one number, so there may be 64."""

NULLARY = (
    *(
        "abs",
        "absolute",
        "neg",
        "negative",
        "positive",
        "sign",
        "sgn",
        "square",
        "sqrt",
        "rsqrt",
        "reciprocal",
    ),
    *("exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sigmoid", "relu", "erf", "erfc", "lgamma"),
    *("sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "tanh", "ceil", "floor", "trunc", "frac"),
    *("t", "trace", "det", "inverse", "ravel", "numel", "item", "tolist", "isfinite", "isinf", "isnan"),
)
"""Methods of tensors that take no argument."""

PROPERTIES = (
    *("T", "mT", "shape", "dtype", "device", "ndim", "real", "imag"),
    *("values", "indices", "eigenvalues", "eigenvectors", "S", "U", "V", "Vh", "Q", "R", "logabsdet"),
)
"""Attributes that are not called: those of tensors, and the parts of what `max`, `sort`, `svd` and others return."""

_NAMESPACES = ("", "linalg", "special", "fft", "nn.functional")

_TOP = r"""
start: $lines
EOL: /(  ?# ?[^\n]*)?\n/
docstring: DOC
DOC: /\"\"\"[^"\\\n][^"\\\n]*(\n{1,2} {4,12}[^"\\\n ][^"\\\n]*)*(\n {4})?\"\"\"/
    | /\"\"\"\n {4}[^"\\\n ][^"\\\n]*(\n{1,2} {4,12}[^"\\\n ][^"\\\n]*)*(\n {4})?\"\"\"/
comment: COMMENT
COMMENT: /# ?[^\n]{1,160}\n/
after: /[^ \n][^\n]*/
simple: given (", " given)* " = " expr (", " expr)*
    | NAME SET expr
    | NAME "[" index (COMMA index)* "]" (" = " | SET) expr
    | NAME "." (METHOD | APPEND) "(" args ")"
    | NAME "." NULLARY "()"
    | "pass"
header: "for " given (", " given)* " in " expr ":"
    | "for " given ", (" given (", " given)* ") in " expr ":"
    | "if " expr ":"
given: GIVEN
target: $targets
ANY: $any
GIVEN: $given
COMMA: /, ?/
SLICE: / ?: ?/
SIGN: /[-~]/
OP: / ?(\*\*|\*|\/\/|\/|\+|-|@|<=|>=|==|!=|<|>|&|\||%|\^) ?/ | / (is|is not|in|not in) /
SET: / (\+|-|\*|\/|\*\*|\/\/|@|&|\|)= /
LITERAL: /(0|[1-9][0-9]{0,8})(\.[0-9]{0,12})?([eE][-+]?[0-9]{1,2})?/ | /True|False|None/
    | /"[a-z_]{0,20}"|'[a-z_]{0,20}'/ | /torch\.($constants)/
CONSUMER: /($consumers)/
BUILTIN: /($builtins)/
TORCH: /torch\.($functions)/
METHOD: /($methods)/
NULLARY: /($nullary)/
PROPERTY: /($properties)/
APPEND: /append|extend|insert/
"""

_EXPRESSIONS = r"""
expr$s: either$s (" if " either$s " else " expr$s)?
either$s: negated$s ((" and " | " or ") negated$s)*
negated$s: "not " negated$s | operand$s (OP operand$s)*
operand$s: SIGN? (LITERAL | postfix$s)
postfix$s: atom$s trailer$s*
atom$s: $name
    | "(" expr$s (COMMA expr$s)* ")"
    | "[" (expr$s (COMMA expr$s)* | inside$s)? "]"
    | TORCH "(" args$s? ")"
    | BUILTIN "(" args$s ")"
    | CONSUMER "(" (args$s | inside$s)? ")"
trailer$s: "." PROPERTY | "." NULLARY "()" | "." METHOD "(" args$s? ")" | "[" index$s (COMMA index$s)* "]"
index$s: expr$s | "..." | expr$s? SLICE expr$s? (SLICE expr$s?)?
args$s: expr$s (COMMA expr$s)* (COMMA named$s::0x0)? | named$s::0x0
named$s::_: $keywords
more$s::_: "" | COMMA named$s::_
inside$s: expr_e " for " target " in " either$s (" if " $condition)?
"""


def rules_of(place: Place, inside: Inside, begun: str) -> str:
    """The grammar of the line that begins at a place.

    Args:
        place: where it begins.
        inside: what it says of its own names so far.
        begun: the newlines and spaces of it that the last token of the line before has written already.
    """
    callable_ = BUILTINS - place.names - inside.given
    reserved = {*keyword.kwlist, "torch"}
    named = " | ".join(
        f'"{name}=" expr$s more$s::set_bit({bit}) %if bit_clear({bit})' for bit, name in enumerate(KEYWORDS)
    )
    scopes = {"": _in_scope(place.names), "_e": _name_but(reserved | callable_)}
    condition = "either_e"
    if inside.bound:
        scopes["_c"] = _in_scope(place.names | inside.bound)
        condition = "either_c"
    top = _fill(
        _TOP,
        lines=" | ".join(_lines(place, begun)),
        targets=_targets(inside),
        any=_name_but(reserved),
        given=_name_but(reserved | place.called),
        consumers=_one_of(CONSUMERS & callable_),
        builtins=_one_of(callable_ - CONSUMERS),
        **_vocabulary(),
    )
    parts = [top]
    for suffix, lexeme in scopes.items():
        name = f"NAME{suffix.upper()}"
        rules = _fill(_EXPRESSIONS, keywords=named, name=name, condition=condition)
        parts += [_fill(rules, s=suffix), f"{name}: {lexeme}\n"]
    return "".join(parts)


def _lines(place: Place, begun: str) -> Iterator[str]:
    """The lines that may stand at a place, from where `begun` left off."""
    spaces = begun.lstrip("\n")
    if place.may_end and not spaces:
        yield r'"" | /\n{1,2}/? after'
    for column in place.columns:
        if len(spaces) > column:
            continue
        blank = "" if "\n" in begun or spaces else r'"\n"? '
        left = " " * (column - len(spaces))
        lead = blank + (f'"{left}" ' if left else "")
        yield f"{lead}(simple EOL | comment) {_blanks(column)}"
        yield f"{lead}header EOL {_blanks(column + STEP)}"
        back = _blanks(column - STEP)
        yield f'{lead}"return " expr (EOL {back})?'
        if place.in_loop(column):
            yield f'{lead}("break" | "continue") EOL {back}'
        if column in place.alternatives:
            yield f'{lead}("else:" | "elif " expr ":") EOL {_blanks(column + STEP)}'
        if place.first:
            yield f"{lead}docstring EOL {_blanks(column)}"


def _blanks(column: int) -> str:
    """What the token that ends a line may write of the next one: newlines, and spaces up to a column."""
    spaces = rf"/\n{{0,1}} {{1,{column}}}/ | " if column else ""
    return rf"({spaces}/\n{{1,2}}/)?"


def _targets(inside: Inside) -> str:
    if inside.wanted is None:
        return 'ANY (", " ANY)* | ANY ", (" ANY (", " ANY)* ")"'
    texts = [f'"{text}"'.replace("*", '" ANY "') for text in (*inside.targets, *inside.wanted)]
    return " | ".join(text.replace('"" ', "").replace(' ""', "") for text in texts)


@cache
def _vocabulary() -> dict[str, str]:
    """What torch and its tensors have, as alternatives of regular expressions."""
    functions: list[str] = []
    for space in _NAMESPACES:
        module: ModuleType = torch
        for part in space.split(".") if space else ():
            module = getattr(module, part)
        routines = [name for name in _public(module) if isroutine(getattr(module, name))]
        functions += [f"{space}.{name}".lstrip(".") for name in routines]
    constants = [name for name in _public(torch) if isinstance(getattr(torch, name), torch.dtype | float)]
    methods = {name for name in _public(torch.Tensor) if isroutine(getattr(torch.Tensor, name))}
    return {
        "functions": _one_of(functions),
        "constants": _one_of(constants),
        "methods": _one_of(methods - {*NULLARY, *PROPERTIES}),
        "nullary": _one_of(NULLARY),
        "properties": _one_of(PROPERTIES),
    }


def _public(owner: object) -> list[str]:
    """Names of its own that change nothing in place."""
    return [name for name in dir(owner) if not name.startswith("_") and not name.endswith("_")]


def _one_of(names: Iterable[str]) -> str:
    return "|".join(name.replace(".", r"\.") for name in sorted(names)) or "[^\\x00-\\xff]"


def _in_scope(names: Iterable[str]) -> str:
    return f"/{_one_of(names)}/"


def _name_but(others: Iterable[str]) -> str:
    return f"/[A-Za-z_][A-Za-z0-9_]{{0,40}}/ & ~/({_one_of(others)})/"


def _fill(template: str, **values: str) -> str:
    return Template(template).safe_substitute(values)
