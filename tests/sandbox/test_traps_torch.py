"""Traps that torch lays for a jail: threads, code made at run time, late imports, chosen kernels."""

import os
from pathlib import Path

import torch
from canaries import ONE, SUM, program

from selfdev.sandbox import Sandbox


def test_a_fork_after_threads_would_hang_so_the_forkserver_has_one(box: Sandbox) -> None:
    torch.ones(2000, 2000) @ torch.ones(2000, 2000)  # this process has threads by now
    assert len(os.listdir(f"/proc/{box.pid}/task")) == 1
    with Sandbox() as started_with_threads:
        assert started_with_threads.merge(SUM, ONE).ok


def test_no_page_of_the_forkserver_is_writable_and_executable(box: Sandbox) -> None:
    lines = Path(f"/proc/{box.pid}/maps").read_text().splitlines()
    assert lines
    assert [line for line in lines if "w" in line.split()[1] and "x" in line.split()[1]] == []


def test_what_is_not_loaded_is_named_and_not_blamed_on_permissions(box: Sandbox) -> None:
    outcome = box.merge(program("import torch.onnx as got"), ONE)
    assert (outcome.status, outcome.failure) == ("error", "ModuleNotFoundError")
    assert "the jail can load no more" in outcome.error


def test_onednn_which_needs_executable_memory_is_off_in_the_jail_alone(box: Sandbox) -> None:
    before = torch.backends.mkldnn.enabled
    outcome = box.merge(program("got = not torch.backends.mkldnn.enabled"), {"a": torch.ones(2)})
    assert outcome.tensor is not None
    assert bool(outcome.tensor.all())
    assert torch.backends.mkldnn.enabled == before


def test_kernels_are_the_vectorised_ones(box: Sandbox) -> None:
    # Without /proc/cpuinfo at the right moment torch silently takes others, with other numbers.
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    outcome = box.merge(
        "def merge_models(model_dict, device):\n    return model_dict['a'].lgamma()", {"a": x}
    )
    assert outcome.tensor is not None
    assert torch.equal(outcome.tensor, x.lgamma())
