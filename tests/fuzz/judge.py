"""Count results, recognise errors of ours, and bound the time and memory of an input."""

from __future__ import annotations

import contextlib
import re
import resource
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

RIGHT, REFUSED = "right", "refused"
SECONDS = 10.0
MEMORY = 3 << 30  # bytes of addresses that one input may take beside what the process has
_OF_PYTHON = re.compile(r"^[A-Z]\w*(Error|Exception|Interrupt)\b")

_OF_TORCH = re.compile(r"Invalid [\w ]+: |Tensor lr must be")  # DistAdamW says it in torch's words


class Wrong(Exception):  # noqa: N818 - not an error of the code that is tested
    """An input ended in another way than it may."""


class Hang(BaseException):
    """An input took too long. No handler of the code that is tested takes it for an ordinary error."""


@dataclass
class Tally:
    """Counts of results for one kind of input."""

    kind: str
    ends: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    slowest: float = 0.0

    def judge(self, describe: Callable[[], str], action: Callable[[], str]) -> None:
        """Run ``action`` in bounds; it returns `RIGHT` or `REFUSED`, and whatever it raises is a failure."""
        begin = time.perf_counter()
        try:
            with bounds():
                end = action()
        except (Exception, Hang) as error:
            end = "failed"
            self.failures.append(f"{describe()}\n    {type(error).__name__}: {error}"[:2000])
        self.ends[end] += 1
        self.slowest = max(self.slowest, time.perf_counter() - begin)


@contextlib.contextmanager
def bounds(seconds: float = SECONDS, memory: int = MEMORY) -> Iterator[None]:
    """Raise where what is inside takes longer, or asks for more memory than that."""

    def ring(_: int, __: FrameType | None) -> None:
        raise Hang(f"no end after {seconds:g} s")

    limits = resource.getrlimit(resource.RLIMIT_AS)
    here = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = signal.signal(signal.SIGALRM, ring)
    resource.setrlimit(resource.RLIMIT_AS, (here + memory, limits[1]))
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.signal(signal.SIGALRM, before)


def check_sentence(error: BaseException, *names: str) -> str:
    """That the message is one printable line of bearable length, and has each of ``names``."""
    text = re.sub(r" \(rank \d+\)$", "", str(error))
    text.encode()  # no halves of characters, which cannot be printed
    for wrong, is_so in {
        "is no single line": "\n" in text or "\r" in text,
        f"has {len(text)} characters": not 15 < len(text) < 5000,
        "has no end": not text.rstrip().endswith((".", "?")) and _OF_TORCH.search(text) is None,
        "is Python's": _OF_PYTHON.match(text) is not None,
        f"does not name {names}": not all(name in text for name in names),
    }.items():
        if is_so:
            raise Wrong(f"the message {wrong}: {type(error).__name__}: {text[:500]!r}")
    return REFUSED
