"""Where in a short program the next line begins: what no context-free grammar can know of the lines before it."""

import ast
import re
from dataclasses import dataclass
from itertools import chain, permutations, takewhile

STEP = 4
"""Spaces of one level of indentation."""

CONSUMERS = frozenset({"all", "any", "list", "max", "min", "set", "sorted", "sum", "tuple"})
"""Builtins that take a generator as well."""
BUILTINS = CONSUMERS | {
    "abs",
    "bool",
    "enumerate",
    "float",
    "int",
    "len",
    "range",
    "reversed",
    "round",
    "zip",
}
"""Builtins that a program may call."""

_WORDS = frozenset({"for", "in", "if", "else", "and", "or", "not", "is", "return", "elif", "torch"})
_CONSTANTS = frozenset({"True", "False", "None"})
_TOKEN = re.compile(r"""(?P<skip>\d[\w.]*|"[^"]*"|'[^']*'|\#.*)|(?P<name>[A-Za-z_]\w*)|(?P<sign>\S)""")


@dataclass(frozen=True)
class Place:
    """The beginning of a line.

    Attributes:
        names: what the lines before gave names to.
        called: builtins that were called by name; to assign to one would make the call a read of an unset local.
        blocks: column and first word of the headers whose blocks are open, the outermost first.
        below_header: the last line was a header, so a block must begin.
        left: column of the last line if it was `return`, `break` or `continue`, after which its block ends.
        returned: the last line was `return`, after which the function may end.
        first: no statement was written yet, so that this can be the docstring.
        alternatives: columns at which `elif` and `else` may stand.
    """

    names: frozenset[str] = frozenset({"deltas"})
    called: frozenset[str] = frozenset()
    blocks: tuple[tuple[int, str], ...] = ()
    below_header: bool = False
    left: int | None = None
    returned: bool = False
    first: bool = True
    alternatives: frozenset[int] = frozenset()

    @property
    def columns(self) -> tuple[int, ...]:
        """At which the line may begin; none if the function must end."""
        inside = [column + STEP for column, _ in self.blocks]
        if self.below_header:
            return (inside[-1],)
        return tuple(c for c in (STEP, *inside) if self.left is None or c < self.left)

    @property
    def may_end(self) -> bool:
        """Whether the function may end here."""
        return self.returned

    def in_loop(self, column: int) -> bool:
        """Whether a line at this column stands in a loop."""
        return any(word == "for" and column > start for start, word in self.blocks)

    def after(self, line: str) -> "Place":
        """The place behind a complete line, which is without its newline and may begin with an empty one."""
        line = line.lstrip("\n").rstrip()
        text = line.lstrip(" ")
        if not text or text.startswith("#"):
            return self
        column = len(line) - len(text)
        word = re.match(r"\w*", text)[0]  # type: ignore[index]  # it matches everything
        blocks = tuple(takewhile(lambda block: block[0] < column, self.blocks))
        header = word in {"for", "if", "elif", "else"}
        jump = word in {"return", "break", "continue"}
        if header:
            blocks = (*blocks, (column, word))
        given, read = _names_of(text)
        return Place(
            names=self.names | given,
            called=self.called | (read & BUILTINS - self.names),
            blocks=blocks,
            below_header=header,
            left=column if jump else None,
            returned=word == "return",
            first=False,
            alternatives=frozenset(start for start, opener in blocks if opener in {"if", "elif"}),
        )


