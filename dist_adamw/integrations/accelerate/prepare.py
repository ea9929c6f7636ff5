"""``prepare``: make the five objects of an Accelerate training script work together.

Knows Accelerate; nothing below knows it.
"""

from __future__ import annotations

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
from dist_adamw.integrations.accelerate.checks import DATA_PARALLEL, check_engine, check_scheduler
from dist_adamw.integrations.accelerate.counting import SampleCounter
from dist_adamw.integrations.accelerate.data import LoaderFacts, engine_of, loader_facts, shuffle_by_generator
from dist_adamw.integrations.accelerate.position import Position
from dist_adamw.integrations.accelerate.prepared_objects import Prepared
from dist_adamw.integrations.deepspeed.configuration import (
    CLIPPING,
    configure,
    fill,
    names_our_types,
    register_deepspeed,
)
from dist_adamw.optimizer.adamw import DistAdamW
from dist_adamw.optimizer.attaching import averages_over
from dist_adamw.optimizer.replicas import CHECK_WEIGHTS_EVERY, ReplicaWatch, check_replicas
from dist_adamw.plain_data import plain
from dist_adamw.ranks import agreement, collectives
from dist_adamw.ranks.run_on_all import first_problem
from dist_adamw.schedule.scheduler import CyclicLRWithRestarts
from dist_adamw.wrappers import unwrap

if TYPE_CHECKING:
    from accelerate import Accelerator

# By optimizer: the hook that compares ranks before its updates.
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
    """Do ``accelerator.prepare``, and tell the scheduler what the loader and the accelerator know.

    Fills in ``batch_size`` and ``epoch_size`` where they are None, has the loader tell the real
    samples of every update, makes ``accelerator.save_state`` and ``load_state`` keep every rank's
    share of the optimizer, and has all ranks compare their schedule and hyper-parameters, now and
    at every update, and now and then their weights. The training loop stays as it is.

    Args:
        accelerator: Its ``gradient_accumulation_steps`` counts.
        model: As for ``accelerator.prepare``.
        optimizer: A `DistAdamW`, or any torch optimizer. With a DeepSpeed configuration that names both,
            Accelerate's ``DummyOptim``, and its ``DummyScheduler`` below.
        dataloader: The training loader, not prepared yet.
        scheduler: Not prepared. A `CyclicLRWithRestarts` is returned itself, since it needs no wrapper. Any other torch
            scheduler is returned in Accelerate's wrapper, which steps it as Accelerate does: once per process at each
            update (unless ``split_batches``). All else here holds for it too.
        check_weights_every: Updates between two comparisons of what must be the same bits on several ranks: see
            `check_replicas`. The first is at the first update; ``accelerator.save_state`` makes one before it writes.
            0 or None: none at all, for ranks that are meant to differ (local SGD).
        whole_gradients: Leave DDP's all-reduce as it is, for scripts that read or change ``param.grad`` between
            backward and step. A third more is sent.

    Returns:
        Model, optimizer, loader and scheduler, to be used instead.

    Raises:
        ValueError: the global batch or the epoch size is unknown, or the batch is not the one
            the scheduler was given; on every rank alike, and nothing is prepared then.
        AgreementError: ranks were given different things; on every rank. Later, the optimizer's ``step`` and
            ``accelerator.save_state`` raise it.

    Under FSDP2 and DeepSpeed the engine shares gradients and state out; `DistAdamW` updates what it finds.
    With DeepSpeed ``prepare`` passes ``max_grad_norm`` to the engine, which clips to 1.0 by default, and
    keeps the optimizer where DeepSpeed would put its own (optimizer offload).

    A `DistAdamW` under DDP is attached (`DistAdamW.attach`): gradients are reduced to their owners, and
    ``accelerator.clip_grad_norm_`` clips by the global norm of what they own. With a GradScaler
    (fp16) or a communication hook of yours, DDP's all-reduce stays.

    After backward ``param.grad`` then holds the average over ranks in the elements that this rank owns, and local
    values in the others. ``optimizer.gather_gradients()`` (of the `DistAdamW` itself) makes it whole, as DDP leaves it;
    with ``whole_gradients=True`` it always is. ``accelerator.clip_grad_norm_`` and ``clip_grad_value_`` are right
    either way; other changes of gradients are refused in ``step`` unless ``optimizer.accept_gradients()`` is called.

    May be called again, for another phase of training: with the same optimizer or a new one, and the prepared model.
    Accelerate's ``LocalSGD`` needs ``DistAdamW(shard=False)`` and ``check_weights_every=0``.

    DDP keeps a second copy of the gradients by default, so ``prepare`` asks for
    ``gradient_as_bucket_view`` where no ``DistributedDataParallelKwargs`` were given.

    Collective: every rank calls it.
    """
    group = host_group(accelerator)
    own_options = {
        "prepare(check_weights_every)": check_weights_every or 0,
        "prepare(whole_gradients)": bool(whole_gradients),
    }
    facts = _agreed_facts(accelerator, optimizer, dataloader, scheduler, group, own_options)
    if accelerator.ddp_handler is None:
        accelerator.ddp_handler = _ddp_kwargs()
    from_json = _is_dummy(optimizer)
    config = _deepspeed_config(accelerator)
    if config is not None:
        _complete(config, optimizer, facts)
    groups = _hyper_parameters(optimizer)
    shuffle_by_generator(dataloader)
    model, wrapped, dataloader, stepped = accelerator.prepare(model, optimizer, dataloader, scheduler)
    inner = unwrap(wrapped)
    if from_json:
        scheduler = check_scheduler(stepped.scheduler)
        check_schedules(accelerator, scheduler, group)
    else:
        _check_kept(unwrap(optimizer), inner, groups)
    ours = scheduler if isinstance(scheduler, CyclicLRWithRestarts) else None
    counter = SampleCounter(inner, accelerator, group=group)
    patch_accelerator(accelerator, counter=counter)
    _count_for(ours, counter)
    position = Position(dataloader, facts, counter)
    dataloader.dist_adamw_position = position
    watch = _watch(accelerator, model, inner, ours, check_weights_every, group)
    if not whole_gradients and isinstance(inner, DistAdamW):
        attach(accelerator, model, inner)
    clipping = None
    if config is not None:
        from dist_adamw.integrations.deepspeed.zero_state import prepare_deepspeed

        prepare_deepspeed(model, scheduler)
        clipping = float(config[CLIPPING])
    register(accelerator, Prepared(model, wrapped, stepped, scheduler, position, watch, group, clipping))
    return model, wrapped, dataloader, stepped if ours is None else ours


