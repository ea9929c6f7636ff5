"""What a data loader says of batches, and where in the data a job stands, for any number of ranks.

Floor 4: knows Accelerate's loaders.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sized
from dataclasses import dataclass
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


def shuffle_by_generator(dataloader: DataLoader[Any]) -> None:
    """Give a sampler that shuffles by the global random state a generator of its own, seeded from that. Local.

    Accelerate does so for several ranks. With one too, the order is the same, and can be gone on with.
    """
    sampler = _sampler(dataloader)
    if hasattr(sampler, "generator") and sampler.generator is None:
        sampler.generator = torch.Generator()
        sampler.generator.manual_seed(int(torch.empty((), dtype=torch.int64).random_().item()))


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


class Position:
    """Where in the data a job stands: as many samples into which epoch, all ranks together.

    The samples of an epoch come in one order on any number of ranks, so their number says which are left. The loader
    has it, and it has the loader weakly: one that nobody has any more ends its workers at once.

    Attributes:
        epoch: Passes over the loader that are complete.
        samples: Real samples of this epoch that have been handed out.
        start: Of those, the ones that were handed out before this job, or the load.
        idle: Whether nothing has been handed out in this job, or since the load.
    """

    def __init__(self, loader: DataLoader[Any], facts: LoaderFacts) -> None:
        self._loader, self.facts = weakref.ref(loader), facts
        self.epoch = self.samples = self.start = 0
        self.idle = True
        self._loads = 0  # a loop that was running when the position was loaded ends
        self._order: str | None = None  # state of the generator that shuffles, when it began with this epoch
        self._resumed: _Order | None = None  # for the next pass
        self._before: tuple[int, str | None] = (0, None)  # start and order of the epoch before

    @property
    def loader(self) -> Any:
        """As `prepare` returned it.

        Raises:
            ValueError: nobody has it any more.
        """
        if (loader := self._loader()) is None:
            raise ValueError("the loader of this position is gone. Keep what prepare returned.")
        return loader

    @property
    def is_gone(self) -> bool:
        """Whether nobody has the loader any more. Local."""
        return self._loader() is None

    def __deepcopy__(self, memo: dict[int, Any]) -> Position:
        """In a copy of the loader: that one's."""
        copied = copy.copy(self)
        memo[id(self)] = copied
        for name, value in vars(self).items():
            if name != "_loader":
                setattr(copied, name, copy.deepcopy(value, memo))
        if (theirs := memo.get(id(self._loader()))) is not None:
            copied._loader = weakref.ref(theirs)
        return copied

    def state_dict(self, pending: int = 0) -> dict[str, Any] | None:
        """As plain data; None where the loop does not go through `rest_of_epoch`. Local.

        Args:
            pending: How many of the micro-batches handed out came since the last update: nobody saves their gradients.

        Raises:
            CheckpointError: they began before the last epoch.
        """
        if self.epoch == self.samples == 0 and self._order is None and self._resumed is None:
            return None
        if self._resumed is not None:  # as it was loaded
            return self._told(self.epoch, self.samples, self._resumed)
        epoch, order = self.epoch, self._order
        samples = self._samples_before(self.start, self.samples, pending)
        if samples is None:  # an accumulation across the end of an epoch
            of_this = -(-(self.samples - self.start) // self.facts.pass_samples)
            epoch, (start, order) = epoch - 1, self._before
            total = self.facts.samples
            samples = None if total is None else self._samples_before(start, total, pending - of_this)
            if samples is None or order is None:
                raise CheckpointError(
                    f"{pending} micro-batches have been accumulated since the last update, more than an epoch has: "
                    "where they begin is not known. Save after an update."
                )
        drawn = True
        if order is None or self._is_over(samples):  # between two epochs, or in the loop at the last batch
            epoch, samples, order = epoch + (samples > 0), 0, _state_of(self._generator())
            drawn = getattr(self._base(), "_iterator", None) is not None  # of workers that persist
        return self._told(epoch, samples, _Order(order, drawn))

    def _told(self, epoch: int, samples: int, order: _Order) -> dict[str, Any]:
        return {"epoch": epoch, "samples": samples, "seed": self._seed(), "order": order.state, "drawn": order.drawn}

    def _samples_before(self, start: int, samples: int, micro_batches: int) -> int | None:
        """``samples`` of an epoch that began at ``start``, less so many micro-batches; None where it has fewer."""
        size = self.facts.pass_samples
        handed_out = -(-(samples - start) // size)
        if micro_batches > handed_out:
            return None
        return samples if not micro_batches else start + (handed_out - micro_batches) * size

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Go to where a job, of any number of ranks, stood. Local.

        Raises:
            CheckpointError: this is no position. Nothing has been changed then.
        """
        self.check(state)
        state = state or {"epoch": 0, "samples": 0, "seed": None, "order": None}
        self.epoch, self.samples = state["epoch"], state["samples"]
        self.start, self._order, self._before = 0, None, (0, None)
        # Older checkpoints have the state of before the loader began.
        self._resumed = None if state["order"] is None else _Order(state["order"], state.get("drawn", False))
        self.idle = True
        self._loads += 1
        if self.is_gone:
            return
        if state["seed"] is not None and (sampler := _sampler(self.loader)) is not None:
            sampler.initial_seed = state["seed"]

    def check(self, state: Mapping[str, Any] | None) -> None:
        """Raise where this is no position. Local.

        Raises:
            CheckpointError: with what is wrong.
        """
        if state is None:
            return
        try:
            order = None if state["order"] is None else bytes.fromhex(state["order"])
            if not (_is_count(state["epoch"]) and _is_count(state["samples"]) and "seed" in state):
                raise ValueError("no whole numbers")
            if order:
                torch.Generator().set_state(torch.frombuffer(bytearray(order), dtype=torch.uint8))
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"this is no position in the data: {error}, got {str(state)[:200]}.") from error

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

    def _base(self) -> Any:
        """torch's loader in Accelerate's."""
        return getattr(self.loader, "base_dataloader", self.loader)

    def _begin(self) -> None:
        """Note, or restore, the state of what shuffles. Called when the sampler begins."""
        generator, resumed = self._generator(), self._resumed
        if resumed is not None and resumed.state and generator is not None:
            generator.set_state(torch.frombuffer(bytearray.fromhex(resumed.state), dtype=torch.uint8))
            if not resumed.drawn and self._base().generator is generator:
                # As the loader did that went on here, for the seed of its workers.
                torch.empty((), dtype=torch.int64).random_(generator=generator)
        self._order = _state_of(generator)

    def __iter__(self) -> Iterator[Any]:
        return self._batches(self.loader)  # which it keeps from now on

    def _batches(self, loader: Any) -> Iterator[Any]:
        self.start, size, loads = self.samples, self.facts.pass_samples, self._loads
        self.idle = False
        if (order := self._order) is not None:  # a loop was left
            self._order, self._resumed = None, _Order(order, drawn=True)
        # A loader draws a seed for its workers when it begins. One that was interrupted had done so.
        outside = torch.get_rng_state() if self._resumed is not None and self._resumed.drawn else None
        loader.iteration = self.epoch  # Accelerate's loader sets the epoch of the samplers by it
        with _from(loader, self.start, self.facts, self._begin):
            for batch in loader:
                if outside is not None:
                    torch.set_rng_state(outside)
                    outside = None
                if self._order is None:  # the main rank alone samples
                    self._begin()
                self._resumed = None
                self.samples += size
                if self.facts.samples is not None:
                    self.samples = min(self.samples, self.facts.samples)
                yield batch
                if self._loads != loads:
                    return
        self._before = (self.start, self._order)
        self.epoch, self.samples, self.start, self._order, self._resumed = self.epoch + 1, 0, 0, None, None


@dataclass(frozen=True, slots=True)
class _Order:
    """What a checkpoint says of the order of samples.

    Attributes:
        state: Of the generator that shuffles; empty where there is none.
        drawn: Whether the loader had drawn what it draws when it begins. Then the state is the sampler's own; else the
            loader draws from the same generator first.
    """

    state: str
    drawn: bool


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
    """What another sampler gives after its first ``start`` samples.

    Args:
        sampler: The other one.
        start: How many are left out.
        head: The first so many are given nevertheless, and then not again: Accelerate pads an epoch's last batch with
            them, and leaves them out itself.
        begin: Called before the other one begins.
    """

    def __init__(self, sampler: Any, start: int, head: int, begin: Callable[[], None]) -> None:
        self.sampler, self.start, self.head, self.begin = sampler, start, head, begin

    def __iter__(self) -> Iterator[Any]:
        self.begin()
        indices = iter(self.sampler)
        yield from itertools.islice(indices, self.head)
        for _ in range(self.start - self.head):
            next(indices, None)
        yield from indices

    def __len__(self) -> int:
        return max(0, len(self.sampler) - self.start)

    def __getattr__(self, name: str) -> Any:  # set_epoch, and what else Accelerate asks its samplers
        return getattr(vars(self).get("sampler"), name)  # none yet while it is being copied


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
def _from(loader: Any, start: int, facts: LoaderFacts, begin: Callable[[], None]) -> Iterator[None]:
    """Have ``loader`` begin at sample ``start``, and call ``begin`` when its sampler begins."""
    batches, size = _batches(loader), facts.pass_samples
    whole = getattr(batches, "sampler", None)
    if whole is None:  # an iterable data set, or batches of the user's own making
        if start % size:
            raise CheckpointError(
                f"the job stands {start} samples into data of which only batches can be left out, and batches of "
                f"{size} over all ranks do not reach that. Use a global batch that divides it."
            )
        loader.skip_batches = start // size
        begin()
    else:
        while isinstance(whole, _Rest):  # of a loop that nobody has ended
            whole = whole.sampler
        padded = facts.last_pass_samples < size and facts.batch.data_parallel_size > 1
        head = size if start and padded and start % size == 0 else 0
        rest = batches.sampler = _Rest(whole, start, head, begin)
        loader.skip_batches = head // size
    try:
        yield
    finally:
        if whole is None:
            loader.skip_batches = 0
        elif batches.sampler is rest:
            batches.sampler, loader.skip_batches = whole, 0
