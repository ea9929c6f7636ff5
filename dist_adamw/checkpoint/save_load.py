"""Write a training state to disk and read it back, on any engine.

Connects `local_state` (what a process holds) with `storage.files` (where it is stored); all ranks succeed or fail
together.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from dist_adamw._version import __version__
from dist_adamw.checkpoint.averages import instead_of_weights
from dist_adamw.checkpoint.compatibility import checked, compare, samples_of, with_keys_of, with_text_keys, wrong_in
from dist_adamw.checkpoint.engine_adapters import access
from dist_adamw.checkpoint.extra_state import extra_state, restore_extra_state
from dist_adamw.checkpoint.local_state import Access, CheckpointContents, LocalState, family_of, only_mine
from dist_adamw.checkpoint.random_state import RNG, current_random_state
from dist_adamw.checkpoint.storage.files import Reader, Writer, as_json
from dist_adamw.checkpoint.storage.index import Index, check_alike
from dist_adamw.checkpoint.storage.locks import Lock
from dist_adamw.checkpoint.storage.planner import Planner, save_alone
from dist_adamw.errors import CheckpointError
from dist_adamw.optimizer.adamw import DistAdamW
from dist_adamw.optimizer.replicas import check_replicas
from dist_adamw.ranks import agreement, collectives
from dist_adamw.ranks.run_on_all import Ranks, run_on_all_ranks
from dist_adamw.schedule.saved import OnDifference
from dist_adamw.schedule.scheduler import CyclicLRWithRestarts
from dist_adamw.wrappers import unwrap

Group = dist.ProcessGroup | None


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The contents of a checkpoint besides its tensors.

    Attributes:
        path: Its folder.
        samples: The schedule's clock; None without a schedule.
        engine: The engine that wrote it.
        world_size: The number of ranks that wrote it.
        extra: The ``extra`` passed to `save`.
        random: How this rank's random state was restored: "restored", "seeded again, since there was no such rank", or
            "left alone".
    """

    path: Path
    samples: int | None
    engine: str
    world_size: int
    extra: dict[str, Any]
    random: str


def save(
    path: str | Path,
    model: nn.Module,
    optimizer: Optimizer | None = None,
    scheduler: LRScheduler | None = None,
    *,
    extra: Mapping[str, Any] | None = None,
    compare_ranks: bool = True,
    group: Group = None,
) -> None:
    """Write weights, optimizer state, schedule and random state to a folder, from any engine. Collective.

    Each rank writes what it owns; nothing is gathered. A folder that already holds a checkpoint keeps it until the new
    one is whole, even if the job is killed. The checkpoint loads on any engine and any number of ranks.

    Args:
        path: The folder; the same on every rank, on a shared file system.
        model: As it is trained: plain, in DistributedDataParallel, sharded by ``fully_shard``, or a DeepSpeed engine.
        optimizer: `DistAdamW`, or any optimizer whose state is tensors and numbers by parameter.
        scheduler: Any scheduler whose ``state_dict`` is plain data.
        extra: Your own plain data, such as the position in the data; the main rank's is saved.
        compare_ranks: Whether to check first that replicas have the same weights on all ranks: `check_replicas`.
        group: A gloo group for messages between ranks; default: the default group, or one next to it if that is NCCL.

    Raises:
        CheckpointError: some rank could not write, or data is not plain; on every rank. The folder keeps the
            checkpoint that it had.
        AgreementError: weights, hyper-parameters or schedules differ between ranks; on every rank. Nothing is written.
    """
    group = collectives.host_group() if group is None else group
    if compare_ranks:
        announce_save(optimizer)
        check_replicas(model, optimizer, group=group)
    path, ranks = Path(path), Ranks.now(group)
    local_state, about = collect_state(path if compare_ranks else None, model, optimizer, scheduler, extra, ranks)
    write_state(path, local_state, about, ranks)


