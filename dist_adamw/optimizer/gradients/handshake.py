"""Before buckets are sent: ranks tell each other which update they make, and report on their gradients.

Knows process groups and numbers; nothing of modules or tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist

from dist_adamw.errors import AgreementError
from dist_adamw.optimizer.gradients.refusals import CHANGE, ROUND, SAVE, UPDATE, out_of_step
from dist_adamw.optimizer.transport.gloo import Rollcall
from dist_adamw.ranks import collectives

NOT_CHANGED, ACCEPTED, CHANGED = 0, 1, 2  # what has become of gradients between backward and the update


@dataclass(frozen=True, slots=True)
class UpdateReport:
    """The state of one rank's gradients before an update. Ranks take the largest of each number.

    Attributes:
        rounds: Of the gradients in the shard: how often all buckets were sent.
        is_missing: Whether some parameter has no gradient here.
        is_reopened: Whether averages have become sums again.
        change: NOT_CHANGED, ACCEPTED or CHANGED.
        has_changes: Whether the user has changed the optimizer's groups or state.
        prints: Digest of the gradients that may be the same on all ranks.
        options: Digest of the hyper-parameters.
        pattern: Digest of which parameters have a gradient.
        dropped: Digest of which gradients were set to None.
    """

    rounds: int
    is_missing: bool
    is_reopened: bool
    change: int
    has_changes: bool
    prints: int
    options: int
    pattern: int
    dropped: int

    def numbers(self) -> list[int]:
        """Return what is exchanged. Of a digest also its negative, whose largest is the smallest."""
        largest = [self.rounds, self.is_missing, self.is_reopened, self.change, self.has_changes]
        digests = (self.prints, self.options, self.pattern, self.dropped)
        return [*map(int, largest), *digests, *(-digest for digest in digests)]


@dataclass(frozen=True, slots=True)
class Agreed:
    """The combined report of all ranks before an update; see `UpdateReport`."""

    rounds: int
    is_missing: bool
    is_reopened: bool
    change: int
    has_changes: bool
    prints_differ: bool
    options_differ: bool
    patterns_differ: bool
    dropped_differ: bool

    @property
    def is_incomplete(self) -> bool:
        """Whether some rank may have a gradient that another one has not."""
        return self.is_missing or self.patterns_differ

    @classmethod
    def of(cls, numbers: Sequence[int]) -> Agreed:
        """Read the largest of each number of `UpdateReport.numbers`."""
        rounds, is_missing, is_reopened, change, has_changes = numbers[:5]
        highest, minus_lowest = numbers[5:9], numbers[9:13]
        differ = [high != -low for high, low in zip(highest, minus_lowest, strict=True)]
        return cls(rounds, bool(is_missing), bool(is_reopened), change, bool(has_changes), *differ)


class RankMessages:
    """Tell other ranks, over gloo, what this one is about to do, on the channel that buckets are sent on.

    Attributes:
        groups: The ranks that share state, and perhaps their replicas.
        tag: Of the messages: the same on all these ranks, and that of no other path. None before `open`.
        number: Updates made, and gradients discarded without one.
    """

    def __init__(self) -> None:
        self.groups: Sequence[dist.ProcessGroup] = ()
        self.tag: int | None = None
        self.number = 0
        self._params_digest = 0
        self._is_news = False
        self._is_announced = False
        self._rollcall: Rollcall | None = None

    def open(self, groups: Sequence[dist.ProcessGroup], tag: int) -> None:
        """Open the channel, where messages can be sent from the host (gloo). Local.

        Args:
            groups: The ranks that share state, and perhaps the replicas.
            tag: A new one, the same on all ranks of ``groups``.
        """
        self.groups, self.tag = groups, tag
        if dist.get_backend(groups[0]) == "gloo":
            self._rollcall = Rollcall(groups[0], tag, width=16)

    def close(self) -> None:
        """Send and receive nothing any more. Local."""
        self._rollcall = None

    @property
    def is_open(self) -> bool:
        """Whether ranks can exchange messages."""
        return self._rollcall is not None

    @property
    def is_news(self) -> bool:
        """Whether a change of parameters has not been sent to the other ranks yet, though it can be."""
        return self._is_news and self.is_open

    def params_changed(self, digest: int) -> None:
        """The optimizer has other parameters, of this digest. Local; ranks are told with the next message."""
        self._params_digest, self._is_news = digest, True

    def begin_round(self) -> None:
        """Let `announce_round` speak again. Local."""
        self._is_announced = False

    def announce_round(self) -> None:
        """Tell other ranks of this round, once. Nothing waits for what they say yet. Collective."""
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
            AgreementError: as of `check_answer`.
        """
        while self._rollcall is not None and self._rollcall.is_under_way:
            self._answer(self._rollcall)

    def meet_to_save(self) -> None:
        """Raise AgreementError where a rank does not save with this one. Collective."""
        self._meet(SAVE)

    def meet_for_change(self) -> None:
        """Raise AgreementError where another rank has other parameters. Collective."""
        self._meet(CHANGE)

    def exchange_reports(self, report: UpdateReport) -> list[int]:
        """Return the largest of each number over the ranks that share state. Collective.

        Raises:
            AgreementError: a rank does not make this update. On every rank.
        """
        assert self._rollcall is not None
        self._rollcall.post([UPDATE, self.number, self._params_digest, *report.numbers()])
        table = self._answer(self._rollcall)
        return [max(column) for column in zip(*table, strict=True)][3:]

    def _meet(self, kind: int) -> None:
        self.check_all_answers()
        if self._rollcall is not None:
            self._rollcall.post([kind, self.number, self._params_digest])
            self._answer(self._rollcall)

    def _answer(self, rollcall: Rollcall) -> list[list[int]]:
        """Return what every rank has said, which must be of the same kind and number."""
        table = rollcall.answer()
        self._is_news = False
        here = collectives.rank(rollcall.group)
        for there, (kind, number, digest, *_) in enumerate(table):
            if digest != table[here][2]:
                raise AgreementError(
                    f"rank {there} has other parameters in its groups than rank {here}, or has changed them at another "
                    "time. Add, replace and remove parameters on every rank, before the same update."
                )
            if [kind, number] != table[here][:2]:
                raise out_of_step(here, table[here], there, table[there])
        return table
