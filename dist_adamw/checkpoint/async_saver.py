"""Save while training continues: copy the state to host memory, and write it in a thread."""

from __future__ import annotations

import traceback
import warnings
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from dist_adamw.checkpoint.extra_state import EXTRA
from dist_adamw.checkpoint.local_state import LocalState
from dist_adamw.checkpoint.random_state import RNG
from dist_adamw.checkpoint.save_load import announce_save, collect_state, write_state
from dist_adamw.checkpoint.storage.partial_tensor import PartialTensor, Values, evaluated
from dist_adamw.checkpoint.storage.regions import Region
from dist_adamw.errors import CheckpointError
from dist_adamw.optimizer.replicas import check_replicas
from dist_adamw.ranks import collectives
from dist_adamw.ranks.run_on_all import Ranks


class Saving:
    """An asynchronous save."""

    def __init__(self, path: Path, future: Future[None]) -> None:
        self.path = path
        self.reported = False  # whether the caller has received the result
        self._future = future

    @property
    def done(self) -> bool:
        """Whether it has finished or failed. Local."""
        return self._future.done()

    def wait(self) -> None:
        """Wait until the checkpoint is written. Local.

        Raises:
            CheckpointError: some rank could not write; on every rank.
        """
        self.reported = True
        self._future.result()

    def pending_error(self, ranks: Ranks) -> CheckpointError | None:
        """Wait for the save; return its error unless every rank has already reported it. Collective."""
        error = self.join()
        # Some ranks may have called wait() and handled the error, and others not: all must now raise, or none.
        reported_here, self.reported = self.reported, True
        problems = ranks.gather(None if error is None or reported_here else str(error))
        return next((CheckpointError(problem) for problem in problems if problem is not None), None)

    def join(self) -> BaseException | None:
        """Wait for the save; return its error without reporting it. Local."""
        return self._future.exception()


class AsyncSaver:
    """Save while training continues: from a copy in host memory, in a thread, over a separate process group.

    A second save waits for the first. The copy has the size of what a rank writes: ``(b_p N + 8 N) / W`` bytes for W
    ranks and fp32 moments. It stays allocated for the next save.

    The process group must outlive the save: call `wait` or `close` before destroying it. A save that finds the group
    destroyed fails; earlier checkpoints are unaffected.

    The constructor is collective.
    """

    def __init__(self) -> None:
        # The thread's collectives would interleave with training's in a different order on each rank, and deadlock.
        self._ranks = Ranks.now(dist.new_group(backend="gloo") if collectives.world_size() > 1 else None)
        # A single thread: saves, which are collective, run in the same order on every rank.
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._memory: dict[Any, Tensor] = {}
        self._last: Saving | None = None
        self._savings: list[Saving] = []
        weakref.finalize(self, _warn_of_failures, self._savings)

    def save(
        self,
        path: str | Path,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        scheduler: LRScheduler | None = None,
        *,
        extra: Mapping[str, Any] | None = None,
        then: Callable[[], None] | None = None,
    ) -> Saving:
        """Start a `dist_adamw.save`; return once the state is copied. Collective.

        Args:
            then: Called in each rank's thread once all ranks have written.

        Raises:
            CheckpointError: the previous save failed, or this one cannot start; on every rank.
            AgreementError: see `dist_adamw.save`.
        """
        last, self._last, ranks = self._last, None, self._ranks
        ranks.check()
        announce_save(optimizer)
        if last is not None and (error := last.pending_error(ranks)) is not None:
            raise error
        check_replicas(model, optimizer, group=ranks.group)
        path = Path(path).absolute()  # the working directory may change before the thread writes
        local_state, about = collect_state(path, model, optimizer, scheduler, extra, ranks)
        copies = ranks.run(lambda: {k: self._copy(k, tensor) for k, tensor in local_state.tensors.items()})
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # the copies are non-blocking, and the next update overwrites their sources

        def work() -> None:
            try:
                write_state(path, LocalState(copies), about, ranks)
                if then is not None:
                    ranks.run(then)
            except Exception as error:
                if not collectives.initialized():
                    # Frames keep the destroyed group alive, and its open connections keep other ranks waiting.
                    _forget_frames(error)
                ranks.check()
                if isinstance(error, CheckpointError):
                    raise
                raise CheckpointError(f"could not write {path}: {type(error).__name__}: {error}.") from error

        self._last = Saving(path, self._thread.submit(work))
        self._savings[:] = [self._last]  # in place: the finalizer holds this list
        return self._last

    def wait(self) -> None:
        """Wait for the save in progress. Local.

        Raises:
            CheckpointError: it could not be written; on every rank, and only once.
        """
        last, self._last = self._last, None
        if last is not None and not last.reported:
            last.wait()

    def _copy(self, key: str, tensor: Tensor) -> Tensor:
        mine = PartialTensor.of(tensor)
        copies: dict[Region, Values] = {}
        for region, values in mine.parts.items():
            copies[region] = self._keep((key, region), values)
        return PartialTensor(mine.shape, mine.dtype, copies)

    def _keep(self, where: Any, of: Values) -> Tensor:
        values = evaluated(of)
        if where[0].startswith((f"{RNG}.", f"{EXTRA}.")):
            return values.clone()  # small, and of a different length each time
        if (memory := self._memory.get(where)) is None or memory.dtype != values.dtype:
            # Pinned memory is what makes a copy from the device asynchronous.
            memory = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
            self._memory[where] = memory
        return memory.copy_(values, non_blocking=True)

    def close(self) -> None:
        """Do as `wait`, and release the memory. Local."""
        self._thread.shutdown()
        self._memory.clear()
        self.wait()


def _forget_frames(error: BaseException | None) -> None:
    """Clear the frames of an error and of the errors that it was raised from, and release their locals. Local."""
    errors, seen = [error], set[int]()
    while errors:
        found = errors.pop()
        if found is None or id(found) in seen:
            continue
        seen.add(id(found))
        traceback.clear_frames(found.__traceback__)
        found.__traceback__ = None  # a cleared frame still references its function, and so its closure
        errors += [found.__cause__, found.__context__]
        if isinstance(found, CheckpointException):
            errors += [failure for failure, _ in found.failures.values()]


def _warn_of_failures(savings: list[Saving]) -> None:
    """Warn about failed saves that were never waited for, when the saver is garbage-collected."""

    def warn(saving: Saving) -> None:
        if not saving.reported and (error := saving._future.exception()) is not None:
            warnings.warn(f"a checkpoint was lost: {error}", stacklevel=2)

    for saving in savings:
        saving._future.add_done_callback(lambda _, saving=saving: warn(saving))  # type: ignore[misc]
