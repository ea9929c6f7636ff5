"""Compare recipes on small GPTs, whatever the result: weight decay, restarts, cool-down branches, averages of weights.

    python -m benchmarks.recipes decay --out benchmarks/results/recipes.jsonl  # and anytime, branches, snapshots
    python -m benchmarks.recipes_report benchmarks/results/recipes.jsonl --docs docs  # tables and pictures

Model and text are the main job's (launch/gpt.py, launch/text.py); one process, one thread. Each run is a row, appended
when it ends. An interrupted command continues where it stopped: a run whose row is there is not repeated, and runs that
two experiments need are made once. What each experiment asks, and what its runs have in common, is at its function.

Held-out loss is the mean over the same windows in all runs of an experiment, in nats per byte.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import records
from benchmarks.recipes_training import BATCH, KIND, LAST, Run, Task, execute
from benchmarks.records import Record

DECAYS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)  # torch's
RECIPES = ("cosine restarts", "WSD-S", "one cosine")
LONG_WARMUP = ", warm-up of a tenth"  # after the name of a recipe
WARMUPS = ("", LONG_WARMUP)
LR_OF = {"equal restarts": "cosine restarts", "trunk" + LONG_WARMUP: "WSD-S" + LONG_WARMUP}  # to save time
LITTLE_TEXT = "equal restarts, little text"
TUNING_SEED = 100  # lr is chosen on it, and on no seed that is reported


class Sheet:
    """The rows of all runs so far, in a file of JSON lines.

    Args:
        path: The file, created if it is not there.
        may_run: Whether `row` makes runs that are not there.
    """

    def __init__(self, path: Path, *, may_run: bool = True) -> None:
        self.path, self.may_run = path, may_run
        # A cut-off last line, of a run that was killed, must not join the next row.
        if may_run and path.exists() and not (text := path.read_text()).endswith("\n"):
            path.write_text(text[: text.rfind("\n") + 1])
        found = records.read([path]) if path.exists() else []
        self.rows = [record for record in found if record["kind"] == KIND]
        self._started = False

    def row(self, run: Run) -> Record:
        """Return the row of ``run``; run it if there is none.

        Raises:
            LookupError: there is none, and it may not be run.
        """
        settings = run.settings()
        for row in self.rows:
            if row["settings"] == settings:
                return row
        if not self.may_run:
            raise LookupError(f"{self.path} has no row of {run}.")
        if not self._started:
            records.append(self.path, [records.environment()])
            self._started = True
        row = execute(run)
        records.append(self.path, [row])
        self.rows.append(row)
        print(
            f"{time.strftime('%H:%M:%S')} run {len(self.rows)}: {run.recipe}, lr {run.lr:g}, weight decay "
            f"{run.weight_decay:g}, batch {run.batch}, {run.marks[-1]:,} samples, seed {run.seed}: held-out "
            f"{final(row):.4f}, {row['seconds']:.0f} s",
            flush=True,
        )
        return row


def final(row: Record) -> float:
    """Return the held-out loss of the run's end: of its last weights, or the mean over its branches."""
    branches = [one["held_out"] for one in row["held_out"] if one["what"].startswith("branch")]
    if branches:
        return sum(branches) / len(branches)
    return float([one["held_out"] for one in row["held_out"] if one["what"] == LAST][-1])


# -------------------------------------------------------------------- experiments


@dataclass(frozen=True, slots=True)
class Case:
    """One sweep of weight decay.

    Attributes:
        task: Little text, so that the run has several epochs.
        samples: Of the run.
        batch: Samples of an update.
        guess: Where among `DECAYS` to begin.
    """

    task: Task
    samples: int
    batch: int
    guess: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Scale:
    """The sizes of all experiments.

    Attributes:
        decay_cases: Of `decay`; the others are compared with the first.
        decay_lr: At `BATCH`; sqrt(batch / BATCH) times this at another batch.
        task: For the other experiments.
        unit: Samples of the first cycle; cycles end after 1, 3, 7 and 15 of them.
        lrs: From which each recipe's peak is chosen.
        more_lrs: How many more are tried, if the best is at an edge.
        seeds: Reported.
        decay_seeds: Those of `decay`.
    """

    decay_cases: tuple[Case, ...]
    decay_lr: float
    task: Task
    unit: int
    lrs: tuple[float, ...] = (2e-3, 4e-3, 8e-3)
    more_lrs: int = 2
    seeds: tuple[int, ...] = (0, 1, 2)
    decay_seeds: tuple[int, ...] = (0, 1)

    @property
    def ends(self) -> tuple[int, ...]:
        """The ends of cycles that double."""
        return tuple(self.unit * n for n in (1, 3, 7, 15))

    @property
    def total(self) -> int:
        """Samples of a whole run."""
        return self.ends[-1]


