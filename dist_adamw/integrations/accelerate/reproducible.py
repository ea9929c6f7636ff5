"""What ``DistAdamW(reproducible=True)`` needs of Accelerate: the same micro-batches, and their mean taken once."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Mapping, Sized
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.data import DataLoader, IterableDataset

from dist_adamw.integrations.accelerate.checks import has_communication_hook
from dist_adamw.integrations.accelerate.counting import SampleCounter, passes_with_batches
from dist_adamw.integrations.accelerate.data import LoaderFacts, engine_of
from dist_adamw.integrations.accelerate.loader import listen
from dist_adamw.integrations.accelerate.loader_iteration import Batch, Run, is_dispatched
from dist_adamw.optimizer.adamw import DistAdamW
from dist_adamw.optimizer.sharding.schemes import NOT_UNDER_DEEPSPEED

if TYPE_CHECKING:
    from accelerate import Accelerator

_ALIGNMENT = 64  # bytes, as torch allocates on a CPU


def check_reproducible(
    accelerator: Accelerator, dataloader: DataLoader[Any], facts: LoaderFacts, *, whole_gradients: bool
) -> None:
    """Refuse what would make the weights depend on the number of ranks. Local, and the same on every rank.

    Raises:
        ValueError: says what to do instead.
    """
    if engine_of(accelerator) == "DEEPSPEED":
        raise ValueError(NOT_UNDER_DEEPSPEED)
    if accelerator.scaler is not None:
        raise ValueError(
            "reproducible=True is not supported with a GradScaler (fp16), whose scale depends on the gradients that a "
            "rank has seen. Use mixed_precision='bf16' or 'no'."
        )
    if whole_gradients or has_communication_hook(accelerator):
        raise ValueError(
            "reproducible=True averages gradients itself, in place of DistributedDataParallel. Leave whole_gradients "
            "and the communication hook out."
        )
    _check_micro_batches(accelerator, facts)
    if isinstance(dataloader.dataset, IterableDataset):
        _check_iterable(accelerator, dataloader, facts)


def _check_micro_batches(accelerator: Accelerator, facts: LoaderFacts) -> None:
    batch, ranks = facts.batch, facts.batch.data_parallel_size
    if accelerator.split_batches and ranks > 1:
        raise ValueError(
            f"reproducible=True with split_batches=True would compute micro-batches of {batch.micro_batch_size} "
            f"samples on {ranks} ranks, and larger or smaller ones on another number. Give the data loader the "
            "micro-batch as its batch_size, and leave split_batches=False."
        )
    if facts.samples is not None:
        _check_samples(facts.samples, facts)


def _check_samples(samples: int, facts: LoaderFacts) -> None:
    """Refuse an epoch of ``samples`` if Accelerate would repeat some, or leave some out. Local."""
    batch, ranks = facts.batch, facts.batch.data_parallel_size
    count, rest = divmod(samples, batch.micro_batch_size)
    if (rest and not facts.drop_last) or count % ranks:
        below = samples // batch.size * batch.size
        sizes = " or ".join(str(size) for size in (below, below + batch.size) if size)
        raise ValueError(
            f"reproducible=True: an epoch of {samples} samples is {count} micro-batches of {batch.micro_batch_size} "
            f"and {rest} samples, which do not divide among {ranks} ranks: Accelerate would repeat or drop samples, "
            f"others on another number of ranks. Cut or extend the data set to {sizes} samples."
        )


def _check_iterable(accelerator: Accelerator, dataloader: DataLoader[Any], facts: LoaderFacts) -> None:
    """Refuse iterable data whose order depends on the number of ranks, or whose end cannot be observed. Local."""
    is_dispatching = accelerator.dispatch_batches is not False  # None: iterable data are
    if not is_dispatching and dataloader.num_workers > 1:
        raise ValueError(
            f"reproducible=True: with dispatch_batches=False and num_workers={dataloader.num_workers} the order of an "
            "IterableDataset depends on the number of ranks. Use one worker at most, or leave dispatch_batches=None."
        )
    if facts.samples is not None:
        return
    if is_dispatching and facts.drop_last and facts.batch.data_parallel_size > 1:
        raise ValueError(
            "reproducible=True with dispatch_batches and drop_last=True would leave out samples at the end of data "
            "without a length, others on another number of ranks, and only rank 0 knows of it. Give the data set a "
            "__len__, or set drop_last=False or dispatch_batches=False."
        )
    if accelerator.use_stateful_dataloader:
        raise ValueError(
            "reproducible=True cannot observe the end of data without a length with use_stateful_dataloader=True. Give "
            "the data set a __len__."
        )


@contextlib.contextmanager
def undivided(accelerator: Accelerator) -> Iterator[None]:
    """Have ``accelerator.backward`` not divide the loss by the accumulation, which depends on the number of ranks.

    The optimizer divides the sum of the micro-batches by their number, once.
    """
    kwargs = accelerator.gradient_state.plugin_kwargs
    before = dict(kwargs)
    kwargs["num_steps"] = 1
    try:
        yield
    finally:
        kwargs.clear()
        kwargs.update(before)


class ReproducibleLoading:
    """Follows Accelerate's loaders for an optimizer with ``reproducible=True``. Local.

    - Random numbers of forward passes are counted from each batch.
    - Batches begin at an aligned address: a matrix product may take another path, and round differently, for rows that
      are cut from a larger batch, as on rank 0 with ``dispatch_batches``.
    - Data without a length must end with a whole round of micro-batches.
    - A backward pass needs a batch.

    Args:
        optimizer: Held weakly; it keeps this object.
        counter: Its sample counter.
        facts: The prepared loader's; other loaders with the same batch size are held to them too.
    """

    def __init__(self, optimizer: DistAdamW, counter: SampleCounter, facts: LoaderFacts) -> None:
        self._optimizer, self._counter, self._facts = weakref.ref(optimizer), weakref.ref(counter), facts
        optimizer._data = self
        listen(self)

    # ---------------------------------------------------------------- what loaders do

    def begins(self, run: Run) -> None:
        """Have batches aligned, and the end of data observed."""
        run.convert = aligned
        loader = run.loader()
        if loader is None or is_dispatched(loader) or not self._is_like_ours(loader):
            return
        shard = loader.dataset
        dataset = shard.dataset if type(shard).__name__ == "IterableDatasetShard" else shard
        if isinstance(dataset, IterableDataset) and not isinstance(dataset, Sized):
            run.wrap = self._observed

    def handed_out(self, batch: Batch) -> None:
        """Count random numbers from here, and refuse a last round that Accelerate has padded.

        Raises:
            ValueError: it has, on every rank.
        """
        if (optimizer := self._optimizer()) is not None:
            optimizer._batch_came()
        loader = batch.run.loader()
        if not batch.is_last or loader is None or not is_dispatched(loader) or not self._is_like_ours(loader):
            return
        if batch.end - batch.begin != self._facts.pass_samples:
            _check_samples(batch.end, self._facts)

    def ended(self, run: Run) -> None:
        """Do nothing."""

    def _is_like_ours(self, loader: Any) -> bool:
        return torch.is_grad_enabled() and loader.batch_size == self._facts.batch.micro_batch_size

    def _observed(self, dataset: IterableDataset[Any]) -> _WholeRounds:
        return _WholeRounds(dataset, self._facts)

    # ---------------------------------------------------------------- what the optimizer asks

    def problem(self, kept: int, *, for_update: bool) -> str | None:
        """See `MicroBatchData`."""
        counter = self._counter()
        if kept < 2 or counter is None:
            return None
        batches = passes_with_batches(counter, in_step=for_update)
        if not batches or batches >= kept:  # none: the batches of this update came from elsewhere, or earlier
            return None
        return (
            f"reproducible=True: this update has {kept} backward passes on this rank and {batches} batches from "
            "loaders. Each backward pass counts as a micro-batch, so their order would depend on the number of ranks. "
            "Add the losses of a batch, and call backward once."
        )


class _WholeRounds(IterableDataset[Any]):
    """Iterable data that raises at its end unless its micro-batches divide among the ranks. Every rank reads it all."""

    def __init__(self, dataset: IterableDataset[Any], facts: LoaderFacts) -> None:
        self._dataset, self._facts = dataset, facts

    def __iter__(self) -> Iterator[Any]:
        samples = 0
        for sample in self._dataset:
            samples += 1
            yield sample
        _check_samples(samples, self._facts)

    def __getattr__(self, name: str) -> Any:  # set_epoch and generator, which Accelerate asks for
        return getattr(vars(self).get("_dataset"), name)


def aligned(batch: Any) -> Any:
    """Return ``batch`` with copies of tensors that begin at another address than torch allocates at. Local."""
    if not any(map(_is_misaligned, _tensors_in(batch))):
        return batch
    from accelerate.utils import recursively_apply

    return recursively_apply(torch.clone, batch, test_type=_is_misaligned)


def _tensors_in(batch: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested mappings, lists and tuples, as Accelerate finds them."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from _tensors_in(value)
    elif isinstance(batch, list | tuple):
        for value in batch:
            yield from _tensors_in(value)


def _is_misaligned(tensor: Any) -> bool:
    if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or is_traceable_wrapper_subclass(tensor):
        return False
    return tensor.data_ptr() % _ALIGNMENT != 0
