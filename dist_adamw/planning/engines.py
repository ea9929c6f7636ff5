"""The engines that can be planned, by name."""

from __future__ import annotations

from collections.abc import Callable

from dist_adamw.planning.fsdp2 import FSDP2, fsdp2
from dist_adamw.planning.memory import Cost, Setup
from dist_adamw.planning.model import ModelShapes
from dist_adamw.planning.own import DDP, ONE, TORCH_DDP, one_process, sharded_ddp, torch_ddp
from dist_adamw.planning.zero import ZERO, zero_1, zero_2
from dist_adamw.planning.zero3 import zero_3

ENGINES: dict[str, Callable[[ModelShapes, int, Setup], Cost]] = {
    ONE: one_process,
    DDP: sharded_ddp,
    TORCH_DDP: torch_ddp,
    FSDP2: fsdp2,
    ZERO[1]: zero_1,
    ZERO[2]: zero_2,
    ZERO[3]: zero_3,
}


def engines_for(ranks: int, setup: Setup) -> list[str]:
    """Return the engines that ``ranks`` ranks can use: one process is alone, the others are several."""
    if ranks == 1:
        return [ONE]
    refused = set(ZERO.values()) if setup.reproducible else set()
    return [name for name in ENGINES if name != ONE and name not in refused]


def cost_of(engine: str, model: ModelShapes, ranks: int, setup: Setup) -> Cost:
    """Return what ``engine`` needs on ``ranks`` ranks. Local."""
    return ENGINES[engine](model, ranks, setup)
