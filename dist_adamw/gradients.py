"""Local gradients on their way to the ranks that own them.

Floor 2: knows shards, modules and autograd's hooks; ``optimizer.py`` asks for the result.

Glossary:
    round    every bucket sent once; in_place there is one to an update, into the shard one to a backward
    launch   begin to send a bucket
    open     a bucket whose gradients are local ones, as autograd left them

Buckets are launched in one fixed order, last parameters first, whatever order gradients come in,
so that every rank sends alike; a bucket is launched during backward when its last gradient is
there and the bucket before it has gone.
"""

from __future__ import annotations

import itertools
import operator
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves

from dist_adamw.exchange import UNDER_WAY, Travelling
from dist_adamw.shard import Shard, storage_order

_LOOK_EVERY = 1 << 18  # elements: as many as make a message worth sending
_HOOK = "_dist_adamw_hook"  # attribute of a DDP module: one hook serves every optimizer
# Where DDP's reducer stands aside: it copies every gradient into buckets of its own, which costs as much time as
# the update. Elsewhere the buckets have been allocated by then, so gradients had better be in them.
_ASIDE = frozenset({"cpu"})


class _Plan:
    """The buckets of some shards in the order in which they are launched, and who is in them."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        self.shards = list(shards)
        self.order = [(shard, k) for shard in reversed(self.shards) for k in reversed(range(shard.layout.num_buckets))]
        self.members: list[set[int]] = []  # ids of parameters, by bucket
        self.places: list[list[tuple[int, Tensor, bool]]] = []  # place in the shard, whether 1-D as it is
        self.buckets_of: dict[int, list[int]] = {}
        self.place_of: dict[int, tuple[Shard, int]] = {}
        for shard in self.shards:
            for i, param in enumerate(shard.params):
                self.place_of[id(param)] = (shard, i)
        for n, (shard, k) in enumerate(self.order):
            places = [
                (piece.param, shard.params[piece.param]) for piece in shard.layout.pieces(*shard.layout.bucket(k))
            ]
            self.places.append([(i, param, param.ndim == 1 and param.is_contiguous()) for i, param in places])
            self.members.append({id(param) for _, param in places})
            for _, param in places:
                self.buckets_of.setdefault(id(param), []).append(n)


class GradientPath:
    """What `DistAdamW.attach` installs. See there.

    Args:
        params: The optimizer's method that gives every parameter, in order.
        shards: Its method that gives the shards, and builds them if there are none yet.
        overlap: Launch during backward.
        into_shard: Keep averages in flat memory of the shards, and let go of ``param.grad``.
    """

    def __init__(
        self,
        params: Callable[[], list[Tensor]],
        shards: Callable[[], list[Shard]],
        *,
        overlap: bool,
        into_shard: bool,
    ) -> None:
        # The optimizer owns the path: a strong reference back would leave both to the garbage collector, and
        # with them the process group, perhaps until the interpreter ends.
        self._params_ref, self._shards_ref = weakref.WeakMethod(params), weakref.WeakMethod(shards)
        self.overlap, self.into_shard = overlap, into_shard
        self._synchronises = True  # False inside no_sync
        self._aside: list[weakref.ref[DistributedDataParallel]] = []  # modules whose reducer stands aside
        self._asked: dict[int, bool] = {}  # of their no_sync, by id, while they run forward
        self._heard = False  # whether this backward pass has reached a parameter
        self._listens_to_ddp: bool | None = None
        self._ddp_only = self._buffers_are_gradients = True
        self._hooks: list[_DDPHook] = []
        self._ids: set[int] = set()
        self._inboxes: list[deque[Tensor]] = []  # by plain module: parameters whose gradient has come
        self._plan = _Plan([])
        self._flat: dict[int, list[Tensor | None]] = {}  # by id of shard: what it sends
        self._travelling: deque[tuple[Shard, Travelling]] = deque()
        self._queued = False  # whether autograd will call _after_backward
        self._rounds = 0  # into the shard: since the last update
        self._filled: set[int] = set()  # ids of parameters that got zeros for a gradient
        self._reopened = False  # whether averages have become sums again since the last update
        self._seen: set[int] = set()  # ids of parameters with a gradient since the last update
        self._buffers: list[Tensor] = []  # DDP's, of this round
        self._watched: list[Tensor] = []  # gradients that nobody else should write to
        self._expected_version = 0
        self._begin_round()

    def _params(self) -> list[Tensor]:
        params = self._params_ref()
        return [] if params is None else params()

    def _shards(self) -> list[Shard]:
        shards = self._shards_ref()
        return [] if shards is None else shards()

    # ---------------------------------------------------------------- listening

    def listen(self, model: nn.Module) -> None:
        """Hear of the gradients of ``model``. Local.

        Raises:
            ValueError: ``model`` is wrapped so that this path cannot serve it.
        """
        is_ddp = isinstance(model, DistributedDataParallel)
        if self._listens_to_ddp not in (None, is_ddp):
            raise ValueError(
                "one optimizer cannot be attached to a DistributedDataParallel module and to a plain one. "
                "Wrap both or neither, or give each an optimizer."
            )
        self._listens_to_ddp = is_ddp
        if isinstance(model, DistributedDataParallel):
            if self.into_shard:
                raise ValueError(
                    "reduce_every_backward=True is for a module without DistributedDataParallel, which keeps whole "
                    "gradients whatever is done: it would only send more. Attach the plain module, or leave it False."
                )
            if not self._can_put_aside(model):
                self._listen_to_buckets(model)
                model.register_forward_pre_hook(_Weak(self, "_before_forward"))
                return
            self._put_aside(model)
        self._ddp_only = self._buffers_are_gradients = False
        self._listen_to_parameters([p for p in model.parameters() if p.requires_grad and id(p) in self.ids()])
        model.register_forward_pre_hook(_Weak(self, "_before_forward"))
        model.register_forward_hook(_Weak(self, "_after_forward"))
        if not hasattr(model, "no_sync"):  # Accelerate's accumulate() asks for it
            model.no_sync = _Weak(self, "no_sync")  # type: ignore[assignment]

    def _can_put_aside(self, model: DistributedDataParallel) -> bool:
        """Whether nothing is left to do for DDP's reducer: every gradient is this optimizer's."""
        params = [param for param in model.parameters() if param.requires_grad]
        return (
            not hasattr(model, _HOOK)
            and not (model.static_graph or model.mixed_precision is not None)
            # Else a reducer that is woken writes its copies over the averages.
            and model.gradient_as_bucket_view
            and all(param.device.type in _ASIDE and id(param) in self.ids() for param in params)
        )

    def _put_aside(self, model: DistributedDataParallel) -> None:
        """Let every backward pass of ``model`` be one inside ``no_sync`` to DDP itself."""
        self._aside.append(weakref.ref(model))
        model.register_forward_pre_hook(_Weak(self, "_before_ddp"))
        model.register_forward_hook(_Weak(self, "_after_ddp"), always_call=True)
        # For who wakes the reducer nevertheless, as accelerator.trigger_sync_in_backward does.
        model.register_comm_hook(None, lambda state, bucket: _done(bucket.buffer()))

    def _before_ddp(self, module: DistributedDataParallel, args: Any) -> None:
        self._asked[id(module)] = module.require_backward_grad_sync
        module.require_backward_grad_sync = False

    def _after_ddp(self, module: DistributedDataParallel, args: Any, output: Any) -> None:
        asked = module.require_backward_grad_sync = self._asked.pop(id(module), True)
        if torch.is_grad_enabled():  # so that the next forward pass broadcasts buffers
            module.require_forward_param_sync = asked

    @property
    def synchronises(self) -> bool:
        """Whether a backward pass sends gradients now: not inside ``no_sync``."""
        return self._synchronises and all(
            model.require_backward_grad_sync for ref in self._aside if (model := ref()) is not None
        )

    def _listen_to_buckets(self, model: DistributedDataParallel) -> None:
        hook: _DDPHook | None = getattr(model, _HOOK, None)
        if hook is None:
            hook = _DDPHook(model)
            setattr(model, _HOOK, hook)
            # DDP insists on the name, and refuses an annotation that is text.
            model.register_comm_hook(hook, lambda state, bucket: state.reduce(bucket))
        hook.add(self)
        self._hooks.append(hook)
        self._buffers_are_gradients = self._buffers_are_gradients and model.gradient_as_bucket_view

    def _listen_to_parameters(self, params: list[Tensor]) -> None:
        """Hear of gradients as they come, without Python having to run for each of thousands of small ones."""
        # Bounded, because the module may outlive the optimizer.
        inbox: deque[Tensor] = deque(maxlen=len(params))
        self._inboxes.append(inbox)
        look, enter = _Weak(self, "_look_into_inboxes"), inbox.append
        quiet = _LOOK_EVERY
        for param in reversed(params):
            quiet += param.numel()
            looks = quiet >= _LOOK_EVERY or param is params[0]
            param.register_post_accumulate_grad_hook(look if looks else enter)  # type: ignore[no-untyped-call]
            if looks:
                quiet = 0

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backward passes inside only accumulate, as with DDP's method of that name."""
        before, self._synchronises = self._synchronises, False
        try:
            yield
        finally:
            self._synchronises = before
            self._empty_inboxes()

    def ids(self) -> set[int]:
        """Of every parameter of the optimizer."""
        params = self._params()
        if len(params) != len(self._ids):  # parameters are only ever added
            self._ids = {id(param) for param in params}
        return self._ids

    # ---------------------------------------------------------------- during backward

    def _look_into_inboxes(self, param: Tensor) -> None:
        """Launch what has become ready. Hung on some parameters; the others only enter themselves."""
        if not (self.synchronises or self.into_shard):
            return
        if not self._queued:
            self.begin()
        self._heard = True
        self._enter(param)
        if self.overlap:
            self._launch_ready()

    def _enter(self, *params: Tensor) -> None:
        """Take ``params`` and those in the inboxes off the lists of what is waited for."""
        arrived = {id(param): param for param in (*params, *itertools.chain(*self._inboxes))}
        self._empty_inboxes()
        for members in self._plan.members[: self._next]:
            if not members.isdisjoint(arrived):
                raise _too_late(arrived[members.intersection(arrived).pop()])
        for waiting in self._waiting[self._next :]:
            waiting.difference_update(arrived)
        self._filled.difference_update(arrived)

    def _empty_inboxes(self) -> None:
        for inbox in self._inboxes:
            inbox.clear()

    def _forget_arrivals(self) -> None:
        """Nothing has come, and there is nothing to watch."""
        self._empty_inboxes()
        self._buffers.clear()
        self._watched, self._expected_version = [], 0

    def arrived(self, packed: _Packed) -> None:
        """The gradients of one of DDP's buckets are there; launch what can be. Collective."""
        if packed.plan is not self._plan:
            packed.enter(self._plan)
        if packed.buckets and packed.buckets[0] < self._next:
            raise _too_late(packed.params[0])
        for shard, i, flat in packed.places:
            self._flat[id(shard)][i] = flat
        for n in packed.buckets:
            self._waiting[n] -= packed.keys
        if self.overlap:
            self._launch_ready()

    def _launch_ready(self) -> None:
        while self._next < len(self._waiting) and not self._waiting[self._next]:
            self._launch()

    def _launch_rest(self) -> None:
        """Send what has not been sent, zeros for gradients that are not there.

        At the end of every backward, so that no rank waits for what another one sends only when it updates.
        """
        self._follow_layout()
        self._enter()
        for param in self._params():
            if param.grad is None and id(param) in self._plan.buckets_of:
                param.grad = torch.zeros_like(param)
                self._filled.add(id(param))
        while self._next < len(self._plan.order):
            self._launch()

    def begin(self) -> None:
        """Once in a backward, before its first gradient: follow the layout, and have autograd call when it is over."""
        self._queued, self._heard = True, False
        torch.autograd.Variable._execution_engine.queue_callback(self._after_backward)
        self._follow_layout()

    @torch.no_grad()
    def _after_backward(self) -> None:
        self._queued = False
        if not (self._heard or self._ddp_only or any(self._inboxes)):
            return  # torch.autograd.grad, of an input say: no gradient is to be sent yet
        if self.into_shard:
            self._finish_round()
            return
        if self.overlap and not self._ddp_only:
            self._launch_rest()
        self._land()
        # DDP may have its own to do now, so this comes last.
        torch.autograd.Variable._execution_engine.queue_callback(self._watch)

    def _watch(self) -> None:
        """Remember the gradients as they are, to see whether somebody changes them."""
        self._watched = list(self._buffers)
        if not self._buffers_are_gradients:
            self._watched += [grad for param in self._params() if (grad := param.grad) is not None]
        self.accept_changes()
        self._tell_siblings()

    def _tell_siblings(self) -> None:
        """Other optimizers' gradients lie in the same buffers."""
        for hook in self._hooks:
            for path in hook.paths():
                if path is not self:
                    path.accept_changes()

    # ---------------------------------------------------------------- rounds

    def _begin_round(self) -> None:
        self._next = 0
        self._waiting = [set(members) for members in self._plan.members]
        self._checked = False  # whether the plan is known to be that of the shards

    def _follow_layout(self) -> None:
        """At the first gradient of a round: plan anew where shards have changed."""
        if self._checked:
            return
        self._checked = True
        shards = self._shards()
        if len(shards) != len(self._plan.shards) or any(map(operator.is_not, shards, self._plan.shards)):
            self._plan = _Plan(shards)
            self._flat = {id(shard): [None] * len(shard.params) for shard in shards}
            self._begin_round()
            self._checked = True

    def _launch(self) -> None:
        """Send the next bucket."""
        shard, k = self._plan.order[self._next]
        if not self._ddp_only:
            flat = self._flat[id(shard)]
            places = self._plan.places[self._next]
            for i, param, is_flat in places:  # autograd gives a gradient the strides of its parameter
                grad = param.grad
                flat[i] = grad if is_flat or grad is None else storage_order(grad, like=param)
            if self.into_shard:
                self._seen.update(id(param) for i, param, _ in places if flat[i] is not None)
        self._next += 1
        self._start(shard, k)

    @torch.no_grad()
    def _start(self, shard: Shard, k: int) -> None:
        assert shard.exchange is not None
        if len(self._travelling) == UNDER_WAY:
            self._land(1)
        self._travelling.append((shard, shard.exchange.start_reduce(k, self._flat[id(shard)])))

    @torch.no_grad()
    def _land(self, count: int | None = None) -> None:
        """Wait for the oldest ``count`` buckets, default all, and average them."""
        while self._travelling and count != 0:
            shard, sent = self._travelling.popleft()
            assert shard.exchange is not None
            if self.into_shard:
                into = shard.flat_grads(sent.bucket)
                shard.exchange.finish_reduce(sent, into, add=self._rounds > 0)
                shard.reduced[sent.bucket] = list(into)
                self._let_go(shard, sent.bucket)
            else:
                shard.exchange.finish_reduce(sent, None)
                shard.reduced[sent.bucket] = sent.own
            count = None if count is None else count - 1

    def _let_go(self, shard: Shard, k: int) -> None:
        """Free the gradients that no later bucket needs. The last bucket is sent first."""
        for piece in shard.layout.pieces(*shard.layout.bucket(k)):
            if piece.start == 0:
                shard.params[piece.param].grad = None
                self._flat[id(shard)][piece.param] = None

    def _finish_round(self) -> None:
        """Into the shard: send what has not been sent, zeros for gradients that are not there."""
        self._follow_layout()
        while self._next < len(self._plan.order):
            self._launch()
        self._land()
        self._rounds += 1
        self._begin_round()

    # ---------------------------------------------------------------- around backward

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _before_forward(self, module: nn.Module, args: Any) -> None:
        """A forward pass that will have a backward begins."""
        if not torch.is_grad_enabled():
            return
        if isinstance(module, DistributedDataParallel) and module._join_config.enable:
            raise RuntimeError(
                "DistributedDataParallel.join() is not supported after DistAdamW.attach(): a rank that has run out of "
                "data would not send its gradients. Give ranks equally many batches (dist_adamw.prepare does), or do "
                "without attach()."
            )
        with torch.no_grad():
            if self._queued:  # the last backward was broken off
                self._queued = False
                self._land()
            self._forget_arrivals()
            if self._next and not self.into_shard:
                if any(param.grad is not None for param in self._params()):
                    self._reopen()
                else:
                    self.discard()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _after_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        """Hear of the beginning of the backward pass, in the graph task that ends with it.

        A parameter's hook may run in a smaller one, that of a segment checkpointed with use_reentrant=True.
        """
        if torch.is_grad_enabled():
            for leaf in tree_leaves(output):
                if isinstance(leaf, Tensor) and leaf.requires_grad:
                    leaf.register_hook(_Weak(self, "_backward_begins"))  # type: ignore[no-untyped-call]

    def _backward_begins(self, grad: Tensor) -> None:
        if not self._queued:
            self._empty_inboxes()  # of a backward pass inside DDP's no_sync
            if self.synchronises or self.into_shard:
                self.begin()

    def _reopen(self) -> None:
        """Averages that no update has used yet become sums of local gradients again, to be added to.

        The owner keeps W times the average and the others keep zero, so that one more round adds
        what is new, and nothing is counted twice.
        """
        for shard, k in self._plan.order[: self._next]:
            assert shard.exchange is not None
            for r in range(shard.layout.world_size):
                for piece in shard.layout.pieces(*shard.layout.slice_of(k, r)):
                    param = shard.params[piece.param]
                    if param.grad is None:
                        continue
                    run = storage_order(param.grad, like=param)[piece.start : piece.stop]
                    if r == shard.rank:
                        run.mul_(shard.exchange.count)
                    else:
                        run.zero_()
            shard.reduced.clear()
        self._reopened = True
        self._begin_round()

    def discard(self) -> None:
        """Forget gradients that arrived: they are not wanted. Every rank alike."""
        self._queued = False
        self._land()  # left over from a backward that was broken off
        self.used()
        self._begin_round()

    def used(self) -> None:
        """An update has been made of the gradients. Until they are set to zero or None, they are averages."""
        self._rounds = 0
        self._filled.clear()
        self._reopened = False
        self._seen.clear()
        self._forget_arrivals()
        # DDP's buckets stay once it has packed them anew; other gradients must not be kept alive.
        stay = self._ddp_only and all(hook.forget_unless_settled() for hook in self._hooks)
        for shard in self._plan.shards:
            shard.reduced.clear()
            if not stay:
                self._flat[id(shard)] = [None] * len(shard.params)
        if self.into_shard:
            self._begin_round()
        self._tell_siblings()

    def forget_layout(self) -> None:
        """The shards are not what they were. Local."""
        self.discard()
        self._plan, self._flat = _Plan([]), {}
        self._begin_round()

    # ---------------------------------------------------------------- for the update

    def check_untouched(self) -> None:
        """Refuse gradients that were changed between backward and update.

        Raises:
            RuntimeError: says what to do instead.
        """
        if self._version() != self._expected_version:
            raise RuntimeError(
                "gradients were changed between backward and step(). After attach() each rank has the average of "
                "its own elements only, so a norm taken there is not the model's, and ranks would clip or unscale "
                "differently. Pass max_grad_norm to DistAdamW, use its clip_grad_norm_ (after dist_adamw.prepare "
                "accelerator.clip_grad_norm_ is that), or do without attach(): then DDP's all-reduce leaves whole "
                "averages. GradScaler needs that too."
            )

    def complete(self, group: dist.ProcessGroup, replicas: dist.ProcessGroup | None) -> bool:
        """Make sure that every rank has every gradient that some rank has. Collective.

        Returns:
            Whether there is any.
        """
        params = self._params()
        if self._ddp_only:  # DDP has seen to it
            return any(param.grad is not None for param in params)
        if self.overlap and not self.into_shard and not self._next and not self._reopened:
            self._launch_rest()  # nothing arrived here, but other ranks may be waiting in backward
            self._land()
        seen = self._seen if self.into_shard else set()
        present = [(param.grad is not None and id(param) not in self._filled) or id(param) in seen for param in params]
        leftover = self.into_shard and any(param.grad is not None for param in params)
        # Most updates have all gradients on all ranks, and then three numbers say so.
        missing = any(param.requires_grad for param, there in zip(params, present, strict=True) if not there)
        numbers = [self._rounds + leftover, missing, self._reopened]
        self._needed, incomplete, reopened = self._largest(numbers, params, group, replicas)
        if reopened and not self._reopened:  # another rank ran the module forward since backward
            self._reopen()
        if incomplete:
            present = [bool(n) for n in self._largest(present, params, group, replicas)]
        for param, is_used in zip(params, present, strict=True):
            if not is_used:
                if id(param) in self._filled:
                    param.grad = None
                continue
            if self.into_shard:
                self._seen.add(id(param))
            if param.grad is None and (not self.into_shard or id(param) not in self._plan.buckets_of):
                param.grad = torch.zeros_like(param)
        return any(present)

    @staticmethod
    def _largest(
        values: Sequence[int], params: list[Tensor], group: dist.ProcessGroup, replicas: dist.ProcessGroup | None
    ) -> list[int]:
        """The largest of each value over all ranks. Collective."""
        device = params[0].device if dist.get_backend(group) != "gloo" else torch.device("cpu")
        largest = torch.tensor(values, dtype=torch.int32, device=device)
        for ranks in (group, replicas):
            if ranks is not None:
                dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=ranks)
        return [int(n) for n in largest.tolist()]

    def arrive(self) -> None:
        """Send and receive whatever has not been yet. Collective; after `complete` and the layout."""
        if self.into_shard:
            while self._rounds < self._needed:
                self._finish_round()
            for shard in self._plan.shards:
                shard.has_grad = [id(param) in self._seen for param in shard.params]
            return
        rest = self._plan.order[self._next :]
        planned = {id(shard) for shard in self._plan.shards}
        for shard in self._shards():
            if id(shard) not in planned:  # laid out just now
                rest += [(shard, k) for k in range(shard.layout.num_buckets)]
        for shard in {id(shard): shard for shard, _ in rest}.values():
            self._flat[id(shard)] = [None if p.grad is None else storage_order(p.grad, like=p) for p in shard.params]
        for shard, k in rest:
            if any(param.grad is not None for param in shard.members(k)):
                self._start(shard, k)
        self._land()
        if len(planned) < len(self._shards()):
            self._plan = _Plan(self._shards())
        self._next = len(self._plan.order)
        self.accept_changes()
        self._tell_siblings()

    def accept_changes(self) -> None:
        """Gradients may be what they are now."""
        self._expected_version = self._version()

    def _version(self) -> int:
        """A number that grows whenever one of the gradients that are watched is written to."""
        return sum([grad._version for grad in self._watched])


