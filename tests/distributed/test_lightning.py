"""Lightning's Trainer: the curve of a plain torch loop, checkpoints that resume on other ranks, and what is refused."""

from __future__ import annotations

import csv
import functools
import itertools
import multiprocessing
import os
import pickle
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset

from dist_adamw import CyclicLRWithRestarts, DistAdamW, Mean, load, prepare_lightning
from tests.distributed.engines import environment
from tests.known import unwrap
from tests.ranks import expect_error_on_all, run_ranks

L: Any = pytest.importorskip("lightning", reason="lightning is not installed: pip install -e '.[dev]'")

from dist_adamw.integrations.lightning.checks import check_strategy  # noqa: E402
from dist_adamw.integrations.lightning.training_data import real_rows, record_rows  # noqa: E402

BATCH, EPOCH, EPOCHS, PER_EPOCH = 8, 44, 3, 6  # the last batch of an epoch has 4 samples
LR, DECAY, EPS, CLIP = 1e-2, 0.1, 0.1, 0.05  # a large eps shows a wrong scale of the gradient; CLIP clips
RECIPE: dict[str, Any] = {"restart_period": 0.75, "t_mult": 1.5, "min_lr": 1e-5}
Curve = list[tuple[int, float, float, float]]  # samples, lr, weight decay, loss


class Samples(Dataset[tuple[Tensor, Tensor]]):
    def __init__(self, size: int = EPOCH) -> None:
        self.x = torch.randn(size, 8, generator=torch.Generator().manual_seed(5))

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.x[i], torch.sin(self.x[i, :2] * 3)


