"""One run of `recipes`: a small GPT trained through Accelerate, with held-out losses of its weights and of averages."""

from __future__ import annotations

import json
import math
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.ranks import ROOT
from benchmarks.records import Record

sys.path.insert(0, str(ROOT / "launch"))

from gpt import GPT, ModelConfig, next_byte_losses
from text import Text, TextConfig, load_text

import dist_adamw
from dist_adamw import CyclicLRWithRestarts, DistAdamW
from dist_adamw.recipes.decay import parameter_groups

KIND = "recipe_run"
BATCH = 16
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
            parameter_groups(model, "one_dimensional"),
            lr=run.lr,
            betas=(0.9, 0.95),
            weight_decay=run.weight_decay,
            max_grad_norm=1.0,
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
        weights: list[Tensor] = list(self.model.parameters())
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
