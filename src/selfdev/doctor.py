"""What `selfdev doctor` finds out: whether this machine can run a run, tried for real and not guessed.

Every layer of the jail is installed once in a process of its own and must refuse what it is for; then a
program runs in the whole jail.
"""

import json
import os
import platform
import shutil
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from selfdev.models.sources import cache_dir
from selfdev.sandbox import UNSAFE_NOTICE, Sandbox, SandboxUnavailable

_OLDEST_PYTHON = (3, 11)
_TORCH = ((2, 8), (2, 14))  # from the first up to, not including, the second
_LIBRARIES = ("transformers", "peft", "safetensors")
_LEAST_DISK = (
    3 * 1024**3
)  # bytes; the quickstart's factory takes 0.6 GB twice, and a run's archive comes on top
_ENDPOINT_SECONDS = 3.0


@dataclass(frozen=True)
class Check:
    """One line of the report.

    Attributes:
        name: what was looked at.
        ok: whether a run can do with what was found.
        detail: what was found.
        remedy: what to do where it is not ok; else empty.
    """

    name: str
    ok: bool
    detail: str
    remedy: str = ""


def checks(url: str = "") -> list[Check]:
    """Look at everything. Takes a few seconds, most of them for a warm jail.

    Args:
        url: of a server that is to sample, if there is one.
    """
    return [
        _python(),
        _torch(),
        *_libraries(),
        _threads(),
        _accelerator(),
        *_jail(),
        cache(),
        _disk(),
        models(),
        *([endpoint(url)] if url else []),
    ]


def report(found: list[Check], *, as_json: bool = False) -> str:
    """The checks as one line each, with a second one for a remedy, or as JSON.

    Args:
        found: by `checks`.
        as_json: ``{"ok": bool, "checks": [{"name", "ok", "detail", "remedy"}]}``.
    """
    if as_json:
        return json.dumps(
            {"ok": all(check.ok for check in found), "checks": [asdict(check) for check in found]}, indent=2
        )
    width = max(len(check.name) for check in found)
    lines = []
    for check in found:
        lines.append(f"{'ok     ' if check.ok else 'MISSING'} {check.name:<{width}}  {check.detail}")
        if check.remedy:
            lines.append(f"{'':8}{'':{width}}  -> {check.remedy}")
    return "\n".join(lines)


def _python() -> Check:
    ok = sys.version_info >= _OLDEST_PYTHON
    wanted = ".".join(map(str, _OLDEST_PYTHON))
    detail = f"{platform.python_version()} on {platform.system()} {platform.release()} {platform.machine()}"
    return Check("Python", ok, detail, "" if ok else f"install Python {wanted} or newer")


def _torch() -> Check:
    release = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    ok = _TORCH[0] <= release < _TORCH[1]
    oldest, newest = (".".join(map(str, bound)) for bound in _TORCH)
    return Check("torch", ok, torch.__version__, "" if ok else f"install torch>={oldest},<{newest}")


def _libraries() -> Iterator[Check]:
    for name in _LIBRARIES:
        try:
            yield Check(name, True, version(name))
        except PackageNotFoundError:
            yield Check(name, False, "not installed", "install this package again; it depends on it")


def _threads() -> Check:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = torch.get_num_threads()
    ok = threads <= usable
    remedy = "" if ok else f"set OMP_NUM_THREADS={usable}; more threads than cores wait for each other"
    return Check("threads", ok, f"torch uses {threads} of {usable} usable cores", remedy)


def _accelerator() -> Check:
    if torch.cuda.is_available():
        return Check(
            "accelerator", True, ", ".join(map(torch.cuda.get_device_name, range(torch.cuda.device_count())))
        )
    if torch.backends.mps.is_available():
        return Check("accelerator", True, "Apple's, if asked for: --set factory.device=mps")
    return Check("accelerator", True, "none; the preset quickstart runs on the processor")


def _jail() -> Iterator[Check]:
    """Every layer alone, then a program in all of them."""
    if sys.platform == "linux":
        from selfdev.sandbox.probe import probe

        try:
            for layer in probe():
                yield Check(f"jail: {layer.name}", layer.ok, layer.detail, layer.remedy)
        except (RuntimeError, OSError) as error:
            yield Check("jail: probe", False, str(error), "report this with the message")
    start = time.perf_counter()
    try:
        with Sandbox() as box:
            warm = time.perf_counter() - start
            ones = torch.ones(64)
            start = time.perf_counter()
            box.merge("def merge_models(model_dict, device):\n    return model_dict['a']", {"a": ones})
            call = time.perf_counter() - start
        yield Check("jail: all layers", True, f"warm in {warm:.1f} s, one program in {1000 * call:.0f} ms")
    except SandboxUnavailable as error:
        remedy = f"see above; or, on a machine without secrets, --unsafe-sandbox: {UNSAFE_NOTICE}"
        yield Check("jail: all layers", False, str(error), remedy)


def cache() -> Check:
    """Whether the cache folder, or the folder in which it would be made, can be written."""
    folder = cache_dir()
    try:
        # A folder that is not there yet is looked at where it would be made.
        with tempfile.TemporaryFile(dir=_existing(folder)):
            pass
    except OSError as error:
        return Check(
            "cache",
            False,
            f"{folder}: {error.strerror}",
            "point SELFDEV_CACHE to a folder that can be written",
        )
    return Check("cache", True, f"{folder}{'' if folder.exists() else ' (will be made)'}")


def _disk() -> Check:
    free = shutil.disk_usage(_existing(cache_dir())).free
    ok = free >= _LEAST_DISK
    remedy = "" if ok else f"make room for {_LEAST_DISK / 1e9:.1f} GB, or point SELFDEV_CACHE elsewhere"
    return Check("disk", ok, f"{free / 1e9:.1f} GB free at the cache", remedy)


def models() -> Check:
    """Model folders in the cache and in the Hub's own cache. None is fine: the first run fetches its own."""
    names = {folder.parent.name for folder in cache_dir().glob("**/config.json")}
    hub = Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser() / "hub"
    names |= {folder.name.removeprefix("models--").replace("--", "/") for folder in hub.glob("models--*")}
    return Check(
        "models", True, ", ".join(sorted(names)) or "none cached; the first run fetches what it needs"
    )


def endpoint(url: str) -> Check:
    """Whether an OpenAI-compatible server answers, as `factory.endpoint.url` names it."""
    url = url.rstrip("/")
    try:
        with urllib.request.urlopen(f"{url}/models", timeout=_ENDPOINT_SECONDS) as answer:
            return Check("endpoint", True, f"{url} answers with {answer.status}")
    except urllib.error.HTTPError as error:  # it is there; whether it lets us in shows with the key
        lets_in = error.code in (401, 403)
        remedy = "" if lets_in else "give the address that ends before /models, as https://HOST/v1"
        return Check("endpoint", lets_in, f"{url} answers with {error.code}", remedy)
    except (OSError, ValueError) as error:
        return Check(
            "endpoint", False, f"{url} does not answer: {error}", "start the server, or correct its address"
        )


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next(parent for parent in (folder, *folder.parents) if parent.exists())
