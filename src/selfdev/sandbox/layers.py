"""The layers of the jail, in the order in which a child puts them on itself."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from . import landlock, privileges, rlimits, seccomp


@dataclass(frozen=True)
class Layer:
    """One layer.

    Attributes:
        name: as `selfdev doctor` prints it.
        install: puts it on the calling process for good; OSError where it cannot.
        remedy: what a user can do where it cannot be installed.
    """

    name: str
    install: Callable[[], None]
    remedy: str


class LayerMissing(Exception):
    """A layer could not be installed. The message names it, the reason and the way out."""


def full(parent: int, memory_bytes: int, cpu_seconds: float) -> Iterator[Layer]:
    """All layers after the descriptors are closed; the order matters.

    Args:
        parent: process id of the forkserver.
        memory_bytes: see `Limits`.
        cpu_seconds: see `Limits`.
    """
    yield Layer("session", os.setsid, "report this; it needs nothing")
    yield Layer(
        "user",
        privileges.drop_user,
        "run as an ordinary user, or as a root that may become nobody (uid 65534 must be mapped)",
    )
    # After the user: changing the user clears it.
    yield Layer("parent-death signal", lambda: privileges.die_with(parent), "needs Linux")
    # After the user: changing the user sets it back.
    yield Layer("undumpable", privileges.forbid_inspection, "needs Linux")
    yield resource_limits(memory_bytes, cpu_seconds)
    yield Layer("no_new_privs", privileges.forbid_new_privileges, "needs Linux 3.5 or newer")
    yield Layer(
        "Landlock",
        landlock.restrict,
        "needs Linux 5.13 or newer, built with Landlock, with landlock in its boot parameter lsm=, and a "
        "container runtime whose own filter allows the landlock_* calls",
    )
    # Last: it forbids the calls by which the others are installed.
    yield Layer("seccomp", seccomp.install, "needs Linux with CONFIG_SECCOMP_FILTER on x86_64 or aarch64")


def resource_limits(memory_bytes: int, cpu_seconds: float) -> Layer:
    """The one layer that the unsafe mode keeps."""
    return Layer(
        "resource limits",
        lambda: rlimits.restrict(memory_bytes, cpu_seconds),
        "raise the hard limits of the shell that starts this (ulimit -H)",
    )


def install(layers: Iterator[Layer]) -> None:
    """Install all layers, or say which one failed.

    Raises:
        LayerMissing: at the first one that cannot be installed.
    """
    for layer in layers:
        try:
            layer.install()
        except (OSError, ValueError, KeyError) as error:
            raise LayerMissing(f"layer '{layer.name}': {error}; {layer.remedy}") from error
