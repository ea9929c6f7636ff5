"""Compare hyper-parameters and the user's changes to groups and state over ranks, while the update computes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from dist_adamw.optimizer.sharding.user_changes import Changes
from dist_adamw.ranks import agreement


class RankComparison:
    """Asks the other ranks one question at a time. Read the answer before anything is changed or sent."""

    def __init__(self) -> None:
        self._question: _Question | None = None
        self._without_gradient: list[int] | None = None

    def ask(
        self,
        changed: bool,
        options: int,
        groups: Sequence[dist.ProcessGroup],
        *,
        without_gradient: list[int] | None,
    ) -> None:
        """Ask whether some rank has changes, or other hyper-parameters. Collective; waits for no answer.

        Args:
            changed: Whether there are changes on this rank.
            options: Digest of its hyper-parameters.
            groups: The process groups to ask, one after the other.
            without_gradient: Indices of the parameters without a gradient, if they must be the same on all ranks.
        """
        self._without_gradient = without_gradient
        if without_gradient:  # part of the digest, so that the comparison needs no further number
            options = agreement.fingerprint({"": [options, *without_gradient]})
        self._question = _Question(changed, options, groups)

    def is_answered_yes(self) -> bool:
        """Return whether some rank has changes or other hyper-parameters; False if nothing was asked. Collective."""
        question, self._question = self._question, None
        return question is not None and question.wait()

    def close(self) -> None:
        """Forget what was asked. Local."""
        self._without_gradient = None

    def compare(
        self, find_changes: Callable[[], Changes], options: Mapping[str, Any], groups: Sequence[dist.ProcessGroup]
    ) -> Changes:
        """Return this rank's changes if all ranks have made the same ones. Collective.

        Args:
            find_changes: Returns this rank's changes; may raise, perhaps only on this rank.
            options: Hyper-parameters by name.

        Raises:
            AgreementError: names the rank that differs and the field. On every rank.
        """
        record = dict(options)
        if self._without_gradient is not None:
            record["parameters without a gradient"] = ", ".join(map(str, self._without_gradient)) or "none"
        try:
            changes = find_changes()
        except (ValueError, RuntimeError) as error:
            # The others must learn of it, or they would wait. The error is not kept beyond this block: its traceback
            # would keep the optimizer alive until the next garbage collection.
            _check_alike({**record, _WHAT: str(error)}, groups)
            raise
        record[_WHAT] = "; ".join(changes.described) or "nothing"
        record["fingerprint of all parameters"] = agreement.fingerprint({"": changes.arrangement})
        _check_alike(record, groups)
        return changes


_WHAT = "what was changed in optimizer.param_groups and state"


def _check_alike(record: Mapping[str, Any], groups: Sequence[dist.ProcessGroup]) -> None:
    for group in groups:
        agreement.check_agreement(record, group)


class _Question:
    """A reduction to the maximum over ranks, in progress. Collective to build."""

    def __init__(self, changed: bool, options: int, groups: Sequence[dist.ProcessGroup]) -> None:
        self._value = torch.tensor([changed, options, -options], dtype=torch.int64)
        self._rest = groups[1:]
        self._work = dist.all_reduce(self._value, op=dist.ReduceOp.MAX, group=groups[0], async_op=True)

    def wait(self) -> bool:
        """Wait for the answer and return it. Collective if there are two groups."""
        assert self._work is not None
        self._work.wait()
        for group in self._rest:
            dist.all_reduce(self._value, op=dist.ReduceOp.MAX, group=group)
        changed, highest, minus_lowest = self._value.tolist()
        return bool(changed or highest != -minus_lowest)
