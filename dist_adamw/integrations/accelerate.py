"""``prepare``: the five objects of an Accelerate training script, made to work together.

Floor 4: knows Accelerate; nothing below knows it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import warnings
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from dist_adamw import collectives
from dist_adamw.checkpoint import check_alike, everywhere, load, save
from dist_adamw.conventions import unwrap
from dist_adamw.folder import fingerprint
from dist_adamw.held import bare
from dist_adamw.index import INDEX, CheckpointError, read_index
from dist_adamw.integrations.data import (
    LoaderFacts,
    Position,
    engine_of,
    loader_facts,
    real_samples,
    shuffle_by_generator,
)
from dist_adamw.integrations.deepspeed import (
    CLIPPING,
    configure,
    fill,
    names_our_types,
    register_deepspeed,
)
from dist_adamw.integrations.zero import accept_counts, prepare_deepspeed
from dist_adamw.optimizer import DistAdamW
from dist_adamw.random_state import restore_random_state
from dist_adamw.replicas import CHECK_WEIGHTS_EVERY, ReplicaWatch, check_replicas
from dist_adamw.scheduler import CyclicLRWithRestarts

if TYPE_CHECKING:
    from accelerate import Accelerator

FOLDER = "dist_adamw"
DATA_PARALLEL = {"NO", "MULTI_CPU", "MULTI_GPU", "MULTI_NPU", "MULTI_MLU", "MULTI_XPU", "MULTI_HPU"}
_ENGINES = {*DATA_PARALLEL, "FSDP", "DEEPSPEED"}
# What Accelerate writes; other files in a folder may change as they like.
_THEIRS = (
    *("custom_checkpoint_*.pkl", "scaler.pt", "random_states_*.pkl", "sampler*.bin", "dl_state_dict*.bin"),
    *("model*.safetensors", "pytorch_model*.bin", "optimizer*.bin", "scheduler*.bin"),
)


def prepare(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Optimizer,
    dataloader: DataLoader[Any],
    scheduler: CyclicLRWithRestarts,
    *,
    check_weights_every: int | None = CHECK_WEIGHTS_EVERY,
) -> tuple[nn.Module, Optimizer, DataLoader[Any], CyclicLRWithRestarts]:
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
        scheduler: Not prepared; it is returned itself, since it needs no wrapper.
        check_weights_every: Updates between two comparisons of what must be the same bits on several ranks: see
            `check_replicas`. The first is at the first update; ``accelerator.save_state`` makes one before it writes.
            0 or None: none at all, for ranks that are meant to differ (local SGD).

    Returns:
        Model, optimizer, loader and scheduler, to be used instead.

    Raises:
        ValueError: the global batch or the epoch size cannot be had, or the batch is not the one
            the scheduler was given; on every rank alike, and nothing is prepared then.
        AgreementError: ranks were given different things; on every rank. Later, the optimizer's ``step`` and
            ``accelerator.save_state`` raise it.

    Under FSDP2 and DeepSpeed the engine shares gradients and state out; `DistAdamW` updates what it finds.
    With DeepSpeed ``prepare`` hands ``max_grad_norm`` over to the engine, which clips to 1.0 if nobody says, and
    keeps the optimizer where DeepSpeed would put its own (optimizer offload).

    A `DistAdamW` under DDP is attached (`DistAdamW.attach`): gradients are reduced to their owners, and
    ``accelerator.clip_grad_norm_`` clips by the global norm of what they own. With a GradScaler
    (fp16) or a communication hook of yours, DDP's all-reduce stays.

    DDP keeps a second copy of the gradients unless it is told not to, so ``prepare`` asks for
    ``gradient_as_bucket_view`` where no ``DistributedDataParallelKwargs`` were given.

    Collective: every rank calls it.
    """
    group = host_group(accelerator)
    facts = _agreed_facts(accelerator, optimizer, dataloader, scheduler, group)
    if accelerator.ddp_handler is None:
        accelerator.ddp_handler = _ddp_kwargs()
    engine, from_json = engine_of(accelerator), _is_dummy(optimizer)
    if engine == "DEEPSPEED":
        config = accelerator.deepspeed_plugin.deepspeed_config
        configure(config, optimizer)
        if from_json:
            register_deepspeed()
            fill(config, facts.batch.size, facts.epoch_size)
    groups = [] if from_json else _hyper_parameters(optimizer)
    shuffle_by_generator(dataloader)
    model, wrapped, dataloader, stepped = accelerator.prepare(model, optimizer, dataloader, scheduler)
    inner = unwrap(wrapped)
    if from_json:
        scheduler = stepped.scheduler
        check_scheduler(scheduler)
        check_schedules(accelerator, scheduler, group)
    else:
        _check_kept(optimizer, inner, groups)
    place = Position(dataloader, facts)
    dataloader.dist_adamw_position = place
    scheduler.sample_source = lambda: real_samples(accelerator, place, dataloader)
    watch = None
    if accelerator.num_processes > 1:
        whole = accelerator.unwrap_model(model)
        watch = ReplicaWatch(
            group,
            scheduler.agreement_record,
            lambda: check_replicas(whole, inner, group=group),
            check_weights_every,
        )
        inner.register_step_pre_hook(watch.before_update)
    if engine == "DEEPSPEED":
        _warn_of_clipping(accelerator, float(config[CLIPPING]))
    if isinstance(inner, DistAdamW) and engine in DATA_PARALLEL:
        attach(accelerator, model, inner)
    if engine == "DEEPSPEED":
        prepare_deepspeed(model, scheduler)
    _keep_state(accelerator, (model, wrapped, stepped), scheduler, place, watch, group)
    return model, wrapped, dataloader, scheduler


