"""The truth about a random program: which rows reached an applied update, by what each rank wrote down.

Nothing here knows how the clock counts, or where the place in the data is kept. A rank's log has, in order:

- ``("pass", number, facts)``: a loop over a training loader began;
- ``("out", number, k, ids, last)``: it handed out its k-th batch, and says whether the epoch ends with it;
- ``("end", number)``: it was exhausted; ``("refused",)``: it did not begin, with a sentence about the place;
- ``("backward", [(number, k), ...], bad)``: gradients of these batches were added up; bad: they are not finite;
- ``("zero",)``: gradients were dropped; ``("step",)``: the optimizer was asked for an update;
- ``("top",)``: the job was saved before its newest batch was trained on;
- ``("clock", samples)``: what the scheduler said.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any, NamedTuple

Log = list[tuple[Any, ...]]
Key = tuple[int, int]  # number of the pass, and of the batch in it


class Facts(NamedTuple):
    """A script's knowledge of a loop.

    Attributes:
        rows: Rows of the whole epoch.
        repeats: Whether Accelerate fills the last batches with rows that it repeats.
        start: The number of rows skipped at the beginning; None: those that were trained on before.
        once: No row is drawn twice in an epoch.
        of: The loader: "first" or "second".
        whole: Rows of a batch over all ranks, if only whole batches can be skipped; 0: any number of rows can be.
        part: Rows of a batch, if batches are not padded and the remaining ones must divide evenly; 0: they are padded.
    """

    rows: int
    repeats: bool
    start: int | None
    once: bool
    of: str
    whole: int
    part: int


@dataclass(frozen=True)
class Difference:
    """Find where a clock differs from the rows of the applied updates before it."""

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


@dataclass(eq=False)
class _Epoch:
    """One time through the first loader, by one loop or several."""

    ids: list[int | None] = field(default_factory=list)  # real rows in their order; None: left out by the script
    is_over: bool = False


Place = tuple[_Epoch, int]  # an epoch, and so many rows in it


@dataclass
class _Rank:
    """One rank's gradients: of which batches they are."""

    updates: list[tuple[list[Key], bool]] = field(default_factory=list)  # batches of each, and whether one was bad
    clocks: list[tuple[int, int]] = field(default_factory=list)  # after so many updates, the clock
    pending: list[Key] = field(default_factory=list)  # batches whose gradients no update has had
    newest: dict[int, Key] = field(default_factory=dict)  # of each pass, the batch that was handed out last
    exhausted: set[int] = field(default_factory=set)  # passes
    is_top: bool = False

    def replay(self, log: Log) -> None:
        bad = False
        for event, *facts in log:
            if event == "out":
                self.newest[facts[0]] = (facts[0], facts[1])
            elif event == "end":
                self.exhausted.add(facts[0])
            elif event == "backward":
                self.pending += map(tuple, facts[0])
                bad |= facts[1]
            elif event == "zero":
                self.pending, bad = [], False
            elif event == "step":
                self.updates.append((self.pending, bad))
                self.pending = []
            elif event == "clock":
                self.clocks.append((len(self.updates), facts[0]))
            elif event == "top":
                self.is_top = True


