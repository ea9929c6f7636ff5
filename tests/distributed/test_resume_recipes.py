"""Recipes with phases: stopped in each of them, and resumed on another engine and number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import nn

from dist_adamw import CyclicLRWithRestarts, DistAdamW
from tests.distributed.test_resume import BATCH, EPOCH, Place, Row, train
from tests.ranks import run_ranks

# An epoch has 5 updates.
RECIPES: dict[str, tuple[dict[str, Any], list[int]]] = {
    # A recipe, and the updates after which it is stopped: in the warm-up, a decay, a rise and a stable phase.
    "wsd": (
        {
            "restart_period": "8 updates",
            "warmup_samples": "2 updates",
            "policy": "wsd",
            "decay_length": "25%",
            "rewarmup": "2 updates",
            "weight_decay_norm": "first_cycle",
        },
        [1, 9, 11, 15],
    ),
    "linear": (
        {"cycle_ends": ["1 epoch", "2.5 epochs", 240], "policy": "linear", "weight_decay_timescale": "2 cycles"},
        [4, 5, 11, 16],
    ),
    "one_minus_sqrt": (
        {"total_samples": "17 updates", "fit": "scale", "policy": "one_minus_sqrt", "peak_factor": [1.0, 0.5]},
        [2, 7, 12, 16],
    ),
}
PLACES: list[Place] = [("single", 1), ("DDP", 2), ("FSDP2", 3), ("ZeRO-2", 2), ("DDP", 4)]


def expected(recipe: dict[str, Any], cooldown: dict[str, Any] | None, samples: int) -> tuple[int, float, float]:
    """Return the clock, lr and weight decay of a scheduler that has never trained."""
    optimizer = DistAdamW(nn.Linear(2, 2).parameters(), lr=1e-2, weight_decay=0.1)
    scheduler = CyclicLRWithRestarts(optimizer, BATCH, EPOCH, **recipe)
    if cooldown is not None:
        scheduler.cooldown(**cooldown)
    scheduler.go_to(samples=samples)
    return samples, float(scheduler.get_last_lr()[0]), scheduler.get_last_weight_decay()[0]


def run(place: Place, first: int, last: int, saved: Path, loaded: Path | None, options: dict[str, Any]) -> list[Row]:
    start = None if loaded is None else str(loaded)
    return run_ranks(place[1], train, place[0], first, last, str(saved), start, options)[0]


@pytest.mark.parametrize("name", RECIPES)
def test_resume_in_every_phase(name: str, tmp_path: Path) -> None:
    recipe, stops = RECIPES[name]
    rows: list[Row] = []
    ends, loaded = [*stops, 19], None
    for place, first, last in zip(PLACES, [0, *stops], ends, strict=True):
        rows += run(place, first, last, tmp_path / str(last), loaded, {"recipe": recipe})
        loaded = tmp_path / str(last)
    assert [row[:3] for row in rows] == [expected(recipe, None, BATCH * k) for k in range(19)]


def test_one_trunk_and_two_branches_on_other_engines(tmp_path: Path) -> None:
    trunk, recipe = tmp_path / "trunk", {"restart_period": "100 epochs", "policy": "wsd"}
    run(("DDP", 2), 0, 6, trunk, None, {"recipe": recipe})
    for shape, places in (
        ("linear", [("single", 1), ("FSDP2", 3)]),
        ("one_minus_sqrt", [("ZeRO-2", 2), ("DDP", 4)]),
    ):
        cooldown = {"at": 6 * BATCH, "length": "5 updates", "shape": shape}
        half = tmp_path / f"half of {shape}"
        rows = run(places[0], 6, 9, half, trunk, {"recipe": recipe, "cooldown": cooldown})
        rows += run(places[1], 9, 12, tmp_path / f"end of {shape}", half, {"recipe": recipe})
        assert [row[:3] for row in rows] == [expected(recipe, cooldown, BATCH * k) for k in range(6, 12)]
        assert rows[-1][1] == 1e-7  # min_lr
    rows = run(("DDP", 3), 6, 9, tmp_path / "trunk goes on", trunk, {"recipe": recipe})
    assert {row[1] for row in rows} == {1e-2}
