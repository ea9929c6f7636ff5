"""``save`` and ``load``: write a training state to disk and read it back, on any engine.

Puts together what a process holds (`state`) and where it is kept (`storage.files`), and has all ranks succeed or
fail together.
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
        samples: The clock of the schedule; None without one.
        engine: Which engine wrote it.
        world_size: How many ranks wrote it.
        extra: What was passed to `save` as ``extra``.
        random: The result for this rank's random state: "restored", "seeded anew, since there was no such rank", or
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
    """Write weights, optimizer state, schedule and random state to a folder, of any engine. Collective.

    Each rank writes what it owns, and nothing is gathered. A folder that holds a checkpoint has that one until the
    new one is whole, whenever the job is killed. It loads on any engine and number of ranks.

    Args:
        path: The folder; the same for every rank, on a file system that all of them see.
        model: As it is trained: plain, in DistributedDataParallel, sharded by ``fully_shard``, or a DeepSpeed engine.
        optimizer: `DistAdamW`, or any whose state is tensors and numbers by parameter.
        scheduler: Any whose ``state_dict`` is plain data.
        extra: Plain data of yours, such as the place in the data; the main rank's is kept.
        compare_ranks: Whether to look first if all ranks have the same weights where they should: `check_replicas`.
        group: Of gloo, for messages between ranks; default: the default group, or one next to it if that is NCCL.

    Raises:
        CheckpointError: some rank could not write, or data is not plain; on every rank alike. The folder has the
            checkpoint that it had.
        AgreementError: ranks have other weights, hyper-parameters or schedules; on every rank. Nothing is written.
    """
    group = collectives.host_group() if group is None else group
    if compare_ranks:
        announce_save(optimizer)
        check_replicas(model, optimizer, group=group)
    path, ranks = Path(path), Ranks.now(group)
    local_state, about = collect_state(path if compare_ranks else None, model, optimizer, scheduler, extra, ranks)
    write_state(path, local_state, about, ranks)


def announce_save(optimizer: Optimizer | None) -> None:
    """Raise where a rank goes on with training and does not save, as far as that can be seen. Collective.

    Raises:
        AgreementError: as `DistAdamW.announce_save`.
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
    """Return what this rank writes and what the index says of it. Raises on every rank. Collective.

    Args:
        path: Where to; None: ranks are known to agree.
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
            # The family, which is what a load compares; the class is for who reads it.
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
        about = as_json(about)  # now: what is saved beside training must not change with it
        if wrong := wrong_in(about):
            raise CheckpointError(f"{wrong}, which no load would take: nothing is saved.")
        return local_state, about

    inner = None if optimizer is None else unwrap(optimizer)
    if isinstance(inner, DistAdamW):
        inner.follow()
    local_state, about = ranks.run(gather)
    if path is not None:
        alike = {name: about[name] for name in ("engine", "optimizer", "groups", "scheduler", "schedule")}
        agreement.check_agreement({"folder": str(path), **alike}, ranks.group)
    return local_state, about


def write_state(path: Path, local_state: LocalState, about: Mapping[str, Any], ranks: Ranks) -> None:
    """Write what `collect_state` has returned. Collective.

    Raises:
        CheckpointError: it could not be written; on every rank alike.
    """
    several = ranks.size > 1
    planner = Planner(local_state.tensors, about)
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
        rank, (error, _) = min(failed.failures.items())
        what = str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
        where = f" (rank {rank})" if several else ""
        raise CheckpointError(f"could not write {path}: {what}{where}. {still_there}") from error
    except Exception as error:  # of one process, or of messages between ranks
        writer.discard()
        ranks.check()
        what = str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
        raise CheckpointError(f"could not write {path}: {what}. {still_there}") from error
    except BaseException:  # Ctrl-C in one process; of several, the library has made a failure of it
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
    group: Group = None,
) -> Checkpoint:
    """Put a training state where `save` left it, on any engine and number of ranks. Collective.

    Everything is checked, to the last bit, before anything is changed. Each rank reads the elements that it holds.

    Args:
        path: The folder.
        model: Built and wrapped as for training; also one that another engine has.
        optimizer: Of the same family (any Adam, say) as the one saved; None: weights alone.
        scheduler: Of the same class. The clock goes on where it was, and lr and weight decay are in the groups at once.
        on_difference: When hyper-parameters or the schedule's configuration are others: "strict" raises with the
            difference, "checkpoint" takes the saved ones, "new" keeps those of this job. Default: the scheduler's
            ``on_difference``. lr and weight decay are the schedule's; without a `CyclicLRWithRestarts` they are taken
            over, as by torch's ``load_state_dict``, but by "new".
        random_state: Whether to restore it. A rank has its own back; ranks that there were not go on from the state
            that all ranks had, or get new seeds from theirs if each had another.
        group: As for `save`.

    Raises:
        CheckpointError: the checkpoint is torn, damaged, of another model, optimizer or schedule, or was not there on
            some rank; on every rank alike. Nothing has been changed then; where a disk fails after all was checked,
            the message says that the state is half loaded.
    """
    part = Part(Path(path), model, optimizer, scheduler)
    return load_together([part], on_difference=on_difference, random_state=random_state, group=group)[0]


@dataclass(frozen=True, slots=True)
class Part:
    """A model with what belongs to it, and the folder that has their state."""

    path: Path
    model: nn.Module
    optimizer: Optimizer | None
    scheduler: LRScheduler | None


@dataclass(frozen=True, slots=True)
class _Checked:
    """A part that fits its checkpoint, which is whole; nothing has been changed yet.

    Attributes:
        choice: Of what differs.
        taken: What the parameter groups take.
        restore: Restores the random state.
        make_room: Lays the optimizer's state out again, and says where to read to.
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
    """Load several models as `load`: each is checked, with its tensors, before the first is changed. Collective.

    Raises:
        CheckpointError: as of `load`.
    """
    with contextlib.ExitStack() as until, torch.inference_mode(False):  # what is made here is to be trained on
        group = collectives.host_group() if group is None else group
        ready = [_check(part, on_difference, group, until) for part in parts]
        return [_apply(one, random_state, group) for one in ready]


