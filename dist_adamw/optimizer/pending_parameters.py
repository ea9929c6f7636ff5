"""Make reads of a parameter wait until its updated values have arrived.

Between an update and the arrival of the slices that other ranks computed, a parameter's memory is partly old. For that
time the parameter has another class, in which every torch function, method or attribute that could read or write its
memory waits first. So no reference to the parameter shows an old value.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from dist_adamw.optimizer.sharding.shard import Shard
from dist_adamw.optimizer.transport.base import InFlightBucket

_ARRIVE = "_dist_adamw_arrive"


def _getter(name: str) -> Any:
    return getattr(Tensor, name).__get__


# Functions that do not depend on the values and are called between an update and the next forward pass.
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


class PendingParameter(nn.Parameter):
    """An ``nn.Parameter`` that waits for its values when they are needed."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Wait for the values of every parameter in the arguments of ``func``, then call it."""
        if func in _HARMLESS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        _wait_for(args)
        _wait_for((kwargs or {}).values())
        return func(*args, **(kwargs or {}))

    # A parameter's own methods look at its class before its values, so wait first, which restores the class.
    def __deepcopy__(self, memo: Any) -> Any:
        """Wait, then copy as a plain parameter."""
        _arrive(self)
        return self.__deepcopy__(memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Wait, then pickle as a plain parameter."""
        _arrive(self)
        return self.__reduce_ex__(protocol)


def _wait_for(values: Iterable[Any]) -> None:
    for value in values:
        if isinstance(value, PendingParameter):
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
    """Make every read of ``params`` call ``arrive`` with the parameter first, which must `release` it. Local.

    Subclasses of ``nn.Parameter`` cannot be guarded: see `can_guard`.
    """
    for param in params:
        param.__dict__[_ARRIVE] = arrive
        param.__class__ = PendingParameter


def can_guard(param: Tensor) -> bool:
    """Return whether ``param`` is a plain ``nn.Parameter``, which `guard` can change to another class. Local."""
    return type(param) in (nn.Parameter, PendingParameter)


def release(params: Iterable[Tensor]) -> None:
    """Restore the class of ``params``, whose values have arrived. Local."""
    for param in params:
        if param.__dict__.pop(_ARRIVE, None) is not None:
            param.__class__ = nn.Parameter


class PendingBuckets:
    """Buckets of updated parameters in flight from their owners.

    Pending parameters hold a reference to this object, not to the optimizer: an optimizer that the user has replaced
    must be freed at once, or its hooks would still receive the next gradients.
    """

    def __init__(self) -> None:
        self.buckets: list[tuple[Shard, InFlightBucket]] = []
        self._coming: Counter[int] = Counter()  # by id of parameter, in how many of these buckets it lies

    def add(self, shard: Shard, sent: list[InFlightBucket], *, may_defer: bool) -> None:
        """Wait for ``sent``, or make reads of its parameters wait if all of them can be guarded.

        Args:
            may_defer: Whether reads may wait.
        """
        for bucket in sent:
            self.buckets.append((shard, bucket))
            self._coming.update(map(id, shard.members(bucket.bucket)))
        if not may_defer:
            self.wait()
            return
        for bucket in sent:
            params = shard.members(bucket.bucket)
            if not all(map(can_guard, params)):
                self.wait()
                return
            guard(params, self.wait_for)

    @torch.no_grad()
    def wait(self) -> None:
        """Wait until all buckets have arrived."""
        while self.buckets:
            self._receive()

    @torch.no_grad()
    def wait_for(self, param: Tensor) -> None:
        """Wait until ``param``, which is about to be read, has arrived."""
        while self.buckets and type(param) is PendingParameter:
            self._receive()

    def _receive(self) -> None:
        shard, sent = self.buckets.pop(0)
        assert shard.transport is not None
        shard.transport.finish_gather(sent)
        members = shard.members(sent.bucket)
        self._coming.subtract(map(id, members))
        # A parameter may lie in several buckets, and is complete with the last one.
        release([param for param in members if not self._coming[id(param)]])
