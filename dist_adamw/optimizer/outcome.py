"""Decide on the device whether an update is skipped, because its gradients have inf or nan, and record it."""

from __future__ import annotations

import torch
from torch import Tensor


def is_capturing() -> bool:
    """Return whether a CUDA graph is being captured. A torch without CUDA raises when it is asked."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


class Outcome:
    """The last update's outcome, which a device may know before the host, and the number of applied updates.

    Attributes:
        norm: Global gradient norm before clipping, 0-d fp32; None when it was not measured.
        found_inf: Not 0 where gradients were inf or nan, 0-d fp32 on the device; None once the host knows.
    """

    def __init__(self) -> None:
        self.norm: Tensor | None = None
        self.found_inf: Tensor | None = None
        self._copy: tuple[Tensor, torch.cuda.Event] | None = None  # the same on the host, once the event is over
        self._updates = 0
        self._was_skipped = False

    @property
    def updates(self) -> int:
        """Applied updates. Waits for the device where it was not asked yet."""
        self.resolve()
        return self._updates

    @updates.setter
    def updates(self, value: int) -> None:
        self._updates = value

    @property
    def was_skipped(self) -> bool:
        """Whether the last update left the weights alone. Waits for the device where it was not asked yet."""
        self.resolve()
        return self._was_skipped

    @property
    def is_known(self) -> bool:
        """Whether `updates` and `was_skipped` are known without waiting for a device."""
        return self.found_inf is None or self._copy is None

    def resolve(self) -> None:
        """Ask the device whether the last update was applied; free once asked."""
        if self.found_inf is None:
            return
        flag = self.found_inf
        if self._copy is not None:
            flag, arrived = self._copy
            arrived.synchronize()
            self._copy = None
        self._was_skipped = bool(flag.item())
        self.found_inf = None
        self._updates += not self._was_skipped

    def begin(self) -> None:
        """An update begins. It is a skipped one until there is something to apply."""
        self.resolve()
        self._was_skipped = True

    def count(self, updates: int) -> None:
        """The update is applied, whatever the gradients are; ``updates`` with it."""
        self._was_skipped = False
        self._updates = updates

    def measure(self, norm: Tensor) -> None:
        """The update is applied if ``norm``, 0-d, is finite."""
        self.norm = norm.to(torch.float32)
        self.found_inf = (~torch.isfinite(norm)).to(torch.float32)
        if norm.device.type == "cuda" and not is_capturing():
            flag = torch.empty((), dtype=torch.float32, pin_memory=True)
            flag.copy_(self.found_inf, non_blocking=True)
            self._copy = (flag, torch.cuda.Event())  # type: ignore[no-untyped-call]
            self._copy[1].record()

    def forget_captured(self) -> None:
        """A CUDA graph was captured: nothing has been applied, and nothing skipped."""
        self.found_inf = None
