"""Random sequences of what users do between updates, in one process: a part of ``python -m tests.random.optimizer``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dist_adamw import DistAdamW
from tests.random import worlds
from tests.random.actions import draw
from tests.random.optimizer import judge, shortest


def test_torchs_bits_or_one_sentence(tmp_path: Path) -> None:
    tally = judge([draw(2, number) for number in range(150)], tmp_path)
    for sequence, failure in tally.failures[:1]:
        short, how = shortest(sequence, failure, tmp_path)
        raise AssertionError(
            f"{len(tally.failures)} differ, one of them:\n{short.readable()}\n=> {how.kind}: {how.what}"
        )
    assert tally.updates > 500
    assert sum(tally.sentences.values()) > 5


class Forgetful(DistAdamW):
    """Moves one element by an ulp when a moment is zero where the update before left another value."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        reset = any(
            "exp_avg" in state and not state["exp_avg"].any() and state["step"] > 0 for state in self.state.values()
        )
        loss = super().step(closure)
        if reset:
            param = self.param_groups[0]["params"][0]
            param.view(-1)[:1] = torch.nextafter(param.view(-1)[:1].float(), torch.tensor(9.0)).to(param.dtype)
        return loss


def test_a_mistake_is_found_and_shown_in_few_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"master_dtype", "state_dtype"}
    drawn = [draw(3, number) for number in range(120)]
    native = [sequence for sequence in drawn if not options & sequence.options.keys()]
    monkeypatch.setattr(worlds, "DistAdamW", Forgetful)
    tally = judge(native, tmp_path)
    assert tally.failures
    short, how = shortest(*tally.failures[0], tmp_path)
    assert how.kind == "bits"
    assert len(short.acts) <= 5, short.readable()
