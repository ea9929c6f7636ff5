"""Draw curves above one axis: PNG, SVG or PDF with matplotlib, text for a terminal with uniplot."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Axis = Literal["samples", "epochs", "updates"]
SUFFIXES = (".png", ".svg", ".pdf")
_STYLES = ("--", "-.", (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)))
_ROWS, _MARGIN = 9, 12  # of a panel in a terminal; the margin has numbers

_CHARACTERS = ("+", "x", "o", "*", "~", ".")
_COLORS = ("blue", "magenta", "green", "yellow", "cyan", "red")


@dataclass(frozen=True, slots=True)
class Line:
    """One curve.

    Attributes:
        name: For the legend; "" for none.
        x: Abscissae, ascending. The same one twice is a jump.
        y: Values; those that are not finite are left out.
        has_points: Whether to mark each value: for a few measurements.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    has_points: bool = False


@dataclass(frozen=True, slots=True)
class Panel:
    """The curves of one quantity.

    Attributes:
        label: The quantity.
        lines: The curves.
        levels: Names and values of horizontal lines.
        begins_at_zero: Whether the axis of values shows 0.
    """

    label: str
    lines: Sequence[Line]
    levels: Mapping[str, float] = field(default_factory=dict)
    begins_at_zero: bool = True


@dataclass(frozen=True, slots=True)
class Picture:
    """Panels, one above the other.

    Attributes:
        panels: At least one.
        axis: What the axis of all panels shows, such as "samples".
        restarts: Where on it to draw dotted lines.
        epochs: Places on the axis and the epochs there, both ascending, for a second axis; None: it has no second one.
        title: Above all panels; may be empty.
    """

    panels: Sequence[Panel]
    axis: str
    restarts: Sequence[float] = ()
    epochs: tuple[Sequence[float], Sequence[float]] | None = None
    title: str = ""

    def save(self, path: str | Path) -> Path:
        """Write a PNG, SVG or PDF, by the path's suffix. Local.

        Raises:
            ValueError: the suffix is another one.
            ModuleNotFoundError: matplotlib is missing.
        """
        path = Path(path).expanduser()
        check_suffix(path)
        try:
            from matplotlib.figure import Figure
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("drawing needs matplotlib: pip install 'dist_adamw[tracking]'") from error
        figure = Figure(figsize=(9, 1.4 + 2.0 * len(self.panels)), layout="constrained")
        axes = figure.subplots(len(self.panels), 1, sharex=True, squeeze=False)[:, 0]
        colors = {name: f"C{i}" for i, name in enumerate(filter(None, self._names()))} | {"": "C0"}
        for axis, panel in zip(axes, self.panels, strict=True):
            _draw(axis, panel, self.restarts, colors)
        axes[-1].set_xlabel(self.axis + (" (dotted: warm restarts)" if len(self.restarts) else ""))
        axes[-1].xaxis.set_major_formatter(lambda value, _: _number(value))
        if self.epochs is not None:
            places, epochs = self.epochs
            second = axes[0].secondary_xaxis("top", functions=(_through(places, epochs), _through(epochs, places)))
            second.set_xlabel("epochs")
        _add_legend(figure, axes)
        if self.title:
            figure.suptitle(self.title, fontsize=11)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130)
        return path

    def _names(self) -> list[str]:
        return list(dict.fromkeys(line.name for panel in self.panels for line in panel.lines))

    def as_text(self, width: int = 100, *, has_colors: bool = False) -> str:
        """Return the panels as text. Local.

        Args:
            width: Characters in a line; at least 40 are used.
            has_colors: Whether to tell curves apart by the terminal's colours, not by characters.

        Raises:
            ModuleNotFoundError: uniplot is missing.
        """
        try:
            from uniplot import plot_to_string
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "a picture in the terminal needs uniplot: pip install 'dist_adamw[terminal]'. With --out curves.png it "
                "is drawn into a file."
            ) from error
        width = max(width, 40) - _MARGIN
        texts = [self.title] if self.title else []
        end = max(line.x[-1] for panel in self.panels for line in panel.lines)
        names = self._names()
        for panel in self.panels:
            lines = [line for line in map(_finite, panel.lines) if line.x]
            if not lines:
                continue
            places = [names.index(line.name) % len(_CHARACTERS) for line in lines]
            values = [value for line in lines for value in (min(line.y), max(line.y))] + [*panel.levels.values()]
            low, high = 0.0 if panel.begins_at_zero else min(values), max(values)
            text = plot_to_string(
                xs=[line.x for line in lines],
                ys=[line.y for line in lines],
                lines=True,
                width=width,
                height=_ROWS,
                title=" ".join(panel.label.split()),
                legend_labels=[line.name for line in lines] if any(line.name for line in lines) else None,
                color=[_COLORS[i] for i in places] if has_colors and len(names) > 1 else False,
                character_set="block" if has_colors or len(names) == 1 else "ascii",
                force_ascii_characters=[_CHARACTERS[i] for i in places],
                x_min=0.0,
                x_max=end,
                y_min=low,
                y_max=high if high > low else low + 1.0,
                x_gridlines=list(self.restarts),
                y_gridlines=list(panel.levels.values()),
                # Its own labels are rounded: 0.05 to 0.1.
                x_labels=False,
                y_labels=False,
            )
            rows = [row.rstrip() for row in text.splitlines()]
            rows[2] += f" {high:.4g}"
            rows[1 + _ROWS] += f" {low:.4g}"
            texts.append("\n".join(rows))
        axis = f"{self.axis}; lines: warm restarts" if len(self.restarts) else self.axis
        last = _number(end)
        return "\n".join([*texts, f" 0{axis.center(width - 1 - len(last))}{last}"])