def announce_save(optimizer: Optimizer | None) -> None:
    """Raise if another rank is already in its next update instead of in this save. Collective.

    Raises:
        AgreementError: see `DistAdamW.announce_save`.
    """
    if optimizer is not None and isinstance(inner := unwrap(optimizer), DistAdamW):
        inner.announce_save()


def collect_state(
    path: Path | None,
    model: nn.Module,
    optimizer: Optimizer | None,
    scheduler: LRScheduler | None,
    extra: Mapping[str, Any] | None,
    ranks: Ranks,
) -> tuple[LocalState, dict[str, Any]]:
    """Return what this rank writes, and the index's ``about``. Raises on every rank. Collective.

    Args:
        path: The folder to write to; None: skip the comparison of ranks.
    """

    def gather() -> tuple[LocalState, dict[str, Any]]:
        found = access(model, optimizer)
        local_state = found.to_save()
        modules, tensors = extra_state(found.model)
        local_state.tensors |= only_mine(tensors)
        local_state.tensors[f"{RNG}.{ranks.rank}"] = current_random_state()
        about = {
            "written by": f"dist_adamw {__version__}",
            "time": time.time(),
            "engine": found.engine,
            "world_size": ranks.size,
            # A load compares the family; the class is for human readers.
            "optimizer": None if optimizer is None else family_of(unwrap(optimizer)),
            "optimizer_class": None if optimizer is None else type(unwrap(optimizer)).__qualname__,
            "decay_by": None if optimizer is None else getattr(unwrap(optimizer), "decay_by", None),
            "groups": found.groups(),
            "scalars": local_state.scalars,
            "scheduler": None if scheduler is None else type(scheduler).__name__,
            "schedule": None if scheduler is None else with_text_keys(scheduler.state_dict()),
            "extra": dict(extra or {}),
            "modules": modules,
        }
        about = as_json(about)  # copied here, because training may change it during an asynchronous save
        if wrong := wrong_in(about):
            raise CheckpointError(f"{wrong}, which no load would accept: nothing is saved.")
        return local_state, about

    inner = None if optimizer is None else unwrap(optimizer)
    if isinstance(inner, DistAdamW):
        inner.follow()  # collective, so not in `gather`: a rank that fails there would not take part
    local_state, about = ranks.run(gather)
    if path is not None:
        alike = {name: about[name] for name in ("engine", "optimizer", "groups", "scheduler", "schedule")}
        agreement.check_agreement({"folder": str(path), **alike}, ranks.group)
    return local_state, about


def write_state(path: Path, local_state: LocalState, about: Mapping[str, Any], ranks: Ranks) -> None:
    """Write what `collect_state` returned. Collective.

    Raises:
        CheckpointError: it could not be written; on every rank.
    """
    several = ranks.size > 1
    # The planner holds the tensors itself, so dcp.save gets an empty state dict: see `storage.planner`.
    planner = Planner(local_state.tensors, about)
    # Only the main rank locks: the lock keeps other jobs out, not this job's ranks.
    lock = ranks.run(lambda: _lock(path) if ranks.is_main else None)
    writer = Writer(path, about, ranks.size)
    still_there = "What it held before is still there."
    try:
        if several:
            dcp_save({}, storage_writer=writer, planner=planner, process_group=ranks.group)
        else:
            save_alone(planner, writer)
    except CheckpointException as failed:
        writer.discard()
        rank, (error, _) = min(failed.failures.items())  # the lowest rank's, so that all ranks report the same one
        what = str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
        where = f" (rank {rank})" if several else ""
        raise CheckpointError(f"could not write {path}: {what}{where}. {still_there}") from error
    except Exception as error:  # a single process's error, or a failed collective
        writer.discard()
        ranks.check()  # names the cause if the process group was destroyed
        what = str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
        raise CheckpointError(f"could not write {path}: {what}. {still_there}") from error
    except BaseException:  # Ctrl-C in a single process; dcp.save turns it into a CheckpointException
        writer.discard()
        raise
    finally:
        if lock is not None:
            lock.release()


