"""A stand-in for torch's compiler front end, which the forkserver does not load.

An optimiser's first step imports `torch._dynamo`, and only to exempt itself from compilation. The real one
takes 2.5 s and 70 MB of private memory, and every fork would copy the page tables of that. Nothing can be
compiled in the jail anyway: there is no compiler to run, no file to write and no memory to execute.
"""

import contextlib
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

_NAME = "torch._dynamo"


def install() -> None:
    """Put the stand-in in place, unless the real one is loaded already."""
    if _NAME in sys.modules:
        return
    module = ModuleType(_NAME)
    vars(module).update(
        disable=_unchanged,
        disallow_in_graph=_unchanged,
        allow_in_graph=_unchanged,
        graph_break=lambda *_: None,
        is_compiling=lambda: False,
        reset=lambda: None,
        mark_static_address=lambda *_, **__: None,
        compiled_autograd=SimpleNamespace(_disable=contextlib.nullcontext),
    )
    sys.modules[_NAME] = module
    torch._dynamo = module


def remove() -> None:
    """Take the stand-in out, so that the next import finds the real one."""
    if isinstance(sys.modules.get(_NAME), ModuleType) and not hasattr(sys.modules[_NAME], "__file__"):
        del sys.modules[_NAME]
        del torch._dynamo


def _unchanged(function: Callable[..., Any] | None = None, *_: Any, **__: Any) -> Any:
    """Serve as decorator with and without arguments."""
    return (lambda inner: inner) if function is None else function
