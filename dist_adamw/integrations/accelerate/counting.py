"""Add up the real rows of micro-batches and ranks to the samples of each update.

Knows autograd's hooks and torch's optimizers; nothing of schedules or checkpoints.

The rule. Rows of a batch count once, in the update that their first backward pass went into:

1. A loader hands out a batch: its real rows on this rank are *in hand*. (`loader_iteration.py` counts them.) A
   batch that is handed out where gradients are disabled never counts.
2. A backward pass reaches a parameter of this optimizer: of every loader, the oldest batch in hand is *accumulated*.
3. A loader hands out the next batch, of the same epoch or of the next: the one before is dropped if no backward pass
   has taken it, unless the script still has it (a loop that fetches several batches ahead). A batch of an iteration
   that has ended early (``break``, ``next(iter(loader))``), or of another loader's that has ended, stays in hand until
   any loader hands out a batch where gradients are enabled.
4. ``zero_grad()``, or gradients that are gone at the next backward pass: what was accumulated is dropped. Of it, a
   batch that is still the newest of its loader is in hand again (SAM, a second try).
5. An update takes what is accumulated, summed over the data-parallel ranks. A skipped update is as 4. After a
   ``step()`` that raised, what was accumulated still is.

No observation tells a batch that a loop evaluates with gradients enabled, between a training batch and its backward
pass, from one of a second loader that is trained on jointly: such an evaluation adds its last batch. Write
``torch.no_grad()`` around it. Nor can it be seen whether a second loader's batch, of an iteration that is still open,
is tried again after an update that was skipped; rule 4 says yes.

For a loop that is not Accelerate's (Trainer's, an engine's)::

    counter = SampleCounter(optimizer, accelerator)   # keep it: listeners are weak
    scheduler.sample_source = counter                 # begins exchanges in step(), waits for them in scheduler.step()
    counter.forget()                                  # at a load: nothing is in hand or accumulated any more

Batches that are fetched ahead need nothing more as long as the loop holds them until their backward pass: each
``accelerator.backward`` takes the oldest one that is held. Where batches are not held (they are copied elsewhere),
``SampleCounter(..., fetches_ahead=True)`` keeps all until a backward pass takes them, in order; `forget_in_hand` drops
what was fetched and will not be trained on. `backward_began` is for an engine whose backward passes reach no parameter
of the optimizer; ``accelerator.backward`` calls it there.
"""

from __future__ import annotations

import functools
import itertools
import operator
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from dist_adamw.integrations.accelerate.loader import listen
from dist_adamw.integrations.accelerate.loader_iteration import Batch, Run

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(eq=False, slots=True)
class _Entry:
    """The fate of a batch.

    Attributes:
        is_waiting: No backward pass has taken it.
        is_passed_over: Its loader has handed out another one since.
        is_done: An update was tried with it: it need not come again after a resume.
    """

    batch: Batch
    is_waiting: bool = True
    is_passed_over: bool = False
    is_done: bool = False


def _without_hook(params: list[Tensor], handles: Mapping[int, Any]) -> list[Tensor]:
    return [param for param in params if id(param) not in handles]


def _begins_next_epoch(before: Run, now: Run) -> bool:
    """Return whether an iteration goes on where ``before`` has come to the end of the data."""
    return before.is_exhausted and before.loader() is now.loader()


