"""``prepare_trainer``: use DistAdamW and CyclicLRWithRestarts in transformers' Trainer, on every engine.

Knows Trainer by its attributes. Trainer passes some engines by with ``optimizers=``: it is refused under FSDP,
and dropped in silence under DeepSpeed. All of them go through ``create_optimizer``, which asks
``get_optimizer_cls_and_kwargs``, and through ``create_scheduler``: ours stand there.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, IterableDataset

from dist_adamw.integrations.accelerate.accelerator_methods import patch_accelerator
from dist_adamw.integrations.accelerate.checks import DATA_PARALLEL, check_engine, check_scheduler
from dist_adamw.integrations.accelerate.counting import SampleCounter
from dist_adamw.integrations.accelerate.data import LoaderFacts, engine_of, loader_facts
from dist_adamw.integrations.accelerate.prepare import attach, check_schedules, host_group
from dist_adamw.integrations.deepspeed.configuration import configure, fill, names_our_types, register_deepspeed
from dist_adamw.integrations.transformers.arguments import (
    check_arguments,
    check_made_scheduler,
    check_override_of_scheduler,
    check_own_loader,
    given_by,
    inner_scheduler,
    is_overridden,
    put_optimizer,
    replace_method,
    watch_own_loader,
)
from dist_adamw.integrations.transformers.trainer_state import keep_state
from dist_adamw.optimizer.adamw import DistAdamW
from dist_adamw.optimizer.replicas import CHECK_WEIGHTS_EVERY, ReplicaWatch, check_replicas
from dist_adamw.schedule.preview import training_end
from dist_adamw.schedule.saved import OnDifference
from dist_adamw.schedule.scheduler import CyclicLRWithRestarts
from dist_adamw.wrappers import unwrap

if TYPE_CHECKING:
    from transformers import Trainer

T = TypeVar("T", bound="Trainer")


def prepare_trainer(
    trainer: T,
    *,
    optimizer: Mapping[str, Any] | None = None,
    scheduler: Mapping[str, Any] | None = None,
    check_weights_every: int | None = CHECK_WEIGHTS_EVERY,
    on_difference: OnDifference | None = None,
) -> T:
    """Have ``trainer.train()`` use `DistAdamW` and `CyclicLRWithRestarts`, on one process, DDP, FSDP2 and DeepSpeed.

    lr, betas, eps, weight decay and clipping are those of ``TrainingArguments``; biases and norms are not decayed, as
    Trainer has it. The global batch is ``per_device_train_batch_size`` x accumulation x data-parallel ranks, an epoch
    is ``train_dataset``, and of a short last batch the real samples are counted. Without FSDP and DeepSpeed
    a checkpoint keeps every rank's share of the optimizer, and ``resume_from_checkpoint`` loads it on any number of
    ranks. A second ``train()`` begins the schedule again, as Trainer's own do.

    A subclass keeps its overrides. What ``create_optimizer`` makes is trained and scheduled, whichever torch optimizer
    it is, with a warning where it is no `DistAdamW`. Where ``get_optimizer_cls_and_kwargs`` says torch's AdamW, with
    groups or arguments of the subclass, a `DistAdamW` gets them. A ``create_scheduler`` of the subclass must make a
    `CyclicLRWithRestarts`.

    Warns (UserWarning) where training ends inside a cycle, with the nearest periods that end with it.

    Args:
        trainer: A Trainer, or of a class derived from it, before ``train()``. Objects that it was given
            (``optimizers=``, ``optimizer_cls_and_kwargs=``) are used instead of new ones.
        optimizer: Arguments of `DistAdamW` that ``TrainingArguments`` does not have, such as ``decay_by``.
        scheduler: Arguments of `CyclicLRWithRestarts`. ``batch_size`` and ``epoch_size`` are needed only
            where the data has no length, or a loader of your own makes other batches.
        check_weights_every: As of `dist_adamw.prepare`. Ranks also compare before each checkpoint, and at the end.
        on_difference: Which schedule ``resume_from_checkpoint`` goes on with where the checkpoint's is another one: see
            ``CyclicLRWithRestarts.load_state_dict``. None: as the scheduler has it, which is "strict".

    Returns:
        ``trainer``.

    Raises:
        ValueError: an argument is out of its range, is one of ``TrainingArguments``, or would be ignored, as
            ``TrainingArguments``' ``optim``, ``lr_scheduler_type``, ``lr_scheduler_kwargs`` and ``warmup_steps`` would;
            an engine is not supported; the epoch size is not known. ``train()`` raises it, before it trains, where an
            override made something else than these arguments ask for.

    A DeepSpeed configuration that names both types (`register_deepspeed`) is used instead of new objects: "auto" is
    filled in, and all parameters decay alike, since the engine makes one group of them.

    Under DeepSpeed the engine clips, by ``TrainingArguments(max_grad_norm=...)`` also where its configuration says
    nothing (DeepSpeed would clip to 1.0). Under DDP a `DistAdamW` is attached, as `dist_adamw.prepare` does it.

    Local. ``train()`` is collective; in it ranks compare their schedule and hyper-parameters at every update.
    """
    if hasattr(trainer, "_prepared_by_dist_adamw"):
        raise ValueError("prepare_trainer was called for this Trainer before. Call it once, with all arguments.")
    facts = _facts(trainer)
    optimizer, scheduler = dict(optimizer or {}), dict(scheduler or {})
    check_arguments(trainer, optimizer, on_difference)
    if _prepare_engine(trainer, facts):
        _check_engine_makes_both(trainer, optimizer, scheduler)
        _when_training_begins(trainer, lambda: _warn_of_mid_cycle(trainer, inner_scheduler(trainer), facts, 5))
    else:
        create = check_override_of_scheduler(trainer, scheduler)
        makes_it = put_optimizer(trainer, optimizer)
        if trainer.lr_scheduler is not None:
            _fill(trainer, facts, scheduler)
            _warn_of_mid_cycle(trainer, check_made_scheduler(trainer), facts, 3)
        elif create is None:
            _try_schedule(trainer, facts, scheduler, trainer.args.learning_rate if makes_it else 1.0)
        loader = watch_own_loader(trainer)
        replace_method(trainer, "create_scheduler", _creator(trainer, scheduler, create, on_difference, loader))
        _attach_when_wrapped(trainer)
    keep_state(trainer, on_difference)
    _watch_ranks(trainer, check_weights_every)
    vars(trainer)["_prepared_by_dist_adamw"] = True
    return trainer


def _check_engine_makes_both(trainer: Any, optimizer: Mapping[str, Any], scheduler: Mapping[str, Any]) -> None:
    """Raise where the script, too, says how optimizer and scheduler are made. Local."""
    if optimizer or scheduler:
        raise ValueError(
            f"the DeepSpeed configuration has the optimizer and the scheduler, and optimizer={optimizer}, "
            f"scheduler={scheduler} were given here. Choose one."
        )
    for name in ("create_optimizer", "get_optimizer_cls_and_kwargs", "create_scheduler"):
        if is_overridden(trainer, name):
            raise ValueError(
                f"{type(trainer).__name__} overrides {name}, which Trainer does not call where the DeepSpeed "
                "configuration has the optimizer and the scheduler. Leave one of them out."
            )


def _try_schedule(trainer: Any, facts: LoaderFacts, given: Mapping[str, Any], lr: float) -> None:
    """Make the schedule once, so that bad arguments fail before a job of many ranks has come up. Local."""
    adamw = DistAdamW([nn.Parameter(torch.zeros(1))], lr=lr)
    _warn_of_mid_cycle(trainer, _scheduler(adamw, facts, given), facts, 4)


def _warn_of_mid_cycle(trainer: Any, scheduler: CyclicLRWithRestarts, facts: LoaderFacts, stacklevel: int) -> None:
    """Warn where training ends inside a cycle, with lr anywhere. Local."""
    args = trainer.args
    assert scheduler.batch_size is not None
    if args.max_steps > 0:
        total = _samples_of_updates(args.max_steps, scheduler.batch_size, facts.epoch_size)
    elif facts.epoch_size is not None:
        total = round(args.num_train_epochs * facts.epoch_size)
    else:
        return
    if total > 0 and not (end := training_end(scheduler.schedule, total)).is_at_cycle_end:
        warnings.warn(f"{end}", stacklevel=stacklevel)


def _samples_of_updates(updates: int, batch_size: int, epoch_size: int | None) -> int:
    """Real samples of so many updates, of which the last of an epoch is short. Local."""
    if epoch_size is None:
        return updates * batch_size
    epochs, rest = divmod(updates, -(-epoch_size // batch_size))
    return epochs * epoch_size + min(rest * batch_size, epoch_size)


def _facts(trainer: Any) -> LoaderFacts:
    """The global batch and the epoch as they are now; ``auto_find_batch_size`` changes them. Local."""
    args, data = trainer.args, trainer.train_dataset
    if data is None:
        raise ValueError("the Trainer has train_dataset=None, so the epoch size is unknown. Pass a train_dataset.")
    drop_last = args.dataloader_drop_last and not isinstance(data, IterableDataset)
    loader: DataLoader[Any] = DataLoader(data, batch_size=trainer._train_batch_size, drop_last=drop_last)
    facts = loader_facts(trainer.accelerator, loader)
    # Trainer accumulates itself; its accelerator knows of one micro-batch.
    return replace(facts, batch=replace(facts.batch, gradient_accumulation_steps=args.gradient_accumulation_steps))


def _scheduler(optimizer: Optimizer, facts: LoaderFacts, given: Mapping[str, Any]) -> CyclicLRWithRestarts:
    known: dict[str, Any] = {"batch_size": facts.batch.size, "epoch_size": facts.epoch_size}
    known |= {name: value for name, value in given.items() if value is not None}
    return CyclicLRWithRestarts(optimizer, **{**known, "epoch_size": _known(known["epoch_size"])})


def _known(epoch_size: int | None) -> int:
    if epoch_size is None:
        raise ValueError(
            "the train_dataset has no length, so the epoch size is unknown. Give the scheduler "
            "epoch_size=<samples per epoch>."
        )
    return epoch_size


def _creator(
    trainer: Any,
    given: Mapping[str, Any],
    theirs: Callable[..., Any] | None,
    on_difference: OnDifference | None,
    loader: Callable[[], Any],
) -> Callable[..., CyclicLRWithRestarts]:
    """Return a ``Trainer.create_scheduler``, which every engine calls when model and optimizer are wrapped.

    Args:
        given: Arguments of the scheduler.
        theirs: A method of a subclass that makes one.
        on_difference: For loading.
        loader: Returns the loader that a subclass has made, if there is one.
    """

    def create_scheduler(num_training_steps: int, optimizer: Optimizer | None = None) -> CyclicLRWithRestarts:
        facts = _facts(trainer)
        batch_size = check_own_loader(loader(), facts, {**given, **given_by(trainer.lr_scheduler)})
        if trainer.lr_scheduler is None:
            if theirs is None:
                trainer.lr_scheduler = _scheduler(unwrap(optimizer or trainer.optimizer), facts, given)
            else:
                theirs(num_training_steps=num_training_steps, optimizer=optimizer)
                _fill(trainer, facts, given)
            trainer._created_lr_scheduler = True  # by itself, as far as Trainer knows: the next train() makes another
        scheduler = check_made_scheduler(trainer)
        if scheduler.batch_size in (facts.batch.size, batch_size):  # else it counts other units, such as tokens
            _count_samples(trainer, scheduler)
        if on_difference is not None:
            scheduler.on_difference = on_difference
        check_schedules(trainer.accelerator, scheduler, host_group(trainer.accelerator))
        return scheduler

    return create_scheduler


def _when_training_begins(trainer: Any, act: Callable[[], None], at_end: Callable[[], None] = lambda: None) -> None:
    """Have ``act`` called once model, optimizer and scheduler are wrapped, and ``at_end`` when all is done. Local."""
    from transformers import TrainerCallback

    class Begin(TrainerCallback):  # type: ignore[misc,unused-ignore]
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            act()

        def on_train_end(self, *_: Any, **__: Any) -> None:
            at_end()

    trainer.add_callback(Begin())


def _watch_ranks(trainer: Any, every: int | None) -> None:
    """Have ranks compare what they have at every update, before every checkpoint and at the end. Local."""
    if trainer.accelerator.num_processes == 1:
        return
    watch: ReplicaWatch | None = None
    hook: Any = None

    def begin() -> None:
        nonlocal watch, hook
        if hook is not None:  # a second train() has another scheduler, and perhaps the same optimizer
            hook.remove()
        optimizer, group = unwrap(trainer.optimizer), host_group(trainer.accelerator)
        model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
        watch = ReplicaWatch(
            group,
            inner_scheduler(trainer).agreement_record,
            lambda: check_replicas(model, optimizer, group=group),
            every,
        )
        hook = optimizer.register_step_pre_hook(watch.before_update)

    def settle() -> None:
        if watch is not None:
            watch.before_save()

    save_checkpoint = trainer._save_checkpoint

    def checked(*args: Any, **kwargs: Any) -> Any:
        settle()
        return save_checkpoint(*args, **kwargs)

    replace_method(trainer, "_save_checkpoint", checked)
    _when_training_begins(trainer, begin, settle)


def _attach_when_wrapped(trainer: Any) -> None:
    """Under DDP have gradients reduced to their owners, from when the model is wrapped on. Local."""
    attached: tuple[weakref.ref[nn.Module], weakref.ref[DistAdamW]] | None = None

    def act() -> None:
        nonlocal attached
        model, optimizer = trainer.model_wrapped, unwrap(trainer.optimizer)
        # A second train() has the model and the optimizer of the first, unless an override makes new ones.
        known = attached is not None and attached[0]() is model and attached[1]() is optimizer
        if not known and isinstance(optimizer, DistAdamW):
            attached = weakref.ref(model), weakref.ref(optimizer)
            attach(trainer.accelerator, model, optimizer)

    if engine_of(trainer.accelerator) in DATA_PARALLEL:
        _when_training_begins(trainer, act)


def _fill(trainer: Any, facts: LoaderFacts, given: Mapping[str, Any]) -> None:
    """Fill in what a scheduler that Trainer was given, or that an override made, does not know. Local."""
    made = check_made_scheduler(trainer)
    if given:
        raise ValueError(f"the Trainer was given a scheduler already, and scheduler={given} here. Choose one.")
    if made.epoch_size is None:
        made.epoch_size = _known(facts.epoch_size)
    if made.batch_size is None:
        made.batch_size = facts.batch


def _count_samples(trainer: Any, scheduler: CyclicLRWithRestarts) -> None:
    """Have the clock count the rows that Trainer trains on, all ranks together. Local.

    Trainer fetches the batches of an update at once and holds them until it has trained on them. The counter takes the
    oldest at each backward pass, so what is fetched and left (an epoch that a callback stops) does not count.
    """
    counter = SampleCounter(unwrap(trainer.optimizer), trainer.accelerator, group=host_group(trainer.accelerator))
    scheduler.sample_source = counter
    patch_accelerator(trainer.accelerator, counter=counter)


def _prepare_engine(trainer: Any, facts: LoaderFacts) -> bool:
    """Refuse an engine that is not served, and give DeepSpeed's configuration what it needs. Local.

    Returns:
        Whether DeepSpeed will make both objects of its configuration.
    """
    check_engine(trainer.accelerator, trainer.optimizer)
    if engine_of(trainer.accelerator) != "DEEPSPEED":
        return False
    if trainer.optimizer is not None:
        raise ValueError(
            "under DeepSpeed Trainer silently drops optimizers=(optimizer, scheduler). Leave it out, and pass "
            "their arguments to prepare_trainer."
        )
    config = trainer.accelerator.state.deepspeed_plugin.deepspeed_config
    written = [part for part in ("optimizer", "scheduler") if part in config]
    from_json = len(written) == 2 and names_our_types(config)
    if written and not from_json:
        part = written[0]
        raise ValueError(
            f"the DeepSpeed configuration names an {part} ({config[part].get('type')!r}), and prepare_trainer "
            f'makes one. Leave "{part}" out of it, or write both: CyclicLRWithRestarts under "scheduler".'
        )
    config.setdefault("gradient_clipping", trainer.args.max_grad_norm)
    configure(config, None)
    if from_json:
        register_deepspeed()
        fill(config, facts.batch.size, facts.epoch_size)
        _watch_scheduler_of_json(trainer, facts)
    return from_json


def _watch_scheduler_of_json(trainer: Any, facts: LoaderFacts) -> None:
    """Have the scheduler that DeepSpeed is going to make count real samples, and ranks compare it. Local."""

    def act() -> None:
        scheduler = inner_scheduler(trainer)
        check_scheduler(scheduler)
        if scheduler.batch_size == facts.batch.size:
            _count_samples(trainer, scheduler)
        check_schedules(trainer.accelerator, scheduler, host_group(trainer.accelerator))

    _when_training_begins(trainer, act)