TEXT = Task(max_bytes=132_500, held_out=0.5, multiple=64)  # 1,024 windows to train on
HALF_TEXT = replace(TEXT, max_bytes=99_000, held_out=2 / 3)
QUARTER_TEXT = replace(TEXT, max_bytes=82_500, held_out=0.8)
SCALE = Scale(
    decay_cases=(
        Case(TEXT, 20_480, 16, 1.0),
        Case(TEXT, 10_240, 16, 0.3),
        Case(TEXT, 40_960, 16, 3.0),
        Case(TEXT, 20_480, 4, 0.3),
        Case(TEXT, 20_480, 64, 3.0),
        Case(HALF_TEXT, 10_240, 16, 1.0),
        Case(QUARTER_TEXT, 5_120, 16, 1.0),
    ),
    decay_lr=4e-3,
    task=Task(max_bytes=2_000_000, held_out=0.05, held_out_windows=512),
    unit=1_536,
)
TINY_TASK = Task(max_bytes=12_000, held_out=0.3, held_out_windows=8, multiple=8, width=16, context=16)
TINY = Scale(
    decay_cases=(Case(TINY_TASK, 64, 4, 1.0), Case(TINY_TASK, 64, 8, 1.0), Case(TINY_TASK, 128, 4, 1.0)),
    decay_lr=1e-2,
    task=TINY_TASK,
    unit=80,
    lrs=(1e-2,),
    more_lrs=0,
    seeds=(0, 1),
)


def decay_run(scale: Scale, case: Case, weight_decay: float, seed: int) -> Run:
    """Return a run of the sweep: one cosine after a warm-up of a tenth of the run.

    ``weight_decay_norm="first_cycle"`` is torch's reading, and with one cycle it is torch's AdamW. With another batch,
    lr is multiplied by the square root of the ratio; betas stay.
    """
    return Run(
        recipe="decay",
        task=case.task,
        seed=seed,
        lr=scale.decay_lr * math.sqrt(case.batch / BATCH),
        batch=case.batch,
        marks=(case.samples,),
        schedule={
            "policy": "cosine",
            "cycle_ends": [case.samples],
            "warmup_samples": case.samples // 10,
            "weight_decay_norm": "first_cycle",
        },
        weight_decay=weight_decay,
    )


def sweep(sheet: Sheet, scale: Scale, case: Case, seeds: Sequence[int]) -> dict[float, list[Record]]:
    """Return rows by weight decay: of all seeds the best of `DECAYS` and its neighbours, of the first seed two more.

    The best is that of the mean over seeds. More decays are there if the best was another one with fewer seeds.
    """

    def rows_of(decay: float, seeds: Sequence[int]) -> list[Record]:
        return [sheet.row(decay_run(scale, case, decay, seed)) for seed in seeds]

    found: dict[float, list[Record]] = {}
    best = DECAYS.index(case.guess)
    for tried, reach in ((seeds[:1], 2), (seeds, 1)):
        while wanted := [
            decay for decay in DECAYS[max(0, best - reach) : best + reach + 1] if len(found.get(decay, [])) < len(tried)
        ]:
            found |= {decay: rows_of(decay, tried) for decay in wanted}
            complete = [decay for decay, rows in found.items() if len(rows) == len(tried)]
            best = DECAYS.index(min(complete, key=lambda decay: sum(map(final, found[decay]))))
    return dict(sorted(found.items()))


def ends_of(scale: Scale, warmup: str) -> list[int]:
    """Return the ends of cycles, in samples, with one of `WARMUPS`."""
    return list(scale.ends[1:] if warmup else scale.ends)