def check_schedules(accelerator: Accelerator, scheduler: CyclicLRWithRestarts, group: dist.ProcessGroup | None) -> None:
    """Raise on every rank when their schedules are not the same. Collective."""
    if accelerator.num_processes > 1:
        collectives.check_agreement({**scheduler.configuration(), **scheduler.agreement_record()}, group)


def _hyper_parameters(optimizer: Optimizer) -> list[dict[str, Any]]:
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


def _warn_of_clipping(accelerator: Accelerator, engines: float) -> None:
    """Have ``accelerator.clip_grad_norm_``, which only reports under DeepSpeed, say so where the loop counts on it."""
    report = accelerator.clip_grad_norm_

    def clip_grad_norm_(parameters: Any, max_norm: float, norm_type: float = 2) -> Any:
        if max_norm != engines:
            warnings.warn(
                f"accelerator.clip_grad_norm_(max_norm={max_norm}) does not clip under DeepSpeed, whose "
                f"gradient_clipping is {engines} (0.0: none). Pass max_grad_norm={max_norm} to DistAdamW, or write it "
                "into the DeepSpeed configuration.",
                stacklevel=2,
            )
        return report(parameters, max_norm, norm_type)

    accelerator.clip_grad_norm_ = clip_grad_norm_


def host_group(accelerator: Accelerator) -> dist.ProcessGroup | None:
    """Accelerate's ranks, in a group for messages on the host. Collective the first time."""
    return None if accelerator.num_processes == 1 else collectives.host_group()


def _ddp_kwargs() -> Any:
    from accelerate import DistributedDataParallelKwargs

    return DistributedDataParallelKwargs(gradient_as_bucket_view=True)


def _agreed_facts(
    accelerator: Accelerator,
    optimizer: Optimizer,
    dataloader: DataLoader[Any],
    scheduler: CyclicLRWithRestarts,
    group: dist.ProcessGroup | None,
) -> LoaderFacts:
    """Look at what each rank was given, and raise on all what is wrong on any. Collective."""
    facts, problem, record = None, None, {}
    try:
        facts = _checked_facts(accelerator, optimizer, dataloader, scheduler)
        inner = unwrap(optimizer)
        layout = inner.layout_record() if isinstance(inner, DistAdamW) else {}
        if not _is_dummy(optimizer):
            record = {**scheduler.configuration(), **scheduler.agreement_record(), **layout}
    except ValueError as error:
        problem = str(error)
    several = accelerator.num_processes > 1
    reports = collectives.all_gather_objects(problem, group) if several else [problem]
    for rank, failed in enumerate(reports):
        if failed is not None:
            everywhere = all(other == failed for other in reports)
            raise ValueError(failed if everywhere else f"{failed} (rank {rank})")
    if several:
        collectives.check_agreement(record, group)
    assert facts is not None
    return facts


def _checked_facts(
    accelerator: Accelerator, optimizer: Optimizer, dataloader: DataLoader[Any], scheduler: CyclicLRWithRestarts
) -> LoaderFacts:
    """Refuse what does not fit together, and fill the scheduler in. Local."""
    if _is_dummy(optimizer):
        return _checked_json(accelerator, dataloader, scheduler)
    check_scheduler(scheduler)
    if scheduler.optimizer is not unwrap(optimizer):
        raise ValueError(
            f"the scheduler drives another {type(scheduler.optimizer).__name__} than the one given here, "
            "whose lr would stand still. Pass prepare the optimizer that the scheduler was built with."
        )
    check_engine(accelerator, optimizer)
    facts = loader_facts(accelerator, dataloader)
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
    if scheduler.epoch_size is None:
        scheduler.epoch_size = facts.epoch_size  # type: ignore[assignment]
    if scheduler.batch_size is None:
        scheduler.batch_size = facts.batch
    return facts


