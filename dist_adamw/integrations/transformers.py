"""``prepare_trainer``: DistAdamW and CyclicLRWithRestarts inside transformers' Trainer, alike on every engine.

Floor 4: knows Trainer by its attributes, and imports nothing of transformers. Trainer passes some engines by with
``optimizers=``: it is refused under FSDP, and dropped without a word under DeepSpeed. What all of them go through is
``optimizer_cls_and_kwargs`` and ``create_scheduler``, so that is where both are put.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, IterableDataset

from dist_adamw import collectives
from dist_adamw.checkpoint import everywhere, load, save
from dist_adamw.conventions import unwrap
from dist_adamw.index import read_index, write_text
from dist_adamw.integrations.accelerate import (
    DATA_PARALLEL,
    attach,
    check_engine,
    check_scheduler,
    check_schedules,
    host_group,
)
from dist_adamw.integrations.data import LoaderFacts, engine_of, loader_facts
from dist_adamw.integrations.deepspeed import configure, fill, names_our_types, register_deepspeed
from dist_adamw.integrations.zero import prepare_deepspeed
from dist_adamw.optimizer import DistAdamW
from dist_adamw.random_state import restore_random_state
from dist_adamw.replicas import CHECK_WEIGHTS_EVERY, ReplicaWatch, check_replicas
from dist_adamw.scheduler import CyclicLRWithRestarts

if TYPE_CHECKING:
    from transformers import Trainer

T = TypeVar("T", bound="Trainer")
# Said once, where Trainer, DeepSpeed's "auto" and everybody's logs look for it.
_IN_ARGUMENTS = {
    "lr": "learning_rate",
    "betas": "adam_beta1 and adam_beta2",
    "eps": "adam_epsilon",
    "weight_decay": "weight_decay",
    "max_grad_norm": "max_grad_norm",
}


def prepare_trainer(
    trainer: T,
    *,
    optimizer: Mapping[str, Any] | None = None,
    scheduler: Mapping[str, Any] | None = None,
    check_weights_every: int | None = CHECK_WEIGHTS_EVERY,
) -> T:
    """Have ``trainer.train()`` use `DistAdamW` and `CyclicLRWithRestarts`, on one process, DDP, FSDP2 and DeepSpeed.

    lr, betas, eps, weight decay and clipping are those of ``TrainingArguments``; biases and norms are not decayed, as
    Trainer has it. The global batch is ``per_device_train_batch_size`` x accumulation x data-parallel ranks, an epoch
    is ``train_dataset``, and of a short last batch the real samples are counted. Without FSDP and DeepSpeed
    a checkpoint keeps every rank's share of the optimizer, and ``resume_from_checkpoint`` loads it on any number of
    ranks. A second ``train()`` begins the schedule anew, as Trainer's own do.

    Args:
        trainer: A Trainer, or of a class derived from it, before ``train()``. Objects that it was given
            (``optimizers=``, ``optimizer_cls_and_kwargs=``) are used instead of new ones.
        optimizer: Arguments of `DistAdamW` that ``TrainingArguments`` does not have, such as ``decay_by``.
        scheduler: Arguments of `CyclicLRWithRestarts`. ``batch_size`` and ``epoch_size`` are needed only
            where the data has no length, or a loader of your own makes other batches.
        check_weights_every: As of `dist_adamw.prepare`. Ranks also compare before each checkpoint, and at the end.

    Returns:
        ``trainer``.

    Raises:
        ValueError: an argument is out of its range or said elsewhere; an engine is not supported; the epoch size
            cannot be had. The message has the value and the cure.

    A DeepSpeed configuration that names both types (`register_deepspeed`) is used instead of new objects: "auto" is
    filled in, and all parameters decay alike, since the engine makes one group of them.

    Under DeepSpeed the engine clips, by ``TrainingArguments(max_grad_norm=...)`` also where its configuration says
    nothing (DeepSpeed would clip to 1.0). Under DDP a `DistAdamW` is attached, as `dist_adamw.prepare` does it.

    Local. ``train()`` is collective; in it ranks compare their schedule and hyper-parameters at every update.
    """
    facts = _facts(trainer)
    optimizer, scheduler = dict(optimizer or {}), dict(scheduler or {})
    _check_arguments(trainer, optimizer)
    if _prepare_engine(trainer, facts):
        if optimizer or scheduler:
            raise ValueError(
                f"the DeepSpeed configuration has the optimizer and the scheduler, and optimizer={optimizer}, "
                f"scheduler={scheduler} were given here. Choose one."
            )
        _keep_state(trainer)
        _watch_ranks(trainer, check_weights_every)
        return trainer
    if trainer.optimizer is None and trainer.optimizer_cls_and_kwargs is None:
        args = trainer.args
        betas = (args.adam_beta1, args.adam_beta2)
        optimizer = {"lr": args.learning_rate, "betas": betas, "eps": args.adam_epsilon, **optimizer}
        trainer.optimizer_cls_and_kwargs = (DistAdamW, optimizer)
        # Bad arguments fail here and now, not when a job of many ranks has come up.
        _scheduler(DistAdamW([nn.Parameter(torch.zeros(1))], **optimizer), facts, scheduler)
    elif optimizer:
        raise ValueError(f"the Trainer was given an optimizer already, and optimizer={optimizer} here. Choose one.")
    if trainer.lr_scheduler is not None:
        _fill(trainer, facts, scheduler)
    _set(trainer, "create_scheduler", _creator(trainer, scheduler))
    _keep_state(trainer)
    _attach_when_wrapped(trainer)
    _watch_ranks(trainer, check_weights_every)
    return trainer


def _check_arguments(trainer: Any, optimizer: Mapping[str, Any]) -> None:
    """Refuse what is said elsewhere, or would not be heard. Local."""
    for name in optimizer.keys() & _IN_ARGUMENTS.keys():
        raise ValueError(
            f"{name}={optimizer[name]!r} was given to prepare_trainer; Trainer has it from TrainingArguments. Set "
            f"{_IN_ARGUMENTS[name]} there."
        )
    if warmup := trainer.args.warmup_steps:
        raise ValueError(
            f"TrainingArguments(warmup_steps={warmup!r}) is for Trainer's own schedulers and would not be heard. "
            "Pass scheduler={'warmup_samples': ...} to prepare_trainer, in samples."
        )


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


def _scheduler(optimizer: Optimizer, facts: LoaderFacts, told: Mapping[str, Any]) -> CyclicLRWithRestarts:
    known: dict[str, Any] = {"batch_size": facts.batch.size, "epoch_size": facts.epoch_size}
    known |= {name: value for name, value in told.items() if value is not None}
    return CyclicLRWithRestarts(optimizer, **{**known, "epoch_size": _known(known["epoch_size"])})


def _known(epoch_size: int | None) -> int:
    if epoch_size is None:
        raise ValueError(
            "the train_dataset has no length, so the epoch size is unknown. Give the scheduler "
            "epoch_size=<samples per epoch>."
        )
    return epoch_size


def _creator(trainer: Any, told: Mapping[str, Any]) -> Callable[..., CyclicLRWithRestarts]:
    """What stands for ``Trainer.create_scheduler``, which every engine calls when model and optimizer are wrapped."""

    def create_scheduler(num_training_steps: int, optimizer: Optimizer | None = None) -> CyclicLRWithRestarts:
        if trainer.lr_scheduler is None:
            facts = _facts(trainer)
            made = _scheduler(unwrap(optimizer or trainer.optimizer), facts, told)
            if told.get("batch_size") is None and told.get("epoch_size") is None:
                made.sample_source = _sample_source(trainer, facts)
            trainer.lr_scheduler = made
            trainer._created_lr_scheduler = True  # by itself, as far as Trainer knows: the next train() makes another
        scheduler: CyclicLRWithRestarts = trainer.lr_scheduler
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
            group, _inner(trainer).agreement_record, lambda: check_replicas(model, optimizer, group=group), every
        )
        hook = optimizer.register_step_pre_hook(watch.before_update)

    def settle() -> None:
        if watch is not None:
            watch.before_save()

    save_checkpoint = trainer._save_checkpoint

    def checked(*args: Any, **kwargs: Any) -> Any:
        settle()
        return save_checkpoint(*args, **kwargs)

    _set(trainer, "_save_checkpoint", checked)
    _when_training_begins(trainer, begin, settle)


def _inner(trainer: Any) -> CyclicLRWithRestarts:
    """Trainer's scheduler, without the wrapper that one of a DeepSpeed configuration has."""
    scheduler: CyclicLRWithRestarts = getattr(trainer.lr_scheduler, "scheduler", trainer.lr_scheduler)
    return scheduler


