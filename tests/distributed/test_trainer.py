"""transformers' Trainer on each engine: the curve of a plain torch loop, and the same one after a resume."""

from __future__ import annotations

import contextlib
import functools
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, DistributedType, PartialState
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from dist_adamw import CyclicLRWithRestarts, DistAdamW, prepare_trainer, wrappers
from tests.distributed.engines import ZERO, environment
from tests.known import unwrap
from tests.ranks import run_ranks

BATCH, EPOCH = 8, 44  # the last batch of an epoch has 4 samples
EPOCHS, PER_EPOCH = 3, 6
LR, DECAY, EPS, CLIP = 1e-2, 0.1, 0.1, 0.05  # a large eps shows a wrong scale of the gradient; CLIP clips
RECIPE: dict[str, Any] = {"restart_period": 0.75, "t_mult": 1.5, "min_lr": 1e-5}
Curve = list[tuple[int, list[float], list[float], float]]  # samples; lr and weight decay by group; loss


class Samples(Dataset[dict[str, Tensor]]):
    def __init__(self, size: int = EPOCH) -> None:
        self.x = torch.randn(size, 8, generator=torch.Generator().manual_seed(5))

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"x": self.x[i], "y": torch.sin(self.x[i, :2] * 3)}


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.body = nn.Sequential(nn.Linear(8, 33), nn.LayerNorm(33), nn.Tanh(), nn.Linear(33, 2))

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        return {"loss": nn.functional.mse_loss(self.body(x), y)}


class Notes(TrainerCallback):
    """Record the values of each update, and its loss over the global batch."""

    def __init__(self) -> None:
        self.rows: Curve = []
        self.losses: list[Tensor] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        stepped, groups = objects["lr_scheduler"], wrappers.unwrap(objects["optimizer"]).param_groups
        scheduler = getattr(stepped, "scheduler", stepped)  # of a JSON it is wrapped
        self.before = (scheduler.samples, [g["lr"] for g in groups], [g["weight_decay"] for g in groups])

    def on_step_end(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        loss = torch.stack(self.losses).mean()
        if args.world_size > 1:
            dist.all_reduce(loss)
        self.rows.append((*self.before, float(loss) / args.world_size))
        self.losses = []


class Noting(Trainer):
    model: Any
    optimizer: Any  # wrapped by the engine
    lr_scheduler: Any  # Trainer's types know LambdaLR alone

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.notes = Notes()
        super().__init__(*args, **{**kwargs, "callbacks": [self.notes]})

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        if isinstance(loss, Tensor):  # with outputs when it evaluates
            self.notes.losses.append(loss.detach())
        return loss


@contextlib.contextmanager
def arguments_on(
    engine: str, folder: str, accumulation: int = 1, json: dict[str, Any] | None = None, **options: Any
) -> Iterator[TrainingArguments]:
    """TrainingArguments whose engine is ``engine``; the global batch is BATCH. ``json`` is for DeepSpeed."""
    ranks = 1 if engine == "single" else dist.get_world_size()
    told = {
        "output_dir": folder,
        "per_device_train_batch_size": BATCH // (ranks * accumulation),
        "gradient_accumulation_steps": accumulation,
        "num_train_epochs": EPOCHS,
        "train_sampling_strategy": "sequential",
        "learning_rate": LR,
        "weight_decay": DECAY,
        "adam_epsilon": EPS,
        "max_grad_norm": CLIP,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": engine in ("single", "DDP"),
        **options,
    }
    with contextlib.ExitStack() as stack:
        if engine == "single":
            names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
            stack.enter_context(environment(**dict.fromkeys(names)))
        elif engine != "DDP":
            gone = dict.fromkeys(("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"))
            stack.enter_context(environment(ACCELERATE_USE_CPU="false", ACCELERATE_TORCH_DEVICE="cpu", **gone))
        if engine == "FSDP2":
            _pretend_accelerators(stack)
            told["fsdp"] = True
            told["fsdp_config"] = {"version": 2, "auto_wrap_policy": "SIZE_BASED_WRAP", "min_num_params": 100}
        if engine in ZERO:
            import deepspeed

            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
            batches = {"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto"}
            told["deepspeed"] = {**batches, "zero_optimization": ZERO[engine], **(json or {})}
            # On a CPU Trainer gives Accelerate no backend, which would count one process.
            with environment(ACCELERATE_USE_DEEPSPEED="true"):
                PartialState(backend="gloo")
            told["accelerator_config"] = {"use_configured_state": True}
        yield TrainingArguments(**told)


def _pretend_accelerators(stack: contextlib.ExitStack) -> None:
    machine = ("gloo", DistributedType.MULTI_GPU)
    stack.enter_context(mock.patch.object(PartialState, "_prepare_backend", return_value=machine))


def train(engine: str, folder: str, accumulation: int = 1, resume: str | None = None, **options: Any) -> Curve:
    """A run of Trainer; ``resume`` is the checkpoint to begin from."""
    with arguments_on(engine, folder, accumulation, **options) as args:
        trainer = prepare_trainer(Noting(Network(), args, train_dataset=Samples()), scheduler=RECIPE)
        assert (engine == "single") == (args.world_size == 1)
        trainer.train(resume_from_checkpoint=resume)
        assert (unwrap(trainer.optimizer)._path is not None) == (engine == "DDP")  # attached
        if engine == "DDP":
            assert trainer.model_wrapped.gradient_as_bucket_view, "gradients exist twice, and nothing overlaps"
        return trainer.notes.rows


@functools.cache
def plain_loop(padded: bool = False, one_group: bool = False) -> Curve:
    """The same in torch, on one process.

    Args:
        padded: Whether Accelerate fills the last batch of an epoch up with the first samples.
        one_group: Whether biases decay too.
    """
    model, data = Network(), Samples()
    decayed = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim == 1]
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    if one_group:
        groups = [{"params": list(model.parameters())}]
    optimizer = torch.optim.AdamW(groups, lr=LR, weight_decay=DECAY, eps=EPS)
    scheduler = CyclicLRWithRestarts(optimizer, BATCH, EPOCH, **RECIPE)
    rows = []
    for _ in range(EPOCHS):
        for start in range(0, EPOCH, BATCH):
            chosen = list(range(start, min(start + BATCH, EPOCH)))
            if padded:
                chosen += range(BATCH - len(chosen))
            batch = torch.utils.data.default_collate([data[i] for i in chosen])
            loss = model(**batch)["loss"]
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            values = [[g[key] for g in optimizer.param_groups] for key in ("lr", "weight_decay")]
            rows.append((scheduler.samples, *values, loss.item()))
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    return rows


