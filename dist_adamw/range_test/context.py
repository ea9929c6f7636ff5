"""``lr_range``: a range test around the user's own loop."""

from __future__ import annotations

import itertools
import warnings
import weakref
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from dist_adamw.errors import CheckpointError
from dist_adamw.range_test.curve import RangeResult, check_range
from dist_adamw.range_test.lr_override import LROverride
from dist_adamw.range_test.prepared import accelerator_of, is_watched, scheduler_of
from dist_adamw.range_test.restoring import Restorer
from dist_adamw.range_test.running import RunningTest
from dist_adamw.ranks import agreement, collectives
from dist_adamw.ranks.run_on_all import first_problem
from dist_adamw.wrappers import unwrap

_PATIENCE = timedelta(seconds=30)  # for other ranks, when a loop ends with an exception
_numbers = itertools.count()  # of tests, the same on all ranks
_running: weakref.WeakSet[Optimizer] = weakref.WeakSet()


class RangeTest:
    """A range test around a training loop: see `lr_range`.

    Attributes:
        result: The curve and the suggestion, after the block; None before, and after an exception.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        dataloader: DataLoader[Any] | None,
        scheduler: LRScheduler | None,
        options: dict[str, Any],
        folder: str | Path | None,
    ) -> None:
        self.result: RangeResult | None = None
        self._model, self._given = model, optimizer
        self._dataloader, self._scheduler, self._folder = dataloader, scheduler, folder
        self._range = options  # of `check_range`
        self._test: RunningTest | None = None
        self._was_entered = False
        self._records = 0
        self._precedes_backward = False

    def __enter__(self) -> RangeTest:
        group = self._group = collectives.host_group()
        problem, override = self._begin_override()
        if (failed := first_problem(collectives.all_gather_objects(problem, group))) is not None:
            if override is not None:
                override.remove()
            raise ValueError(failed)
        assert override is not None
        self._override = override
        if collectives.world_size(group) > 1:
            agreement.check_agreement({f"lr_range({name})": value for name, value in self._range.items()}, group)
        self._was_entered = True
        optimizer = self._optimizer = unwrap(self._given)
        accelerator = accelerator_of(optimizer)
        loaders = [*getattr(accelerator, "_dataloaders", ()), self._dataloader]
        scheduler, planned = self._known_scheduler(optimizer), self._range["updates"]
        try:
            self._restorer = Restorer(self._model, self._given, scheduler, loaders, accelerator, self._folder, group)
        except BaseException:
            self._override.remove()
            raise
        self._number = next(_numbers)
        self._test = RunningTest(self._override, planned, self._range["divergence"], group)
        _running.add(optimizer)
        optimizer.add_param_group = _refuse_group  # type: ignore[method-assign]
        return self

    def record(self, loss: Tensor | float) -> bool:
        """Take the loss of a micro-batch, and return whether the test is over; leave the loop then. Collective.

        Call it once for each micro-batch, at the end of the loop's body, or before its backward pass (then with the
        tensor that backward is called on).

        Raises:
            ValueError: on every rank: a rank's loss is not one number. Outside of the block: there is no test.
        """
        if self._test is None:
            raise ValueError("record(loss) belongs inside the block: with dist_adamw.lr_range(...) as test:")
        self._records += 1
        if isinstance(loss, Tensor) and loss.requires_grad:
            # Runs only if the backward pass is still to come.
            loss.register_hook(self._backward_came_after)  # type: ignore[no-untyped-call]
        return self._test.observe(loss, is_after_step=not self._precedes_backward)

    @property
    def lr(self) -> float:
        """The lr of the next update, in the group with the largest lr. Local; inside the block."""
        return self._override.lr

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        test, self._test = self._test, None
        assert test is not None
        self._override.remove()
        _running.discard(self._optimizer)
        vars(self._optimizer).pop("add_param_group", None)
        if error is not None and collectives.world_size(self._group) > 1 and not self._all_ranks_raised(error):
            warnings.warn(
                f"{type(error).__name__} has ended the range test on this rank, and not on all ranks at the same "
                "update: weights and optimizer state are those of the test. The state from before it is in "
                f"{self._restorer.path}, for {self._restorer.how_to_load}.",
                stacklevel=2,
            )
            return
        try:
            self._restorer.restore()
        except CheckpointError as problem:
            where = f"{self._restorer.path}, for {self._restorer.how_to_load}"
            raise CheckpointError(f"{problem} The state from before the range test is in {where}.") from problem
        self._restorer.discard()
        if error is not None:
            return
        test.take_last_update()
        self.result = test.result
        if self.result is None:
            has_none = "record(loss) was not called. Call it for each micro-batch of the loop"
            raise ValueError(f"the range test has no curve: {test.ended_by if test.has_losses else has_none}.")

    # ---------------------------------------------------------------- checks

    def _begin_override(self) -> tuple[str | None, LROverride | None]:
        """Return what is wrong with the arguments or the optimizer's lr, or the override of it. Local."""
        problem, one = self._problem(), self._range
        if problem is not None:
            return problem, None
        optimizer = unwrap(self._given)
        scheduler = self._known_scheduler(optimizer)
        try:
            return None, LROverride(optimizer, scheduler, one["lowest"], one["highest"], one["updates"])
        except ValueError as error:
            return str(error), None

    def _problem(self) -> str | None:
        """Return what is wrong with the arguments. Local."""
        if (problem := check_range(**self._range)) is not None:
            return f"lr_range: {problem}"
        if not isinstance(self._model, nn.Module):
            return f"lr_range needs a model as its first argument, got {type(self._model).__name__}."
        inner = unwrap(self._given)
        if not isinstance(inner, Optimizer):
            return f"lr_range needs a torch optimizer, got {type(inner).__name__}."
        if self._was_entered:
            return "lr_range: this test has been entered before. Make a new one: with dist_adamw.lr_range(...) as test:"
        if is_watched():
            return (
                "lr_range: the script runs under dist-adamw lr-range, which tests the whole loop. Run it without, or "
                "leave lr_range out."
            )
        if inner in _running:
            return "lr_range: another range test of this optimizer is running: leave its block first."
        if self._is_inside_accumulation(inner):
            return "lr_range: gradients were accumulated without an update. Begin the test after optimizer.step()."
        return None

    def _is_inside_accumulation(self, optimizer: Optimizer) -> bool:
        accelerator = accelerator_of(optimizer)
        if accelerator is not None:
            return not accelerator.sync_gradients
        steps = getattr(self._model, "gradient_accumulation_steps", None)
        micro_steps = getattr(self._model, "micro_steps", 0)
        return callable(steps) and micro_steps % steps() != 0

    def _known_scheduler(self, optimizer: Optimizer) -> LRScheduler | None:
        known = scheduler_of(optimizer)
        if known is not None:
            return known
        return getattr(self._scheduler, "scheduler", self._scheduler)  # Accelerate's wrapper

    def _backward_came_after(self, _: Tensor) -> None:
        self._precedes_backward = True

    def _all_ranks_raised(self, error: BaseException) -> bool:
        """Return whether every rank has ended its block with an exception, after the same update. Collective if so.

        The ranks meet in the process group's store: the others may be in any collective.
        """
        if not isinstance(error, Exception):  # Ctrl-C, at any place
            return False
        store = dist.distributed_c10d._get_default_store()
        rank, size = collectives.rank(self._group), collectives.world_size(self._group)
        name = f"dist_adamw/lr_range/{self._number}"
        at = f"{self._records} {self._override.updates} {type(error).__name__}"
        store.set(f"{name}/{rank}", at)
        try:
            store.wait([f"{name}/{other}" for other in range(size)], _PATIENCE)
        except (RuntimeError, ValueError):  # DistStoreError
            return False
        return all(store.get(f"{name}/{other}").decode() == at for other in range(size))


