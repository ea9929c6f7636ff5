"""Times of an update on several ranks: wall time, and processor time, which other programs lengthen less."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.ranks import gathered

Took = tuple[float, float]  # seconds that passed, and of processors, threads included


class Stopwatch:
    """Both times since it was made."""

    def __init__(self) -> None:
        self._began, self._cpu = time.perf_counter(), time.process_time()

    def read(self) -> Took:
        """Return the seconds since then. Local."""
        return time.perf_counter() - self._began, time.process_time() - self._cpu


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of an update by round.

    Attributes:
        wall: Those of the slowest rank.
        cpu: Processor time of all ranks together.
    """

    wall: list[float]
    cpu: list[float]

    def fields(self) -> dict[str, list[float]]:
        """Return the fields of a record."""
        return {"seconds": self.wall, "cpu_seconds": self.cpu}


def of_all_ranks(mine: Mapping[str, Sequence[Took]]) -> dict[str, Times]:
    """Return the times of all ranks, given this rank's by name and round. Collective."""
    by_rank = gathered(dict(mine))
    found = {}
    for name in mine:
        rounds = list(zip(*(one[name] for one in by_rank), strict=True))
        wall, cpu = [max(w for w, _ in one) for one in rounds], [sum(c for _, c in one) for one in rounds]
        found[name] = Times(wall, cpu)
    return found
