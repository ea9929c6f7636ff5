"""Pictures of `recipes`: means over seeds, with bars of one standard error."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from benchmarks import recipes_tables as tables
from benchmarks.recipes import RECIPES, WARMUPS, Scale, ends_of, final
from benchmarks.recipes_tables import Estimate, Rows, Sweep, difference, losses
from benchmarks.records import Record

BLUE, ORANGE, GREEN, RED, PURPLE, GREY = "#0b6e99", "#e0912f", "#1e8449", "#c0392b", "#7d3c98", "#777777"
COLOURS = {"cosine restarts": BLUE, "WSD-S": ORANGE, "one cosine": GREEN, "branches": ORANGE}
LOSS = "held-out loss, nats per byte"
BARS = {"capsize": 3, "elinewidth": 1.0}


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Any, path: Path) -> None:
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _plain_ticks(axis: Any, ticks: Sequence[float]) -> None:
    axis.set_xticks(ticks, [f"{tick:,g}" for tick in ticks])
    axis.set_xticks([], minor=True)


# -------------------------------------------------------------------- weight decay


def draw_decay(path: Path, sweeps: Sequence[Sweep], scale: Scale) -> None:
    """Draw held-out loss over decay, and the best values of each reading over what varies."""
    axes = tables.by_what_varies([tables.optimum(sweep) for sweep in sweeps])
    figure = _figure(16, 9)
    panels = figure.subplots(2, len(axes), height_ratios=[1.15, 1], sharey="row")
    for column, (what, cases) in enumerate(axes.items()):
        top, bottom = panels[:, column]
        for colour, one in zip((BLUE, GREEN, ORANGE), cases, strict=False):
            _draw_sweep(
                top, one, colour, f"batch {one.batch}" if what == "larger batch" else f"{one.samples:,} samples"
            )
        top.set_xscale("log")
        top.set_xlabel("torch's weight decay")
        first = cases[0]
        same = {
            "more epochs": f"batch {first.batch}, {first.epoch_size:,} windows of text",
            "more text": f"batch {first.batch}, {first.epochs:.0f} epochs",
            "larger batch": f"{first.samples:,} samples, lr by the batch's square root",
        }[what]
        top.set_title(f"{what.capitalize()}\n({same})")
        top.legend(loc="upper center", fontsize=9, title="diamond: minimum of the fit; hollow: one seed")
        _draw_readings(bottom, cases, what)
    panels[0, 0].set_ylabel("held-out loss above the best, nats per byte")
    panels[1, 0].set_ylabel("best value, over that of the first point")
    panels[0, 0].set_ylim(-0.02, 0.75)
    low, high = panels[1, 0].get_ylim()
    ticks = [tick for tick in (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100) if low <= tick <= high]
    panels[1, 0].set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    panels[1, 0].set_yticks([], minor=True)
    panels[1, 0].set_ylim(low, high * (high / low) ** 0.5)
    figure.suptitle("Which reading of the best weight decay stays put? (Bottom: a flat line does)")
    _save(figure, path)


def _draw_sweep(axis: Any, one: tables.Optimum, colour: str, label: str) -> None:
    sweep = one.sweep
    a, b, c = one.curve
    lowest = c - b * b / (4 * a)
    # Seeds differ more than decays do: from each its mean over the fitted decays is taken away.
    centre = [mean(final(sweep[decay][seed]) for decay in one.fitted) for seed in range(len(one.by_seed))]
    level = mean(centre) - lowest
    heights = {
        decay: Estimate.of([final(row) - centre[seed] + level for seed, row in enumerate(rows)])
        for decay, rows in sorted(sweep.items())
    }
    axis.plot(heights.keys(), [one.value for one in heights.values()], color=colour, linewidth=0.8, alpha=0.5)
    for seeds, style in ((len(centre), {"label": label}), (1, {"markerfacecolor": "white"})):
        decays = [decay for decay in heights if len(sweep[decay]) == seeds]
        _points(axis, decays, [heights[decay] for decay in decays], colour, fmt="o", **style)
    x = np.geomspace(one.fitted[0], one.fitted[-1], 50)
    axis.plot(x, a * np.log(x) ** 2 + b * np.log(x) + c - lowest, color=colour, linewidth=2.0)
    axis.plot([one.decay], [0], marker="D", markersize=9, color=colour, markeredgecolor="black", zorder=5)


def _draw_readings(axis: Any, cases: Sequence[tables.Optimum], what: str) -> None:
    """Draw the best value of each reading over that of the first case, so that what stays put is a flat line."""
    positions = [one.batch if what == "larger batch" else one.samples for one in cases]
    styles = dict(zip(tables.READINGS, ((BLUE, "o"), (ORANGE, "s"), (GREEN, "^"), (PURPLE, "v")), strict=True))
    for shift, (reading, (colour, marker)) in enumerate(styles.items()):
        values = np.array([one.readings(one.decay)[reading] for one in cases])
        errors = np.array([tables.factor_error(one.by_seed) for one in cases])
        ratios = values / values[0]
        bars = [ratios - ratios / errors, ratios * errors - ratios]
        moved = [position * 1.025 ** (shift - 1.5) for position in positions]  # so that no bar hides another
        label = f"{reading}: {values.min():.2g} to {values.max():.2g}"
        axis.errorbar(moved, ratios, bars, marker=marker, color=colour, label=label, **BARS)
    axis.axhline(1.0, color=GREY, linewidth=0.9, linestyle="--")
    axis.set_xscale("log")
    axis.set_yscale("log")
    _plain_ticks(axis, positions)
    axis.set_xlabel("batch, samples of one update" if what == "larger batch" else "samples of the run")
    axis.legend(loc="upper left", fontsize=9, title="reading: its best values")


# -------------------------------------------------------------------- held-out losses


def _curve(axis: Any, rows: Sequence[Record], colour: str, label: str, **style: Any) -> None:
    """Draw the last weights' loss at all marks."""
    marks = rows[0]["settings"]["marks"]
    means = [mean(losses(rows, samples)) for samples in marks]
    axis.plot(marks, means, color=colour, marker=".", linewidth=1.3, label=label, **style)


