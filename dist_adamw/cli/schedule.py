"""``preview``, ``plot`` and ``batch``: look at a recipe before training."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dist_adamw.cli.answer import Answer, fields_of

if TYPE_CHECKING:
    from dist_adamw.schedule.plot import Curves
    from dist_adamw.schedule.preview import Preview


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleOptions:
    """The options of a schedule; those that are not given are a recipe file's, or the defaults.

    Lengths may have a unit: "2.5 epochs", "10_000 samples", "500 updates", "1e9 tokens", or "10%" of a cycle.

    Args:
        batch_size: Global batch, in samples; or a schedule: "{0: 256, 2 epochs: 512}".
        epoch_size: Samples in an epoch.
        restart_period: Length of the first cycle in epochs; may be a fraction. Default: 100.
        t_mult: Factor from the length of one cycle to the next. Default: 2.
        lr: Learning rate at the peak of the first cycle. Default: 0.001.
        min_lr: Learning rate at the end of a cycle. Default: 1e-7.
        weight_decay: AdamWR's normalised lambda, or torch's weight decay with weight_decay_norm first_cycle. Default:
            0.01.
        policy: cosine (the default), arccosine, triangular, triangular2, exp_range, linear, one_minus_sqrt or wsd.
        gamma: Base of exp_range's amplitude. Default: 1.
        triangular_step: Position of the triangular policies' peak in a cycle, from 0 to 1. Default: 0.5.
        warmup_samples: Samples over which lr rises at the start. Default: 0.
        decay_length: For wsd, the samples at a cycle's end over which lr falls. Default: 10% of the cycle.
        decay_shape: For wsd, the shape of that fall. Default: linear.
        rewarmup: Samples over which lr rises after each restart.
        peak_factor: Factor on the peak at every restart, or a list with one for each cycle. Default: 1.
        cycle_ends: Ends of the cycles, in samples, in place of restart_period and t_mult: "[1 epoch, 3 epochs]".
        weight_decay_norm: first_cycle keeps torch's weight decay in the first cycle. Default: paper.
        weight_decay_timescale: Samples over which updates are averaged, in place of weight_decay; also "1 cycle".
        tokens_per_sample: For lengths in tokens.
        total_samples: Samples of the whole training, to see where in its cycle it ends; with fit, a cycle ends there.
        fit: Make a cycle end with total_samples: cut or extend the last one, or scale all of them.
    """

    batch_size: int | dict[int | str, int] | None = None
    epoch_size: int | None = None
    restart_period: float | str | None = None
    t_mult: float | None = None
    lr: float | None = None
    min_lr: float | None = None
    weight_decay: float | None = None
    policy: str | None = None
    gamma: float | None = None
    triangular_step: float | None = None
    warmup_samples: int | str | None = None
    decay_length: int | str | None = None
    decay_shape: Literal["linear", "one_minus_sqrt", "cosine"] | None = None
    rewarmup: int | str | None = None
    peak_factor: float | list[float] | None = None
    cycle_ends: list[int | str] | None = None
    weight_decay_norm: Literal["paper", "first_cycle"] | None = None
    weight_decay_timescale: int | str | None = None
    tokens_per_sample: int | None = None
    total_samples: int | str | None = None
    fit: Literal["last", "scale"] | None = None

    def given(self) -> dict[str, Any]:
        """Return the options that were given."""
        return {name: value for name, value in fields_of(self).items() if value is not None}


def preview(
    recipe: str | None = None,
    *,
    options: ScheduleOptions,
    cycles: int | None = None,
    plot: str | None = None,
) -> Answer:
    """Print a recipe's table of restarts, and where training ends.

    Without a recipe file, batch_size and epoch_size are needed. With one, options take the place of its values.

    Args:
        recipe: A recipe file.
        options: The schedule.
        cycles: Number of cycles to show; default 4, or those of total_samples.
        plot: PNG, SVG or PDF file to draw lr and weight decay into.
    """
    shown = _preview(recipe, options, cycles)
    data: dict[str, Any] = {
        "warmup_samples": shown.warmup_samples,
        "cycles": [fields_of(row) for row in shown.rows],
        "end": None if shown.end is None else fields_of(shown.end),
    }
    if shown.batches is not None:
        pairs = zip(shown.batches.starts, shown.batches.sizes, strict=True)
        data["global_batches"] = [{"from_sample": start, "samples": size} for start, size in pairs]
    text = str(shown)
    if plot is not None:
        data["plot"] = str(shown.plot(plot))
        text += f"\ndrawn in {data['plot']}"
    return Answer(text, data)


def plot(
    *recipes: str,
    options: ScheduleOptions,
    out: str | None = None,
    axis: Literal["samples", "epochs", "updates"] = "samples",
    cycles: int | None = None,
) -> Answer:
    """Draw lr and weight decay of one recipe, or of several in one picture.

    Weight decay is drawn in the reading of the recipe: see docs/schedule.md. Without recipe files, batch_size and
    epoch_size are needed. With them, options take the place of their values.

    Args:
        recipes: Recipe files.
        options: The schedule.
        out: PNG, SVG or PDF file to draw into; default: the terminal.
        axis: What the lower axis shows. In a file the upper one has epochs.
        cycles: Number of cycles to show; default 4, or those of total_samples.
    """
    from dist_adamw.schedule.plot import check_suffix, overlay

    if out is not None:
        check_suffix(Path(out))
    names = _names(recipes)
    previews = {name: _preview(recipe, options, cycles) for name, recipe in names.items()}
    curves = {name: one.curves(axis) for name, one in previews.items()}
    picture = overlay(curves)
    data: dict[str, Any] = {"axis": axis, "written": None}
    if out is None:
        data["schedules"] = {name or "options": _data_of(one) for name, one in curves.items()}
        width = shutil.get_terminal_size((100, 24)).columns
        return Answer(lambda: picture.as_text(width, has_colors=_has_colors()), data)
    data["written"] = str(picture.save(out))
    data["schedules"] = list(recipes) or ["options"]
    return Answer(f"drawn in {data['written']}", data)


def batch(*, size: int, micro_batch_size: int, data_parallel_size: int = 1) -> Answer:
    """Find the gradient accumulation for a global batch.

    Args:
        size: Global batch, in samples.
        micro_batch_size: Samples of one rank in one forward pass.
        data_parallel_size: Number of ranks that see different samples.
    """
    from dist_adamw.schedule.batch import GlobalBatch

    found = GlobalBatch.solve(size=size, micro_batch_size=micro_batch_size, data_parallel_size=data_parallel_size)
    return Answer(str(found), fields_of(found) | {"size": found.size})


def _preview(recipe: str | None, options: ScheduleOptions, cycles: int | None) -> Preview:
    from dist_adamw.cli.recipe_files import preview_of

    return preview_of(recipe, options.given(), cycles)


def _names(recipes: tuple[str, ...]) -> dict[str, str | None]:
    """Return the paths by what the legend calls them: file names, or paths if two have the same name."""
    if not recipes:
        return {"": None}
    paths = list(dict.fromkeys(recipes))
    names = [Path(path).name for path in paths]
    return dict(zip(names if len(set(names)) == len(names) else paths, paths, strict=True))


def _data_of(curves: Curves) -> dict[str, Any]:
    values = {label.replace("\n", " "): ys for label, ys in curves.values.items()}
    return {"x": curves.x, "epochs": curves.epochs, "restarts": curves.restarts, "values": values}


def _has_colors() -> bool:
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")
