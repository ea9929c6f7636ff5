"""``prepare``: make the five objects of an Accelerate training script work together."""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, overload

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader
from torch.utils.hooks import RemovableHandle

from dist_adamw.integrations.accelerate.accelerator_methods import patch_accelerator, register
from dist_adamw.integrations.accelerate.accumulation import begin_accumulation, follow_batches, loader_facts_of
from dist_adamw.integrations.accelerate.checks import (
    DATA_PARALLEL,
    check_engine,
    check_scheduler,
    has_communication_hook,
)
from dist_adamw.integrations.accelerate.counting import SampleCounter
from dist_adamw.integrations.accelerate.data import LoaderFacts, engine_of, shuffle_by_generator
from dist_adamw.integrations.accelerate.position import Position
from dist_adamw.integrations.accelerate.prepared_objects import Prepared
from dist_adamw.integrations.accelerate.reproducible import ReproducibleLoading, check_reproducible
from dist_adamw.integrations.accelerate.update_count import send_counts_with
from dist_adamw.integrations.deepspeed.configuration import (
    CLIPPING,
    configure,
    fill,
    names_our_types,
    register_deepspeed,
)
from dist_adamw.optimizer.adamw import DistAdamW
from dist_adamw.optimizer.attaching import averages_over
from dist_adamw.optimizer.averages import AVERAGED
from dist_adamw.optimizer.replicas import CHECK_WEIGHTS_EVERY, ReplicaWatch, check_replicas
from dist_adamw.plain_data import plain
from dist_adamw.range_test.prepared import note_prepared
from dist_adamw.ranks import agreement, collectives
from dist_adamw.ranks.run_on_all import first_problem
from dist_adamw.schedule.group_digests import GroupDigests
from dist_adamw.schedule.scheduler import CyclicLRWithRestarts
from dist_adamw.wrappers import unwrap

if TYPE_CHECKING:
    from accelerate import Accelerator

# By optimizer: the hook that compares ranks before its updates, which a second `prepare` replaces.
_WATCHING: weakref.WeakKeyDictionary[Optimizer, RemovableHandle] = weakref.WeakKeyDictionary()


@overload
def prepare(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Optimizer,
    dataloader: DataLoader[Any],
    scheduler: CyclicLRWithRestarts,
    *,
    check_weights_every: int | None = ...,
    whole_gradients: bool = ...,
) -> tuple[nn.Module, Optimizer, DataLoader[Any], CyclicLRWithRestarts]: ...


@overload
def prepare(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Optimizer,
    dataloader: DataLoader[Any],
    scheduler: LRScheduler,
    *,
    check_weights_every: int | None = ...,
    whole_gradients: bool = ...,
) -> tuple[nn.Module, Optimizer, DataLoader[Any], Any]: ...