def check_same(rows: Curve, expected: Curve) -> None:
    assert [row[:3] for row in rows] == [row[:3] for row in expected]
    assert max(abs(a - b) / b for (*_, a), (*_, b) in zip(rows, expected, strict=True)) < 1e-5


CELLS = [("single", 1), ("DDP", 2), ("FSDP2", 2), *((stage, 2) for stage in ZERO)]


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(("engine", "world_size"), CELLS)
def test_the_curve_of_a_plain_loop(engine: str, world_size: int, accumulation: int, tmp_path: Path) -> None:
    expected = plain_loop(padded=world_size * accumulation == 2 and world_size == 2)
    assert len(expected) == EPOCHS * PER_EPOCH
    assert len({row[1][0] for row in expected}) > 12  # a schedule that moves
    for rows in run_ranks(world_size, train, engine, str(tmp_path), accumulation):
        check_same(rows, expected)


def train_json(stage: str, folder: str) -> Curve:
    """The recipe is the DeepSpeed JSON's; what it leaves to "auto" is filled in."""
    json = {
        "optimizer": {"type": "DistAdamW", "params": {"lr": "auto", "weight_decay": "auto", "eps": EPS}},
        "scheduler": {
            "type": "CyclicLRWithRestarts",
            "params": {"batch_size": "auto", "epoch_size": "auto", **RECIPE},
        },
    }
    with arguments_on(stage, folder, 2, json) as args:
        trainer = prepare_trainer(Noting(Network(), args, train_dataset=Samples()))
        trainer.train()
        return trainer.notes.rows


@pytest.mark.parametrize("stage", ["ZeRO-1", "ZeRO-3"])
def test_a_json_is_the_recipe(stage: str, tmp_path: Path) -> None:
    expected = plain_loop(padded=False, one_group=True)
    for rows in run_ranks(2, train_json, stage, str(tmp_path)):
        check_same(rows, expected)


SAVE: dict[str, Any] = {"save_strategy": "steps", "save_steps": 8}  # an epoch has 6 updates


@pytest.mark.parametrize(("engine", "world_size"), CELLS)
def test_resume_in_mid_epoch(engine: str, world_size: int, tmp_path: Path) -> None:
    run = functools.partial(train, **SAVE)
    begun = run_ranks(world_size, run, engine, str(tmp_path))
    resumed = run_ranks(world_size, run, engine, str(tmp_path), 1, str(tmp_path / "checkpoint-8"))
    for first, second in zip(begun, resumed, strict=True):
        check_same(first[:8] + second, plain_loop(padded=world_size == 2))


