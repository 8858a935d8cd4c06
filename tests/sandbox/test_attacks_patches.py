"""Patches of torch, of Python and of the inputs: each dies with its child."""

import pytest
import torch
from canaries import GOOD

from selfdev.sandbox import Sandbox


def test_inputs_are_the_childs_own_copy(box: Sandbox, model_dict: dict[str, torch.Tensor]) -> None:
    before = {name: tensor.clone() for name, tensor in model_dict.items()}
    source = (
        "import torch\ndef merge_models(model_dict, device):\n    seen = model_dict['a'].clone()\n"
        "    for tensor in model_dict.values(): tensor.fill_(7)\n    return seen"
    )
    outcomes = box.merge_many(source, [model_dict, model_dict])
    for outcome in outcomes:
        assert outcome.tensor is not None
        assert torch.equal(outcome.tensor, before["a"])
    assert all(torch.equal(model_dict[name], before[name]) for name in before)


PATCHES = {
    "isfinite": "torch.isfinite = lambda x: torch.ones(1, dtype=torch.bool)",
    "is_tensor": "torch.Tensor.is_complex = lambda self: False",
    "shape": "torch.Tensor.shape = property(lambda self: (12, 8))",
    "copy": "torch.Tensor.copy_ = lambda self, other: self",
    "frombuffer": "torch.frombuffer = lambda *a, **k: torch.zeros(96)",
    "clock": "sys.modules['time'].perf_counter = lambda: 1e300",
    "exit": "sys.modules['posix']._exit = os._exit = lambda code: None",
    "record": "sys.modules['__jail__.job'].Record.pack = lambda self: bytes(1296)",
    "builtins": "sys.modules['builtins'].isinstance = lambda *a: True",
    "json": "sys.modules['json'].loads = None",
    "hash_seed": "os.environ['PYTHONHASHSEED'] = '1'",
}


@pytest.mark.parametrize("name", PATCHES)
def test_a_patch_passes_no_nan_and_dies_with_its_child(
    name: str, box: Sandbox, model_dict: dict[str, torch.Tensor]
) -> None:
    source = f"import torch\nsys = torch.sys\nos = torch.os\n{PATCHES[name]}\n" + (
        "def merge_models(model_dict, device):\n    return model_dict['a'] * float('nan')"
    )
    outcome = box.merge(source, model_dict)
    assert not outcome.ok or bool(torch.isfinite(outcome.tensor).all())  # type: ignore[arg-type]
    after = box.merge(GOOD, model_dict)
    assert after.tensor is not None
    assert torch.equal(after.tensor, model_dict["a"])
    assert 0 <= after.seconds < 20
