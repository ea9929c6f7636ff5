"""Compare recipes on small GPTs, whatever the result: weight decay, restarts, cool-down branches, averages of weights.

    python -m benchmarks.recipes decay --out benchmarks/results/recipes.jsonl    # and anytime, branches, snapshots
    python -m benchmarks.recipes_report benchmarks/results/recipes.jsonl         # the tables and pictures of docs/recipes.md

Model and text are the main job's (launch/gpt.py, launch/text.py); one process, one thread. Each run is a row, appended
when it ends. An interrupted command continues where it stopped: a run whose row is there is not repeated, and runs that
two experiments need are made once. What each experiment asks, and what its runs have in common, is at its function.

Held-out loss is the mean over the same windows in all runs of an experiment, in nats per byte.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks import records
from benchmarks.ranks import ROOT
from benchmarks.records import Record

sys.path.insert(0, str(ROOT / "launch"))

from gpt import GPT, ModelConfig, next_byte_losses, parameter_groups
from text import Text, TextConfig, load_text

import dist_adamw
from dist_adamw import CyclicLRWithRestarts, DistAdamW

KIND = "recipe_run"
TUNING_SEED = 100  # lr is chosen on it, and on no seed that is reported
BATCH = 16
DECAYS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)  # torch's
LAST = "last weights"


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """What a run learns: a text of ``max_bytes`` and a model.

    Attributes:
        max_bytes: Bytes of the text, from its beginning.
        held_out: The part at its end that is never trained on.
        held_out_windows: How many windows of it a held-out loss is the mean of.
        multiple: The training windows are a multiple of this, the largest batch of the experiment.
    """

    max_bytes: int
    held_out: float
    held_out_windows: int = 1024
    multiple: int = BATCH
    layers: int = 2
    width: int = 64
    context: int = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One run: together with the commit, all that its row depends on.

    Attributes:
        recipe: Its name in tables.
        marks: The samples at which held-out loss is measured. The last one ends the run.
        schedule: Options of `CyclicLRWithRestarts`.
        weight_decay: `DistAdamW`'s.
        ends: The marks at which moving averages are measured too: cycles' ends, or those of other recipes.
        snapshots: Whether the weights of the ends are kept and averaged.
        branches: Cool-down branches: (samples of the trunk, samples with the branch).
        ema: Time scales of moving averages of the weights, in samples.
    """

    recipe: str
    task: Task
    seed: int
    lr: float
    marks: tuple[int, ...]
    schedule: Mapping[str, Any]
    weight_decay: float = 0.1
    batch: int = BATCH
    ends: tuple[int, ...] = ()
    snapshots: bool = False
    branches: tuple[tuple[int, int], ...] = ()
    ema: tuple[int, ...] = ()

    def settings(self) -> dict[str, Any]:
        """Return everything as plain data, as a row has it."""
        settings: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return settings


# -------------------------------------------------------------------- training


class Job:
    """A model in training, as a script with Accelerate has it."""

    def __init__(self, run: Run) -> None:
        self.run = run
        text = text_of(run.task)
        self.accelerator = Accelerator(
            cpu=True, dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=run.seed)
        )
        set_seed(run.seed)
        sizes = run.task
        model = GPT(ModelConfig(layers=sizes.layers, heads=4, width=sizes.width, context=sizes.context))
        optimizer = DistAdamW(
            parameter_groups(model, run.weight_decay), lr=run.lr, betas=(0.9, 0.95), max_grad_norm=1.0
        )
        scheduler = CyclicLRWithRestarts(optimizer, min_lr=1e-5, **run.schedule)
        order = torch.Generator().manual_seed(run.seed)
        loader = DataLoader(text.training, run.batch, shuffle=True, generator=order, drop_last=True)
        self.model, self.optimizer, self.loader, self.scheduler = dist_adamw.prepare(
            self.accelerator, model, optimizer, loader, scheduler
        )
        self.gpt = model
        self.losses: list[float] = []
        self.lrs: list[float] = []

    def updates(self) -> Iterator[int]:
        """Train without end; yield the clock after each update."""
        self.model.train()
        while True:
            for windows in dist_adamw.rest_of_epoch(self.loader):
                self.lrs.append(float(self.scheduler.get_last_lr()[0]))
                loss = next_byte_losses(self.model, windows).mean()
                self.accelerator.backward(loss)
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()
                self.losses.append(float(loss.detach()))
                if not math.isfinite(self.losses[-1]):
                    raise FloatingPointError(
                        f"the loss became {loss} at {self.scheduler.samples:,} samples: {self.run}"
                    )
                yield self.scheduler.samples


