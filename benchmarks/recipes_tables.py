"""Tables of `recipes`: optima of weight decay in four readings, and held-out losses, with errors from the seeds."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

import numpy as np

from benchmarks.markdown import table
from benchmarks.recipes import RECIPES, WARMUPS, Scale, ends_of, final
from benchmarks.recipes_training import LAST
from benchmarks.records import Record

Rows = Mapping[str, Sequence[Record]]
Sweep = Mapping[float, Sequence[Record]]  # by torch's weight decay, one row for each seed


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over seeds, and its standard error."""

    value: float
    error: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        return cls(mean(values), stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan)

    def __str__(self) -> str:
        return f"{self.value:.4f} ± {self.error:.4f}"

    def signed(self) -> str:
        """Return a difference with its sign."""
        return f"{self.value:+.4f} ± {self.error:.4f}"


# -------------------------------------------------------------------- weight decay


class NotBracketedError(ValueError):
    """A sweep has no minimum inside."""


@dataclass(frozen=True, slots=True)
class Optimum:
    """The best weight decay of one length and batch, in torch's reading: the vertices of parabolas.

    Attributes:
        samples: Samples of the run.
        batch: Samples of an update.
        lr: The peak.
        cycle: Samples after the warm-up.
        epoch_size: Samples of an epoch.
        decay: Of the mean over seeds.
        by_seed: Of each seed, with the same three decays, and not beyond them.
        curve: The parabola's coefficients over log decay, the highest power first.
        fitted: The decays that it is fitted to.
        sweep: All rows.
    """

    samples: int
    batch: int
    lr: float
    cycle: int
    epoch_size: int
    decay: float
    by_seed: tuple[float, ...]
    curve: tuple[float, float, float]
    fitted: tuple[float, ...]
    sweep: Sweep

    @property
    def epochs(self) -> float:
        """The length of the run."""
        return self.samples / self.epoch_size

    def readings(self, decay: float) -> dict[str, float]:
        """Return torch's ``decay`` of this run in all readings. Source: docs/schedule.md."""
        per_update = decay * self.lr
        timescale = self.batch / per_update
        return {
            TORCH: decay,
            NORMALISED: per_update * math.sqrt(self.cycle / self.batch),
            EPOCHS: timescale / self.epoch_size,
            CYCLE: timescale / self.cycle,
        }


TORCH, NORMALISED = "torch's weight decay", "AdamWR's lambda_norm"
EPOCHS, CYCLE = "time scale, epochs", "time scale, share of the cycle"
READINGS = (TORCH, NORMALISED, EPOCHS, CYCLE)


def optimum(sweep: Sweep) -> Optimum:
    """Fit a parabola in log decay to the best decay and its neighbours; curves are not symmetric further away.

    Raises:
        NotBracketedError: the best decay is the lowest or the highest that was tried.
    """
    seeds = max(map(len, sweep.values()))
    decays = sorted(decay for decay, rows in sweep.items() if len(rows) == seeds)
    means = [mean(map(final, sweep[decay])) for decay in decays]
    best = means.index(min(means))
    if not 0 < best < len(decays) - 1:
        raise NotBracketedError(f"the best decay, {decays[best]:g}, is at the edge of those that were tried: {decays}.")
    fitted = decays[best - 1 : best + 2]
    a, b, c = (float(one) for one in np.polyfit(np.log(fitted), means[best - 1 : best + 2], 2))
    first = sweep[decays[0]][0]
    settings = first["settings"]
    samples = settings["marks"][-1]
    return Optimum(
        samples=samples,
        batch=settings["batch"],
        lr=settings["lr"],
        cycle=samples - settings["schedule"]["warmup_samples"],
        epoch_size=first["epoch_size"],
        decay=math.exp(-b / (2 * a)),
        by_seed=tuple(
            _vertex_of_seed(fitted, [final(sweep[decay][seed]) for decay in fitted]) for seed in range(seeds)
        ),
        curve=(a, b, c),
        fitted=tuple(fitted),
        sweep=sweep,
    )


def _vertex_of_seed(decays: Sequence[float], found: Sequence[float]) -> float:
    """Return where the parabola through the losses ``found`` is lowest, among the decays that it is fitted to."""
    a, b, _ = (float(one) for one in np.polyfit(np.log(decays), found, 2))
    if a <= 0:
        return decays[0] if found[0] < found[-1] else decays[-1]
    return min(max(math.exp(-b / (2 * a)), decays[0]), decays[-1])


def factor_error(values: Sequence[float]) -> float:
    """Return the factor by which the geometric mean of ``values`` is uncertain: one standard error of their logs."""
    return math.exp(Estimate.of([math.log(value) for value in values]).error)


def movement(optima: Sequence[Optimum], reading: str) -> tuple[float, float]:
    """Return the ratio of the largest to the smallest best value, and the factor by which it is uncertain."""
    values = [one.readings(one.decay)[reading] for one in optima]
    low, high = optima[values.index(min(values))], optima[values.index(max(values))]
    pairs = zip(high.by_seed, low.by_seed, strict=True)
    ratios = [high.readings(a)[reading] / low.readings(b)[reading] for a, b in pairs]
    return max(values) / min(values), factor_error(ratios)


def by_what_varies(optima: Sequence[Optimum]) -> dict[str, list[Optimum]]:
    """Return the cases that differ from the first one in one respect, with it, in order."""
    first = optima[0]
    return {
        "more epochs": sorted(
            (one for one in optima if (one.batch, one.epoch_size) == (first.batch, first.epoch_size)),
            key=lambda one: one.samples,
        ),
        "more text": sorted(
            (one for one in optima if (one.batch, round(one.epochs)) == (first.batch, round(first.epochs))),
            key=lambda one: one.samples,
        ),
        "larger batch": sorted(
            (one for one in optima if (one.samples, one.epoch_size) == (first.samples, first.epoch_size)),
            key=lambda one: one.batch,
        ),
    }


