"""``prepare``: make the objects of an Accelerate training script work together."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Any, overload

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader
from torch.utils.hooks import RemovableHandle

from dist_adamw.integrations.accelerate.accelerator_methods import patch_accelerator, register
from dist_adamw.integrations.accelerate.accumulation import begin_accumulation, follow_batches
from dist_adamw.integrations.accelerate.arguments import agreed_facts, check_kept, hyper_parameters, on_every_rank
from dist_adamw.integrations.accelerate.checks import DATA_PARALLEL, check_scheduler, has_communication_hook
from dist_adamw.integrations.accelerate.counting import SampleCounter
from dist_adamw.integrations.accelerate.data import LoaderFacts, engine_of, shuffle_by_generator
from dist_adamw.integrations.accelerate.joint_counting import counters_to_join, joint
from dist_adamw.integrations.accelerate.objects import Roles, Trained, find_roles, is_dummy
from dist_adamw.integrations.accelerate.position import Position
from dist_adamw.integrations.accelerate.prepared_objects import Prepared
from dist_adamw.integrations.accelerate.reproducible import ReproducibleLoading, check_reproducible
from dist_adamw.integrations.accelerate.update_count import send_counts_with
from dist_adamw.integrations.deepspeed.configuration import CLIPPING, configure, fill, register_deepspeed
from dist_adamw.optimizer.adamw import DistAdamW
from dist_adamw.optimizer.attaching import averages_over
from dist_adamw.optimizer.replicas import CHECK_WEIGHTS_EVERY, ReplicaWatch, check_replicas
from dist_adamw.range_test.prepared import note_prepared
from dist_adamw.ranks import agreement, collectives
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


@overload
def prepare(
    accelerator: Accelerator,
    model: Any,
    optimizer: Any,
    dataloader: Any,
    scheduler: Any,
    *more: Any,
    check_weights_every: int | None = ...,
    whole_gradients: bool = ...,
) -> tuple[Any, ...]: ...


def prepare(
    accelerator: Accelerator,
    model: Any,
    optimizer: Any,
    dataloader: Any,
    scheduler: Any,
    *more: Any,
    check_weights_every: int | None = CHECK_WEIGHTS_EVERY,
    whole_gradients: bool = False,
) -> tuple[Any, ...]:
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
        dataloader: The training loader, not prepared yet: the first one, if there are several.
        scheduler: Not prepared yet. A `CyclicLRWithRestarts` is returned without a wrapper, since it needs none. Any
            other torch scheduler is returned in Accelerate's wrapper, which steps it once per process at each update
            (unless ``split_batches``). Everything else here applies to it too.
        more: Further objects; all may come in any order. Each scheduler belongs to the optimizer that it was built
            with, and each optimizer to the model that has its parameters, so a GAN passes two of each. Anything else
            (loaders for evaluation, modules and torch optimizers without a scheduler, None) is prepared or passed
            through as by ``accelerator.prepare``.
        check_weights_every: Updates between two bitwise comparisons of the ranks' replicas: see `check_replicas`. The
            first is at the first update; ``accelerator.save_state`` makes one before it writes. 0 or None: no
            comparisons, for ranks that are meant to differ (local SGD).
        whole_gradients: Keep DDP's all-reduce, for scripts that read or change ``param.grad`` between backward and
            step. It sends a third more.

    Returns:
        The objects in the order given, to use in place of those passed: model, optimizer, loader and scheduler.

    Raises:
        ValueError: the global batch or the epoch size is unknown, or the batch differs from the
            scheduler's; or it is not clear which objects belong together; on every rank, and nothing is prepared then.
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
    objects = [model, optimizer, dataloader, scheduler, *more]
    roles = on_every_rank(accelerator, lambda: find_roles(engine_of(accelerator), objects), group)
    loader = objects[roles.loader]
    given = [(objects[one.optimizer], objects[one.scheduler]) for one in roles.trained]
    facts = _agreed_facts_of_all(accelerator, roles, objects, group, check_weights_every, whole_gradients)
    for (optimizer, scheduler), of_it in zip(given, facts, strict=True):
        begin_accumulation(accelerator, optimizer, scheduler, of_it)
        if _is_reproducible(optimizer):
            check_reproducible(accelerator, loader, of_it, whole_gradients=whole_gradients)
    if accelerator.ddp_handler is None or any(isinstance(unwrap(optimizer), DistAdamW) for optimizer, _ in given):
        use_bucket_views(accelerator)
    config = _deepspeed_config(accelerator)
    if config is not None:
        _complete(config, given[0][0], facts[0])
    groups = [hyper_parameters(optimizer) for optimizer, _ in given]  # to compare with what the engine makes of them
    for place in (roles.loader, *roles.further_loaders):
        shuffle_by_generator(objects[place])  # first: Accelerate wraps the sampler
    prepared = _prepare_all(accelerator, objects, roles)
    links = [
        _link(accelerator, prepared, *of_one, group) for of_one in zip(roles.trained, given, facts, groups, strict=True)
    ]
    loader = prepared[roles.loader]
    position = _position(accelerator, loader, facts[0], roles, links)
    for one, link in zip(roles.trained, links, strict=True):
        _connect(accelerator, link, position, group, check_weights_every, whole_gradients)
        prepared[one.scheduler] = link.returned_scheduler
    return tuple(prepared)


def _position(
    accelerator: Accelerator, loader: Any, facts: LoaderFacts, roles: Roles, links: Sequence[_Link]
) -> Position:
    """Return the loader's position, the only one however many calls of ``prepare`` it was given to. Local."""
    in_order = sorted(zip(roles.trained, links, strict=True), key=lambda both: both[0].optimizer)
    counters = [link.counter for _, link in in_order]
    found = getattr(loader, "dist_adamw_position", None)
    if isinstance(found, Position):
        found.count_for(facts, joint([*counters_to_join(found.counter, counters, accelerator), *counters]))
        return found
    # By this attribute `rest_of_epoch` and a copy of the loader find it.
    loader.dist_adamw_position = Position(loader, facts, joint(counters))
    return loader.dist_adamw_position  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True)