def _attach_when_wrapped(trainer: Any) -> None:
    """Under DDP have gradients reduced to their owners, from when the model is wrapped on. Local."""
    attached: nn.Module | None = None

    def act() -> None:
        nonlocal attached
        model, optimizer = trainer.model_wrapped, unwrap(trainer.optimizer)
        # A second train() has the model and the optimizer of the first.
        if model is not attached and isinstance(optimizer, DistAdamW):
            attached = model
            attach(trainer.accelerator, model, optimizer)

    if engine_of(trainer.accelerator) in DATA_PARALLEL:
        _when_training_begins(trainer, act)


def _fill(trainer: Any, facts: LoaderFacts, told: Mapping[str, Any]) -> None:
    """Tell a scheduler that came with ``optimizers=`` what it was not told. Local."""
    given = trainer.lr_scheduler
    check_scheduler(given)
    if told:
        raise ValueError(f"the Trainer was given a scheduler already, and scheduler={told} here. Choose one.")
    if trainer.optimizer is None or given.optimizer is not unwrap(trainer.optimizer):
        raise ValueError(
            "the scheduler in optimizers= drives another optimizer than the Trainer's, whose lr would stand still. "
            "Pass both: optimizers=(optimizer, scheduler)."
        )
    by_data = given.batch_size in (None, facts.batch.size) and given.epoch_size in (None, facts.epoch_size)
    if given.epoch_size is None:
        given.epoch_size = _known(facts.epoch_size)
    if given.batch_size is None:
        given.batch_size = facts.batch
    if by_data:
        given.sample_source = _sample_source(trainer, facts)


