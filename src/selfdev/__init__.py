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
    from selfdev.merging.checkpoint import merge
    from selfdev.results import Run, open_run
    from selfdev.runs import resume, run
    from selfdev.transfers import Transfer, transfer

__version__ = "0.1.0"
__all__ = [
    "Config",
    "Run",
    "Transfer",
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
    | dict.fromkeys(("Run", "open_run"), "selfdev.results")
    | dict.fromkeys(("resume", "run"), "selfdev.runs")
    | dict.fromkeys(("Transfer", "transfer"), "selfdev.transfers")
    | {"merge": "selfdev.merging.checkpoint"}
)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'selfdev' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)
