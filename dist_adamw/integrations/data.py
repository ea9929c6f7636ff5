"""What a data loader says of batches, and where in the data a job stands, for any number of ranks.

Floor 4: knows Accelerate's loaders.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sized
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, Sampler

from dist_adamw.batch import GlobalBatch
from dist_adamw.index import CheckpointError
from dist_adamw.integrations.deepspeed import accumulation_of

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True, slots=True)
class LoaderFacts:
    """What a data loader and an accelerator say about batches.

    Attributes:
        batch: How the global batch is made up.
        samples: Real samples of one pass over the loader; None where it has no length.
        drop_last: Whether a last partial batch is left out.
    """

    batch: GlobalBatch
    samples: int | None
    drop_last: bool

    @property
    def pass_samples(self) -> int:
        """Samples of one micro-batch on all ranks."""
        return self.batch.micro_batch_size * self.batch.data_parallel_size

    @property
    def epoch_size(self) -> int | None:
        """E: with drop_last whole global batches, so that it is the same for every number of ranks."""
        if self.samples is None or not self.drop_last:
            return self.samples
        return self.samples // self.batch.size * self.batch.size

    @property
    def last_pass_samples(self) -> int:
        """Real samples of the last micro-batch of an epoch on all ranks."""
        rest = 0 if self.drop_last or self.samples is None else self.samples % self.pass_samples
        return rest or self.pass_samples


def engine_of(accelerator: Accelerator) -> str:
    """Accelerate's name of the engine, such as "MULTI_GPU", "FSDP" or "DEEPSPEED". Local."""
    return str(accelerator.distributed_type.value)


