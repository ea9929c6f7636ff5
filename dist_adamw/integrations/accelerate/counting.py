"""Add up the real rows of micro-batches and ranks to the samples of each update.

The rule: rows of a batch count once, in the update of their first backward pass.

1. A loader hands out a batch: its real rows on this rank are *in hand*. (`loader_iteration.py` counts them.) A
   batch that is handed out with gradients disabled never counts.
2. A backward pass reaches a parameter of this optimizer: the oldest batch in hand of every loader is *accumulated*.
3. A loader hands out the next batch, of the same epoch or the next: the previous one is dropped if no backward pass
   has taken it, unless the script still references it (a loop that fetches several batches ahead). A batch of an
   iteration that ended early (``break``, ``next(iter(loader))``), or of another loader's finished iteration, stays in
   hand until any loader hands out a batch with gradients enabled.
4. ``zero_grad()``, or gradients that are gone at the next backward pass: accumulated batches are dropped. One that is
   still the newest of its loader is in hand again (SAM, a second try).
5. An update takes the accumulated rows, summed over the data-parallel ranks. A skipped update is treated as in 4.
   After a ``step()`` that raised, the batches are still accumulated.

Two cases cannot be distinguished. A batch that a loop evaluates with gradients enabled, between a training batch and
its backward pass, looks like one of a second loader that is trained on jointly, so its rows are counted: wrap the
evaluation in ``torch.no_grad()``. And after a skipped update, a second loader's batch of an open iteration may or may
not be tried again: rule 4 assumes that it is.

For a loop that is not Accelerate's (Trainer's, an engine's)::

    counter = SampleCounter(optimizer, accelerator)   # keep it: listeners are held weakly
    scheduler.sample_source = counter                 # exchanges start in step() and end in scheduler.step()
    counter.forget()                                  # at a load: nothing is in hand or accumulated any more

A loop may fetch batches ahead if it holds each until its backward pass: ``accelerator.backward`` takes the oldest held
batch. If it does not hold them (it copies them elsewhere), ``SampleCounter(..., fetches_ahead=True)`` keeps all until
backward passes take them, in order; `forget_in_hand` drops those that will not be trained on. `backward_began` is for
an engine whose backward passes reach no parameter of the optimizer; ``accelerator.backward`` calls it there.
"""

from __future__ import annotations

import functools
import itertools
import operator
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from dist_adamw.integrations.accelerate.loader import listen
from dist_adamw.integrations.accelerate.loader_iteration import Batch, Run
from dist_adamw.integrations.accelerate.update_count import UpdateCount
from dist_adamw.run_log import batch_sources
from dist_adamw.run_log.digests import joint_digest

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(eq=False, slots=True)
class _Entry:
    """The state of a batch.

    Attributes:
        is_waiting: No backward pass has taken it.
        is_passed_over: Its loader has handed out another batch since.
        is_done: An update was attempted with it, so it need not come again after a resume.
        backward: The number of the backward pass that has taken it.
    """

    batch: Batch
    is_waiting: bool = True
    is_passed_over: bool = False
    is_done: bool = False
    backward: int = 0


def _without_hook(params: list[Tensor], handles: Mapping[int, Any]) -> list[Tensor]:
    return [param for param in params if id(param) not in handles]


def _begins_next_epoch(before: Run, now: Run) -> bool:
    """Return whether ``now`` is the same loader's next epoch after ``before``."""
    return before.is_exhausted and before.loader() is now.loader()


def _digests(entries: Iterable[_Entry]) -> list[Callable[[], int]]:
    """Return the digest of each backward pass's batches, of several loaders together, as far as they were hashed."""
    passes = itertools.groupby(entries, operator.attrgetter("backward"))
    found = ([entry.batch.digest for entry in group if entry.batch.digest is not None] for _, group in passes)
    return [joint_digest(digests) for digests in found if digests]