def _is_dummy(optimizer: Any) -> bool:
    """Whether DeepSpeed's configuration has the optimizer, and this stands for it."""
    return type(optimizer).__name__ == "DummyOptim"


def _checked_json(accelerator: Accelerator, dataloader: DataLoader[Any], scheduler: Any) -> LoaderFacts:
    """For an optimizer and a scheduler that DeepSpeed will make of its configuration. Local."""
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


def check_scheduler(scheduler: Any) -> None:
    """Refuse what is no `CyclicLRWithRestarts`, or is wrapped already. Local."""
    if not isinstance(scheduler, CyclicLRWithRestarts):
        raise ValueError(
            f"scheduler must be a CyclicLRWithRestarts that is not prepared yet, got {type(scheduler).__name__}. "
            "For other schedulers accelerator.prepare does all there is to do."
        )


def check_engine(accelerator: Accelerator, optimizer: Optimizer) -> None:
    """Refuse an engine that is not served, or that is not the one that was asked for. Local."""
    engine = engine_of(accelerator)
    if engine not in _ENGINES:
        raise ValueError(
            f"the engine {engine} is not supported. Use one process, DDP, FSDP2 or DeepSpeed, or drive "
            f"{type(optimizer).__name__} with accelerator.prepare alone, after passing batch_size (global) and "
            "epoch_size to the scheduler."
        )
    if engine == "FSDP" and getattr(accelerator.state.fsdp_plugin, "fsdp_version", 1) != 2:
        raise ValueError(
            "FSDP1 keeps flat parameters without names, got fsdp_version: 1. Set fsdp_version: 2 in the Accelerate "
            "configuration (FSDP_VERSION=2)."
        )
    for name, wanted in (("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DEEPSPEED")):
        if os.environ.get(name, "false").lower() == "true" and engine != wanted:
            raise ValueError(
                f"{wanted} was asked for ({name}=true), but Accelerate trains with the engine {engine} and would not "
                "say so: it uses FSDP on accelerators only, and needs a launcher that starts ranks. On CPU choose DDP "
                f"or DeepSpeed, or unset {name}."
            )
    here, asked = accelerator.num_processes, int(os.environ.get("WORLD_SIZE", "1"))
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ and "RANK" not in os.environ
    if asked > here:
        raise ValueError(
            f"{asked} ranks run (WORLD_SIZE), but Accelerate counts {here}: every rank would see all the data. With "
            'DeepSpeed on CPU pass kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")] to Accelerator; with '
            'Trainer make PartialState(backend="gloo") and pass accelerator_config={"use_configured_state": True}. '
            "Elsewhere make no Accelerator before the process group."
        )
    if here == 1 and launched:
        raise ValueError(
            "accelerate launch was asked for several processes and started one (on CPU it does not start ranks with "
            "--cpu or MULTI_CPU). Use ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N, or "
            "ACCELERATE_USE_CPU=true torchrun --nproc_per_node N. If one was asked for, unset MASTER_ADDR."
        )
    if callable(hook := getattr(accelerator.ddp_handler, "comm_hook", None)):
        raise ValueError(
            f"Accelerate ignores comm_hook={hook!r} in silence. Give DistributedDataParallelKwargs a member of "
            "DDPCommunicationHookType, or do accelerator.prepare and register_comm_hook yourself."
        )


def attach(accelerator: Accelerator, model: nn.Module, optimizer: DistAdamW) -> None:
    """Have gradients reduced to their owners, where nothing needs them whole. Collective.

    A GradScaler looks at whole gradients on every rank, and DDP takes one communication hook.
    """
    chosen = getattr(accelerator.ddp_handler, "comm_hook", None)
    hooked = chosen is not None and chosen.value != "no"
    if not isinstance(model, DistributedDataParallel) or accelerator.scaler is not None or hooked:
        return
    if optimizer.process_group is not None and not optimizer.shares_with(model.process_group):
        return  # state is shared among some of the ranks; DDP averages over all
    optimizer.attach(model)
    clip_norm, clip_value = accelerator.clip_grad_norm_, accelerator.clip_grad_value_

    def clip_grad_norm_(parameters: Tensor | Iterable[Tensor], max_norm: float, norm_type: float = 2) -> Tensor | None:
        params = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        ours = {id(param) for group in optimizer.param_groups for param in group["params"]}
        if accelerator.sync_gradients and any(id(param) in ours for param in params):
            return optimizer.clip_grad_norm_(max_norm, norm_type, params)
        return clip_norm(params, max_norm, norm_type)  # type: ignore[no-any-return]

    def clip_grad_value_(parameters: Tensor | Iterable[Tensor], clip: float) -> None:
        clip_value(parameters, clip)
        optimizer.accept_gradients()

    accelerator.clip_grad_norm_ = clip_grad_norm_
    accelerator.clip_grad_value_ = clip_grad_value_