@lru_cache(maxsize=2)
def text_of(task: Task) -> Text:
    """Return the text, and check that it has as many held-out windows as the task wants."""
    config = TextConfig(max_bytes=task.max_bytes, held_out=task.held_out, max_held_out_windows=task.held_out_windows)
    text = load_text(None, config, context=task.context, global_batch=task.multiple)
    if text.size < task.max_bytes or len(text.held_out) < task.held_out_windows:
        raise ValueError(
            f"{text.source} has {text.size:,} bytes with {len(text.held_out):,} held-out windows, and {task} is to be "
            "measured. Use a Python whose standard library has its source."
        )
    return text


@torch.no_grad()
def target_losses(model: nn.Module, text: Text) -> Tensor:
    """Return the loss of every byte of the held-out windows, (windows, context), in nats."""
    windows = torch.stack([text.held_out[i] for i in range(len(text.held_out))]).long()
    was_training = model.training
    model.eval()
    found = [
        nn.functional.cross_entropy(model(part[:, :-1]).transpose(1, 2), part[:, 1:], reduction="none")
        for part in windows.split(64)
    ]
    model.train(was_training)
    return torch.cat(found).double()


class Measured:
    """Held-out losses of a run: of its last weights, of averages of snapshots, and of moving averages."""

    def __init__(self, run: Run, model: GPT) -> None:
        self.run, self.model = run, model
        self.text = text_of(run.task)
        self.rows: list[Record] = []
        self._weights: list[dict[str, Tensor]] = []
        self._losses: list[Tensor] = []
        self.moving = {scale: self._copy() for scale in run.ema}

    @torch.no_grad()
    def after_update(self, samples: int) -> None:
        """Follow the weights, and measure if there is a mark at ``samples``."""
        weights = list(self.model.parameters())
        for scale, average in self.moving.items():
            torch._foreach_lerp_(list(average.values()), weights, self.run.batch / scale)
        if samples not in self.run.marks:
            return
        losses = target_losses(self.model, self.text)
        self.add(samples, LAST, losses)
        if samples not in self.run.ends:
            return
        for scale, average in self.moving.items():
            self.add(samples, f"EMA over {scale:,} samples", target_losses(self._with(average), self.text))
        if self.run.snapshots:
            self._weights.append(self._copy())
            self._losses.append(losses)
            for count in range(2, len(self._weights) + 1):
                self._average(samples, count)

    def _average(self, samples: int, count: int) -> None:
        """Measure the mean of the last ``count`` snapshots' weights, and of their probabilities."""
        last = self._weights[-count:]
        mean = {name: torch.stack([one[name] for one in last]).mean(0) for name in last[0]}
        self.add(samples, f"mean of the last {count}", target_losses(self._with(mean), self.text))
        probability = torch.stack([(-one).exp() for one in self._losses[-count:]]).mean(0)
        self.add(samples, f"ensemble of the last {count}", -probability.log())

    def _copy(self) -> dict[str, Tensor]:
        return {name: param.detach().clone() for name, param in self.model.named_parameters()}

    def _with(self, weights: Mapping[str, Tensor]) -> GPT:
        model = GPT(self.model.config)
        model.load_state_dict(dict(weights))
        return model

    def add(self, samples: int, what: str, losses: Tensor) -> None:
        """Add a row: the mean over all bytes, and its standard error over windows."""
        windows = losses.mean(1)
        error = float(windows.std() / math.sqrt(len(windows)))
        self.rows.append({"samples": samples, "what": what, "held_out": float(windows.mean()), "windows_se": error})


