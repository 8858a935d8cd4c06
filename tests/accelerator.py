"""A pretend GPU: tensors whose device is `cuda:0`, which compute on the CPU, and refuse what CUDA refuses.

It tells where tensors of two devices meet, where the device's own random stream is drawn from, and where a sum depends
on the order in which a GPU happens to add. It tells nothing of speed, of memory, or of what CUDA's kernels compute.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

DEVICE = torch.device("cuda:0")
_INSIDE = torch.device("meta:1")
"""What stands for it within torch, which was built without CUDA and would ask its driver."""

_MOVING = {"copy_", "_to_copy"}
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
_DRAWING = {"rand", "randn", "rand_like", "randn_like", "uniform_", "normal_", "bernoulli", "multinomial"}

_ANSWERS = {"is_available": True, "device_count": 1, "mem_get_info": (8 << 30, 8 << 30), "_lazy_init": None}
_ANSWERS |= {"get_device_name": "Pretend", "memory_reserved": 0, "memory_allocated": 0, "empty_cache": None}


class OnDevice(Tensor):
    """Holds a tensor of the CPU and says that it lies on the device."""

    held: Tensor
    device = DEVICE  # type: ignore[assignment]
    is_cuda, is_meta = True, False

    @staticmethod
    def __new__(cls, held: Tensor) -> "OnDevice":
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        with torch.inference_mode(False):  # a view in inference mode must be of its base's kind
            made = Tensor._make_wrapper_subclass(cls, held.shape, **layout, device=_INSIDE)  # type: ignore[attr-defined]
        made.held = held
        return made  # type: ignore[no-any-return]

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"OnDevice({self.held!r})"

    def untyped_storage(self) -> Any:
        return self.held.untyped_storage()  # whose address and size tell as much

    def tolist(self) -> Any:
        return self.held.tolist()

    def numpy(self, **_: Any) -> Any:  # type: ignore[override]
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})


class _Accelerated(TorchDispatchMode):
    """Makes what is asked for on the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})


class _Named(TorchFunctionMode):
    """Calls the device what it is called inside, and makes tensors of lists on the CPU first."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, names = kwargs or {}, {"cuda": _INSIDE, "cuda:0": _INSIDE}
        if func is not torch.device:
            args, kwargs = tree_map_only(
                (str, torch.device), lambda each: names.get(str(each), each), (args, kwargs)
            )
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") == _INSIDE:
            return func(*args, **kwargs | {"device": "cpu"}).to(_INSIDE)
        if args and isinstance(args[0], OnDevice):
            if func is Tensor.new_tensor:
                return torch.tensor(*args[1:], **{"dtype": args[0].dtype} | kwargs).to(_INSIDE)
            if func in (Tensor.__getitem__, Tensor.__setitem__):
                where = args[1] if isinstance(args[1], tuple) else (args[1],)
                args = (args[0], tuple(map(_index, where)), *args[2:])
        return func(*args, **kwargs)


def _index(where: Any) -> Any:
    return torch.tensor(list(where), dtype=torch.long) if isinstance(where, list | range) else where


def _compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    with _Accelerated():  # in inference mode what consists of other operations comes whole
        composed: Any = func.decompose(*args, **kwargs)
    if composed is not NotImplemented:
        return composed
    name = func._schema.name.removeprefix("aten::")
    there = [each for each in tree_iter((args, kwargs)) if isinstance(each, OnDevice)]
    if name == "_fused_sdp_choice" and there:
        return 0  # the one made of plain operations
    wanted = kwargs.get("device")
    onto = bool(there) if wanted is None else torch.device(wanted) in (_INSIDE, DEVICE)
    if onto and wanted is not None:
        kwargs = kwargs | {"device": torch.device("cpu")}
    if there and name not in _MOVING:
        _check_devices(func, name, args, kwargs)
    if onto and name in _DRAWING:
        raise RuntimeError(f"{func} draws from the device's own random stream, which nobody seeds")
    if there and _meets(name, args):
        raise RuntimeError(f"{func} adds what goes to one place in any order")
    plain_args, plain_kwargs = tree_map_only(OnDevice, lambda each: each.held, (args, kwargs))
    plain_kwargs.pop("pin_memory", None)  # for which there is no driver
    out = func(*plain_args, **plain_kwargs)
    if name == "copy_":
        return args[0]
    known = {id(each.held): each for each in there}  # what was written in place is the same tensor as before

    def placed(each: Tensor) -> Tensor:
        return known[id(each)] if id(each) in known else OnDevice(each)

    return tree_map_only(Tensor, placed, out) if onto else out


def _meets(name: str, args: Any) -> bool:
    """Whether an operation that adds to places by atomics is given one of them twice; `index_put` sorts them first."""
    name = name.removesuffix("_")
    if name == "index_add":
        return len(args[2].unique()) < len(args[2])
    if name in ("scatter_add", "scatter_reduce"):
        ordered = args[2].sort(args[1]).values.transpose(args[1], 0)
        return bool((ordered[1:] == ordered[:-1]).any())
    return False


def _check_devices(func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> None:
    """Raise RuntimeError where CUDA would: of the CPU may be numbers that are read, and the indices of a tensor."""
    given = dict(zip((each.name for each in func._schema.arguments), args, strict=False)) | kwargs
    for argument in func._schema.arguments:
        if argument.name == "indices" and name in _INDEXING and isinstance(given["self"], OnDevice):
            continue
        written = argument.alias_info is not None and argument.alias_info.is_write
        for each in tree_iter(given.get(argument.name)):
            if isinstance(each, Tensor) and not isinstance(each, OnDevice) and (each.dim() or written):
                raise RuntimeError(
                    f"{func}: {argument.name} is on the CPU: at least two devices, cuda:0 and cpu"
                )


@contextmanager
def accelerator(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Within it, and within this thread, torch has the device."""
    for question, answer in _ANSWERS.items():
        patch.setattr(torch.cuda, question, lambda *_, answer=answer, **__: answer)
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)  # or tied weights would part
    try:
        with _Accelerated(), _Named():
            yield
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