class SampleCounter:
    """Count the samples of one optimizer's updates. See the module.

    Args:
        optimizer: A torch optimizer, held weakly.
        accelerator: The accelerator of the ranks that train together.
        group: The process group of all ranks, for messages on the host.
        fetches_ahead: Whether batches stay in hand until a backward pass takes them.

    Attributes:
        update: The count of the update in progress.
        optimizer: Returns the optimizer; None: it is gone.
        rides: Whether another message takes the count along in `step`: see `send_counts_with`.
        batch_digests: See `BatchSource`.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        accelerator: Accelerator,
        *,
        group: dist.ProcessGroup | None = None,
        fetches_ahead: bool = False,
    ) -> None:
        self.optimizer = weakref.ref(optimizer)
        self._fetches_ahead = fetches_ahead
        engine = str(accelerator.distributed_type.value)
        # Their gradients go to other tensors than the optimizer's, or come only with an update's last micro-batch.
        self.follows_engine = engine in ("FSDP", "DEEPSPEED")
        self._hooks_parameters = engine != "DEEPSPEED"
        self._ranks = accelerator.num_processes
        # Of the ranks that see the same rows, one counts them.
        self._is_counted = accelerator.process_index % _ranks_with_the_same_rows(accelerator) == 0
        self._group = group
        self._in_hand: list[_Entry] = []
        self._accumulated: list[_Entry] = []
        self._stepping: list[_Entry] = []  # the batches of the update in progress
        self.update: UpdateCount | None = None
        self.rides = False
        self.tries = 0  # updates that were started
        self.newest_tried = -1  # the number of the newest batch with which one was started
        self.batch_digests: Sequence[Callable[[], int]] = ()
        self._backward = 0
        self._has_heard = False  # whether a loader has handed out a batch to train on
        self._params: list[Tensor] = []
        self._handles: dict[int, Any] = {}
        self._frozen: list[Tensor] = []
        self._backwards: deque[bool] = deque(maxlen=1)  # whether a gradient came, not how many
        # Runs once per parameter in every backward, so it is all C: next() of a map that appends True to the deque.
        self._hook: Callable[[Tensor], None] = functools.partial(
            next, map(self._backwards.append, itertools.repeat(True))
        )
        self._witness: tuple[Tensor, Any] | None = None  # a parameter with a gradient, and a hook on it
        self._are_gone = False
        self._warned: set[str] = set()
        weakref.finalize(self, _remove_all, self._handles)  # parameters outlive a counter: `prepare` may run again
        _after_zero_grad(optimizer, self)
        self._follow_parameters()
        listen(self)
        batch_sources.provide(optimizer, self)

    # ---------------------------------------------------------------- what loaders do

    def begins(self, run: Run) -> None:
        """Do nothing: only batches count."""

    def ended(self, run: Run) -> None:
        """Do nothing: a batch may be trained on after its loop."""

    def handed_out(self, batch: Batch) -> None:
        """Put a batch in hand that a loader hands out. Local."""
        self.poll()
        counts = torch.is_grad_enabled()
        kept = []
        for entry in self._in_hand:
            begins_next_epoch = _begins_next_epoch(entry.batch.run, batch.run)
            if entry.batch.run is batch.run or begins_next_epoch:
                entry.is_passed_over = True
            is_abandoned = entry.batch.run.has_ended and not (begins_next_epoch or self._fetches_ahead)
            if not ((counts and is_abandoned) or self._is_let_go(entry)):
                kept.append(entry)
        if counts:
            self._has_heard = True
            kept.append(_Entry(batch))
        self._in_hand = kept
        self._follow_parameters()

    def _is_let_go(self, entry: _Entry) -> bool:
        if not entry.is_passed_over:
            return False
        return not (entry.is_waiting and (self._fetches_ahead or entry.batch.is_held()))

    # ---------------------------------------------------------------- what autograd does

    def poll(self) -> None:
        """Check whether a backward pass has reached a parameter since the last call. Local."""
        if self._stepping:
            self._step_has_raised()
        is_reached = bool(self._backwards)
        if self._are_gone or (self._accumulated and self._gradients_are_gone()):
            self._drop_accumulated()
        if is_reached:
            self.backward_began()

    def backward_began(self) -> None:
        """Handle a backward pass: accumulate the oldest batch in hand of every loader. Local."""
        self._backwards.clear()
        self._backward += 1
        self._in_hand = [entry for entry in self._in_hand if not self._is_let_go(entry)]
        taken: set[int] = set()
        for entry in self._in_hand:
            run = entry.batch.run
            loader = run.loader()
            if entry.is_waiting and taken.isdisjoint((id(run), id(loader))):
                taken.add(id(run))
                if run.is_exhausted and loader is not None:  # batches of its next epoch come after this one
                    taken.add(id(loader))
                entry.is_waiting, entry.backward = False, self._backward
                self._accumulated.append(entry)
        if self._accumulated and self._witness is None:
            self._watch_gradients()

    def engine_backward_is_over(self, *, updates_inside: bool) -> None:
        """Clear what hooks recorded during a backward pass that `backward_began` has handled. Local.

        Args:
            updates_inside: Whether the engine updates in this backward pass. Batches that are still accumulated then
                belong to an update that was skipped.
        """
        self._backwards.clear()
        if updates_inside:
            for entry in self._accumulated:
                entry.is_done = True
            self._drop_accumulated()

    def _watch_gradients(self) -> None:
        """Choose a parameter with a gradient, by which to tell later whether gradients are still there."""
        self._forget_witness()
        if _kept_elsewhere(self.optimizer()) is not None:
            return
        for param in self._params:
            if param.grad is not None:
                before = functools.partial(_before_gradient, weakref.ref(self), weakref.ref(param))
                self._witness = (param, param.register_hook(before))  # type: ignore[no-untyped-call]
                return

    def _gradients_are_gone(self) -> bool:
        if _kept_elsewhere(self.optimizer()) == 0:
            return not self._backwards
        if self._witness is None or self._witness[0].grad is not None:
            return False
        if self._backwards:  # a backward pass has run since, so a gradient elsewhere would prove nothing
            return False
        self._watch_gradients()  # one gradient was set to None: are there others?
        return self._witness is None

    def _forget_witness(self) -> None:
        if self._witness is not None:
            self._witness[1].remove()
        self._witness, self._are_gone = None, False

    def _follow_parameters(self) -> None:
        """Put hooks on the trainable parameters that are in the groups now."""
        optimizer = self.optimizer()
        if optimizer is None or not self._hooks_parameters:
            return
        params = [*itertools.chain.from_iterable(map(operator.itemgetter("params"), optimizer.param_groups))]
        # This runs for every batch and rarely finds a change, so the comparison avoids Python loops.
        is_known = len(params) == len(self._params) and all(map(operator.is_, params, self._params))
        if not is_known:
            self._params = params
            here = set(map(id, params))
            for key in self._handles.keys() - here:
                self._handles.pop(key).remove()
            self._frozen = _without_hook(params, self._handles)
        if any(map(operator.attrgetter("requires_grad"), self._frozen)):
            for param in self._frozen:
                if param.requires_grad:
                    handle = param.register_post_accumulate_grad_hook(self._hook)  # type: ignore[no-untyped-call]
                    self._handles[id(param)] = handle
            self._frozen = _without_hook(self._frozen, self._handles)

    # ---------------------------------------------------------------- what the optimizer does

    def gradients_were_dropped(self) -> None:
        """Handle ``zero_grad``: drop accumulated batches. Local."""
        self.poll()
        self._drop_accumulated()

    def _drop_accumulated(self) -> None:
        """Drop accumulated batches, whose gradients are gone."""
        self._take_back(self._accumulated)
        self._accumulated.clear()
        self._forget_witness()

    def _take_back(self, entries: list[_Entry]) -> None:
        """Put batches in hand again that are still the newest of their loader."""
        for entry in entries:
            if not entry.is_passed_over and any(entry is other for other in self._in_hand):
                entry.is_waiting = True

    def before_update(self, *, has_closure: bool = False) -> None:
        """Handle the start of ``step``: post the count, unless a closure is to compute gradients. Collective."""
        self.poll()
        self._follow_parameters()
        self.batch_digests = ()
        self.update = None if has_closure else self._take_rows()
        if self.update is not None and not self.rides:
            self.update.send()

    def _take_rows(self) -> UpdateCount:
        self._stepping, self._accumulated = self._accumulated, []
        self.batch_digests = _digests(self._stepping)
        self.tries += 1
        self._forget_witness()
        rows = sum(entry.batch.rows for entry in self._stepping) if self._is_counted else 0
        for entry in self._stepping:
            entry.is_done, self.newest_tried = True, entry.batch.number
        is_alone = self._ranks == 1
        return UpdateCount(
            rows, self._has_heard, self._group, is_alone=is_alone, warn=weakref.WeakMethod(self._warn_once)
        )

    def __call__(self) -> Callable[[], int | None]:
        """Return a function that returns the real samples of an applied update over all ranks, or None without a count.

        That function waits for the other ranks. Collective if a closure was passed.
        """
        if self.update is None:  # a closure has computed the gradients inside step
            if self._backwards:
                self.backward_began()
            self.update = self._take_rows()
        count, self.update = self.update, None
        count.send()
        self._stepping = []
        return count

    def follow_updates(self) -> None:
        """Follow updates by hooks on the optimizer, if no scheduler asks for their samples. Local."""
        self._ranks = 1  # only the position needs the counts, so nothing is exchanged
        known = weakref.ref(self)

        def before(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if (counter := known()) is not None:
                counter.before_update(has_closure=any(map(callable, (*args, *kwargs.values()))))

        def after(*_: Any) -> None:
            if (counter := known()) is not None:
                counter()

        optimizer = self.optimizer()
        assert optimizer is not None
        optimizer.register_step_pre_hook(before)
        optimizer.register_step_post_hook(after)

    def returned_unapplied(self) -> None:
        """Handle a skipped update: drop its rows, or put their batch in hand again. Local."""
        self._take_back(self._stepping)
        self._stepping, self.update = [], None

    def _step_has_raised(self) -> None:
        """Accumulate the batches of a ``step`` that raised again: their gradients are still there."""
        for entry in self._stepping:
            entry.is_done, self.newest_tried = False, self._stepping[0].batch.number - 1
        self._accumulated = [*self._stepping, *self._accumulated]
        self._stepping, self.update = [], None
        self._watch_gradients()

    # ---------------------------------------------------------------- for checkpoints and loops

    def forget_in_hand(self) -> None:
        """Drop batches in hand, which will not be trained on. Local."""
        self._in_hand.clear()
        self._backwards.clear()

    def forget(self) -> None:
        """Drop everything in hand or accumulated, after a checkpoint was loaded. Local."""
        self.forget_in_hand()
        self._accumulated.clear()
        self._stepping, self.update = [], None
        self.newest_tried = -1
        self._forget_witness()

    def pending(self) -> list[Batch]:
        """Return the batches in hand or accumulated without an attempted update, oldest first. Local.

        The last batch of an exhausted loader is included only while the script still references it.
        """
        self.poll()
        in_hand = [entry for entry in self._in_hand if entry.is_waiting and not self._is_let_go(entry)]
        if not self._fetches_ahead:
            in_hand = [entry for entry in in_hand if not entry.batch.run.is_exhausted or entry.batch.is_held()]
        return [entry.batch for entry in (*self._accumulated, *in_hand) if not entry.is_done]

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, stacklevel=5)


def passes_with_batches(counter: SampleCounter, *, in_step: bool) -> int:
    """Return how many backward passes of the update in progress took a batch. Local.

    Args:
        counter: Counts the update's samples.
        in_step: Whether the optimizer's ``step`` is running.
    """
    if not in_step:
        counter.poll()
    entries = counter._stepping if in_step else counter._accumulated
    return len({entry.backward for entry in entries})


def _kept_elsewhere(optimizer: Any) -> int | None:
    """Return how many micro-batches ``optimizer`` keeps outside ``param.grad``; None: that is where they are. Local."""
    return int(optimizer._kept_micro_batches) if getattr(optimizer, "reproducible", False) else None


def _before_gradient(counter_ref: Any, param_ref: Any, _: Tensor) -> None:
    """Note that gradients were dropped, if there is none when a backward pass is about to add to it."""
    counter, param = counter_ref(), param_ref()
    if counter is not None and param is not None and param.grad is None:
        counter._are_gone = True


def _remove_all(handles: dict[int, Any]) -> None:
    for handle in handles.values():
        handle.remove()


def _ranks_with_the_same_rows(accelerator: Accelerator) -> int:
    """Return the number of consecutive ranks that see the same samples (tensor, context, sequence parallelism)."""
    config = getattr(accelerator, "parallelism_config", None)
    sizes = (getattr(config, axis, 1) or 1 for axis in ("tp_size", "cp_size", "sp_size"))
    return int(functools.reduce(operator.mul, sizes, 1))


def _after_zero_grad(optimizer: Optimizer, counter: SampleCounter) -> None:
    """Notify ``counter`` of the optimizer's zero_grad, for which torch has no hook."""
    known, owner = weakref.ref(counter), weakref.ref(optimizer)
    instead = vars(optimizer).get("zero_grad")
    zero_grad = type(optimizer).zero_grad if instead is None else instead

    @functools.wraps(zero_grad)
    def heard(*args: Any, **kwargs: Any) -> Any:
        if instead is None:
            args = (owner(), *args)
        result = zero_grad(*args, **kwargs)
        if (counter := known()) is not None:
            counter.gradients_were_dropped()
        return result

    optimizer.zero_grad = heard  # type: ignore[method-assign]
