"""Read batch sizes, epoch sizes and samplers from data loaders and accelerators."""

from __future__ import annotations

import warnings
from collections.abc import Sized
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from dist_adamw.integrations.deepspeed.configuration import accumulation_of
from dist_adamw.schedule.batch import GlobalBatch
from dist_adamw.schedule.batch_schedule import GivenBatches, solve_each

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True, slots=True)
class LoaderFacts:
    """The batches that a data loader and an accelerator make.

    Attributes:
        batch: The global batch; the first one of a batch-size schedule.
        samples: Real samples of one pass over the loader; None if it has no length.
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
        """The epoch size E: with drop_last only whole global batches, so that it is the same on any number of ranks."""
        if self.samples is None or not self.drop_last:
            return self.samples
        return self.samples // self.batch.size * self.batch.size


def engine_of(accelerator: Accelerator) -> str:
    """Return Accelerate's name of the engine, such as "MULTI_GPU", "FSDP" or "DEEPSPEED". Local."""
    return str(accelerator.distributed_type.value)


def loader_facts(
    accelerator: Accelerator, dataloader: DataLoader[Any], batches: GivenBatches | None = None
) -> LoaderFacts:
    """Derive the current global batch and epoch size. Local.

    Args:
        accelerator: Its accumulation is used, unless there are ``batches``.
        dataloader: The loader.
        batches: The batch-size schedule, which determines the accumulation.

    Raises:
        ValueError: the loader has no batch size, a batch that the ranks cannot split, or
            different numbers of batches for the ranks; a batch of the schedule is no multiple of a micro-batch of all
            ranks.
    """
    ranks = data_parallel_size(accelerator)
    sampler = dataloader.sampler if isinstance(dataloader.sampler, BatchSampler) else dataloader.batch_sampler
    size = _micro_batch_size(accelerator, dataloader, sampler, ranks)
    batch = GlobalBatch(size, accumulation_steps(accelerator), ranks)
    if batches is not None:
        batch = solve_each(batches, micro_batch_size=size, data_parallel_size=ranks)[0]
    samples = _pass_length(dataloader)
    drop_last = bool(getattr(sampler, "drop_last", False) or dataloader.drop_last)
    facts = LoaderFacts(batch, samples, drop_last)
    _check_even(accelerator, dataloader, sampler, facts)
    if facts.epoch_size == 0:
        raise ValueError(
            f"the data loader has {samples} samples, fewer than one global batch of {batch.size}, and drop_last=True "
            "leaves nothing to train on. Lower the batch size or set drop_last=False."
        )
    if (warning := _short_accumulation(accelerator, facts)) is not None:
        warnings.warn(warning, stacklevel=3)
    return facts


def accumulation_steps(accelerator: Accelerator) -> int:
    """Return the micro-batches of an update: the engine's number, if its configuration has one. Local."""
    steps: int = accelerator.gradient_accumulation_steps
    if engine_of(accelerator) == "DEEPSPEED":
        return accumulation_of(accelerator.deepspeed_plugin.deepspeed_config, steps)
    return steps


def _micro_batch_size(accelerator: Accelerator, dataloader: DataLoader[Any], sampler: Any, ranks: int) -> int:
    """Return the number of samples in one backward pass on one rank."""
    size: int | None = dataloader.batch_size or getattr(sampler, "batch_size", None)
    if not size:
        raise ValueError(
            "the data loader has no batch size, so the samples of an update are unknown. Give the DataLoader a "
            "batch_size or a batch sampler that has one."
        )
    if not accelerator.split_batches:
        return size
    if size % ranks:
        below, above = size // ranks * ranks, (size // ranks + 1) * ranks
        raise ValueError(
            f"split_batches=True cannot split a batch of {size} over {ranks} ranks. "
            f"The nearest sizes that work: {' and '.join(str(n) for n in (below, above) if n)}."
        )
    return size // ranks