class _Link:
    """A trained model's objects after ``accelerator.prepare``.

    Attributes:
        model: As prepared.
        wrapped: The optimizer in Accelerate's wrapper.
        stepped: The scheduler in Accelerate's wrapper.
        scheduler: The scheduler itself.
        facts: The batches.
        counter: Counts the optimizer's samples.
    """

    model: nn.Module
    wrapped: Any
    stepped: Any
    scheduler: LRScheduler
    facts: LoaderFacts
    counter: SampleCounter

    @property
    def ours(self) -> CyclicLRWithRestarts | None:
        """The scheduler, if it is a `CyclicLRWithRestarts`."""
        return self.scheduler if isinstance(self.scheduler, CyclicLRWithRestarts) else None

    @property
    def returned_scheduler(self) -> Any:
        """What ``prepare`` returns: our scheduler needs no wrapper."""
        return self.stepped if self.ours is None else self.ours


def _is_reproducible(optimizer: Any) -> bool:
    return bool(getattr(unwrap(optimizer), "reproducible", False))


def _agreed_facts_of_all(
    accelerator: Accelerator,
    roles: Roles,
    objects: list[Any],
    group: dist.ProcessGroup | None,
    check_weights_every: int | None,
    whole_gradients: bool,
) -> list[LoaderFacts]:
    """Check every trained model's arguments on all ranks: see `agreed_facts`. Collective."""
    found = []
    for one in roles.trained:
        optimizer, scheduler = objects[one.optimizer], objects[one.scheduler]
        own_options = {
            "prepare(check_weights_every)": check_weights_every or 0,
            "prepare(whole_gradients)": bool(whole_gradients),
            "prepare(places of model, optimizer, scheduler)": [[*astuple(each)] for each in roles.trained],
            "DistAdamW(reproducible)": _is_reproducible(optimizer),
        }
        loader = objects[roles.loader]
        found.append(agreed_facts(accelerator, optimizer, loader, scheduler, group, own_options))
    return found


