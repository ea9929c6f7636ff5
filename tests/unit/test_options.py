"""The digest of hyper-parameters: other for every other value, the same in every process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from dist_adamw.optimizer.options import OptionsDigest
from tests.conftest import ROOT

Groups = list[dict[str, Any]]
MORE = (1.0, True, False)


def groups(lr: Any) -> Groups:
    common = {"eps": 1e-8, "weight_decay": 0.1, "amsgrad": False, "maximize": False}
    return [{"lr": lr, "betas": (0.9, 0.999), **common}, {"lr": 1e-3, "betas": (0.9, 0.99), **common}]


CHANGES: dict[str, Callable[[Groups], Any]] = {
    "lr": lambda g: g[0].update(lr=0.2),
    "lr of the second group": lambda g: g[1].update(lr=2e-3),
    "the first beta": lambda g: g[1].update(betas=(0.8, 0.99)),
    "the second beta": lambda g: g[0].update(betas=(0.9, 0.9999)),
    "betas of another type": lambda g: g[0].update(betas=[0.9, 0.9999]),
    "a third beta": lambda g: g[0].update(betas=(0.9, 0.999, 0.5)),
    "eps": lambda g: g[1].update(eps=1e-7),
    "weight_decay": lambda g: g[0].update(weight_decay=0.0),
    "amsgrad": lambda g: g[1].update(amsgrad=True),
    "maximize": lambda g: g[0].update(maximize=True),
    "two groups exchanged": lambda g: g.reverse(),
    "a group less": lambda g: g.pop(),
    "no lr": lambda g: g[0].pop("lr"),
}


@pytest.mark.parametrize("case", CHANGES)
@pytest.mark.parametrize("tensor", [False, True])
def test_every_option_counts(case: str, tensor: bool) -> None:
    digest, now = OptionsDigest(), groups(torch.tensor(0.1) if tensor else 0.1)
    before = digest.of(now, MORE)
    assert digest.of(now, MORE) == before
    CHANGES[case](now)
    assert digest.of(now, MORE) != before
    assert digest.of(groups(torch.tensor(0.1) if tensor else 0.1), MORE) == before


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)])
@pytest.mark.parametrize("place", range(3))
def test_so_do_the_other_numbers(place: int, lr: Any) -> None:
    changed = [*MORE]
    changed[place] = 0.25
    digest = OptionsDigest()
    assert digest.of(groups(lr), MORE) != digest.of(groups(lr), tuple(changed))


def test_a_tensor_may_change_in_place() -> None:
    digest, now = OptionsDigest(), groups(torch.tensor(0.1))
    before = digest.of(now, MORE)
    now[0]["lr"].mul_(0.5)
    assert digest.of(now, MORE) != before


def test_so_may_a_list_of_betas() -> None:
    digest, now = OptionsDigest(), groups(0.1)
    now[1]["betas"] = [0.9, 0.99]
    before = digest.of(now, MORE)
    now[1]["betas"][0] = 0.8
    assert digest.of(now, MORE) != before


def test_a_number_is_no_tensor_of_its_value() -> None:
    """torch rounds 0.1 to fp32 in comparing them, and an update by either has other bits."""
    digest = OptionsDigest()
    before = digest.of(groups(0.1), MORE)
    assert digest.of(groups(torch.tensor(0.1)), MORE) != before


def test_every_process_has_the_same() -> None:
    script = (
        "import torch; from tests.unit.test_options import *; digest = OptionsDigest(); "
        "print(*[digest.of(groups(lr), (-1.0, *MORE)) for lr in (0.1, torch.tensor(0.1), None)])"
    )
    jobs = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in ("1", "2")
    ]
    one, other = (job.communicate(timeout=100)[0] for job in jobs)
    assert len(set(one.split())) == 3
    assert one == other
