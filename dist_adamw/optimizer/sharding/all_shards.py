"""All shards of an optimizer, kept in step with ``param_groups`` and ``state``.

In torch these two are the optimizer, and users change them. Shards keep state in their own flat memory and put views of
it into ``state``. To follow the user, they compare ``state`` with these views, and move state accordingly.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dist_adamw.optimizer.sharding.bucket_views import MOMENTS
from dist_adamw.optimizer.sharding.moved_state import carry_state
from dist_adamw.optimizer.sharding.schemes import ShardingRanks
from dist_adamw.optimizer.sharding.shard import Shard, peek
from dist_adamw.optimizer.sharding.user_changes import (
    Arrangement,
    Changes,
    Home,
    arrange,
    check_new_state,
    check_once,
    find_changes,
)
from dist_adamw.optimizer.sharding.values import average_all, load, put, reset
from dist_adamw.optimizer.sharding.watched_state import AccessRecord, Shown, Snapshot, WatchedEntry
from dist_adamw.optimizer.transport.rollcall import Channel

Groups = list[dict[str, Any]]
StateOf = dict[Tensor, dict[str, Any]]


@dataclass(slots=True)
class Wanted:
    """The optimizer's present groups, state and options, which the shards must match.

    Attributes:
        groups: ``optimizer.param_groups``.
        state: ``optimizer.state``.
        ranks: The ranks that the state is sharded over.
        bucket_numel: See `DistAdamW`, also for the three dtypes and ``reproducible``.
        reduce_every_backward: Whether gradients are kept in the shards, see `Shard`.
        channel: The channel of the optimizer's messages.
        order: Returns the wanted place of parameters in the layout, by id; see `arrange`.
        by_group: Whether no two groups may share a shard.
        averages: The averages of the weights to keep, see `Shard`.
        are_shares: Whether ``state`` has shares of one shard, which may be of an earlier version's.
    """

    groups: Groups
    state: StateOf
    ranks: ShardingRanks
    bucket_numel: int | None
    reduce_every_backward: bool
    channel: Channel
    master_dtype: torch.dtype | None
    state_dtype: torch.dtype | None
    reduce_dtype: torch.dtype | None
    reproducible: bool
    order: Callable[[], Mapping[int, int]]
    by_group: bool
    averages: Mapping[str, torch.dtype | None]
    are_shares: bool = False

    def arrange(self, chosen: Collection[int]) -> list[Arrangement]:
        """Divide those parameters that have an id in ``chosen`` among shards. Local."""
        return arrange(self.groups, chosen, self.order(), by_group=self.by_group)

    def make_shard(self, arrangement: Arrangement) -> Shard:
        """Return a shard of the parameters, with zeros for moments, and averages that begin as the weights. Local."""
        shard = Shard(
            arrangement.params,
            groups=arrangement.groups,
            process_group=self.ranks.process_group,
            replicas=self.ranks.replica_group,
            max_bucket_numel=self.bucket_numel,
            reduce_every_backward=self.reduce_every_backward,
            channel=self.channel,
            master_dtype=self.master_dtype,
            state_dtype=self.state_dtype,
            reduce_dtype=self.reduce_dtype,
            reproducible=self.reproducible,
            averages=self.averages,
        )
        average_all(shard, dict.fromkeys(self.averages, 1.0))
        return shard

    def is_shard_of(self, shard: Shard, arrangement: Arrangement) -> bool:
        """Return whether ``shard`` is what `make_shard` would return, apart from its state. Local."""
        return (
            shard.process_group is self.ranks.process_group
            and len(shard.params) == len(arrangement.params)
            and all(map(operator.is_, shard.params, arrangement.params))
            and shard.has_maxima == arrangement.groups[0]["amsgrad"]
            and (not shard.has_moved() or shard.fits())
        )


class AllShards:
    """The shards of an optimizer.

    Attributes:
        shards: The shards of the parameters in the groups, in the order of the groups.
        aside: Shards of one parameter each that is in no group but still in ``state``; as in torch, it may come back.
        seen: ``param_groups`` and ``state`` when the shards last matched them; None if that is unknown.

    Args:
        accesses: Where `WatchedState` and `WatchedEntry` record what the user does.
    """

    def __init__(self, accesses: AccessRecord) -> None:
        self.shards: list[Shard] = []
        self.aside: list[Shard] = []
        self.seen: Snapshot | None = None
        self._accesses = accesses
        self._placed: set[int] = set()  # ids of parameters in `shards`: hashing a tensor costs ten times as much
        self._shown: dict[int, Shown] = {}  # by id of parameter, the values that its entry in ``state`` was given
        self._moved: list[Shard] = []  # shards whose parameters may have moved, according to the last `differs`

    @property
    def is_laid_out(self) -> bool:
        """Whether there is any state, including that of parameters that have left the groups."""
        return bool(self.shards or self.aside)

    # ---------------------------------------------------------------- detect changes

    def differs(self, wanted: Wanted) -> bool:
        """Return whether the shards no longer match groups, state, ranks or memory. Local."""
        if not self.is_laid_out:
            return False
        self._moved = self.shards  # unless a cheap comparison below shows that most have not moved
        if self.seen is None or self.seen.differs(wanted.groups, wanted.state):
            return True
        self._moved = [shard for shard in self.shards if shard.has_moved()]
        group = wanted.ranks.process_group
        if any(shard.process_group is not group for shard in self.shards):
            return True
        return not all(shard.fits() for shard in self._moved)

    def find_changes(self, wanted: Wanted, *, are_local: bool) -> Changes:
        """Compare groups and state with the views that the shards put there. Local; see `user_changes.find_changes`."""
        return find_changes(
            wanted.groups,
            wanted.state,
            [*self.shards, *self.aside],
            self._shown,
            are_local=are_local,
            may_wait=wanted.ranks.process_group is None,
        )

    def has_first_gradients(self) -> bool:
        """Return whether a parameter without state has a gradient. Local."""
        assert self.seen is not None
        return any(param.grad is not None for param in self.seen.waiting)

    def is_rearranged(self, changes: Changes, wanted: Wanted) -> bool:
        """Return whether the parameters should be divided among shards in another way than now. Local."""
        arranged = wanted.arrange(changes.kept.keys())
        if len(arranged) != len(self.shards):
            return True
        return not all(wanted.is_shard_of(shard, of) for shard, of in zip(self.shards, arranged, strict=True))

    def check_process_group(self, group: dist.ProcessGroup | None) -> None:
        """Refuse another process group than the one that the state is sharded over. Local.

        Raises:
            RuntimeError: says what to do instead.
        """
        before = (*self.shards, *self.aside)[0].process_group
        if group is not before and before is not None:
            raise RuntimeError(
                "the process group is not the one that the optimizer's state is sharded over. Save with "
                "accelerator.save_state, and load in a job that starts with the new group."
            )

    @property
    def has_amsgrad_changed(self) -> bool:
        """Whether a group's amsgrad no longer matches the maxima in its state. Local."""
        return any(group["amsgrad"] != shard.has_maxima for shard in self.shards for group in shard.distinct_groups)

    # ---------------------------------------------------------------- apply changes

    def take_from_state(self, changes: Changes, wanted: Wanted) -> None:
        """Apply the user's changes to entries of ``state`` to the shards. Local."""
        homes = [*changes.reset, *(home for home, _ in changes.given)]
        written = {id(shard): shard for shard, _ in homes}
        # The user may hold old views, or may have exchanged those of two parameters: never write over their memory.
        for shard in written.values():
            shard.renew()
        for shard, i in changes.reset:
            reset(shard, i)
        for (shard, i), given in changes.given:
            put(shard, i, given)
        # Without a snapshot, state has moved to another device, so every view in ``state`` is outdated.
        outdated = self.shards if self.seen is None else written.values()
        for shard in outdated:
            self._show_present(shard, changes, wanted.state)

    def _show_present(self, shard: Shard, changes: Changes, state: StateOf) -> None:
        """Update ``state``, except for parameters that are neither in the groups nor in ``state`` any more."""
        for i, param in enumerate(shard.params):
            if id(param) in changes.kept or peek(state, param):
                self._show_one(shard, i, state)

    def drop_zeros(self, changes: Changes, wanted: Wanted) -> None:
        """Delete entries of ``state`` that torch would not have: zeros of parameters that left before any update.

        Collective if state is sharded and such a parameter has left.
        """
        left = _left_without_update(changes)
        if not left:
            return
        entries = [peek(wanted.state, shard.params[i]) or {} for shard, i in left]
        # The user may have set only ``step`` to zero, so the moments decide.
        stays = torch.tensor([_has_nonzero_moment(entry) for entry in entries], dtype=torch.int32)
        _agree_on_largest(stays, wanted.ranks)
        for (shard, i), entry, it_stays in zip(left, entries, stays.tolist(), strict=True):
            param = shard.params[i]
            if entry and not it_stays and self._is_as_shown(param, entry):
                del wanted.state[param]

    def _is_as_shown(self, param: Tensor, entry: dict[str, Any]) -> bool:
        """Return whether the parameter's entry has only the shard's own views."""
        shown = self._shown[id(param)]
        return all(shown.get(key) is value for key, value in entry.items())

    def keep(self, params: Collection[int]) -> None:
        """Forget the place of all parameters but those with these ids; call `rearrange` next. Local."""
        self._placed = set(params)

    def rearrange(self, changes: Changes, wanted: Wanted) -> None:
        """Arrange the existing state in the shards that a job resumed here would have. Collective.

        Gradients stay where they are; the update detects that the shards are others.
        """
        shards, made = self._arranged_shards(wanted)
        aside = [
            self._aside_shard(shard, i, wanted)
            for shard, i in changes.removed
            if peek(wanted.state, shard.params[i]) and shard.has_numel_of(i)
        ]
        replaced = [old for old in (*self.shards, *self.aside) if not any(old is kept for kept in (*shards, *aside))]
        carry_state(replaced, [*made, *aside])
        for shard, i in changes.removed:  # their ids may be reused
            self._shown.pop(id(shard.params[i]), None)
        self.shards, self.aside = shards, aside
        for shard in (*made, *aside):
            self._show(shard, wanted.state)
        for old in replaced:  # the gradient path may hold it until the next backward pass
            old.release()

    def _arranged_shards(self, wanted: Wanted) -> tuple[list[Shard], list[Shard]]:
        """Return the shards of the placed parameters, and those of them that are new, with zeros for state. Local."""
        before = {id(shard.params[0]): shard for shard in self.shards}
        shards, made = [], []
        for arrangement in wanted.arrange(self._placed):
            shard = before.get(id(arrangement.params[0]))
            if shard is None or not wanted.is_shard_of(shard, arrangement):
                shard = wanted.make_shard(arrangement)
                made.append(shard)
            shard.set_groups(arrangement.groups)
            shards.append(shard)
        return shards, made

    def _aside_shard(self, shard: Shard, i: int, wanted: Wanted) -> Shard:
        """Return a shard for a parameter that is in no group, so is neither updated nor sent. Local."""
        if any(shard is aside for aside in self.aside):
            return shard
        return wanted.make_shard(Arrangement([shard.groups[i]], [shard.params[i]]))

    def refresh_moved(self, state: StateOf) -> bool:
        """Follow parameters that had moved at the last `differs`; return whether any had. Local."""
        moved = [s for s in self._moved if s.has_moved() and any(s is shard for shard in self.shards)]
        self.refresh(moved, state)
        return bool(moved)

    def refresh(self, shards: Iterable[Shard], state: StateOf) -> None:
        """Follow parameters that have moved to other memory. Local."""
        for shard in shards:
            shard.refresh()
            self._show(shard, state)

    def follow_device(self) -> None:
        """Follow parameters to another device, before backward; the next update checks the rest. Local."""
        for shard in self.shards:
            if shard.has_left_device():
                shard.refresh()
                self.seen = None  # the views in ``state`` are on the old device

    # ---------------------------------------------------------------- new parameters

    def newcomers(self, wanted: Wanted, *, gradients: bool) -> list[Tensor]:
        """Return the parameters that need state but have no place in a shard. Local.

        Args:
            gradients: Include those that have a gradient; at the first update of sharded state, all that require one.

        Raises:
            ValueError: a parameter is in the groups twice, or ``state`` has an entry that is not the state of its
                parameter.
        """
        # Another rank may have a gradient where this one has none, and all must have the same shards.
        all_trained = gradients and not self.shards and wanted.ranks.process_group is not None
        found = []
        for param in _params_without_place(wanted.groups, self._placed):
            needs_state = gradients and (param.grad is not None or (all_trained and param.requires_grad))
            if needs_state or peek(wanted.state, param):
                found.append(param)
        if found:
            check_once(wanted.groups)
            check_new_state(wanted.groups, wanted.state, self._placed)
        return found

    def unplaced(self, params: Iterable[Tensor]) -> set[int]:
        """Return the ids of those of ``params`` that have no place in a shard. Local."""
        return {id(param) for param in params} - self._placed

    def add(self, chosen: Collection[int], wanted: Wanted) -> None:
        """Make shards of the parameters with these ids, from their entries in ``state`` or with zeros. Local."""
        made = list(map(wanted.make_shard, wanted.arrange(chosen)))
        for shard in made:
            for i, param in enumerate(shard.params):
                load(shard, i, peek(wanted.state, param) or {}, is_share=wanted.are_shares)
            self._show(shard, wanted.state)
            self._placed.update(map(id, shard.params))
        self.shards = [*self.shards, *made]
        self.remember(wanted)

    # ---------------------------------------------------------------- show state

    def remember(self, wanted: Wanted) -> None:
        """Record that the shards match groups and state. Local."""
        self.seen = Snapshot(wanted.groups, wanted.state, self._placed, self._shown.values(), self._accesses)

    def _show(self, shard: Shard, state: StateOf) -> None:
        """Put views into ``shard`` into ``state``."""
        for i in range(len(shard.params)):
            self._show_one(shard, i, state)

    def _show_one(self, shard: Shard, i: int, state: StateOf) -> None:
        param = shard.params[i]
        views = shard.state_of(i)
        entry = peek(state, param)
        if entry is None:
            entry = WatchedEntry.of(self._accesses, {})
            dict.__setitem__(state, param, entry)  # dict's own method does not count as a change by the user
        known = self._shown.get(id(param))
        values = {}
        for key, view in views.items():
            given = entry.get(key)
            is_shown = known is not None and given is not None and given is known.get(key)
            values[key] = _pointed_at(given, view, is_shown=is_shown)
        entry.update(values)  # not replaced: the user may keep other values in it
        self._shown[id(param)] = Shown.of(values)