def _deepspeed_config(accelerator: Accelerator) -> Any:
    """Return DeepSpeed's configuration; None under other engines. Local."""
    return accelerator.deepspeed_plugin.deepspeed_config if engine_of(accelerator) == "DEEPSPEED" else None


def _complete(config: Any, optimizer: Optimizer, facts: LoaderFacts) -> None:
    """Write into DeepSpeed's configuration what it must do, and what the loader knows. Local."""
    configure(config, optimizer)
    if _is_dummy(optimizer):
        register_deepspeed()
        fill(config, facts.batch.size, facts.epoch_size)


def _count_for(scheduler: CyclicLRWithRestarts | None, counter: SampleCounter) -> None:
    """Have the schedule go by ``counter``; without one of ours, have that follow the updates itself. Local."""
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
    """Have ranks compare their schedule and weights at updates of ``optimizer``; None for one rank. Local."""
    if accelerator.num_processes == 1:
        return None
    whole = accelerator.unwrap_model(model)
    record = _record_at_update(model, optimizer) if scheduler is None else scheduler.agreement_record
    watch = ReplicaWatch(group, record, lambda: check_replicas(whole, optimizer, group=group), check_weights_every)
    if (before := _WATCHING.pop(optimizer, None)) is not None:  # of an earlier call
        before.remove()
    _WATCHING[optimizer] = optimizer.register_step_pre_hook(watch.before_update)
    return watch


def check_schedules(accelerator: Accelerator, scheduler: CyclicLRWithRestarts, group: dist.ProcessGroup | None) -> None:
    """Raise on every rank when their schedules are not the same. Collective."""
    if accelerator.num_processes > 1:
        agreement.check_agreement({**scheduler.configuration(), **scheduler.agreement_record()}, group)


