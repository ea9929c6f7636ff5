"""``prepare_trainer``: use DistAdamW and CyclicLRWithRestarts in transformers' Trainer, on every engine.

``optimizers=`` does not work on every engine: Trainer refuses it under FSDP, and silently drops it under DeepSpeed. All
engines call ``create_optimizer``, which calls ``get_optimizer_cls_and_kwargs``, and ``create_scheduler``: these are
replaced.
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
from dist_adamw.integrations.accelerate.prepare import attach, check_schedules, host_group, use_bucket_views
from dist_adamw.integrations.accelerate.update_count import send_counts_with
from dist_adamw.integrations.deepspeed.configuration import (
    batch_sizes_of,
    configure,
    fill,
    names_our_types,
    register_deepspeed,
)
from dist_adamw.integrations.transformers.arguments import (
    check_arguments,
    check_made_scheduler,
    check_override_of_scheduler,
    check_own_loader,
    given_by,
    inner_scheduler,
    is_overridden,
    put_optimizer,
    refuse_batch_schedule,
    replace_method,
    unchanged_if_refused,
    watch_batches,
    watch_own_loader,
)
from dist_adamw.integrations.transformers.recipe import agree_on_length, apply_recipe
from dist_adamw.integrations.transformers.trainer_state import keep_state
from dist_adamw.integrations.transformers.training_log import add_values
from dist_adamw.optimizer.adamw import DistAdamW
from dist_adamw.optimizer.replicas import CHECK_WEIGHTS_EVERY, ReplicaWatch, check_replicas
from dist_adamw.recipes.recipe import RecipeLike, TrainingRecipe
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
    recipe: RecipeLike | TrainingRecipe | None = None,
    check_weights_every: int | None = CHECK_WEIGHTS_EVERY,
    on_difference: OnDifference | None = None,
) -> T:
    """Make ``trainer.train()`` use `DistAdamW` and `CyclicLRWithRestarts`, on one process, DDP, FSDP2 and DeepSpeed.

    lr, betas, eps, weight decay and clipping come from ``TrainingArguments``; biases and norms are not decayed, as in
    Trainer. The global batch is ``per_device_train_batch_size`` x accumulation x data-parallel ranks, an epoch is
    ``train_dataset``, and a short last batch counts its real samples. Without FSDP and DeepSpeed, a checkpoint has
    every rank's shard of the optimizer, and ``resume_from_checkpoint`` loads it on any number of ranks. A second
    ``train()`` starts a new schedule, as with Trainer's own.

    A subclass keeps its overrides. Any torch optimizer that its ``create_optimizer`` makes is scheduled, with a warning
    if it is not a `DistAdamW`. If ``get_optimizer_cls_and_kwargs`` returns torch's AdamW, a `DistAdamW` is made in its
    place with the same groups and arguments. A ``create_scheduler`` of the subclass must make a `CyclicLRWithRestarts`.

    Warns (UserWarning) if training ends inside a cycle, with the nearest periods that avoid it.

    Args:
        trainer: A Trainer or an instance of a subclass, before ``train()``. Objects that it was given
            (``optimizers=``, ``optimizer_cls_and_kwargs=``) are used instead of new ones.
        optimizer: Arguments of `DistAdamW` that ``TrainingArguments`` does not have, such as ``decay_by``.
        scheduler: Arguments of `CyclicLRWithRestarts`. ``batch_size`` and ``epoch_size`` are needed only
            if the data has no length, or your own loader makes other batches. Trainer has one accumulation for all of
            training, so ``batch_size`` cannot be a schedule.
        recipe: A recipe file, its content, or a `TrainingRecipe`. It sets lr, betas, eps, weight decay, clipping,
            micro-batch, accumulation and epochs in ``TrainingArguments``, where they must be at their defaults or the
            same, and its ``no_decay`` replaces Trainer's rule. ``optimizer`` and ``scheduler`` may add arguments.
        check_weights_every: See `dist_adamw.prepare`. Ranks also compare before each checkpoint, and at the end.
        on_difference: The schedule with which ``resume_from_checkpoint`` continues if the checkpoint's differs: see
            ``CyclicLRWithRestarts.load_state_dict``. None: the scheduler's own setting, by default "strict".

    Trainer's log of the training loss (callbacks, ``report_to``) also has the values of `Tracking`.

    Returns:
        ``trainer``.

    Raises:
        ImportError: transformers is not installed.
        ValueError: ``trainer`` is not a Trainer; an argument is out of its range, is one of ``TrainingArguments``, or
            would be ignored, as ``TrainingArguments``' ``optim``, ``lr_scheduler_type``, ``lr_scheduler_kwargs`` and
            ``warmup_steps`` would; the engine is not supported; the epoch size is not known. The Trainer and its
            arguments are then as they were. ``train()`` raises it before training if the result of an override does
            not match these arguments.

    A DeepSpeed configuration that names both types (`register_deepspeed`) is used instead of new objects: "auto" is
    resolved, and all parameters are decayed, since the engine makes a single group.

    Under DeepSpeed the engine clips, to ``TrainingArguments(max_grad_norm=...)`` unless its configuration has a norm
    (DeepSpeed's default would be 1.0). Under DDP a `DistAdamW` is attached, as by `dist_adamw.prepare`.

    Local. ``train()`` is collective: ranks compare their schedule and hyper-parameters at every update.
    """
    _check_is_trainer(trainer)
    if hasattr(trainer, "_prepared_by_dist_adamw"):
        raise ValueError("prepare_trainer was already called for this Trainer. Call it once, with all arguments.")
    optimizer, scheduler = dict(optimizer or {}), dict(scheduler or {})
    with unchanged_if_refused(trainer):
        check_arguments(trainer, optimizer, on_difference)
        if recipe is not None:
            optimizer, scheduler = _with_recipe(trainer, recipe, optimizer, scheduler)
        facts = _facts(trainer)
        _refuse_reproducible(bool(optimizer.get("reproducible")))
        refuse_batch_schedule(scheduler.get("batch_size"))
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
        _when_training_begins(trainer, lambda: _let_average(trainer))
        keep_state(trainer, on_difference)
        add_values(trainer)
        _watch_ranks(trainer, check_weights_every)
        vars(trainer)["_prepared_by_dist_adamw"] = True
    return trainer


def _with_recipe(
    trainer: Any, recipe: RecipeLike | TrainingRecipe, optimizer: dict[str, Any], scheduler: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Apply a recipe to Trainer's arguments, and return all other arguments of optimizer and scheduler. Local."""
    loaded, of_optimizer, of_scheduler = apply_recipe(trainer, recipe)
    for given, theirs in ((optimizer, of_optimizer), (scheduler, of_scheduler)):
        if twice := sorted(given.keys() & theirs.keys()):
            raise ValueError(
                f"{twice[0]}={given[twice[0]]!r} was given to prepare_trainer, and the recipe has "
                f"{theirs[twice[0]]!r}. Leave one out."
            )
    facts = _facts(trainer)
    size, epoch_size = facts.batch.size, facts.epoch_size
    agree_on_length(trainer, loaded, size, epoch_size, lambda: _samples_of_training(trainer.args, size, epoch_size))
    return {**of_optimizer, **optimizer}, {**of_scheduler, **scheduler}


def _check_is_trainer(trainer: object) -> None:
    """Raise unless ``trainer`` is transformers' Trainer. Local."""
    try:
        from transformers import Trainer
    except ImportError as error:
        raise ImportError("prepare_trainer() needs transformers: pip install 'dist_adamw[transformers]'.") from error
    if not isinstance(trainer, Trainer):
        raise ValueError(
            f"prepare_trainer needs a transformers.Trainer, got {type(trainer).__name__}. For a loop of your own use "
            "dist_adamw.prepare."
        )


def _check_engine_makes_both(trainer: Any, optimizer: Mapping[str, Any], scheduler: Mapping[str, Any]) -> None:
    """Raise if the script defines optimizer or scheduler too. Local."""
    if optimizer or scheduler:
        raise ValueError(
            f"the DeepSpeed configuration has the optimizer and the scheduler, and optimizer={optimizer}, "
            f"scheduler={scheduler} were given here. Choose one."
        )
    for name in ("create_optimizer", "get_optimizer_cls_and_kwargs", "create_scheduler"):
        if is_overridden(trainer, name):
            raise ValueError(
                f"{type(trainer).__name__} overrides {name}, which Trainer does not call if the DeepSpeed "
                "configuration has the optimizer and the scheduler. Leave one of them out."
            )


def _try_schedule(trainer: Any, facts: LoaderFacts, given: Mapping[str, Any], lr: float) -> None:
    """Make the schedule once, so that bad arguments fail here and not after a job of many ranks has started. Local."""
    adamw = DistAdamW([nn.Parameter(torch.zeros(1))], lr=lr)
    _warn_of_mid_cycle(trainer, _scheduler(adamw, facts, given), facts, 4)


def _warn_of_mid_cycle(trainer: Any, scheduler: CyclicLRWithRestarts, facts: LoaderFacts, stacklevel: int) -> None:
    """Warn if training ends inside a cycle, where lr may be high. Local."""
    assert scheduler.batch_size is not None
    total = _samples_of_training(trainer.args, scheduler.batch_size, facts.epoch_size)
    if total and not (end := training_end(scheduler.schedule, total)).is_at_cycle_end:
        warnings.warn(f"{end}", stacklevel=stacklevel)


def _samples_of_training(args: Any, batch_size: int, epoch_size: int | None) -> int | None:
    """Return the real samples that Trainer will train on; None if they are not known. Local."""
    if args.max_steps > 0:
        return _samples_of_updates(args.max_steps, batch_size, epoch_size)
    return None if epoch_size is None else round(args.num_train_epochs * epoch_size)


def _samples_of_updates(updates: int, batch_size: int, epoch_size: int | None) -> int:
    """Return the real samples of a number of updates; the last one of an epoch may be short. Local."""
    if epoch_size is None:
        return updates * batch_size
    epochs, rest = divmod(updates, -(-epoch_size // batch_size))
    return epochs * epoch_size + min(rest * batch_size, epoch_size)


def _facts(trainer: Any) -> LoaderFacts:
    """Return the current global batch and epoch size, which ``auto_find_batch_size`` may change. Local."""
    args, data = trainer.args, trainer.train_dataset
    if data is None:
        raise ValueError("the Trainer has train_dataset=None, so the epoch size is unknown. Pass a train_dataset.")
    drop_last = args.dataloader_drop_last and not isinstance(data, IterableDataset)
    loader: DataLoader[Any] = DataLoader(data, batch_size=trainer._train_batch_size, drop_last=drop_last)
    facts = loader_facts(trainer.accelerator, loader)
    # Trainer accumulates itself, and its accelerator has gradient_accumulation_steps=1.
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
    """Return a ``Trainer.create_scheduler``, which every engine calls once model and optimizer are wrapped.

    Args:
        trainer: The Trainer.
        given: Arguments of the scheduler.
        theirs: A subclass's method that makes the scheduler.
        on_difference: For loading.
        loader: Returns the loader that a subclass has made, if any.
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
            trainer._created_lr_scheduler = True  # Trainer's own flag: the next train() makes a new one
        scheduler = check_made_scheduler(trainer)
        if scheduler.batch_size in (facts.batch.size, batch_size):  # otherwise it counts other units, such as tokens
            _count_samples(trainer, scheduler)
        if on_difference is not None:
            scheduler.on_difference = on_difference
        check_schedules(trainer.accelerator, scheduler, host_group(trainer.accelerator))
        return scheduler

    return create_scheduler


def _when_training_begins(trainer: Any, act: Callable[[], None], at_end: Callable[[], None] = lambda: None) -> None:
    """Call ``act`` once model, optimizer and scheduler are wrapped, and ``at_end`` after training. Local."""
    from transformers import TrainerCallback

    class Begin(TrainerCallback):  # type: ignore[misc,unused-ignore]
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            act()

        def on_train_end(self, *_: Any, **__: Any) -> None:
            at_end()

    trainer.add_callback(Begin())


def _watch_ranks(trainer: Any, every: int | None) -> None:
    """Make ranks compare their state at every update, before every checkpoint and at the end. Local."""
    if trainer.accelerator.num_processes == 1:
        return
    watch: ReplicaWatch | None = None
    hook: Any = None

    def begin() -> None:
        nonlocal watch, hook
        if hook is not None:  # a second train() has a new scheduler, and perhaps the same optimizer
            hook.remove()
        optimizer, group = unwrap(trainer.optimizer), host_group(trainer.accelerator)
        model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
        scheduler = inner_scheduler(trainer)
        watch = ReplicaWatch(
            group,
            scheduler._scheduled.digested_record,
            lambda: check_replicas(model, optimizer, group=group),
            every,
        )
        send_counts_with(watch, scheduler)
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


def _let_average(trainer: Any) -> None:
    """Give ``trainer.optimizer`` the method `DistAdamW.averaged`, once the model is wrapped. Local."""
    if isinstance(optimizer := unwrap(trainer.optimizer), DistAdamW):
        optimizer.use_model(trainer.model_wrapped)
        trainer.optimizer.averaged = optimizer.averaged


def _attach_when_wrapped(trainer: Any) -> None:
    """Attach the optimizer under DDP, once the model is wrapped. Local."""
    attached: tuple[weakref.ref[nn.Module], weakref.ref[DistAdamW]] | None = None

    def act() -> None:
        nonlocal attached
        model, optimizer = trainer.model_wrapped, unwrap(trainer.optimizer)
        # A second train() keeps model and optimizer, unless an override makes new ones.
        known = attached is not None and attached[0]() is model and attached[1]() is optimizer
        if not known and isinstance(optimizer, DistAdamW):
            attached = weakref.ref(model), weakref.ref(optimizer)
            _refuse_reproducible(optimizer.reproducible)
            attach(trainer.accelerator, model, optimizer)

    if engine_of(trainer.accelerator) in DATA_PARALLEL:
        use_bucket_views(trainer.accelerator)
        _when_training_begins(trainer, act)


def _refuse_reproducible(reproducible: bool) -> None:
    if reproducible:
        raise ValueError(
            "reproducible=True is not supported under Trainer, which divides losses by the accumulation or by the "
            "number of tokens of all ranks. Leave it out, or write the loop with Accelerate and dist_adamw.prepare."
        )


def _fill(trainer: Any, facts: LoaderFacts, given: Mapping[str, Any]) -> None:
    """Fill in the sizes of a scheduler that Trainer was given or that an override made. Local."""
    made = check_made_scheduler(trainer)
    if given:
        raise ValueError(f"the Trainer was given a scheduler already, and scheduler={given} here. Choose one.")
    if made.epoch_size is None:
        made.epoch_size = _known(facts.epoch_size)
    if made.batch_size is None:
        made.batch_size = facts.batch


def _count_samples(trainer: Any, scheduler: CyclicLRWithRestarts) -> None:
    """Make the clock count the rows that Trainer trains on, over all ranks. Local.

    Trainer fetches all batches of an update first and holds them until it has trained on them. The counter takes the
    oldest at each backward pass, so batches that are fetched but not used (a callback stops the epoch) do not count.
    """
    counter = SampleCounter(unwrap(trainer.optimizer), trainer.accelerator, group=host_group(trainer.accelerator))
    scheduler.sample_source = counter
    patch_accelerator(trainer.accelerator, counter=counter)


def _prepare_engine(trainer: Any, facts: LoaderFacts) -> bool:
    """Refuse an unsupported engine, and complete the DeepSpeed configuration. Local.

    Returns:
        Whether DeepSpeed will make both objects from its configuration.
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
    # First: `configure` sets a missing norm to 0.0, which turns clipping off.
    config.setdefault("gradient_clipping", trainer.args.max_grad_norm)
    configure(config, None)
    if from_json:
        register_deepspeed()
        refuse_batch_schedule(batch_sizes_of(config))
        fill(config, facts.batch.size, facts.epoch_size)
        _watch_scheduler_of_json(trainer, facts)
    return from_json


def _watch_scheduler_of_json(trainer: Any, facts: LoaderFacts) -> None:
    """Make the scheduler that DeepSpeed will create count real samples, and ranks compare it. Local."""

    def act() -> None:
        scheduler = inner_scheduler(trainer)
        watch_batches(check_scheduler(scheduler))
        if scheduler.batch_size == facts.batch.size:
            _count_samples(trainer, scheduler)
        check_schedules(trainer.accelerator, scheduler, host_group(trainer.accelerator))

    _when_training_begins(trainer, act)
