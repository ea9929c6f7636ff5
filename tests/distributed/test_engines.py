"""The engine matrix: one recipe, the same lr, weight decay and loss curve on every engine.

``python -m tests.distributed.test_engines`` prints it.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dist_adamw import CyclicLRWithRestarts, DistAdamW, prepare
from tests.distributed.engines import ENGINES, accelerator_on
from tests.known import unwrap
from tests.ranks import run_ranks

BATCH, EPOCH = 12, 60
# Cycles of 1.5, 2.25 and 3.375 epochs: 7.5, 11.25 and 16.875 updates, 35.625 in all.
RECIPE: dict[str, Any] = {"restart_period": 1.5, "t_mult": 1.5, "min_lr": 1e-5}
EPOCHS = 8
UPDATES = EPOCHS * EPOCH // BATCH
Curve = list[tuple[int, float, float, float]]  # samples, lr, weight decay, loss


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(EPOCH, 8, generator=generator)
    # Large enough for gradients of a norm above 1, to which DeepSpeed clips unasked.
    return TensorDataset(x, 5 * torch.sin(x[:, :2] * 3))


def network() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(8, 33), nn.Tanh(), nn.Linear(33, 33), nn.Tanh(), nn.Linear(33, 2))


def curve(
    engine: str,
    accumulation: int,
    decay_by: Any,
    eps: float,
    config: dict[str, Any],
    saved: str = "",
    epochs: Any = None,
) -> Curve:
    """Train three cycles, and report each update's clock, lr, weight decay and loss over the global batch.

    Args:
        saved: A folder: written after the last of ``epochs``, and loaded where these do not begin at 0.
    """
    first, last = epochs or (0, EPOCHS)
    with accelerator_on(engine, accumulation, **config) as accelerator:
        ranks = accelerator.num_processes
        assert BATCH % (ranks * accumulation) == 0
        model = network()
        optimizer = DistAdamW(model.parameters(), lr=1e-2, weight_decay=0.1, eps=eps, decay_by=decay_by)
        scheduler = CyclicLRWithRestarts(optimizer, **RECIPE)
        loader = DataLoader(data(), batch_size=BATCH // (ranks * accumulation))
        model, wrapped, loader, scheduler = prepare(accelerator, model, optimizer, loader, scheduler)
        values: dict[int, tuple[float, float]] = {}

        def note(inner: Any, *_: Any) -> None:
            group = inner.param_groups[0]
            values[scheduler.samples] = (group["lr"], group["weight_decay"])

        unwrap(wrapped).register_step_pre_hook(note)
        rows, losses = [], []
        if first:
            accelerator.load_state(saved)
            assert scheduler.samples == first * EPOCH
        for _ in range(first, last):
            for x, y in loader:
                with accelerator.accumulate(model):
                    before = scheduler.samples
                    loss = nn.functional.mse_loss(model(x), y)
                    accelerator.backward(loss)
                    wrapped.step()
                    scheduler.step()
                    wrapped.zero_grad()
                    losses.append(loss.detach())
                    if accelerator.sync_gradients:
                        total = torch.stack(losses).sum()
                        if ranks > 1:
                            dist.all_reduce(total)
                        rows.append((before, *values[before], float(total) / (ranks * accumulation)))
                        losses = []
        if saved and not first:
            accelerator.save_state(saved)
    assert len(rows) == (last - first) * EPOCH // BATCH
    assert unwrap(wrapped).updates == last * EPOCH // BATCH
    return rows


@functools.cache
def reference(decay_by: str, eps: float) -> Curve:
    """One process and no accumulation."""
    return run_ranks(1, curve, "single", 1, decay_by, eps, {})[0]


def difference(rows: Curve, expected: Curve) -> float:
    """The largest relative difference of the loss; the clock and what it gives must be the same bits."""
    assert [row[:3] for row in rows] == [row[:3] for row in expected]
    return max(abs(a - b) / b for (*_, a), (*_, b) in zip(rows, expected, strict=True))


CELLS = [
    (engine, world_size, accumulation)
    for engine in ENGINES
    for world_size in (1, 2, 4)
    for accumulation in (1, 3)
    if engine != "single" or world_size == 1
]


# A part of the matrix, which the command prints whole. With eps=0.1 a wrong scale of gradients shows.
SOME = [(engine, *place) for engine in ENGINES[1:] for place in ((1, 3), (2, 3), (3, 1))] + [("single", 1, 3)]


@pytest.mark.parametrize(("decay_by", "eps"), [("lr", 0.1), ("schedule", 1e-8)])
@pytest.mark.parametrize(("engine", "world_size", "accumulation"), SOME)
def test_one_curve(engine: str, world_size: int, accumulation: int, decay_by: str, eps: float) -> None:
    expected = reference(decay_by, eps)
    assert len({lr for _, lr, _, _ in expected}) > 25  # a schedule that moves
    for rows in run_ranks(world_size, curve, engine, accumulation, decay_by, eps, {}):
        assert difference(rows, expected) < 1e-5


@pytest.mark.parametrize("engine", ENGINES[1:])
def test_accelerates_own_checkpoints(engine: str, tmp_path: Path) -> None:
    """Save in the middle of a cycle, and load in a new job."""
    expected = reference("lr", 0.1)
    saved = str(tmp_path / "state")
    before = run_ranks(2, curve, engine, 3, "lr", 0.1, {}, saved, (0, 4))
    after = run_ranks(2, curve, engine, 3, "lr", 0.1, {}, saved, (4, EPOCHS))
    for rows in (before[0] + after[0], before[1] + after[1]):
        assert difference(rows, expected) < 1e-5


def main() -> None:
    """Print the matrix: the largest relative difference of the loss from one process without accumulation."""
    print(f"{'engine':16} {'ranks':>5} {'accumulation':>12}   decay_by=lr, eps 1e-8 and 0.1; schedule, 1e-8 and 0.1")
    for engine, world_size, accumulation in CELLS:
        cells = []
        for decay_by in ("lr", "schedule"):
            for eps in (1e-8, 0.1):
                every = run_ranks(world_size, curve, engine, accumulation, decay_by, eps, {})
                cells.append(max(difference(rows, reference(decay_by, eps)) for rows in every))
        figures = "  ".join(f"{cell:.1e}" for cell in cells)
        print(f"{engine:16} {world_size:5} {accumulation:12}   {figures}", flush=True)


if __name__ == "__main__":
    main()
