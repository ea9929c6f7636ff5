"""Send each bucket of gradients to its owners during backward, as soon as it is complete.

Knows shards, modules and autograd's hooks; ``adamw.py`` asks for the result.

Glossary:
    round      every bucket sent once; in_place there is one to an update, into the shard one to a backward
    launch     begin to send a bucket
    listened   a parameter whose gradient a hook announces, because its module is attached
    others     the optimizer's other parameters: of a DDP module that is not attached, say

Buckets are launched in one fixed order, last parameters first, whatever order gradients come in,
so that every rank sends alike; a bucket is launched during backward when its last gradient is
there and the bucket before it has gone. What others have for a gradient is looked at in ``step`` and not before: until
then a DDP module that they belong to may not have averaged it. There it is taken as it is where all ranks have
the same bits, and averaged where they differ.
"""

from __future__ import annotations

import functools
import itertools
import operator
import weakref
from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator, Sequence, Set
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from dist_adamw.optimizer.gradients.ddp import DDPReducer, PackedBucket
from dist_adamw.optimizer.gradients.hooks import NoSync, WeakHook, remove
from dist_adamw.optimizer.gradients.messages import ACCEPTED, CHANGED, NOT_CHANGED, Agreed, RankMessages, UpdateReport
from dist_adamw.optimizer.gradients.paths import gather_from_owners, live_paths, take_over
from dist_adamw.optimizer.gradients.plan import Plan
from dist_adamw.optimizer.gradients.refusals import (
    accepted_local,
    changed,
    dropped_alone,
    left_before_backward,
    too_late,
)
from dist_adamw.optimizer.gradients.watch import GradientWatch, mark_parts
from dist_adamw.optimizer.sharding.fingerprints import fingerprints
from dist_adamw.optimizer.sharding.shard import Shard
from dist_adamw.optimizer.transport.base import MAX_IN_FLIGHT, InFlightBucket
from dist_adamw.ranks import agreement

_LOOK_EVERY = 1 << 18  # elements: as many as make a message worth sending
_gradient, _requires_grad = operator.attrgetter("grad"), operator.attrgetter("requires_grad")


