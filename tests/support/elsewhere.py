"""A stand-in for a GPU: tensors that say `cuda`, compute on the CPU, and do not mix with others.

    with Elsewhere():
        torch.zeros(3).to("cuda") + torch.zeros(3)     # AssertionError, as on a GPU

Without a GPU it checks that the tensors of an operator are on one device, and that bytes are read
in host memory. Values are the CPU's, so a job must give the same bytes. It does not test CUDA's own
kernels: which exist, how they round, whether they are deterministic.

As on CUDA, a tensor of the host may index one that is elsewhere, be copied into one, and take part
as a single number.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

_CUDA = torch.device("cuda")
_READS_BYTES = ("numpy", "__array__", "data_ptr", "untyped_storage")


class There(Tensor):
    """A tensor elsewhere. What is made of it is elsewhere too, in whatever thread."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        name, kwargs = func.__name__, dict(kwargs or {})
        if func == Tensor.device.__get__:  # type: ignore[attr-defined]
            return _CUDA
        if func == Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return True
        assert name not in _READS_BYTES, f"{name} of a tensor that is not in host memory"
        if name == "cpu":
            return _here(args[0])
        if name == "to":
            place, args, kwargs = _split_to(args, kwargs)
            if place == "cpu":
                return _here(args[0]).to(*args[1:], **kwargs)
        elif "device" in kwargs:
            assert torch.device(kwargs.pop("device")) == _CUDA, name
        _check(name, args, kwargs)
        return super().__torch_function__(func, types, args, kwargs)


class Elsewhere(TorchFunctionMode):
    """While it is on, in this thread, `cuda` is the stand-in. `moved` counts tensors sent there,
    `moved_of` those of each dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.moved = 0
        self.moved_of: Counter[torch.dtype] = Counter()

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func.__name__ == "to" and not isinstance(args[0], There):
            place, args, kwargs = _split_to(args, kwargs)
            if place == "cuda":
                self.moved += 1
                self.moved_of[args[0].dtype] += 1
                return func(args[0].clone(), *args[1:], **kwargs).as_subclass(There)
            if place is not None:
                kwargs["device"] = place
        elif kwargs.get("device") in ("cuda", _CUDA) and not _has_there(args):
            del kwargs["device"]
            return func(*args, **kwargs).as_subclass(There)
        return func(*args, **kwargs)


def _split_to(args: Any, kwargs: dict[str, Any]) -> tuple[str | None, Any, dict[str, Any]]:
    """Where a call of `to` sends its tensor, None if nowhere; and the call without that."""
    place, rest = None, [args[0]]
    for one in args[1:]:
        if isinstance(one, Tensor):
            place, one = one.device.type, one.dtype
        if isinstance(one, str | torch.device):
            place = torch.device(one).type
        else:
            rest.append(one)
    if (given := kwargs.get("device")) is not None:
        place = torch.device(given).type
    return place, rest, {name: value for name, value in kwargs.items() if name != "device"}


def _here(tensor: Tensor) -> Tensor:
    with torch._C.DisableTorchFunction():
        return tensor.clone().as_subclass(Tensor)


def _has_there(value: Any) -> bool:
    return any(isinstance(one, There) for one in tree_leaves(value))


def _check(name: str, args: Any, kwargs: dict[str, Any]) -> None:
    if name == "copy_":
        return
    if name in ("__getitem__", "__setitem__") and isinstance(args[0], There):
        args = [args[0], *args[2:]]
    given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
    here = [tuple(one.shape) for one in given if not isinstance(one, There) and one.dim()]
    assert not here, f"{name} of tensors that are elsewhere and, of shape {here}, here"
