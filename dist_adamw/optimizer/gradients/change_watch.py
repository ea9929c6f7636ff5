"""Detect gradients that were changed between backward and step, or of which each rank has only a part.

A change shows in the identity or address of ``param.grad``, in its version counter and, on a CPU, in a sample of the
values, since ``param.grad.data.mul_(c)`` leaves no other trace. A gradient that was set to None is not used, as in
torch; all ranks must set the same ones to None. Loops over tensors run in C.
"""

from __future__ import annotations

import functools
import itertools
import operator
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from dist_adamw.optimizer.sharding.memory_order import check_dense

_SAMPLED_TENSORS, _SAMPLED_ELEMENTS = 8, 32
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_gradient, _version = operator.attrgetter("grad"), operator.attrgetter("_version")


class GradientWatch:
    """The gradients as backward, or the last accepted change, left them."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Watch nothing."""
        self._params: Sequence[Tensor] = []
        self._averages: Sequence[Tensor] = ()
        self._grads: list[Tensor | None] = []
        self._present: list[Tensor] = []
        self._addresses: list[int] = []
        self._versions = 0
        self._places: list[Tensor] = []
        self._sample: list[Tensor] = []

    def remember(self, params: Sequence[Tensor], averages: Sequence[Tensor] = ()) -> None:
        """Remember the gradients of ``params``, for `changed` to compare with.

        Args:
            averages: The parts of them that this rank owns and that have been averaged. The others may all be zero.
        """
        self._params, self._averages = params, averages
        self._grads = list(map(_gradient, params))
        self._present = _present(self._grads)
        try:
            self._addresses = list(map(Tensor.data_ptr, self._present))
        except RuntimeError:  # sparse gradients have no address; raise the error that says what to do
            for grad in self._present:
                check_dense(grad)
            raise
        self._note_values()

    def remember_written(self, params: Sequence[Tensor], averages: Sequence[Tensor]) -> None:
        """Remember gradients after this package's own writes, which do not move them; cheaper than `remember`."""
        if params is not self._params or not all(map(operator.is_, map(_gradient, params), self._grads)):
            self.remember(params, averages)
            return
        self._averages = averages
        self._note_values()

    def _note_values(self) -> None:
        # Version counters only grow, so their sum changes if any of them does.
        self._versions = sum(map(_version, self._present))
        self._places = _places(self._averages or self._present)
        self._sample = [place.clone() for place in self._places]

    def accept(self, averages: Sequence[Tensor] | None = None) -> None:
        """Accept the gradients as they are now; ``averages`` as for `remember`, by default the same as before."""
        if self._params:
            self.remember(self._params, self._averages if averages is None else averages)

    def replaced(self) -> bool:
        """Return whether some ``param.grad`` is another tensor or has other memory. None does not count as replaced."""
        now = list(map(_gradient, self._params))
        if all(map(operator.is_, now, self._grads)):
            return list(map(Tensor.data_ptr, self._present)) != self._addresses
        return self._is_any_left_replaced(now)

    def _is_any_left_replaced(self, now: list[Tensor | None]) -> bool:
        """Return `replaced` for gradients ``now`` of which some are other objects, or None."""
        if any(new is not None and new is not old for new, old in zip(now, self._grads, strict=True)):
            return True
        # `_addresses` has an entry for each gradient that was there; drop the entries of those that are None now.
        is_left = [new is not None for new, old in zip(now, self._grads, strict=True) if old is not None]
        addresses = list(itertools.compress(self._addresses, is_left))
        return list(map(Tensor.data_ptr, _present(now))) != addresses

    def changed(self) -> bool:
        """Return whether any gradient was replaced or written to."""
        return (
            self.replaced()
            or sum(map(_version, self._present)) != self._versions
            or not all(map(torch.equal, self._places, self._sample))
        )

    def dropped(self) -> list[int]:
        """Return the indices of `dropped_params`."""
        now = list(map(_gradient, self._params))
        if all(map(operator.is_, now, self._grads)):
            return []
        return [i for i, (new, old) in enumerate(zip(now, self._grads, strict=True)) if new is None and old is not None]

    def dropped_params(self) -> list[Tensor]:
        """Return the parameters whose gradients were set to None."""
        return [self._params[i] for i in self.dropped()]


def _present(grads: Sequence[Tensor | None]) -> list[Tensor]:
    return [grad for grad in grads if grad is not None]


def _places(grads: Sequence[Tensor]) -> list[Tensor]:
    """Return views, as integers, of a few elements of a few of the gradients on a CPU."""
    # On a GPU the host would have to wait. Integer views, because torch.equal would find NaN unequal to itself.
    places = []
    sampled = [grad for grad in grads[:: max(1, len(grads) // _SAMPLED_TENSORS)] if _can_be_sampled(grad)]
    for grad in sampled:
        count = min(_SAMPLED_ELEMENTS, grad.numel())
        elements = torch.as_strided(grad.detach(), (count,), (grad.numel() // count,), grad.storage_offset())
        places.append(elements.view(_BITS[grad.dtype.itemsize]))
    # Scaling does not change zeros, and most of an embedding's gradient is zero, so the sample needs a nonzero element.
    if not any(map(torch.any, places)):
        for grad in filter(_can_be_sampled, grads):
            flat = grad.detach().view(-1)
            largest = flat.abs().argmax()
            if flat[largest]:
                return [*places, flat[largest : largest + 1].view(_BITS[grad.dtype.itemsize])]
    return places


def _can_be_sampled(grad: Tensor) -> bool:
    return grad.device.type == "cpu" and grad.numel() > 0 and grad.is_contiguous()


# By id: gradients that were reduced to owners for an optimizer that no longer exists. Nothing can gather them.
_parts: dict[int, weakref.ref[Tensor]] = {}


def mark_parts(grads: Iterable[Tensor]) -> None:
    """Mark gradients of which each rank has only a part and whose optimizer no longer exists. Local."""
    for grad in grads:
        _parts[id(grad)] = weakref.ref(grad, functools.partial(_forget, id(grad)))


def _forget(key: int, ref: Any) -> None:
    # An id is reused once its tensor is gone: another gradient may have been marked under it since.
    if _parts.get(key) is ref:
        del _parts[key]


def refuse_parts(params: Iterable[Tensor]) -> None:
    """Refuse gradients of ``params`` that are parts of averages. Local; costs nothing if there are none.

    Raises:
        RuntimeError: says how to clear them.
    """
    if not _parts:
        return
    grads = _present(list(map(_gradient, params)))
    parts = [grad for grad in grads if (ref := _parts.get(id(grad))) is not None and ref() is grad]
    if any(bool(grad.any()) for grad in parts):
        raise RuntimeError(
            f"{len(parts)} gradients, the first of shape {tuple(parts[0].shape)}, were reduced to their owners for an "
            "attached DistAdamW that no longer exists, so each rank has only a part of the average. Call zero_grad() "
            "before you delete an optimizer, or at least before the next forward pass."
        )
    for grad in parts:  # all zero now, so no part of an average is left
        del _parts[id(grad)]