def plain_hyper_parameters(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Return the hyper-parameters of all groups as plain data. Local."""
    return [
        {k: plain(v) for k, v in group.items() if k not in ("params", "param_names")}
        for group in optimizer.param_groups
    ]


def _record_at_update(model: nn.Module, optimizer: Optimizer) -> Callable[[], dict[str, Any]]:
    """Return a record that must be the same on all ranks at an update, where the schedule is not ours. Local."""
    begun = 0

    def count(*_: Any) -> None:
        nonlocal begun
        begun += 1

    optimizer.register_step_pre_hook(count)

    def record() -> dict[str, Any]:
        # DeepSpeed steps one group after the other, and says itself which update it is in.
        updates = getattr(model, "global_steps", begun)
        return {"updates": updates, "parameter groups": plain_hyper_parameters(optimizer)}

    return record


def _record_of(scheduler: LRScheduler) -> dict[str, Any]:
    """Return a record that must be the same on all ranks when they begin. Local."""
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
    return [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]


def _check_kept(given: Optimizer, kept: Optimizer, groups: list[dict[str, Any]]) -> None:
    """Refuse what Accelerate and DeepSpeed do in silence: another optimizer, other groups. Every rank alike."""
    if kept is not given:
        raise ValueError(
            f"the engine put {type(kept).__name__} in place of {type(given).__name__}, with other arithmetic, and the "
            'scheduler drives nothing. With DeepSpeed\'s optimizer offload set "zero_force_ds_cpu_optimizer": false.'
        )
    if _hyper_parameters(kept) != groups:
        raise ValueError(
            f"the engine changed the parameter groups from {groups} to {_hyper_parameters(kept)}. Set nothing in its "
            "configuration that the optimizer's groups say."
        )


def host_group(accelerator: Accelerator) -> dist.ProcessGroup | None:
    """Return Accelerate's ranks, in a group for messages on the host. Collective the first time."""
    return None if accelerator.num_processes == 1 else collectives.host_group()


def _ddp_kwargs() -> Any:
    from accelerate import DistributedDataParallelKwargs

    return DistributedDataParallelKwargs(gradient_as_bucket_view=True)


def _agreed_facts(
    accelerator: Accelerator,
    optimizer: Optimizer,
    dataloader: DataLoader[Any],
    scheduler: LRScheduler,
    group: dist.ProcessGroup | None,
    own_options: dict[str, Any],
) -> LoaderFacts:
    """Look at what each rank was given, and raise on all what is wrong on any. Collective."""
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
    """Refuse what does not fit together, and fill the scheduler in. Local."""
    if _is_dummy(optimizer):
        return _checked_json(accelerator, dataloader, scheduler)
    if not isinstance(scheduler, LRScheduler):
        raise ValueError(
            f"scheduler must be a CyclicLRWithRestarts or another torch scheduler, not prepared yet, got "
            f"{type(scheduler).__name__}."
        )
    if unwrap(scheduler.optimizer) is not unwrap(optimizer):
        raise ValueError(
            f"the scheduler drives another {type(scheduler.optimizer).__name__} than the one given here, "
            "whose lr would stand still. Pass prepare the optimizer that the scheduler was built with."
        )
    check_engine(accelerator, optimizer)
    facts = loader_facts(accelerator, dataloader)
    if isinstance(scheduler, CyclicLRWithRestarts):
        _check_batches(scheduler, facts)
        if scheduler.epoch_size is None:
            scheduler.epoch_size = facts.epoch_size  # type: ignore[assignment]
        if scheduler.batch_size is None:
            scheduler.batch_size = facts.batch
    return facts


def _check_batches(scheduler: CyclicLRWithRestarts, facts: LoaderFacts) -> None:
    """Raise where the scheduler was given another batch than the loader makes, or no epoch size is known. Local."""
    if scheduler.epoch_size is None and facts.epoch_size is None:
        raise ValueError(
            "the data set has no length, so the epoch size is unknown. "
            "Pass epoch_size=<samples per epoch> to CyclicLRWithRestarts."
        )
    if scheduler.batch_size not in (None, facts.batch.size):
        b = facts.batch
        raise ValueError(
            f"batch_size={scheduler.batch_size} was given, but the loader and the accelerator make a global batch of "
            f"{b.micro_batch_size} samples x {b.gradient_accumulation_steps} accumulation steps x "
            f"{b.data_parallel_size} ranks = {b.size}. Leave batch_size=None, or correct one of them; who accumulates "
            "by hand tells Accelerator(gradient_accumulation_steps=...)."
        )
    if facts.drop_last and scheduler.epoch_size == facts.samples != facts.epoch_size:
        warnings.warn(
            f"epoch_size={scheduler.epoch_size} is the length of the data, of which drop_last=True trains on "
            f"{facts.epoch_size} samples an epoch: restarts would come ever later than epochs end. Leave it None.",
            stacklevel=5,
        )


def _is_dummy(optimizer: Any) -> bool:
    """Return whether DeepSpeed's configuration has the optimizer, and this stands for it."""
    return type(optimizer).__name__ == "DummyOptim"


def _checked_json(accelerator: Accelerator, dataloader: DataLoader[Any], scheduler: Any) -> LoaderFacts:
    """Check an optimizer and a scheduler that DeepSpeed will make of its configuration. Local."""
    engine = engine_of(accelerator)
    if engine != "DEEPSPEED":
        raise ValueError(
            f"DummyOptim stands for an optimizer in a DeepSpeed configuration, and the engine is {engine}."
        )
    if not names_our_types(accelerator.deepspeed_plugin.deepspeed_config):
        raise ValueError(
            'the DeepSpeed configuration names no "type": "CyclicLRWithRestarts". Write it under "scheduler", or use '
            "accelerator.prepare."
        )
    if type(scheduler).__name__ != "DummyScheduler":
        raise ValueError(f"with DummyOptim pass accelerate.utils.DummyScheduler too, got {type(scheduler).__name__}.")
    return loader_facts(accelerator, dataloader)


def attach(accelerator: Accelerator, model: nn.Module, optimizer: DistAdamW) -> None:
    """Have gradients reduced to their owners, where nothing needs them whole. Collective under DDP.

    A GradScaler looks at whole gradients on every rank, and DDP takes one communication hook.
    """
    if engine_of(accelerator) not in DATA_PARALLEL:
        return
    chosen = getattr(accelerator.ddp_handler, "comm_hook", None)
    hooked = chosen is not None and chosen.value != "no"
    if not isinstance(model, DistributedDataParallel) or accelerator.scaler is not None or hooked:
        return
    if optimizer.process_group is not None and not averages_over(optimizer._ranks, model.process_group):
        return  # state is shared among some of the ranks; DDP averages over all
    optimizer.attach(model)
    patch_accelerator(accelerator, optimizer)