def execute(run: Run) -> Record:
    """Train, and return the row."""
    began, cpu = time.perf_counter(), time.process_time()
    job = Job(run)
    measured = Measured(run, job.gpt)
    trained = run.marks[-1]
    with tempfile.TemporaryDirectory() as folder:
        points = {at: Path(folder) / str(at) for at, _ in run.branches}
        for samples in job.updates():
            measured.after_update(samples)
            if samples in points:
                job.accelerator.save_state(str(points[samples]))
            if samples >= run.marks[-1]:
                break
        for at, end in run.branches:
            measured.add(end, f"branch from {at:,}", target_losses(branch(run, points[at], at, end).gpt, measured.text))
            trained += end - at
    step = max(1, len(job.lrs) // 120)
    return {
        "kind": KIND,
        "settings": run.settings(),
        "held_out": measured.rows,
        "training_loss": sum(job.losses[-50:]) / len(job.losses[-50:]),
        "lr_curve": [[i * run.batch, lr] for i, lr in enumerate(job.lrs)][::step],
        "epoch_size": len(measured.text.training),
        "text": measured.text.digest,
        "trained_samples": trained,
        "seconds": time.perf_counter() - began,
        "cpu_seconds": time.process_time() - cpu,
    }


def branch(run: Run, checkpoint: Path, at: int, end: int) -> Job:
    """Finish a copy of the trunk: load its checkpoint and let the lr fall from ``at`` to ``end``."""
    job = Job(run)
    job.accelerator.load_state(str(checkpoint))
    if job.scheduler.samples != at:
        raise RuntimeError(f"{checkpoint} is of sample {job.scheduler.samples:,}, expected {at:,}.")
    job.scheduler.cooldown(at=at, length=end - at)
    for samples in job.updates():
        if samples >= end:
            break
    return job


class Sheet:
    """The rows of all runs so far, in a file of JSON lines.

    Args:
        path: The file, created if it is not there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        # A cut-off last line, of a run that was killed, must not join the next row.
        if path.exists() and not (text := path.read_text()).endswith("\n"):
            path.write_text(text[: text.rfind("\n") + 1])
        found = records.read([path]) if path.exists() else []
        self.rows = [record for record in found if record["kind"] == KIND]
        self._started = False

    def row(self, run: Run) -> Record:
        """Return the row of ``run``; run it if there is none."""
        settings = run.settings()
        for row in self.rows:
            if row["settings"] == settings:
                return row
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Scale:
    """The sizes of all experiments.

    Attributes:
        decay_task: For `decay`: little text, so that runs have several epochs.
        decay_cases: (samples, batch, where among `DECAYS` to begin).
        decay_lr: At `BATCH`; sqrt(batch / BATCH) times this at another batch.
        task: For the other experiments.
        unit: Samples of the first cycle; cycles end after 1, 3, 7 and 15 of them.
        lrs: From which each recipe's peak is chosen.
        seeds: Reported.
    """

    decay_task: Task
    decay_cases: tuple[tuple[int, int, float], ...]
    decay_lr: float
    task: Task
    unit: int
    lrs: tuple[float, ...] = (2e-3, 4e-3, 8e-3)
    seeds: tuple[int, ...] = (0, 1, 2)

    @property
    def ends(self) -> tuple[int, ...]:
        """The ends of cycles that double."""
        return tuple(self.unit * n for n in (1, 3, 7, 15))

    @property
    def total(self) -> int:
        """Samples of a whole run."""
        return self.ends[-1]


SCALE = Scale(
    decay_task=Task(max_bytes=132_500, held_out=0.5, multiple=64),
    decay_cases=((10_240, 16, 0.3), (20_480, 16, 1.0), (40_960, 16, 3.0), (20_480, 4, 0.3), (20_480, 64, 3.0)),
    decay_lr=4e-3,
    task=Task(max_bytes=2_000_000, held_out=0.05),
    unit=3_072,
)
TINY = Scale(
    decay_task=Task(max_bytes=12_000, held_out=0.3, held_out_windows=8, multiple=8, width=16, context=16),
    decay_cases=((64, 4, 1.0), (64, 8, 1.0), (128, 4, 1.0)),
    decay_lr=1e-2,
    task=Task(max_bytes=12_000, held_out=0.3, held_out_windows=8, multiple=8, width=16, context=16),
    unit=160,
    seeds=(0, 1),
)


def decay_run(scale: Scale, samples: int, batch: int, weight_decay: float, seed: int) -> Run:
    """Return a run of the sweep: one cosine after a warm-up of a tenth of the run.

    ``weight_decay_norm="first_cycle"`` is torch's reading, and with one cycle it is torch's AdamW. With another batch, lr
    is multiplied by the square root of the ratio; betas stay.
    """
    return Run(
        recipe="decay",
        task=scale.decay_task,
        seed=seed,
        lr=scale.decay_lr * math.sqrt(batch / BATCH),
        batch=batch,
        marks=(samples,),
        schedule={
            "policy": "cosine",
            "cycle_ends": [samples],
            "warmup_samples": samples // 10,
            "weight_decay_norm": "first_cycle",
        },
        weight_decay=weight_decay,
    )


def sweep(
    sheet: Sheet, scale: Scale, samples: int, batch: int, guess: float, seeds: Sequence[int]
) -> dict[float, list[Record]]:
    """Return rows by weight decay: the best of `DECAYS` by the mean over seeds, and at least two on both sides of it."""
    rows: dict[float, list[Record]] = {}
    best = DECAYS.index(guess)
    while wanted := [decay for decay in DECAYS[max(0, best - 2) : best + 3] if decay not in rows]:
        for decay in wanted:
            rows[decay] = [sheet.row(decay_run(scale, samples, batch, decay, seed)) for seed in seeds]
        best = DECAYS.index(min(rows, key=lambda decay: sum(map(final, rows[decay]))))
    return dict(sorted(rows.items()))


def make_run(scale: Scale, recipe: str, *, lr: float, seed: int, samples: int | None = None) -> Run:
    """Return a run of one of the recipes, of ``samples`` instead of the scale's.

    All have the same model, text, order of data, warm-up, and time scale of weight decay.
    """
    total = samples or scale.total
    run = Run(
        recipe=recipe,
        task=scale.task,
        seed=seed,
        lr=lr,
        marks=tuple(range(scale.unit, total + 1, scale.unit)),
        schedule={},
        ends=scale.ends,
        ema=(scale.unit // 3, scale.unit * 4 // 3),
    )
    falls = {"decay_length": "20%", "decay_shape": "one_minus_sqrt"}
    schedules: dict[str, dict[str, Any]] = {
        "cosine restarts": {"policy": "cosine", "cycle_ends": list(scale.ends)},
        "equal restarts": {"policy": "cosine", "cycle_ends": [scale.unit * n for n in (3, 6, 9, 12, 15)]},
        "WSD-S": {"policy": "wsd", "cycle_ends": list(scale.ends), "rewarmup": "2%", **falls},
        "one cosine": {"policy": "cosine", "cycle_ends": [total]},
        "trunk": {"policy": "wsd", "restart_period": "1_000_000 epochs"},  # its decay is far away
    }
    common = {"warmup_samples": min(320, scale.unit // 4), "weight_decay_timescale": "1 epoch"}
    run = replace(run, schedule=schedules[recipe] | common)
    if recipe.endswith("restarts"):
        run = replace(run, snapshots=True, ends=tuple(run.schedule["cycle_ends"]))
    if recipe == "trunk":
        points = tuple((math.ceil(0.8 * end / run.batch) * run.batch, end) for end in scale.ends)
        trunk = points[-1][0]
        marks = tuple(sorted({at for at, _ in points} | {end for end in scale.ends if end <= trunk}))
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
        if beyond is None or len(losses) >= len(scale.lrs) + 2:
            return best
        losses[beyond] = loss(beyond)


def reported(sheet: Sheet, scale: Scale, recipe: str, samples: int | None = None) -> list[Record]:
    """Return the rows of a recipe with its tuned lr, one for each seed."""
    lr = tuned_lr(sheet, scale, recipe, samples)
    return [sheet.row(make_run(scale, recipe, lr=lr, seed=seed, samples=samples)) for seed in scale.seeds]


def decay(sheet: Sheet, scale: Scale) -> dict[tuple[int, int], dict[float, list[Record]]]:
    """Which reading of weight decay stays put when the length of the run or the batch changes?

    One sweep of torch's weight decay for each (samples, batch): the other readings are conversions of the same runs.
    """
    for count in range(1, len(scale.seeds)):  # all cases with one seed first, in case there is no time for more
        for case in scale.decay_cases:
            sweep(sheet, scale, *case, scale.seeds[:count])
    return {case[:2]: sweep(sheet, scale, *case, scale.seeds) for case in scale.decay_cases}


def anytime(sheet: Sheet, scale: Scale) -> dict[str, list[Record]]:
    """What has each recipe at every cycle's end, in one run?

    The shorter cosines, each tuned, show what a run that was planned for that length would have.
    """
    rows = {recipe: reported(sheet, scale, recipe) for recipe in ("cosine restarts", "WSD-S", "one cosine")}
    for end in scale.ends[:-1]:
        rows[f"one cosine, {end}"] = reported(sheet, scale, "one cosine", end)
    return rows


def branches(sheet: Sheet, scale: Scale) -> dict[str, list[Record]]:
    """What have the cool-down branches of one trunk, next to dedicated runs?

    A dedicated run with the same cool-down would have the bits of the branch, so the dedicated runs are cosines.
    """
    rows = {"trunk": reported(sheet, scale, "trunk")}
    for end in scale.ends:
        rows[f"one cosine, {end}"] = reported(sheet, scale, "one cosine", None if end == scale.total else end)
    return rows


def snapshots(sheet: Sheet, scale: Scale) -> dict[str, list[Record]]:
    """Are averages of the weights, or of the predictions, at the ends of cycles better than the last weights?"""
    return {recipe: reported(sheet, scale, recipe) for recipe in ("cosine restarts", "equal restarts", "trunk")}


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