def _left_without_update(changes: Changes) -> list[Home]:
    """Return the parameters that left the groups before an update counted, and whose state the user did not set."""
    given = {(id(shard), i) for (shard, i), _ in changes.given}
    return [(shard, i) for shard, i in changes.removed if (id(shard), i) not in given and not shard.steps[i]]


def _has_nonzero_moment(entry: dict[str, Any]) -> bool:
    return any(bool(entry[key].any()) for key in MOMENTS if key in entry)


def _agree_on_largest(flags: Tensor, ranks: ShardingRanks) -> None:
    """Reduce ``flags`` to their maximum over ranks: one rank's share may be zero where another's is not. Collective."""
    groups = ranks.comparing()
    if ranks.process_group is not None and not groups:  # ranks that cannot communicate must still decide alike
        flags.zero_()
    for group in groups:
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=group)


def _pointed_at(tensor: Any, view: Tensor, *, is_shown: bool) -> Tensor:
    """Return ``tensor`` with ``view``'s memory if possible, since the user may hold it and write to it later.

    Args:
        is_shown: Whether a shard has put ``tensor`` there, so that its shape may follow the share.
    """
    if type(tensor) is not Tensor or type(view) is not Tensor or tensor.requires_grad or tensor.is_inference():
        return view
    if (tensor.dtype, tensor.device) != (view.dtype, view.device) or not (is_shown or tensor.shape == view.shape):
        return view
    tensor.data = view
    return tensor


def _params_without_place(groups: Groups, placed: Collection[int]) -> list[Tensor]:
    return [param for group in groups for param in group["params"] if id(param) not in placed]
