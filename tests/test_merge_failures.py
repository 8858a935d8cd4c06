"""A merge that fails or is killed: it says what failed and the way out, and leaves no folder that looks whole."""

import errno
import fcntl
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from checkpoints import read, write
from selfdev.errors import SelfdevError, UserError
from selfdev.merging.aside import remove_left, written_aside
from selfdev.merging.checkpoint import merge_checkpoints
from selfdev.merging.recipe import Recipe

SCRIPT = """
import os, resource, sys, time
from pathlib import Path
from selfdev.errors import SelfdevError
from selfdev.merging.checkpoint import merge_checkpoints
from selfdev.merging.recipe import Recipe
seed, out, limit, shard, kill = sys.argv[1:]

def tick(done, total, name):
    if int(kill) and 2 * done > total:
        for _ in range(3000):  # another thread writes, and a killed one may have begun with nothing
            if any(Path(out).parent.glob(f".{Path(out).name}.*/*.safetensors")):
                break
            time.sleep(0.01)
        os.kill(os.getpid(), int(kill))

if int(limit):
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
try:
    merge_checkpoints(Recipe("linear", seed, {"x": seed}), Path(out), shard_bytes=int(shard), tick=tick)
except SelfdevError as error:
    print(error)
    sys.exit(error.exit_code)
"""


def merge_in_process(
    seed: Path, out: Path, *, limit: int = 0, shard: int = 1 << 40, kill: int = 0
) -> subprocess.CompletedProcess[str]:
    """Merge in a process of its own, with a limit on the size of files, killed halfway, or neither."""
    words = [seed, out, limit, shard, kill]
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, *map(str, words)], capture_output=True, text=True, timeout=120
    )


def many(folder: Path, count: int, shape: tuple[int, ...]) -> Path:
    """A model of so many tensors of one shape, and four small ones."""
    return write(folder, {f"model.layers.{i}.mlp.up_proj.weight": torch.ones(shape) for i in range(count)})


def linear(seed: Path, out: Path, tick: Callable[[int, int, str], None] | None = None) -> None:
    merge_checkpoints(Recipe("linear", str(seed), {"x": str(seed)}), out, **({"tick": tick} if tick else {}))


def left(folder: Path) -> list[str]:
    """What lies there beside the seed."""
    return sorted(path.name for path in folder.iterdir() if path.name != "seed")


# --- limits ---


@pytest.mark.parametrize("place", ["first shard", "index", "tokenizer", "card"])
def test_a_file_that_grows_too_large_is_told_and_nothing_is_left(tmp_path: Path, place: str) -> None:
    shard = 1 << 40
    if place == "first shard":
        seed, limit = many(tmp_path / "seed", 8, (64, 64)), 100_000
    elif place == "index":  # a hundred files of a few hundred bytes, and an index of ten thousand
        seed, limit, shard = many(tmp_path / "seed", 100, (1,)), 4_000, 1
    elif place == "tokenizer":
        seed, limit = write(tmp_path / "seed"), 20_000
        (seed / "tokenizer.json").write_text("x" * 30_000)
    else:
        seed, limit = write(tmp_path / "seed"), 1_000
    done = merge_in_process(seed, tmp_path / "out", limit=limit, shard=shard)
    assert done.returncode == 1, done.stderr
    assert (
        f"'{tmp_path}' takes no file of the size that the merged model needs (File too large)" in done.stdout
    )
    assert "nothing of it is kept. Raise the limit (ulimit -f), or choose another --out" in done.stdout
    assert "resume" not in done.stdout
    assert left(tmp_path) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 72 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=72m", "tmpfs", folder], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("mounting takes a root that may")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_disk_that_fills_up_during_the_merge(tmp_path: Path, small_disk: Path) -> None:
    seed = many(tmp_path / "seed", 8, (256, 256))

    def fill(done: int, total: int, name: str) -> None:
        if not (small_disk / "other").exists():
            with suppress(OSError), (small_disk / "other").open("wb", buffering=0) as other:
                while True:
                    other.write(bytes(1 << 16))

    with pytest.raises(SelfdevError) as raised:
        linear(seed, small_disk / "out", fill)
    assert f"'{small_disk}' has no room for the merged model (No space left on device)" in str(raised.value)
    assert "Make room, or choose another --out" in str(raised.value)
    assert left(small_disk) == ["other"]


def test_a_mount_point_is_refused_before_work_starts(tmp_path: Path, small_disk: Path) -> None:
    with pytest.raises(
        UserError, match="is a mount point, which no folder can replace; choose an --out in it"
    ):
        linear(write(tmp_path / "seed"), small_disk)


