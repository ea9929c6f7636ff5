"""Record and draw the timeline of one update.

All ranks share one clock, since `time.perf_counter` is the machine's monotonic one: timelines of
ranks on one machine can be put below each other.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dist_adamw.optimizer import update_bucket
from dist_adamw.optimizer.gradients import gradients_for_update
from dist_adamw.optimizer.transport.shared_memory import SharedMemoryTransport

COLOURS = {
    "forward": "#d8dee2",
    "backward": "#8fa6b2",
    "averaging": "#c2571a",
    "AdamW": "#0b6e99",
    "gradients under way": "#e8a33d",
    "parameters under way": "#7fb77e",
}
TRAVELS = {"gradients under way": 1, "parameters under way": 2}  # the other spans are in lane 0


class Span(NamedTuple):
    """An activity from ``start`` to ``stop``, in seconds of `time.perf_counter`."""

    name: str
    start: float
    stop: float
    bucket: int = -1


class NotBefore:
    """A work of a bucket that is done only at a given time."""

    def __init__(self, when: float) -> None:
        self._when = when

    def wait(self) -> bool:
        """Sleep until that time."""
        if (left := self._when - time.perf_counter()) > 0:
            time.sleep(left)
        return True


class Recorder:
    """A recorder that wraps parts of dist_adamw, for the life of the process.

    Args:
        delay: Seconds that every bucket is made to travel at least: a SIMULATED slow link. It costs
            no processor time, and buckets do not queue for it.
    """

    def __init__(self, delay: float) -> None:
        self.spans: list[Span] = []
        self._delay = delay
        kind = SharedMemoryTransport
        self._travel(kind, "gradients under way", "start_reduce", "finish_reduce")
        self._travel(kind, "parameters under way", "start_gather", "finish_gather")
        self._part(kind, "averaging", "_average")
        self._part(update_bucket, "AdamW", "adamw_update_")
        self._part(gradients_for_update.GradientsForUpdate, "arrive", "arrive")

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Record the block as a span, for the profiler too."""
        start = time.perf_counter()
        with torch.profiler.record_function(name):
            yield
        self.spans.append(Span(name, start, time.perf_counter()))

    def _part(self, owner: Any, name: str, attribute: str) -> None:
        function = getattr(owner, attribute)

        @functools.wraps(function)
        def recorded(*args: Any, **kwargs: Any) -> Any:
            with self.span(name):
                return function(*args, **kwargs)

        setattr(owner, attribute, recorded)

    def _travel(self, owner: Any, name: str, start_name: str, finish_name: str) -> None:
        """Record a bucket from the call that sends it to the end of the wait for it."""
        start: Callable[..., Any] = getattr(owner, start_name)
        finish: Callable[..., Any] = getattr(owner, finish_name)
        began: dict[int, float] = {}

        @functools.wraps(start)
        def recorded_start(*args: Any, **kwargs: Any) -> Any:
            now = time.perf_counter()
            with torch.profiler.record_function(start_name):
                sent = start(*args, **kwargs)
            if self._delay:
                sent.works.append(NotBefore(now + self._delay))
            began[id(sent)] = now
            return sent

        @functools.wraps(finish)
        def recorded_finish(own: Any, sent: Any, *args: Any, **kwargs: Any) -> Any:
            with torch.profiler.record_function(finish_name):
                for work in sent.works:
                    work.wait()
                self.spans.append(Span(name, began.pop(id(sent)), time.perf_counter(), sent.bucket))
                sent.works = []
                return finish(own, sent, *args, **kwargs)

        setattr(owner, start_name, recorded_start)
        setattr(owner, finish_name, recorded_finish)


def add_to_trace(path: Path, spans: Sequence[Span], *, anchor: str) -> None:
    """Add buckets in flight to a Chrome trace of torch's profiler, which shows only running code.

    Args:
        anchor: Name of a span that is in both: it says how the two clocks lie.
    """
    trace = json.loads(path.read_text())
    events = trace["traceEvents"]
    known = next(event for event in events if event.get("name") == anchor and event.get("ph") == "X")
    mine = next(span for span in spans if span.name == anchor)
    for span in spans:
        if span.name in TRAVELS:
            events.append(
                {
                    "ph": "X",
                    "name": f"bucket {span.bucket}",
                    "cat": "transfer",
                    "pid": known["pid"],
                    "tid": f"{span.name}, {span.bucket % 2}",  # two travel at a time
                    "ts": known["ts"] + (span.start - mine.start) * 1e6,
                    "dur": (span.stop - span.start) * 1e6,
                }
            )
    path.write_text(json.dumps(trace))


def draw(panels: dict[str, list[list[Span]]], path: Path, title: str) -> None:
    """Draw one panel per way, each with one update on every rank, on a common scale.

    Args:
        panels: Title of a panel to the spans of each rank.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    world_size = len(next(iter(panels.values())))
    figure, axes = pyplot.subplots(
        len(panels), 1, figsize=(13, 1 + 1.5 * world_size * len(panels)), layout="constrained", sharex=True
    )
    for axis, (name, by_rank) in zip(axes, panels.items(), strict=True):
        origin = min(span.start for spans in by_rank for span in spans if span.name == "forward")
        ticks = {}
        for rank, spans in enumerate(by_rank):
            for lane, what in enumerate(("computing", "gradients", "parameters")):
                ticks[4 * rank + lane] = f"rank {rank}: {what}" if lane == 0 else what
            for span in sorted(spans, key=lambda span: span.start - span.stop):  # short ones on top
                if span.name in COLOURS:
                    _bar(axis, span, origin, 4 * rank)
        axis.set_yticks(list(ticks), list(ticks.values()), fontsize=8)
        axis.set_title(name, fontsize=10, loc="left")
        axis.invert_yaxis()
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel("ms since the update began")
    handles = [Patch(color=colour, label=label) for label, colour in COLOURS.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=110)


def _bar(axis: Any, span: Span, origin: float, first_lane: int) -> None:
    lane, height = TRAVELS.get(span.name, 0), 0.8
    y = first_lane + lane - height / 2
    if lane:  # two travel at a time: one above the other
        height /= 2
        y += height * (span.bucket % 2)
    start, length = (span.start - origin) * 1e3, (span.stop - span.start) * 1e3
    axis.broken_barh(
        [(start, length)], (y, height), color=COLOURS[span.name], edgecolor="white", linewidth=0.4 if lane else 0
    )
