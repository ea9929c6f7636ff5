"""Check the arguments of ``prepare`` on every rank, and read the batch and the epoch size from them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch.distributed as dist
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from dist_adamw.integrations.accelerate.accumulation import loader_facts_of
from dist_adamw.integrations.accelerate.checks import check_engine
from dist_adamw.integrations.accelerate.data import LoaderFacts, engine_of
from dist_adamw.integrations.accelerate.objects import is_dummy
from dist_adamw.integrations.deepspeed.configuration import names_our_types
from dist_adamw.optimizer.adamw import DistAdamW
from dist_adamw.optimizer.averages import AVERAGED
from dist_adamw.plain_data import plain
from dist_adamw.ranks import agreement, collectives
from dist_adamw.ranks.run_on_all import first_problem
from dist_adamw.schedule.scheduler import CyclicLRWithRestarts
from dist_adamw.wrappers import unwrap

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")


def on_every_rank(accelerator: Accelerator, check: Callable[[], T], group: dist.ProcessGroup | None) -> T:
    """Return the result of ``check``; raise any rank's ValueError on all. Collective."""
    result, problem = None, None
    try:
        result = check()
    except ValueError as error:
        problem = str(error)
    several = accelerator.num_processes > 1
    reports = collectives.all_gather_objects(problem, group) if several else [problem]
    if (failed := first_problem(reports)) is not None:
        raise ValueError(failed)
    return result  # type: ignore[return-value]


def agreed_facts(
    accelerator: Accelerator,
    optimizer: Optimizer,
    dataloader: DataLoader[Any],
    scheduler: LRScheduler,
    group: dist.ProcessGroup | None,
    own_options: dict[str, Any],
) -> LoaderFacts:
    """Check one trained model's arguments, and that ranks have the same; raise any rank's error on all. Collective.

    Raises:
        ValueError: the arguments do not fit together.
        AgreementError: ranks passed different arguments.
    """

    def check() -> tuple[LoaderFacts, dict[str, Any]]:
        facts = _checked_facts(accelerator, optimizer, dataloader, scheduler)
        if is_dummy(optimizer):
            return facts, own_options
        record = {**own_options, **_record_of(scheduler), **_layout_of(optimizer)}
        return facts, {**record, "samples of one pass over the data loader": facts.samples}

    facts, record = on_every_rank(accelerator, check, group)
    if accelerator.num_processes > 1:
        agreement.check_agreement(record, group)
    return facts


def _layout_of(optimizer: Optimizer) -> dict[str, Any]:
    inner = unwrap(optimizer)
    return inner._layout_record() if isinstance(inner, DistAdamW) else {}


def _checked_facts(
    accelerator: Accelerator, optimizer: Optimizer, dataloader: DataLoader[Any], scheduler: LRScheduler
) -> LoaderFacts:
    """Check that the arguments fit together, and fill in the scheduler's sizes. Local."""
    if is_dummy(optimizer):
        return _checked_json(accelerator, optimizer, dataloader, scheduler)
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
            stacklevel=8,
        )


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
    if not is_dummy(scheduler, "DummyScheduler"):
        raise ValueError(f"with DummyOptim pass accelerate.utils.DummyScheduler too, got {type(scheduler).__name__}.")
    return loader_facts_of(accelerator, optimizer, dataloader, scheduler)


def _record_of(scheduler: LRScheduler) -> dict[str, Any]:
    """Return the record that ranks compare when they begin. Local."""
    if isinstance(scheduler, CyclicLRWithRestarts):
        return {**scheduler.configuration(), **scheduler.agreement_record()}
    return {
        "scheduler": type(scheduler).__name__,
        "state of the scheduler": scheduler.state_dict(),
        "parameter groups": plain_hyper_parameters(scheduler.optimizer),
    }


def plain_hyper_parameters(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Return the hyper-parameters of all groups as plain data. Local."""
    return [
        {k: plain(v) for k, v in group.items() if k not in ("params", "param_names")}
        for group in optimizer.param_groups
    ]


def hyper_parameters(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Return the hyper-parameters of all groups as they are, to compare with later ones. Local."""
    if is_dummy(optimizer):
        return []
    return [{k: v for k, v in group.items() if k not in ("params", AVERAGED)} for group in optimizer.param_groups]


def check_kept(given: Optimizer, kept: Optimizer, groups: list[dict[str, Any]]) -> None:
    """Raise if the engine silently replaced the optimizer or changed its groups. The same on every rank."""
    if kept is not given:
        raise ValueError(
            f"the engine put {type(kept).__name__} in place of {type(given).__name__}: it computes something else, and "
            "does not follow the scheduler. With DeepSpeed's optimizer offload set "
            '"zero_force_ds_cpu_optimizer": false.'
        )
    if hyper_parameters(kept) != groups:
        raise ValueError(
            f"the engine changed the parameter groups from {groups} to {hyper_parameters(kept)}. Leave what the "
            "optimizer's groups define out of its configuration."
        )
