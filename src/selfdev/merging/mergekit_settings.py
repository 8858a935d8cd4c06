"""Values in mergekit's YAML files: one for all tensors, a gradient over the layers, or several with filters.

    weight: 0.5
    weight: [0, 0.5, 1]                 # interpolated from the first layer to the last
    weight:
      - filter: mlp                     # tensors whose names contain it
        value: [0, 1]
      - value: 0.5                      # the others

Every mapping remembers on which line of the file its keys stand, so that messages can say it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml

from selfdev.errors import UserError

Value = float | bool
_EVERYWHERE = "*"


class Lines(dict[str, Any]):
    """A mapping of a YAML file.

    Attributes:
        file: the file.
        line: where it begins, from 1.
        lines: the line of each key.
    """

    def __init__(self, file: Path, line: int) -> None:
        """An empty one."""
        super().__init__()
        self.file = file
        self.line = line
        self.lines: dict[str, int] = {}

    def refuse(self, key: str, why: str) -> NoReturn:
        """Raise the UserError that names a key, its line or else the mapping's, and what is wrong."""
        raise UserError(f"{self.file}, line {self.lines.get(key, self.line)}: '{key}' {why}")

    def check_keys(self, known: Sequence[str], where: str) -> None:
        """Raise UserError for a key that is not among those known."""
        for key in self:
            if key not in known:
                self.refuse(key, f"is no key of {where} that is known here; known are {', '.join(known)}")


def read_yaml(file: Path) -> Lines:
    """Read a file that holds one mapping.

    Raises:
        UserError: it cannot be read, is no YAML, or holds something else.
    """

    class Loader(yaml.SafeLoader):
        """As the safe one, with mappings that know their lines."""

    def mapping(loader: Loader, node: yaml.MappingNode) -> Lines:
        seen = set()
        for key_node, _ in node.value:
            key, line = str(key_node.value), key_node.start_mark.line + 1
            if key in seen:
                raise UserError(f"{file}, line {line}: '{key}' is given twice; give it once")
            seen.add(key)
        loader.flatten_mapping(node)  # what `<<` inherits comes first, and the mapping's own takes its place
        made = Lines(file, node.start_mark.line + 1)
        for key_node, value_node in node.value:
            key = str(loader.construct_object(key_node, deep=True))
            made[key] = loader.construct_object(value_node, deep=True)
            made.lines[key] = key_node.start_mark.line + 1
        return made

    Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    try:
        content = yaml.load(file.read_text(), Loader)
    except yaml.composer.ComposerError as error:
        raise UserError(
            f"'{file}' is no YAML, or several documents in one, as mergekit-multi takes them: {error}; give each a file"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"'{file}' cannot be read: {error}; give a file that is there") from None
    except (
        yaml.YAMLError,
        ValueError,
        RecursionError,
    ) as error:  # also a date that is none, endless brackets
        raise UserError(f"'{file}' is no YAML: {error}") from None
    if not isinstance(content, Lines):
        raise UserError(f"'{file}' holds no mapping; a merge needs merge_method and models")
    return content


@dataclass(frozen=True)
class Setting:
    """The value of one parameter, which may depend on the tensor.

    Attributes:
        cases: filter and values of each; a tensor takes the first whose filter its name contains. Several values are
            points of a gradient, one is the same everywhere.
    """

    cases: tuple[tuple[str, tuple[Value, ...]], ...]

    @property
    def differs_by_depth(self) -> bool:
        """Whether any of it is a gradient."""
        return any(len(values) > 1 for _, values in self.cases)

    @property
    def filters(self) -> set[str]:
        """What parts of names it asks for."""
        return {wanted for wanted, _ in self.cases} - {_EVERYWHERE}

    def at(self, name: str, depth: float) -> Value | None:
        """The value for a tensor; None if no filter fits.

        Args:
            name: of the tensor.
            depth: of its layer, 0 for the first and 1 for the last.
        """
        for wanted, values in self.cases:
            if wanted == _EVERYWHERE or wanted in name:
                return _interpolated(values, depth)
        return None


def read_setting(owner: Lines, key: str, kind: type[float] | type[bool]) -> Setting:
    """Read the value of a parameter.

    Args:
        owner: the mapping in which it stands.
        key: its name there.
        kind: what the values are.

    Raises:
        UserError: it is of no form that is known here.
    """
    given = owner[key]
    cases = given if isinstance(given, list) and any(isinstance(each, Lines) for each in given) else [given]
    read = []
    for case in cases:
        wanted: Any = _EVERYWHERE
        if isinstance(case, Lines):
            case.check_keys(("filter", "value"), f"a case of '{key}'")
            if "value" not in case:
                owner.refuse(key, "has a case without a value; give each one")
            wanted, case = case.get("filter") or _EVERYWHERE, case["value"]
        points = case if isinstance(case, list) else [case]
        if not points:
            owner.refuse(key, "is an empty list; give at least one value")
        read.append((str(wanted), tuple(_value(owner, key, point, kind) for point in points)))
    return Setting(tuple(read))


def _value(owner: Lines, key: str, value: Any, kind: type[float] | type[bool]) -> Value:
    if kind is bool:
        if not isinstance(value, bool):
            owner.refuse(key, f"is {value!r}; write true or false")
        return value
    try:
        if isinstance(value, int | float | str) and not isinstance(value, bool):
            return float(value)  # of words too: YAML takes 1e-5 for one
    except ValueError:
        pass
    owner.refuse(key, f"is {value!r}, which is no number; write one, or a list of numbers")


def _interpolated(values: Sequence[Value], depth: float) -> Value:
    place = depth * (len(values) - 1)
    lower = int(place)
    if isinstance(values[0], bool):
        return values[lower]
    upper = min(lower + 1, len(values) - 1)
    return (1 - (place - lower)) * values[lower] + (place - lower) * values[upper]
