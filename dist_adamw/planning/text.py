"""A plan as text, and sizes from text."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from fractions import Fraction

from dist_adamw.planning.memory import Cost, Setup
from dist_adamw.planning.model import ModelShapes
from dist_adamw.planning.schedule import SchedulePlan
from dist_adamw.schedule.batch import GlobalBatch, shown

_UNITS = {"b": 1} | {f"{k}ib": 1 << 10 * n for n, k in enumerate("kmgt", 1)}
_UNITS |= {f"{k}b": 1000**n for n, k in enumerate("kmgt", 1)}
_TITLES = ("engine", "parameters", "gradients", "state", "buckets, layers", "activations", "total", "sent")


def read_bytes(name: str, value: str | int) -> int:
    """Return a number of bytes: an int, or a text with a unit, such as "80GiB" (80 x 1024^3) or "80 GB" (1000^3).

    Raises:
        ValueError: it is something else.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    match = re.fullmatch(r"([0-9][0-9_]*\.?[0-9]*)\s*([a-z]+)", str(value).strip().lower())
    if match is None or match[2] not in _UNITS or len(match[1]) > 30:
        raise ValueError(
            f'{name} must be a size with its unit, such as "80GiB" or "512MiB" (powers of 1024), or "80GB" (1000^3), '
            f"got {shown(value)}."
        )
    return math.floor(Fraction(match[1].replace("_", "")) * _UNITS[match[2]])


def in_units(nbytes: int) -> str:
    """Return a number of bytes with its unit, such as "1.50 GiB"."""
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if nbytes >= unit:
            return f"{nbytes / unit:,.2f} {name}"
    return f"{nbytes} B"


def model_text(model: ModelShapes) -> str:
    """Describe a model."""
    trained, numel = sum(param.numel for param in model.trained), model.numel
    frozen = "" if trained == numel else f", of which {trained:,} are trained"
    dtypes = ", ".join(sorted({str(param.dtype).removeprefix("torch.") for param in model.parameters}))
    tensors = f"{len(model.parameters):,} tensor{'s' if len(model.parameters) != 1 else ''}"
    lines = [f"model: {model.source}", f"  {numel:,} parameters{frozen} ({dtypes}) in {tensors}"]
    if model.layers:
        lines.append(f"  {len(model.layers)} layers that FSDP2 shards one by one: {model.layers[0]} and so on")
    return "\n".join(lines)


def schedule_text(schedule: SchedulePlan) -> str:
    """Describe batches, updates and restarts."""
    lines = []
    if schedule.batches is not None:
        lines.append(f"global batch: {schedule.batches}")
    if schedule.updates is not None:
        lines.append(f"updates: {schedule.updates:,} for {schedule.total_samples:,} samples")
    if schedule.preview is not None:
        lines.append(str(schedule.preview))
    return "\n".join(lines)


def ranks_text(ranks: int, batch: GlobalBatch | None, costs: Sequence[Cost], problem: str) -> str:
    """Return the table of one number of ranks."""
    head = f"{ranks:,} rank{'s' if ranks > 1 else ''}"
    if problem:
        return f"{head}: {problem}"
    if batch is not None:
        head += f": {batch}"
    return "\n".join([f"{head}; memory of the largest rank, and bytes that a rank sends per update", *_table(costs)])


def fits_text(memory: int, fits: Sequence[tuple[str, bool, Cost]], most_ranks: int) -> str:
    """Return the table of the smallest numbers of ranks: engine, whether it fits, and what it needs."""
    if not fits:
        return f"no number of ranks up to {most_ranks:,} divides the global batch into micro-batches"
    lines = [f"the fewest ranks with {in_units(memory)} each"]
    width = max(len(engine) for engine, _, _ in fits)
    for engine, does_fit, cost in fits:
        needs = in_units(cost.memory.total)
        if does_fit:
            found = f"{cost.ranks:>6,}  needs {needs} on each"
        else:
            found = f"  none  needs {needs} on each of {cost.ranks:,}"
        lines.append(f"  {engine:<{width}}  {found}")
    return "\n".join(lines)


def uncounted(setup: Setup) -> str:
    """Say what is missing from the totals."""
    given = "are as given" if setup.activations else "are not known here and count as 0: give their size"
    return (
        f"Activations {given}.\n"
        "Not counted: what the device's driver, its libraries and fragmentation take. "
        f"DeepSpeed's bucket has {setup.reduce_bucket_size:,} elements.\n"
        "Not planned: meshes of two axes (HSDP), tensor and pipeline parallelism, and offload to the CPU."
    )


def _table(costs: Sequence[Cost]) -> list[str]:
    rows: list[tuple[str, ...]] = [_TITLES]
    for cost in costs:
        memory = cost.memory
        parts = (memory.parameters, memory.gradients, memory.state, memory.staging, memory.activations, memory.total)
        rows.append((cost.engine, *map(in_units, (*parts, cost.sent))))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, *cells in rows:
        aligned = [f"{cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("  ".join(["", f"{name:<{widths[0]}}", *aligned]))
    return [*lines, *(f"  {cost.engine}: {cost.note}" for cost in costs if cost.note)]
