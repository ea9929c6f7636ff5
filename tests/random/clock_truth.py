"""The truth about a random program: which rows reached an applied update, by what each rank wrote down.

Nothing here knows how the clock counts. A rank's log has, in order:

- ``("pass", number, rows, start, once, of)``: a loop over a training loader began, "first" or "second"; of an epoch
  of ``rows`` rows the first ``start`` are left out, or None: what is left of the epoch before; once: no id is drawn
  twice;
- ``("out", number, k, ids)``: it handed out its k-th batch; ``("end", number)``: it was exhausted;
- ``("backward", [(number, k), ...], bad)``: gradients of these batches were added up; bad: they are not finite;
- ``("zero",)``: gradients were dropped; ``("step",)``: the optimizer was asked for an update;
- ``("clock", samples)``: what the scheduler said.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

Log = list[tuple[Any, ...]]
Key = tuple[int, int]  # number of the pass, and of the batch in it


@dataclass(frozen=True)
class Difference:
    """Where a clock is not the rows of the applied updates before it."""

    job: int
    rank: int
    updates: int
    clock: int
    truth: int

    def __str__(self) -> str:
        return (
            f"job {self.job}, rank {self.rank}, after {self.updates} updates: the clock says {self.clock}, and "
            f"{self.truth} rows reached an applied update"
        )


@dataclass
class _Rank:
    """One rank's gradients: of which batches they are."""

    updates: list[tuple[list[Key], bool]] = field(default_factory=list)  # batches of each, and whether one was bad
    clocks: list[tuple[int, int]] = field(default_factory=list)  # after so many updates, the clock
    pending: list[Key] = field(default_factory=list)  # batches whose gradients no update has had
    in_hand: Key | None = None  # the last batch, if it has no gradients yet

    def replay(self, log: Log) -> None:
        bad = False
        for event, *facts in log:
            if event == "out":
                self.in_hand = (facts[0], facts[1])
            elif event == "backward":
                self.pending += map(tuple, facts[0])
                self.in_hand = None if self.in_hand in self.pending else self.in_hand
                bad |= facts[1]
            elif event == "zero":
                self.pending, bad = [], False
            elif event == "step":
                self.updates.append((self.pending, bad))
                self.pending = []
            elif event == "clock":
                self.clocks.append((len(self.updates), facts[0]))


@dataclass
class Truth:
    """What the jobs of a program, one after another, have trained on.

    Args:
        skips: Whether the optimizer leaves an update with bad gradients out.
    """

    skips: bool
    samples: int = 0
    done: int = 0  # real rows of the last epoch that were handed out
    over: bool = True
    jobs: int = 0

    def judge(self, logs: list[Log]) -> list[Difference]:
        """All wrong numbers of one job, with a log of each rank."""
        ranks = [_Rank() for _ in logs]
        for rank, log in zip(ranks, logs, strict=True):
            rank.replay(log)
        if len({len(rank.updates) for rank in ranks}) > 1:
            raise AssertionError("the ranks made different numbers of updates: this is no legal program")
        real = self._real_rows(logs)
        truth = [self.samples]
        counted: set[tuple[int, int, int]] = set()
        for parts in zip(*(rank.updates for rank in ranks), strict=True):
            new = {(*key, r) for r, (keys, _) in enumerate(parts) for key in keys} - counted
            if self.skips and any(bad for _, bad in parts):
                new = set()  # what is tried again, and applied then, counts then
            counted |= new
            truth.append(truth[-1] + sum(real[batch] for batch in new))
        # What no update has had when a job ends comes again in the next one.
        for r, rank in enumerate(ranks):
            for key in {(*key, r) for key in (*rank.pending, *([rank.in_hand] if rank.in_hand else []))} - counted:
                self.done -= real[key] if key[0] == self._last else 0
        self.samples = truth[-1]
        self.jobs += 1
        return [
            Difference(self.jobs, r, updates, clock, truth[updates])
            for r, rank in enumerate(ranks)
            for updates, clock in rank.clocks
            if clock != truth[updates]
        ]

    def _real_rows(self, logs: list[Log]) -> dict[tuple[int, int, int], int]:
        """Real rows of each batch that each rank (last of the key) was handed out: the first ones of the epoch.

        Ranks take turns, so the rows of an epoch come in the order of batch, rank and place. What comes after as many
        as the sampler draws has been repeated.
        """
        handed_out: dict[int, dict[tuple[int, int], list[int]]] = defaultdict(dict)
        for rank, log in enumerate(logs):
            for event, *facts in log:
                if event == "out":
                    handed_out[facts[0]][facts[1], rank] = facts[2]
        real: dict[tuple[int, int, int], int] = {}
        self._last = -1  # of the first loader, whose place in an epoch is kept
        for event, *facts in logs[0]:
            if event == "pass":
                number, rows, start, once, of = facts
                if start is None:
                    start = 0 if self.over or self.done >= rows else self.done
                left, seen = rows - start, list[int]()
                for (k, rank), ids in sorted(handed_out[number].items()):
                    real[number, k, rank] = n = min(len(ids), left)
                    seen += ids[:n]
                    left -= n
                if once and len(set(seen)) < len(seen):
                    raise AssertionError(f"rows that were drawn once are taken for real ones twice: {sorted(seen)}")
                if of == "first":
                    self._last, self.done, self.over = number, start + len(seen), False
            elif event == "end" and facts[0] == self._last:
                self.over = True
        return real
