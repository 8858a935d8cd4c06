import pytest
import torch

from selfdev.errors import UserError
from selfdev.models.device import ON_CPU, Place, pick_device


def test_the_cpu_is_there() -> None:
    assert pick_device("cpu", "--device") == torch.device("cpu")
    assert Place.of("cpu", "float32", "--device") == ON_CPU
    assert str(Place.of("cpu", "bfloat16", "--device")) == "cpu bfloat16"


def test_auto_takes_a_gpu_only_where_there_is_one() -> None:
    assert (pick_device("auto", "--device").type == "cuda") == torch.cuda.is_available()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has one")
def test_a_missing_device_is_named() -> None:
    with pytest.raises(UserError, match=r"factory\.device: cuda, and torch finds none"):
        pick_device("cuda", "factory.device")
