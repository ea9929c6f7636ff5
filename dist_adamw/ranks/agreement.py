"""Check that a record is the same on all ranks.

Ranks compare fingerprints; records are sent only if these differ.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dist_adamw.errors import AgreementError
from dist_adamw.ranks.collectives import broadcast_object, end_quietly, world_size
from dist_adamw.ranks.piggyback import Exchange
from dist_adamw.ranks.summing import KnownSums, Message, Passenger

Record = Mapping[str, Any]
_SHOWN = 200  # characters of a value in an error
_PIECE_BITS = 21  # of a digest; the squares of a million ranks' pieces add up to less than 2**63


@dataclass(frozen=True, slots=True)
class Digested:
    """A value of a record that is compared by its digest, and written out only to explain a difference.

    Attributes:
        digest: A text that is the same on all ranks exactly if the value is.
        value: Returns the value as it was when the record was made, as plain data.
    """

    digest: str
    value: Callable[[], Any]


def check_agreement(record: Record, group: dist.ProcessGroup | None = None) -> None:
    """Raise on every rank if ``record`` is not the same on all of them. Collective.

    Ranks exchange 16 bytes; if they differ, two ranks send their records.

    Args:
        record: Plain, JSON-like values by field name.

    Raises:
        AgreementError: names the first rank that differs from rank 0, the fields and both values.
    """
    if world_size(group) == 1:
        return
    digest = fingerprint(record)
    lowest = _lowest_and_highest(digest).to(_message_device(group))
    dist.all_reduce(lowest, op=dist.ReduceOp.MIN, group=group)
    if _differ(lowest):
        _raise_disagreement(record, digest, group)


def _lowest_and_highest(digest: int) -> Tensor:
    """Return a tensor whose minimum over the ranks is the lowest digest and minus the highest one."""
    # Reducing the negative as well gives the maximum without a second reduction.
    return torch.tensor([digest, -digest], dtype=torch.int64)


def _differ(lowest: Tensor) -> bool:
    low, minus_high = lowest.tolist()
    return bool(low != -minus_high)


def _message_device(group: dist.ProcessGroup | None) -> torch.device:
    """Return the device of tensors that ``group`` can send: the host, unless the backend serves only accelerators."""
    group = dist.group.WORLD if group is None else group
    assert group is not None
    try:
        group._get_backend(torch.device("cpu"))
    except RuntimeError:  # NCCL alone
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _raise_disagreement(record: Record, digest: int, group: dist.ProcessGroup | None) -> None:
    """Raise an error that names the first differing rank and its fields. Collective; all ranks know of a difference."""
    device = _message_device(group)
    digests = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(world_size(group))]
    dist.all_gather(digests, torch.tensor([digest], dtype=torch.int64, device=device), group=group)
    found = [int(one) for one in digests]
    odd = next(rank for rank, one in enumerate(found) if one != found[0])
    records = [broadcast_object(_written_out(record), rank_in_group, group) for rank_in_group in (0, odd)]
    names = range(len(found)) if group is None else dist.get_process_group_ranks(group)
    raise AgreementError(_describe(records[0], names[0], records[1], names[odd]))


def _written_out(record: Record) -> dict[str, Any]:
    return {name: value.value() if isinstance(value, Digested) else value for name, value in record.items()}


def fingerprint(record: Record) -> int:
    """Return a 62-bit digest of ``record``. Local."""
    # 62 bits, so that the digest and its negative both fit into an int64 of the reductions.
    return int.from_bytes(hashlib.blake2b(canonical(record).encode(), digest_size=8).digest(), "big") >> 2


def canonical(record: Record) -> str:
    """Return ``record`` as text that is equal for equal values; floats keep every bit. Local."""
    return _ENCODER.encode(record)


def _as_text(value: Any) -> str:
    return value.digest if isinstance(value, Digested) else repr(value)


_ENCODER = json.JSONEncoder(sort_keys=True, default=_as_text)


def _describe(ours: Record, first: int, theirs: Record, other: int) -> str:
    fields = []
    for name in sorted({*ours, *theirs}):
        found = _first_difference(name, ours.get(name), theirs.get(name))
        if found is not None:
            where, one, two = found
            fields.append(f"{where} is {_show(one)} on rank {first} and {_show(two)} on rank {other}")
    return (
        f"rank {other} disagrees with rank {first}: {'; '.join(fields)}. "
        "Build model, optimizer and scheduler alike on every rank, and pass the same values to step()."
    )


def _first_difference(name: str, ours: Any, theirs: Any) -> tuple[str, Any, Any] | None:
    """Return the name of what differs and both values; of long lists only the first item that differs."""
    if canonical({"": ours}) == canonical({"": theirs}):
        return None
    if isinstance(ours, list) and isinstance(theirs, list) and max(len(repr(ours)), len(repr(theirs))) > _SHOWN:
        for i, (one, two) in enumerate(zip(ours, theirs, strict=False)):
            if (found := _first_difference(f"{name}[{i}]", one, two)) is not None:
                return found
        return f"the length of {name}", len(ours), len(theirs)
    return name, ours, theirs


def _show(value: object) -> str:
    text = "missing" if value is None else repr(value)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."


class AgreementWatch:
    """Compares a record over the ranks at every update, one update behind.

    `check` posts this update's fingerprint and reads the result of the previous one, so the reduction overlaps with
    computation and every rank learns of a difference in the same call. Collective: every rank must call `check`
    equally often.

    Args:
        group: A group that can reduce CPU tensors (gloo).

    Attributes:
        passenger: Returns integers that the next message takes along, or None: the same on all ranks.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        end_quietly()
        self._group = group
        self._posted: tuple[Message, Record, int] | None = None
        self.passenger: Callable[[], Passenger | None] = lambda: None

    def check(self, record: Record) -> None:
        """Read the result for the last record, then post ``record``.

        Raises:
            AgreementError: the last record was not the same on all ranks.
        """
        self.settle()
        digest = fingerprint(record)
        numbers, passenger = _pieces_and_squares(digest), self.passenger()
        if passenger is None:
            message = Message(numbers, self._group)
        else:
            message = Message([*numbers, *passenger.numbers], self._group)
            passenger.board(message, len(numbers))
        self._posted = (message, dict(record), digest)

    def check_with(self, exchange: Exchange, record: Record, then: Callable[[], None]) -> None:
        """Read the result for the last record; have ``exchange`` take ``record`` along, so that no message is posted.

        That exchange raises AgreementError on every rank if the record is not the same on all.

        Args:
            exchange: An exchange between the ranks of this watch.
            then: Called once the record is known to be the same on all ranks.
        """
        self.settle()
        exchange.carry(_CarriedRecord(record, self.passenger(), self._group, then))

    def settle(self) -> None:
        """Wait for the last result. Call it before a save, or anything else that must not use a wrong state."""
        if self._posted is None:
            return
        message, record, digest = self._posted
        self._posted = None  # before waiting: after an error there is no answer left to wait for
        if not _are_equal(message.wait(), world_size(self._group)):
            _raise_disagreement(record, digest, self._group)