class SampleCounter:
    """The samples of one optimizer's updates. See the module.

    Args:
        optimizer: A torch optimizer; a weak reference is kept.
        accelerator: Whose ranks train together.
        group: For messages on the host, of all ranks.
        fetches_ahead: Whether batches wait in order, however many are handed out.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        accelerator: Accelerator,
        *,
        group: dist.ProcessGroup | None = None,
        fetches_ahead: bool = False,
    ) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._fetches_ahead = fetches_ahead
        engine = str(accelerator.distributed_type.value)
        # Their gradients come to other tensors, or only with the last micro-batch of an update.
        self.follows_engine = engine in ("FSDP", "DEEPSPEED")
        self._hooks_parameters = engine != "DEEPSPEED"
        self._ranks = accelerator.num_processes
        self._is_counted = accelerator.process_index % _ranks_with_the_same_rows(accelerator) == 0
        self._group = group
        self._in_hand: list[_Entry] = []
        self._accumulated: list[_Entry] = []
        self._stepping: list[_Entry] = []  # of the update that is being made
        self._count: _Count | None = None  # of that
        self.tries = 0  # updates that were begun
        self._has_heard = False  # whether a loader has handed out a batch to train on
        self._params: list[Tensor] = []
        self._handles: dict[int, Any] = {}
        self._frozen: list[Tensor] = []
        self._backwards: deque[bool] = deque(maxlen=1)
        # A hook that runs no Python and keeps no tensor: next() of a map appends True, and returns None.
        self._hook: Callable[[Tensor], None] = functools.partial(
            next, map(self._backwards.append, itertools.repeat(True))
        )
        self._witness: tuple[Tensor, Any] | None = None  # a parameter with a gradient, and a hook on it
        self._are_gone = False
        self._warned: set[str] = set()
        weakref.finalize(self, _remove_all, self._handles)
        _after_zero_grad(optimizer, self)
        self._follow_parameters()
        listen(self)

    # ---------------------------------------------------------------- what loaders do

    def begins(self, run: Run) -> None:
        """Ignore it: only a batch counts."""

    def ended(self, run: Run) -> None:
        """Ignore it: a batch may be trained on after its loop."""

    def handed_out(self, batch: Batch) -> None:
        """Take a batch in hand that a loader hands out. Local."""
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
        """See whether a backward pass has reached a parameter since the last call. Local."""
        if self._stepping:
            self._step_has_raised()
        is_reached = bool(self._backwards)
        if self._are_gone or (self._accumulated and self._gradients_are_gone()):
            self._drop_accumulated()
        if is_reached:
            self.backward_began()

    def backward_began(self) -> None:
        """Accumulate the oldest batch in hand of every loader: a backward pass has begun. Local."""
        self._backwards.clear()
        self._in_hand = [entry for entry in self._in_hand if not self._is_let_go(entry)]
        taken: set[int] = set()
        for entry in self._in_hand:
            run = entry.batch.run
            loader = run.loader()
            if entry.is_waiting and taken.isdisjoint((id(run), id(loader))):
                taken.add(id(run))
                if run.is_exhausted and loader is not None:  # batches of its next epoch come after this one
                    taken.add(id(loader))
                entry.is_waiting = False
                self._accumulated.append(entry)
        if self._accumulated and self._witness is None:
            self._watch_gradients()

    def engine_backward_is_over(self, *, updates_inside: bool) -> None:
        """Forget what hooks heard during a backward pass that `backward_began` has reported. Local.

        Args:
            updates_inside: The engine makes its update in this backward pass. What is accumulated still was skipped.
        """
        self._backwards.clear()
        if updates_inside:
            for entry in self._accumulated:
                entry.is_done = True
            self._drop_accumulated()

    def _watch_gradients(self) -> None:
        """See later whether gradients are still there, by one parameter that has one."""
        self._forget_witness()
        for param in self._params:
            if param.grad is not None:
                before = functools.partial(_before_gradient, weakref.ref(self), weakref.ref(param))
                self._witness = (param, param.register_hook(before))  # type: ignore[no-untyped-call]
                return

    def _gradients_are_gone(self) -> bool:
        if self._witness is None or self._witness[0].grad is not None:
            return False
        if self._backwards:  # others may be new
            return False
        self._watch_gradients()  # by another parameter
        return self._witness is None

    def _forget_witness(self) -> None:
        if self._witness is not None:
            self._witness[1].remove()
        self._witness, self._are_gone = None, False

    def _follow_parameters(self) -> None:
        """Hear of the gradients of what is in the groups now."""
        optimizer = self._optimizer()
        if optimizer is None or not self._hooks_parameters:
            return
        params = [*itertools.chain.from_iterable(map(operator.itemgetter("params"), optimizer.param_groups))]
        # This runs for every batch: most of the time nothing has changed.
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
        """Drop what was accumulated: ``zero_grad`` was called. Local."""
        self.poll()
        self._drop_accumulated()

    def _drop_accumulated(self) -> None:
        """Drop what was accumulated: the gradients are gone."""
        self._take_back(self._accumulated)
        self._accumulated.clear()
        self._forget_witness()

    def _take_back(self, entries: list[_Entry]) -> None:
        """Let the newest batch of a loader be trained on again."""
        for entry in entries:
            if not entry.is_passed_over and any(entry is other for other in self._in_hand):
                entry.is_waiting = True

    def before_update(self, *, has_closure: bool = False) -> None:
        """Post the count, unless a closure is going to compute gradients: ``step`` begins. Collective."""
        self.poll()
        self._follow_parameters()
        self._count = None if has_closure else self._post()

    def _post(self) -> _Count:
        self._stepping, self._accumulated = self._accumulated, []
        self.tries += 1
        self._forget_witness()
        rows = sum(entry.batch.rows for entry in self._stepping) if self._is_counted else 0
        for entry in self._stepping:
            entry.is_done = True
        return _Count(self, rows)

    def __call__(self) -> Callable[[], int | None]:
        """Return what gives the real samples of an applied update, all ranks together; None without a count.

        The function that is returned waits for the other ranks. Collective if a closure was passed.
        """
        if self._count is None:
            if self._backwards:
                self.backward_began()
            self._count = self._post()
        count, self._count = self._count, None
        self._stepping = []
        return count

    def follow_updates(self) -> None:
        """Hear of updates from the optimizer itself, where no scheduler asks for their samples. Local."""
        self._ranks = 1  # nothing is to be exchanged
        known = weakref.ref(self)

        def before(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if (counter := known()) is not None:
                counter.before_update(has_closure=any(map(callable, (*args, *kwargs.values()))))

        def after(*_: Any) -> None:
            if (counter := known()) is not None:
                counter()

        optimizer = self._optimizer()
        assert optimizer is not None
        optimizer.register_step_pre_hook(before)
        optimizer.register_step_post_hook(after)

    def returned_unapplied(self) -> None:
        """Forget the rows of an update that was skipped, unless their batch is trained on again. Local."""
        self._take_back(self._stepping)
        self._stepping, self._count = [], None

    def _step_has_raised(self) -> None:
        """Accumulate again what ``step`` neither applied nor skipped: its gradients are still there."""
        for entry in self._stepping:
            entry.is_done = False
        self._accumulated = [*self._stepping, *self._accumulated]
        self._stepping, self._count = [], None
        self._watch_gradients()

    # ---------------------------------------------------------------- for checkpoints and loops

    def forget_in_hand(self) -> None:
        """Forget batches that were handed out: they will not be trained on. Local."""
        self._in_hand.clear()
        self._backwards.clear()

    def forget(self) -> None:
        """Forget what is in hand or accumulated: a checkpoint was loaded. Local."""
        self.forget_in_hand()
        self._accumulated.clear()
        self._stepping, self._count = [], None
        self._forget_witness()

    def pending(self) -> list[Batch]:
        """Batches in hand or accumulated, oldest first, with which no update has been tried. Local.

        The last batch of a loader that is exhausted is among them only while the script still has it.
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