class GradientPath:
    """The reduction of gradients to their owners that `DistAdamW.attach` installs.

    Args:
        params: The optimizer's method that gives every parameter, in order.
        shards: Its method that gives the shards, and builds them if there are none yet.
        gather: Its method that makes every gradient whole. Collective.
        overlap: Launch during backward.
        into_shard: Keep averages in flat memory of the shards, and let go of ``param.grad``.

    Attributes:
        listening: Ids of the parameters that this path listens to; replaced when they change.
        is_whole: Whether every ``param.grad`` is the average over all ranks, to be taken as it is.
        asks_for_changes: Whether the last `complete` has asked all ranks if there are changes.
        messages: Tells other ranks what this one is about to do.
    """

    def __init__(
        self,
        params: Callable[[], list[Tensor]],
        shards: Callable[[], list[Shard]],
        gather: Callable[[], None],
        *,
        overlap: bool,
        into_shard: bool,
    ) -> None:
        _exclude_from_compilation()
        # The optimizer owns the path: a strong reference back would leave both to the garbage collector, and
        # with them the process group, perhaps until the interpreter ends.
        self._params_ref, self._shards_ref = weakref.WeakMethod(params), weakref.WeakMethod(shards)
        self._gather_ref = weakref.WeakMethod(gather)
        self.overlap, self.into_shard = overlap, into_shard
        self.listening: Set[int] = frozenset()
        self.is_whole = False
        self.asks_for_changes = False
        self._hook_of: dict[int, RemovableHandle | None] = {}  # by id of parameter; None where DDP's bucket tells
        self._module_hooks: list[RemovableHandle] = []
        weakref.finalize(self, _remove_all, self._hook_of, self._module_hooks).atexit = False
        self._modules: list[weakref.ref[nn.Module]] = []
        self._reducers: list[weakref.ref[DDPReducer]] = []
        self._synchronises = True  # False inside no_sync
        self._heard = False  # whether this backward pass has reached a parameter
        self._listens_to_ddp: bool | None = None
        self._ddp_only = True  # DDP's buckets tell of every gradient
        self._are_copied = False  # DDP writes some gradients when backward is over, from its own buffers
        self._known: list[Tensor] = []  # the optimizer's parameters, when `follow_params` last looked
        self._ids: Set[int] = frozenset()
        self._inboxes: list[deque[Tensor]] = []  # by plain module: parameters whose gradient has come
        self._last: list[Tensor] = []  # the parameter at which a hook last looked
        self._plan = Plan([], self.listening)
        self._next = 0  # the next bucket of the plan to be sent
        self._owners: list[Shard] = []  # by which averages are shared out: the plan's, or those of the last `arrive`
        self._others_of: tuple[Plan, list[Tensor]] | None = None
        self._others: list[Tensor] = []
        self._flat: dict[int, list[Tensor | None]] = {}  # by id of shard: what it sends
        self._in_flight: deque[tuple[Shard, InFlightBucket]] = deque()
        self._queued = False  # whether autograd will call _after_backward
        self._rounds = 0  # into the shard: since the last update
        self._filled: set[int] = set()  # ids of parameters that got zeros for a gradient
        self._reopened = False  # whether averages have become sums again since the last update
        self._seen: set[int] = set()  # ids of parameters with a gradient since the last update
        self._watch = GradientWatch()
        self._was_changed = False  # seen by a forward pass; `complete` tells all ranks
        self._local: set[int] = set()  # ids of others whose gradients were seen to differ over ranks
        self._accepted = False  # whether a change was accepted before others were looked at
        self._are_sorted = False  # whether others have been looked at since the last backward
        self._late: set[int] = set()  # ids of others that have been averaged since they were last set to zero
        self._kept: set[int] = set()  # into the shard: ids of others whose average is there, and in no ``param.grad``
        self.messages = RankMessages()
        self._has_ended = False
        self._params_changes = 0
        self.has_let_go = False  # whether an update has used gradients that are in no ``param.grad``
        self.used_ids: set[int] = set()  # into the shard: of parameters whose gradient that update let go of
        self._has_begun = False  # whether gradients have come since
        self._before_pass = (False, False, False, False)  # what a pass that brings no gradient leaves as it was
        self._begin_round()

    def __del__(self) -> None:
        self._leave_parts()

    def _leave_parts(self) -> None:
        """Mark gradients of which this rank has only its part: no path will gather them. Local."""
        if self._next and not (self.is_whole or self.into_shard):
            mark_parts(grad for param in self._plan.params if (grad := param.grad) is not None)
        self._next = 0

    @property
    def is_sending(self) -> bool:
        """Whether a backward pass is under way that it has heard of."""
        return self._queued

    def keep_alive(self) -> object:
        """Return an object that keeps the path and its optimizer alive."""
        return self, self._gather_ref()

    def _params(self) -> list[Tensor]:
        params = self._params_ref()
        return [] if params is None else params()

    def _shards(self) -> list[Shard]:
        shards = self._shards_ref()
        return [] if shards is None else shards()

    # ---------------------------------------------------------------- listening

    def listen(self, model: nn.Module) -> None:
        """Hear of the gradients of ``model``, which no other path does then. Local.

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
        self.follow_params()
        params = [param for param in _own_parameters(model) if param.requires_grad and id(param) in self._ids]
        aside = True
        reducer = None
        if isinstance(model, DistributedDataParallel):
            if self.into_shard:
                raise ValueError(
                    "reduce_every_backward=True is for a module without DistributedDataParallel, which keeps whole "
                    "gradients whatever is done: it would only send more. Attach the plain module, or leave it False."
                )
            reducer = DDPReducer.of(model)
            aside = reducer.can_stand_aside(self._ids)
        take_over(self, params)
        if reducer is not None:
            self._reducers.append(weakref.ref(reducer))
        if aside:
            self._listen_to_parameters([param for param in params if self._hook_of.get(id(param)) is None])
        else:
            self._stop_listening({id(param) for param in params if self._hook_of.get(id(param)) is not None})
            self._hook_of.update(dict.fromkeys(map(id, params)))
            self._are_copied = self._are_copied or not model.gradient_as_bucket_view
        self._ddp_only = is_ddp and all(hook is None for hook in self._hook_of.values())
        self._listening_changed()
        if reducer is not None:
            reducer.add(self, aside=aside)
        if all(ref() is not model for ref in self._modules):
            self._listen_to_module(model, aside=aside)

    def _listen_to_module(self, model: nn.Module, *, aside: bool) -> None:
        self._modules.append(weakref.ref(model))
        self._module_hooks.append(model.register_forward_pre_hook(WeakHook(self, "_before_forward")))
        if aside:
            self._module_hooks.append(model.register_forward_hook(WeakHook(self, "_after_forward")))
        no_sync = getattr(model, "no_sync", None)
        if no_sync is None:  # Accelerate's accumulate() asks for it
            no_sync = NoSync()
            model.no_sync = no_sync  # type: ignore[assignment]
        if isinstance(no_sync, NoSync):
            no_sync.add(self)

    def _listen_to_parameters(self, params: list[Tensor]) -> None:
        """Hear of gradients as they come, without Python having to run for each of thousands of small ones."""
        if not params:
            return
        # Bounded, because the module may outlive the optimizer.
        inbox: deque[Tensor] = deque(maxlen=len(params))
        self._inboxes.append(inbox)
        look, enter = WeakHook(self, "_look_into_inboxes"), inbox.append
        quiet = _LOOK_EVERY
        for param in reversed(params):
            quiet += param.numel()
            looks = quiet >= _LOOK_EVERY or param is params[0]
            hook = look if looks else enter
            self._hook_of[id(param)] = param.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
            if looks:
                quiet = 0

    def release(self, ids: Iterable[int]) -> None:
        """Stop listening to these parameters: another path begins to. Collective."""
        self.look_at_siblings()
        if self._next or (self._rounds and not self.has_let_go):  # gradients that were not set to zero
            self.gather_gradients()
        self.discard()
        self._stop_listening(set(ids))

    def _stop_listening(self, ids: Set[int]) -> None:
        remove(hook for key in ids if (hook := self._hook_of.pop(key, None)) is not None)
        self._listening_changed()
        for reducer in self._live_reducers():
            reducer.follow()

    def end(self) -> None:
        """Stop listening and sending: other ranks have let go of the optimizer. Local."""
        self._leave_parts()
        _remove_all(self._hook_of, self._module_hooks)
        self._hook_of.clear()
        self._module_hooks.clear()
        self._listening_changed()
        for reducer in self._live_reducers():
            reducer.drop(self)
        self._reducers, self._modules = [], []
        self._in_flight.clear()
        self.messages.close()
        self._queued, self._has_ended = False, True

    def _listening_changed(self) -> None:
        self.listening = frozenset(self._hook_of)
        self._checked = False

    def follow_params(self) -> None:
        """Notice parameters that have come to the optimizer, or have left it."""
        params = self._params()
        if len(params) == len(self._known) and all(map(operator.is_, params, self._known)):
            return
        self._known, self._ids = params, frozenset(map(id, params))
        self._params_changes += 1
        shapes = [[list(param.shape), str(param.dtype)] for param in params if not is_lazy(param)]
        self.messages.params_changed(agreement.fingerprint({str(self._params_changes): shapes}))
        if gone := self.listening - self._ids:
            self._stop_listening(gone)

    @property
    def synchronises(self) -> bool:
        """Whether a backward pass sends gradients now: not inside ``no_sync``."""
        return self._synchronises and all(
            model.require_backward_grad_sync
            for ref in self._modules
            if isinstance(model := ref(), DistributedDataParallel)
        )

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backward passes inside only accumulate, as with DDP's method of that name."""
        before, self._synchronises = self._synchronises, False
        try:
            yield
        finally:
            self._synchronises = before
            self._empty_inboxes()

    # ---------------------------------------------------------------- during backward

    def _look_into_inboxes(self, param: Tensor) -> None:
        """Launch what has become ready. Hung on some parameters; the others only enter themselves.

        ``param`` itself is entered for the next time: hooks that were registered on it later than this one have not
        run yet, and may change its gradient.
        """
        if not (self.synchronises or self.into_shard):
            self._filled.discard(id(param))
            return
        if not self._queued:
            self.begin()
        self._heard = True
        self._enter()
        if self.overlap:
            self._launch_ready()
        self._last.append(param)

    def _enter(self) -> None:
        """Take the parameters in the inboxes off the lists of what is waited for."""
        params = list(itertools.chain(self._last, *self._inboxes))
        arrived = set(map(id, params))
        self._empty_inboxes()
        for members in self._plan.members[: self._next]:
            if not members.isdisjoint(arrived):
                raise too_late(next(param for param in params if id(param) in members))
        for waiting in self._waiting[self._next :]:
            waiting.difference_update(arrived)

    def _empty_inboxes(self) -> None:
        if self._filled:  # zeros of ours that backward has added to since are the user's gradients
            self._filled.difference_update(map(id, itertools.chain(self._last, *self._inboxes)))
        self._last.clear()
        for inbox in self._inboxes:
            inbox.clear()

    def _forget_arrivals(self) -> None:
        """Clear recorded arrivals and the gradients watched for changes."""
        self._empty_inboxes()
        self._watch.clear()

    def bucket_came(self, packed: PackedBucket | None) -> None:
        """The gradients of one of DDP's buckets are there; launch what can be. Collective."""
        if not self._queued:
            self.begin()
        self.messages.announce_round()  # also where nothing is launched: DDP waits for its ranks when backward is over
        if packed is None:
            return
        if packed.plan is not self._plan:
            packed.enter(self._plan)
        if packed.buckets and packed.buckets[0] < self._next:
            raise too_late(packed.params[0])
        packed.reorder()
        for shard, i, flat in packed.places:
            self._flat[id(shard)][i] = flat
        for n in packed.buckets:
            self._waiting[n] -= packed.keys
        if self.overlap:
            self._launch_ready()

    def _launch_ready(self, *, may_wait: bool = False) -> None:
        """Launch buckets whose gradients are there.

        Args:
            may_wait: Backward is over. Before, gradients of several optimizers, or of DDP's own buckets, may come in
                another order on another rank, and each would wait in one for what the other sends after the other one.
        """
        while self._next < len(self._waiting) and not self._waiting[self._next]:
            if not may_wait and (
                self.messages.is_news or (len(self._in_flight) == MAX_IN_FLIGHT and self._has_company())
            ):
                return
            self._launch()

    def _has_company(self) -> bool:
        """Return whether others send in this backward pass: attached optimizers, or DDP itself."""
        # The buckets of one DDP module fill in the same order on every rank.
        in_order = self._ddp_only and len(self._reducers) == 1
        if not in_order and any(reducer.has_own for reducer in self._live_reducers()):
            return True
        return any(path.is_sending for path in live_paths() if path is not self)

    def _launch_rest(self) -> None:
        """Send what has not been sent, zeros for gradients that are not there.

        At the end of every backward, so that no rank waits for what another one sends only when it updates.
        """
        self._follow_layout()
        self._enter()
        for param in self._plan.params:
            if param.grad is None and id(param) in self._plan.buckets_of:
                param.grad = torch.zeros_like(param)
                self._filled.add(id(param))
        while self._next < len(self._plan.order):
            self._launch()

    def begin(self) -> None:
        """Once in a backward, before its first gradient: follow the layout, and have autograd call when it is over."""
        self._before_pass = (self._has_begun, self.is_whole, self._are_sorted, self.has_let_go)
        self._queued, self._heard, self._has_begun = True, False, True
        self.is_whole = self._are_sorted = self.has_let_go = False
        torch.autograd.Variable._execution_engine.queue_callback(self._after_backward)
        listened = self.listening
        self._follow_layout()
        if (
            self._listens_to_ddp
            and self.listening is not listened
            and not listened <= self._ids
            and self._has_ddp_aside()
        ):
            raise left_before_backward()

    def _has_ddp_aside(self) -> bool:
        """Return whether DDP does not average the gradients of this pass."""
        return any(reducer.stood_aside for reducer in self._live_reducers())

    @torch.no_grad()
    def _after_backward(self) -> None:
        self._queued = False
        if not (self._heard or self._ddp_only or any(self._inboxes) or self._accumulates()):
            # torch.autograd.grad, of an input say: no gradient is to be sent yet
            self._has_begun, self.is_whole, self._are_sorted, self.has_let_go = self._before_pass
            return
        if self.into_shard:
            self._finish_round()
            return
        if self.overlap and self._ddp_only:
            self._launch_ready(may_wait=True)
        elif self.overlap and not self._waits_for_ddp():
            self._launch_rest()
        self._land()
        # DDP may have its own to do now, so this comes last.
        torch.autograd.Variable._execution_engine.queue_callback(self._begin_watch)

    def _finish_broken_pass(self) -> None:
        """Send what a backward pass that raised has left, with the gradients that came before: torch keeps them."""
        self._queued = False
        if self.into_shard:
            self._finish_round()
            return
        if self.overlap and not self._ddp_only:
            self._launch_rest()
        self._land()

    def _waits_for_ddp(self) -> bool:
        """Return whether DDP sets gradients when backward is over, which must be those that it expects to find."""
        if self._are_copied or self._ddp_only:
            return self._are_copied
        return any(not reducer.stood_aside for reducer in self._live_reducers())

    def _accumulates(self) -> bool:
        """Whether the pass that autograd is running adds to ``param.grad`` of some parameter of the attached modules.

        It may reach this optimizer's parameters on another rank alone, which then sends gradients and waits for them.
        """
        for model in filter(None, (ref() for ref in self._modules)):
            for param in model.parameters():
                if param.requires_grad and _will_run(get_gradient_edge(param).node):
                    return True
        return False

    @torch.no_grad()
    def _begin_watch(self) -> None:
        """Remember the gradients as they are, to see whether they are changed before the update."""
        if self.overlap and self._waits_for_ddp():  # it has done its part by now
            if not self._ddp_only:
                self._launch_rest()
            elif all(grad is not None for grad in map(_gradient, self._plan.params)):
                self._start_rest()
            self._land()
        for reducer in self._live_reducers():
            reducer.note_views()
        self._watch.remember(self._watched())
        self._tell_siblings()

    def _watched(self) -> list[Tensor]:
        """The parameters that are listened to; those that came since the last update have no shard yet."""
        if self._ddp_only or len(self._plan.params) == len(self.listening):
            return self._plan.params
        return [param for param in self._known if id(param) in self.listening]

    def _live_reducers(self) -> list[DDPReducer]:
        return [reducer for ref in self._reducers if (reducer := ref()) is not None]

    def _siblings(self) -> list[GradientPath]:
        """Other optimizers' paths whose gradients lie in the same buffers as this one's."""
        return [path for reducer in self._live_reducers() for path in reducer.listeners() if path is not self]

    def look_at_siblings(self) -> None:
        """Note changes of other optimizers' gradients, before this one writes to the buffers that they lie in too."""
        for path in self._siblings():
            path._look_for_changes()

    def _look_for_changes(self) -> None:
        self._was_changed = self._was_changed or (self._watch.changed() and self._any_nonzero())

    def _tell_siblings(self) -> None:
        """Let other optimizers know that this one wrote to the buffers that their gradients lie in too."""
        for path in self._siblings():
            path._watch.accept()

    # ---------------------------------------------------------------- rounds

    def _begin_round(self) -> None:
        self._next = 0
        self._waiting = [set(members) for members in self._plan.members]
        self._checked = False  # whether the plan is known to be that of the shards
        self.messages.begin_round()

    def _follow_layout(self) -> None:
        """At the first gradient of a round: plan again where shards or parameters have changed."""
        if self._checked or self._next:
            return
        self.follow_params()
        shards = self._shards()
        self._checked = True
        if (
            self._plan.listened is not self.listening
            or len(shards) != len(self._plan.shards)
            or any(map(operator.is_not, shards, self._plan.shards))
        ):
            self._plan = Plan(shards, self.listening)
            self._owners = self._plan.shards
            self._flat = {id(shard): [None] * len(shard.params) for shard in shards}
            self._local &= self._ids
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
                flat[i] = grad if is_flat or grad is None else _laid_out(shard, i)
            if self.into_shard:
                self._seen.update(id(param) for i, param, _ in places if flat[i] is not None)
        self._next += 1
        self._start(shard, k)

    @torch.no_grad()
    def _start(self, shard: Shard, k: int) -> None:
        assert shard.transport is not None
        if len(self._in_flight) == MAX_IN_FLIGHT:
            self._land(1)
        self.messages.announce_round()
        if self.messages.is_news:
            self.messages.hear()  # buckets of other sizes would end the process
        self._in_flight.append((shard, shard.transport.start_reduce(k, self._flat[id(shard)])))

    @torch.no_grad()
    def _land(self, count: int | None = None) -> None:
        """Wait for the oldest ``count`` buckets, default all, and average them."""
        self.messages.hear()
        while self._in_flight and count != 0:
            shard, sent = self._in_flight.popleft()
            assert shard.transport is not None
            if self.into_shard:
                into = shard.flat_grads(sent.bucket)
                shard.transport.finish_reduce(sent, into, add=self._rounds > 0)
                shard.reduced[sent.bucket] = list(into)
                self._let_go(shard, sent.bucket)
            else:
                shard.transport.finish_reduce(sent, None)
                shard.reduced[sent.bucket] = sent.own
            count = None if count is None else count - 1

    def announce_save(self) -> None:
        """Raise where a rank does not save with this one. Collective.

        Raises:
            AgreementError: it goes on with training. On every rank.
        """
        self.messages.meet_to_save()

    def announce_change(self) -> None:
        """Raise where another rank has other parameters. Collective.

        Raises:
            AgreementError: names the rank. On every rank.
        """
        self.messages.meet_for_change()

    def announce_round(self) -> None:
        """Raise where another rank is not in a backward pass of the same update. Collective.

        Raises:
            AgreementError: names the rank and what it does. On every rank.
        """
        if self.messages.is_open and self._queued:
            self.messages.announce_round()
            self.messages.hear_all()

    def _let_go(self, shard: Shard, k: int) -> None:
        """Free the gradients that no later bucket needs. The last bucket is sent first."""
        for piece in shard.layout.pieces(*shard.layout.bucket(k)):
            param = shard.params[piece.param]
            if piece.start == 0 and id(param) in self._plan.buckets_of:
                param.grad = None
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
            if not (self._plan.shards or any(map(is_lazy, self._known))):
                self._shards()  # state that is none is refused here: an error in the middle of backward breaks DDP
            # Other ranks may not have changed theirs, and would wait: `complete` tells all of them.
            self._look_for_changes()
            self._forget_arrivals()
            for reducer in self._live_reducers():
                reducer.restore_views()
            if (self._next or self._late) and not self.into_shard:
                if any(param.grad is not None for param in self._known):
                    self._reopen()
                else:
                    self.discard()

    def _any_nonzero(self) -> bool:
        """Whether some gradient is not all zeros. ``model.zero_grad(set_to_none=False)`` is no change to refuse."""
        return any(bool(grad.any()) for grad in map(_gradient, self._known) if grad is not None)

    def _after_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        """Hear of the beginning of the backward pass, in the graph task that ends with it.

        A parameter's hook may run in a smaller one, that of a segment checkpointed with use_reentrant=True.
        """
        if torch.is_grad_enabled():
            for leaf in tree_leaves(output):
                if isinstance(leaf, Tensor) and leaf.requires_grad:
                    leaf.register_hook(WeakHook(self, "_backward_begins"))  # type: ignore[no-untyped-call]

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
        self.look_at_siblings()
        # A parameter that lies in several buckets may have been sent in part.
        launched = {(id(shard), k) for shard, k in self._plan.order[: self._next]}
        is_laid_out_again = set(map(id, self._owners)) != set(map(id, self._plan.shards))  # and all has been sent
        averaged = self._late | self._plan.buckets_of.keys()
        for shard in self._shards():
            assert shard.transport is not None
            for k in range(shard.layout.num_buckets):
                sent = averaged if is_laid_out_again or (id(shard), k) in launched else self._late
                for r in range(shard.layout.world_size):
                    for piece in shard.layout.pieces(*shard.layout.slice_of(k, r)):
                        param = shard.params[piece.param]
                        if param.grad is None or id(param) not in sent:
                            continue
                        run = _laid_out(shard, piece.param)[piece.start : piece.stop]
                        if r == shard.rank:
                            run.mul_(shard.transport.count)
                        else:
                            run.zero_()
            shard.reduced.clear()
        self._reopened = True
        self._late.clear()
        self._begin_round()
        self._tell_siblings()

    def discard(self, *, leave_zeros: bool = False) -> None:
        """Forget gradients that arrived: they are not wanted. Every rank alike; after `look_at_siblings`.

        Args:
            leave_zeros: Put zeros in place of gradients that were let go of: torch counts zeros as a gradient.
        """
        self._queued = False
        self._land()  # left over from a backward that was broken off
        self._empty_inboxes()
        self.has_let_go = False
        self.messages.number += self._has_begun
        for param in self._plan.params if self._filled else ():
            if id(param) in self._filled:  # zeros of ours: without a backward pass that reaches it, it has no gradient
                param.grad = None
        let_go = self.used_ids | self._seen if self.into_shard and leave_zeros else ()
        for param in self._params() if let_go else ():
            if param.grad is None and id(param) in let_go:
                param.grad = torch.zeros_like(param)
        self.used_ids.clear()
        self._clear_round()
        self._late.clear()
        self._are_sorted = self.is_whole = self._was_changed = False
        self._begin_round()

    def used(self) -> None:
        """An update has been made of the gradients. Until they are set to zero or None, they are averages."""
        self.messages.number += 1
        self.has_let_go = self.into_shard and not self.is_whole
        if self.has_let_go:
            self.used_ids = set(self._seen)
        self._clear_round()

    def _clear_round(self) -> None:
        self._rounds = 0
        self._has_begun = self._accepted = False
        self._filled.clear()
        self._reopened = False
        self._seen.clear()
        self._kept.clear()
        self._forget_arrivals()
        # DDP's buckets stay once it has packed them again; other gradients must not be kept alive.
        reducers = self._live_reducers()
        stay = self._ddp_only and all(list(map(DDPReducer.forget_unless_settled, reducers)))  # every one of them
        for shard in self._owners:
            shard.reduced.clear()
        for shard in [] if stay else self._plan.shards:
            self._flat[id(shard)] = [None] * len(shard.params)
        if self.into_shard:
            self._begin_round()
        self._tell_siblings()

    def forget_layout(self) -> None:
        """The shards are not what they were. Local."""
        self.look_at_siblings()
        self.discard()
        self._plan, self._owners, self._flat = Plan([], self.listening), [], {}
        self._begin_round()

    # ---------------------------------------------------------------- for the update

    def complete(
        self,
        group: dist.ProcessGroup,
        replicas: dist.ProcessGroup | None,
        *,
        has_changes: bool,
        options: int,
        check_changes: Callable[[], object],
    ) -> bool:
        """Make sure that every rank has every gradient that some rank has. Collective.

        Args:
            has_changes: Whether the user has changed the optimizer's groups or state, on this rank.
            options: Digest of the hyper-parameters of all groups.
            check_changes: Called on every rank if some rank has changes or other hyper-parameters; raises if ranks
                are not alike.

        Returns:
            Whether there is any.

        Raises:
            RuntimeError: gradients were changed between backward and update, on some rank; or a module is
                inside ``no_sync``. On every rank.
        """
        self._check_may_update()
        self._finish_backward()
        others = self._others_now()
        if others and not self._are_sorted:
            gather_from_owners(self, others)
        subject = others if self._ddp_only else self._known  # DDP has seen to its own
        present = self._present(subject)
        was_changed = self._was_changed or self._watch.changed()
        prints = self._prints(others)
        dropped = self._watch.dropped()
        has_leftover = self.into_shard and any(param.grad is not None for param in self._plan.params)
        report = UpdateReport(
            rounds=self._rounds + has_leftover,
            is_missing=_is_missing(subject, present),
            is_reopened=self._reopened,
            change=CHANGED if was_changed else ACCEPTED if self._accepted else NOT_CHANGED,
            has_changes=has_changes,
            prints=agreement.fingerprint({"": prints}) if any(prints) else 0,
            options=options,
            # Of a frozen parameter nothing is missing, but ranks may differ in whether it has one.
            pattern=0 if all(present) else agreement.fingerprint({"": present}),
            dropped=agreement.fingerprint({"": dropped}) if dropped else 0,
        )
        agreed = self._agree(report, others, group, replicas)
        self._needed = agreed.rounds
        if (agreed.has_changes or agreed.options_differ) and self.asks_for_changes:
            check_changes()
        if agreed.change == CHANGED:
            raise changed(on_this_rank=was_changed)
        if agreed.dropped_differ:
            raise dropped_alone(len(dropped))
        if agreed.is_reopened and not self._reopened:  # another rank ran the module forward since backward
            self._reopen()
        is_incomplete = agreed.is_missing or agreed.patterns_differ
        if is_incomplete:
            present = [bool(n) for n in self._largest(present, group, replicas)]
        if agreed.prints_differ:
            self._sort(others, prints, group, replicas)
        if agreed.change and self._uses_local(subject, present):
            raise accepted_local()
        self._are_sorted = True
        # Without anything filled, shared out or missing, every gradient is there.
        if self.into_shard or is_incomplete or self._filled:
            self._fill_in(subject, present)
        return any(present) or (self._ddp_only and any(grad is not None for grad in map(_gradient, self._known)))

    def _check_may_update(self) -> None:
        """Raise where gradients have not been averaged, and will not be."""
        if self._has_ended:
            raise RuntimeError(
                "step() of an optimizer that other ranks have let go of: another one has been attached to its module "
                "since. Keep both on every rank, or neither."
            )
        if not self.synchronises and (self.into_shard or not self._next):
            raise RuntimeError(
                "step() inside no_sync(): this update's gradients have not been averaged, and an optimizer whose state "
                "is shared over the ranks cannot update each rank by itself. Leave no_sync() before the last backward "
                "pass of an update. For local SGD (Accelerate's LocalSGD) pass shard=False to DistAdamW, and "
                "check_weights_every=0 to dist_adamw.prepare."
            )

    def _finish_backward(self) -> None:
        """Send what other ranks may be waiting for. Collective."""
        if self._queued:  # the last backward pass raised: other ranks have sent all buckets of theirs
            self._finish_broken_pass()
        self.follow_params()
        self.look_at_siblings()
        if self._ddp_only:
            return
        if self.overlap and not self.into_shard and not self._next and not self._reopened:
            self._launch_rest()  # nothing arrived here, but other ranks may be waiting in backward
            self._land()
        else:
            self._follow_layout()

    def _present(self, params: Sequence[Tensor]) -> list[bool]:
        """Which of ``params`` have a gradient of the user's: in the shard, or there and not zeros of ours."""
        present = [grad is not None for grad in map(_gradient, params)]
        seen = self._seen if self.into_shard else set()
        if not (seen or self._filled):
            return present
        return [
            (there and id(param) not in self._filled) or id(param) in seen
            for param, there in zip(params, present, strict=True)
        ]

    def _agree(
        self,
        report: UpdateReport,
        others: list[Tensor],
        group: dist.ProcessGroup,
        replicas: dist.ProcessGroup | None,
    ) -> Agreed:
        """Combine the ranks' reports. Without a channel, where DDP has every gradient, none is needed. Collective."""
        self.asks_for_changes = True
        if self.messages.is_open:
            numbers = self.messages.exchange_reports(report)
            if replicas is not None:
                numbers = self._largest(numbers, replicas, None)
        elif not self._ddp_only or any(map(_requires_grad, others)):
            numbers = self._largest(report.numbers(), group, replicas)
        else:
            self.asks_for_changes = False
            numbers = report.numbers()
        return Agreed.of(numbers)

    def _uses_local(self, params: Sequence[Tensor], present: Sequence[bool]) -> bool:
        """Return whether some gradient that is used is a local one, of a parameter that no bucket is sent for."""
        return any(
            is_used and id(param) in self._local and id(param) not in self._plan.buckets_of
            for param, is_used in zip(params, present, strict=True)
        )

    def _fill_in(self, params: Sequence[Tensor], present: Sequence[bool]) -> None:
        """Give zeros to parameters that have a gradient on other ranks alone; take ours from those without any."""
        for param, is_used in zip(params, present, strict=True):
            if not is_used:
                if id(param) in self._filled:
                    param.grad = None
                continue
            if self.into_shard:
                self._seen.add(id(param))
            is_in_shard = self.into_shard and (id(param) in self._plan.buckets_of or id(param) in self._kept)
            if param.grad is None and not is_in_shard:
                param.grad = torch.zeros_like(param)

    def _others_now(self) -> list[Tensor]:
        """The parameters that have elements, and that no bucket is sent for."""
        if self._others_of is None or self._others_of[0] is not self._plan or self._others_of[1] is not self._known:
            self._others_of = (self._plan, self._known)
            self._others = [p for p in self._known if id(p) not in self._plan.buckets_of and p.numel()]
        return self._others

    def _prints(self, others: list[Tensor]) -> list[int]:
        """Fingerprints of gradients that may be the same on all ranks, 0 where there is none or it is known."""
        if self._are_sorted or not others:
            return []
        asked = [i for i, param in enumerate(others) if param.grad is not None and id(param) not in self._local]
        prints = [0] * len(others)
        for i, value in zip(asked, fingerprints([others[i].grad for i in asked]), strict=True):  # type: ignore[misc]
            prints[i] = value >> 2 | 1
        return prints

    def _sort(
        self, others: list[Tensor], prints: list[int], group: dist.ProcessGroup, replicas: dist.ProcessGroup | None
    ) -> None:
        """Find out whose gradients differ over ranks: those are local ones. Collective."""
        prints = prints or [0] * len(others)
        extremes = self._largest([*prints, *(-value for value in prints)], group, replicas)
        most, minus_least = extremes[: len(others)], extremes[len(others) :]
        self._local.update(
            id(param) for param, high, low in zip(others, most, minus_least, strict=True) if high != -low
        )

    def _largest(
        self, values: Sequence[int], group: dist.ProcessGroup, replicas: dist.ProcessGroup | None
    ) -> list[int]:
        """The largest of each value over all ranks. Collective."""
        device = self._known[0].device if dist.get_backend(group) != "gloo" else torch.device("cpu")
        largest = torch.tensor(values, dtype=torch.int64, device=device)
        for ranks in (group, replicas):
            if ranks is not None:
                dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=ranks)
        return [int(n) for n in largest.tolist()]

    def arrive(self) -> None:
        """Send and receive whatever has not been yet. Collective; after `complete` and the layout."""
        is_averaged = bool(self._next or self._rounds or self._late or self._kept)
        if not is_averaged:  # nothing has been sent by the places that parameters had
            self._checked = False
            self._follow_layout()
        shards = self._shards()
        laid_out_again = not {id(shard) for shard in self._owners} <= {id(shard) for shard in shards}
        if not self.into_shard:
            self._start_rest()
            self._land()
        elif not laid_out_again:
            while self._rounds < self._needed:
                self._finish_round()
        # What has been averaged. Others may have whole gradients that another optimizer still needs.
        sent = self._plan.buckets_of.keys() | self._late | self._kept
        if laid_out_again and is_averaged:  # other ranks own it now
            for shard in self._owners if self.into_shard else ():
                shard.has_grad = [id(param) in self._seen and id(param) in sent for param in shard.params]
            self.make_whole(self._owners, sent)
            self.is_whole = False
            self._next = len(self._plan.order)
            if self.into_shard:
                self._seen.update(id(param) for param in self._known if param.grad is not None)
        others = self._others_now()
        # Another update by the averages of the last one, which are in ``param.grad`` alone by now.
        is_repeated = bool(others) and not self.into_shard and not any(shard.reduced for shard in self._owners)
        self._take(self._known if laid_out_again or is_repeated else others)
        self._owners = list(shards)
        if self.into_shard:
            for param in self._known if laid_out_again else ():
                if id(param) in sent:
                    param.grad = None
            for shard in self._shards():
                shard.has_grad = [id(param) in self._seen for param in shard.params]
            return
        self._watch.remember_written(self._watched())
        self._tell_siblings()

    def _start_rest(self) -> None:
        """Send the buckets that no hook has launched, but those without any gradient."""
        rest = list(zip(self._plan.order, self._plan.places, strict=True))[self._next :]
        for shard in {id(shard): shard for (shard, _), _ in rest}.values():
            self._flat[id(shard)] = [
                None if p.grad is None or id(p) not in self._plan.buckets_of else _laid_out(shard, i)
                for i, p in enumerate(shard.params)
            ]
        for (shard, k), places in rest:
            if any(param.grad is not None for _, param, _ in places):
                self._start(shard, k)
        self._next = len(self._plan.order)

    def _take(self, params: list[Tensor]) -> None:
        """Average the gradients of ``params`` where they are local; take this rank's runs of those that are whole."""
        taken = {id(param) for param in params if param.grad is not None}
        late = (taken & self._local) - self._late - self._plan.buckets_of.keys()
        for shard in self._shards() if taken else []:
            assert shard.transport is not None
            flat = [
                _laid_out(shard, i) if id(p) in taken and p.grad is not None else None
                for i, p in enumerate(shard.params)
            ]
            sent = [None if id(p) not in late else view for p, view in zip(shard.params, flat, strict=True)]
            for k in range(shard.layout.num_buckets):
                members = {id(param) for param in shard.members(k)}
                if members.isdisjoint(taken):
                    continue
                if not members.isdisjoint(late):
                    shard.transport.finish_reduce(shard.transport.start_reduce(k, sent), None)
                self._enter_runs(shard, k, flat, late)
        self._late |= late
        if self.into_shard:
            for param in params:
                if id(param) in late:
                    param.grad = None
                    self._late.discard(id(param))
                    self._kept.add(id(param))
        if late:
            self._listen_to_latecomers(late)

    def _enter_runs(self, shard: Shard, k: int, flat: Sequence[Tensor | None], late: Set[int]) -> None:
        """Let the update take this rank's runs of ``flat`` in bucket ``k``; ``late`` may be let go of afterwards."""
        pieces = shard.owned_pieces(k)
        into: list[Tensor | None] = list(shard.reduced.get(k) or [None] * len(pieces))
        memory = shard.flat_grads(k) if self.into_shard else []
        for j, piece in enumerate(pieces):
            if (whole := flat[piece.param]) is not None:
                into[j] = whole[piece.start : piece.stop]
                if self.into_shard and id(shard.params[piece.param]) in late:
                    into[j] = memory[j].copy_(whole[piece.start : piece.stop])
        shard.reduced[k] = into

    def _listen_to_latecomers(self, late: Set[int]) -> None:
        """Hear from now on of parameters of attached modules that had no hook: unfrozen, replaced or added since."""
        for model in [] if self._ddp_only else [ref() for ref in self._modules]:
            params = [] if model is None else [param for param in _own_parameters(model) if id(param) in late]
            if params := [param for param in params if param.requires_grad and id(param) not in self._hook_of]:
                take_over(self, params)
                self._listen_to_parameters(params)
        self.listening = frozenset(self._hook_of)  # for the next plan; this round's is still needed

    def make_whole(self, shards: list[Shard] | None = None, only: Container[int] | None = None) -> None:
        """Let every ``param.grad`` be the average over all ranks. Collective; after `arrive`.

        Args:
            shards: Whose owners have the averages; default: the optimizer's.
            only: Ids of the parameters that have been averaged; default: all. The gradients of others are left alone.
        """
        self.look_at_siblings()
        shards = self._shards() if shards is None else shards
        for shard in shards:
            if self.into_shard:
                for param, has_grad in zip(shard.params, shard.has_grad, strict=True):
                    if has_grad:
                        param.grad = torch.zeros_like(param)
            flat = [
                None if p.grad is None or (only is not None and id(p) not in only) else shard.as_laid_out(i, p.grad)
                for i, p in enumerate(shard.params)
            ]
            for k, own in shard.reduced.items():
                for piece, run in zip(shard.owned_pieces(k), own, strict=True):
                    if run is None or (whole := flat[piece.param]) is None:
                        continue
                    place = whole[piece.start : piece.stop]
                    if place.data_ptr() != run.data_ptr():
                        place.copy_(run)
            self._gather(shard, flat)
            for i, (param, whole) in enumerate(zip(shard.params, flat, strict=True)):
                if whole is not None and whole.data_ptr() != param.grad.data_ptr():  # type: ignore[union-attr]
                    param.grad = shard.from_laid_out(i, whole)  # had other strides than its parameter had
            shard.reduced.clear()
        self._rounds = 0
        self._reopened = False
        self._filled.clear()
        self._seen.clear()
        self._kept.clear()
        if only is None:
            self._late.difference_update(id(param) for shard in shards for param in shard.params)
        self._forget_arrivals()
        self._begin_round()
        self._tell_siblings()
        self.is_whole = True

    @staticmethod
    def _gather(shard: Shard, flat: list[Tensor | None]) -> None:
        assert shard.transport is not None
        travelling: deque[InFlightBucket] = deque()
        for k in range(shard.layout.num_buckets):
            if all(flat[piece.param] is None for piece in shard.layout.pieces(*shard.layout.bucket(k))):
                continue
            if len(travelling) == MAX_IN_FLIGHT:
                shard.transport.finish_gather(travelling.popleft())
            travelling.append(shard.transport.start_gather(k, flat))
        for sent in travelling:
            shard.transport.finish_gather(sent)

    def take_whole(self) -> bool:
        """Let the update take whole gradients as they are now. Whether there is any. Local."""
        self.look_at_siblings()
        for shard in self._shards():
            shard.reduced.clear()
            shard.has_grad = [param.grad is not None for param in shard.params]
        return any(grad is not None for grad in map(_gradient, self._params()))

    def accept_changes(self) -> None:
        """Let gradients be what they are now.

        Raises:
            RuntimeError: they have not been averaged yet.
        """
        are_local = not self._are_sorted and (
            self._next < len(self._plan.order)
            or any(p.grad is not None and p.numel() and id(p) not in self._plan.buckets_of for p in self._watched())
        )
        if are_local and (self._was_changed or self._watch.changed()):
            raise RuntimeError(
                "accept_gradients() after attach(overlap=False), or after parameters were added: gradients are local "
                "ones until step(), so a change that is not linear would not be that of their average. Call "
                "gather_gradients() before you change them."
            )
        self._was_changed = False
        others = () if self._are_sorted else self._others_now()
        self._accepted = self._accepted or any(grad is not None for grad in map(_gradient, others))
        if self._watch.replaced():
            for shard in self._owners:
                for k, own in shard.reduced.items():
                    for j, piece in enumerate(shard.owned_pieces(k)):
                        grad = shard.params[piece.param].grad
                        if own[j] is not None and grad is not None:
                            own[j] = shard.as_laid_out(piece.param, grad)[piece.start : piece.stop]
        self._watch.accept()

    def gather_gradients(self) -> None:
        """Have the optimizer make every gradient whole. Collective.

        Raises:
            RuntimeError: it has used them, and kept none.
        """
        if self.has_let_go:
            raise RuntimeError(
                "another optimizer is attached to some of these parameters with reduce_every_backward=True: its step() "
                "has used their gradients, and no param.grad has them any more. Call step() of this optimizer before "
                "that one's, or attach without reduce_every_backward."
            )
        if (gather := self._gather_ref()) is not None and not self.is_whole:
            gather()


