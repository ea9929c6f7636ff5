"""Draw curves over samples as a PNG, with restarts marked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_Line = tuple[str, Sequence[float], Sequence[float]]  # name, abscissae, values


def plot_curves(
    path: str | Path,
    samples: Sequence[float],
    curves: Mapping[str, Sequence[float] | tuple[Sequence[float], Sequence[float]]],
    restarts: Sequence[float] = (),
    *,
    title: str = "",
    levels: Mapping[str, Mapping[str, float]] | None = None,
) -> Path:
    """Draw one panel per curve above a shared axis of samples.

    Args:
        path: The PNG to write.
        samples: Abscissae of the curves without their own.
        curves: By label: values, or (abscissae, values). Labels that share the part before
            a colon share a panel ("loss: training", "loss: held out").
        restarts: Samples at which to draw dotted lines.
        levels: By panel, the labels and values of horizontal lines.

    Raises:
        ModuleNotFoundError: matplotlib is missing; install dist_adamw[tracking].
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("drawing needs matplotlib: pip install 'dist_adamw[tracking]'") from error
    panels: dict[str, list[_Line]] = {}
    for label, curve in curves.items():
        x, y = _points(curve, samples)
        panel, _, name = label.partition(": ")
        panels.setdefault(panel, []).append((name, x, y))
    figure = Figure(figsize=(9, 1.2 + 2.0 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axis, (panel, lines) in zip(axes, panels.items(), strict=True):
        _draw_panel(axis, lines, (levels or {}).get(panel, {}), restarts)
        axis.set_ylabel(panel)
    axes[-1].set_xlabel("samples" + (" (dotted: warm restarts)" if len(restarts) else ""))
    figure.suptitle(title)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return path


def _points(curve: Any, samples: Sequence[float]) -> tuple[Sequence[float], Sequence[float]]:
    """Return abscissae and values of a curve, which may have its own abscissae."""
    if isinstance(curve, tuple) and len(curve) == 2 and not isinstance(curve[0], float):
        return curve[0], curve[1]
    return samples, curve


def _draw_panel(axis: Any, lines: Sequence[_Line], levels: Mapping[str, float], restarts: Sequence[float]) -> None:
    for i, (name, x, y) in enumerate(lines):
        # The first line of a panel is the dense one; later ones are few points.
        axis.plot(x, y, linewidth=1.2, marker="" if i == 0 else "o", markersize=4, label=name or None)
    for name, level in levels.items():
        axis.axhline(level, color="grey", linewidth=0.9, linestyle="--")
        axis.annotate(name, (1.0, level), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8)
    for restart in restarts:
        axis.axvline(restart, color="grey", linewidth=0.8, linestyle=":")
    axis.grid(alpha=0.25)
    if len(lines) > 1:
        axis.legend(loc="upper right", fontsize=8)