def _sample_source(trainer: Any, facts: LoaderFacts) -> Callable[[], int | None]:
    """The real samples of an update, all ranks together, by its place in the epoch: only the last is short.

    Trainer fetches the batches of an update at once, so what Accelerate's loader knows is ahead of the update.
    """
    if (samples := facts.samples) is not None and facts.drop_last:
        samples = samples // facts.pass_samples * facts.pass_samples
    size = facts.batch.size

    def real_samples() -> int | None:
        # With ignore_data_skip a resumed epoch begins at its start, and global_step has no place in it.
        if samples is None or trainer.args.ignore_data_skip:
            return None
        updates = -(-samples // size)
        is_last = (trainer.state.global_step + 1) % updates == 0
        return samples - (updates - 1) * size if is_last else size

    return real_samples


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
            "under DeepSpeed Trainer drops optimizers=(optimizer, scheduler) without a word. Leave it out, and pass "
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
        if fill(config, facts.batch.size, facts.epoch_size):
            _count_real_samples(trainer, facts)
    return from_json


def _count_real_samples(trainer: Any, facts: LoaderFacts) -> None:
    """Tell the scheduler that DeepSpeed is going to make of short last batches. Local."""

    def act() -> None:
        scheduler = _inner(trainer)
        check_scheduler(scheduler)
        scheduler.sample_source = _sample_source(trainer, facts)
        check_schedules(trainer.accelerator, scheduler, host_group(trainer.accelerator))

    _when_training_begins(trainer, act)


def _keep_state(trainer: Any) -> None:
    """Have checkpoints keep weights, optimizer and schedule our way: they resume on any engine and number of ranks.

    Trainer's own files of those are of one engine. The model file that it writes beside them, for everybody to load,
    stays. The folder has the name by which Trainer looks for a state under DeepSpeed.
    """
    load_weights, load_rest = trainer._load_from_checkpoint, trainer._load_optimizer_and_scheduler
    load_best, load_random = trainer._load_best_model, trainer._load_rng_state

    def ours(checkpoint: str | None) -> Path | None:
        found = _states_in(Path(checkpoint)) if checkpoint is not None else []
        # A folder of DeepSpeed's own has these; what is neither is one of ours that is not whole, and is to be named.
        mine = found[-1] if found and not any(found[-1].glob("*_model_states.pt")) else None
        of_ranks = collectives.all_gather_objects(mine, host_group(trainer.accelerator))
        return next((path for path in of_ranks if path is not None), None)  # one that some do not see is refused

    def save_state(output_dir: str) -> None:
        folder = Path(output_dir) / f"global_step{trainer.state.global_step}"
        save(
            folder, trainer.model_wrapped, trainer.optimizer, _inner(trainer), compare_ranks=False
        )  # it is done by now
        is_writer = trainer.args.should_save
        everywhere(lambda: write_text(Path(output_dir) / "latest", folder.name) if is_writer else None)

    def load_model(checkpoint: str, model: nn.Module | None = None) -> None:
        if ours(checkpoint) is None:
            load_weights(checkpoint, model)

    def load_state(checkpoint: str | None) -> None:
        if (folder := ours(checkpoint)) is None:
            load_rest(checkpoint)
        elif engine_of(trainer.accelerator) != "DEEPSPEED":  # there Trainer has the engine load
            load(folder, trainer.model_wrapped, trainer.optimizer, _inner(trainer), random_state=False)

    def load_best_model() -> None:
        # Trainer's own way differs by engine: it looks for FSDP's files, which are not written any more, and under
        # DeepSpeed it takes optimizer, schedule and random state back too.
        if (folder := ours(trainer.state.best_model_checkpoint)) is None:
            load_best()  # of save_only_model, or of a job without prepare_trainer
        else:
            load(folder, trainer.model_wrapped, random_state=False)

    def load_random_state(checkpoint: str | None) -> None:
        if (folder := ours(checkpoint)) is None:
            load_random(checkpoint)
        else:  # Trainer's own files are of one number of ranks
            everywhere(lambda: restore_random_state(read_index(folder)), host_group(trainer.accelerator))

    _set(trainer, "_save_optimizer_and_scheduler", save_state)
    _set(trainer, "_load_rng_state", load_random_state)
    _set(trainer, "_load_best_model", load_best_model)
    _set(trainer, "_load_from_checkpoint", load_model)
    _set(trainer, "_load_optimizer_and_scheduler", load_state)
    if engine_of(trainer.accelerator) == "DEEPSPEED":
        create = trainer.create_scheduler

        def create_scheduler(*args: Any, **kwargs: Any) -> Any:
            made = create(*args, **kwargs)
            engine = trainer.accelerator.deepspeed_engine_wrapped.engine  # it is there by now, and nothing is loaded
            prepare_deepspeed(engine, _inner(trainer))
            return made

        _set(trainer, "create_scheduler", create_scheduler)


def _states_in(checkpoint: Path) -> list[Path]:
    """Folders ``global_step<updates>``, in the order of the number: step 10 comes after step 9. Local."""
    found = [path for path in checkpoint.glob("global_step*") if path.name.removeprefix("global_step").isdecimal()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("global_step")))


def _set(trainer: Any, method: str, function: Callable[..., Any]) -> None:
    """Put ``function`` in the place of a method of this one Trainer, whatever its class."""
    assert callable(getattr(trainer, method))
    setattr(trainer, method, function)