def decay_table(sweeps: Sequence[Sweep]) -> Iterator[str]:
    """Return the best decay of each case in all readings, and by how much each reading moves."""
    optima = [optimum(sweep) for sweep in sweeps]
    rows = []
    for one in optima:
        error = factor_error(one.by_seed)
        values = one.readings(one.decay)
        head = f"{one.samples:,} samples, {one.epochs:.0f} epochs, batch {one.batch}"
        rows.append([head, *(f"{values[reading]:.3g}" for reading in READINGS), f"{error:.2f}"])
    yield from table(["best value", *READINGS, "uncertain by a factor of"], rows)
    yield ""
    rows = []
    for what, cases in by_what_varies(optima).items():
        span = cases[-1].batch / cases[0].batch if what == "larger batch" else cases[-1].samples / cases[0].samples
        cells = ["{:.1f} (x/÷ {:.2f})".format(*movement(cases, reading)) for reading in READINGS]
        rows.append([f"{what}, {span:g} times", *cells])
    yield from table(["largest / smallest best value", *READINGS], rows)


# -------------------------------------------------------------------- held-out losses


def losses(rows: Sequence[Record], samples: int, what: str = LAST) -> list[float]:
    """Return the held-out loss of each seed at a mark."""
    return [
        next(one["held_out"] for one in row["held_out"] if one["samples"] == samples and one["what"] == what)
        for row in rows
    ]


def difference(ours: Sequence[float], theirs: Sequence[float]) -> Estimate:
    """Return the mean of the differences, seed by seed: seeds share the initial weights and the order of the data."""
    return Estimate.of([a - b for a, b in zip(ours, theirs, strict=True)])


def branch_losses(rows: Sequence[Record], end: int) -> list[float]:
    """Return the held-out loss of the branch that ends at ``end``, of each seed."""
    found = [(one, row) for row in rows for one in row["held_out"] if one["what"].startswith("branch")]
    return [one["held_out"] for one, _ in found if one["samples"] == end]


def planned(rows: Rows, end: int, warmup: str) -> Sequence[Record]:
    """Return the rows of the cosine that was planned for ``end``."""
    return rows[f"one cosine{warmup}, {end}"]


def described(warmup: str) -> str:
    """Return one of `WARMUPS` in words."""
    return warmup.removeprefix(", ") or "warm-up of 320 samples"


def peak(rows: Sequence[Record]) -> str:
    """Return the peak lr."""
    return f"{rows[0]['settings']['lr']:g}"


def anytime_table(rows: Rows, scale: Scale) -> Iterator[str]:
    """Return held-out loss at each end of a cycle, and its difference from a cosine that was planned for that end."""
    for warmup in WARMUPS:
        ends = ends_of(scale, warmup)
        best = {end: planned(rows, end, warmup) for end in ends}
        cells = [f"{Estimate.of(losses(found, end))} (lr {peak(found)})" for end, found in best.items()]
        lines = [["a cosine planned for that end", "", *cells]]
        for recipe in RECIPES:
            found = rows[recipe + warmup]
            differences = (difference(losses(found, end), losses(best[end], end)).signed() for end in ends)
            lines.append([recipe, peak(found), *differences])
        yield from table([described(warmup), "peak lr", *(f"after {end:,} samples" for end in ends)], lines)
        yield ""


def branches_table(rows: Rows, scale: Scale) -> Iterator[str]:
    """Return held-out loss and samples of the branches and of dedicated runs."""
    costs = []
    for warmup in WARMUPS:
        trunk, ends = rows[f"trunk{warmup}"], ends_of(scale, warmup)
        lines = []
        for end in ends:
            theirs = planned(rows, end, warmup)
            ours, cosine = branch_losses(trunk, end), losses(theirs, end)
            cells = [str(Estimate.of(ours)), f"{Estimate.of(cosine)} (lr {peak(theirs)})"]
            lines.append([f"{end:,} samples", *cells, difference(ours, cosine).signed()])
        title = f"{described(warmup)}, branch ends at"
        yield from table([title, f"branch (lr {peak(trunk)})", "dedicated cosine", "difference"], lines)
        yield ""
        trained = trunk[0]["trained_samples"]
        costs.append(f"{trained:,} samples for {sum(ends):,} ({trained / sum(ends):.2f})")
    yield f"Trained in all, trunk and branches for dedicated runs: {' and '.join(costs)}."


def kinds(rows: Sequence[Record], samples: int) -> list[str]:
    """Return the names of what was measured at a mark, other than the last weights."""
    return [one["what"] for one in rows[0]["held_out"] if one["samples"] == samples and one["what"] != LAST]


def snapshots_table(rows: Rows, scale: Scale) -> Iterator[str]:
    """Return the difference of averages from the last weights, at the end of training and on the trunk."""
    lines = []
    for recipe, found in rows.items():
        marks = found[0]["settings"]["marks"]
        for samples in marks[-1:] if recipe != "trunk" else [mark for mark in marks if mark in scale.ends]:
            last = losses(found, samples)
            name = f"{recipe}, {samples:,} samples"
            lines.append([name, LAST, str(Estimate.of(last)), ""])
            for what in kinds(found, samples):
                if not what.startswith("branch"):
                    values = losses(found, samples, what)
                    lines.append([name, what, str(Estimate.of(values)), difference(values, last).signed()])
            if recipe == "trunk":
                values = branch_losses(found, samples)
                lines.append(
                    [name, "its cool-down branch", str(Estimate.of(values)), difference(values, last).signed()]
                )
    yield from table(["run", "weights", "held-out loss", "difference from the last weights"], lines)
