"""Connect attached optimizers to DDP's reducer.

A DDP module accepts one communication hook in its lifetime, so one object per module serves every optimizer that is
attached to it, in turn or at the same time. It averages gradients that no optimizer receives, as DDP would.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Mapping, Sequence, Set
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from dist_adamw.optimizer.gradients.change_watch import refuse_parts
from dist_adamw.optimizer.gradients.send_order import Plan
from dist_adamw.optimizer.gradients.weak_hooks import WeakHook
from dist_adamw.optimizer.sharding.memory_order import axes_in_memory, check_dense, shaped_like, storage_order
from dist_adamw.optimizer.sharding.shard import Shard

_HOOK = "_dist_adamw_hook"  # attribute of a DDP module
# Devices on which DDP's reducer can stand aside. It copies every gradient into its own buckets, which on a CPU takes as
# long as the update. On other devices its buckets are already allocated, and other gradients would take memory on top.
_ASIDE = frozenset({"cpu"})
_gradient_of = operator.itemgetter(1)


class BucketListener(Protocol):
    """The part of `GradientPath` that a DDP module uses."""

    @property
    def listening(self) -> Set[int]:
        """Ids of the parameters whose gradients it receives."""

    def bucket_came(self, packed: PackedBucket | None) -> None:
        """Take the gradients of one of DDP's buckets; None if DDP copies them to ``param.grad`` later."""

    def follow_params(self) -> None:
        """Follow parameters that the optimizer has gained or lost."""

    def announce_change(self) -> None:
        """Raise if another rank has other parameters. Collective."""

    def announce_round(self) -> None:
        """Raise if another rank is not in a backward pass of the same update. Collective."""


class PackedBucket:
    """The contents of one of DDP's buckets for one listener; valid until DDP rebuilds its buckets.

    Args:
        params: The parameters.
        flat: Their places in the buffer, 1-D.
        strides: By id of parameter, its strides when DDP was built.
    """

    def __init__(self, params: list[Tensor], flat: list[Tensor], strides: Mapping[int, tuple[int, ...]]) -> None:
        self.params, self._flat, self._strides = params, flat, strides
        self.keys = {id(param) for param in params}
        self.plan: Plan | None = None
        self.places: list[tuple[Shard, int, Tensor]] = []
        self.buckets: list[int] = []
        # Shard, index in it, parameter and place in the buffer of those whose elements may be in different orders.
        self._odd: list[tuple[Shard, int, Tensor, Tensor]] = []

    def enter(self, plan: Plan) -> None:
        """Find the places of its parameters in ``plan``."""
        places: list[tuple[Shard, int, Tensor]] = []
        odd: list[tuple[Shard, int, Tensor, Tensor]] = []
        for param, flat in zip(self.params, self._flat, strict=True):
            place = plan.place_of.get(id(param))
            if place is None:
                continue
            shard, i = place
            places.append((shard, i, flat))
            if self._may_be_reordered(param, shard, i):
                odd.append((shard, i, param, flat))
        self.plan, self.places, self._odd = plan, places, odd
        self.buckets = sorted({n for key in self.keys for n in plan.buckets_of.get(key, ())})

    def _may_be_reordered(self, param: Tensor, shard: Shard, i: int) -> bool:
        """Return whether DDP, the shard and the gradient may not all have the elements in the same order."""
        return (
            self._strides.get(id(param)) != param.stride()
            or shard.order.of(i) != axes_in_memory(param)
            or (param.grad is not None and param.grad.stride() != param.stride())
        )

    def reorder(self) -> None:
        """Bring gradients into their shards' order of elements."""
        # DDP keeps the order that parameters had when it was built; a shard, the one when the shard was made.
        for shard, i, param, flat in self._odd:
            if (grad := param.grad) is not None and grad.data_ptr() == flat.data_ptr():
                ordered = shard.order.flatten(i, grad)
                if ordered.data_ptr() != flat.data_ptr():
                    flat.copy_(ordered)
                    param.grad = shard.order.unflatten(i, flat)

    def settle(self) -> None:
        """Reshape gradients that DDP turned into views of this bucket after `reorder`, of parameters not used here."""
        for shard, i, param, flat in self._odd:
            if (grad := param.grad) is not None and grad.data_ptr() == flat.data_ptr():
                param.grad = shard.order.unflatten(i, flat)