def prepare(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Optimizer,
    dataloader: DataLoader[Any],
    scheduler: LRScheduler,
    *,
    check_weights_every: int | None = CHECK_WEIGHTS_EVERY,
    whole_gradients: bool = False,
) -> tuple[nn.Module, Optimizer, DataLoader[Any], Any]:
    """Call ``accelerator.prepare``, and connect the scheduler with the loader and the accelerator.

    Fills in ``batch_size`` and ``epoch_size`` if they are None, counts the real samples of every update, makes
    ``accelerator.save_state`` and ``load_state`` save every rank's shard of the optimizer, and makes all ranks compare
    their schedule and hyper-parameters, now and at every update, and their weights from time to time. The training loop
    needs no changes.

    Args:
        accelerator: The accelerator. Its ``gradient_accumulation_steps`` is part of the global batch; with a batch-size
            schedule it follows that, in ``accelerator.accumulate``.
        model: As for ``accelerator.prepare``.
        optimizer: A `DistAdamW`, or any torch optimizer. With a DeepSpeed configuration that names optimizer and
            scheduler, Accelerate's ``DummyOptim``, and its ``DummyScheduler`` below.
        dataloader: The training loader, not prepared yet.
        scheduler: Not prepared yet. A `CyclicLRWithRestarts` is returned without a wrapper, since it needs none. Any
            other torch scheduler is returned in Accelerate's wrapper, which steps it once per process at each update
            (unless ``split_batches``). Everything else here applies to it too.
        check_weights_every: Updates between two bitwise comparisons of the ranks' replicas: see `check_replicas`. The
            first is at the first update; ``accelerator.save_state`` makes one before it writes. 0 or None: no
            comparisons, for ranks that are meant to differ (local SGD).
        whole_gradients: Keep DDP's all-reduce, for scripts that read or change ``param.grad`` between backward and
            step. It sends a third more.

    Returns:
        Model, optimizer, loader and scheduler, to use in place of those passed.

    Raises:
        ValueError: the global batch or the epoch size is unknown, or the batch differs from the
            scheduler's; on every rank, and nothing is prepared then.
        AgreementError: ranks passed different arguments; on every rank. Later, the optimizer's ``step`` and
            ``accelerator.save_state`` raise it.

    Under FSDP2 and DeepSpeed the engine shards gradients and state; `DistAdamW` updates the shards.
    With DeepSpeed, ``prepare`` passes ``max_grad_norm`` to the engine, which clips to 1.0 by default, and
    keeps DeepSpeed from replacing the optimizer (optimizer offload).

    A `DistAdamW` under DDP is attached (`DistAdamW.attach`): gradients are reduced to their owners, and
    ``accelerator.clip_grad_norm_`` clips by their global norm. With a GradScaler (fp16) or a
    communication hook of yours, DDP's all-reduce stays.

    After backward, ``param.grad`` then has the average over ranks in the elements that this rank owns; the others have
    no meaning. ``optimizer.gather_gradients()`` (of the `DistAdamW` itself) makes it whole, as after DDP; with
    ``whole_gradients=True`` it always is. ``accelerator.clip_grad_norm_`` and ``clip_grad_value_`` are correct either
    way (with ``reproducible`` the latter is refused); ``step`` refuses other changes of gradients unless
    ``optimizer.accept_gradients()`` is called.

    It may be called again for another phase of training, with the same optimizer or a new one, and the prepared model.
    Accelerate's ``LocalSGD`` needs ``DistAdamW(shard=False)`` and ``check_weights_every=0``.

    DDP keeps a second copy of the gradients by default, and nothing could be sent during backward, so ``prepare`` sets
    ``gradient_as_bucket_view``, also in the ``DistributedDataParallelKwargs`` that you gave to the accelerator.

    Collective: every rank calls it.
    """
    group = host_group(accelerator)
    own_options = {
        "prepare(check_weights_every)": check_weights_every or 0,
        "prepare(whole_gradients)": bool(whole_gradients),
        "DistAdamW(reproducible)": getattr(unwrap(optimizer), "reproducible", False),
    }
    facts = _agreed_facts(accelerator, optimizer, dataloader, scheduler, group, own_options)
    begin_accumulation(accelerator, optimizer, scheduler, facts)
    if own_options["DistAdamW(reproducible)"]:
        check_reproducible(accelerator, dataloader, facts, whole_gradients=whole_gradients)
    if accelerator.ddp_handler is None or isinstance(unwrap(optimizer), DistAdamW):
        use_bucket_views(accelerator)
    from_json = _is_dummy(optimizer)
    config = _deepspeed_config(accelerator)
    if config is not None:
        _complete(config, optimizer, facts)
    groups = _hyper_parameters(optimizer)  # to compare with what the engine makes of them
    shuffle_by_generator(dataloader)  # first: Accelerate wraps the sampler
    model, wrapped, dataloader, stepped = accelerator.prepare(model, optimizer, dataloader, scheduler)
    inner = unwrap(wrapped)
    if from_json:
        # DeepSpeed has only now made the scheduler, so `_agreed_facts` could not compare it over ranks.
        scheduler = check_scheduler(stepped.scheduler)
        check_schedules(accelerator, scheduler, group)
    else:
        _check_kept(unwrap(optimizer), inner, groups)
    ours = scheduler if isinstance(scheduler, CyclicLRWithRestarts) else None
    counter = SampleCounter(inner, accelerator, group=group)
    patch_accelerator(accelerator, counter=counter)
    _count_for(ours, counter)
    follow_batches(accelerator, scheduler, facts)
    position = Position(dataloader, facts, counter)
    dataloader.dist_adamw_position = position  # by which `rest_of_epoch` and a copy of the loader find it
    watch = _watch(accelerator, model, inner, ours, check_weights_every, group)
    if not whole_gradients and isinstance(inner, DistAdamW):
        attach(accelerator, model, inner)
        if inner.reproducible:
            ReproducibleLoading(inner, counter, facts)
    clipping = None
    if config is not None:
        from dist_adamw.integrations.deepspeed.zero_state import prepare_deepspeed

        prepare_deepspeed(model, scheduler)
        clipping = float(config[CLIPPING])
    if isinstance(inner, DistAdamW):
        inner.use_model(model)
        wrapped.averaged = inner.averaged
    register(accelerator, Prepared(model, wrapped, stepped, scheduler, position, watch, group, clipping))
    note_prepared(accelerator, inner, scheduler)
    return model, wrapped, dataloader, stepped if ours is None else ours


