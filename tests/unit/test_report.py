"""The picture of the main job: everything stands at the sample where it happens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from report import Row, draw

from dist_adamw import CyclicLRWithRestarts, DistAdamW
from dist_adamw.schedule.plot import Picture


def rows(scheduler: CyclicLRWithRestarts, optimizer: DistAdamW, updates: int) -> list[Row]:
    """Train, and record as the main job does."""
    (param,) = optimizer.param_groups[0]["params"]
    found = []
    for number in range(updates):
        lr, decay = float(scheduler.get_last_lr()[0]), scheduler.get_last_weight_decay()[0]
        param.grad = torch.ones(1)
        optimizer.step()
        scheduler.step()
        val_loss = 2.0 if number % 10 == 9 else None
        found.append(Row(scheduler.samples, float(number), lr, decay, val_loss, 0.0))
    return found


@pytest.mark.parametrize("first", [0, 5])
def test_everything_stands_where_it_happens(first: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = DistAdamW([torch.nn.Parameter(torch.ones(1))], lr=1e-3, weight_decay=0.05)
    scheduler = CyclicLRWithRestarts(optimizer, 50, 1000, 1, 2)
    preview = scheduler.preview(cycles=2)
    history = rows(scheduler, optimizer, 30)[first:]  # 1,500 of 3,000 samples
    pictures: list[Picture] = []
    monkeypatch.setattr(Picture, "save", lambda self, _: pictures.append(self))
    draw(tmp_path / "x.png", history, preview, {"unigram": 3.0}, "title")
    (picture,) = pictures
    loss, lr, decay = picture.panels
    training, held_out = loss.lines
    begin = first * 50
    assert [*training.x] == list(range(begin, 1500, 50))  # before the update
    assert [*held_out.x] == [500, 1000, 1500]  # after it
    assert picture.restarts == [1000]
    (steps,) = lr.lines
    assert [y for x, y in zip(steps.x, steps.y, strict=True) if x == 1000] == [history[19 - first].lr, 1e-3]
    assert (steps.x[0], steps.x[-1]) == (begin, 1500)
    assert decay.label == "weight decay,\nlambda_i of AdamWR"
    (values,) = decay.lines
    assert (values.x[0] >= begin, values.x[-1] <= 1500) == (True, True)
    # What the optimizer had, in the recipe's reading.
    for row in (history[0], history[-1]):
        at = dict(zip(values.x, values.y, strict=True))[min(x for x in values.x if x >= row.samples - 50)]
        assert at == pytest.approx(row.weight_decay * 1e-3)
