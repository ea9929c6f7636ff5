"""Digests of param groups: any change is seen, however the user makes it, and nothing else changes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dist_adamw.schedule.group_digests import GroupDigests

Groups = list[dict[str, Any]]


def groups() -> Groups:
    return [
        {
            "params": [],
            "lr": 1e-3,
            "weight_decay": 0.1,
            "betas": (0.9, 0.999),
            "eps": 1e-8,
            "name": "a",
            "list": [1, 2],
        },
        {"params": [], "lr": 2e-3, "weight_decay": 0.0, "betas": (0.9, 0.999), "eps": 1e-8, "t": torch.ones(2)},
    ]


def lasting() -> Groups:
    """Groups whose values cannot change in place."""
    return [{name: value for name, value in group.items() if name not in ("list", "t")} for group in groups()]


def rename(found: Groups) -> None:
    found[0]["beta"] = found[0].pop("betas")


def swap(found: Groups) -> None:
    found[0]["name"], found[0]["eps"] = found[0]["eps"], found[0]["name"]


IN_PLACE: list[Callable[[Groups], Any]] = [lambda g: g[0]["list"].append(3), lambda g: g[1]["t"].add_(1)]
OTHERS: list[Callable[[Groups], Any]] = [
    rename,
    swap,
    lambda g: g[1].update(eps=1e-7),
    lambda g: g[0].update(betas=(0.9, 0.99)),
    lambda g: g[1].update(more=None),
    lambda g: g.reverse(),
    lambda g: g.pop(),
]
WRITTEN: list[Callable[[Groups], Any]] = [lambda g: g[1].update(lr=2.1e-3), lambda g: g[0].update(weight_decay=0.2)]


@pytest.mark.parametrize("change", [*IN_PLACE, *OTHERS, *WRITTEN])
def test_a_change_is_another_digest(change: Callable[[Groups], Any]) -> None:
    digests, found = GroupDigests(), groups()
    before = digests.all_values(found)
    assert digests.all_values(found).digest == before.digest
    change(found)
    assert digests.all_values(found).digest != before.digest == GroupDigests().all_values(groups()).digest
    assert digests.all_values(found).value() != before.value()


@pytest.mark.parametrize("change", OTHERS)
def test_kept_digests_are_made_again_after_a_change(change: Callable[[Groups], Any]) -> None:
    digests, found = GroupDigests(), lasting()
    before = digests.others(found)
    found[0]["lr"] = 5.0
    assert digests.others(found) is before
    change(found)
    assert digests.others(found).digest != before.digest
    assert digests.others(found).digest == GroupDigests().others(found).digest


def test_a_digest_keeps_the_values_of_its_time() -> None:
    digests, found = GroupDigests(), groups()
    kept = digests.all_values(found)
    found[0]["list"].append(3)
    found[0]["lr"] = 0.0
    assert kept.value()[0]["list"] == [1, 2]
    assert kept.value()[0]["lr"] == 1e-3
    assert "params" not in kept.value()[0]