def _too_late(param: Tensor) -> RuntimeError:
    return RuntimeError(
        f"a gradient of shape {tuple(param.shape)} arrived after it had been sent to its owner: two backward passes "
        "without a forward pass of the attached module between them, or a parameter used in several checkpointed "
        "segments (use_reentrant=True). Accumulate inside no_sync(), or pass overlap=False to attach()."
    )


def _done(buffer: Tensor) -> torch.futures.Future[Tensor]:
    """What DDP wants of a communication hook, where nothing is left to wait for."""
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(buffer)
    return done


class _Packed:
    """What one of DDP's buckets holds for one path; good until DDP packs anew."""

    def __init__(self, params: list[Tensor], flat: list[Tensor]) -> None:
        self.params, self._flat = params, flat  # 1-D views of the buffer
        self.keys = {id(param) for param in params}
        self.plan: _Plan | None = None

    def enter(self, plan: _Plan) -> None:
        """Find the places of its parameters in ``plan``."""
        self.plan = plan
        self.places = [
            (*plan.place_of[id(param)], flat)
            for param, flat in zip(self.params, self._flat, strict=True)
            if id(param) in plan.place_of
        ]
        self.buckets = sorted({n for key in self.keys for n in plan.buckets_of.get(key, ())})


class _DDPHook:
    """Leaves DDP's reduction out: hands a bucket's gradients to the paths of their optimizers.

    Gradients that no path is responsible for are averaged here, as DDP would have.
    """

    def __init__(self, model: DistributedDataParallel) -> None:
        self._group: dist.ProcessGroup = model.process_group
        self._is_view: bool = model.gradient_as_bucket_view
        self._known: dict[int, tuple[int, list[Tensor], dict[int, _Packed], list[Tensor]]] = {}
        self._seen: dict[int, tuple[int, ...]] = {}  # addresses and parameters of each bucket, when it was last new
        self._settled: dict[int, bool] = {}  # whether each was the same the time before
        self._paths: list[weakref.ref[GradientPath]] = []

    def add(self, path: GradientPath) -> None:
        """Serve ``path`` too."""
        self._paths.append(weakref.ref(path))
        self._known.clear()

    def forget_unless_settled(self) -> bool:
        """Let go of buckets that DDP may be about to replace; whether they are there to stay."""
        settled = all(self._settled.values())
        if not settled:
            self._known.clear()
        return settled

    def paths(self) -> list[GradientPath]:
        """Those that still exist."""
        return [path for ref in self._paths if (path := ref()) is not None]

    def reduce(self, bucket: Any) -> torch.futures.Future[Tensor]:
        """Serve one ``dist.GradBucket``."""
        buffer: Tensor = bucket.buffer()
        paths = {id(path): path for path in self.paths()}
        packed, foreign = self._look(bucket, buffer, paths)
        for key, path in paths.items():
            if not path._queued:
                path.begin()
            if self._is_view:  # else DDP copies the buffer to the gradients when backward is over
                path._buffers.append(buffer)
                path.arrived(packed[key])
        if foreign:
            together = torch.cat(foreign).div_(dist.get_world_size(self._group))
            dist.all_reduce(together, group=self._group)
            torch._foreach_copy_(foreign, list(torch.split(together, [grad.numel() for grad in foreign])))
        return _done(buffer)

    def _look(
        self, bucket: Any, buffer: Tensor, paths: dict[int, GradientPath]
    ) -> tuple[dict[int, _Packed], list[Tensor]]:
        """What each path gets of a bucket, and what nobody takes."""
        index, params = bucket.index(), bucket.parameters()
        if (known := self._known.get(index)) is not None:
            address, last, packed, foreign = known
            if (
                address == buffer.data_ptr()
                and len(last) == len(params)
                and all(map(operator.is_, last, params))
                and packed.keys() == paths.keys()
            ):
                return packed, foreign
        seen = (buffer.data_ptr(), *map(id, params))
        self._settled[index] = self._seen.get(index) == seen
        self._seen[index] = seen
        # These are contiguous views, whatever a parameter's strides: elements are in memory order.
        rest = [(param, grad.view(-1)) for param, grad in zip(params, bucket.gradients(), strict=True)]
        packed = {}
        for key, path in paths.items():
            mine = [(param, grad) for param, grad in rest if id(param) in path.ids()]
            rest = [(param, grad) for param, grad in rest if id(param) not in path.ids()]
            packed[key] = _Packed([param for param, _ in mine], [grad for _, grad in mine])
        self._known[index] = (buffer.data_ptr(), params, packed, [grad for _, grad in rest])
        return packed, self._known[index][3]


class _Weak:
    """A method to be hung on a model: the model does not keep the optimizer, nor does a copy of it find it."""

    def __init__(self, path: GradientPath | None, method: str) -> None:
        self._path = weakref.ref(path) if path is not None else None
        self._method = method

    def __call__(self, *args: Any) -> Any:
        path = self._path() if self._path is not None else None
        if path is None:
            return nullcontext() if self._method == "no_sync" else None
        return getattr(path, self._method)(*args)

    def __deepcopy__(self, memo: Any) -> _Weak:
        return _Weak(None, self._method)

    def __reduce__(self) -> Any:
        return _Weak, (None, self._method)
