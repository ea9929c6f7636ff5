"""The shard: one rank's share of the AdamW state of a list of parameters.

Elements of a parameter are counted in the order of its memory, which is C order if it is contiguous. A DTensor's
elements are those of its local tensor, since its engine has sharded it already. `AllShards` decides which parameters
belong in a shard.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from dist_adamw.optimizer.kernels.foreach import zeros_apart
from dist_adamw.optimizer.kernels.mixed import follow_params_
from dist_adamw.optimizer.sharding.bucket_views import MASTERS, MOMENTS, BucketViews, Operands
from dist_adamw.optimizer.sharding.cut_blocks import CutBlocks
from dist_adamw.optimizer.sharding.cuts import Cut, cut_of, is_cut_by_rows
from dist_adamw.optimizer.sharding.dtensors import (
    as_dtensor,
    is_dtensor,
    local_of,
    shard_axes,
)
from dist_adamw.optimizer.sharding.memory_order import MemoryOrder, shaped_like, storage_order
from dist_adamw.optimizer.sharding.owned_elements import OwnedElements
from dist_adamw.optimizer.sharding.owned_gradients import OwnedGradients
from dist_adamw.optimizer.transport import make_transport, sends_from_host
from dist_adamw.optimizer.transport.base import Transport, cut
from dist_adamw.optimizer.transport.layout import FlatLayout
from dist_adamw.optimizer.transport.rollcall import Channel
from dist_adamw.ranks import collectives


class Shard:
    """The state of ``params``, of which this rank holds its share.

    Args:
        params: Parameters of one dtype and device, in the order of the layout; all DTensors of one mesh, sharded along
            the same axes, or none.
        groups: The param group of each, which all have the same ``amsgrad``.
        process_group: The ranks that the state is sharded over; None keeps it whole.
        replicas: The ranks that own the same elements, in other copies of the state.
        max_bucket_numel: Elements that are sent together; None chooses a suitable number.
        reduce_every_backward: See `layout.suitable_bucket_numel`.
        channel: Distinguishes the messages of several optimizers.
        master_dtype: The dtype of masters of bf16 or fp16 parameters: fp32, or int16 for remainders.
        state_dtype: The dtype of the moments; None means fp32 with masters, else the parameters' dtype.
        reduce_dtype: The dtype in which gradients are averaged, see `DistAdamW`.
        reproducible: See `Transport`.
        averages: The averages of the weights to keep, by their names in ``state``, and their dtypes; None is fp32, or
            fp64 for fp64 weights.

    Attributes:
        buckets: The operands of each bucket's update.
        averages: The names of the averages in ``state``.
        cuts: With ``reproducible``, where an engine has cut each parameter by rows; None: nowhere.
        cut_blocks: The blocks that such cuts divide.

    Local to build; the methods of ``transport`` are collective.
    """

    def __init__(
        self,
        params: list[Tensor],
        *,
        groups: list[dict[str, Any]],
        process_group: dist.ProcessGroup | None,
        replicas: dist.ProcessGroup | None = None,
        max_bucket_numel: int | None,
        reduce_every_backward: bool = False,
        channel: Channel | None = None,
        master_dtype: torch.dtype | None = None,
        state_dtype: torch.dtype | None = None,
        reduce_dtype: torch.dtype | None = None,
        reproducible: bool = False,
        averages: Mapping[str, torch.dtype | None] | None = None,
    ) -> None:
        self.params = params
        self.shard_axes = shard_axes(params[0])
        self.groups, self.distinct_groups = groups, _distinct(groups)
        self.process_group, self._replicas, self._channel = process_group, replicas, channel or Channel()
        self._reduce_dtype, self._reproducible = reduce_dtype, reproducible
        world_size = 1 if process_group is None else collectives.world_size(process_group)
        self.rank = 0 if process_group is None else collectives.rank(process_group)
        like = self._weights()[0]
        self.layout = FlatLayout(
            tuple(p.numel() for p in self._weights()),
            world_size,
            max_bucket_numel,
            reduce_every_backward,
            by_collectives=process_group is not None and not sends_from_host(process_group, like.device),
        )
        self.owned = OwnedElements(self.layout, self.rank)
        is_cut = reproducible and all(map(is_cut_by_rows, params))
        self.cuts: list[Cut] | None = list(map(cut_of, params)) if is_cut else None
        self.cut_blocks = CutBlocks(params) if is_cut else None
        dtypes = _dtypes_of(like, groups[0]["amsgrad"], master_dtype, state_dtype)
        self.is_mixed = any(dtype != like.dtype for dtype in dtypes.values())
        wide = torch.promote_types(like.dtype, torch.float32)
        of_averages = {name: wide if dtype is None else dtype for name, dtype in (averages or {}).items()}
        self.averages = of_averages.keys()
        self.moments = {
            name: zeros_apart(self.layout.shard_numel, place, dtype=dtype, device=like.device)
            for place, (name, dtype) in enumerate({**dtypes, **of_averages}.items(), 1)
        }
        self.steps = torch.zeros(len(params), dtype=torch.float32, device=like.device)
        self.gradients = OwnedGradients(params, self.layout, self.owned.pieces)
        self._mask: tuple[list[bool], Tensor] | None = None
        self._members: dict[int, list[Tensor]] = {}
        self.transport: Transport | None = None
        self._build_views()
        if "master" in self.moments:
            for bucket in self.buckets:
                if bucket.runs:  # the foreach function refuses empty lists
                    torch._foreach_copy_(bucket.operands.masters, bucket.operands.params)

    # ---------------------------------------------------------------- memory and views

    def _weights(self) -> list[Tensor]:
        """Return the local tensors of the parameters."""
        return self.params if self.shard_axes is None else [local_of(p) for p in self.params]

    def _build_views(self) -> None:
        weights = self._weights()
        self._addresses = [p.data_ptr() for p in weights]
        self.order = MemoryOrder(weights)
        flat = [storage_order(p.detach()) for p in weights]
        self._cut_state([cast(list[Tensor], cut(flat, pieces)) for pieces in self.owned.pieces])
        if self.process_group is not None:
            self.transport = make_transport(
                self.layout,
                flat,
                group=self.process_group,
                replicas=self._replicas,
                channel=self._channel,
                reduce_dtype=self._reduce_dtype,
                reproducible=self._reproducible,
                replaces=self.transport,
            )

    def _cut_state(self, params: list[list[Tensor]]) -> None:
        """Cut the state into views that match ``params``, the runs that this rank owns of each bucket."""
        self._step_of = list(map(Tensor.detach, self.steps.unbind()))
        self._none_of = {name: moment[:0] for name, moment in self.moments.items()}
        self.buckets = [
            BucketViews(*both, moments=self.moments, steps=self._step_of, groups=self.groups)
            for both in zip(self.owned.pieces, params, strict=True)
        ]

    def set_groups(self, groups: list[dict[str, Any]]) -> None:
        """Replace the param group of each parameter. Local."""
        if all(map(operator.is_, groups, self.groups)):
            return
        self.groups = groups
        self.distinct_groups = _distinct(groups)
        for bucket in self.buckets:
            bucket.set_groups(groups)

    def has_moved(self) -> bool:
        """Return whether parameters have moved to other memory since the last `refresh`. Local."""
        return list(map(Tensor.data_ptr, self._weights())) != self._addresses

    def refresh(self) -> None:
        """Follow parameters that have moved. Local. `state_of` returns other tensors afterwards.

        The parameters must have one device and dtype and unchanged memory formats; check with `fits`.
        """
        weights = self._weights()
        device, dtype = weights[0].device, weights[0].dtype
        for place, (name, moment) in enumerate(self.moments.items(), 1):
            # Unless mixed, moments have the parameters' dtype.
            kept = moment.dtype if self.is_mixed or name in self.averages else dtype
            self.moments[name] = zeros_apart(len(moment), place, dtype=kept, device=device).copy_(moment)
        self.steps = self.steps.to(device)
        self._build_views()
        self.gradients.move(device, dtype)

    def renew(self) -> None:
        """Copy the state to new memory. Local. `state_of` returns other tensors afterwards.

        Call it before a parameter's state is overwritten: the user may hold the old views, or use them as other state.
        """
        for place, (name, moment) in enumerate(self.moments.items(), 1):
            self.moments[name] = zeros_apart(len(moment), place, dtype=moment.dtype, device=moment.device).copy_(moment)
        self.steps = self.steps.clone()
        self._cut_state([bucket.operands.params for bucket in self.buckets])

    def release(self) -> None:
        """Free the state, which other shards have by now. Local.

        Gradients that were averaged with this layout may still need the layout and the transport.
        """
        self.moments, self.buckets = {}, []

    def fits(self) -> bool:
        """Return whether `refresh` can follow the parameters; otherwise their state needs other shards. Local."""
        weights = self._weights()
        alike = len({(p.device, p.dtype) for p in weights}) == 1 and all(map(self.has_numel_of, range(len(weights))))
        return alike and self.order.is_of(weights)

    def has_numel_of(self, i: int) -> bool:
        """Return whether parameter ``i`` has as many elements as its state. Local."""
        return local_of(self.params[i]).numel() == self.layout.numels[i]

    def has_left_device(self) -> bool:
        """Return whether the parameters are on another device than the state. Local."""
        # ``.to()`` moves all parameters of a module, so checking the first one is enough before backward.
        return local_of(self.params[0]).device != self.steps.device

    def use(self, channel: Channel) -> None:
        """Send by ``channel`` from now on. Local."""
        self._channel = channel
        if self.transport is not None:
            self.transport.channel = channel

    def follow_weights(self) -> None:
        """Update masters of parameters that were written to since the last update, e.g. by loading a model. Local.

        A master is kept if its parameter is still the master rounded. Updates do this themselves.
        """
        for bucket in self.buckets:
            follow_params_(bucket.operands.params, bucket.operands.masters)

    @property
    def nbytes(self) -> int:
        """Bytes of state on this rank."""
        return sum(t.nbytes for t in (*self.moments.values(), self.steps))

    def members(self, k: int) -> list[Tensor]:
        """Return the parameters that have elements in bucket ``k``."""
        if k not in self._members:
            found = self.layout.pieces(*self.layout.bucket(k))
            self._members[k] = [self.params[piece.param] for piece in found]
        return self._members[k]

    def owned_moment(self, i: int, name: str) -> Tensor:
        """Return this rank's elements of a moment of parameter ``i``, 1-D, in the order of its ranges."""
        # Return existing views if possible: with thousands of small parameters, half a kilobyte per view adds up.
        places = self.owned.places[i]
        if not places:
            return self._none_of[name]
        if len(places) == 1:
            k, j = places[0]
            return self.buckets[k].columns[name][j]
        # A parameter that continues in the next bucket fills this one to its end, so its pieces are adjacent in the
        # flat shard.
        start = self.owned.offset_of(i)
        return self.moments[name][start : start + self.owned.numel_of(i)]

    def state_of(self, i: int) -> dict[str, Any]:
        """Return the entry of parameter ``i`` in ``optimizer.state``: views into the shard.

        Whole state has the parameter's shape, and is a DTensor if the parameter is; a share is 1-D.
        """
        state: dict[str, Any] = {"step": self._step_of[i]}
        for name in self.moments:
            owned = self.owned_moment(i, name)
            if self.process_group is None:
                state[name] = self.shaped(owned, self.params[i])
            else:  # never the same empty tensor for two parameters, since the user may replace its data
                state[name] = owned if self.owned.places[i] else owned.detach()
        return state

    @staticmethod
    def shaped(flat: Tensor, param: Tensor) -> Tensor:
        """View ``flat``, all local elements of a moment, in the shape of ``param``; as a DTensor if that is one."""
        if not is_dtensor(param):
            return shaped_like(flat, param)
        return as_dtensor(shaped_like(flat, local_of(param)), param)

    def fill(self, i: int, name: str, flat: Tensor) -> None:
        """Copy this rank's share of ``flat``, all elements of a moment of parameter ``i`` in memory order."""
        target = self.owned_moment(i, name)
        place = 0
        for start, stop in self.owned.ranges_of(i):
            target[place : place + stop - start].copy_(flat[start:stop])
            place += stop - start

    @property
    def has_maxima(self) -> bool:
        """Whether state has the running maxima of amsgrad."""
        return "max_exp_avg_sq" in self.moments

    @property
    def has_master(self) -> bool:
        """Whether there are masters or remainders."""
        return not self.moments.keys().isdisjoint(MASTERS)

    # ---------------------------------------------------------------- one update

    def count_update(self, found_inf: Tensor | None) -> None:
        """Advance ``step`` of the parameters that have a gradient, unless ``found_inf`` is 1."""
        # Subtracted on the device, so that the host need not wait for ``found_inf``.
        one = 1.0 if found_inf is None else 1.0 - found_inf
        has_grad = self.gradients.has_grad
        self.steps.add_(one if all(has_grad) else self._mask_of(has_grad) * one)

    def _mask_of(self, has_grad: list[bool]) -> Tensor:
        """Return 1 for each parameter with a gradient, else 0; copied to the device only when that changes. Local."""
        mask, device = self._mask, self.steps.device
        if mask is None or mask[0] != has_grad or mask[1].device != device:
            # From pinned memory the copy does not wait for the device.
            host = torch.tensor(has_grad, dtype=torch.float32, pin_memory=device.type == "cuda")
            mask = self._mask = (list(has_grad), host.to(device, non_blocking=True))
        return mask[1]

    def operands_of(self, i: int) -> Iterator[tuple[Operands, int]]:
        """Yield the operands of each bucket in which this rank owns a piece of parameter ``i``, and its index there."""
        for k, j in self.owned.places[i]:
            yield self.buckets[k].operands, j


def _distinct(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return list({id(group): group for group in groups}.values())


def _dtypes_of(
    weight: Tensor, amsgrad: bool, master_dtype: torch.dtype | None, state_dtype: torch.dtype | None
) -> dict[str, torch.dtype]:
    """Return the dtype of each moment, and of the master or remainder, for parameters like ``weight``."""
    moments = MOMENTS if amsgrad else MOMENTS[:2]
    if weight.dtype.itemsize == 2 and master_dtype is not None:
        dtypes = dict.fromkeys(moments, torch.float32 if state_dtype is None else state_dtype)
        dtypes["master" if master_dtype == torch.float32 else "remainder"] = master_dtype
        return dtypes
    return dict.fromkeys(moments, weight.dtype if state_dtype is None else state_dtype)


def peek(state: Mapping[Tensor, Any], param: Tensor) -> Any:
    """Return the entry of ``param`` in ``optimizer.state``, or None. Does not count as a read by the user. Local."""
    return dict.get(state, param) if isinstance(state, dict) else state.get(param)
