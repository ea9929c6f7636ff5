"""Reports of the main job: its history as CSV, the curves as a picture, and short tables."""

from __future__ import annotations

import contextlib
import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from dist_adamw import Preview
from dist_adamw.schedule.plot import Line, Panel, Picture


@dataclass(frozen=True, slots=True)
class Row:
    """One update.

    Attributes:
        samples: Global samples after the update.
        loss: Mean over its global batch, before the update; nats per byte.
        lr: The learning rate of the update.
        weight_decay: The weight decay of the update, in the first parameter group.
        val_loss: Loss on held-out text after the update; None if not measured.
        seconds: Training time so far.
    """

    samples: int
    loss: float
    lr: float
    weight_decay: float
    val_loss: float | None
    seconds: float


class History:
    """``history.csv``: one row per update, written at once.

    Floats are written with repr, so two histories can be compared bit for bit.

    Args:
        path: The file; rows after ``samples`` are removed from it.
        samples: The samples at which the job resumes; 0 for a new one.
    """

    def __init__(self, path: Path, samples: int) -> None:
        self.rows = [row for row in read_history(path) if row.samples <= samples] if samples else []
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        self._file = partial.open("w", newline="")
        self._writer = csv.writer(self._file, lineterminator="\n")
        self._writer.writerow(field.name for field in fields(Row))
        for row in self.rows:
            self._write(row)
        partial.replace(path)

    @property
    def seconds(self) -> float:
        """Training time up to the last row."""
        return self.rows[-1].seconds if self.rows else 0.0

    def append(self, row: Row) -> None:
        """Add ``row``, in memory and on disk."""
        self.rows.append(row)
        self._write(row)

    def _write(self, row: Row) -> None:
        self._writer.writerow("" if value is None else repr(value) for value in astuple(row))
        self._file.flush()


def read_history(path: Path) -> list[Row]:
    """Return the rows of a history file, without truncated or damaged lines."""
    if not path.exists():
        return []
    lines = [line for line in path.read_text(errors="replace").splitlines(keepends=True) if line.endswith("\n")]
    rows = []
    for line in lines[1:]:
        with contextlib.suppress(ValueError, csv.Error):  # a power failure can leave garbage
            samples, loss, lr, decay, val, seconds = next(csv.reader([line]))
            rows.append(
                Row(int(samples), float(loss), float(lr), float(decay), float(val) if val else None, float(seconds))
            )
    return rows


def draw(path: Path, rows: Sequence[Row], preview: Preview, levels: Mapping[str, float], title: str) -> None:
    """Draw loss, lr, and weight decay in the recipe's reading, as a PNG with restarts marked.

    The loss and the lr of an update stand at the sample at which it began, the held-out loss where it ended.
    """
    assert preview.batches is not None
    end = rows[-1].samples
    # The history may begin with the update after a resume.
    first = max(0, rows[0].samples - preview.batches.at(rows[0].samples - 1))
    begins = [first, *(row.samples for row in rows[:-1])]
    measured = [row for row in rows if row.val_loss is not None]
    held_out = Line(
        "held out", [row.samples for row in measured], [row.val_loss or 0.0 for row in measured], has_points=True
    )
    steps = [sample for begin, row in zip(begins, rows, strict=True) for sample in (begin, row.samples)]
    panels = [
        Panel("loss", [Line("training", begins, [row.loss for row in rows]), held_out], levels, begins_at_zero=False),
        Panel("lr", [Line("", steps, [row.lr for row in rows for _ in range(2)])]),
    ]
    curves = preview.curves()
    for label, values in curves.values.items():
        if label != "lr":
            points = [(x, y) for x, y in zip(curves.x, values, strict=True) if first <= x <= end]
            panels.append(Panel(label, [Line("", [x for x, _ in points], [y for _, y in points])]))
    restarts = [sample for sample in curves.restarts if first < sample < end]
    Picture(panels, "samples", restarts, (curves.x, curves.epochs), title).save(path)


def loss_table(levels: Mapping[str, float]) -> str:
    """Return a table of losses, given in nats per byte."""
    width = max(34, *(len(name) + 2 for name in levels))
    lines = [f"{'':<{width}}{'nats/byte':>10}{'bits/byte':>11}"]
    lines += [f"{name:<{width}}{nats:>10.3f}{nats / math.log(2):>11.3f}" for name, nats in levels.items()]
    return "\n".join(lines)


def memory_table(parameters: int, ranks: int) -> str:
    """Return a table of each rank's memory in fp32, without activations."""
    parts = {"parameters": 4 * parameters, "gradients": 4 * parameters, "optimizer state": 8 * parameters / ranks}
    lines = [f"  {name:<16}{megabytes(size):>12}" for name, size in {**parts, "total": sum(parts.values())}.items()]
    return "\n".join(["memory per rank (fp32, without activations):", *lines])


def megabytes(size: float) -> str:
    """Return ``size`` bytes as text in MB."""
    return f"{size / 1e6:,.1f} MB"
