"""Decide on the device whether to skip an update because its gradients have inf or nan, and record the outcome."""

from __future__ import annotations

import torch
from torch import Tensor


def is_capturing() -> bool:
    """Return whether a CUDA graph is being captured."""
    # The second function raises in a torch without CUDA.
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


class HostCopy:
    """A 0-d tensor's copy on the host, on its way from a CUDA device. Making it waits for nothing."""

    def __init__(self, value: Tensor) -> None:
        # From pinned memory `read` need not wait for what is queued later, as ``item()`` would.
        self._value = torch.empty((), dtype=value.dtype, pin_memory=True)
        self._value.copy_(value, non_blocking=True)
        self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        # The copy runs on a stream of the value's device, which need not be the current device.
        self._arrived.record(torch.cuda.current_stream(value.device))

    def read(self) -> float:
        """Return the value. Waits until the copy has arrived."""
        self._arrived.synchronize()
        return self._value.item()


class Outcome:
    """The last update's outcome, which the device may know before the host, and the number of applied updates.

    Attributes:
        norm: The global gradient norm before clipping, 0-d fp32, also if the loop clipped; None if it was not measured.
        found_inf: 1 if gradients were inf or nan, else 0; 0-d fp32 on the device. None once the host knows.
    """

    def __init__(self) -> None:
        self.norm: Tensor | None = None
        self._clipped: Tensor | None = None  # the next update's norm, if the loop has clipped
        self.found_inf: Tensor | None = None
        self._copy: HostCopy | None = None  # of ``found_inf``
        self._elsewhere: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}
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
    def number(self) -> int:
        """The number of the update in progress, from 1, if it is applied. Does not wait for the device."""
        return self._updates + (self.found_inf is not None or is_capturing())  # a capture is not counted yet

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
        self._was_skipped = bool(self.found_inf.item() if self._copy is None else self._copy.read())
        self._copy = None
        self.found_inf = None
        self._updates += not self._was_skipped

    def begin(self) -> None:
        """Begin an update, which counts as skipped until there is something to apply."""
        self.resolve()
        self._was_skipped = True
        self.norm, self._clipped = self._clipped, None
        self._elsewhere.clear()

    def count(self, updates: int) -> None:
        """Record that the update is applied, and that it makes ``updates``."""
        self._was_skipped = False
        self._updates = updates

    def measure(self, norm: Tensor, found_inf: Tensor | None = None) -> None:
        """Record that the update is applied only if ``norm``, 0-d, is finite, and ``found_inf``, 0-d fp32, is 0."""
        self.norm = norm.to(torch.float32)
        # inf - inf and nan are not 0. `torch.isfinite` would be five kernels on a GPU, and a conversion another.
        is_infinite = torch.ne(norm - norm, 0, out=torch.empty_like(self.norm))
        if found_inf is not None:
            is_infinite = torch.maximum(is_infinite, found_inf.to(is_infinite.device, non_blocking=True))
        self.skip_if(is_infinite)

    def note_clipped(self, norm: Tensor) -> None:
        """Record the norm by which the loop has clipped the next update's gradients."""
        self._clipped = norm.detach().to(torch.float32)

    def skip_if(self, found_inf: Tensor) -> None:
        """Record that the update is applied only if ``found_inf``, 0-d fp32, is 0; the host does not wait for it."""
        self.found_inf = found_inf
        if found_inf.device.type == "cuda" and not is_capturing():
            self._copy = HostCopy(found_inf)

    def on_device(self, value: Tensor | None, device: torch.device) -> Tensor | None:
        """Return a value of this update, such as ``found_inf``, on ``device``; copied once per update and device."""
        if value is None or value.device == device:
            return value
        key = (id(value), device)
        if key not in self._elsewhere:
            # The value is kept too, so that its id stays its own.
            self._elsewhere[key] = (value, value.to(device, non_blocking=True))
        return self._elsewhere[key][1]

    def forget_captured(self) -> None:
        """Forget the outcome of a captured update, which was neither applied nor skipped."""
        self.found_inf = None