def _prepare_all(accelerator: Accelerator, objects: list[Any], roles: Roles) -> list[Any]:
    """Call ``accelerator.prepare``, for further loaders separately. Collective.

    DeepSpeed would derive its micro-batch from the smallest batch of all loaders of one call.
    """
    places = [place for place in range(len(objects)) if place not in roles.further_loaders]
    result = [*objects]
    prepared = accelerator.prepare(*(objects[place] for place in places))
    for place, one in zip(places, prepared, strict=True):
        result[place] = one
    for place in roles.further_loaders:
        result[place] = accelerator.prepare(objects[place])
    return result


def _link(
    accelerator: Accelerator,
    prepared: list[Any],
    places: Trained,
    given: tuple[Any, Any],
    facts: LoaderFacts,
    groups: list[dict[str, Any]],
    group: dist.ProcessGroup | None,
) -> _Link:
    """Check what the engine made of an optimizer and its scheduler, and count their samples. Collective.

    Args:
        accelerator: The accelerator.
        prepared: All objects after ``accelerator.prepare``.
        places: Where the model's objects are.
        given: The optimizer and the scheduler before.
        facts: The batches.
        groups: The optimizer's hyper-parameters before.
        group: The process group for messages on the host.
    """
    optimizer, scheduler = given
    wrapped, stepped = prepared[places.optimizer], prepared[places.scheduler]
    if is_dummy(optimizer):
        # DeepSpeed has only now made the scheduler, so ranks could not compare it before.
        scheduler = check_scheduler(stepped.scheduler)
        check_schedules(accelerator, scheduler, group)
    else:
        check_kept(unwrap(optimizer), unwrap(wrapped), groups)
    counter = SampleCounter(unwrap(wrapped), accelerator, group=group)
    patch_accelerator(accelerator, counter=counter)
    _count_for(scheduler, counter)
    follow_batches(accelerator, scheduler, facts)
    return _Link(prepared[places.model], wrapped, stepped, scheduler, facts, counter)


def _connect(
    accelerator: Accelerator,
    link: _Link,
    position: Position,
    group: dist.ProcessGroup | None,
    check_weights_every: int | None,
    whole_gradients: bool,
) -> None:
    """Connect a trained model's objects with the accelerator: comparisons, gradients, saves. Collective."""
    model, wrapped, inner = link.model, link.wrapped, unwrap(link.wrapped)
    watch = _watch(accelerator, model, inner, link.ours, check_weights_every, group)
    if not whole_gradients and isinstance(inner, DistAdamW):
        attach(accelerator, model, inner)
        if inner.reproducible:
            ReproducibleLoading(inner, link.counter, link.facts)
    clipping = None
    if (config := _deepspeed_config(accelerator)) is not None:
        from dist_adamw.integrations.deepspeed.zero_state import prepare_deepspeed

        prepare_deepspeed(model, link.scheduler)
        clipping = float(config[CLIPPING])
    if isinstance(inner, DistAdamW):
        inner.use_model(model)
        wrapped.averaged = inner.averaged
    register(accelerator, Prepared(model, wrapped, link.stepped, link.scheduler, position, watch, group, clipping))
    note_prepared(accelerator, inner, link.scheduler)


def _deepspeed_config(accelerator: Accelerator) -> Any:
    """Return the DeepSpeed configuration; None under other engines. Local."""
    return accelerator.deepspeed_plugin.deepspeed_config if engine_of(accelerator) == "DEEPSPEED" else None


def _complete(config: Any, optimizer: Optimizer, facts: LoaderFacts) -> None:
    """Complete the DeepSpeed configuration from the optimizer and the loader. Local."""
    configure(config, optimizer)
    if is_dummy(optimizer):
        register_deepspeed()
        fill(config, facts.batch.size, facts.epoch_size)


def _count_for(scheduler: LRScheduler, counter: SampleCounter) -> None:
    """Make ``counter`` the schedule's sample source; without our schedule, let it follow updates itself. Local."""
    if isinstance(scheduler, CyclicLRWithRestarts):
        scheduler.sample_source = counter
    else:
        counter.follow_updates()


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
