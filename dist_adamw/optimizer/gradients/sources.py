"""The sources of gradients: attached modules, DDP's reducers, and hooks on parameters."""

from __future__ import annotations

import itertools
import operator
import weakref
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle

from dist_adamw.optimizer.gradients.arrivals import Arrivals
from dist_adamw.optimizer.gradients.ddp import BucketListener, DDPReducer
from dist_adamw.optimizer.gradients.handshake import RankMessages
from dist_adamw.optimizer.gradients.record import GradientRecord, OptimizerLink
from dist_adamw.optimizer.gradients.registry import Path, live_paths, take_over
from dist_adamw.optimizer.gradients.streams import GradientStreams, NotedArrival
from dist_adamw.optimizer.gradients.weak_hooks import NoSync, WeakHook, remove
from dist_adamw.ranks import agreement

_LOOK_EVERY = 1 << 18  # elements between two checks: enough to be worth a message


class Sibling(Path, BucketListener, Protocol):
    """Another optimizer's path whose gradients lie in the same DDP buckets."""

    @property
    def record(self) -> GradientRecord:
        """The state of its gradients."""

    def look_for_changes(self) -> None:
        """Note changes to its gradients, before another optimizer writes to the buffers that hold them. Local."""


class Hearer(Protocol):
    """The callbacks of the hooks; see `BackwardPasses`."""

    def look_at_arrivals(self, param: Tensor) -> None:
        """Called after the gradients of ``param`` and of the parameters in the inboxes have arrived."""

    def keep_arrivals(self) -> None:
        """Called when passes end that do not send the gradients that have arrived."""

    def before_forward(self, module: nn.Module, args: Any) -> None:
        """Called before a forward pass of an attached module."""

    def after_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        """Called after a forward pass of an attached module."""