def _check_even(accelerator: Accelerator, dataloader: DataLoader[Any], sampler: Any, facts: LoaderFacts) -> None:
    """Raise if ranks would have different numbers of batches."""
    if facts.samples is None or facts.drop_last or accelerator.even_batches:
        return
    # For iterable data, and if rank 0 reads for all, Accelerate pads the last batch whatever even_batches says.
    if accelerator.dispatch_batches or isinstance(dataloader.dataset, IterableDataset):
        return
    ranks, size = facts.batch.data_parallel_size, facts.batch.micro_batch_size
    count = -(-facts.samples // size)  # micro-batches of all ranks together
    if isinstance(sampler, Sized) and not accelerator.split_batches:
        count = len(sampler)
    if count % ranks:
        raise ValueError(uneven_batches(ranks, count, size))


def _short_accumulation(accelerator: Accelerator, facts: LoaderFacts) -> str | None:
    """Return a warning if an epoch's last accumulation is short and reaches past the epoch size."""
    if not facts.drop_last or facts.samples is None or not accelerator.gradient_state.sync_with_dataloader:
        return None
    batch = facts.batch
    whole = facts.samples // facts.pass_samples
    short = whole % batch.gradient_accumulation_steps
    if not short:
        return None
    return (
        f"with drop_last=True an epoch has {whole} micro-batches, and the last {short} of them make a short "
        f"accumulation of {short * facts.pass_samples} samples beyond the epoch size of {facts.epoch_size} (whole "
        f"global batches of {batch.size}). They are counted, so cycles end slightly before epochs do. Cut the "
        f"data set to a multiple of {batch.size} samples to have the same updates on every number of ranks."
    )


def uneven_batches(ranks: int, count: int, size: int) -> str:
    """Return the error for ``count`` batches, which the ranks cannot share evenly."""
    return (
        f"even_batches=False gives {ranks} ranks different numbers of batches ({count} of {size} samples), and "
        "an update needs every rank. Leave even_batches=True (repeated samples are not counted), or set "
        "drop_last=True."
    )


def shuffle_by_generator(dataloader: DataLoader[Any]) -> None:
    """Give a sampler that shuffles by the global random state its own generator, seeded from that state. Local.

    Accelerate does so only for several ranks. With one rank it makes the order the same and resumable.
    """
    sampler = sampler_of(dataloader)
    if hasattr(sampler, "generator") and sampler.generator is None:
        sampler.generator = torch.Generator()
        sampler.generator.manual_seed(int(torch.empty((), dtype=torch.int64).random_().item()))


def data_parallel_size(accelerator: Accelerator) -> int:
    """Return the number of ranks that see different samples: excludes tensor, context and sequence parallelism."""
    config = getattr(accelerator, "parallelism_config", None)
    same = 1
    for axis in ("tp_size", "cp_size", "sp_size"):
        same *= getattr(config, axis, 1) or 1
    return int(accelerator.num_processes // same)


def _pass_length(dataloader: DataLoader[Any]) -> int | None:
    """Return the number of samples in one pass over the loader, before it is sharded."""
    dataset = dataloader.dataset
    if isinstance(dataset, IterableDataset):
        return len(dataset) if isinstance(dataset, Sized) else None
    sampler: Any = dataloader.sampler
    if isinstance(sampler, BatchSampler):
        sampler = sampler.sampler
    elif dataloader.batch_size is None:  # a custom batch sampler
        sampler = getattr(dataloader.batch_sampler, "sampler", dataset)
    for sized in (sampler, dataset):
        if isinstance(sized, Sized):
            return len(sized)
    return None


def batch_sampler_of(loader: Any) -> Any:
    """Return the innermost batch sampler, before sharding over ranks; None for iterable data. Local."""
    if isinstance(loader.dataset, IterableDataset):
        return None
    found = loader.sampler if isinstance(loader.sampler, BatchSampler) else loader.batch_sampler
    while hasattr(found, "batch_sampler"):
        found = found.batch_sampler
    return found


def sampler_of(loader: Any) -> Any:
    """Return the sampler that yields single indices; None if there is none. Local."""
    return getattr(batch_sampler_of(loader), "sampler", None)