def _points(axis: Any, places: Sequence[float], values: Sequence[Estimate], colour: str, **style: Any) -> None:
    errors = [value.error for value in values]
    axis.errorbar(places, [value.value for value in values], errors, color=colour, **{**BARS, **style})


def _lr(axis: Any, row: Record, colour: str, label: str, until: float = math.inf) -> None:
    x, y = zip(*[point for point in row["lr_curve"] if point[0] <= until], strict=True)
    axis.plot(x, y, color=colour, linewidth=1.4, label=label)


def _samples_axis(axis: Any, scale: Scale) -> None:
    axis.set_xlim(0, scale.total * 1.02)
    axis.set_xticks(scale.ends, [f"{end:,}" for end in scale.ends])


def draw_anytime(path: Path, rows: Rows, scale: Scale) -> None:
    """Draw lr, held-out loss, and its difference from a run that was planned for each end, with both warm-ups."""
    figure = _figure(15, 11)
    panels = figure.subplots(3, len(WARMUPS), height_ratios=[1, 2.2, 2], sharey="row")
    for column, warmup in enumerate(WARMUPS):
        lr, loss, gap = panels[:, column]
        ends = ends_of(scale, warmup)
        best = {end: tables.planned(rows, end, warmup) for end in ends}
        for name in RECIPES:
            found = rows[name + warmup]
            _lr(lr, found[0], COLOURS[name], f"{name}, peak {tables.peak(found)}")
            _curve(loss, found, COLOURS[name], name)
        stars = [Estimate.of(losses(found, end)) for end, found in best.items()]
        label = "a cosine planned for that end, tuned"
        _points(loss, ends, stars, "black", fmt="*", markersize=13, label=label, zorder=5)
        gaps = {
            name: [difference(losses(rows[name + warmup], end), losses(best[end], end)) for end in ends]
            for name in RECIPES
        }
        _bars(gap, gaps, 0.25)
        gap.set_xticks(range(len(ends)), [f"after {end:,} samples" for end in ends])
        for axis in (lr, loss):
            _samples_axis(axis, scale)
            for end in ends:
                axis.axvline(end, color=GREY, linewidth=0.8, linestyle=":")
        loss.set_xlabel("samples (dotted: ends of cycles)")
        lr.legend(loc="upper center", bbox_to_anchor=(0.5, 1.32), ncols=3, fontsize=9, title=tables.described(warmup))
        loss.legend(loc="upper right", fontsize=9, framealpha=1.0)
        gap.legend(loc="lower right", fontsize=9)
    panels[0, 0].set_ylabel("lr")
    panels[1, 0].set_ylabel(LOSS)
    panels[2, 0].set_ylabel("loss minus that of a cosine planned\nfor that end (below 0 is better)")
    figure.suptitle(f"Held-out loss at any time: {_seeds(rows['WSD-S'])}")
    _save(figure, path)


