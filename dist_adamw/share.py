"""What a state dict says of the share it holds, and whether it fits an optimizer.

Floor 2: knows shards and the format of DistAdamW's state dicts; ``optimizer.py`` asks before it
changes anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dist_adamw.partition import FlatLayout
from dist_adamw.shard import MASTERS, MOMENTS, Shard


def describe_share(shards: Sequence[Shard], params: Sequence[Tensor]) -> dict[str, Any] | None:
    """Which elements of the state ``shards`` hold, as plain data; None for all of them.

    Args:
        params: Every parameter of the optimizer; the description has their places in it.
    """
    if not shards or shards[0].process_group is None:
        return None
    index = {id(param): i for i, param in enumerate(params)}
    return {
        "rank": shards[0].rank,
        "world_size": shards[0].layout.world_size,
        "shards": [[index[id(param)] for param in shard.params] for shard in shards],
        "ranges": {index[id(param)]: shard.ranges_of(i) for shard in shards for i, param in enumerate(shard.params)},
    }


def check_share(
    share: Mapping[str, Any], params: Sequence[Tensor], here: tuple[int, int], bucket_numel: int | None, lean: bool
) -> None:
    """Refuse a share of another rank, or one that was cut otherwise.

    Args:
        here: This rank and the world size that the state is shared over.
        bucket_numel: Of the optimizer's layout, as ``lean`` is.

    Raises:
        ValueError: it does not fit; says what it is of, and what would fit.
    """
    rank, world_size = here
    if (share["rank"], share["world_size"]) != here:
        raise ValueError(
            f"this state is the share of rank {share['rank']} of {share['world_size']}, and this is rank {rank} of "
            f"{world_size}. Save and load with accelerator.save_state and load_state after dist_adamw.prepare: "
            "that keeps every rank's share and loads on any number of ranks."
        )
    for members in share["shards"]:
        layout = FlatLayout(tuple(params[i].numel() for i in members), world_size, bucket_numel, lean)
        for i, ranges in zip(members, layout.ranges(rank), strict=True):
            if ranges != share["ranges"][i]:
                raise ValueError(
                    f"this share has elements {share['ranges'][i]} of parameter {i}, and this rank owns {ranges}: "
                    "it is of another model, or was made with another bucket_numel."
                )


def check_shapes(state_dict: Mapping[str, Any], params: Sequence[Tensor]) -> None:
    """Refuse moments that are not of the parameters' shapes, or of the share's sizes.

    Raises:
        ValueError: names the moment, the parameter and both shapes.
    """
    share = state_dict.get("share")
    for i, param in enumerate(params):
        whole = param.shape
        if share is not None:
            whole = torch.Size([sum(stop - start for start, stop in share["ranges"].get(i, []))])
        for key in (*MOMENTS, *MASTERS):
            value = state_dict["state"].get(i, {}).get(key)
            if value is not None and value.shape != whole:
                raise ValueError(
                    f"{key} of parameter {i} has shape {tuple(value.shape)}, but {tuple(whole)} is needed here. "
                    "The state is of another model, or its groups are in another order."
                )