def loader_facts(accelerator: Accelerator, dataloader: DataLoader[Any]) -> LoaderFacts:
    """Derive the global batch and the epoch size, as they are now. Local.

    Raises:
        ValueError: the loader has no batch size, or a batch that the ranks cannot split, or
            would give the ranks different numbers of batches.
    """
    ranks = data_parallel_size(accelerator)
    sampler = dataloader.sampler if isinstance(dataloader.sampler, BatchSampler) else dataloader.batch_sampler
    size = dataloader.batch_size or getattr(sampler, "batch_size", None)
    if not size:
        raise ValueError(
            "the data loader has no batch size, so the samples of an update are unknown. Give the DataLoader a "
            "batch_size or a batch sampler that has one."
        )
    if accelerator.split_batches:
        if size % ranks:
            below, above = size // ranks * ranks, (size // ranks + 1) * ranks
            raise ValueError(
                f"split_batches=True cannot split a batch of {size} over {ranks} ranks. "
                f"The nearest sizes that work: {' and '.join(str(n) for n in (below, above) if n)}."
            )
        size //= ranks
    accumulation = accelerator.gradient_accumulation_steps
    if engine_of(accelerator) == "DEEPSPEED":
        accumulation = accumulation_of(accelerator.deepspeed_plugin.deepspeed_config, accumulation)
    batch = GlobalBatch(size, accumulation, ranks)
    samples = _pass_length(dataloader)
    drop_last = bool(getattr(sampler, "drop_last", False) or dataloader.drop_last)
    uneven = samples is not None and -(-samples // size) % ranks
    if uneven and not (accelerator.even_batches or drop_last or accelerator.split_batches):
        raise ValueError(
            f"even_batches=False gives {ranks} ranks different numbers of batches ({-(-samples // size)} of {size} "  # type: ignore[operator]
            "samples), and an update needs every rank. Leave even_batches=True (repeated samples are not counted), "
            "or set drop_last=True."
        )
    facts = LoaderFacts(batch, samples, drop_last)
    if facts.epoch_size == 0:
        raise ValueError(
            f"the data loader has {samples} samples, fewer than one global batch of {batch.size}, and drop_last=True "
            "leaves nothing to train on. Lower the batch size or set drop_last=False."
        )
    whole = samples // facts.pass_samples if drop_last and samples is not None else 0
    if (short := whole % batch.gradient_accumulation_steps) and accelerator.gradient_state.sync_with_dataloader:
        warnings.warn(
            f"with drop_last=True an epoch has {whole} micro-batches, and the last {short} of them make a short "
            f"accumulation of {short * facts.pass_samples} samples beyond the epoch size of {facts.epoch_size} (whole "
            f"global batches of {batch.size}). They are counted, so cycles end a little before their epochs. Cut the "
            f"data set to a multiple of {batch.size} samples to have the same updates on every number of ranks.",
            stacklevel=3,
        )
    return facts


def data_parallel_size(accelerator: Accelerator) -> int:
    """Ranks that see different samples: all but those of tensor, context and sequence parallelism."""
    config = getattr(accelerator, "parallelism_config", None)
    same = 1
    for axis in ("tp_size", "cp_size", "sp_size"):
        same *= getattr(config, axis, 1) or 1
    return int(accelerator.num_processes // same)


def _pass_length(dataloader: DataLoader[Any]) -> int | None:
    """Samples of one pass over the loader, before it is sharded."""
    dataset = dataloader.dataset
    if isinstance(dataset, IterableDataset):
        return len(dataset) if isinstance(dataset, Sized) else None
    sampler: Any = dataloader.sampler
    if isinstance(sampler, BatchSampler):
        sampler = sampler.sampler
    elif dataloader.batch_size is None:  # a batch sampler of the user's own
        sampler = getattr(dataloader.batch_sampler, "sampler", dataset)
    for sized in (sampler, dataset):
        if isinstance(sized, Sized):
            return len(sized)
    return None


def real_samples(accelerator: Accelerator, facts: LoaderFacts, dataloader: DataLoader[Any]) -> int | None:
    """Real samples of the update being applied, all ranks together; None where the loader cannot say.

    Accelerate pads the last batches of an epoch so that every rank has one; repeated samples are
    not counted. None for another loader than the prepared one (or its `skip_first_batches`).
    """
    state = accelerator.gradient_state
    active = state.active_dataloader
    if facts.samples is None or active is None or active.dataset is not dataloader.dataset:
        return None
    accumulation = int(state.num_steps)
    missing = facts.pass_samples - facts.last_pass_samples
    if not state.sync_with_dataloader:  # updates run across epoch ends: how many last batches are inside?
        passes = -(-facts.samples // facts.pass_samples)
        step = int(accelerator.step)
        return accumulation * facts.pass_samples - missing * (step // passes - (step - accumulation) // passes)
    if not state.end_of_dataloader:
        return accumulation * facts.pass_samples
    in_window: int = len(active) % accumulation or accumulation
    return in_window * facts.pass_samples - missing


class Position:
    """Where in the data a job stands: as many samples into which epoch, all ranks together.

    The samples of an epoch come in one order on any number of ranks, so their number says which are left.

    Attributes:
        epoch: Passes over the loader that are complete.
        samples: Real samples of this epoch that have been handed out.
        start: Of those, the ones that were handed out before this job, or the load.
    """

    def __init__(self, loader: DataLoader[Any], facts: LoaderFacts) -> None:
        self.loader, self.facts = loader, facts
        self.epoch = self.samples = self.start = 0
        self._loads = 0  # a loop that was running when the position was loaded ends
        self._order: str | None = None  # state of the generator that shuffles, at the beginning of the epoch

    @property
    def rest(self) -> LoaderFacts:
        """What the loader says of an epoch, less what it has handed out before."""
        samples = self.facts.samples
        return self.facts if samples is None else replace(self.facts, samples=samples - self.start)

    def state_dict(self, pending: int = 0) -> dict[str, Any] | None:
        """As plain data; None where the loop does not go through `rest_of_epoch`. Local.

        Args:
            pending: Of the samples handed out, those since the last update, whose gradients nobody saves.
        """
        if self.epoch == self.samples == 0 and self._order is None:
            return None
        epoch, samples, order = self.epoch, self.samples - pending, self._order
        if order is None or self._is_over(samples):  # between two epochs, or in the loop at the last batch
            epoch, samples, order = epoch + (samples > 0), 0, _state_of(self._generator())
        return {"epoch": epoch, "samples": samples, "seed": self._seed(), "order": order}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Go to where a job, of any number of ranks, stood. Local."""
        state = state or {"epoch": 0, "samples": 0, "seed": None, "order": None}
        try:
            order = None if state["order"] is None else bytes.fromhex(state["order"])
            if not (_is_count(state["epoch"]) and _is_count(state["samples"])):
                raise ValueError("no whole numbers")
            if order:
                torch.Generator().set_state(torch.frombuffer(bytearray(order), dtype=torch.uint8))
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"this is no position in the data: {error}, got {str(state)[:200]}.") from error
        self.epoch, self.samples, self._order = state["epoch"], state["samples"], state["order"]
        self._loads += 1
        if state["seed"] is not None and (sampler := _sampler(self.loader)) is not None:
            sampler.initial_seed = state["seed"]

    def _is_over(self, samples: int) -> bool:
        total = self.facts.samples
        if total is None:
            return False
        return samples >= (
            total // self.facts.pass_samples * self.facts.pass_samples if self.facts.drop_last else total
        )

    def _seed(self) -> int | None:
        return getattr(_sampler(self.loader), "initial_seed", None)

    def _generator(self) -> torch.Generator | None:
        """What shuffles, as Accelerate keeps it alike on all ranks."""
        found = getattr(self.loader, "synchronized_generator", None) or getattr(
            _sampler(self.loader), "generator", None
        )
        return found if isinstance(found, torch.Generator) else None

    def __iter__(self) -> Iterator[Any]:
        loader: Any = self.loader
        self.start, size, loads = self.samples, self.facts.pass_samples, self._loads
        generator = self._generator()
        if self._order and generator is not None:
            generator.set_state(torch.frombuffer(bytearray.fromhex(self._order), dtype=torch.uint8))
        self._order = _state_of(generator)
        loader.iteration = self.epoch  # Accelerate's loader sets the epoch of the samplers by it
        with _from(loader, self.start, size):
            for batch in loader:
                self.samples += size
                if self.facts.samples is not None:
                    self.samples = min(self.samples, self.facts.samples)
                yield batch
                if self._loads != loads:
                    return
        self.epoch, self.samples, self.start, self._order = self.epoch + 1, 0, 0, None


def rest_of_epoch(loader: DataLoader[Any]) -> Iterator[Any]:
    """The batches of this epoch that are left: all of them, or after ``load_state`` those that no rank has seen.

    For loops that are to be stopped and resumed anywhere, on any number of ranks, with any global batch::

        for epoch in range(position(loader).epoch, epochs):
            for batch in rest_of_epoch(loader):

    Args:
        loader: As `prepare` returned it.

    Raises:
        ValueError: it did not come from `prepare`.

    Collective, as iterating over the loader is.
    """
    return iter(position(loader))


def position(loader: DataLoader[Any]) -> Position:
    """Where in the data a job stands. Local.

    Raises:
        ValueError: the loader did not come from `prepare`.
    """
    if getattr(loader, "use_stateful_dataloader", False):
        raise ValueError(
            "use_stateful_dataloader=True keeps a place in the data of its own, for the same number of ranks only. "
            "Leave it out, or iterate over the loader as it is."
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


class _Rest(Sampler[Any]):
    """What another sampler gives after its first ``start`` samples."""

    def __init__(self, sampler: Any, start: int) -> None:
        self.sampler, self.start = sampler, start

    def __iter__(self) -> Iterator[Any]:
        indices = iter(self.sampler)
        for _ in range(self.start):
            next(indices, None)
        yield from indices

    def __len__(self) -> int:
        return max(0, len(self.sampler) - self.start)

    def __getattr__(self, name: str) -> Any:  # set_epoch, and what else Accelerate asks its samplers
        return getattr(self.__dict__["sampler"], name)


def _batches(loader: Any) -> Any:
    """The innermost batch sampler: the one that knows nothing of ranks. None where samples are not sampled."""
    if isinstance(loader.dataset, IterableDataset):
        return None
    found = loader.sampler if isinstance(loader.sampler, BatchSampler) else loader.batch_sampler
    while hasattr(found, "batch_sampler"):
        found = found.batch_sampler
    return found


def _sampler(loader: Any) -> Any:
    return getattr(_batches(loader), "sampler", None)


@contextlib.contextmanager
def _from(loader: Any, start: int, pass_samples: int) -> Iterator[None]:
    """Have ``loader`` begin at sample ``start``."""
    batches = _batches(loader)
    if start and not hasattr(batches, "sampler"):  # an iterable data set, or batches of the user's own making
        if start % pass_samples:
            raise CheckpointError(
                f"the job stands {start} samples into data of which only batches can be left out, and batches of "
                f"{pass_samples} over all ranks do not reach that. Use a global batch that divides it."
            )
        loader.skip_batches = start // pass_samples
        try:
            yield
        finally:
            loader.skip_batches = 0
        return
    whole = getattr(batches, "sampler", None)
    if start:
        batches.sampler = _Rest(whole, start)
    try:
        yield
    finally:
        if start:
            batches.sampler = whole