@dataclass
class Truth:
    """The data that the jobs of a program have trained on, in order.

    Args:
        skips: Whether the optimizer skips an update with bad gradients.
    """

    skips: bool
    samples: int = 0
    jobs: int = 0
    epoch: _Epoch = field(default_factory=lambda: _Epoch(is_over=True))  # the last one of the first loader
    places: list[Place] = field(default_factory=list)  # where the next job may go on

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
        self._find_places(ranks, counted)
        self.samples = truth[-1]
        self.jobs += 1
        return [
            Difference(self.jobs, r, updates, clock, truth[updates])
            for r, rank in enumerate(ranks)
            for updates, clock in rank.clocks
            if clock != truth[updates]
        ]

    def _find_places(self, ranks: list[_Rank], counted: set[tuple[int, int, int]]) -> None:
        """Find rows without an update at the end of a job that do not come again in the next one.

        A batch that has no gradients, or whose gradients were dropped, may come again if it is the newest, until the
        loader is exhausted and the function with the loop has returned.
        """
        tried = {key for rank in ranks for keys, _ in rank.updates for key in keys}
        pending = {key for r, rank in enumerate(ranks) for key in rank.pending if (*key, r) not in counted}
        newest = {r.newest[self._last] for r in ranks if self._last in r.newest and self._last not in r.exhausted}
        newest -= tried
        if any(rank.is_top for rank in ranks):
            pending |= newest
        self.places = []
        for keys in (pending, pending | newest):
            begins = [self._of_batch[key] for key in sorted(keys) if key in self._of_batch]
            self.places.append(begins[0] if begins else (self.epoch, len(self.epoch.ids)))

    def _go_on(self, drawn: list[int], facts: Facts) -> Place:
        """Find where a loop over the rest of an epoch began, by the rows that it drew."""
        places, self.places = self.places, []
        places = places or [(self.epoch, len(self.epoch.ids))]
        for epoch, begin in reversed(places):  # a batch that nobody trained on comes again, or does not
            before, after = epoch.ids[:begin], epoch.ids[begin:]
            if not after and epoch.is_over:
                return _Epoch(), 0
            rest = drawn[: facts.rows - begin]
            if not (drawn and facts.once) or (rest[: len(after)] == after[: len(rest)] and not {*rest} & {*before}):
                return _Epoch(before), begin
        raise AssertionError(f"the loop goes on with rows {drawn[:8]} of {places}")

    def _real_rows(self, logs: list[Log]) -> dict[tuple[int, int, int], int]:
        """Real rows of each batch that each rank (last of the key) was handed out: the first ones of the epoch.

        Ranks take turns, so the rows of an epoch come in the order of batch, rank and place. What comes after as many
        as the sampler draws has been repeated.
        """
        handed_out: dict[int, dict[tuple[int, int], list[int]]] = defaultdict(dict)
        ends: set[int] = set()
        for rank, log in enumerate(logs):
            for event, *facts in log:
                if event == "out":
                    handed_out[facts[0]][facts[1], rank] = facts[2]
                if event == "end" or (event == "out" and facts[3]):
                    ends.add(facts[0])
        real: dict[tuple[int, int, int], int] = {}
        self._of_batch: dict[Key, Place] = {}  # where each batch of the first loader begins
        self._last = -1
        for event, *facts in logs[0]:
            if event == "pass":
                number, of_pass = facts
                self._pass(number, of_pass, handed_out[number], number in ends, real)
            elif event == "refused":
                self._refused(len(logs))
        return real

    def _pass(
        self,
        number: int,
        facts: Facts,
        batches: dict[tuple[int, int], list[int]],
        ends: bool,
        real: dict[tuple[int, int, int], int],
    ) -> None:
        """Take one loop in."""
        if facts.start is None:
            epoch, start = self._go_on([i for _, ids in sorted(batches.items()) for i in ids], facts)
        else:
            epoch, start = _Epoch([None] * facts.start), facts.start
        left = facts.rows - start
        for (k, rank), ids in sorted(batches.items()):
            if facts.of == "first" and rank == 0:
                self._of_batch[number, k] = epoch, len(epoch.ids)
            real[number, k, rank] = n = min(len(ids), left) if facts.repeats else len(ids)
            epoch.ids += ids[:n]
            left -= n
        seen = [i for i in epoch.ids if i is not None]
        if facts.once and len(set(seen)) < len(seen):
            raise AssertionError(f"rows that were drawn once are taken for real ones twice: {sorted(seen)}")
        if facts.of == "first":
            epoch.is_over = ends
            self.epoch, self._last = epoch, number
            self._facts, self._start = facts, start

    def _refused(self, ranks: int) -> None:
        rows, whole, part = self._facts.rows - self._start, self._facts.whole, self._facts.part
        if not ((whole and self._start % whole) or (part and -(-rows // part) % ranks)):
            raise AssertionError(f"a place was refused that lies {self._start} rows into the epoch: {self._facts}")