def make_run(scale: Scale, recipe: str, *, lr: float, seed: int, samples: int | None = None) -> Run:
    """Return a run of one of the recipes, of ``samples`` instead of the scale's.

    All have the same model, text, order of data, and time scale of weight decay. With `LONG_WARMUP` the warm-up is a
    tenth of the run, which leaves no room for the first cycle: it is part of the second.
    """
    total = samples or scale.total
    name, is_long = recipe.removesuffix(LONG_WARMUP), recipe.endswith(LONG_WARMUP)
    ends = ends_of(scale, LONG_WARMUP if is_long else "")
    run = Run(
        recipe=recipe,
        task=scale.task,
        seed=seed,
        lr=lr,
        marks=tuple(scale.unit * n for n in (1, 2, 3, 5, 7, 9, 11, 13, 15) if scale.unit * n <= total),
        schedule={},
        ends=scale.ends,
        ema=(scale.unit // 2, scale.unit * 2),
    )
    falls = {"decay_length": "20%", "decay_shape": "one_minus_sqrt"}
    schedules: dict[str, dict[str, Any]] = {
        "cosine restarts": {"policy": "cosine", "cycle_ends": ends},
        "equal restarts": {"policy": "cosine", "cycle_ends": [scale.unit * n for n in (3, 6, 9, 12, 15)]},
        "WSD-S": {"policy": "wsd", "cycle_ends": ends, "rewarmup": "2%", **falls},
        "one cosine": {"policy": "cosine", "cycle_ends": [total]},
        "trunk": {"policy": "wsd", "restart_period": "1_000_000 epochs"},  # its decay is far away
    }
    common = {"warmup_samples": min(320, scale.unit // 4), "weight_decay_timescale": "1 epoch"}
    if is_long:
        common["warmup_samples"] = total // 10
    run = replace(run, schedule=common | schedules[name])
    if name.endswith("restarts"):
        cycles = tuple(run.schedule["cycle_ends"])
        run = replace(run, snapshots=True, ends=cycles, marks=tuple(sorted({*run.marks, *cycles})))
    if name == "trunk":
        points = tuple((math.ceil(0.8 * end / run.batch) * run.batch, end) for end in ends)
        trunk = points[-1][0]
        marks = tuple(sorted({at for at, _ in points} | {end for end in ends if end <= trunk}))
        run = replace(run, branches=points, marks=marks, ends=marks)
    return run


def tuned_lr(sheet: Sheet, scale: Scale, recipe: str, samples: int | None = None) -> float:
    """Return the peak lr with the lowest held-out loss at the run's end, on a seed that is not reported.

    If it is the lowest or highest that was tried, the next one by a factor of 2 is tried too.
    """

    def loss(lr: float) -> float:
        run = make_run(scale, recipe, lr=lr, seed=TUNING_SEED, samples=samples)
        return final(sheet.row(replace(run, marks=run.marks[-1:], ends=(), ema=(), snapshots=False)))

    losses = {lr: loss(lr) for lr in scale.lrs}
    while True:
        best = min(losses, key=lambda lr: losses[lr])
        beyond = {min(losses): best / 2, max(losses): best * 2}.get(best)
        if beyond is None or len(losses) >= len(scale.lrs) + scale.more_lrs:
            return best
        losses[beyond] = loss(beyond)


def reported(sheet: Sheet, scale: Scale, recipe: str, samples: int | None = None) -> list[Record]:
    """Return the rows of a recipe with its tuned lr, or that of `LR_OF`, one for each seed."""
    lr = tuned_lr(sheet, scale, LR_OF.get(recipe, recipe), samples)
    return [sheet.row(make_run(scale, recipe, lr=lr, seed=seed, samples=samples)) for seed in scale.seeds]


def decay(sheet: Sheet, scale: Scale) -> list[dict[float, list[Record]]]:
    """Which reading of weight decay stays put when the epochs, the text or the batch change?

    One sweep of torch's weight decay for each case: the other readings are conversions of the same runs.
    """
    for count in range(1, len(scale.decay_seeds)):  # all cases with one seed first, in case there is no time for more
        for case in scale.decay_cases:
            sweep(sheet, scale, case, scale.decay_seeds[:count])
    return [sweep(sheet, scale, case, scale.decay_seeds) for case in scale.decay_cases]


def anytime(sheet: Sheet, scale: Scale) -> dict[str, list[Record]]:
    """What has each recipe at every cycle's end, in one run?

    The shorter cosines, each tuned, show what a run that was planned for that length would have. All with two warm-ups:
    the longer one was added when the result with the shorter one was known, since it left cosines at lr 8e-3 worse.
    """
    rows = planned(sheet, scale)
    for warmup in WARMUPS:
        rows |= {recipe + warmup: reported(sheet, scale, recipe + warmup) for recipe in RECIPES}
    return rows


def planned(sheet: Sheet, scale: Scale) -> dict[str, list[Record]]:
    """Return the rows of cosines of each length, each tuned."""
    rows = {}
    for warmup in WARMUPS:
        for end in ends_of(scale, warmup):
            samples = None if end == scale.total else end
            rows[f"one cosine{warmup}, {end}"] = reported(sheet, scale, f"one cosine{warmup}", samples)
    return rows


def branches(sheet: Sheet, scale: Scale) -> dict[str, list[Record]]:
    """What have the cool-down branches of one trunk, next to dedicated runs?

    A dedicated run with the same cool-down would have the bits of the branch, so the dedicated runs are cosines.
    """
    return planned(sheet, scale) | {f"trunk{one}": reported(sheet, scale, f"trunk{one}") for one in WARMUPS}


def snapshots(sheet: Sheet, scale: Scale) -> dict[str, list[Record]]:
    """Are averages of the weights, or of the predictions, at the ends of cycles better than the last weights?

    On the text of the other experiments, seen less than once, and on that of `decay`, with about its best decay.
    """
    rows = {recipe: reported(sheet, scale, recipe) for recipe in ("cosine restarts", "equal restarts")}
    little = replace(scale, task=scale.decay_cases[0].task)
    runs = [make_run(little, "equal restarts", lr=scale.decay_lr, seed=seed) for seed in scale.seeds]
    rows[LITTLE_TEXT] = [
        sheet.row(replace(run, recipe=LITTLE_TEXT, schedule={**run.schedule, "weight_decay_timescale": "3 epochs"}))
        for run in runs
    ]
    return {**rows, "trunk": reported(sheet, scale, "trunk")}


EXPERIMENTS: dict[str, Callable[[Sheet, Scale], object]] = {
    "decay": decay,
    "anytime": anytime,
    "branches": branches,
    "snapshots": snapshots,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one experiment, or continue it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines; rows that are there are not run again")
    parser.add_argument("--tiny", action="store_true", help="seconds, to see that everything runs")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    EXPERIMENTS[options.experiment](Sheet(options.out), TINY if options.tiny else SCALE)


if __name__ == "__main__":
    main()
