"""The job whose checkpoints earlier versions wrote: ``python -m tests.earlier.job VERSION`` writes this version's.

One folder per version is committed, and `tests/distributed/test_earlier.py` loads all of them. Never write one again
after its version is out: the point of it is that the code which wrote it is gone.

    VERSION/<engine>/state/     accelerator.save_state() in the middle of an epoch and of a cycle
    VERSION/<engine>/saved/     dist_adamw.save() at the same update
    VERSION/<engine>/rows.json  samples, lr, weight decay and loss of the updates that followed
    VERSION/pickles.json        pickled optimizer and scheduler (base64), and what they said
"""

from __future__ import annotations

import base64
import itertools
import json
import pickle
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dist_adamw import CyclicLRWithRestarts, DistAdamW, ReduceMaxLROnRestart, prepare, rest_of_epoch, save
from dist_adamw.schedule.policies import arccosine
from tests.distributed.engines import accelerator_on
from tests.ranks import run_ranks

HERE = Path(__file__).parent
ENGINES = {"single": 1, "DDP": 2, "FSDP2": 2, "ZeRO-2": 2}  # and the number of ranks
BATCH, EPOCH, SAVED_AT, UPDATES = 4, 20, 7, 12
RECIPE: dict[str, Any] = {
    "restart_period": 0.9,
    "t_mult": 1.5,
    "min_lr": 1e-5,
    "warmup_samples": 6,
    "policy_fn": arccosine,  # checkpoints and pickles name the module that it lies in
    "eta_on_restart_cb": ReduceMaxLROnRestart(0.9),
}
Row = list[float]  # samples, lr, weight decay, loss


class Scale(nn.Module):
    """A buffer that the checkpoint holds."""

    factor: Tensor

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.register_buffer("factor", torch.tensor(factor))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


def network(seed: int = 2) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 33), nn.LayerNorm(33), nn.Tanh(), Scale(seed), nn.Linear(33, 2))


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(EPOCH, 8, generator=generator)
    return TensorDataset(x, torch.sin(x[:, :2] * 3))


def optimizer_of(model: nn.Module) -> DistAdamW:
    groups: list[dict[str, Any]] = [
        {"params": [p for p in model.parameters() if p.ndim > 1]},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0, "lr": 2e-3},
    ]
    return DistAdamW(groups, lr=1e-2, weight_decay=0.1, eps=0.1)


def train(engine: str, write: Path | None = None, load: Path | None = None) -> list[Row]:
    """Return the rows of the updates after the checkpoint, which is written or loaded."""
    with accelerator_on(engine) as accelerator:
        ranks = accelerator.num_processes
        model = network(2 if load is None else 3)
        optimizer = optimizer_of(model)
        scheduler: Any = CyclicLRWithRestarts(optimizer, **RECIPE)
        loader: Any = DataLoader(data(), batch_size=BATCH // ranks)
        model, optimizer, loader, scheduler = prepare(accelerator, model, optimizer, loader, scheduler)
        if load is not None:
            accelerator.load_state(str(load))
        rows: list[Row] = []
        updates = SAVED_AT if load is not None else 0
        for _ in itertools.count():
            for x, y in rest_of_epoch(loader):
                loss = nn.functional.mse_loss(model(x), y)
                total = loss.detach() / ranks
                if ranks > 1:
                    dist.all_reduce(total)
                group = optimizer.param_groups[0]  # read before backward, in which DeepSpeed may make the update
                rows.append([scheduler.samples, group["lr"], group["weight_decay"], float(total)])
                accelerator.backward(loss)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
                updates += 1
                if write is not None and updates == SAVED_AT:
                    accelerator.save_state(str(write / "state"))
                    save(write / "saved", model, optimizer, scheduler)
                    rows = []
                if updates == UPDATES:
                    return rows
    raise AssertionError


def pickled() -> dict[str, Any]:
    """Return a pickled optimizer and scheduler of one process, and what the next two updates give."""
    model = network()
    optimizer = optimizer_of(model)
    scheduler = CyclicLRWithRestarts(optimizer, **RECIPE, batch_size=BATCH, epoch_size=EPOCH)
    step(model, optimizer, scheduler, 3)
    together = base64.b64encode(pickle.dumps((model, optimizer, scheduler))).decode()
    alone = base64.b64encode(pickle.dumps(optimizer)).decode()
    return {"together": together, "optimizer": alone, "rows": step(model, optimizer, scheduler, 4)}


def step(model: nn.Module, optimizer: Any, scheduler: Any, updates: int, batch: Any = None) -> list[Row]:
    """Train on ``batch``, by default all data; return samples, lr, weight decay and loss of each update."""
    x, y = batch or data().tensors
    rows: list[Row] = []
    for _ in range(updates):
        loss: Tensor = nn.functional.mse_loss(model(x), y)
        loss.backward()
        group = optimizer.param_groups[0]
        rows.append([scheduler.samples, group["lr"], group["weight_decay"], loss.item()])
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return rows


def main(version: str) -> None:
    folder = HERE / version
    for engine, ranks in ENGINES.items():
        rows = run_ranks(ranks, train, engine, folder / engine)[0]
        (folder / engine / "rows.json").write_text(json.dumps(rows) + "\n")
    (folder / "pickles.json").write_text(json.dumps(pickled()) + "\n")


if __name__ == "__main__":
    from tests.earlier import job  # ranks import what they run by this name

    job.main(sys.argv[1])
