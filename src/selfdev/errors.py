"""The errors that a user can meet, with the exit code that each one ends the command with.

A message names the thing, the reason and the way out.
"""


class SelfdevError(Exception):
    """The work failed. Exit code 1."""

    exit_code = 1


class UserError(SelfdevError):
    """What was asked cannot be done as asked: bad input, found before work starts. Exit code 2."""

    exit_code = 2


class Interrupted(SelfdevError):
    """The user stopped the run, which can be resumed. Exit code 3."""

    exit_code = 3


class Halted(SelfdevError):
    """What a run needs is not to be had now, and may be later: `session.told` says how to go on. Exit code 3."""

    exit_code = 3
