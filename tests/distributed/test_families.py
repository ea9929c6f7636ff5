"""Optimizers of derived classes: their state is that of the class that they come from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_adamw import CheckpointError, DistAdamW, load, save
from dist_adamw.checkpoint.formats.exporting import export_checkpoint
from dist_adamw.checkpoint.storage.index import read_index, write_index


class MyDistAdamW(DistAdamW):
    """A subclass for logging or clipping."""


class MyAdamW(torch.optim.AdamW):
    """A subclass with its own step, and more state than Adam's."""

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for state in self.state.values():
            state["norm"] = state["exp_avg"].norm().expand(2).clone()
            state["seen"] = state.get("seen", 0) + 1
        return loss


class MyOwnAdamW(MyAdamW):
    pass


class OneMoment(torch.optim.AdamW):
    """Calls itself an AdamW, and keeps something else."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state["exp_avg"] = state.get("exp_avg", torch.zeros_like(p)).lerp_(p.grad, 0.1)
                p.sub_(state["exp_avg"].sign(), alpha=group["lr"])


class MySGD(torch.optim.SGD):
    pass


def model_of(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


def train(model: nn.Module, optimizer: Any, updates: int = 3) -> list[Tensor]:
    for i in range(updates):
        model(torch.full((2, 4), 1.0 + i)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach().clone() for p in model.parameters()]


def made(kind: Any, model: nn.Module) -> Any:
    options = {"momentum": 0.9} if issubclass(kind, torch.optim.SGD) else {}
    return kind(model.parameters(), lr=1e-2, **options)


PAIRS = [
    (MyDistAdamW, DistAdamW),
    (DistAdamW, MyDistAdamW),
    (MyDistAdamW, torch.optim.AdamW),
    (MyAdamW, DistAdamW),
    (MyAdamW, torch.optim.AdamW),
    (MyAdamW, MyAdamW),
    (torch.optim.AdamW, MyAdamW),
    (MyAdamW, MyOwnAdamW),
    (MySGD, torch.optim.SGD),
    (torch.optim.SGD, MySGD),
    (OneMoment, OneMoment),
]


@pytest.mark.parametrize(("saved", "loaded"), PAIRS, ids=lambda kind: kind.__name__)
def test_a_derived_class_and_its_parent_take_over_from_each_other(saved: Any, loaded: Any, tmp_path: Path) -> None:
    model, again = model_of(), model_of(1)
    optimizer, other = made(saved, model), made(loaded, again)
    train(model, optimizer)
    save(tmp_path, model, optimizer)
    load(tmp_path, again, other)
    expected, found = train(model, optimizer), train(again, other)
    if issubclass(saved, torch.optim.SGD) == issubclass(loaded, torch.optim.SGD):
        assert all(torch.allclose(a, b, rtol=0, atol=1e-7) for a, b in zip(expected, found, strict=True))
    if loaded is MyAdamW and saved is MyAdamW:
        assert {state["seen"] for state in other.state.values()} == {6}
    about = read_index(tmp_path).about
    assert about["optimizer_class"].endswith(saved.__name__)


@pytest.mark.parametrize("kind", [MyDistAdamW, MyAdamW])
@pytest.mark.parametrize("format", ["torch", "dcp", "universal"])
def test_a_derived_class_is_exported(kind: Any, format: Any, tmp_path: Path) -> None:
    model = model_of()
    optimizer = made(kind, model)
    train(model, optimizer)
    save(tmp_path / "ours", model, optimizer)
    export_checkpoint(tmp_path / "ours", tmp_path / "theirs" / "file", format)
    if format == "torch":
        again = model_of(1)
        other = torch.optim.AdamW(again.parameters(), lr=1e-2)
        content = torch.load(tmp_path / "theirs" / "file", weights_only=True)
        again.load_state_dict(content["model"])
        other.load_state_dict(content["optimizer"])
        expected, found = train(model, optimizer), train(again, other)
        assert all(torch.allclose(a, b, rtol=0, atol=1e-7) for a, b in zip(expected, found, strict=True))


def test_state_that_is_another_is_not_taken_for_adams(tmp_path: Path) -> None:
    model = model_of()
    optimizer = made(OneMoment, model)
    train(model, optimizer)
    save(tmp_path, model, optimizer)
    with pytest.raises(CheckpointError, match=r"state of OneMoment.* AdamW"):
        load(tmp_path, model, made(torch.optim.AdamW, model))
    with pytest.raises(CheckpointError, match="which a DistAdamW cannot use"):
        load(tmp_path, model, made(DistAdamW, model))


@pytest.mark.parametrize("kind", [MyDistAdamW, MyAdamW, MySGD])
def test_older_checkpoints_have_the_name_of_the_derived_class(kind: Any, tmp_path: Path) -> None:
    model = model_of()
    optimizer = made(kind, model)
    train(model, optimizer)
    save(tmp_path, model, optimizer)
    index = json.loads((tmp_path / "index.json").read_text())
    del index["sha256"], index["about"]["optimizer_class"]
    index["about"]["optimizer"] = kind.__name__
    write_index(tmp_path, index)
    load(tmp_path, model, optimizer)
    if kind is MyDistAdamW:
        load(tmp_path, model, made(DistAdamW, model))
        export_checkpoint(tmp_path, tmp_path.parent / f"{tmp_path.name}.pt", "torch")