def _lock(path: Path) -> Lock:
    try:
        return Lock(path)
    except OSError as error:
        raise CheckpointError(f"could not write {path}: {type(error).__name__}: {error}.") from error


def load(
    path: str | Path,
    model: nn.Module,
    optimizer: Optimizer | None = None,
    scheduler: LRScheduler | None = None,
    *,
    on_difference: OnDifference | None = None,
    random_state: bool = True,
    average: str | None = None,
    group: Group = None,
) -> Checkpoint:
    """Restore a training state that `save` wrote, on any engine and any number of ranks. Collective.

    Everything is checked, to the last bit, before anything is changed. Each rank reads only the elements that it holds.

    Args:
        path: The folder.
        model: Built and wrapped as for training; the engine may differ from the one that saved.
        optimizer: Of the same family (any Adam, say) as the one saved; None: load the weights alone.
        scheduler: Of the same class. The clock continues, and lr and weight decay are written into the groups at once.
        on_difference: When hyper-parameters or the schedule's configuration differ: "strict" raises with the
            difference, "checkpoint" takes the saved ones, "new" keeps those of this job. Default: the scheduler's
            ``on_difference``. A `CyclicLRWithRestarts` sets lr and weight decay itself; without one the saved values
            are taken, as by torch's ``load_state_dict``, except under "new".
        random_state: Whether to restore it. Each rank gets its own back. A rank that the saved job did not have gets
            the state that all its ranks shared, or a new seed if they differed.
        average: The name of a saved average of the weights, which the model gets in their place, for inference: see
            `DistAdamW`. Without optimizer and scheduler. A `Mean` with ``last`` is several tensors: export it.
        group: See `save`.

    Raises:
        CheckpointError: the checkpoint is torn, damaged, missing on some rank, or of another model, optimizer or
            schedule; on every rank. Nothing has been changed then, unless a disk fails after the checks: the message
            then says that the state is half loaded.
    """
    if average is not None and (optimizer, scheduler) != (None, None):
        raise CheckpointError(f"average={average!r} replaces the weights, so leave optimizer and scheduler None.")
    part = Part(Path(path), model, optimizer, scheduler, average)
    return load_together([part], on_difference=on_difference, random_state=random_state, group=group)[0]


@dataclass(frozen=True, slots=True)
class Part:
    """A model, its optimizer and scheduler, and the folder with their state."""

    path: Path
    model: nn.Module
    optimizer: Optimizer | None
    scheduler: LRScheduler | None
    average: str | None = None


@dataclass(frozen=True, slots=True)
class _Checked:
    """A part whose checkpoint is whole and fits it; nothing has been changed yet.

    Attributes:
        choice: How to resolve differences.
        taken: The values that the parameter groups take.
        restore: Restores the random state.
        make_room: Allocates the optimizer's state, and returns the tensors to read into.
    """

    part: Part
    index: Index
    model: nn.Module
    choice: OnDifference
    taken: list[dict[str, Any]]
    restore: Callable[[], str]
    make_room: Callable[[], LocalState]


def load_together(
    parts: Sequence[Part],
    *,
    on_difference: OnDifference | None = None,
    random_state: bool = True,
    group: Group = None,
) -> list[Checkpoint]:
    """Load several models as `load` does; all are checked before the first is changed. Collective.

    Raises:
        CheckpointError: see `load`.
    """
    # A tensor created in inference mode could not be trained on.
    with contextlib.ExitStack() as until, torch.inference_mode(False):
        group = collectives.host_group() if group is None else group
        ready = [_check(part, on_difference, group, until) for part in parts]
        return [_apply(one, random_state, group) for one in ready]


