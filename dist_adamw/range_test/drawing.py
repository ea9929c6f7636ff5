"""Draw the curve of a range test as a PNG."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path


def draw_range(
    path: str | Path,
    lrs: Sequence[float],
    losses: Sequence[float],
    smoothed: Sequence[float],
    suggested: tuple[float | None, float | None],
    title: str,
) -> Path:
    """Draw loss over lr, with the suggested range. Local.

    Raises:
        ModuleNotFoundError: matplotlib is missing; install dist_adamw[tracking].
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("drawing needs matplotlib: pip install 'dist_adamw[tracking]'") from error
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axis = figure.subplots()
    axis.plot(lrs, losses, linewidth=0.9, alpha=0.45, color="tab:blue", label="loss")
    axis.plot(lrs, smoothed, linewidth=1.8, color="tab:blue", label="smoothed")
    axis.set_xscale("log")
    low, high = suggested
    if low is not None and high is not None:
        axis.axvspan(low, high, color="tab:green", alpha=0.12, label=f"suggested: {low:.1e} to {high:.1e}")
        for edge in (low, high):
            axis.axvline(edge, color="tab:green", linewidth=1.0, linestyle="--")
    if losses:
        # A loss that explodes would flatten the curve.
        start, best = statistics.median(losses[: max(4, len(losses) // 10)]), min(smoothed)
        room = max(start - best, 0.05 * abs(start), 1e-12)
        axis.set_ylim(min(*losses, best) - 0.1 * room, start + 0.6 * room)
    axis.set_xlabel("learning rate")
    axis.set_ylabel("loss")
    axis.set_title(title, fontsize=10)
    axis.grid(alpha=0.25)
    figure.legend(loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    path = Path(path).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return path
