"""Outputs that lie about what they are."""

import pytest
import torch
from canaries import GOOD

from selfdev.sandbox import Sandbox

OUTPUTS = {
    "nan": ("model_dict['a'] * float('nan')", "NonFinite"),
    "infinity": ("model_dict['a'] / 0", "NonFinite"),
    "one_nan": (
        "torch.cat([model_dict['a'].flatten()[:-1], torch.tensor([float('nan')])]).view(12, 8)",
        "NonFinite",
    ),
    "too_large_for_float32": ("torch.full((12, 8), 1e300, dtype=torch.float64)", "NonFinite"),
    "complex": ("model_dict['a'] * 1j", "DtypeMismatch"),
    "quantised": ("torch.quantize_per_tensor(model_dict['a'], 0.1, 0, torch.qint8)", "DtypeMismatch"),
    "transposed": ("model_dict['a'].T", "ShapeMismatch"),
    "scalar": ("model_dict['a'].sum()", "ShapeMismatch"),
    "larger": ("torch.zeros(10000, 1000)", "ShapeMismatch"),
    "extra_dimension": ("model_dict['a'].unsqueeze(0)", "ShapeMismatch"),
    "none": ("None", "NotATensor"),
    "number": ("0.0", "NotATensor"),
    "dictionary": ("model_dict", "NotATensor"),
    "list": ("model_dict['a'].tolist()", "NotATensor"),
    "array": ("model_dict['a'].numpy()", "NotATensor"),
    "generator": ("(x for x in model_dict.values())", "NotATensor"),
    "meta": ("torch.empty(12, 8, device='meta')", "DeviceMismatch"),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_bad_output_is_named(name: str, box: Sandbox, model_dict: dict[str, torch.Tensor]) -> None:
    value, failure = OUTPUTS[name]
    source = f"import torch\ndef merge_models(model_dict, device):\n    return {value}"
    outcome = box.merge(source, model_dict)
    assert (outcome.status, outcome.failure, outcome.tensor) == ("bad_output", failure, None), outcome


LIARS = {
    "subclass_that_lies_about_its_shape": "class Liar(torch.Tensor):\n    shape = property(lambda self: (12, 8))\n"
    "value = torch.zeros(3).as_subclass(Liar)",
    "subclass_that_takes_over_functions": "class Liar(torch.Tensor):\n    @classmethod\n"
    "    def __torch_function__(cls, f, types, args=(), kwargs=None): return True\nvalue = torch.zeros(3).as_subclass(Liar)",
    "object_that_lies_about_its_class": "class Liar:\n    __class__ = torch.Tensor\n    shape = (12, 8)\n"
    "    def __getattr__(self, name): return lambda *a, **k: self\nvalue = Liar()",
    "nested_tensor": "value = torch.nested.nested_tensor([torch.zeros(8)] * 12)",
    "wild_strides": "value = torch.as_strided(torch.zeros(1), (12, 8), (0, 0))",
    "freed_storage": "value = torch.zeros(12, 8)\nvalue.untyped_storage().resize_(0)",
}


@pytest.mark.parametrize("name", LIARS)
def test_a_lying_output_gives_nothing_but_finite_numbers(
    name: str, box: Sandbox, model_dict: dict[str, torch.Tensor]
) -> None:
    source = f"import torch\n{LIARS[name]}\ndef merge_models(model_dict, device):\n    return value"
    outcome = box.merge(source, model_dict)
    if outcome.ok:
        assert outcome.tensor is not None
        assert type(outcome.tensor) is torch.Tensor
        assert outcome.tensor.shape == (12, 8)
        assert outcome.tensor.dtype == torch.float32
        assert bool(torch.isfinite(outcome.tensor).all())
    assert box.merge(GOOD, model_dict).ok
