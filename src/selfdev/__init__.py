"""selfdev: a language model invents algorithms that improve language models.

    import selfdev

    run = selfdev.run(selfdev.load_config("quickstart"))
    print(run.best.source)

The names below are imported when they are first used, so that `import selfdev` does not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from selfdev.config import Config, load_config
    from selfdev.errors import Interrupted, SelfdevError, UserError
    from selfdev.merging.checkpoint import merge
    from selfdev.results import Run, Transfer, open_run
    from selfdev.runs import resume, run
    from selfdev.transfers import transfer

__version__ = "0.1.0"
__all__ = [
    "Config",
    "Interrupted",
    "Run",
    "SelfdevError",
    "Transfer",
    "UserError",
    "__version__",
    "load_config",
    "merge",
    "open_run",
    "resume",
    "run",
    "transfer",
]

_HOMES = (
    dict.fromkeys(("Config", "load_config"), "selfdev.config")
    | dict.fromkeys(("Interrupted", "SelfdevError", "UserError"), "selfdev.errors")
    | dict.fromkeys(("Run", "Transfer", "open_run"), "selfdev.results")
    | dict.fromkeys(("resume", "run"), "selfdev.runs")
    | {"merge": "selfdev.merging.checkpoint", "transfer": "selfdev.transfers"}
)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'selfdev' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