def check_suffix(path: Path) -> None:
    """Raise ValueError unless matplotlib writes such a file, and it can be written where it is."""
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{path}: a picture's name must end in {', '.join(SUFFIXES)}, got {path.suffix!r}.")


@dataclass(frozen=True, slots=True)
class Curves:
    """The curves of one schedule.

    Attributes:
        axis: The axis of ``x``.
        x: Abscissae.
        epochs: The epochs at ``x``.
        values: Values by quantity.
        restarts: Where on the axis cycles begin, without the first.
    """

    axis: Axis
    x: Sequence[float]
    epochs: Sequence[float]
    values: Mapping[str, Sequence[float]]
    restarts: Sequence[float]


def overlay(schedules: Mapping[str, Curves], title: str = "") -> Picture:
    """Return a picture of the curves of several schedules, by name. Local.

    Restarts are drawn if all schedules have the same, and a second axis of epochs if all have the same epochs.

    Raises:
        ValueError: there is no schedule, or their axes differ.
    """
    first, *others = schedules.values()
    if any(other.axis != first.axis for other in others):
        raise ValueError(
            f"schedules to be drawn together have different axes: {[one.axis for one in (first, *others)]}."
        )
    named = {name if others else "": curves for name, curves in schedules.items()}
    labels = list(dict.fromkeys(label for curves in named.values() for label in curves.values))
    panels = []
    for label in labels:
        have = {name: curves for name, curves in named.items() if label in curves.values}
        panels.append(Panel(label, [Line(name, curves.x, curves.values[label]) for name, curves in have.items()]))
    longest = max(schedules.values(), key=lambda curves: curves.x[-1])
    epochs = _through(longest.x, longest.epochs)
    is_one = all(_are_close(map(epochs, one.x), one.epochs) for one in (first, *others))
    return Picture(
        panels,
        first.axis,
        restarts=first.restarts if all(list(other.restarts) == list(first.restarts) for other in others) else (),
        epochs=(longest.x, longest.epochs) if is_one and first.axis != "epochs" else None,
        title=title,
    )


def _are_close(found: Any, expected: Sequence[float]) -> bool:
    return all(math.isclose(one, other, abs_tol=1e-6) for one, other in zip(found, expected, strict=True))


def _draw(axis: Any, panel: Panel, restarts: Sequence[float], colors: Mapping[str, str]) -> None:
    for line in panel.lines:
        x, y = [*line.x], [value if math.isfinite(value) else math.nan for value in line.y]
        marker = "o" if line.has_points else ""
        style = {"color": colors[line.name], "marker": marker, "label": line.name or None}
        axis.plot(x, y, linewidth=1.3, markersize=4, **style)
    for i, (name, level) in enumerate(panel.levels.items()):
        axis.axhline(level, color="grey", linewidth=1.0, linestyle=_STYLES[i % len(_STYLES)], label=name)
    for restart in restarts:
        axis.axvline(restart, color="grey", linewidth=0.8, linestyle=":")
    axis.grid(alpha=0.25)
    axis.margins(x=0.01)
    axis.set_ylabel(panel.label)
    if panel.begins_at_zero:
        axis.set_ylim(bottom=0.0)


def _add_legend(figure: Any, axes: Iterable[Any]) -> None:
    """Explain the lines below the panels, where no curve is; a name that several panels have, once."""
    found: dict[str, Any] = {}
    for axis in axes:
        for handle, name in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(name, handle)
    if found:
        columns = 2 if any(len(name) > 30 for name in found) else 4
        figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=columns, fontsize=9)


def _finite(line: Line) -> Line:
    kept = [(x, y) for x, y in zip(line.x, line.y, strict=True) if math.isfinite(y)]
    return Line(line.name, [x for x, _ in kept], [y for _, y in kept], line.has_points)


def _number(value: float) -> str:
    """Return a number of samples, updates or epochs, with at most a few digits."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:,.10g}"


def _through(xs: Sequence[float], ys: Sequence[float]) -> Callable[[Any], Any]:
    """Return the piecewise linear function through the points, and beyond them."""
    known = sorted(set(zip(xs, ys, strict=True)))
    points = [known[0], *(after for before, after in itertools.pairwise(known) if after[0] > before[0])]
    if len(points) == 1:
        points.append((points[0][0] + 1.0, points[0][1] + 1.0))

    def value(x: float) -> float:
        i = min(max(bisect.bisect_right(points, (x, math.inf)), 1), len(points) - 1)
        (x0, y0), (x1, y1) = points[i - 1], points[i]
        return y0 + (x - x0) * (y1 - y0) / (x1 - x0)

    def values(x: Any) -> Any:
        if isinstance(x, int | float):
            return value(x)
        import numpy as np

        return np.vectorize(value, otypes=[float])(x)

    return values
