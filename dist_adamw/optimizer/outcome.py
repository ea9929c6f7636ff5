"""Decide on the device whether to skip an update because its gradients have inf or nan, and record the outcome."""

from __future__ import annotations

import torch
from torch import Tensor


def is_capturing() -> bool:
    """Return whether a CUDA graph is being captured."""
    # The second function raises in a torch without CUDA.
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


class Outcome:
    """The last update's outcome, which the device may know before the host, and the number of applied updates.

    Attributes:
        norm: The global gradient norm before clipping, 0-d fp32; None if it was not measured.
        found_inf: 1 if gradients were inf or nan, else 0; 0-d fp32 on the device. None once the host knows.
    """

    def __init__(self) -> None:
        self.norm: Tensor | None = None
        self.found_inf: Tensor | None = None
        self._copy: tuple[Tensor, torch.cuda.Event] | None = None  # its copy on the host, valid after the event
        self._updates = 0
        self._was_skipped = False

    @property
    def updates(self) -> int:
        """The number of applied updates. Waits for the device if the host does not know it yet."""
        self.resolve()
        return self._updates

    @updates.setter
    def updates(self, value: int) -> None:
        self._updates = value

    @property
    def was_skipped(self) -> bool:
        """Whether the last update changed no weights. Waits for the device if the host does not know yet."""
        self.resolve()
        return self._was_skipped

    @property
    def is_known(self) -> bool:
        """Whether `updates` and `was_skipped` are known without waiting for a device."""
        return self.found_inf is None or self._copy is None

    def resolve(self) -> None:
        """Read from the device whether the last update was applied, unless the host knows."""
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
        """Begin an update, which counts as skipped until there is something to apply."""
        self.resolve()
        self._was_skipped = True

    def count(self, updates: int) -> None:
        """Record that the update is applied, and that it makes ``updates``."""
        self._was_skipped = False
        self._updates = updates

    def measure(self, norm: Tensor) -> None:
        """Record that the update is applied only if ``norm``, 0-d, is finite."""
        self.norm = norm.to(torch.float32)
        self.found_inf = (~torch.isfinite(norm)).to(torch.float32)
        if norm.device.type == "cuda" and not is_capturing():
            # Copy it now without waiting. A later ``item()`` would wait for everything queued behind this update.
            flag = torch.empty((), dtype=torch.float32, pin_memory=True)
            flag.copy_(self.found_inf, non_blocking=True)
            self._copy = (flag, torch.cuda.Event())  # type: ignore[no-untyped-call]
            self._copy[1].record()

    def forget_captured(self) -> None:
        """Forget the outcome of a captured update, which was neither applied nor skipped."""
        self.found_inf = None