@functools.cache
def _exclude_from_compilation() -> None:
    """Keep torch.compile out of the module hooks. When the first path is made, since it imports torch._dynamo."""
    for name in ("_before_forward", "_after_forward"):
        setattr(GradientPath, name, torch.compiler.disable(getattr(GradientPath, name)))  # type: ignore[no-untyped-call]


# ---------------------------------------------------------------- who else is there


def _remove_all(hooks: dict[int, RemovableHandle | None], more: list[RemovableHandle]) -> None:
    remove(hook for hook in (*hooks.values(), *more) if hook is not None)


def _will_run(accumulation: Node) -> bool:
    """Whether the backward pass that runs, or has just run, has ``accumulation`` add to a parameter's gradient."""
    try:
        return bool(torch._C._will_engine_execute_node(accumulation))
    except RuntimeError:  # torch.autograd.grad of that parameter: its gradient is handed back
        return False


def _own_parameters(model: nn.Module) -> list[Tensor]:
    """The parameters of ``model``, but those of DDP modules inside of it, which average them themselves."""
    bare = model.module if isinstance(model, DistributedDataParallel) else model
    inside = [module for module in bare.modules() if isinstance(module, DistributedDataParallel)]
    theirs = {id(param) for module in inside for param in module.parameters()}
    return [param for param in model.parameters() if id(param) not in theirs]


def _laid_out(shard: Shard, i: int) -> Tensor:
    """The gradient of parameter ``i`` as a 1-D view, in the order of the shard, which it is given if need be."""
    param = shard.params[i]
    assert param.grad is not None
    flat = shard.as_laid_out(i, param.grad)
    if flat.data_ptr() != param.grad.data_ptr():
        param.grad = shard.from_laid_out(i, flat)
    return flat


def _is_missing(params: Sequence[Tensor], present: Sequence[bool]) -> bool:
    """Return whether a parameter that requires a gradient has none. Most updates have all, on all ranks."""
    if all(present):
        return False
    return any(param.requires_grad for param, there in zip(params, present, strict=True) if not there)