def _bars(axis: Any, gaps: Mapping[str, Sequence[Estimate]], width: float) -> None:
    """Draw bars in groups, each with its value."""
    for i, (name, values) in enumerate(gaps.items()):
        places = [n + (i - (len(gaps) - 1) / 2) * width for n in range(len(values))]
        axis.bar(places, [one.value for one in values], width * 0.9, color=COLOURS[name], label=name)
        _points(axis, places, values, "black", fmt="none")
        for place, one in zip(places, values, strict=True):
            sign = -1 if one.value < 0 else 1
            axis.annotate(
                f"{one.value:+.3f}",
                (place, one.value + sign * one.error),
                xytext=(0, 3 * sign),
                textcoords="offset points",
                ha="center",
                va="top" if sign < 0 else "bottom",
                fontsize=9,
            )
    axis.axhline(0, color="black", linewidth=0.8)
    axis.margins(y=0.12)


def _seeds(rows: Sequence[Record]) -> str:
    return f"mean of {len(rows)} seeds, bars: one standard error"


def draw_branches(path: Path, rows: Rows, scale: Scale) -> None:
    """Draw trunks with their branches next to dedicated cosines, and the differences, with both warm-ups."""
    figure = _figure(13, 9)
    panels = figure.subplots(2, len(WARMUPS), height_ratios=[2, 1], sharey="row")
    for column, warmup in enumerate(WARMUPS):
        loss, gap = panels[:, column]
        ends = ends_of(scale, warmup)
        trunk = rows[f"trunk{warmup}"]
        _curve(loss, trunk, PURPLE, f"trunk, constant lr {tables.peak(trunk)}")
        ours = {end: tables.branch_losses(trunk, end) for end in ends}
        theirs = {end: losses(tables.planned(rows, end, warmup), end) for end in ends}
        for i, (at, end) in enumerate(trunk[0]["settings"]["branches"]):
            line = [mean(losses(trunk, at)), mean(ours[end])]
            loss.plot([at, end], line, color=ORANGE, linewidth=1.6, label=None if i else "cool-down branches")
        _points(loss, ends, [Estimate.of(values) for values in ours.values()], ORANGE, fmt="o", markersize=7)
        best = [Estimate.of(values) for values in theirs.values()]
        style = {"fmt": "*", "markersize": 15, "markerfacecolor": "none", "zorder": 5}
        _points(loss, ends, best, "black", label="dedicated cosines, each tuned", **style)
        _samples_axis(loss, scale)
        loss.set_xlabel("samples")
        cost = f"{trunk[0]['trained_samples']:,} samples in all, dedicated runs {sum(ends):,}"
        loss.set_title(f"{tables.described(warmup).capitalize()}\ntrunk and branches train {cost}", fontsize=10)
        loss.legend(loc="upper right")
        _bars(gap, {"branches": [difference(ours[end], theirs[end]) for end in ends]}, 0.6)
        gap.set_xticks(range(len(ends)), [f"{end:,} samples" for end in ends])
    panels[0, 0].set_ylabel(LOSS)
    panels[1, 0].set_ylabel("branch minus dedicated run\n(below 0 is better)")
    figure.suptitle(f"One trunk with cool-down branches, or a run for each end: {_seeds(rows['trunk'])}")
    _save(figure, path)


