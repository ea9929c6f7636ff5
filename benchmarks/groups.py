"""The recipe of all benchmarks, and parameter groups as scripts make them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from torch import Tensor

RECIPE: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
GROUPS = ("one", "decay", "layerwise")
LAYER_DECAY = 0.9  # lr of a layer over that of the next
Group = dict[str, Any]


def parameter_groups(layers: Sequence[Sequence[Tensor]], way: str) -> list[Group]:
    """Return groups for an optimizer.

    Args:
        layers: The parameters by layer, the first layer first.
        way: ``one``: one group. ``decay``: tensors of two and more dimensions decay, the others do not.
            ``layerwise``: that distinction in each layer, and lr falls by LAYER_DECAY with each layer away from the
            last.
    """
    if way == "one":
        return [{"params": [param for layer in layers for param in layer]}]
    if way == "decay":
        return _by_kind([param for layer in layers for param in layer])
    groups = []
    for depth, layer in enumerate(layers):
        lr = RECIPE["lr"] * LAYER_DECAY ** (len(layers) - 1 - depth)
        groups += [{**group, "lr": lr} for group in _by_kind(layer)]
    return groups


def _by_kind(params: Sequence[Tensor]) -> list[Group]:
    decayed = {"params": [p for p in params if p.ndim >= 2], "weight_decay": RECIPE["weight_decay"]}
    others = {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0}
    return [group for group in (decayed, others) if group["params"]]


def equal_groups(params: Sequence[Tensor], count: int) -> list[Group]:
    """Return ``count`` groups of about equally many parameters, in order."""
    ends = [len(params) * k // count for k in range(count + 1)]
    return [{"params": list(params[a:b])} for a, b in itertools.pairwise(ends)]