def _deepspeed_config(accelerator: Accelerator) -> Any:
    """Return the DeepSpeed configuration; None under other engines. Local."""
    return accelerator.deepspeed_plugin.deepspeed_config if engine_of(accelerator) == "DEEPSPEED" else None


def _complete(config: Any, optimizer: Optimizer, facts: LoaderFacts) -> None:
    """Complete the DeepSpeed configuration from the optimizer and the loader. Local."""
    configure(config, optimizer)
    if _is_dummy(optimizer):
        register_deepspeed()
        fill(config, facts.batch.size, facts.epoch_size)


def _count_for(scheduler: CyclicLRWithRestarts | None, counter: SampleCounter) -> None:
    """Make ``counter`` the schedule's sample source; without our schedule, let it follow updates itself. Local."""
    if scheduler is None:
        counter.follow_updates()
    else:
        scheduler.sample_source = counter


def _watch(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Optimizer,
    scheduler: CyclicLRWithRestarts | None,
    check_weights_every: int | None,
    group: dist.ProcessGroup | None,
) -> ReplicaWatch | None:
    """Make ranks compare their schedule and weights at updates of ``optimizer``; None for one rank. Local."""
    if accelerator.num_processes == 1:
        return None
    whole = accelerator.unwrap_model(model)
    record = _record_at_update(model, optimizer) if scheduler is None else scheduler._scheduled.digested_record
    watch = ReplicaWatch(group, record, lambda: check_replicas(whole, optimizer, group=group), check_weights_every)
    if scheduler is not None:
        send_counts_with(watch, scheduler)
    if (before := _WATCHING.pop(optimizer, None)) is not None:  # from an earlier call
        before.remove()
    _WATCHING[optimizer] = optimizer.register_step_pre_hook(watch.before_update)
    return watch


def check_schedules(accelerator: Accelerator, scheduler: CyclicLRWithRestarts, group: dist.ProcessGroup | None) -> None:
    """Raise on every rank if their schedules differ. Collective."""
    if accelerator.num_processes > 1:
        agreement.check_agreement({**scheduler.configuration(), **scheduler.agreement_record()}, group)