def _check(part: Part, on_difference: OnDifference | None, group: Group, until: contextlib.ExitStack) -> _Checked:
    path, optimizer, scheduler = part.path, part.optimizer, part.scheduler
    check_alike(path, group)
    index = run_on_all_ranks(lambda: checked(path, collectives.rank(), collectives.world_size(), until), group)
    if len(set(collectives.all_gather_objects(index.digest, group))) > 1:
        raise CheckpointError(f"{path} is not the same on all ranks. Give all machines the same file system.")
    choice: OnDifference = on_difference or getattr(scheduler, "on_difference", None) or "strict"
    ours = run_on_all_ranks(lambda: access(part.model, optimizer), group)
    taken, restore = run_on_all_ranks(lambda: compare(index, ours, optimizer, scheduler, choice), group)
    make_room = run_on_all_ranks(lambda: _make_room(index, ours), group)
    return _Checked(part, index, ours.model, choice, taken, restore, make_room)


def _apply(one: _Checked, random_state: bool, group: Group) -> Checkpoint:
    index, optimizer, scheduler = one.index, one.part.optimizer, one.part.scheduler
    # Room is made, and what was there forgotten, when no rank has found anything wrong.
    local_state = run_on_all_ranks(one.make_room, group)
    try:
        run_on_all_ranks(lambda: _fill(index, local_state), group)
    except CheckpointError as error:
        raise CheckpointError(f"{error} Model and optimizer are half loaded: load a checkpoint.") from error
    with torch.no_grad():
        local_state.finish()  # it may be collective, so only when all ranks have read
    run_on_all_ranks(lambda: restore_extra_state(index, one.model), group)
    about = index.about
    if optimizer is not None:
        for members, values in zip(unwrap(optimizer).param_groups, one.taken, strict=True):
            _take(members, values)
    if isinstance(scheduler, CyclicLRWithRestarts):
        scheduler.load_state_dict(about["schedule"], one.choice)
    elif scheduler is not None:
        scheduler.load_state_dict(with_keys_of(scheduler.state_dict(), about["schedule"]))
    state = one.restore() if random_state else "left alone"
    return Checkpoint(one.part.path, samples_of(index), about["engine"], about["world_size"], about["extra"], state)


def _make_room(index: Index, ours: Access) -> Callable[[], LocalState]:
    """Check what there is to read; return what makes room for it. Local; nothing is changed."""
    kinds: dict[str, set[str]] = {}
    for key in index.tensors:
        kind, _, name = key.partition(".")
        if kind != RNG:  # a parameter may be called "0"
            kinds.setdefault(name, set()).add(kind)
    found = CheckpointContents(
        kinds,
        {key: saved.dtype for key, saved in index.tensors.items()},
        {key: saved.shape for key, saved in index.tensors.items()},
        index.about["scalars"],
    )
    try:
        return ours.to_load(found)
    except CheckpointError as error:
        raise CheckpointError(f"{index.folder}: {error}") from error


def _fill(index: Index, local_state: LocalState) -> None:
    with torch.no_grad():
        _read(index, local_state)
        for one, then in local_state.later():
            _read(index, one)
            then()


def _read(index: Index, local_state: LocalState) -> None:
    # Every rank for itself, since what it needs to know is in the index; as dcp.load does where there is one rank.
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    reader = Reader(index, local_state.sources)
    planner.set_up_planner(dict(local_state.tensors), reader.read_metadata(), True)
    reader.read_data(reader.prepare_local_plan(planner.create_local_plan()), planner)


def _take(group: dict[str, Any], values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(group.get(key), Tensor) and key != "initial_lr":
            group[key].fill_(value)
        else:
            group[key] = tuple(value) if isinstance(value, list) else value