def _refuse_group(param_group: Any) -> None:
    raise ValueError(
        "add_param_group inside of lr_range: the state from before the test could not be restored with another group. "
        "Add it before the block or after it."
    )


def lr_range(
    model: nn.Module,
    optimizer: Optimizer,
    dataloader: DataLoader[Any] | None = None,
    scheduler: LRScheduler | None = None,
    *,
    lowest: float = 1e-6,
    highest: float = 1.0,
    updates: int = 100,
    divergence: float = 4.0,
    folder: str | Path | None = None,
) -> RangeTest:
    """Test which learning rates a model trains with, by Smith's range test, around a training loop.

    During the test lr rises exponentially from ``lowest`` to ``highest``, one step for each applied update. The loss
    falls, then rises. When the ``with`` block ends, by ``break``, at the end of the loop or by an exception, everything
    is as it was before, to the bit::

        with dist_adamw.lr_range(model, optimizer) as test:
            for batch in loader:
                with accelerator.accumulate(model):
                    loss = loss_of(model, batch)
                    accelerator.backward(loss)
                    optimizer.step()
                    scheduler.step()
                    optimizer.zero_grad()
                if test.record(loss):
                    break
        print(test.result)
        test.result.plot("lr_range.png")

    The loss is averaged over micro-batches and ranks, so all ranks stop at the same update. An update that is skipped
    does not advance the test.

    Restored are weights, buffers, optimizer state (absent state is absent again), parameter groups, the schedule's
    clock and the random state of Python, numpy, torch and this rank's GPU; gradients are dropped. After
    `dist_adamw.prepare` also everything else that ``accelerator.save_state`` saves, such as a GradScaler and registered
    objects, and the position in the data: a loop over the loader, or `rest_of_epoch`, sees the batches that it would
    have seen. The loop that is interrupted by the test is not continued: begin a new one. In a loop without `prepare`,
    pass ``dataloader`` and ``scheduler``, and save and load the rest, such as a GradScaler, yourself. Trackers and run
    logs keep what the loop wrote.

    The weight decay follows: what `CyclicLRWithRestarts` normalises takes away the same part of the weights at every
    lr, as it would in a training with that base lr. Without it, the groups' ``weight_decay`` stays as it is.

    Args:
        model: As it is trained, on any engine.
        optimizer: Any torch optimizer whose state a checkpoint can hold, with or without its wrapper.
        dataloader: The loader of the loop. Not needed after `prepare`.
        scheduler: The scheduler of the loop. Not needed after `prepare`.
        lowest: lr of the first update, in the group with the largest lr. Other groups keep their ratio to it.
        highest: lr of the last update.
        updates: Updates from the one to the other; at least 20. The loop may need several epochs.
        divergence: End the test when the smoothed loss exceeds its smallest value by this factor; see `Divergence` for
            losses that are negative or near 0. It also ends when the loss is inf or nan.
        folder: An existing folder that all machines share, for a copy of the state during the test. Default: the folder
            for temporary files, which serves one machine.

    Returns:
        The test, to enter with ``with``. Its ``result``, after the block, has the curve and the suggestion:
        `RangeResult`.

    Raises:
        ValueError: on every rank: an argument is out of its range, ``optimizer`` is not a torch optimizer, another test
            of it runs, the loop has accumulated gradients without an update, or `record` got no number. At the end of
            the block, when everything has been restored: `record` was not called, or the loop made no update.
        AgreementError: ranks passed different arguments.
        CheckpointError: the state cannot be saved, or restored.

    If one of several ranks alone raises an exception in the block, or Ctrl-C ends them, nothing is restored, since a
    collective may have been interrupted. A warning says so, and names the folder with the copy, which is left there.

    Entering and leaving the block is collective, and so is `record`: every rank calls all three.

    Source: Smith, arXiv:1506.01186, section 3.3. The suggestion: `dist_adamw.range_test.curve.suggest`.
    """
    options = {"lowest": lowest, "highest": highest, "updates": updates, "divergence": divergence}
    return RangeTest(model, optimizer, dataloader, scheduler, options, folder)
