"""Code that runs while the program is defined, and imports."""

import os

import pytest
import torch
from canaries import GOOD

from selfdev.sandbox import Sandbox

DEFINITIONS = {
    "exit_in_the_module": ("torch.os._exit(0)\n" + GOOD, "crashed"),
    "exit_in_a_decorator": ("@lambda f: torch.os._exit(0)\n" + GOOD, "crashed"),
    "exit_in_a_default": (
        "def merge_models(model_dict, device, context=torch.os._exit(0)):\n    return 1",
        "crashed",
    ),
    "exit_in_a_class": ("class A:\n    torch.os._exit(0)\n" + GOOD, "crashed"),
    "exit_in_an_annotation": (
        "def merge_models(model_dict: torch.os._exit(0), device):\n    return 1",
        "crashed",
    ),
    "loop_in_the_module": ("while True: pass\n" + GOOD, "timeout"),
    "system_in_the_module": ("torch.os.system('touch $ROOM/new')\n" + GOOD, "ok"),
    "raise_in_the_module": ("1 / 0\n" + GOOD, "error"),
    "entry_deleted": (GOOD + "\ndel merge_models", "error"),
    "entry_replaced_by_a_number": (GOOD + "\nmerge_models = 3", "error"),
    "entry_replaced_by_exit": (GOOD + "\nmerge_models = torch.os._exit", "error"),
    "entry_twice": (GOOD + "\n" + GOOD, "rejected"),
    "entry_within_a_class": ("class A:\n    def merge_models(a, b):\n        return a", "rejected"),
    "entry_async": ("async def merge_models(model_dict, device):\n    return model_dict['a']", "rejected"),
    "entry_is_a_generator": (
        "def merge_models(model_dict, device):\n    yield model_dict['a']",
        "bad_output",
    ),
    "entry_without_parameters": ("def merge_models():\n    return 1", "rejected"),
    "entry_with_too_many": ("def merge_models(a, b, c, d):\n    return a", "rejected"),
}


@pytest.mark.parametrize("name", DEFINITIONS)
def test_code_that_runs_at_definition_gains_nothing(
    name: str,
    strict_box: Sandbox,
    narrow_box: Sandbox,
    model_dict: dict[str, torch.Tensor],
    tmp_path: os.PathLike[str],
) -> None:
    source, status = DEFINITIONS[name]
    box = strict_box if status == "timeout" else narrow_box
    outcome = box.merge("import torch\n" + source.replace("$ROOM", str(tmp_path)), model_dict)
    assert outcome.status == status, outcome
    assert os.listdir(tmp_path) == []


IMPORTS = {
    "os": "import os",
    "as": "import subprocess as torch",
    "from": "from os import system",
    "submodule": "import os.path",
    "relative": "from . import torch",
    "within_a_function": "def f():\n    import socket",
    "after_an_allowed_one": "import math, ctypes",
    "look_alike": "import torch_os",
    "numpy": "import numpy as np",
}


@pytest.mark.parametrize("name", IMPORTS)
def test_import_is_rejected_with_its_name(
    name: str, box: Sandbox, model_dict: dict[str, torch.Tensor]
) -> None:
    outcome = box.merge(f"{IMPORTS[name]}\n{GOOD}", model_dict)
    assert (outcome.status, outcome.failure) == ("rejected", "ImportNotAllowed")