def _check(part: Part, on_difference: OnDifference | None, group: Group, until: contextlib.ExitStack) -> _Checked:
    path, optimizer, scheduler = part.path, part.optimizer, part.scheduler
    check_alike(path, group)
    index = run_on_all_ranks(lambda: checked(path, collectives.rank(), collectives.world_size(), until), group)
    # Each rank has read its own index: on node-local disks, two saves may have the same path.
    if len(set(collectives.all_gather_objects(index.digest, group))) > 1:
        raise CheckpointError(f"{path} is not the same on all ranks. Give all machines the same file system.")
    choice: OnDifference = on_difference or getattr(scheduler, "on_difference", None) or "strict"
    ours = run_on_all_ranks(lambda: access(part.model, optimizer), group)
    taken, restore = run_on_all_ranks(lambda: compare(index, ours, optimizer, scheduler, choice), group)
    make_room = run_on_all_ranks(lambda: _make_room(index, ours, part.average), group)
    return _Checked(part, index, ours.model, choice, taken, restore, make_room)


def _apply(one: _Checked, random_state: bool, group: Group) -> Checkpoint:
    index, optimizer, scheduler = one.index, one.part.optimizer, one.part.scheduler
    # This drops the old optimizer state, so it runs only after every rank's checks have passed.
    local_state = run_on_all_ranks(one.make_room, group)
    try:
        run_on_all_ranks(lambda: _fill(index, local_state), group)
    except CheckpointError as error:
        raise CheckpointError(f"{error} Model and optimizer are half loaded: load a checkpoint.") from error
    with torch.no_grad():
        local_state.finish()  # may be collective, so not inside run_on_all_ranks
    run_on_all_ranks(lambda: restore_extra_state(index, one.model), group)
    about = index.about
    if optimizer is not None:
        for members, values in zip(unwrap(optimizer).param_groups, one.taken, strict=True):
            _take(members, values)
    if isinstance(scheduler, CyclicLRWithRestarts):
        scheduler.load_state_dict(about["schedule"], one.choice)
    elif scheduler is not None:
        scheduler.load_state_dict(with_keys_of(scheduler.state_dict(), about["schedule"]))
    # Last: set_extra_state and load_state_dict run user code, which may draw random numbers.
    state = one.restore() if random_state else "left alone"
    return Checkpoint(one.part.path, samples_of(index), about["engine"], about["world_size"], about["extra"], state)


def _make_room(index: Index, ours: Access, average: str | None) -> Callable[[], LocalState]:
    """Check the saved tensors; return the function that allocates room for them. Local; changes nothing."""
    kinds: dict[str, set[str]] = {}
    for key in index.tensors:
        kind, _, name = key.partition(".")
        if kind != RNG:  # "rng.0" would look like state of a parameter named "0"
            kinds.setdefault(name, set()).add(kind)
    found = CheckpointContents(
        kinds,
        {key: saved.dtype for key, saved in index.tensors.items()},
        {key: saved.shape for key, saved in index.tensors.items()},
        index.about["scalars"],
    )
    try:
        make_room = ours.to_load(found)
    except CheckpointError as error:
        raise CheckpointError(f"{index.folder}: {error}") from error
    return make_room if average is None else instead_of_weights(index, average, make_room)


def _fill(index: Index, local_state: LocalState) -> None:
    with torch.no_grad():
        _read(index, local_state)
        for one, then in local_state.later():
            _read(index, one)
            then()


def _read(index: Index, local_state: LocalState) -> None:
    # dcp.load(no_dist=True) in its parts. No collectives: the index has all that a rank needs to plan its reads.
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    reader = Reader(index, local_state.sources)
    planner.set_up_planner(dict(local_state.tensors), reader.read_metadata(), True)
    reader.read_data(reader.prepare_local_plan(planner.create_local_plan()), planner)


def _take(group: dict[str, Any], values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        # A tensor is filled in place: a captured or compiled step reads this one.
        if isinstance(group.get(key), Tensor) and key != "initial_lr":
            group[key].fill_(value)
        else:
            group[key] = tuple(value) if isinstance(value, list) else value
