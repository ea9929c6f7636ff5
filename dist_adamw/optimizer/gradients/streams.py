"""Order work on gradients that a backward pass writes on several CUDA streams.

Autograd accumulates a gradient on the stream of the forward pass that used the parameter, and calls its hooks there. It
orders these streams before the caller's only at the end of backward, so code that reads gradients earlier must wait.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class GradientStreams:
    """The streams on which gradients were written in this pass. Local; on a host it does nothing."""

    def __init__(self) -> None:
        self._seen: set[torch.cuda.Stream] = set()

    def clear(self) -> None:
        """Forget the streams before a pass: autograd has ordered them before the caller's stream."""
        self._seen.clear()

    def note(self, param: Tensor) -> None:
        """Note the stream on which the gradient of ``param`` has just been accumulated."""
        if param.is_cuda:
            self._seen.add(torch.cuda.current_stream(param.device))

    @contextmanager
    def joined(self, device: torch.device) -> Iterator[None]:
        """Run work on gradients of ``device`` behind all that has been written there. The host does not wait.

        The other streams continue behind it, since they may be given the memory of a gradient that is freed then.
        """
        if not self._seen:
            yield
            return
        current = torch.cuda.current_stream(device)
        others = [stream for stream in self._seen if stream.device == device and stream != current]
        for stream in others:
            current.wait_event(_event(stream))
        yield
        if others:
            done = _event(current)
            for stream in others:
                stream.wait_event(done)


def _event(stream: torch.cuda.Stream) -> torch.cuda.Event:
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(stream)
    return event


class NotedArrival:
    """A hook that notes the stream of a gradient, and enters its parameter into an inbox."""

    def __init__(self, streams: GradientStreams, inbox: deque[Tensor]) -> None:
        self._streams, self._inbox = streams, inbox

    def __call__(self, param: Tensor) -> None:
        """Note the arrival of the gradient of ``param``."""
        self._streams.note(param)
        self._inbox.append(param)