@pytest.mark.parametrize("flushed", range(5))
def test_a_flush_that_fails_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flushed: int
) -> None:
    """Of one of the three files, of the folder, or of the one above, once the folder has its name."""
    seed, flush, calls = write(tmp_path / "seed"), os.fsync, []

    def fail(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) > flushed:
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(SelfdevError, match=r"has no room for the merged model \(Disk quota exceeded\)"):
        linear(seed, tmp_path / "out")
    assert len(calls) == flushed + 1
    assert left(tmp_path) == []


def test_what_came_to_be_there_during_the_merge_stays(tmp_path: Path) -> None:
    seed, out = write(tmp_path / "seed"), tmp_path / "out"

    def meanwhile(done: int, total: int, name: str) -> None:
        out.mkdir(exist_ok=True)
        (out / "theirs").write_text("theirs")

    with pytest.raises(SelfdevError, match="has come to be there during the merge and is not overwritten"):
        linear(seed, out, meanwhile)
    assert left(tmp_path) == ["out"]
    assert [path.name for path in out.iterdir()] == ["theirs"]


def test_a_link_to_an_empty_folder_is_refused_before_work_starts(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "empty")
    with pytest.raises(UserError, match="out' exists already and is not overwritten"):
        linear(write(tmp_path / "seed"), tmp_path / "out")


def test_a_model_that_vanishes_during_the_merge_is_told(tmp_path: Path) -> None:
    seed, expert = write(tmp_path / "seed"), write(tmp_path / "expert")
    with pytest.raises(
        SelfdevError, match=r"cannot be read to their end, .*expert/model\.safetensors'; see that"
    ):
        merge_checkpoints(
            Recipe("linear", str(seed), {"x": str(expert)}),
            tmp_path / "out",
            tick=lambda done, total, name: (expert / "model.safetensors").unlink(missing_ok=True),
        )
    assert left(tmp_path) == ["expert"]


# --- kills ---


@pytest.mark.parametrize("shard", [1 << 40, 60_000])
def test_killed_in_the_middle_of_a_shard(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, shard: int
) -> None:
    """No folder has the name that was asked for; the dot folder has no config; the next merge removes it."""
    seed, out = many(tmp_path / "seed", 40, (64, 64)), tmp_path / "out"
    assert merge_in_process(seed, out, shard=shard, kill=signal.SIGKILL).returncode == -signal.SIGKILL
    [name] = left(tmp_path)
    assert name.startswith(".out.")
    written = list((tmp_path / name).iterdir())
    assert written
    assert all(path.suffix == ".safetensors" for path in written)
    assert sum(path.stat().st_size for path in written) < (seed / "model.safetensors").stat().st_size

    (tmp_path / ".out.other").mkdir()  # of no merge
    linear(seed, out)
    assert left(tmp_path) == [".out.other", "out"]
    assert caplog.messages[0] == f"removed '{tmp_path / name}', which a merge left that was killed"
    assert read(out).keys() == read(seed).keys()


def test_stopped_in_the_middle_of_a_shard(tmp_path: Path) -> None:
    seed = many(tmp_path / "seed", 40, (64, 64))
    assert merge_in_process(seed, tmp_path / "out", kill=signal.SIGINT).returncode != 0
    assert left(tmp_path) == []


def test_a_merge_that_goes_on_is_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with written_aside(out) as folder:
        (folder / "model.safetensors").write_text("half of it")
        with pytest.raises(
            UserError, match=r"another merge is writing '.*/out', in '.*/\.out\.\w+'; wait for it"
        ):
            linear(write(tmp_path / "seed"), out)
        assert (folder / "model.safetensors").exists()
    assert left(tmp_path) == ["out"]


def test_what_cannot_be_locked_is_named_and_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / ".out.0123abcd").mkdir()

    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with caplog.at_level(logging.WARNING):
        linear(write(tmp_path / "seed"), tmp_path / "out")
    assert left(tmp_path) == [".out.0123abcd", "out"]
    message = caplog.messages[0]
    assert "/.out.0123abcd' was left by a merge that was killed, and stays: " in message
    assert "remove it if no merge runs" in message


def test_the_folders_above_are_not_left_either(tmp_path: Path) -> None:
    out = tmp_path / "fresh/deep/out"
    with pytest.raises(RuntimeError, match="fails"), written_aside(out):
        raise RuntimeError("fails")
    assert left(tmp_path) == []
    with written_aside(out):
        pass
    assert out.is_dir()


def test_nothing_is_left_where_nothing_is(tmp_path: Path) -> None:
    remove_left(tmp_path / "none" / "out")
    assert left(tmp_path) == []
