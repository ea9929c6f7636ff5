"""Describe a checkpoint in a short table."""

from __future__ import annotations

import math
import time
from functools import partial
from pathlib import Path

from dist_adamw.checkpoint.compatibility import samples_of
from dist_adamw.checkpoint.formats.content import understood
from dist_adamw.checkpoint.local_state import MODEL
from dist_adamw.checkpoint.storage.index import Index, damage, read_index
from dist_adamw.errors import printable


def describe(path: str | Path) -> tuple[str, bool]:
    """Return a short table that describes a checkpoint, and whether it is whole. Reads all of it. Local.

    Raises:
        CheckpointError: the index is missing or damaged.
    """
    return understood(Path(path), partial(_table, read_index(path)))


def _table(index: Index) -> tuple[str, bool]:
    about, samples = index.about, samples_of(index)
    numels = [math.prod(saved.shape) for key, saved in index.tensors.items() if key.startswith(f"{MODEL}.")]
    kinds = sorted({key.partition(".")[0] for key in index.tensors} - {MODEL})
    nbytes = sum(size for size, _ in index.files.values())
    wrong = damage(index.folder)
    rows = {
        "written by": f"{about.get('written by')}, {time.ctime(about.get('time'))}",
        "engine": f"{about.get('engine')}, {about.get('world_size')} rank(s)",
        "optimizer": f"{about.get('optimizer') or 'none'}, {_most_updates(index):,.0f} update(s)",
        "schedule": "none" if samples is None else f"{about.get('scheduler')} at {samples:,} samples",
        "weights": f"{sum(numels):,} in {len(numels)} tensors",
        "beside them": ", ".join(kinds) or "nothing",
        "files": f"{nbytes:,} bytes in {len(index.files)}",
        "whole": "yes, to the last bit" if wrong is None else f"NO: {wrong}",
    }
    width = max(map(len, rows))
    return "\n".join(f"{name:{width}}  {printable(value)}" for name, value in rows.items()), wrong is None


def _most_updates(index: Index) -> float:
    """Return the most updates that any parameter has had: parameters that were frozen have fewer."""
    by_parameter = index.about.get("scalars", {})
    return max((values["step"] for values in by_parameter.values() if "step" in values), default=0)
