"""Where a command prints, and how figures and model-written text look there.

What a model wrote is never markup here: it is shown character by character, and what could move the cursor,
change the title of the window or reorder the line is shown as its escape.
"""

import os
import sys
import unicodedata
from typing import TextIO

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.segment import Segment
from rich.style import Style
from rich.syntax import Syntax
from rich.table import Table

UNSAFE_MARK = "UNSAFE SANDBOX "
"""Begins every line of a command that runs model-written code without the jail."""

_LOG_WIDTH = 200
"""Columns where there is no terminal: whoever shows a log folds it, and a folded command cannot be copied."""

_ESCAPED = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
"""Unicode's control, format, surrogate, private and unassigned characters, and its separators of lines."""


class Terminal:
    """Standard output, or standard error where standard output belongs to JSON.

    Args:
        to_stderr: print on standard error.
        unsafe: begin every line with `UNSAFE_MARK`.
        file: print there instead.
        width: columns; those of the terminal by default.
    """

    def __init__(
        self,
        *,
        to_stderr: bool = False,
        unsafe: bool = False,
        file: TextIO | None = None,
        width: int | None = None,
    ):
        file = file or (sys.stderr if to_stderr else sys.stdout)
        # Markup and emoji codes are off for everything: much of it is text of models and of users.
        self.console = Console(file=file, width=width, markup=False, emoji=False, highlight=False)
        if width is None and not self.console.is_terminal and "COLUMNS" not in os.environ:
            self.console.width = _LOG_WIDTH
        self.unsafe = unsafe

    @property
    def interactive(self) -> bool:
        """Whether someone sees it change."""
        return self.console.is_terminal and not self.console.is_dumb_terminal

    def say(self, *what: RenderableType) -> None:
        """Print each on lines of its own."""
        for each in what:
            self.console.print(self.marked(each))

    def marked(self, what: RenderableType) -> RenderableType:
        """The same without blanks at the ends of its lines, each with the mark where there is no jail."""
        return _Lines(what, UNSAFE_MARK if self.unsafe else "")


class _Lines:
    """A renderable line by line, each with a mark before it; whatever it shows is harmless, see `visible`."""

    def __init__(self, what: RenderableType, mark: str):
        self.what, self.mark = what, mark

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Render it in what the mark leaves of the width."""
        narrower = options.update(width=max(1, options.max_width - len(self.mark)), height=None)
        for line in console.render_lines(self.what, narrower, pad=False):
            if self.mark:
                yield Segment(self.mark, Style(color="red", bold=True))
            while line and not line[-1].text.strip():
                line.pop()
            for place, (text, style, control) in enumerate(line, start=1):
                shown = visible(text) if control is None else text
                yield Segment(shown.rstrip() if place == len(line) else shown, style, control)
            yield Segment.line()


def visible(text: str) -> str:
    """Text that anyone may have written, made harmless: all but signs and line ends is escaped."""
    return "".join(_visible(character) for character in text.expandtabs(4))


def _visible(character: str) -> str:
    if character == "\n" or unicodedata.category(character) not in _ESCAPED:
        return character
    return character.encode("unicode_escape", "surrogatepass").decode()


def python(source: str) -> Syntax:
    """A program in colours that suit light and dark terminals."""
    return Syntax(
        visible(source.rstrip()), "python", theme="ansi_dark", background_color="default", word_wrap=True
    )


def percent(score: float | None) -> str:
    """A score in 0..1 as percent; a dash where there is none."""
    return "-" if score is None else f"{100 * score:.1f}"


def points(difference: float) -> str:
    """A difference of two scores in percentage points, with its sign."""
    return f"{100 * difference:+.1f}"


def duration(seconds: float) -> str:
    """Minutes and seconds, with hours where there are any."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def table(*columns: str, left: int = 1) -> Table:
    """A plain table with these headings.

    Args:
        columns: the headings.
        left: so many columns hold text, and stand on the left; figures stand on the right.
    """
    plain = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", pad_edge=False)
    for index, heading in enumerate(columns):
        # Folded rather than cut: a figure that lost its last digits would be a wrong one.
        plain.add_column(heading, overflow="fold", justify="left" if index < left else "right")
    return plain


def facts(**rows: RenderableType) -> Table:
    """Names and what is known under them, one a line; `_` in a name is a blank."""
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in rows.items():
        grid.add_row(name.replace("_", " "), value)
    return grid
