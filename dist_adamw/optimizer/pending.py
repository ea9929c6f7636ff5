"""Make reads of a parameter wait until its updated values have arrived.

Knows tensors and when they are read; nothing of how values come.

Between an update and the arrival of what other ranks computed, a parameter's memory is partly old.
For that time it has another class, through which whatever torch function, method or attribute
that could read or write its memory waits first, so no reference shows an old value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

_ARRIVE = "_dist_adamw_arrive"


def _getter(name: str) -> Any:
    return getattr(Tensor, name).__get__


# What says nothing of the values, and is asked between an update and the next forward pass.
_HARMLESS = {
    *(_getter(name) for name in ("grad", "requires_grad", "shape", "device", "dtype", "layout", "is_leaf", "ndim")),
    *(_getter(name) for name in ("is_sparse", "is_cuda", "grad_fn", "is_meta")),
    *(getattr(vars(torch._C.TensorBase)["grad"], name) for name in ("__set__", "__delete__")),
    Tensor.__hash__,
    Tensor.size,
    Tensor.numel,
    Tensor.dim,
    Tensor.stride,
    Tensor.is_contiguous,
    Tensor.is_floating_point,
    Tensor.is_complex,
}


class ArrivingParameter(nn.Parameter):
    """An ``nn.Parameter`` that waits for its values when they are needed."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Wait for the values of every parameter that ``func`` is given."""
        if func in _HARMLESS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        _wait_for(args)
        _wait_for((kwargs or {}).values())
        return func(*args, **(kwargs or {}))

    def __deepcopy__(self, memo: Any) -> Any:  # looks at its class before it looks at its values
        """As of a parameter."""
        _arrive(self)
        return self.__deepcopy__(memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As of a parameter."""
        _arrive(self)
        return self.__reduce_ex__(protocol)


def _wait_for(values: Iterable[Any]) -> None:
    for value in values:
        if isinstance(value, ArrivingParameter):
            _arrive(value)
        elif isinstance(value, (list, tuple)):
            _wait_for(value)
        elif isinstance(value, dict):
            _wait_for(value.values())


def _arrive(param: Any) -> None:
    arrive = param.__dict__.get(_ARRIVE)
    if arrive is None:
        param.__class__ = nn.Parameter
    else:
        arrive(param)


def guard(params: Iterable[Tensor], arrive: Callable[[Tensor], None]) -> None:
    """Have readers of ``params`` call ``arrive`` with the parameter first. It must end in `release` of it. Local.

    Subclasses of ``nn.Parameter`` are not guarded: see `can_guard`.
    """
    for param in params:
        param.__dict__[_ARRIVE] = arrive
        param.__class__ = ArrivingParameter


def can_guard(param: Tensor) -> bool:
    """Return whether `guard` can be put on ``param``: it is a plain ``nn.Parameter``. Local."""
    return type(param) in (nn.Parameter, ArrivingParameter)


def release(params: Iterable[Tensor]) -> None:
    """The values of ``params`` are there. Local."""
    for param in params:
        if param.__dict__.pop(_ARRIVE, None) is not None:
            param.__class__ = nn.Parameter
