"""Traps of memory files and descriptors: seals, the standard streams, leaks."""

import gc
import mmap
import os
import resource
import threading
from pathlib import Path

import pytest
import torch
from canaries import ONE, SUM, program
from processes import run_python

from selfdev.sandbox import Limits, Sandbox
from selfdev.sandbox.child import Child
from selfdev.sandbox.job import Call
from selfdev.sandbox.memory_file import MemoryFile


def test_a_sealed_input_cannot_be_changed_by_anyone() -> None:
    file = MemoryFile("test")
    file.write(b"weights!", 0)
    file.seal_contents()
    with pytest.raises(PermissionError):
        os.pwrite(file.descriptor, b"x", 0)
    with pytest.raises(PermissionError):
        mmap.mmap(file.descriptor, 8, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    for size in (0, 4, 100):
        with pytest.raises(PermissionError):
            os.ftruncate(file.descriptor, size)
    protection = mmap.PROT_READ | mmap.PROT_WRITE
    with mmap.mmap(file.descriptor, 8, flags=mmap.MAP_PRIVATE, prot=protection) as private:
        private[:1] = b"W"
    assert os.pread(file.descriptor, 8, 0) == b"weights!"
    file.close()


def test_an_input_that_somebody_maps_writable_cannot_be_sealed() -> None:
    file = MemoryFile("test")
    file.resize(8)
    with mmap.mmap(file.descriptor, 8), pytest.raises(OSError, match="busy"):
        file.seal_contents(patience=0.1)
    file.close()


def test_an_input_of_which_a_page_is_held_for_a_while_is_sealed() -> None:
    file = MemoryFile("test")
    file.resize(8)
    held = mmap.mmap(file.descriptor, 8)
    release = threading.Timer(0.5, held.close)
    release.start()
    file.seal_contents()
    release.join()
    with pytest.raises(PermissionError):
        os.pwrite(file.descriptor, b"x", 0)
    file.close()


def test_a_result_file_cannot_shrink_under_its_reader() -> None:
    file = MemoryFile("test")
    file.resize(4096)
    file.seal_size()
    for size in (0, 4095, 8192):
        with pytest.raises(PermissionError):
            os.ftruncate(file.descriptor, size)
    file.write(b"but it can be written", 0)
    file.close()


def test_memory_files_never_land_on_the_standard_streams(tmp_path: Path) -> None:
    code = (
        "import os, torch\nfor fd in (0, 1, 2): os.close(fd)\n"
        "from selfdev.sandbox import Sandbox\n"
        "with Sandbox() as box:\n"
        f"    outcome = box.merge({SUM!r}, {{'a': torch.ones(2), 'b': torch.ones(2)}})\n"
        f"open({str(tmp_path / 'answer')!r}, 'w').write(str(outcome.tensor.tolist()))"
    )
    run_python(code)
    assert (tmp_path / "answer").read_text() == "[2.0, 2.0]"


def test_children_and_descriptors_are_given_back(model_dict: dict[str, torch.Tensor]) -> None:
    with Sandbox(workers=3) as own:
        _check_given_back(own, model_dict)


def _check_given_back(box: Sandbox, model_dict: dict[str, torch.Tensor]) -> None:
    def held() -> tuple[int, int, str]:
        gc.collect()  # what other tests dropped would else go between the two counts
        children = Path(f"/proc/{box.pid}/task/{box.pid}/children").read_text()
        return len(os.listdir("/proc/self/fd")), len(os.listdir(f"/proc/{box.pid}/fd")), children

    box.merge(SUM, model_dict)
    before = held()
    for source in (SUM, "x", "import os", program("os._exit(0)"), program("torch.zeros(10**12)")):
        for _ in range(3):
            box.merge_many(source, [model_dict] * 40)
    assert held() == before
    assert before[2] == ""


def open_descriptors() -> set[str]:
    gc.collect()  # as above
    return set(os.listdir("/proc/self/fd"))


def test_a_job_that_cannot_be_written_leaves_no_descriptor() -> None:
    before = open_descriptors()
    with pytest.raises(TypeError):
        Child("x", [Call({object(): torch.ones(1)})], Limits())  # type: ignore[dict-item]
    assert open_descriptors() == before


@pytest.mark.parametrize("spare", range(5))
def test_a_shortage_of_descriptors_leaves_none(spare: int) -> None:
    # Two files and the two ends of a pipe need four; so the first four attempts fail, each elsewhere.
    before = open_descriptors()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = [number for number in range(1000) if not Path(f"/proc/self/fd/{number}").is_symlink()]
    resource.setrlimit(resource.RLIMIT_NOFILE, (free[spare], limits[1]))
    try:
        child = Child("x", [Call(ONE)], Limits())
        child.close()
        succeeded = True
    except OSError:
        succeeded = False
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert succeeded == (spare == 4)
    assert open_descriptors() == before