def plain_hyper_parameters(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Return the hyper-parameters of all groups as plain data. Local."""
    return [
        {k: plain(v) for k, v in group.items() if k not in ("params", "param_names")}
        for group in optimizer.param_groups
    ]


def _record_at_update(model: nn.Module, optimizer: Optimizer) -> Callable[[], dict[str, Any]]:
    """Return a function for the record that ranks compare at an update, if the schedule is not ours. Local."""
    begun, digests = 0, GroupDigests()

    def count(*_: Any) -> None:
        nonlocal begun
        begun += 1

    optimizer.register_step_pre_hook(count)

    def record() -> dict[str, Any]:
        # DeepSpeed calls step() once per group, so its own count is used.
        updates = getattr(model, "global_steps", begun)
        return {"updates": updates, "parameter groups": digests.all_values(optimizer.param_groups)}

    return record


def _record_of(scheduler: LRScheduler) -> dict[str, Any]:
    """Return the record that ranks compare when they begin. Local."""
    if isinstance(scheduler, CyclicLRWithRestarts):
        return {**scheduler.configuration(), **scheduler.agreement_record()}
    return {
        "scheduler": type(scheduler).__name__,
        "state of the scheduler": scheduler.state_dict(),
        "parameter groups": plain_hyper_parameters(scheduler.optimizer),
    }


def _hyper_parameters(optimizer: Optimizer) -> list[dict[str, Any]]:
    if _is_dummy(optimizer):
        return []
    return [{k: v for k, v in group.items() if k not in ("params", AVERAGED)} for group in optimizer.param_groups]


def _check_kept(given: Optimizer, kept: Optimizer, groups: list[dict[str, Any]]) -> None:
    """Raise if the engine silently replaced the optimizer or changed its groups. The same on every rank."""
    if kept is not given:
        raise ValueError(
            f"the engine put {type(kept).__name__} in place of {type(given).__name__}: it computes something else, and "
            "does not follow the scheduler. With DeepSpeed's optimizer offload set "
            '"zero_force_ds_cpu_optimizer": false.'
        )
    if _hyper_parameters(kept) != groups:
        raise ValueError(
            f"the engine changed the parameter groups from {groups} to {_hyper_parameters(kept)}. Leave what the "
            "optimizer's groups define out of its configuration."
        )


def host_group(accelerator: Accelerator) -> dist.ProcessGroup | None:
    """Return a process group of Accelerate's ranks for messages on the host. Collective on the first call."""
    return None if accelerator.num_processes == 1 else collectives.host_group()


def use_bucket_views(accelerator: Accelerator) -> None:
    """Make DDP keep gradients in its buckets only, when the model is wrapped. Local."""
    from accelerate import DistributedDataParallelKwargs

    # A copy, since the script may use the same object for another accelerator.
    handler = copy.copy(accelerator.ddp_handler or DistributedDataParallelKwargs())
    handler.gradient_as_bucket_view = True
    accelerator.ddp_handler = handler


def _agreed_facts(
    accelerator: Accelerator,
    optimizer: Optimizer,
    dataloader: DataLoader[Any],
    scheduler: LRScheduler,
    group: dist.ProcessGroup | None,
    own_options: dict[str, Any],
) -> LoaderFacts:
    """Check the arguments on every rank, and raise any rank's error on all. Collective."""
    facts, problem, record = None, None, own_options
    try:
        facts = _checked_facts(accelerator, optimizer, dataloader, scheduler)
        if not _is_dummy(optimizer):
            record = {**own_options, **_record_of(scheduler), **_layout_of(optimizer)}
            record["samples of one pass over the data loader"] = facts.samples
    except ValueError as error:
        problem = str(error)
    several = accelerator.num_processes > 1
    reports = collectives.all_gather_objects(problem, group) if several else [problem]
    if (failed := first_problem(reports)) is not None:
        raise ValueError(failed)
    if several:
        agreement.check_agreement(record, group)
    assert facts is not None
    return facts


def _layout_of(optimizer: Optimizer) -> dict[str, Any]:
    inner = unwrap(optimizer)
    return inner._layout_record() if isinstance(inner, DistAdamW) else {}


def _checked_facts(
    accelerator: Accelerator, optimizer: Optimizer, dataloader: DataLoader[Any], scheduler: LRScheduler
) -> LoaderFacts:
    """Check that the arguments fit together, and fill in the scheduler's sizes. Local."""
    if _is_dummy(optimizer):
        return _checked_json(accelerator, optimizer, dataloader, scheduler)
    if not isinstance(scheduler, LRScheduler):
        raise ValueError(
            f"scheduler must be a CyclicLRWithRestarts or another torch scheduler, not prepared yet, got "
            f"{type(scheduler).__name__}."
        )
    if unwrap(scheduler.optimizer) is not unwrap(optimizer):
        raise ValueError(
            f"the scheduler drives another {type(scheduler.optimizer).__name__} than the one given here, "
            "whose lr would never change. Pass prepare the optimizer that the scheduler was built with."
        )
    check_engine(accelerator, optimizer)
    facts = loader_facts_of(accelerator, optimizer, dataloader, scheduler)
    if isinstance(scheduler, CyclicLRWithRestarts):
        _check_batches(scheduler, facts)
        if scheduler.epoch_size is None:
            scheduler.epoch_size = facts.epoch_size  # type: ignore[assignment]
        if scheduler.batch_size is None:
            scheduler.batch_size = facts.batch
    return facts


def _check_batches(scheduler: CyclicLRWithRestarts, facts: LoaderFacts) -> None:
    """Raise if the scheduler's batch differs from the loader's, or the epoch size is unknown. Local."""
    if scheduler.epoch_size is None and facts.epoch_size is None:
        raise ValueError(
            "the data set has no length, so the epoch size is unknown. "
            "Pass epoch_size=<samples per epoch> to CyclicLRWithRestarts."
        )
    if scheduler.batch_size not in (None, facts.batch.size) and scheduler._scheduled.recipe.batch_schedule is None:
        b = facts.batch
        raise ValueError(
            f"batch_size={scheduler.batch_size} was given, but the loader and the accelerator make a global batch of "
            f"{b.micro_batch_size} samples x {b.gradient_accumulation_steps} accumulation steps x "
            f"{b.data_parallel_size} ranks = {b.size}. Leave batch_size=None, or correct one of them; if you "
            "accumulate by hand, pass Accelerator(gradient_accumulation_steps=...)."
        )
    if facts.drop_last and scheduler.epoch_size == facts.samples != facts.epoch_size:
        warnings.warn(
            f"epoch_size={scheduler.epoch_size} is the length of the data, but drop_last=True trains on only "
            f"{facts.epoch_size} samples per epoch: restarts would lag further behind each epoch. Leave it None.",
            stacklevel=5,
        )


def _is_dummy(optimizer: Any) -> bool:
    """Return whether this is Accelerate's placeholder for an optimizer in the DeepSpeed configuration."""
    return type(optimizer).__name__ == "DummyOptim"


def _checked_json(accelerator: Accelerator, optimizer: Any, dataloader: DataLoader[Any], scheduler: Any) -> LoaderFacts:
    """Check the placeholders for an optimizer and a scheduler in the DeepSpeed configuration. Local."""
    engine = engine_of(accelerator)
    if engine != "DEEPSPEED":
        raise ValueError(
            f"DummyOptim stands for an optimizer in a DeepSpeed configuration, and the engine is {engine}. Pass an "
            "optimizer."
        )
    if not names_our_types(accelerator.deepspeed_plugin.deepspeed_config):
        raise ValueError(
            'the DeepSpeed configuration names no "type": "CyclicLRWithRestarts". Write it under "scheduler", or use '
            "accelerator.prepare."
        )
    if type(scheduler).__name__ != "DummyScheduler":
        raise ValueError(f"with DummyOptim pass accelerate.utils.DummyScheduler too, got {type(scheduler).__name__}.")
    return loader_facts_of(accelerator, optimizer, dataloader, scheduler)


def attach(accelerator: Accelerator, model: nn.Module, optimizer: DistAdamW) -> None:
    """Attach the optimizer under DDP, unless something needs whole gradients. Collective under DDP.

    A GradScaler checks whole gradients on every rank, and DDP accepts only one communication hook.
    """
    if optimizer.reproducible and (accelerator.num_processes == 1 or engine_of(accelerator) == "FSDP"):
        optimizer.attach(model)
        patch_accelerator(accelerator, optimizer)
        return
    if engine_of(accelerator) not in DATA_PARALLEL:
        return
    if accelerator.scaler is not None or has_communication_hook(accelerator):
        return
    if not isinstance(model, DistributedDataParallel):
        return
    if optimizer.process_group is not None and not averages_over(optimizer._ranks, model.process_group):
        return  # the state is sharded over some of the ranks only, and DDP averages over all of them
    optimizer.attach(model)
    patch_accelerator(accelerator, optimizer)