class Stream(IterableDataset[tuple[Tensor, Tensor]]):
    """This rank's samples, without a length."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        data = Samples()
        return (data[i] for i in range(dist.get_rank(), EPOCH, dist.get_world_size()))


class Network(L.LightningModule):  # type: ignore[misc]
    """Records each update: the values that it has, and the mean loss of its global batch."""

    def __init__(self, interval: str = "step", dropout: float = 0.0, cls: Any = DistAdamW, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.body: Any = nn.Sequential(nn.Linear(8, 33), nn.Tanh(), nn.Dropout(dropout), nn.Linear(33, 2))
        self.interval, self.cls, self.options = interval, cls, options
        self.attaches = options.pop("attaches", False)
        self.of_optimizer = {"lr": LR, "weight_decay": DECAY, "eps": EPS, **options.pop("of_optimizer", {})}
        self.losses: list[Tensor] = []
        self.rows: Curve = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = nn.functional.mse_loss(self.body(batch[0]), batch[1])
        self.losses.append(loss.detach())
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.body(batch[0])

    def configure_optimizers(self) -> Any:
        optimizer = self.cls(self.parameters(), **self.of_optimizer)
        scheduler = CyclicLRWithRestarts(optimizer, **{**RECIPE, **self.options})
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": self.interval}}

    def on_train_start(self) -> None:
        if self.attaches:
            unwrap(self.optimizers()).attach(self.trainer.model)

    def lr_scheduler_step(self, scheduler: CyclicLRWithRestarts, metric: Any) -> None:
        group, loss = scheduler.optimizer.param_groups[0], torch.stack(self.losses).mean()
        dist.all_reduce(loss)
        loss /= dist.get_world_size()
        self.rows.append((scheduler.samples, group["lr"], group["weight_decay"], float(loss)))
        self.losses = []
        scheduler.step()


class Sharded(Network):
    """Under FSDP2."""

    def configure_model(self) -> None:
        from torch.distributed.fsdp import fully_shard

        mesh = self.device_mesh["data_parallel"]
        if not any(hasattr(param, "full_tensor") for param in self.parameters()):
            fully_shard(self.body[0], mesh=mesh)
            fully_shard(self.body, mesh=mesh)


class Adversaries(L.LightningModule):  # type: ignore[misc]
    """Manual optimization: two optimizers, of which each has its schedule."""

    def __init__(self, batch_size: int | None = BATCH, every: int = 1) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.every = every  # so many batches are trained on once
        self.automatic_optimization = False
        self.batch_size = batch_size
        self.maker, self.judge = nn.Linear(8, 8), nn.Linear(8, 1)
        self.rows: list[tuple[int, int]] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        if batch_idx % self.every:
            return
        maker, judge = self.optimizers()
        clocks = self.lr_schedulers()
        self.rows.append((clocks[0].samples, clocks[1].samples))
        fake = self.maker(batch[0])
        maker.zero_grad()
        self.manual_backward(self.judge(fake).mean())
        maker.step()
        clocks[0].step()
        judge.zero_grad()
        self.manual_backward((self.judge(batch[0]) ** 2).mean() + self.judge(fake.detach()).mean())
        judge.step()
        clocks[1].step()

    def configure_optimizers(self) -> Any:
        optimizers = [DistAdamW(module.parameters(), lr=LR) for module in (self.maker, self.judge)]
        return optimizers, [
            CyclicLRWithRestarts(one, batch_size=self.batch_size, restart_period=1) for one in optimizers
        ]


def loader_of(data: Dataset[Any] | None = None, micro_batch: int | None = None, **options: Any) -> DataLoader[Any]:
    """The samples in order, dealt to the ranks."""
    data, ranks = Samples() if data is None else data, dist.get_world_size()
    sampler: Any = DistributedSampler(data, ranks, dist.get_rank(), shuffle=False)
    return DataLoader(data, micro_batch or BATCH // ranks, sampler=sampler, **options)


def fit(
    model: Any,
    folder: Path,
    *,
    data: Any = None,
    ckpt_path: Path | None = None,
    prepare: Callable[[Any], Any] = prepare_lightning,
    library: Any = L,
    **options: Any,
) -> Any:
    """Train; return the Trainer."""
    ranks = dist.get_world_size()
    told = {
        "strategy": "auto" if ranks == 1 else "ddp",
        "max_epochs": EPOCHS,
        "use_distributed_sampler": False,
        "enable_checkpointing": any("Checkpoint" in type(one).__name__ for one in options.get("callbacks", ())),
        "logger": False,
        **options,
    }
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    # Lightning deletes WORLD_SIZE at the end, and the pool's next job needs it.
    with environment(WORLD_SIZE=os.environ["WORLD_SIZE"]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        trainer = prepare(library.Trainer(accelerator="cpu", devices=ranks, default_root_dir=folder, **quiet, **told))
        own = type(model).train_dataloader is not library.LightningModule.train_dataloader
        trainer.fit(model, None if own else loader_of() if data is None else data, ckpt_path=ckpt_path)
    return trainer


def weights_of(model: nn.Module) -> list[Tensor]:
    return [getattr(param, "full_tensor", lambda one=param: one)().detach() for param in model.parameters()]


def plain_loop(accumulation: int = 1, size: int = EPOCH) -> Curve:
    """The same in torch, on one process, without Lightning."""
    model, data = Network(), Samples(size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=DECAY, eps=EPS)
    scheduler = CyclicLRWithRestarts(optimizer, BATCH, size, **RECIPE)
    rows = []
    for start in [*range(0, size, BATCH)] * EPOCHS:
        x, y = torch.utils.data.default_collate([data[i] for i in range(start, min(start + BATCH, size))])
        loss = nn.functional.mse_loss(model.body(x), y)
        # Lightning divides the losses of an epoch's last, short accumulation by the length of a whole one.
        (loss / accumulation if len(x) < BATCH else loss).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        group = optimizer.param_groups[0]
        rows.append((scheduler.samples, group["lr"], group["weight_decay"], loss.item()))
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return rows


def check_same(rows: Curve, expected: Curve) -> None:
    assert [row[:3] for row in rows] == [row[:3] for row in expected]
    assert [row[3] for row in rows] == pytest.approx([row[3] for row in expected], rel=1e-5)


# ---------------------------------------------------------------- the curve


def curves(folder: Path) -> dict[str, Curve]:
    found = {}
    ranks = dist.get_world_size()
    validation: dict[str, Any] = {"val_check_interval": 2, "limit_val_batches": 2}
    for accumulation in (1, 2):
        model, micro_batch = Network(), BATCH // ranks // accumulation
        loaders = loader_of(micro_batch=micro_batch)
        model.val_dataloader = lambda: loader_of(Samples(9))
        clip: dict[str, Any] = {"gradient_clip_val": CLIP, "accumulate_grad_batches": accumulation}
        fit(model, folder, data=loaders, **clip, **validation)
        found[f"accumulation {accumulation}"] = model.rows
    for name, cls in {"attached": DistAdamW, "whole state": torch.optim.AdamW}.items():
        inside = cls is DistAdamW
        options: dict[str, Any] = {"of_optimizer": {"max_grad_norm": CLIP}, "attaches": True} if inside else {}
        model = Network(cls=cls, **options)
        fit(model, folder, gradient_clip_val=None if inside else CLIP)
        found[name] = model.rows
    if ranks > 1:
        model = Sharded(of_optimizer={"max_grad_norm": CLIP})
        trainer = fit(model, folder, strategy=_fsdp2(), max_epochs=EPOCHS - 1)
        trainer.save_checkpoint(folder / "sharded.ckpt")
        resumed = Sharded(of_optimizer={"max_grad_norm": CLIP})
        fit(resumed, folder, strategy=_fsdp2(), ckpt_path=folder / "sharded.ckpt")
        assert len(model.rows) == PER_EPOCH * (EPOCHS - 1)
        found["FSDP2"] = [*model.rows, *resumed.rows]
    return found


def _fsdp2() -> Any:
    from lightning.pytorch.strategies import ModelParallelStrategy

    return ModelParallelStrategy(data_parallel_size=dist.get_world_size(), tensor_parallel_size=1)


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_curve_of_a_plain_loop(world_size: int, tmp_path: Path) -> None:
    """Clipping, validation in mid-epoch, accumulation, a short last batch."""
    expected = {accumulation: plain_loop(accumulation) for accumulation in (1, 2)}
    assert len({row[1] for row in expected[1]}) > 12  # a schedule that moves
    for found in run_ranks(world_size, curves, tmp_path):
        for name, rows in found.items():
            check_same(rows, expected[2 if name.endswith("2") and name != "FSDP2" else 1])


# ---------------------------------------------------------------- samples


def clocks(folder: Path) -> dict[str, tuple[list[int], int, int]]:
    """By case: the clock before each update, the epoch size, the last sample."""
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  # as a job's rank
    found = {}
    cases: dict[str, tuple[Network, dict[str, Any]]] = {
        "45 samples": (Network(), {"data": loader_of(Samples(45))}),
        "a worker": (Network(), {"data": loader_of(Samples(45), num_workers=1, persistent_workers=True)}),
        "Lightning's sampler": (
            Network(),
            {"data": DataLoader(Samples(45), BATCH // 2, shuffle=True), "use_distributed_sampler": True},
        ),
        "limited": (Network(), {"limit_train_batches": 3}),
        "overfitted": (
            Network(),
            {"overfit_batches": 2, "use_distributed_sampler": True, "data": DataLoader(Samples(), BATCH // 2)},
        ),
        "dropped": (Network(), {"data": loader_of(drop_last=True)}),
        "a stream": (Network(epoch_size=EPOCH), {"data": DataLoader(Stream(), BATCH // 2)}),
        "two loaders": (
            Both(batch_size=BATCH, epoch_size=EPOCH),
            {"data": {"a": loader_of(), "b": loader_of(micro_batch=2)}},
        ),
        "a second iteration": (Network(), {"data": loader_of(Samples(45)), "callbacks": [Peek()]}),
        "a batch that is None": (Skipping(), {"data": loader_of(collate_fn=third_is_none)}),
    }
    for name, (model, options) in cases.items():
        trainer = fit(model, folder, max_epochs=2, **options)
        scheduler = trainer.lr_scheduler_configs[0].scheduler
        found[name] = ([row[0] for row in model.rows], scheduler.epoch_size, scheduler.samples)
    skipping = Adversaries(every=2)
    trainer = fit(skipping, folder, max_epochs=2, strategy="ddp_find_unused_parameters_true")
    clock = trainer.lr_scheduler_configs[0].scheduler
    found["not trained on"] = ([a for a, _ in skipping.rows], clock.epoch_size, clock.samples)
    both = Adversaries()
    trainer = fit(both, folder, max_epochs=2, strategy="ddp_find_unused_parameters_true")
    assert [a for a, _ in both.rows] == [b for _, b in both.rows]
    found["two optimizers"] = ([a for a, _ in both.rows], EPOCH, trainer.lr_scheduler_configs[1].scheduler.samples)
    trainer.save_checkpoint(folder / "both.ckpt")  # Lightning's own, with the whole state
    resumed = Adversaries()
    options = {"strategy": "ddp_find_unused_parameters_true", "ckpt_path": folder / "both.ckpt"}
    fit(resumed, folder, **options)
    assert resumed.rows[0] == (2 * EPOCH, 2 * EPOCH)
    return found


class Peek(L.Callback):  # type: ignore[misc]
    """Looks at the first batch after every other one."""

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        next(iter(trainer.train_dataloader))


def third_is_none(samples: list[tuple[Tensor, Tensor]]) -> Any:
    third = 2 * BATCH + dist.get_rank()
    return None if samples[0][0].equal(Samples().x[third]) else torch.utils.data.default_collate(samples)


class Skipping(Network):
    """Lightning steps the schedule after a batch that is None, too."""

    def lr_scheduler_step(self, scheduler: CyclicLRWithRestarts, metric: Any) -> None:
        if self.losses:
            super().lr_scheduler_step(scheduler, metric)


class Both(Network):
    """Trains on the first of two loaders."""

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:  # type: ignore[override]
        return super().training_step(batch["a"], batch_idx)


def steps(epoch: int, updates: int) -> tuple[list[int], int, int]:
    one = [BATCH * i for i in range(updates)]
    return one + [epoch + n for n in one], epoch, 2 * epoch


def by_rule(updates: int) -> tuple[list[int], int, int]:
    """Without a count: one global batch per update, at the end of an epoch the rest of it."""
    clock = [0]
    for _ in range(updates):
        clock.append(clock[-1] + min(BATCH, EPOCH - clock[-1] % EPOCH))
    return clock[:-1], EPOCH, clock[-1]


def test_samples_are_those_that_were_trained_on(tmp_path: Path) -> None:
    expected = {
        **dict.fromkeys(("45 samples", "a worker", "Lightning's sampler"), steps(45, 6)),
        "limited": steps(24, 3),
        "overfitted": steps(16, 2),
        "dropped": steps(40, 5),
        "a stream": steps(EPOCH, PER_EPOCH),
        "two loaders": by_rule(2 * 11),  # as long as the longest
        "two optimizers": steps(EPOCH, PER_EPOCH),
        "a second iteration": steps(45, 6),
        "a batch that is None": ([0, 8, 16, 24, 32, 36, 44, 52, 60, 68], EPOCH, 72),
        "not trained on": ([BATCH * i for i in range(PER_EPOCH)], EPOCH, BATCH * PER_EPOCH),
    }
    for found in run_ranks(2, clocks, tmp_path):
        assert found == expected


def test_real_rows_are_those_of_the_sampler() -> None:
    """For all small data sets and numbers of ranks: each sample counts once."""
    for size in range(1, 14):
        for ranks in range(1, 6):
            counted = 0
            for rank in range(ranks):
                sampler: Any = DistributedSampler(range(size), ranks, rank)  # type: ignore[arg-type]
                batches = torch.utils.data.BatchSampler(sampler, 2, drop_last=False)
                ends = [0, *range(2, len(sampler), 2), len(sampler)]
                rows = [real_rows(batches, a, b) for a, b in itertools.pairwise(ends)]
                assert all(0 <= one <= 2 for one in rows)
                counted += sum(rows)
            assert counted == size


class Waiting(Samples):
    """Its first sample comes after its second."""

    def __init__(self) -> None:
        super().__init__()
        self.second = multiprocessing.Event()

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        if i == 0:
            assert self.second.wait(60)
        if i == 1:
            self.second.set()
        return super().__getitem__(i)


def test_rows_of_batches_that_come_out_of_order() -> None:
    lists: Any = [[0, 3, 4], [1, 2], [5], [6, 7, 8, 9], [10]]
    loader: Any = DataLoader(Waiting(), batch_sampler=lists, num_workers=2, in_order=False)
    iteration = iter(record_rows(loader))
    sizes = [(iteration.rows(ahead=0), len(x)) for x, _ in iteration]
    assert all(rows == size for rows, size in sizes)
    assert [size for _, size in sizes] != [3, 2, 1, 4, 1]


def test_rows_of_a_loader_whose_workers_were_started_before() -> None:
    loader = DataLoader(Samples(6), 4, num_workers=1, persistent_workers=True)
    next(iter(loader))  # a look at the data before training
    iteration = iter(record_rows(loader))
    assert [iteration.rows(ahead=0) for _ in iteration] == [4, 2]


# ---------------------------------------------------------------- checkpoints


def _every_epoch(folder: Path, **options: Any) -> Any:
    from lightning.pytorch.callbacks import ModelCheckpoint

    return ModelCheckpoint(folder, **{"filename": "{epoch}", "save_top_k": -1, "save_last": "link", **options})


def run(folder: Path, saved: Path | None, dropout: float, ckpt: Path | None = None) -> tuple[Curve, list[Tensor]]:
    model = Network(dropout=dropout)
    callbacks = [] if saved is None else [_every_epoch(saved)]
    fit(model, folder, callbacks=callbacks, ckpt_path=ckpt, gradient_clip_val=CLIP)
    return model.rows, weights_of(model)


@pytest.mark.parametrize("world_size", [1, 2])
def test_resume(world_size: int, tmp_path: Path) -> None:
    """With the bits of a run that never stopped; on another number of ranks with its lr and decay, and its losses."""
    saved = tmp_path / "saved"
    whole = run_ranks(world_size, run, tmp_path, saved, 0.5)
    first = saved / "epoch=0.ckpt"
    assert sorted(path.name for path in saved.iterdir()) == sorted(
        [*(f"epoch={i}.ckpt{end}" for i in range(EPOCHS) for end in ("", ".dist_adamw")), "last.ckpt"]
    )
    (folder,) = (saved / "epoch=0.ckpt.dist_adamw").iterdir()
    assert len([*folder.glob("*.safetensors")]) == world_size, "every rank writes its share"
    for (rows, weights), (resumed, after) in zip(
        whole, run_ranks(world_size, run, tmp_path, None, 0.5, first), strict=True
    ):
        assert resumed == rows[PER_EPOCH:]
        assert all(map(torch.equal, weights, after))
    moved = run_ranks(world_size, run, tmp_path, tmp_path / "moved", 0.0)
    last = shutil.copytree(tmp_path / "moved", tmp_path / "elsewhere", symlinks=True) / "epoch=1.ckpt"
    for resumed, _ in run_ranks(3 - world_size, run, tmp_path, None, 0.0, last):
        check_same(resumed, moved[0][0][2 * PER_EPOCH :])


def lives_of_files(folder: Path) -> None:
    """Checkpoints that are replaced, removed, copied, and read by others."""
    rank, kept = dist.get_rank(), folder / "kept"
    model = Network()
    trainer = fit(model, folder, callbacks=[_every_epoch(kept, save_top_k=1, save_last=False)])
    dist.barrier()  # rank 0 removes the older ones
    names = sorted(path.name for path in kept.iterdir())
    assert names == ["epoch=2.ckpt", "epoch=2.ckpt.dist_adamw"], "folders are removed with their files"

    trainer.save_checkpoint(folder / "last.ckpt")
    first = {path.name for path in (folder / "last.ckpt.dist_adamw").iterdir()}
    dist.barrier()
    # When Lightning writes its file, the folders of the old and of the new one are there.
    there: list[str] = []
    files = trainer.strategy.checkpoint_io

    def save_and_note(*args: Any, **kwargs: Any) -> None:
        there.extend(path.name for path in (folder / "last.ckpt.dist_adamw").iterdir())
        type(files).save_checkpoint(files, *args, **kwargs)

    files.save_checkpoint = save_and_note
    trainer.save_checkpoint(folder / "last.ckpt")
    dist.barrier()
    del files.save_checkpoint
    assert rank or len(first.intersection(there)) == len(there) - 1 == 1
    again = {path.name for path in (folder / "last.ckpt.dist_adamw").iterdir()}
    assert len(first) == len(again) == 1
    assert first != again, "a kill would leave a file without its folder"
    read = Network.load_from_checkpoint(folder / "last.ckpt")  # the weights are in Lightning's file
    assert all(map(torch.equal, weights_of(model), weights_of(read)))

    (inside,) = (folder / "last.ckpt.dist_adamw").iterdir()
    other = Network(batch_size=BATCH, epoch_size=EPOCH)
    made = other.configure_optimizers()
    load(inside, other, made["optimizer"], made["lr_scheduler"]["scheduler"])  # without Lightning
    assert made["lr_scheduler"]["scheduler"].samples == EPOCHS * EPOCH
    assert all(map(torch.equal, weights_of(model), weights_of(other)))

    # Asked directly, the strategy gives the whole state on rank 0, as Lightning does for a sharded optimizer.
    state = trainer.strategy.optimizer_state(trainer.optimizers[0])
    shapes = [param.shape for param in model.parameters()] if rank == 0 else []
    assert [one["exp_avg"].shape for one in state.get("state", {}).values()] == shapes
    trainer.save_checkpoint(folder / "weights.ckpt", weights_only=True)
    assert not (folder / "weights.ckpt.dist_adamw").exists()

    # Saved by Lightning alone: rank 0 has gathered the state.
    alone = Network(batch_size=BATCH, epoch_size=EPOCH)
    fit(alone, folder, prepare=lambda one: one, max_epochs=1).save_checkpoint(folder / "alone.ckpt")
    resumed = Network()
    fit(resumed, folder, ckpt_path=folder / "alone.ckpt")
    check_same([*alone.rows, *resumed.rows], model.rows)

    if rank == 0:
        shutil.copy(folder / "last.ckpt", folder / "copied.ckpt")
    dist.barrier()


def resume_from(folder: Path, name: str, prepared: bool) -> None:
    model = Network() if prepared else Network(batch_size=BATCH, epoch_size=EPOCH)
    fit(model, folder, ckpt_path=folder / name, prepare=prepare_lightning if prepared else lambda one: one)


def resume_with_another_schedule(folder: Path, on_difference: Any) -> None:
    model = Network(restart_period=7)
    prepare = functools.partial(prepare_lightning, on_difference=on_difference)
    trainer = fit(model, folder, ckpt_path=folder / "last.ckpt", prepare=prepare)
    assert trainer.lr_scheduler_configs[0].scheduler.configuration()["restart_period"] == 7


def resume_with_two(folder: Path) -> None:
    fit(Adversaries(), folder, ckpt_path=folder / "last.ckpt", strategy="ddp_find_unused_parameters_true")


def test_lives_of_checkpoints(tmp_path: Path) -> None:
    run_ranks(2, lives_of_files, tmp_path)
    for message in expect_error_on_all(2, resume_from, tmp_path, "copied.ckpt", True):
        assert "CheckpointError" in message
        assert "copied.ckpt.dist_adamw" in message
        assert "not there. Copy the folder" in message
    for message in expect_error_on_all(2, resume_with_another_schedule, tmp_path, None):
        assert "restart_period was" in message
    run_ranks(2, resume_with_another_schedule, tmp_path, "new")
    for message in expect_error_on_all(2, resume_from, tmp_path, "last.ckpt", False):
        assert "prepare_lightning(trainer) before trainer.fit" in message


# ---------------------------------------------------------------- what is refused


class Fetching(Network):
    def training_step(self, dataloader_iter: Any) -> Tensor:  # type: ignore[override]
        return super().training_step(next(dataloader_iter)[0], 0)


def refusals(folder: Path) -> dict[str, str]:
    """By case: what ``fit`` says. None trains."""
    from lightning.pytorch.callbacks import GradientAccumulationScheduler, StochasticWeightAveraging
    from lightning.pytorch.plugins.io import AsyncCheckpointIO
    from lightning.pytorch.tuner.tuning import Tuner

    cases: dict[str, tuple[Any, dict[str, Any]]] = {
        "interval": (Network(interval="epoch"), {}),
        "batch": (Network(batch_size=2 * BATCH), {}),
        "batches": (Network(batch_size={0: BATCH, 100: 2 * BATCH}), {}),
        "manual": (Adversaries(batch_size=None), {}),
        "loaders": (Both(), {"data": {"a": loader_of(), "b": loader_of()}}),
        "stream": (Network(), {"data": DataLoader(Stream(), BATCH // 2)}),
        "fetching": (Fetching(), {}),
        "averaging": (Network(), {"callbacks": [StochasticWeightAveraging(1e-2)]}),
        "accumulation": (Network(), {"callbacks": [GradientAccumulationScheduler({0: 1, 1: 2})]}),
        "asynchronous": (Network(), {"plugins": [AsyncCheckpointIO()]}),
        "reproducible": (Network(of_optimizer={"reproducible": True}), {}),
        "twice": (Network(), {"prepare": lambda one: prepare_lightning(prepare_lightning(one))}),
        "lr_find": (Network(), {"prepare": lambda one: _with_tuner(Tuner, one)}),
    }
    found = {}
    for name, (model, options) in cases.items():
        with pytest.raises(ValueError) as raised:  # noqa: PT011
            fit(model, folder, **options)
        assert type(raised.value) is ValueError, "not a CheckpointError"
        assert not getattr(model, "rows", None)
        found[name] = str(raised.value)
    return found


class Reloading(Network):
    """Has another training loader in its second epoch."""

    def __init__(self, size: int, factor: int) -> None:
        super().__init__()
        self.size, self.factor = size, factor

    def train_dataloader(self) -> DataLoader[Any]:
        if self.trainer.current_epoch == 0:
            return loader_of()
        return loader_of(Samples(self.size), BATCH // 2 * self.factor)


def reload(folder: Path) -> list[str]:
    """What is said of another epoch size, and of another batch size."""
    options: dict[str, Any] = {"reload_dataloaders_every_n_epochs": 1, "max_epochs": 2}
    longer = Reloading(2 * EPOCH, 1)
    with pytest.warns(UserWarning, match="made again") as warned:
        fit(longer, folder, **options)
    assert [row[0] for row in longer.rows] == [*range(0, EPOCH, BATCH), *range(EPOCH, 3 * EPOCH, BATCH)]
    with pytest.raises(ValueError, match="made again") as raised:
        fit(Reloading(EPOCH, 2), folder, **options)
    return [*(str(one.message) for one in warned if "made again" in str(one.message)), str(raised.value)]


def test_loaders_that_are_made_again(tmp_path: Path) -> None:
    for longer, larger in run_ranks(2, reload, tmp_path):
        assert "an epoch trains on 88 samples; the schedule still counts 44 as an epoch" in longer
        assert "a global batch of 16 samples, and the schedule has 8" in larger


def _with_tuner(tuner: Any, trainer: Any) -> Any:
    tuner(prepare_lightning(trainer)).lr_find(Network(), loader_of())
    return trainer


SAID = {
    "interval": ("interval='epoch'", '"interval": "step"'),
    "batch": ("batch_size=16", "4 samples x 1 accumulate_grad_batches x 2 ranks = 8"),
    "batches": ("schedule", "{0: 8, 100: 16}"),
    "manual": ("manual optimization", "batch_size=<samples"),
    "loaders": ("2 training loaders", "batch_size=<samples"),
    "stream": ("length", "epoch_size=<samples"),
    "fetching": ("dataloader_iter", "training_step(batch, batch_idx)"),
    "averaging": ("SWALR", "Mean()"),
    "accumulation": ("GradientAccumulationScheduler", "accumulate_grad_batches"),
    "asynchronous": ("AsyncCheckpointIO", "Leave the plugin out"),
    "reproducible": ("reproducible=True", "divides"),
    "twice": ("already called", "Call it once"),
    "lr_find": ("LearningRateFinder", "lr-range"),
}


def test_what_would_go_wrong_is_refused(tmp_path: Path) -> None:
    for found in run_ranks(2, refusals, tmp_path):
        assert found.keys() == SAID.keys()
        for name, words in SAID.items():
            for word in words:
                assert word in found[name], f"{name}: {found[name]}"


def test_strategies_that_are_refused() -> None:
    from lightning.pytorch.strategies import FSDPStrategy

    with pytest.raises(ValueError, match=r"FSDPStrategy\. It keeps FSDP1.*ModelParallelStrategy"):
        check_strategy(FSDPStrategy())
    with pytest.raises(ValueError, match=r"takes a Trainer of lightning.*got Linear"):
        prepare_lightning(nn.Linear(1, 1))


def disagree(folder: Path) -> None:
    fit(Network(of_optimizer={"lr": LR * (1 + dist.get_rank())}), folder)


def differ_later(folder: Path) -> None:
    class Breaking(Network):
        def on_train_epoch_end(self) -> None:
            if dist.get_rank() == 1:
                with torch.no_grad():
                    self.body[0].weight[0, 0] += 1e-3

    fit(Breaking(), folder, callbacks=[_every_epoch(folder / "broken")])


def test_ranks_that_differ_are_told(tmp_path: Path) -> None:
    for message in expect_error_on_all(2, disagree, tmp_path):
        assert "AgreementError: rank 1 disagrees with rank 0" in message
    for message in expect_error_on_all(2, differ_later, tmp_path):
        assert "AgreementError" in message
        assert "body.0.weight" in message


# ---------------------------------------------------------------- with Lightning's other parts


def with_others(folder: Path) -> list[tuple[list[float], Curve]]:
    """LearningRateMonitor's column and the curve, with either name of the package."""
    import pytorch_lightning
    from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, LearningRateMonitor
    from lightning.pytorch.loggers import CSVLogger
    from pytorch_lightning import callbacks

    found = []
    model, logger = Network(of_optimizer={"averages": {"ends": Mean()}}), CSVLogger(folder)
    model.on_train_batch_end = lambda outputs, batch, batch_idx: model.log("loss", outputs["loss"], sync_dist=True)
    monitors = [LearningRateMonitor("step"), EarlyStopping("loss", patience=2), EMAWeightAveraging()]
    trainer = fit(model, folder, callbacks=monitors, logger=logger, log_every_n_steps=1, max_epochs=2)
    logger.save()
    assert pickle.loads(pickle.dumps(trainer.callbacks[0])).__reduce__() == trainer.callbacks[0].__reduce__()
    before = [one.clone() for one in weights_of(model)]
    with model.optimizers().averaged("ends"):
        assert not all(map(torch.equal, before, weights_of(model)))
    dist.barrier()
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        column = [float(row["lr-DistAdamW"]) for row in csv.DictReader(file) if row.get("lr-DistAdamW")]
    found.append((column, model.rows))

    library: Any = pytorch_lightning

    class Other(library.LightningModule):  # type: ignore[misc]
        configure_optimizers, lr_scheduler_step = Network.configure_optimizers, Network.lr_scheduler_step
        training_step, on_train_start = Network.training_step, Network.on_train_start

        def __init__(self) -> None:
            super().__init__()
            self.__dict__.update(interval="step", cls=DistAdamW, options={}, attaches=False, losses=[], rows=[])
            self.of_optimizer = {"lr": LR, "weight_decay": DECAY, "eps": EPS}
            self.body = Network().body

    other = Other()
    saved = callbacks.ModelCheckpoint(folder / "other")
    fit(other, folder, library=library, callbacks=[saved], max_epochs=2)
    found.append((column, other.rows))
    return found


def test_with_other_parts_of_lightning(tmp_path: Path) -> None:
    for (logged, rows), (_, others) in run_ranks(2, with_others, tmp_path):
        assert logged == pytest.approx([row[1] for row in rows])
        assert len(rows) == 2 * PER_EPOCH
        assert others == rows
