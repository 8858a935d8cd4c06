"""Hashing that begins before torch is there: it goes on to the hash of the whole file."""

import hashlib
import threading
from pathlib import Path

import pytest

from selfdev.merging.head_start import HeadStart
from selfdev.merging.read_ahead import ReadAhead


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    made = [tmp_path / name for name in ("seed", "expert")]
    for number, folder in enumerate(made):
        folder.mkdir()
        for shard in (1, 2):
            content = bytes((number + shard + i) % 251 for i in range(70_000 * shard))
            (folder / f"model-{shard}.safetensors").write_bytes(content)
    return made


def test_what_is_no_folder_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"nobody asked for it")
    monkeypatch.chdir(tmp_path)
    assert not HeadStart(["", "~nobody-of-this-name/x", "lab/model"]).stop()


def test_a_merge_goes_on_from_what_was_hashed_before(folders: list[Path]) -> None:
    files = [file for folder in folders for file in sorted(folder.iterdir())]
    hashes = {file: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    begun = HeadStart(map(str, folders))
    for thread in threading.enumerate():
        if thread.name == "head-start":
            thread.join()
    digests = begun.stop()
    assert list(digests) == [folder / "model-1.safetensors" for folder in folders]
    for file in digests:  # they are hashed to their end, so that nothing of them is read again
        file.write_bytes(bytes(70_000))
    with ReadAhead(files, [[(file, 10, 20)] for file in files], digests) as ahead:
        for _ in files:
            ahead.next()
        found = ahead.digests()
    assert found == hashes


def test_what_is_no_folder_of_weights_is_left_alone(tmp_path: Path, folders: list[Path]) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    given = ["zoo:nano/seed", "somebody/model", "", str(empty), str(tmp_path / "missing"), str(folders[0])]
    assert list(HeadStart(given).stop()) == [folders[0] / "model-1.safetensors"]
