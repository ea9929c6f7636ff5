"""Describe a checkpoint in a short table."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dist_adamw.checkpoint.compatibility import samples_of
from dist_adamw.checkpoint.formats.content import understood
from dist_adamw.checkpoint.formats.finding import Found, find_checkpoint
from dist_adamw.checkpoint.local_state import MODEL
from dist_adamw.checkpoint.storage.index import Index, read_index
from dist_adamw.errors import CheckpointError, printable


@dataclass(frozen=True, slots=True)
class Description:
    """The description of a checkpoint; ``print`` it.

    Attributes:
        problem: What is wrong with the checkpoint; None: nothing was found.
        data: The facts as plain data.
        skipped: What is wrong with newer checkpoints in the folder.
    """

    problem: str | None
    data: Mapping[str, Any]
    skipped: tuple[str, ...]

    def __str__(self) -> str:
        data = self.data
        if "engine" not in data:  # the index cannot be read
            return f"whole  NO: {self.problem}"
        weights, files = data["weights"], data["files"]
        rows = {
            "checkpoint": data["checkpoint"],
            "written by": f"{data['written_by']}, {time.ctime(data['time'])}",
            "engine": f"{data['engine']}, {_count(data['world_size'], 'rank')}",
            "optimizer": f"{data['optimizer'] or 'none'}, {_count(data['updates'], 'update')}",
            "schedule": "none" if data["samples"] is None else f"{data['scheduler']} at {data['samples']:,} samples",
            "weights": f"{weights['elements']:,} in {weights['tensors']} tensors",
            "also saved": ", ".join(data["state"]) or "nothing",
            "files": f"{files['bytes']:,} bytes in {files['count']}",
            "whole": f"NO: {self.problem}" if self.problem else _WHOLE[data["verified"]],
        }
        width = max(map(len, rows))
        return "\n".join(f"{name:{width}}  {printable(value)}" for name, value in rows.items())


def _count(number: float, what: str) -> str:
    return f"{number:,.0f} {what}" + ("" if number == 1 else "s")


_WHOLE = {True: "yes, to the last bit", False: "all files have their sizes; --verify reads every bit"}


def describe(path: str | Path, *, verify: bool = False) -> Description:
    """Return a description of a checkpoint, or of the newest whole one of a run. Local.

    Args:
        path: See `find_checkpoint`.
        verify: Whether to read all files and compare checksums; otherwise only the index and sizes.

    Raises:
        CheckpointError: there is no checkpoint.
    """
    found = find_checkpoint(path, verify=verify)
    problem = None if found.is_checked else found.damage(verify=verify)
    try:
        facts = understood(found.path, partial(_facts, found))
    except CheckpointError as error:  # the index is damaged, so there is nothing to describe
        facts, problem = {}, str(error)
    # None: not known, since sizes alone do not say.
    whole = False if problem is not None else True if verify else None
    judged = {"whole": whole, "verified": verify, "problem": problem}
    return Description(problem, {"checkpoint": str(found.path), **judged, **facts}, found.skipped)


def _facts(found: Found) -> dict[str, Any]:
    index = read_index(found.path)
    about = index.about
    numels = [math.prod(saved.shape) for key, saved in index.tensors.items() if key.startswith(f"{MODEL}.")]
    return {
        "written_by": str(about.get("written by")),
        "time": float(about.get("time") or 0.0),
        "engine": about.get("engine"),
        "world_size": about.get("world_size"),
        "optimizer": about.get("optimizer"),
        "updates": _most_updates(index),
        "scheduler": about.get("scheduler"),
        "samples": samples_of(index),
        "weights": {"elements": sum(numels), "tensors": len(numels)},
        "state": sorted({key.partition(".")[0] for key in index.tensors} - {MODEL}),
        "files": {"count": len(index.files), "bytes": sum(size for size, _ in index.files.values())},
    }


def _most_updates(index: Index) -> float:
    """Return the most updates that any parameter has had: parameters that were frozen have fewer."""
    by_parameter = index.about.get("scalars", {})
    return max((values["step"] for values in by_parameter.values() if "step" in values), default=0)
