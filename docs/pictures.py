"""Draw the pictures of concepts.md: `python docs/pictures.py` writes docs/pictures/*.svg.

Curves are those of the package; boxes are drawn for a few round numbers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from dist_adamw import CyclicLRWithRestarts, DistAdamW, Preview

COLOURS = ["#4878a8", "#e1974c", "#6aa56a", "#b5638f"]  # of ranks 0 to 3
GREY = "#8a8a8a"
BATCH, EPOCH = 32, 512


def preview(epochs: float, **options: Any) -> Preview:
    import torch

    decay = options.pop("weight_decay", 0.05)
    optimizer = DistAdamW([torch.zeros(1)], lr=1e-3, weight_decay=decay)
    scheduler = CyclicLRWithRestarts(optimizer, BATCH, EPOCH, min_lr=0, **options)
    return scheduler.preview(points=2000, total_samples=round(epochs * EPOCH))


def box(axis: Any, x: float, y: float, width: float, height: float, text: str = "", **style: Any) -> None:
    axis.add_patch(Rectangle((x, y), width, height, **{"edgecolor": "white", "linewidth": 1.0, **style}))
    if text:
        axis.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=8, color="white")


def empty(axis: Any, xlim: tuple[float, float], ylim: tuple[float, float]) -> None:
    axis.set_xlim(*xlim)
    axis.set_ylim(*ylim)
    axis.axis("off")


def clock(figure: Figure) -> None:
    """One curve over samples, and three jobs whose updates cut the same samples in different ways."""
    figure.set_size_inches(8, 3.6)
    curve, jobs = figure.subplots(2, 1, sharex=True, height_ratios=[1, 1.3])
    shown = preview(0.5, restart_period=0.25, t_mult=1)
    curve.plot(shown.samples, [lr * 1e3 for lr in shown.lr], color="black", linewidth=1.5)
    curve.set_ylabel("lr, 1e-3")
    curve.set_ylim(0, 1.1)
    curve.set_xticks(range(0, 257, 32))
    rows: list[tuple[str, list[list[tuple[int, str]]]]] = [
        ("1 rank", [[(32, "0")]] * 8),
        ("2 ranks", [[(16, "0"), (16, "1")]] * 8),
        ("1 rank,\naccumulating 4", [[(8, "0")] * 4] * 8),
    ]
    for row, (name, updates) in enumerate(rows):
        y = 2 - row
        jobs.text(-4, y + 0.35, name, ha="right", va="center", fontsize=9)
        x = 0
        for update in updates:
            for samples, rank in update:
                box(jobs, x, y, samples, 0.7, rank, facecolor=COLOURS[int(rank)])
                x += samples
            jobs.plot([x, x], [y - 0.1, y + 0.8], color="black", linewidth=1.2)
    empty(jobs, (0, 256), (-0.9, 2.9))
    for samples in range(0, 257, 32):
        jobs.text(samples, -0.35, str(samples), ha="center", fontsize=8)
    jobs.text(128, -0.85, "samples of applied updates; a vertical line is an update", ha="center", fontsize=9)


def restarts(figure: Figure) -> None:
    """Three policies with cycles of 1, 2 and 4 epochs."""
    figure.set_size_inches(8, 4.6)
    policies: list[tuple[str, dict[str, Any]]] = [
        ('policy="cosine"', {}),
        ('policy="wsd", decay_length="20%", rewarmup="2%"', {"policy": "wsd", "decay_length": "20%", "rewarmup": "2%"}),
        ('policy="triangular", peak_factor=0.7', {"policy": "triangular", "peak_factor": 0.7}),
    ]
    for axis, (name, options) in zip(figure.subplots(3, 1, sharex=True), policies, strict=True):
        shown = preview(7, restart_period=1, t_mult=2, **options)
        epochs = [samples / EPOCH for samples in shown.samples]
        axis.plot(epochs, [lr * 1e3 for lr in shown.lr], color=COLOURS[0], linewidth=1.5)
        axis.set_title(name, fontsize=9, loc="left", family="monospace")
        axis.set_ylim(0, 1.1)
        for end in (1, 3, 7):
            axis.axvline(end, color=GREY, linewidth=0.8, linestyle=":")
        axis.set_ylabel("lr, 1e-3")
        axis.set_xticks(range(8))
    axis.set_xlabel("epochs (dotted: ends of cycles)")


def decay(figure: Figure) -> None:
    """The part of the weights that one update takes away, in the three readings."""
    figure.set_size_inches(8, 3.4)
    axis = figure.subplots()
    readings: list[tuple[str, dict[str, Any]]] = [
        ("AdamWR: weight_decay=0.05 is lambda_norm", {}),
        (
            'torch: weight_decay=2, weight_decay_norm="first_cycle"',
            {"weight_decay": 2.0, "weight_decay_norm": "first_cycle"},
        ),
        ('weight_decay_timescale="1 epoch"', {"weight_decay_timescale": "1 epoch"}),
    ]
    for i, (name, options) in enumerate(readings):
        shown = preview(7, restart_period=1, t_mult=2, **options)
        epochs = [samples / EPOCH for samples in shown.samples]
        at_base = [
            d * 1e-3 / lr if d is not None and lr > 1e-6 else float("nan")
            for d, lr in zip(shown.decay, shown.lr, strict=True)
        ]
        axis.plot(epochs, at_base, color=COLOURS[i], linewidth=1.8, label=name)
    for end in (1, 3):
        axis.axvline(end, color=GREY, linewidth=0.8, linestyle=":")
    axis.set_yscale("log")
    axis.set_ylim(5e-4, 0.4)
    axis.set_ylabel("decay of an update at the base lr")
    axis.set_xlabel("epochs (dotted: restarts)")
    axis.legend(fontsize=8, loc="upper right")


def sharding(figure: Figure) -> None:
    """Parameters one after the other, cut into buckets, and each bucket into a slice for each of three ranks."""
    figure.set_size_inches(8, 3.0)
    axis = figure.subplots()
    sizes = [("embedding", 40), ("attention", 24), ("bias", 3), ("mlp", 26), ("bias", 3)]
    x = 0.0
    for i, (name, size) in enumerate(sizes):
        box(axis, x, 3.0, size, 0.8, name if size > 5 else "", facecolor="#5c5c5c" if i % 2 else GREY)
        x += size
    for bucket in range(3):
        start, third = bucket * 32, 32 / 3
        box(axis, start + 0.2, 1.8, 31.6, 0.8, f"bucket {bucket}", facecolor="#333333")
        for rank in range(3):
            box(axis, start + rank * third, 0.6, third, 0.8, f"rank {rank}", facecolor=COLOURS[rank])
    notes = ["parameters", "buckets", "gradients are sent to,\nand state is kept by"]
    for y, name in zip((3.4, 2.2, 1.0), notes, strict=True):
        axis.text(-2, y, name, ha="right", va="center", fontsize=9)
    axis.text(48, 0.1, "elements", ha="center", fontsize=9)
    empty(axis, (-26, 96), (0, 4))


def checkpoints(figure: Figure) -> None:
    """Two ranks write, three read: the index has the region of every element."""
    figure.set_size_inches(8, 3.4)
    axis = figure.subplots()
    writers = [(0, 48), (48, 48)]
    for rank, (start, size) in enumerate(writers):
        box(
            axis,
            start,
            3.4,
            size - 0.5,
            0.8,
            f"rank {rank} of 2: exp_avg[{start}:{start + size}]",
            facecolor=COLOURS[rank],
        )
        box(axis, start + 8, 1.9, size - 16, 0.7, f"...-0000{rank}.safetensors", facecolor=GREY)
        _arrow(axis, start + size / 2, 3.35, start + size / 2, 2.65)
    box(axis, 100, 1.9, 20, 0.7, "index.json", facecolor="#333333")
    axis.text(110, 2.85, "written last", ha="center", fontsize=8)
    for rank, (start, size) in enumerate([(0, 32), (32, 32), (64, 32)]):
        box(axis, start, 0.3, size - 0.5, 0.8, f"rank {rank} of 3: [{start}:{start + size}]", facecolor=COLOURS[rank])
        for first, length in writers:
            low, high = max(start, first), min(start + size, first + length)
            if low < high:
                _arrow(
                    axis,
                    first + 8 + (low + high - 2 * first) / 2 * (length - 16) / length,
                    1.85,
                    (low + high) / 2,
                    1.15,
                )
    for y, name in zip((3.8, 2.25, 0.7), ("DDP", "a folder", "ZeRO-2"), strict=True):
        axis.text(-2, y, name, ha="right", va="center", fontsize=9)
    empty(axis, (-14, 122), (0.1, 4.4))


def _arrow(axis: Any, x: float, y: float, to_x: float, to_y: float) -> None:
    axis.annotate("", (to_x, to_y), (x, y), arrowprops={"arrowstyle": "->", "color": "#555555"})


PICTURES: Sequence[Callable[[Figure], None]] = (clock, restarts, decay, sharding, checkpoints)


def main(folder: Path) -> list[Path]:
    """Draw every picture; return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    with mpl.rc_context({"svg.hashsalt": "dist_adamw", "svg.fonttype": "path"}):
        for draw in PICTURES:
            figure = Figure(layout="constrained", facecolor="white")
            draw(figure)
            paths.append(folder / f"{draw.__name__}.svg")
            figure.savefig(paths[-1], metadata={"Date": None})
    return paths


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "pictures")
