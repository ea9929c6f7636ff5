"""All shards of an optimizer, kept in step with ``param_groups`` and ``state``.

In torch these two are the optimizer. Shards keep the state elsewhere and show it there, so they compare what they have
shown with what is there now, and move state accordingly.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dist_adamw.optimizer.sharding.moved_state import carry_state
from dist_adamw.optimizer.sharding.schemes import ShardingRanks
from dist_adamw.optimizer.sharding.shard import MOMENTS, Shard, peek
from dist_adamw.optimizer.sharding.user_changes import (
    Changes,
    arrange,
    check_new_state,
    check_once,
    find_changes,
)
from dist_adamw.optimizer.sharding.values import load, put, reset
from dist_adamw.optimizer.sharding.watched_state import AccessRecord, Shown, Snapshot, WatchedEntry

Groups = list[dict[str, Any]]
StateOf = dict[Tensor, dict[str, Any]]


@dataclass(slots=True)
class Wanted:
    """The optimizer as the user has it now: what the shards have to stand for.

    Attributes:
        groups: ``optimizer.param_groups``.
        state: ``optimizer.state``.
        ranks: That divide the state.
        bucket_numel: See `DistAdamW`, as for the two dtypes.
        reduces_every_backward: Gradients are kept in the shards, see `Shard`.
        tag: Of the optimizer's messages.
    """

    groups: Groups
    state: StateOf
    ranks: ShardingRanks
    bucket_numel: int | None
    reduces_every_backward: bool
    tag: int
    master_dtype: torch.dtype | None
    state_dtype: torch.dtype | None

    def make_shard(self, group: dict[str, Any], params: list[Tensor]) -> Shard:
        """A shard of ``params``, with zeros for state. Local."""
        return Shard(
            params,
            group=group,
            process_group=self.ranks.process_group,
            replicas=self.ranks.replica_group,
            max_bucket_numel=self.bucket_numel,
            lean=self.reduces_every_backward,
            tag=self.tag,
            master_dtype=self.master_dtype,
            state_dtype=self.state_dtype,
        )

    def is_shard_of(self, shard: Shard, group: dict[str, Any], params: list[Tensor]) -> bool:
        """Return whether ``shard`` is what `make_shard` would return, but for its state. Local."""
        return (
            shard.process_group is self.ranks.process_group
            and len(shard.params) == len(params)
            and all(map(operator.is_, shard.params, params))
            and shard.has_maxima == group["amsgrad"]
            and (not shard.has_moved() or shard.fits())
        )


class AllShards:
    """The shards of an optimizer.

    Attributes:
        shards: Of the parameters in the groups, in the order of the groups.
        aside: Of one parameter each that is in no group, but still in ``state``: as in torch it may come back.
        seen: ``param_groups`` and ``state`` when the shards last agreed with them; None before, and when unknown.

    Args:
        accesses: Where `WatchedState` and `WatchedEntry` record what the user does.
    """

    def __init__(self, accesses: AccessRecord) -> None:
        self.shards: list[Shard] = []
        self.aside: list[Shard] = []
        self.seen: Snapshot | None = None
        self._accesses = accesses
        self._placed: set[int] = set()  # ids of parameters in `shards`: hashing a tensor costs ten times as much
        self._shown: dict[int, Shown] = {}  # by id of parameter, what its entry in ``state`` was given
        self._moved: list[Shard] = []  # shards whose parameters have other memory, as far as `differs` has looked

    @property
    def is_laid_out(self) -> bool:
        """Whether there is state: also of parameters that are all in no group now."""
        return bool(self.shards or self.aside)

    # ---------------------------------------------------------------- see what the user did

    def differs(self, wanted: Wanted) -> bool:
        """Return whether groups, state, ranks or memory are not what the shards stand for. Local."""
        if not self.is_laid_out:
            return False
        self._moved = self.shards
        if self.seen is None or self.seen.differs(wanted.groups, wanted.state):
            return True
        self._moved = [shard for shard in self.shards if shard.has_moved()]
        group = wanted.ranks.process_group
        if any(shard.process_group is not group for shard in self.shards):
            return True
        return not all(shard.fits() for shard in self._moved)

    def find_changes(self, wanted: Wanted, *, are_local: bool) -> Changes:
        """Compare groups and state with what the shards have shown. Local; see `user_changes.find_changes`."""
        return find_changes(
            wanted.groups,
            wanted.state,
            [*self.shards, *self.aside],
            self._shown,
            are_local=are_local,
            may_wait=wanted.ranks.process_group is None,
        )

    def has_first_gradients(self) -> bool:
        """Return whether a parameter without state has a gradient now. Local."""
        assert self.seen is not None
        return any(param.grad is not None for param in self.seen.waiting)

    def is_rearranged(self, changes: Changes, wanted: Wanted) -> bool:
        """Return whether other parameters than now should share a shard. Local."""
        arranged = arrange(wanted.groups, changes.kept.keys())
        if len(arranged) != len(self.shards):
            return True
        return not all(wanted.is_shard_of(shard, *of) for shard, of in zip(self.shards, arranged, strict=True))

    def check_process_group(self, group: dist.ProcessGroup | None) -> None:
        """Refuse another process group than the state is divided over. Local.

        Raises:
            RuntimeError: says how to go on.
        """
        before = (*self.shards, *self.aside)[0].process_group
        if group is not before and before is not None:
            raise RuntimeError(
                "the process group is not the one that the optimizer's state is shared over. Save with "
                "accelerator.save_state, and load in a job that begins with the new group."
            )

    @property
    def has_amsgrad_changed(self) -> bool:
        """Whether a change left state without maxima, or maxima without a use. Local."""
        return any(shard.group["amsgrad"] != shard.has_maxima for shard in self.shards)

    # ---------------------------------------------------------------- follow it

    def take_from_state(self, changes: Changes, wanted: Wanted) -> None:
        """Let shards have what the user put into ``state``, or took out of it. Local."""
        written = {id(shard): shard for shard, _ in (*changes.reset, *(home for home, _ in changes.given))}
        for shard in written.values():
            shard.renew()
        for shard, i in changes.reset:
            reset(shard, i)
        for (shard, i), given in changes.given:
            put(shard, i, given)
        # Without a snapshot, state is on another device since.
        for shard in written.values() if self.seen is not None else self.shards:
            for i, param in enumerate(shard.params):
                # The others have left, and their entry with them.
                if id(param) in changes.kept or peek(wanted.state, param):
                    self._show_one(shard, i, wanted.state)

    def drop_zeros(self, changes: Changes, wanted: Wanted) -> None:
        """Take out of ``state`` what torch would not have: zeros of parameters that left before an update.

        Collective where state is divided and such a parameter has left.
        """
        given = {(id(shard), i) for (shard, i), _ in changes.given}
        left = [(shard, i) for shard, i in changes.removed if (id(shard), i) not in given and not shard.steps[i]]
        if not left:
            return
        entries = [peek(wanted.state, shard.params[i]) or {} for shard, i in left]
        # A user may have set ``step`` alone to zero. Ranks must decide alike: one rank's moments may all be zero.
        stays = torch.tensor(
            [any(bool(entry[key].any()) for key in MOMENTS if key in entry) for entry in entries], dtype=torch.int32
        )
        groups = wanted.ranks.comparing()
        if wanted.ranks.process_group is not None and not groups:  # ranks that cannot ask each other all drop it
            stays.zero_()
        for group in groups:
            dist.all_reduce(stays, op=dist.ReduceOp.MAX, group=group)
        for (shard, i), entry, it_stays in zip(left, entries, stays.tolist(), strict=True):
            shown = self._shown[id(shard.params[i])].values
            if entry and not it_stays and all(shown.get(key) is value for key, value in entry.items()):
                del wanted.state[shard.params[i]]

    def keep(self, params: Collection[int]) -> None:
        """Only the parameters with these ids have a place from now on; `rearrange` follows. Local."""
        self._placed = set(params)

    def rearrange(self, changes: Changes, wanted: Wanted) -> None:
        """Have the shards that a job resumed here would have, with the state that there is. Collective.

        Gradients stay where they are: `GradientPath.arrive` sees that there are other shards.
        """
        before = {id(shard.params[0]): shard for shard in self.shards}
        shards, made = [], []
        for group, together in arrange(wanted.groups, self._placed):
            shard = before.get(id(together[0]))
            if shard is None or not wanted.is_shard_of(shard, group, together):
                shard = wanted.make_shard(group, together)
                made.append(shard)
            shard.group = group
            shards.append(shard)
        aside = [
            self._aside_shard(shard, i, wanted)
            for shard, i in changes.removed
            if peek(wanted.state, shard.params[i]) and shard.has_numel_of(i)
        ]
        replaced = [old for old in (*self.shards, *self.aside) if not any(old is kept for kept in (*shards, *aside))]
        carry_state(replaced, [*made, *aside])
        for shard, i in changes.removed:
            self._shown.pop(id(shard.params[i]), None)
        self.shards, self.aside = shards, aside
        for shard in (*made, *aside):
            self._show(shard, wanted.state)

    def _aside_shard(self, shard: Shard, i: int, wanted: Wanted) -> Shard:
        """A shard of a parameter that is in no group. It is neither updated nor sent. Local."""
        if any(shard is aside for aside in self.aside):
            return shard
        return wanted.make_shard(shard.group, [shard.params[i]])

    def refresh_moved(self, state: StateOf) -> bool:
        """Follow parameters that have moved, as far as `differs` has looked. Return whether any has. Local."""
        moved = [s for s in self._moved if s.has_moved() and any(s is shard for shard in self.shards)]
        self.refresh(moved, state)
        return bool(moved)

    def refresh(self, shards: Iterable[Shard], state: StateOf) -> None:
        """Follow parameters that have other memory. Local."""
        for shard in shards:
            shard.refresh()
            self._show(shard, state)

    def follow_device(self) -> None:
        """Follow parameters to another device, before backward. The next update looks closer. Local."""
        for shard in self.shards:
            if shard.has_left_device():
                shard.refresh()
                self.seen = None  # what is shown is of the old device

    # ---------------------------------------------------------------- new parameters

    def newcomers(self, wanted: Wanted, *, gradients: bool) -> list[Tensor]:
        """Return the parameters that need a place and have none: those that have state. Local.

        Args:
            gradients: Those that have a gradient, too; where state is divided, at the first update all that require
                one.

        Raises:
            ValueError: a parameter is in the groups twice, or the user put something into ``state`` that is no state of
                one of them.
        """
        everyone = gradients and not self.shards and wanted.ranks.process_group is not None
        found = []
        for group in wanted.groups:
            for param in group["params"]:
                if id(param) in self._placed:
                    continue
                is_trained = gradients and (param.grad is not None or (everyone and param.requires_grad))
                if is_trained or peek(wanted.state, param):
                    found.append(param)
        if found:
            check_once(wanted.groups)
            check_new_state(wanted.groups, wanted.state, self._placed)
        return found

    def unplaced(self, params: Iterable[Tensor]) -> set[int]:
        """Ids of those of ``params`` that have no place. Local."""
        return {id(param) for param in params} - self._placed

    def add(self, chosen: Collection[int], wanted: Wanted, *, are_shares: bool) -> None:
        """Make shards of the parameters with these ids, with what ``state`` has of them, else zeros. Local.

        Args:
            are_shares: What ``state`` has is this rank's share, not the whole.
        """
        made = [wanted.make_shard(group, together) for group, together in arrange(wanted.groups, chosen)]
        for shard in made:
            for i, param in enumerate(shard.params):
                load(shard, i, peek(wanted.state, param) or {}, is_share=are_shares)
            self._show(shard, wanted.state)
            self._placed.update(map(id, shard.params))
        self.shards = [*self.shards, *made]
        self.remember(wanted)

    # ---------------------------------------------------------------- show it

    def remember(self, wanted: Wanted) -> None:
        """The shards agree with groups and state. Local."""
        self.seen = Snapshot(wanted.groups, wanted.state, self._placed, self._shown.values(), self._accesses)

    def _show(self, shard: Shard, state: StateOf) -> None:
        """Let ``state`` show what ``shard`` holds."""
        for i in range(len(shard.params)):
            self._show_one(shard, i, state)

    def _show_one(self, shard: Shard, i: int, state: StateOf) -> None:
        param = shard.params[i]
        views = shard.state_of(i)
        entry = peek(state, param)
        if entry is None:
            entry = WatchedEntry.of(self._accesses, {})
            dict.__setitem__(state, param, entry)  # not as a user puts it there: see `AccessRecord`
        values = {key: _pointed_at(entry.get(key), view) for key, view in views.items()}
        entry.update(values)  # the user may have more in it
        self._shown[id(param)] = Shown.of(values)


def _pointed_at(tensor: Any, view: Tensor) -> Tensor:
    """Return ``tensor``, pointed at ``view``, where it can show it: the user may hold it and write to it later."""
    if type(tensor) is not Tensor or type(view) is not Tensor or tensor.requires_grad or tensor.is_inference():
        return view
    if (tensor.shape, tensor.dtype, tensor.device) != (view.shape, view.dtype, view.device):
        return view
    tensor.data = view
    return tensor
