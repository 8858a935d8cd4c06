"""A fresh interpreter that holds nothing of its parent but code, for forkserver, plain children and probe."""

import json
import os
import sys
from pathlib import Path

# The package is imported under a name of its own and without its __init__, so that nothing of what surrounds
# it is loaded. `-S`: no .pth file is executed, the module path is the parent's.
_PACKAGE = "__jail__"
_BOOT = f"""
import importlib, json, sys, types
directory, path, module, *arguments = sys.argv[1:]
sys.path[:] = json.loads(path)
package = sys.modules[{_PACKAGE!r}] = types.ModuleType({_PACKAGE!r})
package.__path__ = [directory]
importlib.import_module({_PACKAGE!r} + "." + module).main(*arguments)
"""

# All that it finds in its environment. The hash seed is fixed, since the order of a set of strings can change
# a result (and `python -I` or `-E` would ignore it). One thread, because a fork carries one; OMP_THREAD_LIMIT
# makes a program's own wish for more harmless. No GPU: nothing of the jail may hold a device open.
_ENVIRONMENT = {
    "PYTHONHASHSEED": "0",
    "PYTHONUTF8": "1",
    "LANG": "C.UTF-8",
    "OMP_NUM_THREADS": "1",
    "OMP_THREAD_LIMIT": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
}
# Without them some builds of torch do not find their libraries, and Windows starts no Python.
_INHERITED = ("SYSTEMROOT", "PATH") if os.name == "nt" else ("LD_LIBRARY_PATH",)


def command(module: str, *arguments: str) -> list[str]:
    """The command line that runs ``main(*arguments)`` of a module of this package."""
    path = [str(Path(entry).absolute()) for entry in sys.path if entry]
    options = ("-S", "-P", "-B", "-W", "ignore")
    return [
        sys.executable,
        *options,
        "-c",
        _BOOT,
        str(Path(__file__).parent),
        json.dumps(path),
        module,
        *arguments,
    ]


def environment() -> dict[str, str]:
    """The whole environment to give it."""
    return {**_ENVIRONMENT, **{name: os.environ[name] for name in _INHERITED if name in os.environ}}