class _CarriedRecord:
    """A record's fingerprint and a passenger, which an exchange of other numbers takes along: see `Piggyback`."""

    def __init__(
        self, record: Record, passenger: Passenger | None, group: dist.ProcessGroup | None, then: Callable[[], None]
    ) -> None:
        self._record, self._passenger, self._group, self._then = dict(record), passenger, group, then
        self._digest = fingerprint(record)
        self.numbers: Sequence[int] = [self._digest, *(() if passenger is None else passenger.numbers)]
        self._is_same = False

    def received(self, of_ranks: Sequence[Sequence[int]]) -> None:
        """See `Piggyback`."""
        digests, *columns = zip(*of_ranks, strict=True)
        self._is_same = len(set(digests)) == 1
        if self._passenger is not None:
            self._passenger.board(KnownSums([sum(column) for column in columns]), 0)

    def check(self) -> None:
        """Raise AgreementError on every rank if their records differ; otherwise do what follows. Collective."""
        if not self._is_same:
            _raise_disagreement(self._record, self._digest, self._group)
        self._then()


def _pieces_and_squares(digest: int) -> list[int]:
    """Return numbers whose sums over the ranks tell whether all ranks have the same digest."""
    pieces = [digest >> bits & (1 << _PIECE_BITS) - 1 for bits in (0, _PIECE_BITS, 2 * _PIECE_BITS)]
    return [*pieces, *(piece * piece for piece in pieces)]


def _are_equal(sums: Sequence[int], ranks: int) -> bool:
    # By Cauchy and Schwarz, the square of a sum of n numbers is n times the sum of their squares only if all are equal.
    return all(total * total == ranks * squares for total, squares in zip(sums[:3], sums[3:6], strict=True))