class DDPReducer:
    """The reducer of a DDP module, as attached optimizers use it. Local to build.

    Args:
        model: The module.

    Raises:
        ValueError: the module already has a communication hook.
    """

    def __init__(self, model: DistributedDataParallel) -> None:
        self._group: dist.ProcessGroup = model.process_group
        self._is_view: bool = model.gradient_as_bucket_view
        self._strides = {id(param): param.stride() for param in model.parameters()}
        self._trained = [param for param in model.parameters() if param.requires_grad]
        # Without views, the reducer would overwrite averages with its own copies once it is active again. With
        # static_graph or mixed precision, DDP expects to see every pass.
        self._may_stand_aside = self._is_view and not (model.static_graph or model.mixed_precision is not None)
        self._on_any_device = False  # whether it may stand aside also where that takes memory
        self._stands_aside = False
        self.has_own = False  # whether DDP itself averages some parameters
        self.stood_aside = False  # in the last forward pass
        # A stack, since forward passes may nest: the user's require_backward_grad_sync, and whether it was overridden.
        self._asked: list[tuple[bool, bool]] = []
        # By bucket index: its address and parameters, the part of each listener, and the gradients without a listener.
        self._known: dict[int, tuple[int, list[Tensor], dict[int, PackedBucket], list[Tensor]]] = {}
        self._seen: dict[int, tuple[int, ...]] = {}  # address and parameters of each bucket, when it was last new
        self._settled: dict[int, bool] = {}  # whether each was the same the time before
        self._flats: dict[int, list[tuple[Tensor, Tensor]]] = {}  # of each bucket: parameters and their places in it
        self._views: list[tuple[Tensor, Tensor, Tensor]] = []  # parameters, their gradients in buckets, and the places
        self._addresses: list[int] = []
        self._listeners: list[tuple[weakref.ref[Any], bool]] = []  # and whether DDP stands aside for it
        try:
            # DDP requires an argument named ``bucket``, and refuses annotations that are strings, as they are here.
            model.register_comm_hook(self, lambda state, bucket: state.reduce(bucket))
        except RuntimeError as error:
            raise ValueError(
                f"the module already has a communication hook, and DDP accepts only one ({error}). Call attach() "
                "without register_comm_hook(), or do not call attach(): then DDP and your hook average gradients."
            ) from error
        self._model = weakref.ref(model)
        self._sees_forward = False

    @classmethod
    def of(cls, model: DistributedDataParallel) -> DDPReducer:
        """Return the reducer of ``model``, made on first use. A copy of the module gets another one."""
        found: DDPReducer | None = getattr(model, _HOOK, None)
        if found is None:
            found = cls(model)
            setattr(model, _HOOK, found)
        return found

    # Copies and pickles of a module have None in its place, so that the copy does not share this module's hook.
    def __deepcopy__(self, memo: Any) -> None:
        return None

    def __reduce__(self) -> Any:
        return type(None), ()

    # ---------------------------------------------------------------- listeners

    def can_stand_aside(self, ids: Set[int], *, on_any_device: bool = False) -> bool:
        """Return whether DDP's reducer would have nothing left to do if gradients of ``ids`` came by hooks.

        Args:
            ids: Of parameters.
            on_any_device: Whether it stands aside also where that takes memory.
        """
        taken = set(ids).union(*(path.listening for path in self._paths(aside=True)))
        anywhere = on_any_device or self._on_any_device
        return self._may_stand_aside and all(
            (anywhere or param.device.type in _ASIDE) and id(param) in taken
            for param in self._trained
            if param.requires_grad
        )

    def add(self, path: BucketListener, *, aside: bool, on_any_device: bool = False) -> None:
        """Serve ``path`` as well.

        Args:
            path: Held by a weak reference.
            aside: Whether it receives its gradients by hooks, so that DDP's reducer can stand aside for them.
            on_any_device: Whether it needs that also where it takes memory.
        """
        self._on_any_device = self._on_any_device or on_any_device
        self._listeners = [one for one in self._listeners if one[0]() not in (None, path)]
        self._listeners.append((weakref.ref(path, WeakHook(self, "_gone")), aside))
        model = self._model()
        if not self._sees_forward and model is not None:
            self._sees_forward = True
            model.register_forward_pre_hook(WeakHook(self, "before_forward"))
            # Also after a forward pass that raised: the user's require_backward_grad_sync must be restored.
            model.register_forward_hook(WeakHook(self, "after_forward"), always_call=True)
        self.follow()

    def _gone(self, _: Any) -> None:
        self.drop(None)

    def drop(self, path: BucketListener | None) -> None:
        """Stop serving ``path``, and listeners that no longer exist."""
        self._listeners = [one for one in self._listeners if one[0]() not in (None, path)]
        self.follow()

    def follow(self) -> None:
        """Reassign gradients after a listener was added or dropped, or after its parameters changed."""
        self._forget_buckets()
        self._stands_aside = bool(self._paths(aside=True)) and self.can_stand_aside(frozenset())
        heard = set[int]().union(*(path.listening for path in self._all_paths()))
        self.has_own = any(id(param) not in heard for param in self._trained)

    def _paths(self, *, aside: bool) -> list[Any]:
        return [path for ref, is_aside in self._listeners if is_aside == aside and (path := ref()) is not None]

    def _all_paths(self) -> list[Any]:
        return [path for ref, _ in self._listeners if (path := ref()) is not None]

    def listeners(self) -> list[Any]:
        """Return the listeners that get their gradients from DDP's buckets."""
        return self._paths(aside=False)

    # ---------------------------------------------------------------- stand aside

    def before_forward(self, module: DistributedDataParallel, args: Any) -> None:
        """Decide who averages the gradients of this pass. If DDP has none to average, it sees a ``no_sync`` pass."""
        if torch.is_grad_enabled():
            refuse_parts(self._trained)  # before backward adds to them
            paths = self._all_paths()
            stands_aside = self._stands_aside
            for path in paths:
                path.follow_params()
            if self._stands_aside != stands_aside:
                # If other ranks have not changed theirs, DDP would start an all-reduce on this rank alone and hang.
                for path in paths:
                    path.announce_change()
            if self.stood_aside and not self._stands_aside:
                # While it stood aside DDP saw passes as under no_sync, and accumulated which parameters were used.
                # Clear that before it averages again.
                module.reducer._reset_state()
            self.stood_aside = self._stands_aside
        self._asked.append((module.require_backward_grad_sync, self._stands_aside))
        if self._stands_aside:
            module.require_backward_grad_sync = False

    def after_forward(self, module: DistributedDataParallel, args: Any, output: Any) -> None:
        """Restore the user's ``require_backward_grad_sync``."""
        if not self._asked:
            return
        asked, stood_aside = self._asked.pop()
        if stood_aside:
            module.require_backward_grad_sync = asked
            if torch.is_grad_enabled():  # so that the next forward pass broadcasts buffers
                module.require_forward_param_sync = asked

    # ---------------------------------------------------------------- the communication hook

    def forget_unless_settled(self) -> bool:
        """Forget the buckets if DDP may still replace them; return whether they are final."""
        settled = all(self._settled.values())
        if not settled:
            self._known.clear()
        return settled

    def _forget_buckets(self) -> None:
        for known in (self._known, self._flats, self._views, self._addresses):
            known.clear()

    # ---------------------------------------------------------------- gradients that are views of buckets

    def note_views(self) -> None:
        """Remember the gradients that have become views of buckets. Call it after each backward pass."""
        if not self._is_view:
            return
        for _, _, packed, _ in self._known.values():
            for bucket in packed.values():
                bucket.settle()
        # A gradient stays a view once it is one, so only the others are checked again in later passes.
        for index, pairs in list(self._flats.items()):
            views = _views_among(pairs)
            if views:
                found = {id(param) for param, *_ in views}
                self._flats[index] = [pair for pair in pairs if id(pair[0]) not in found]
                self._views += views
                self._addresses += [flat.data_ptr() for *_, flat in views]

    def restore_views(self) -> None:
        """Put gradients back into their buckets after ``param.grad.data = x``. Call it before each forward pass.

        DDP would still treat such a gradient as a view of the bucket, and average the bucket's old contents.
        """
        if list(map(Tensor.data_ptr, map(_gradient_of, self._views))) != self._addresses:
            for param, grad, flat in self._views:
                if grad.data_ptr() != flat.data_ptr():
                    flat.copy_(storage_order(grad, like=param))
                    grad.data = shaped_like(flat, param)
        if not all(self._settled.values()):  # DDP may be about to replace its buckets, so do not keep their memory
            self._forget_buckets()

    def reduce(self, bucket: Any) -> torch.futures.Future[Tensor]:
        """Handle one ``dist.GradBucket``; the communication hook of the module."""
        buffer: Tensor = bucket.buffer()
        check_dense(buffer)
        paths = {id(path): path for path in self.listeners()}
        packed, unclaimed = self._sorted(bucket, buffer, paths)
        for key, path in paths.items():
            # Without views, DDP copies the buffer to the gradients only at the end of backward; they are sent then.
            path.bucket_came(packed[key] if self._is_view else None)
        if unclaimed:
            # A rank that is not in this backward pass would not take part in the all-reduce, so check that first.
            for path in self._all_paths():
                path.announce_round()
            together = torch.cat(unclaimed).div_(dist.get_world_size(self._group))
            dist.all_reduce(together, group=self._group)
            torch._foreach_copy_(unclaimed, list(torch.split(together, [grad.numel() for grad in unclaimed])))
        # Hand DDP its buffer back unreduced: the listeners reduce their gradients to the owners.
        done: torch.futures.Future[Tensor] = torch.futures.Future()
        done.set_result(buffer)
        return done

    def _sorted(
        self, bucket: Any, buffer: Tensor, paths: dict[int, Any]
    ) -> tuple[dict[int, PackedBucket], list[Tensor]]:
        """Return each path's part of a bucket, and the gradients that no path receives."""
        index, params = bucket.index(), bucket.parameters()
        if (known := self._known.get(index)) is not None:
            address, last, packed, unclaimed = known
            if (
                address == buffer.data_ptr()
                and len(last) == len(params)
                and all(map(operator.is_, last, params))
                and packed.keys() == paths.keys()
            ):
                return packed, unclaimed
        return self._sort_new(index, params, bucket.gradients(), buffer, paths)

    def _sort_new(
        self, index: int, params: list[Tensor], grads: list[Tensor], buffer: Tensor, paths: dict[int, Any]
    ) -> tuple[dict[int, PackedBucket], list[Tensor]]:
        """Sort the gradients of a bucket that is new or changed; as `_sorted`."""
        if self._known.pop(index, None) is not None:  # DDP has rebuilt its buckets
            self._forget_buckets()
        # DDP rebuilds its buckets after the first pass that it averages; a bucket that was the same twice is final.
        seen = (buffer.data_ptr(), *map(id, params))
        self._settled[index] = self._seen.get(index) == seen
        self._seen[index] = seen
        # The gradients are contiguous views whatever a parameter's strides, with elements in memory order.
        rest = [(param, grad.view(-1)) for param, grad in zip(params, grads, strict=True)]
        self._flats[index] = rest
        packed = {}
        for key, path in paths.items():
            mine, rest = _partition(rest, path.listening)
            packed[key] = PackedBucket([param for param, _ in mine], [grad for _, grad in mine], self._strides)
        heard = set[int]().union(*(path.listening for path in self._paths(aside=True)))
        unclaimed = [grad for param, grad in rest if id(param) not in heard]
        self._known[index] = (buffer.data_ptr(), params, packed, unclaimed)
        return packed, unclaimed


def _views_among(pairs: Sequence[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return parameter, gradient and place for those ``pairs`` of parameter and place whose gradient is that place."""
    return [
        (param, param.grad, flat)
        for param, flat in pairs
        if param.grad is not None and param.grad.data_ptr() == flat.data_ptr()
    ]


def _partition(
    pairs: Sequence[tuple[Tensor, Tensor]], ids: Set[int]
) -> tuple[list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]]:
    """Return the ``pairs`` of parameter and gradient whose parameter's id is in ``ids``, and the others."""
    inside: list[tuple[Tensor, Tensor]] = []
    outside: list[tuple[Tensor, Tensor]] = []
    for pair in pairs:
        (inside if id(pair[0]) in ids else outside).append(pair)
    return inside, outside