def _keep_state(
    accelerator: Accelerator,
    prepared: tuple[nn.Module, Optimizer, Any],
    scheduler: CyclicLRWithRestarts,
    place: Position,
    watch: ReplicaWatch | None,
    group: dist.ProcessGroup | None,
) -> None:
    """Have ``save_state`` and ``load_state`` keep model, optimizer and schedule our way, and the rest Accelerate's.

    Accelerate's own files of those three are pickles of one engine and number of ranks. What it keeps beside them
    (custom objects, a scaler, random state for older readers) stays.
    """
    model, wrapped, _ = prepared
    save_rest, load_rest = accelerator.save_state, accelerator.load_state
    loaded_at: int | None = None  # the clock at the last load
    lists = (accelerator._models, accelerator._optimizers, accelerator._schedulers)

    def name() -> str | None:
        # Accelerate forgets its objects in free_memory(), but not its methods; and it may have several models.
        number = next((i for i, known in enumerate(accelerator._optimizers) if known is wrapped), None)
        return None if number is None else FOLDER if number == 0 else f"{FOLDER}_{number}"

    @contextlib.contextmanager
    def without_ours() -> Iterator[None]:
        before = [list(known) for known in lists]
        hooks = (accelerator._save_model_state_pre_hook, accelerator._load_model_state_pre_hook)
        kept = [dict(of) for of in hooks]
        models = before[0]
        for of in hooks:  # hooks see every model; those that write adapters take one for each
            for key, hook in of.items():
                of[key] = partial(_with_all_models, hook, models)
        for known, ours in zip(lists, prepared, strict=True):
            known[:] = [one for one in known if one is not ours and not (one is bare(model) and ours is model)]
        try:
            yield
        finally:
            for known, all_of_them in zip(lists, before, strict=True):
                known[:] = all_of_them
            for of, all_of_these in zip(hooks, kept, strict=True):
                of.clear()
                of.update(all_of_these)

    def save_state(output_dir: str | None = None, *args: Any, **kwargs: Any) -> Any:
        if (folder := name()) is None:
            return save_rest(output_dir, *args, **kwargs)
        if watch is not None:
            watch.before_save()
        output_dir = None if output_dir is None else str(Path(output_dir).expanduser())
        config = accelerator.project_configuration
        limit, config.total_limit = config.total_limit, None  # Accelerate would delete the oldest before it writes
        try:
            with without_ours():
                where = everywhere(lambda: Path(save_rest(output_dir, *args, **kwargs)), group)
        finally:
            config.total_limit = limit
        # Accelerate's count of micro-batches is of use only where updates cross epoch ends.
        across = not accelerator.gradient_state.sync_with_dataloader
        pending = 0 if accelerator.sync_gradients else accelerator.step % accelerator.gradient_accumulation_steps
        size = place.facts.pass_samples
        main = accelerator.is_main_process
        everywhere(lambda: _remove_older_objects(accelerator, where) if main else None, group)
        files = everywhere(lambda: _files_of(where) if main else {}, group)
        count = (accelerator.step - pending) * size if across else 0
        # A job that goes on without rest_of_epoch knows itself where it is.
        left = place.idle and loaded_at not in (None, scheduler.samples)
        position = everywhere(lambda: None if left else place.state_dict(pending), group)
        extra = {"position": position, "step": count, "files": files}
        # Last: when it is whole, all of it is there.
        save(where / folder, model, wrapped, scheduler, extra=extra, compare_ranks=False, group=group)
        if config.automatic_checkpoint_naming and limit is not None and accelerator.is_main_process:
            others = [path for path in _numbered(where.parent) if path != where]
            for old in others[: max(0, len(others) + 1 - max(limit, 1))]:
                shutil.rmtree(old, ignore_errors=True)
        return where

    def load_state(input_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        nonlocal loaded_at
        folder = name()
        where = _newest_of(accelerator) if input_dir is None else Path(input_dir).expanduser()
        if folder is None or not any(collectives.all_gather_objects(os.path.exists(where / folder), group)):
            load_rest(input_dir, *args, **kwargs)
            return
        if watch is not None:
            watch.settle()
        check_alike(where / folder, group)
        everywhere(lambda: _check_custom_objects(accelerator, where), group)
        everywhere(lambda: _check_extra(where, folder, place), group)
        loaded = load(where / folder, model, wrapped, scheduler, random_state=False, group=group)
        with without_ours():
            everywhere(lambda: load_rest(str(where), *args, **kwargs), group)
        everywhere(lambda: restore_random_state(read_index(loaded.path)), group)  # Accelerate's has that of some ranks
        everywhere(lambda: place.load_state_dict(loaded.extra.get("position")), group)
        loaded_at = scheduler.samples
        if engine_of(accelerator) == "DEEPSPEED":
            accept_counts(model, loaded)
        accelerator.step = loaded.extra.get("step", 0) // place.facts.pass_samples
        if where in (numbered := _numbered(where.parent)) and where.parent == _automatic(accelerator):
            # The next is to be the newest, also for Accelerate.
            accelerator.project_configuration.iteration = _number(numbered[-1]) + 1

    accelerator.save_state, accelerator.load_state = save_state, load_state


def _with_all_models(hook: Any, models: list[nn.Module], _: Any, *rest: Any) -> None:
    """Call a hook of ``save_state`` (models, weights, folder) or ``load_state`` (models, folder)."""
    told = [[None] * len(models)] if len(rest) == 2 else []
    hook(list(models), *told, rest[-1])


def _check_custom_objects(accelerator: Accelerator, folder: Path) -> None:
    """What Accelerate would find out when all else has been loaded. Local."""
    found = len([*folder.glob("custom_checkpoint_*.pkl")])
    if found != len(accelerator._custom_objects):
        raise CheckpointError(
            f"{folder} has the state of {found} custom objects, and {len(accelerator._custom_objects)} are registered. "
            "Register the same ones (register_for_checkpointing)."
        )


def _remove_older_objects(accelerator: Accelerator, where: Path) -> None:
    """Remove what an earlier save to this folder wrote of more custom objects than there are. Local."""
    custom = {f"custom_checkpoint_{i}.pkl" for i in range(len(accelerator._custom_objects))}
    for path in where.glob("custom_checkpoint_*.pkl"):
        if path.name not in custom:
            path.unlink()


def _files_of(where: Path) -> dict[str, Any]:
    """Size and checksum of what Accelerate has written beside ours. Local."""
    return {path.name: fingerprint(path) for pattern in _THEIRS for path in where.glob(pattern) if path.is_file()}


def _check_extra(where: Path, folder: str, place: Position) -> None:
    """Raise where what `save_state` said beside the tensors cannot be gone on with. Local.

    Files of another save than ours are what a kill between the two leaves.
    """
    extra = read_index(where / folder).about.get("extra", {})
    files = extra.get("files", {}) if isinstance(extra, dict) else None
    if not isinstance(files, dict) or not isinstance(extra.get("step", 0), int):
        raise CheckpointError(f"{where / folder} is damaged: what save_state adds is {str(extra)[:200]}.")
    for name, facts in files.items():
        path = where / name
        if not path.resolve().is_relative_to(where.resolve()) or not path.is_file() or fingerprint(path) != facts:
            raise CheckpointError(
                f"{where} is not of one save: {name} is not what was saved with {folder}. Load an older checkpoint."
            )
    place.check(extra.get("position"))


def _newest_of(accelerator: Accelerator) -> Path:
    """What ``load_state()`` takes under automatic checkpoint naming: the newest that was written to the end."""
    numbered = _numbered(folder := _automatic(accelerator))
    if not accelerator.project_configuration.automatic_checkpoint_naming or not numbered:
        raise ValueError(f"no checkpoint was named, and {folder} has none. Pass load_state(<folder>).")
    whole = [path for path in numbered if any(path.glob(f"{FOLDER}*/{INDEX}"))] or numbered
    if whole[-1] != numbered[-1]:
        warnings.warn(f"{numbered[-1]} was not written to the end: {whole[-1]} is loaded.", stacklevel=3)
    return whole[-1]


def _automatic(accelerator: Accelerator) -> Path:
    """Where Accelerate keeps the checkpoints that it names."""
    return Path(accelerator.project_dir or ".") / "checkpoints"


def _number(path: Path) -> int:
    return int(path.name.removeprefix("checkpoint_"))


def _numbered(folder: Path) -> list[Path]:
    """Checkpoints that Accelerate has named, oldest first."""
    found = [path for path in folder.glob("checkpoint_*") if path.name.removeprefix("checkpoint_").isdecimal()]
    return sorted(found, key=_number)
