"""Save and restore the position in the data: which samples come next.

The saved position is before the first batch that is in hand or accumulated: its gradients are not saved, so it must
come again. Everything before it went into an update, or was skipped by the script. The last batch of an exhausted
loader is in hand while the script holds it: it may have been fetched ahead.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from dist_adamw.errors import CheckpointError
from dist_adamw.integrations.accelerate.counting import SampleCounter
from dist_adamw.integrations.accelerate.data import LoaderFacts, sampler_of
from dist_adamw.integrations.accelerate.joint_counting import JointCounter
from dist_adamw.integrations.accelerate.loader import listen
from dist_adamw.integrations.accelerate.loader_iteration import Batch, Run
from dist_adamw.integrations.accelerate.mid_epoch import check_even, outer_sampler, remove_rest, starting_at

_KEPT = 8  # passes without an update before the present one: each has kilobytes of random state


@dataclass(eq=False, slots=True)
class _Pass:
    """One pass through the data, by one loop or several.

    Attributes:
        number: Passes before it since the load. It is not the epoch: a pass that was left without an update and the
            next one have the same epoch.
        epoch: The number of its epoch.
        tries: Updates attempted before it began.
        order: The state of the shuffling generator when the sampler began; None before that.
        seed: Of a seedable sampler, at that time.
        is_over: Whether the last batch was handed out.
    """

    number: int
    epoch: int
    tries: int
    order: str | None = None
    seed: int | None = None
    is_over: bool = False


@dataclass(frozen=True, slots=True)
class _Order:
    """The order of samples in a checkpoint.

    Attributes:
        state: The state of the shuffling generator; empty if there is none.
        drawn: Whether the loader had already drawn its seed for workers. Otherwise it draws from the same generator
            before the sampler does.
    """

    state: str
    drawn: bool


class Position:
    """A job's position in the data: the epoch, and the samples of it over all ranks.

    The samples of an epoch come in the same order on any number of ranks, so their number identifies the rest. The
    loader owns the position, which holds the loader weakly: a loader without other references ends its workers at once.
    It follows loops over the loader and over its ``skip_first_batches``, except under ``torch.no_grad()``.

    Attributes:
        epoch: Passes over the loader that are complete, or were left for another one after an update.
        samples: Real samples of this epoch that were handed out.
        idle: Whether nothing was handed out in this job or since the load.
    """

    def __init__(self, loader: DataLoader[Any], facts: LoaderFacts, counter: SampleCounter | JointCounter) -> None:
        self._loader, self.facts, self.counter = weakref.ref(loader), facts, counter
        self.epoch = self.samples = 0
        self.idle = True
        self._loads = 0  # by which a loop notices that a load has made it obsolete
        self._pass: _Pass | None = None
        self._begun = 0  # passes since the load
        self._passes: weakref.WeakKeyDictionary[Run, _Pass] = weakref.WeakKeyDictionary()  # since the load
        self._recent: list[_Pass] = []  # passes with batches that may be pending on some rank
        self._resumed: _Order | None = None  # for the next pass
        self._rest: tuple[int, int] | None = None  # from `starting_at`, for the iteration that is about to begin
        self._random_state: tuple[Run, torch.Tensor] | None = None  # to restore when the iteration's first batch comes
        listen(self)

    def count_for(self, facts: LoaderFacts, counter: SampleCounter | JointCounter) -> None:
        """Follow the optimizers of a later `prepare` with this loader; a phase that has begun is over. Local."""
        self.facts, self.counter = facts, counter
        if not self.idle:
            self.load_state_dict(None)

    @property
    def loader(self) -> Any:
        """The loader that `prepare` returned.

        Raises:
            ValueError: it is gone.
        """
        if (loader := self._loader()) is None:
            raise ValueError("the loader of this position is gone. Keep what prepare returned.")
        return loader

    @property
    def is_gone(self) -> bool:
        """Whether the loader is gone. Local."""
        return self._loader() is None

    def __deepcopy__(self, memo: dict[int, Any]) -> Position:
        """Return a position for the copy of the loader."""
        copied = copy.copy(self)
        memo[id(self)] = copied
        copied._passes = weakref.WeakKeyDictionary()
        copied._pass = copy.copy(self._pass)
        copied._recent = [] if copied._pass is None else [copied._pass]
        copied._rest = copied._random_state = None
        if (theirs := memo.get(id(self._loader()))) is not None:
            copied._loader = weakref.ref(theirs)
        listen(copied)
        return copied

    # ---------------------------------------------------------------- following the loops

    def begins(self, run: Run) -> None:
        """Handle the start of an iteration over any loader."""
        loader = run.loader()
        if loader is None or not torch.is_grad_enabled() or not self._serves(loader):
            return
        rest, self._rest = self._rest, None
        if rest is None:
            check_even(self.loader, 0, self.facts)  # the data set may have changed since prepare
            self._begin_plain_pass()
        else:
            run.offset, run.repeated = rest
        resumed = self._resumed
        if self._pass is None:
            self._pass = _Pass(self._begun, self.epoch, self.counter.tries)
            self._begun += 1
            self._forget_updated_passes()
            self._recent = [*self._recent[-_KEPT:], self._pass]
        elif rest is not None and self._pass.order is not None:  # another loop continues this pass
            resumed = _Order(self._pass.order, drawn=True)
        current = self._passes[run] = self._pass
        # A loader draws a seed for its workers when it begins, and the interrupted one had already done so: drawing
        # again would shift the global random numbers, so `handed_out` undoes it.
        if resumed is not None and resumed.drawn:
            self._random_state = (run, torch.get_rng_state())
        place = weakref.ref(self)

        def begin() -> None:
            if (alive := place()) is not None:
                alive._sampler_begins(current, resumed)

        run.on_begin = begin

    def _begin_plain_pass(self) -> None:
        """Start a pass at the first sample."""
        if self._pass is not None:  # the loop before it was left early
            self.epoch += self.counter.tries > self._pass.tries
            self._pass = None
            remove_rest(self.loader)
        self.samples = 0

    def _serves(self, loader: Any) -> bool:
        """Return whether ``loader`` is this position's, or a ``skip_first_batches`` of it."""
        ours = self._loader()
        if ours is None:
            return False
        if loader is ours:
            return True
        if isinstance(ours.dataset, IterableDataset):
            return loader.dataset is ours.dataset and bool(getattr(loader, "skip_batches", 0))
        sampler = outer_sampler(loader)
        while type(sampler).__name__ == "SkipBatchSampler":
            sampler = sampler.batch_sampler
            if sampler is outer_sampler(ours):
                return True
        return False

    def _sampler_begins(self, current: _Pass, resumed: _Order | None) -> None:
        """Record, or restore, the state of the shuffling generator."""
        generator = self._generator()
        if resumed is not None and resumed.state and generator is not None:
            generator.set_state(torch.frombuffer(bytearray.fromhex(resumed.state), dtype=torch.uint8))
            if not resumed.drawn and self._base().generator is generator:
                # The saved job's loader drew its workers' seed from this generator before the sampler began.
                torch.empty((), dtype=torch.int64).random_(generator=generator)
        current.order, current.seed = _state_of(generator), self._seed()

    def handed_out(self, batch: Batch) -> None:
        """Advance past a batch that a loader hands out."""
        if self._random_state is not None and self._random_state[0] is batch.run:
            torch.set_rng_state(self._random_state[1])
            self._random_state = None
        current = self._passes.get(batch.run)
        if current is None or current is not self._pass:
            return
        self.samples, self.idle, self._resumed = batch.end, False, None
        current.is_over = batch.is_last

    def ended(self, run: Run) -> None:
        """Finish the pass if its iteration has reached the end of the data."""
        if not run.is_exhausted or self._passes.get(run) is not self._pass or self._pass is None:
            return
        self._pass.is_over = True
        self._finish_pass()
        loader = self._loader()
        if loader is not None and run.loader() is not loader:  # Accelerate has counted the epoch on the skipping loader
            loader.iteration = self.epoch

    def _finish_pass(self) -> None:
        self._pass = self._resumed = None
        self.epoch, self.samples = self.epoch + 1, 0

    # ---------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any] | None:
        """Return the position as plain data; None if no loop has used the loader. Local.

        Positions differ if ranks skip different batches. ``save_state`` saves the earliest; see `ordered`.

        Raises:
            ValueError: one optimizer has accumulated a batch, and another one was updated with it or a later one.
        """
        return self.ordered()[1]

    def ordered(self) -> tuple[tuple[int, int], dict[str, Any] | None]:
        """Return a key that sorts the ranks' positions, earliest first, and the position as plain data. Local."""
        if self._resumed is not None:  # loaded, and no batch since
            return (-1, 0), self._described(self.epoch, self.samples, self._resumed)
        pending = [(self._passes[batch.run], batch) for batch in self.counter.pending() if batch.run in self._passes]
        first = min(pending, key=lambda both: (both[0].number, both[1].begin), default=None)
        if first is not None and first[0].order is not None:
            current, batch = first
            state = self._described(current.epoch, batch.begin, _Order(first[0].order, drawn=True))
            return (current.number, batch.begin), state
        current_pass = self._pass
        if current_pass is not None and current_pass.order is not None and not current_pass.is_over:
            state = self._described(self.epoch, self.samples, _Order(current_pass.order, drawn=True))
            return (current_pass.number, self.samples), state
        if self.idle:
            return (self._begun, 0), None
        # Between two epochs, or in the loop at the last batch.
        # A persistent iterator draws the workers' seed only once, so the next pass begins with the sampler's draw.
        drawn = getattr(self._base(), "_iterator", None) is not None
        epoch = self.epoch + (current_pass is not None)
        return (self._begun, 0), self._described(epoch, 0, _Order(_state_of(self._generator()), drawn))

    def _forget_updated_passes(self) -> None:
        """Forget passes that were followed by one with an update: none of their batches is pending. Local."""
        passes = [*self._recent, self._pass]
        self._recent = []
        for one, after in pairwise(passes):
            if one is not None and after is not None and after.tries == self.counter.tries:
                self._recent.append(one)

    def as_drawn_here(self, number: int, state: dict[str, Any]) -> dict[str, Any]:
        """Return another rank's position in pass ``number``, with the order that this rank drew. Local."""
        for one in self._recent:
            if one.number == number and one.epoch == state["epoch"] and one.order is not None:
                return {**state, "seed": one.seed, "order": one.order, "drawn": True}
        return state

    def _described(self, epoch: int, samples: int, order: _Order) -> dict[str, Any]:
        return {"epoch": epoch, "samples": samples, "seed": self._seed(), "order": order.state, "drawn": order.drawn}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Go to the position of a job with any number of ranks. Local.

        Raises:
            CheckpointError: ``state`` is not a position. Nothing has been changed then.
        """
        self.check(state)
        state = state or {"epoch": 0, "samples": 0, "seed": None, "order": None}
        self.epoch, self.samples = state["epoch"], state["samples"]
        self._pass = self._rest = self._random_state = None
        self._passes.clear()
        self._recent.clear()
        self._begun = 0
        # Older checkpoints have no "drawn": their state is from before the loader drew its seed.
        self._resumed = None if state["order"] is None else _Order(state["order"], state.get("drawn", False))
        self.idle = True
        self._loads += 1
        if self.is_gone:
            return
        if self._resumed is not None:
            self.loader.iteration = self.epoch  # Accelerate's loader passes it to set_epoch of samplers
        if state["seed"] is not None and (sampler := sampler_of(self.loader)) is not None:
            sampler.initial_seed = state["seed"]

    def check(self, state: Mapping[str, Any] | None) -> None:
        """Raise unless ``state`` is a position. Local.

        Raises:
            CheckpointError: names what is wrong.
        """
        if state is None:
            return
        try:
            order = None if state["order"] is None else bytes.fromhex(state["order"])
            if not (_is_count(state["epoch"]) and _is_count(state["samples"]) and "seed" in state):
                raise ValueError("epoch and samples must be whole numbers")
            if order:
                torch.Generator().set_state(torch.frombuffer(bytearray(order), dtype=torch.uint8))
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"not a position in the data: {error}, got {str(state)[:200]}.") from error

    def _seed(self) -> int | None:
        return getattr(sampler_of(self.loader), "initial_seed", None)

    def _generator(self) -> torch.Generator | None:
        """Return the shuffling generator, which Accelerate synchronizes over ranks."""
        found = getattr(self.loader, "synchronized_generator", None) or getattr(
            sampler_of(self.loader), "generator", None
        )
        return found if isinstance(found, torch.Generator) else None

    def _base(self) -> Any:
        """Return torch's loader inside Accelerate's."""
        return getattr(self.loader, "base_dataloader", self.loader)

    # ---------------------------------------------------------------- the rest of an epoch

    def __iter__(self) -> Iterator[Any]:
        return self._batches(self.loader)  # the generator keeps the loader alive

    def _batches(self, loader: Any) -> Iterator[Any]:
        if self._pass is not None and self._pass.is_over:  # a loop was left at the last batch
            self._finish_pass()
        loads = self._loads
        loader.iteration = self.epoch
        with starting_at(loader, self.samples, self.facts) as self._rest:
            for batch in loader:
                yield batch
                if self._loads != loads:  # the caller has loaded a checkpoint: the rest is of another position
                    return


def rest_of_epoch(loader: DataLoader[Any]) -> Iterator[Any]:
    """Yield this epoch's remaining batches: all, or after ``load_state`` those after the saved position.

    For loops that can be stopped and resumed anywhere, on any number of ranks, with any global batch::

        for epoch in range(position(loader).epoch, epochs):
            for batch in rest_of_epoch(loader):

    Args:
        loader: The loader that `prepare` returned.

    Raises:
        ValueError: it is not from `prepare`.

    Collective, as an iteration over the loader is.
    """
    return iter(position(loader))


def position(loader: DataLoader[Any]) -> Position:
    """Return a job's position in the data. Local.

    Raises:
        ValueError: the loader is not from `prepare`.
    """
    if getattr(loader, "use_stateful_dataloader", False):
        raise ValueError(
            "use_stateful_dataloader=True keeps its own position in the data, for the same number of ranks only. "
            "Leave it out, or iterate over the loader itself."
        )
    found = getattr(loader, "dist_adamw_position", None)
    if not isinstance(found, Position):
        raise ValueError(
            f"the position in a {type(loader).__name__} is not known. Pass the loader that prepare returned."
        )
    return found


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _state_of(generator: torch.Generator | None) -> str:
    return "" if generator is None else bytes(generator.get_state().tolist()).hex()