def random_numbers(engine: str, folder: str, resume: str | None = None) -> list[float]:
    """Record what dropout would draw at each update."""
    drawn = []

    class Draws(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            drawn.append(torch.rand(()).item())

    with arguments_on(engine, folder, **SAVE) as args:
        trainer = prepare_trainer(Noting(Network(), args, train_dataset=Samples()), scheduler=RECIPE)
        trainer.add_callback(Draws())
        trainer.train(resume_from_checkpoint=resume)
    return drawn


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_random_state_goes_on_on_another_number_of_ranks(before: int, after: int, tmp_path: Path) -> None:
    engines = {1: "single", 2: "DDP"}
    begun = run_ranks(before, random_numbers, engines[before], str(tmp_path))[0]
    resumed = run_ranks(after, random_numbers, engines[after], str(tmp_path), str(tmp_path / "checkpoint-8"))[0]
    assert resumed == begun[8:]


ROUND = ["single", "DDP", "FSDP2", "ZeRO-1", "ZeRO-2", "ZeRO-3", "DDP", "single", "ZeRO-3", "FSDP2", "single"]


@pytest.mark.parametrize(("first", "second"), [*itertools.pairwise(ROUND)])
def test_resume_on_another_engine_and_number_of_ranks(first: str, second: str, tmp_path: Path) -> None:
    """With the same global batch, and accumulation that leaves nothing to pad."""
    run = functools.partial(train, **SAVE)
    checkpoint = str(tmp_path / "checkpoint-8")
    before, after = (1 if engine == "single" else 2 for engine in (first, second))
    begun = run_ranks(before, run, first, str(tmp_path), before)[0]
    for rows in run_ranks(after, run, second, str(tmp_path), after, checkpoint):
        check_same(begun[:8] + rows, plain_loop())


def best_of(engine: str, folder: str, **more: Any) -> tuple[float, float, float]:
    """The loss by the model at the end, that of the best checkpoint, which is the first, and of the last."""
    options: dict[str, Any] = {
        **SAVE,
        "eval_strategy": "steps",
        "eval_steps": 8,
        "label_names": ["y"],
        "prediction_loss_only": True,
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss",
        "greater_is_better": True,
    }
    with arguments_on(engine, folder, **options, **more) as args:
        trainer = Noting(Network(), args, train_dataset=Samples(), eval_dataset=Samples())
        prepare_trainer(trainer, scheduler=RECIPE).train()
        losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
        assert trainer.state.best_model_checkpoint == f"{folder}/checkpoint-8"
        assert (unwrap(trainer.optimizer).updates, trainer.state.global_step) == (18, 18)
        return trainer.evaluate()["eval_loss"], losses[0], losses[-1]


@pytest.mark.parametrize(("engine", "world_size"), CELLS)
def test_the_best_model_is_there_at_the_end(engine: str, world_size: int, tmp_path: Path) -> None:
    for found, best, last in run_ranks(world_size, best_of, engine, str(tmp_path)):
        assert found == best
        assert best > 1.05 * last


def resume_without_index(folder: str) -> str:
    try:
        train("DDP", folder, 1, f"{folder}/checkpoint-8", **SAVE)
    except ValueError as error:
        return str(error)
    return "resumed"


def test_a_torn_checkpoint_is_not_taken_for_none(tmp_path: Path) -> None:
    run_ranks(2, functools.partial(train, **SAVE), "DDP", str(tmp_path))
    (tmp_path / "checkpoint-8" / "global_step8" / "index.json").unlink()
    for error in run_ranks(2, resume_without_index, str(tmp_path)):
        assert re.search(r"global_step8 .*index\.json is missing", error)


def train_objects(engine: str, folder: str) -> tuple[Curve, int | None, int | None]:
    """With ``optimizers=``, as Trainer's own users do."""
    with arguments_on(engine, folder) as args:
        model = Network()
        groups: list[dict[str, Any]] = [
            {"params": [p for p in model.parameters() if p.ndim == 2]},
            {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
        ]
        optimizer = DistAdamW(groups, lr=LR, weight_decay=DECAY, eps=EPS)
        scheduler = CyclicLRWithRestarts(optimizer, **RECIPE)
        trainer = Noting(model, args, train_dataset=Samples(), optimizers=(optimizer, scheduler))
        prepare_trainer(trainer).train()
        assert trainer.lr_scheduler is scheduler
        return trainer.notes.rows, scheduler.batch_size, scheduler.epoch_size


@pytest.mark.parametrize(("engine", "world_size"), CELLS[:2])
def test_objects_of_the_users(engine: str, world_size: int, tmp_path: Path) -> None:
    for rows, batch_size, epoch_size in run_ranks(world_size, train_objects, engine, str(tmp_path)):
        assert (batch_size, epoch_size) == (BATCH, EPOCH)
        check_same(rows, plain_loop(padded=world_size == 2))


def samples_of(folder: str, accumulation: int, drop_last: bool) -> list[int]:
    rows = train("DDP", folder, accumulation, dataloader_drop_last=drop_last)
    return [samples for samples, *_ in rows]


@pytest.mark.parametrize(("drop_last", "epoch"), [(False, 44), (True, 40)])
def test_real_samples_are_counted(drop_last: bool, epoch: int, tmp_path: Path) -> None:
    expected = [e * epoch + s for e in range(EPOCHS) for s in range(0, epoch, BATCH)]
    for samples in run_ranks(2, samples_of, str(tmp_path), 1, drop_last):
        assert samples == expected


def train_twice(engine: str, folder: str) -> tuple[Curve, int]:
    with arguments_on(engine, folder) as args:
        trainer = prepare_trainer(Noting(Network(), args, train_dataset=Samples()), scheduler=RECIPE)
        trainer.train()
        trainer.train()
        return trainer.notes.rows, trainer.lr_scheduler.samples


@pytest.mark.parametrize(("engine", "world_size"), CELLS[:2])
def test_a_second_train_begins_the_schedule_anew(engine: str, world_size: int, tmp_path: Path) -> None:
    expected = plain_loop(padded=world_size == 2)
    for rows, samples in run_ranks(world_size, train_twice, engine, str(tmp_path)):
        check_same(rows[: len(expected)], expected)
        assert [row[:3] for row in rows[len(expected) :]] == [row[:3] for row in expected]
        assert rows[-1][3] < expected[-1][3]  # the weights go on
        assert samples == EPOCHS * EPOCH


def norms(engine: str, folder: str, clip: float) -> list[float]:
    """Return Trainer's logs."""
    logs: dict[str, Any] = {"logging_strategy": "steps", "logging_steps": 1, "log_level": "error"}
    with arguments_on(engine, folder, 2, max_grad_norm=clip, **logs) as args:
        trainer = prepare_trainer(Noting(Network(), args, train_dataset=Samples()), scheduler=RECIPE)
        trainer.train()
        return [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]


@pytest.mark.parametrize("clip", [CLIP, 0.0])
def test_the_norm_is_the_global_one(clip: float, tmp_path: Path) -> None:
    expected = run_ranks(1, norms, "single", str(tmp_path), clip)[0]
    assert min(expected) > CLIP
    for found in run_ranks(2, norms, "DDP", str(tmp_path), clip):
        assert found == pytest.approx(expected, rel=1e-4)


REFUSED: list[tuple[str, dict[str, Any], dict[str, Any], bool, str]] = [
    ("DDP", {"optimizer": {"lr": 0.5}}, {}, False, "lr=0.5 .*learning_rate"),
    ("DDP", {"optimizer": {"decay_by": "moon"}}, {}, False, "moon"),
    ("DDP", {"optimizer": {"decay_by": "lr"}}, {}, True, "optimizer already"),
    ("DDP", {"scheduler": {"t_mult": -1}}, {}, False, "t_mult"),
    ("DDP", {}, {"warmup_steps": 5}, False, "warmup_samples"),
    ("ZeRO-2", {}, {}, True, "drops optimizers="),
    ("ZeRO-2", {}, {"json": {"optimizer": {"type": "AdamW"}}}, False, "names an optimizer"),
]


def refusals(folder: str) -> None:
    for engine, asked, options, objects, message in REFUSED:
        AcceleratorState._reset_state(reset_partial_state=True)
        with arguments_on(engine, folder, **options) as args:
            optimizer = DistAdamW(Network().parameters()) if objects else None
            trainer = Noting(Network(), args, train_dataset=Samples(), optimizers=(optimizer, None))
            with pytest.raises(ValueError, match="(?s)" + message):
                prepare_trainer(trainer, **asked)


def test_refused(tmp_path: Path) -> None:
    run_ranks(2, refusals, str(tmp_path))
