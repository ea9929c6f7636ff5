"""The ``dist-adamw`` command: preview a recipe, find lr for it; inspect and convert checkpoints; compare run logs."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch

from dist_adamw.checkpoint.formats.content import Kind
from dist_adamw.checkpoint.formats.describe import describe
from dist_adamw.checkpoint.formats.exporting import export_checkpoint
from dist_adamw.checkpoint.formats.importing import import_checkpoint
from dist_adamw.errors import CheckpointError
from dist_adamw.optimizer.adamw import DistAdamW
from dist_adamw.run_log.comparison import compare_runs
from dist_adamw.schedule.batch import GlobalBatch
from dist_adamw.schedule.scheduler import CyclicLRWithRestarts


def preview(
    batch_size: int | dict[int | str, int],
    epoch_size: int,
    restart_period: float | str = 100.0,
    t_mult: float = 2.0,
    lr: float = 1e-3,
    min_lr: float = 1e-7,
    weight_decay: float = 1e-2,
    policy: str = "cosine",
    gamma: float = 1.0,
    triangular_step: float = 0.5,
    warmup_samples: int | str = 0,
    decay_length: int | str | None = None,
    decay_shape: Literal["linear", "one_minus_sqrt", "cosine"] = "linear",
    rewarmup: int | str | None = None,
    peak_factor: float | list[float] = 1.0,
    cycle_ends: list[int | str] | None = None,
    weight_decay_norm: Literal["paper", "first_cycle"] = "paper",
    weight_decay_timescale: int | str | None = None,
    tokens_per_sample: int | None = None,
    cycles: int | None = None,
    total_samples: int | str | None = None,
    fit: Literal["last", "scale"] | None = None,
    plot: str | None = None,
) -> None:
    """Print a recipe's table of restarts, and draw its curves.

    Lengths may have a unit: "2.5 epochs", "10_000 samples", "500 updates", "1e9 tokens", or "10%" of a cycle.

    Args:
        batch_size: Global batch, in samples; or a schedule: "{0: 256, 2 epochs: 512}".
        epoch_size: Samples in an epoch.
        restart_period: Length of the first cycle in epochs; may be a fraction.
        t_mult: Factor from the length of one cycle to the next.
        lr: Learning rate at the peak of the first cycle.
        min_lr: Learning rate at the end of a cycle.
        weight_decay: AdamWR's normalised lambda, or torch's weight decay with weight_decay_norm first_cycle.
        policy: cosine, arccosine, triangular, triangular2, exp_range, linear, one_minus_sqrt or wsd.
        gamma: Base of exp_range's amplitude.
        triangular_step: Position of the triangular policies' peak in a cycle, from 0 to 1.
        warmup_samples: Samples over which lr rises at the start.
        decay_length: For wsd, the samples at a cycle's end over which lr falls; default 10% of the cycle.
        decay_shape: For wsd, the shape of that fall.
        rewarmup: Samples over which lr rises after each restart.
        peak_factor: Factor on the peak at every restart, or a list with one for each cycle.
        cycle_ends: Ends of the cycles, in samples, in place of restart_period and t_mult: "[1 epoch, 3 epochs]".
        weight_decay_norm: first_cycle keeps torch's weight decay in the first cycle.
        weight_decay_timescale: Samples over which updates are averaged, in place of weight_decay; also "1 cycle".
        tokens_per_sample: For lengths in tokens.
        cycles: Number of cycles to show; default 4, or those of total_samples.
        total_samples: Samples of the whole training, to see where in its cycle it ends; with fit, a cycle ends there.
        fit: Make a cycle end with total_samples: cut or extend the last one, or scale all of them.
        plot: PNG file to draw lr and the decay of one update into.
    """
    if fit is not None and total_samples is None:
        raise ValueError(f"--fit {fit} needs --total_samples, where the last cycle is to end.")
    optimizer = DistAdamW([torch.zeros(1)], lr=lr, weight_decay=weight_decay)
    scheduler = CyclicLRWithRestarts(
        optimizer,
        batch_size,
        epoch_size,
        restart_period,
        t_mult,
        min_lr=min_lr,
        policy=policy,
        gamma=gamma,
        triangular_step=triangular_step,
        warmup_samples=warmup_samples,
        decay_length=decay_length,
        decay_shape=decay_shape,
        rewarmup=rewarmup,
        peak_factor=peak_factor,
        cycle_ends=cycle_ends,
        total_samples=None if fit is None else total_samples,
        fit=fit or "last",
        weight_decay_norm=weight_decay_norm,
        weight_decay_timescale=weight_decay_timescale,
        tokens_per_sample=tokens_per_sample,
    )
    shown = scheduler.preview(cycles=cycles, total_samples=total_samples)
    print(shown)
    if plot is not None:
        print(f"drawn in {shown.plot(plot)}")


def batch(size: int, micro_batch_size: int, data_parallel_size: int = 1) -> None:
    """Find the gradient accumulation for a global batch.

    Args:
        size: Global batch, in samples.
        micro_batch_size: Samples of one rank in one forward pass.
        data_parallel_size: Number of ranks that see different samples.
    """
    found = GlobalBatch.solve(size=size, micro_batch_size=micro_batch_size, data_parallel_size=data_parallel_size)
    print(
        f"{found.size} samples = {found.micro_batch_size} x {found.gradient_accumulation_steps} accumulation steps "
        f"x {found.data_parallel_size} ranks"
    )


def inspect(path: str) -> None:
    """Describe a checkpoint, and check that it is whole.

    Args:
        path: Its folder.
    """
    text, is_whole = describe(path)
    print(text)
    if not is_whole:
        raise CheckpointError(f"{path} is not whole.")


def import_(
    source: str,
    path: str,
    kind: Kind | Literal["auto"] = "auto",
    optimizer: str | None = None,
    names: list[str] | None = None,
    without: list[str] | None = None,
) -> None:
    """Convert a torch, FSDP2, DeepSpeed or safetensors checkpoint. No code in it is executed.

    Args:
        source: The file or folder.
        path: The folder to write the checkpoint to.
        kind: torch (torch.save, also of ZeroRedundancyOptimizer), dcp (FSDP2), universal (DeepSpeed) or safetensors.
        optimizer: The file with the optimizer's state dict, if that is separate.
        names: Names of the optimizer's parameters in its order, if its groups have none.
        without: Names of weights to leave out, such as the second name of a tied one.
    """
    import_checkpoint(source, path, kind, optimizer=optimizer, names=names, without=without or ())
    inspect(path)


def export(path: str, target: str, kind: Kind | None = None, master: bool = False, average: str | None = None) -> None:
    """Write a checkpoint for torch, FSDP2, DeepSpeed or as safetensors.

    Args:
        path: The checkpoint's folder.
        target: The file or folder to write.
        kind: torch (torch.save), dcp (FSDP2), universal (DeepSpeed) or safetensors (weights alone).
        master: Write the fp32 weights if the model's have less precision.
        average: Write this average of the weights in their place, as safetensors.
    """
    if kind is None:
        raise ValueError("name the kind of file to write: --kind torch, dcp, universal or safetensors.")
    export_checkpoint(path, target, kind, master=master, average=average)
    print(f"written to {target}")


def diff(run_a: str, run_b: str) -> int:
    """Name the first update, and the first parameter or micro-batch, at which two runs differ; exit status 1 then.

    Args:
        run_a: The folder that was given to dist_adamw.RunLog.
        run_b: That of the other run. The same folder: compare updates before a resume with those after it.
    """
    text, is_equal = compare_runs(run_a, run_b)
    print(text)
    return 0 if is_equal else 1


def lr_range(
    script: str,
    args: list[str] | None = None,
    lowest: float = 1e-6,
    highest: float = 1.0,
    updates: int = 100,
    divergence: float = 4.0,
    out: str = "lr_range.png",
    ranks: int | None = None,
) -> Callable[[], int]:
    """Find the learning rates that a script trains with: run it while lr rises, until its loss diverges.

    The script is unmodified, and uses dist_adamw.prepare and accelerator.backward. It ends when the loss diverges or
    all updates were made. Its checkpoints are neither written nor deleted; pass it another output folder if it writes
    other files. Everything after SCRIPT is passed to it. Without ranks it runs in this process, so a launcher can start
    the command: accelerate launch -m dist_adamw.cli lr-range SCRIPT.

    Args:
        script: The Python file.
        args: Its arguments: those after SCRIPT.
        lowest: lr of the first update, in the group with the largest lr; others keep their ratio to it.
        highest: lr of the last update.
        updates: Updates from the one to the other.
        divergence: End when the smoothed loss exceeds its smallest value by this factor.
        out: PNG file to draw the curve into.
        ranks: Processes to start on this machine.
    """
    from dist_adamw.range_test.script import ScriptRange, run_on_ranks, run_script

    options = ScriptRange(lowest, highest, updates, divergence, out)
    if not Path(script).is_file():
        raise ValueError(f"{script}: there is no such script.")
    if ranks is None:
        return lambda: run_script(script, args or [], options)
    if ranks < 1:
        raise ValueError(f"--ranks must be at least 1, got {ranks}.")
    if "RANK" in os.environ:
        raise ValueError(
            f"--ranks {ranks}: a launcher has already started this process as one of several. Leave it out."
        )
    numbers = {"lowest": lowest, "highest": highest, "updates": updates, "divergence": divergence, "out": out}
    command = ["lr-range", *(f"--{name}={value}" for name, value in numbers.items()), script, *(args or [])]
    return lambda: run_on_ranks(command, ranks)


def _with_script_args(args: list[str]) -> list[str]:
    """Make everything after SCRIPT the value of one option of ``lr-range``."""
    rest = iter(range(1, len(args)))
    for i in rest:
        if not args[i].startswith("-"):
            return [*args[: i + 1], f"--args={json.dumps(args[i + 1 :])}"]
        if args[i].startswith("--") and "=" not in args[i] and args[i] != "--help":
            next(rest, None)  # its value
    return args


def main(args: list[str] | None = None) -> int:
    """Run the command and return its exit status; print a user's mistake as one sentence, with exit status 2."""
    from jsonargparse import auto_cli

    args = sys.argv[1:] if args is None else args
    # A recipe's many numbers need names; paths are positional.
    of_files = {"inspect": inspect, "import": import_, "export": export, "diff": diff}
    components: dict[str, Any] = {"preview": preview, "batch": batch, "lr-range": lr_range, **of_files}
    if args[:1] == ["lr-range"]:
        args = _with_script_args(args)
    is_positional = bool(args) and (args[0] in of_files or args[0] == "lr-range")
    try:
        status = auto_cli(components, args=args, prog="dist-adamw", as_positional=is_positional)
    except (ValueError, ModuleNotFoundError, OSError, ArithmeticError) as error:
        print(f"dist-adamw: {error}", file=sys.stderr)
        return 2
    # Outside of the `try`: the errors of a script are its own.
    return status() if callable(status) else status or 0


if __name__ == "__main__":
    sys.exit(main())