class _Count:
    """The rows of an update, on their way to all ranks."""

    def __init__(self, counter: SampleCounter, rows: int) -> None:
        self._counter = weakref.ref(counter)
        self._sum = torch.tensor([rows, int(counter._has_heard)], dtype=torch.int64)
        self._work = None
        if counter._ranks > 1:
            self._work = dist.all_reduce(self._sum, group=counter._group, async_op=True)

    def __call__(self) -> int | None:
        """Wait for all ranks. None where no loader has handed out a batch."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        rows, heard = (int(n) for n in self._sum.tolist())
        counter = self._counter()
        if rows or counter is None:
            return rows
        if not heard:
            counter._warn_once(
                "no loader that Accelerate prepared has handed out a batch, so this update counts batch_size samples. "
                "Prepare the loader that you train on, or pass scheduler.step(samples=n)."
            )
            return None
        counter._warn_once(
            "an update counts no samples: no batch was handed out for it since the update before, or it was handed out "
            "under torch.no_grad(). Rows count once, in the update of their first backward pass; to count otherwise "
            "pass scheduler.step(samples=n)."
        )
        return 0


def _before_gradient(counter_ref: Any, param_ref: Any, _: Tensor) -> None:
    """Called in a backward pass before a parameter's gradient is added."""
    counter, param = counter_ref(), param_ref()
    if counter is not None and param is not None and param.grad is None:
        counter._are_gone = True


def _remove_all(handles: dict[int, Any]) -> None:
    for handle in handles.values():
        handle.remove()


def _ranks_with_the_same_rows(accelerator: Accelerator) -> int:
    """Return how many neighbouring ranks see the same samples: tensor, context and sequence parallelism."""
    config = getattr(accelerator, "parallelism_config", None)
    sizes = (getattr(config, axis, 1) or 1 for axis in ("tp_size", "cp_size", "sp_size"))
    return int(functools.reduce(operator.mul, sizes, 1))


def _after_zero_grad(optimizer: Optimizer, counter: SampleCounter) -> None:
    """Have ``counter`` hear of the optimizer's zero_grad. torch has no hook for it."""
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
