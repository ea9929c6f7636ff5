"""Save Trainer's checkpoints in our format, and resume them on any engine and number of ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from dist_adamw.checkpoint.random_state import restore_random_state
from dist_adamw.checkpoint.save_load import load, save
from dist_adamw.checkpoint.storage.index import read_index, write_text
from dist_adamw.checkpoint.unpickling import nothing_executed
from dist_adamw.integrations.accelerate.data import engine_of
from dist_adamw.integrations.accelerate.prepare import host_group
from dist_adamw.integrations.deepspeed.zero_state import prepare_deepspeed
from dist_adamw.integrations.transformers.arguments import inner_scheduler, replace_method
from dist_adamw.ranks import collectives
from dist_adamw.ranks.run_on_all import run_on_all_ranks
from dist_adamw.schedule.saved import OnDifference


def keep_state(trainer: Any, on_difference: OnDifference | None) -> None:
    """Replace Trainer's files of weights, optimizer and schedule, which load on one engine only, by our format.

    The model file that Trainer also writes, for other tools, stays. Our folder has the name that Trainer looks for
    under DeepSpeed.
    """
    load_weights, load_rest = map(_safely, (trainer._load_from_checkpoint, trainer._load_optimizer_and_scheduler))
    load_best, load_random = map(_safely, (trainer._load_best_model, trainer._load_rng_state))

    def ours(checkpoint: str | None) -> Path | None:
        found = _states_in(Path(checkpoint)) if checkpoint is not None else []
        # DeepSpeed's own folders have these files. Any other folder is ours, perhaps damaged, and must not be skipped.
        mine = found[-1] if found and not any(found[-1].glob("*_model_states.pt")) else None
        of_ranks = collectives.all_gather_objects(mine, host_group(trainer.accelerator))
        return next((path for path in of_ranks if path is not None), None)  # `load` refuses one that some do not see

    def save_state(output_dir: str) -> None:
        folder = Path(output_dir) / f"global_step{trainer.state.global_step}"
        save(
            folder, trainer.model_wrapped, trainer.optimizer, inner_scheduler(trainer), compare_ranks=False
        )  # `_watch_ranks` has compared them
        is_writer = trainer.args.should_save
        run_on_all_ranks(lambda: write_text(Path(output_dir) / "latest", folder.name) if is_writer else None)

    def load_model(checkpoint: str, model: nn.Module | None = None) -> None:
        if ours(checkpoint) is None:
            load_weights(checkpoint, model)

    def load_state(checkpoint: str | None) -> None:
        if (folder := ours(checkpoint)) is None:
            load_rest(checkpoint)
        elif engine_of(trainer.accelerator) != "DEEPSPEED":  # there Trainer calls engine.load_checkpoint, which is ours
            # Trainer restores the random state later, by `load_random_state`.
            load(folder, trainer.model_wrapped, trainer.optimizer, inner_scheduler(trainer), random_state=False)

    def load_best_model() -> None:
        # Trainer's own method differs by engine: it looks for FSDP's files, which are no longer written, and under
        # DeepSpeed it also restores optimizer, schedule and random state.
        if (folder := ours(trainer.state.best_model_checkpoint)) is None:
            load_best()  # saved with save_only_model, or without prepare_trainer
        else:
            load(folder, trainer.model_wrapped, random_state=False)

    def load_random_state(checkpoint: str | None) -> None:
        if (folder := ours(checkpoint)) is None:
            load_random(checkpoint)
        else:  # Trainer's own files are per rank, for the same number of ranks
            run_on_all_ranks(lambda: restore_random_state(read_index(folder)), host_group(trainer.accelerator))

    replace_method(trainer, "_save_optimizer_and_scheduler", save_state)
    replace_method(trainer, "_load_rng_state", load_random_state)
    replace_method(trainer, "_load_best_model", load_best_model)
    replace_method(trainer, "_load_from_checkpoint", load_model)
    replace_method(trainer, "_load_optimizer_and_scheduler", load_state)
    if engine_of(trainer.accelerator) == "DEEPSPEED":
        create = trainer.create_scheduler

        def create_scheduler(*args: Any, **kwargs: Any) -> Any:
            made = create(*args, **kwargs)
            engine = trainer.accelerator.deepspeed_engine_wrapped.engine  # exists now, before anything is loaded
            scheduler = inner_scheduler(trainer)
            if on_difference is not None:
                scheduler.on_difference = on_difference
            prepare_deepspeed(engine, scheduler)
            return made

        replace_method(trainer, "create_scheduler", create_scheduler)


def _safely(load_theirs: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a method by which Trainer reads a folder that is not ours, so that it executes no code in pickles."""
    how = "If you trust the checkpoint, set TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1."

    def load(*args: Any, **kwargs: Any) -> Any:
        with nothing_executed("the checkpoint", how):
            return load_theirs(*args, **kwargs)

    return load


def _states_in(checkpoint: Path) -> list[Path]:
    """Return the folders ``global_step<updates>`` in numerical order: step 10 comes after step 9. Local."""
    found = [path for path in checkpoint.glob("global_step*") if path.name.removeprefix("global_step").isdecimal()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("global_step")))
