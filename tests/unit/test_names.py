"""Names in a checkpoint are those of the model without wrappers, and no two weights share one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from dist_adamw import DistAdamW, load, save
from dist_adamw.checkpoint.local_state import parameter_names
from dist_adamw.errors import CheckpointError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(3, 3) for _ in range(3))
        self.module = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.module(self.third(self.second(self.first(x))))


def test_wrappers_inside_the_model_leave_no_trace(tmp_path: Path) -> None:
    torch.manual_seed(0)
    wrapped: Any = Net()
    plain = list(parameter_names(Net()).values())
    wrapped.first = torch.compile(wrapped.first)
    wrapped.second = checkpoint_wrapper(wrapped.second)
    wrapped.third = nn.DataParallel(wrapped.third)
    wrapped.module = nn.DataParallel(wrapped.module)
    assert list(parameter_names(wrapped).values()) == plain
    save(tmp_path / "c", wrapped, DistAdamW(wrapped.parameters()))
    torch.manual_seed(1)
    model = Net()
    load(tmp_path / "c", model, DistAdamW(model.parameters()))
    for p, q in zip(wrapped.parameters(), model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_name_that_ends_like_a_wrapper_is_the_users(tmp_path: Path) -> None:
    def make(seed: int) -> Any:
        torch.manual_seed(seed)
        model: Any = nn.Module()
        model.a_orig_mod = nn.Linear(3, 3, bias=False)
        model.aweight = nn.Parameter(torch.randn(4))
        return model

    model, other = make(0), make(1)
    save(tmp_path / "c", model, DistAdamW(model.parameters()))
    load(tmp_path / "c", other, DistAdamW(other.parameters()))
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def test_two_weights_of_one_name_are_refused(tmp_path: Path) -> None:
    model: Any = nn.Module()
    model.net = nn.Module()
    model.net.weight = nn.Parameter(torch.zeros(3))
    model.net._orig_mod = nn.Linear(3, 3)
    with pytest.raises(CheckpointError, match=r"'net\.weight' and 'net\._orig_mod\.weight' are both 'net\.weight'"):
        save(tmp_path / "c", model, DistAdamW(model.parameters()))
    assert not (tmp_path / "c").exists()