def draw_snapshots(path: Path, rows: Rows, scale: Scale) -> None:
    """Draw what averages of weights and of probabilities change, at the end of restarts and along the trunk."""
    figure = _figure(13, 9.5)
    panels = figure.subplots(2, 2).flat
    for axis, (name, found) in zip(panels, rows.items(), strict=True):
        if name == "trunk":
            _draw_trunk_averages(axis, found, scale)
        else:
            _draw_snapshots_of(axis, name, found)
    figure.suptitle(f"Averages next to the last weights (below 0 is better): {_seeds(rows['trunk'])}")
    _save(figure, path)


def _draw_snapshots_of(axis: Any, name: str, found: Sequence[Record]) -> None:
    ends = found[0]["settings"]["ends"]
    last = losses(found, ends[-1])
    means = {"mean": (BLUE, "mean of the weights"), "ensemble": (ORANGE, "mean of the probabilities")}
    for kind, (colour, label) in means.items():
        whats = [what for what in tables.kinds(found, ends[-1]) if what.startswith(kind)]
        counts = [int(what.split()[-1]) for what in whats]
        values = [difference(losses(found, ends[-1], what), last) for what in whats]
        _points(axis, counts, values, colour, marker="o", label=f"snapshots: {label}")
    for what, colour, place in zip(_moving(found, ends[-1]), (GREEN, PURPLE), (0.9, 1.1), strict=True):
        _points(axis, [place], [difference(losses(found, ends[-1], what), last)], colour, fmt="s", label=what)
    axis.axhline(0, color="black", linewidth=0.9, linestyle="--")
    axis.set_xticks(range(1, len(ends) + 1), ["last\nweights", *(f"last {n}" for n in range(2, len(ends) + 1))])
    thousands = ", ".join(f"{end / 1000:.1f}" for end in ends)
    epochs = ends[-1] / found[0]["epoch_size"]
    axis.set_title(
        f"{name.partition(',')[0]}, {epochs:.1f} epochs: cycles end at\n{thousands} thousand samples", fontsize=10
    )
    axis.set_ylabel("held-out loss minus that of\nthe last weights, nats per byte")
    low, high = axis.get_ylim()
    axis.set_ylim(low, high + 0.35 * (high - low))
    axis.legend(loc="upper left", fontsize=9)


def _moving(rows: Sequence[Record], samples: int) -> list[str]:
    return [what for what in tables.kinds(rows, samples) if what.startswith("EMA")]


def _draw_trunk_averages(axis: Any, trunk: Sequence[Record], scale: Scale) -> None:
    ends = [end for end in scale.ends if end in trunk[0]["settings"]["marks"]]
    last = {end: losses(trunk, end) for end in ends}
    for colour, what in zip((GREEN, PURPLE), _moving(trunk, ends[0]), strict=True):
        values = [difference(losses(trunk, end, what), last[end]) for end in ends]
        _points(axis, ends, values, colour, marker="s", label=what)
    values = [difference(tables.branch_losses(trunk, end), last[end]) for end in ends]
    _points(axis, ends, values, ORANGE, marker="o", label="cool-down branch to the same sample")
    axis.axhline(0, color="black", linewidth=0.9, linestyle="--")
    axis.set_xscale("log")
    _plain_ticks(axis, ends)
    axis.set_yscale("symlog", linthresh=0.1)  # long averages still have the initial weights at the first ends
    low, high = axis.get_ylim()
    ticks = [tick for tick in (-1, -0.3, -0.1, -0.05, 0, 0.05, 0.1, 0.3, 1) if low <= tick <= high]
    axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.set_yticks([], minor=True)
    axis.set_xlabel("samples (vertical axis: logarithmic beyond 0.1)")
    axis.set_title(f"a trunk at constant lr {tables.peak(trunk)}", fontsize=10)
    axis.set_ylabel("held-out loss minus that of\nthe last weights, nats per byte")
    axis.legend(loc="upper right", fontsize=9)