def _names_of(statement: str) -> tuple[set[str], set[str]]:
    """What a statement, or the header of a block, gives names to, and what names it reads."""
    statement = statement.removeprefix("el") if statement.startswith("elif") else statement
    if statement.startswith("else"):
        return set(), set()
    body = statement.partition("#")[0].rstrip()
    try:
        [node] = ast.parse(f"{body} pass" if body.endswith(":") else body).body
    except (SyntaxError, ValueError):
        return set(), set()
    targets: list[ast.expr] = []
    if isinstance(node, ast.Assign):
        targets = node.targets
    elif isinstance(node, ast.For):
        targets = [node.target]
    given = chain.from_iterable(map(ast.walk, targets))
    stored = {n.id for n in given if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    read = {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    return stored, read


@dataclass(frozen=True)
class Inside:
    """What a line that is being written says of its own names.

    Attributes:
        given: builtins whose names it assigns: they are not there to be called before.
        bound: names that a comprehension with an `if` has given to its condition.
        wanted: if a comprehension's `for` waits for its target, the texts that bind all that its element reads, where
            `*` stands for any name; otherwise None.
        targets: in this case, texts of the targets of the comprehensions before it.
    """

    given: frozenset[str] = frozenset()
    bound: frozenset[str] = frozenset()
    wanted: tuple[str, ...] | None = None
    targets: tuple[str, ...] = ()

    @classmethod
    def of(cls, line: str, place: Place) -> "Inside":
        """Read the beginning of a line."""
        statement = re.match(r"\s*(?:for )?((?:\w|, |[()])+)(?: =| in)(?: |$)", line)
        given = BUILTINS.intersection(re.findall(r"\w+", statement[1]) if statement else ())
        brackets = _Brackets(line, place.names)
        wanted = brackets.wanted()
        return cls(
            given, frozenset(brackets.bound), wanted, () if wanted is None else tuple(brackets.targets)
        )


class _Bracket:
    """An open bracket.

    Attributes:
        takes_for: a comprehension may stand in it.
        part: of the comprehension, at which it stands: `element`, `target`, `iterable` or `condition`.
        unknown: names that nothing before gave.
        target: names that its `for` gives.
        begin: where in the line the target begins.
    """

    def __init__(self, takes_for: bool):
        self.takes_for = takes_for
        self.part = "element"
        self.unknown: list[str] = []
        self.target: list[str] = []
        self.begin = 0


class _Brackets:
    """The comprehensions of a line that is being written."""

    def __init__(self, line: str, known: frozenset[str]):
        self.bound: set[str] = set()
        self.targets: list[str] = []
        self.known = known
        self.open: list[_Bracket] = []
        self.line = line
        for token in _TOKEN.finditer(line):
            if token["name"]:
                self._name(token)
            elif token["sign"]:
                self._sign(token)

    def wanted(self) -> tuple[str, ...] | None:
        """The targets that the innermost comprehension may have, if its `for` waits for one; None for any."""
        if not self.open or self.open[-1].part != "target" or not self.open[-1].unknown:
            return None
        names = list(dict.fromkeys(self.open[-1].unknown))
        nested = any(bracket.takes_for and bracket.part == "element" for bracket in self.open[:-1])
        sizes = range(1, len(names) + 1) if nested else [len(names)]
        # All orders of many names would be too many.
        few = len(names) <= 3
        orders = chain.from_iterable(permutations(names, n) if few else [names[:n]] for n in sizes)
        plain = [", ".join(order) for order in orders]
        longer = [text for own in plain for text in (own, f"*, {own}", f"{own}, *")]
        return (*longer, *(f"*, ({text})" for text in longer if ", " in text))

    def _name(self, token: re.Match[str]) -> None:
        name, before, after = token[0], self.line[: token.start()], self.line[token.end() :].lstrip()
        if not self.open or before.endswith("."):
            return
        inner = self.open[-1]
        behind_operand = _ends_operand(before)
        if name == "for" and behind_operand:
            inner.part, inner.begin = "target", token.end()
        elif name == "in" and behind_operand and inner.part == "target":
            inner.part = "iterable"
            self.targets.append(self.line[inner.begin : token.start()].strip())
        elif name == "if" and behind_operand and inner.part == "iterable":
            inner.part = "condition"
            self.bound |= set(inner.target)
        elif inner.part == "target":
            inner.target.append(name)
        elif name in _WORDS | _CONSTANTS | BUILTINS - self.known:
            return
        elif after.startswith("=") and not after.startswith("=="):
            return  # a keyword's name
        elif name not in self.known and token.end() < len(self.line):
            if inner.part == "element":
                inner.unknown.append(name)
            elif name not in inner.target and len(self.open) > 1:
                self.open[-2].unknown.append(name)

    def _sign(self, token: re.Match[str]) -> None:
        before = self.line[: token.start()]
        if self.open and self.open[-1].part == "target":
            return  # a pair in parentheses
        if token[0] == "[":
            self.open.append(_Bracket(re.search(r"[\w)\]]$", before) is None))
        elif token[0] == "(":
            called = re.search(r"(?<![\w.])(\w+)$", before)
            self.open.append(_Bracket(called is not None and called[1] in CONSUMERS - self.known))
        elif token[0] in ")]" and self.open:
            closed = self.open.pop()
            if self.open:
                self.open[-1].unknown += [name for name in closed.unknown if name not in closed.target]


def _ends_operand(text: str) -> bool:
    """Whether a keyword such as `for` can follow, and not a name that begins like one."""
    last = re.search(r"(\w+|\S)\s*$", text)
    return last is not None and last[1] not in _WORDS and re.match(r"[\w)\].\"']", last[1]) is not None