class GradientSources:
    """The attached modules, and the hooks and buckets that announce their gradients.

    A gradient is announced in one of two ways: by a bucket of DDP's reducer, or by a hook on the parameter.

    Args:
        path: The path of these sources; held weakly.
        link: Its optimizer.
        messages: Its messages to other ranks.
        record: The state of its gradients.

    Attributes:
        ids: Ids of the parameters whose gradients are announced; a new set whenever they change.
        revision: Counts these changes.
        known: The optimizer's parameters, when `follow_params` last looked.
        known_ids: Their ids.
        order: By id, the place in the layout of those that were in a module when it was attached. Backward reaches the
            last ones first: a module mostly has its parameters in the order in which forward uses them. If not, the
            order of arrival in the first update replaces that of the modules, see `ArrivalOrder`.
        are_buckets: Whether DDP's buckets announce every gradient.
        is_ddp: Whether the modules are in DDP; None before the first.
        arrivals: The parameters whose gradients hooks have noted.
        streams: The streams on which these gradients were written.
    """

    def __init__(self, path: Sibling, link: OptimizerLink, messages: RankMessages, record: GradientRecord) -> None:
        self._path, self._link, self._messages = weakref.ref(path), link, messages
        self.arrivals = Arrivals(record)
        self.streams = GradientStreams()
        self._hearer: weakref.ref[Hearer] | None = None
        self.ids: Set[int] = frozenset()
        self.revision = 0
        self.known: list[Tensor] = []
        self.known_ids: Set[int] = frozenset()
        self.order: dict[int, int] = {}
        self.are_buckets = True
        self.is_ddp: bool | None = None
        self._are_copied = False  # whether DDP copies some gradients from its own buffers at the end of backward
        self._params_changes = 0
        self._synchronises = True  # False inside no_sync
        self._hook_of: dict[int, RemovableHandle | None] = {}  # by id of parameter; None if DDP's bucket announces it
        self._module_hooks: list[RemovableHandle] = []
        # The module may outlive the optimizer. At interpreter exit hooks do no harm, so leave them.
        weakref.finalize(self, _remove_all, self._hook_of, self._module_hooks).atexit = False
        self._modules: list[weakref.ref[nn.Module]] = []
        self._reducers: list[weakref.ref[DDPReducer]] = []

    def call(self, hearer: Hearer) -> None:
        """Have hooks call ``hearer``, which is held weakly. Local."""
        self._hearer = weakref.ref(hearer)

    def _hook(self, method: str) -> WeakHook:
        return WeakHook(None if self._hearer is None else self._hearer(), method)

    # ---------------------------------------------------------------- add and remove sources

    def add(self, model: nn.Module, *, reduces_every_backward: bool, reproducible: bool) -> None:
        """Receive the gradients of ``model`` from now on, in place of any other path. Local.

        Raises:
            ValueError: ``model`` is wrapped so that this path cannot serve it.
        """
        path = self._path()
        assert path is not None
        is_ddp = isinstance(model, DistributedDataParallel)
        if self.is_ddp not in (None, is_ddp):
            raise ValueError(
                "one optimizer cannot be attached to a DistributedDataParallel module and to a plain one. "
                "Wrap both or neither, or give each an optimizer."
            )
        self.is_ddp = is_ddp
        self.follow_params()
        places = itertools.count(max(self.order.values(), default=-1) + 1)
        for param in model.parameters():  # now, since the module may be collected sooner on one rank than on another
            if id(param) in self.known_ids and id(param) not in self.order:
                self.order[id(param)] = next(places)
        params = [param for param in _own_parameters(model) if param.requires_grad and id(param) in self.known_ids]
        if isinstance(model, DistributedDataParallel):
            if reduces_every_backward and not reproducible:
                raise ValueError(
                    "reduce_every_backward=True is for modules without DistributedDataParallel. DDP keeps whole "
                    "gradients in its buckets, so it would only send more. Attach the plain module, or leave it False."
                )
            aside = self._add_ddp(model, path, params, reproducible=reproducible)
        else:
            aside = True
            take_over(path, params)
            self._add_hooks(params)
        if all(ref() is not model for ref in self._modules):
            self._hang_on_module(model, aside=aside)
        self.arrivals.record_order(1 if aside else 2)

    def _add_hooks(self, params: list[Tensor]) -> None:
        """Put hooks on ``params``."""
        self._hang_on_parameters([param for param in params if self._hook_of.get(id(param)) is None])
        self._kinds_changed()

    def _add_ddp(
        self, model: DistributedDataParallel, path: Sibling, params: list[Tensor], *, reproducible: bool
    ) -> bool:
        """Receive ``params`` from DDP's buckets, or by hooks if DDP can stand aside; return whether it does."""
        reducer = DDPReducer.of(model)
        aside = reducer.can_stand_aside(self.known_ids, on_any_device=reproducible)
        if reproducible and not aside:
            raise ValueError(
                "reproducible=True needs the gradients of every micro-batch, and DistributedDataParallel would add "
                "them up. Pass it gradient_as_bucket_view=True, neither static_graph nor mixed_precision, and give "
                "DistAdamW all of its parameters. Or attach the module without DistributedDataParallel."
            )
        take_over(path, params)
        self._reducers.append(weakref.ref(reducer))
        if aside:
            self._add_hooks(params)
        else:
            self.remove({id(param) for param in params if self._hook_of.get(id(param)) is not None})
            self._hook_of.update(dict.fromkeys(map(id, params)))
            self._are_copied = self._are_copied or not model.gradient_as_bucket_view
            self._kinds_changed()
        reducer.add(path, aside=aside, on_any_device=reproducible)
        return aside

    def _kinds_changed(self) -> None:
        self.are_buckets = bool(self.is_ddp) and all(hook is None for hook in self._hook_of.values())
        self._ids_changed()

    def _hang_on_module(self, model: nn.Module, *, aside: bool) -> None:
        self._modules.append(weakref.ref(model))
        self._module_hooks.append(model.register_forward_pre_hook(self._hook("before_forward")))
        if aside:  # otherwise DDP's buckets mark the beginning of backward
            self._module_hooks.append(model.register_forward_hook(self._hook("after_forward")))
        no_sync = getattr(model, "no_sync", None)
        if no_sync is None:  # a plain module; Accelerate's accumulate() calls its no_sync() if there is one
            no_sync = NoSync()
            model.no_sync = no_sync  # type: ignore[assignment]
        if isinstance(no_sync, NoSync):
            no_sync.add(self)

    def _hang_on_parameters(self, params: list[Tensor]) -> None:
        """Put hooks on ``params``."""
        if not params:
            return
        # There may be thousands of small parameters, so most of them get a hook that runs in C: ``deque.append``.
        # On a GPU it must also note on which stream the gradient was written.
        inbox = self.arrivals.new_inbox(len(params))
        enter = NotedArrival(self.streams, inbox) if any(param.is_cuda for param in params) else inbox.append
        look = self._hook("look_at_arrivals")
        quiet = _LOOK_EVERY
        for param in reversed(params):
            quiet += param.numel()
            looks = quiet >= _LOOK_EVERY or param is params[0]  # backward reaches the first parameter last
            hook = look if looks else enter
            self._hook_of[id(param)] = param.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
            if looks:
                quiet = 0

    def add_latecomers(self, late: Set[int]) -> None:
        """Put hooks on parameters of attached modules that had none: those unfrozen, replaced or added since.

        The plan of the present round stays; the next one includes them.
        """
        path = self._path()
        assert path is not None
        for model in [] if self.are_buckets else self.modules():
            params = [param for param in _own_parameters(model) if id(param) in late]
            params = [param for param in params if param.requires_grad and id(param) not in self._hook_of]
            if params:
                take_over(path, params)
                self._hang_on_parameters(params)
        self.ids = frozenset(self._hook_of)

    def remove(self, ids: Set[int]) -> None:
        """Remove the hooks of these parameters. Local."""
        remove(hook for key in ids if (hook := self._hook_of.pop(key, None)) is not None)
        self._ids_changed()
        for reducer in self.reducers():
            reducer.follow()

    def end(self) -> None:
        """Remove all hooks. Local."""
        _remove_all(self._hook_of, self._module_hooks)
        self._hook_of.clear()
        self._module_hooks.clear()
        self._ids_changed()
        for reducer in self.reducers():
            reducer.drop(self._path())
        self._reducers, self._modules = [], []

    def _ids_changed(self) -> None:
        self.ids = frozenset(self._hook_of)
        self.revision += 1

    def follow_params(self) -> None:
        """Follow parameters that were added to the optimizer or removed from it."""
        params = self._link.params()
        if len(params) == len(self.known) and all(map(operator.is_, params, self.known)):
            return
        self.known, self.known_ids = params, frozenset(map(id, params))
        self.order = {key: place for key, place in self.order.items() if key in self.known_ids}  # ids are used again
        self._params_changes += 1
        # The count is part of the digest: after equally many changes, ranks must have the same shapes.
        shapes = [[list(param.shape), str(param.dtype)] for param in params if not is_lazy(param)]
        self._messages.params_changed(agreement.fingerprint({str(self._params_changes): shapes}))
        if gone := self.ids - self.known_ids:
            self.remove(gone)

    def modules(self) -> list[nn.Module]:
        """Return the attached modules that still exist."""
        return [model for ref in self._modules if (model := ref()) is not None]

    def reducers(self) -> list[DDPReducer]:
        """Return the reducers of the attached modules that are in DDP."""
        return [reducer for ref in self._reducers if (reducer := ref()) is not None]

    # ---------------------------------------------------------------- in a backward pass

    @property
    def synchronises(self) -> bool:
        """Whether a backward pass sends gradients now, which it does not inside ``no_sync``."""
        if not self._synchronises:
            return False
        in_ddp = [model for model in self.modules() if isinstance(model, DistributedDataParallel)]
        return all(model.require_backward_grad_sync for model in in_ddp)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Only accumulate in the backward passes inside, as DDP's method of that name does."""
        before, self._synchronises = self._synchronises, False
        try:
            yield
        finally:
            self._synchronises = before
            hearer = None if self._hearer is None else self._hearer()
            if hearer is not None:
                hearer.keep_arrivals()  # backward passes inside must not make buckets of the next one ready

    def has_company(self) -> bool:
        """Return whether others also send in this backward pass: attached optimizers, or DDP itself."""
        # The buckets of one DDP module are filled in the same order on every rank, so waiting is safe.
        in_order = self.are_buckets and len(self._reducers) == 1
        if not in_order and any(reducer.has_own for reducer in self.reducers()):
            return True
        here = self._path()
        return any(path.is_sending for path in live_paths() if path is not here)

    def has_ddp_aside(self) -> bool:
        """Return whether DDP does not average the gradients of this pass."""
        return any(reducer.stood_aside for reducer in self.reducers())

    def wait_for_ddp(self) -> bool:
        """Return whether DDP writes gradients at the end of backward, so that they can be sent only afterwards."""
        if self._are_copied or self.are_buckets:
            return self._are_copied
        return any(not reducer.stood_aside for reducer in self.reducers())

    def watched(self, planned: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return the parameters whose gradients are announced."""
        # Parameters added since the last update are announced, but not ``planned`` yet.
        if len(planned) == len(self.ids):
            return planned
        return [param for param in self.known if id(param) in self.ids]

    # ---------------------------------------------------------------- other optimizers in the same buffers

    def _siblings(self) -> list[Sibling]:
        here = self._path()
        return [path for reducer in self.reducers() for path in reducer.listeners() if path is not here]

    def look_at_siblings(self) -> None:
        """Note changes to other optimizers' gradients, before this one writes to buffers that it shares with them."""
        for path in self._siblings():
            path.look_for_changes()

    def tell_siblings(self) -> None:
        """Have other optimizers accept this one's writes to shared buffers."""
        # Gradients in one DDP bucket are views of one storage and share its version counter.
        for path in self._siblings():
            path.record.watch.accept()


def _remove_all(hooks: dict[int, RemovableHandle | None], more: list[RemovableHandle]) -> None:
    remove(hook for hook in (*hooks.values(), *more) if hook is not None)


def accumulates_now(modules: Sequence[nn.Module]) -> bool:
    """Return whether the pass that autograd is running adds to ``param.grad`` of some parameter of ``modules``.

    All parameters of the modules count, since the pass may reach the optimizer's own only on another rank, which then
    waits for this one's gradients.
    """
    for model in modules:
        for param in model.parameters():
            if param.requires_grad and accumulates_into(param):
                return True
    return False


def accumulates_into(param: Tensor) -> bool:
    """Return whether the pass that autograd runs, or has just run, adds to ``param.grad``. ``param`` requires one."""
    try:
        return bool(torch._C._will_engine_execute_node(get_gradient_edge(param).node))
    except RuntimeError:  # torch.autograd.grad with respect to that parameter, which returns its gradient
        return False


def _own_parameters(model: nn.Module) -> list[Tensor]:
    """Return the parameters of ``model`` except those of DDP modules inside it, which average these themselves."""
    bare = model.module if isinstance(model, DistributedDataParallel) else model
    inside = [module for module in bare.modules() if isinstance(module, DistributedDataParallel)]
    theirs = {id(param) for module in inside for param in module.parameters()}
    return [param for param in model.parameters() if id(param) not in theirs]
