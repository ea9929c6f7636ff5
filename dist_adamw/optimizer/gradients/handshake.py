"""Messages between ranks before buckets are sent: which update each makes, and which gradients it has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from dist_adamw.errors import AgreementError
from dist_adamw.optimizer.gradients.refusals import CHANGE, KINDS, ROUND, SAVE, UPDATE, out_of_step
from dist_adamw.optimizer.transport import sends_from_host
from dist_adamw.optimizer.transport.rollcall import Channel, Rollcall
from dist_adamw.ranks import collectives
from dist_adamw.ranks.piggyback import MAX_NUMBERS, Piggyback

_HEADER, _REPORT = 3, 15  # numbers in a message: kind, update and digest of the parameters; `UpdateReport.numbers`


@dataclass(frozen=True, slots=True)
class UpdateReport:
    """The state of one rank's gradients before an update. Ranks take the largest of each number.

    Attributes:
        rounds: How often all buckets were sent, of gradients that are kept in the shard.
        micro_batches: In how many of these rounds this rank had a backward pass.
        is_missing: Whether some parameter has no gradient here.
        is_reopened: Whether averages have become sums again.
        change: NOT_CHANGED, ACCEPTED, or why the gradients are refused.
        has_changes: Whether the user has changed the optimizer's groups or state.
        prints: Digest of the gradients that may be the same on all ranks.
        options: Digest of the hyper-parameters.
        pattern: Digest of which parameters have a gradient.
        dropped: Digest of which gradients were set to None.
    """

    rounds: int
    micro_batches: int
    is_missing: bool
    is_reopened: bool
    change: int
    has_changes: bool
    prints: int
    options: int
    pattern: int
    dropped: int

    def numbers(self) -> list[int]:
        """Return the numbers to exchange."""
        # Digests are sent with their negatives, so that one maximum over ranks gives the largest and the smallest.
        largest = [self.rounds, self.is_missing, self.is_reopened, self.change, self.has_changes]
        digests = (self.micro_batches, self.prints, self.options, self.pattern, self.dropped)
        return [*map(int, largest), *digests, *(-digest for digest in digests)]


@dataclass(frozen=True, slots=True)
class Agreed:
    """The combined report of all ranks before an update; see `UpdateReport`."""

    rounds: int
    is_missing: bool
    is_reopened: bool
    change: int
    has_changes: bool
    micro_batches_differ: bool
    prints_differ: bool
    options_differ: bool
    patterns_differ: bool
    dropped_differ: bool

    @property
    def is_incomplete(self) -> bool:
        """Whether some rank may have a gradient that another one lacks."""
        return self.is_missing or self.patterns_differ

    @classmethod
    def of(cls, numbers: Sequence[int]) -> Agreed:
        """Read the largest of each number of `UpdateReport.numbers`."""
        rounds, is_missing, is_reopened, change, has_changes = numbers[:5]
        highest, minus_lowest = numbers[5:10], numbers[10:15]
        differ = [high != -low for high, low in zip(highest, minus_lowest, strict=True)]
        return cls(rounds, bool(is_missing), bool(is_reopened), change, bool(has_changes), *differ)


class RankMessages:
    """Tells other ranks, over gloo, what this one is about to do, on the channel of the buckets.

    Attributes:
        groups: The ranks that share state, and perhaps their replicas.
        tag: The tag of the messages: the same on all these ranks, and used by no other path. None before `open`.
        number: Updates made, plus gradients discarded without one.
    """

    def __init__(self) -> None:
        self.groups: Sequence[dist.ProcessGroup] = ()
        self.tag: int | None = None
        self.number = 0
        self._params_digest = 0
        self._is_news = False
        self._is_announced = False
        self._rollcall: Rollcall | None = None
        self._piggyback: Piggyback | None = None  # to take along in the next report
        self._carried: Piggyback | None = None  # taken along in the last one, and not checked yet

    def open(self, groups: Sequence[dist.ProcessGroup], channel: Channel, device: torch.device) -> None:
        """Open the channel if buckets are sent by messages from the host (gloo). Local.

        Args:
            groups: The ranks that share state, and perhaps the replicas.
            channel: A new one.
            device: That of the parameters.
        """
        self.groups, self.tag = groups, channel.tag
        if sends_from_host(groups[0], device):
            self._rollcall = Rollcall(groups[0], channel, width=_HEADER + _REPORT + 1 + MAX_NUMBERS)

    def check_groups(self) -> None:
        """Refuse to go on after a process group was destroyed. Local.

        Raises:
            RuntimeError: says what to do.
        """
        if not all(map(collectives.exists, self.groups)):
            raise RuntimeError(
                "the process group over which the optimizer's state is sharded was destroyed. Save before that, and "
                "load into an optimizer that is attached after the new group was made."
            )

    def close(self) -> None:
        """Stop sending and receiving. Local."""
        self._rollcall = self._piggyback = self._carried = None

    @property
    def is_open(self) -> bool:
        """Whether ranks can exchange messages."""
        return self._rollcall is not None

    @property
    def is_news(self) -> bool:
        """Whether a change of parameters is still to be sent to the other ranks."""
        # Without a channel it can never be sent, so nothing may wait for it.
        return self._is_news and self.is_open

    def params_changed(self, digest: int) -> None:
        """Note that the optimizer has other parameters, of this digest; the next message includes it. Local."""
        self._params_digest, self._is_news = digest, True

    def begin_round(self) -> None:
        """Let `announce_round` send again. Local."""
        self._is_announced = False

    def announce_round(self) -> None:
        """Announce this round to the other ranks, once, without waiting for their answers. Collective."""
        if self._rollcall is not None and not self._is_announced:
            self._is_announced = True
            self._rollcall.post([ROUND, self.number, self._params_digest])

    def check_answer(self) -> None:
        """Wait for the oldest outstanding answer, if there is one. Collective.

        Raises:
            AgreementError: a rank is doing something else. On every rank that waits for it.
        """
        if self._rollcall is not None and self._rollcall.is_under_way:
            self._answer(self._rollcall)

    def check_all_answers(self) -> None:
        """Wait for all outstanding answers. Collective.

        Raises:
            AgreementError: as for `check_answer`.
        """
        while self._rollcall is not None and self._rollcall.is_under_way:
            self._answer(self._rollcall)

    def meet_to_save(self) -> None:
        """Raise AgreementError if a rank does not save with this one. Collective."""
        self._meet(SAVE)

    def meet_for_change(self) -> None:
        """Raise AgreementError if another rank has other parameters. Collective."""
        self._meet(CHANGE)

    def exchange_reports(self, report: UpdateReport) -> list[int]:
        """Return the largest of each number over the ranks that share state. Collective.

        Raises:
            AgreementError: a rank does not make this update. On every rank.
        """
        assert self._rollcall is not None
        carried, self._piggyback = self._piggyback, None
        more = [0] if carried is None else [1, *carried.numbers]
        self._rollcall.post([UPDATE, self.number, self._params_digest, *report.numbers(), *more])
        table = self._answer(self._rollcall)
        end = _HEADER + _REPORT
        self._check_all_carry([bool(row[end]) for row in table])
        if carried is not None:
            carried.received([row[end + 1 : end + len(more)] for row in table])
            self._carried = carried
        return [*map(max, zip(*(row[_HEADER:end] for row in table), strict=True))]

    def carry(self, piggyback: Piggyback) -> None:
        """Take ``piggyback`` along in the next report: see `Exchange`. Local."""
        self._piggyback = piggyback

    def is_between(self, ranks: int) -> bool:
        """Return whether reports are exchanged by messages between ``ranks`` ranks, and no others. Local."""
        return self.is_open and len(self.groups) == 1 and collectives.world_size(self.groups[0]) == ranks

    def check_carried(self) -> None:
        """Raise what a piggyback that came with the last report shows. Collective."""
        carried, self._carried = self._carried, None
        if carried is not None:
            carried.check()

    def _check_all_carry(self, carries: Sequence[bool]) -> None:
        """Raise AgreementError on every rank if only some of them take numbers along, which `step` does."""
        if any(carries) and not all(carries):
            one, other = carries.index(True), carries.index(False)
            raise AgreementError(
                f"rank {one} calls step() for update {self.number + 1}, and rank {other} does not, or calls it in "
                "another way: with a closure, without dist_adamw.prepare, or after gather_gradients() or "
                "clip_grad_norm_(). Make the same calls on every rank."
            )

    def _meet(self, kind: int) -> None:
        self.check_all_answers()  # answers come in the order of the posts
        if self._rollcall is not None:
            self._rollcall.post([kind, self.number, self._params_digest])
            self._answer(self._rollcall)

    def _answer(self, rollcall: Rollcall) -> list[list[int]]:
        """Return every rank's numbers; raise if their kind, update or parameters differ from this rank's."""
        table = rollcall.answer()
        self._is_news = False
        here = collectives.rank(rollcall.group)
        for there, (kind, number, digest, *_) in enumerate(table):
            if kind in KINDS and digest != table[here][2]:
                raise AgreementError(
                    f"rank {there} has other parameters in its groups than rank {here}, or changed them before another "
                    "update. Add, replace and remove the same parameters on every rank, before the same update."
                )
            if [kind, number] != table[here][:2]:
                raise out_of_step(here, table[here], there, table[there])
        return table
