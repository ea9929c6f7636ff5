"""``dist-adamw preview`` and ``plot``, and the pictures."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import SGD

from dist_adamw import CyclicLRWithRestarts, DistAdamW
from dist_adamw.schedule.plot import Line, Panel, Picture, overlay
from tests.unit.test_cli import SIZES, Capture, answer, refused, run


def scheduler(**options: Any) -> CyclicLRWithRestarts:
    optimizer = DistAdamW([torch.zeros(1)], lr=1e-3, weight_decay=0.05)
    batch_size = options.pop("batch_size", 50)
    return CyclicLRWithRestarts(optimizer, batch_size, 1000, **{"restart_period": 1, "t_mult": 2, **options})


# ---------------------------------------------------------------- preview


def test_preview_prints_the_restarts_and_draws_them(tmp_path: Path, capsys: Capture) -> None:
    png = tmp_path / "x.png"
    out = run(capsys, "preview", *SIZES, "--restart_period=2.5", "--t_mult=1.5", f"--plot={png}")
    assert "6,250" in out  # first sample of cycle 2
    assert png.read_bytes().startswith(b"\x89PNG")


def test_preview_says_where_training_ends(capsys: Capture) -> None:
    args = ["preview", *SIZES, "--restart_period=2.5"]
    assert "12.5% into cycle 3, with lr at 96.2% of its base value" in run(capsys, *args, "--total_samples=20000")
    assert "end of cycle 2" in run(capsys, *args, "--total_samples", "17.5 epochs")


def test_preview_as_json(capsys: Capture) -> None:
    args = ["preview", "--batch_size", "{0: 32, 2 epochs: 64}", "--epoch_size=1000", "--restart_period=1"]
    found = answer(capsys, *args, "--total_samples=3000", "--weight_decay=0")
    assert [row["first_sample"] for row in found["cycles"]] == [0, 1000]
    assert found["cycles"][0]["timescale"] is None  # infinite without decay, and JSON has no infinity
    assert found["end"]["is_at_cycle_end"] is True
    assert found["global_batches"] == [{"from_sample": 0, "samples": 32}, {"from_sample": 2000, "samples": 64}]


def test_defaults_are_those_of_the_constructors(capsys: Capture) -> None:
    expected = CyclicLRWithRestarts(DistAdamW([torch.zeros(1)]), 32, 1000).preview()
    assert run(capsys, "preview", *SIZES) == f"{expected}\n"


@pytest.mark.parametrize(
    "given",
    [["--cycle_ends", "[1 epoch, 3 epochs]"], ["--cycle-ends", "1 epoch", "--cycle_ends=3 epochs"]],
)
def test_a_list_is_yaml_or_an_option_given_twice(given: list[str], capsys: Capture) -> None:
    found = answer(capsys, "preview", *SIZES, *given)
    assert [row["samples"] for row in found["cycles"]] == [1000, 2000]


# ---------------------------------------------------------------- plot


def test_plot_into_a_file(tmp_path: Path, capsys: Capture) -> None:
    svg = tmp_path / "new" / "curves.svg"
    assert run(capsys, "plot", *SIZES, "--restart_period=1", "--out", str(svg)) == f"drawn in {svg}\n"
    assert svg.read_text().startswith("<?xml")


@pytest.mark.parametrize(
    ("out", "sentence"),
    [("x.jpg", "must end in .png, .svg, .pdf"), ("curves", "must end in"), ("file/x.png", "file: ")],
)
def test_a_picture_that_cannot_be_written(out: str, sentence: str, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "file").touch()
    assert sentence in refused(capsys, "plot", *SIZES, "--out", str(tmp_path / out))


def test_plot_in_the_terminal(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    pytest.importorskip("uniplot", reason="uniplot is not installed: pip install 'dist_adamw[terminal]'")
    monkeypatch.setenv("COLUMNS", "72")
    out = run(capsys, "plot", *SIZES, "--restart_period=1", "--cycles=2", "--lr=0.05", "--axis=epochs")
    lines = out.splitlines()
    assert max(map(len, lines)) <= 72
    assert lines[0].strip() == "lr"
    assert lines[2].endswith("│ 0.05")  # the exact number, in the row of the peak
    assert lines[-1].split() == ["0", "epochs;", "lines:", "warm", "restarts", "3"]
    assert "\x1b" not in out


def test_several_schedules_in_the_terminal_differ() -> None:
    pytest.importorskip("uniplot", reason="uniplot is not installed: pip install 'dist_adamw[terminal]'")
    picture = overlay({"a": scheduler().preview().curves(), "b": scheduler(policy="wsd").preview().curves()})
    assert {"++ a", "xx b"} == {
        part.strip() for part in picture.as_text(80).splitlines()[12].split("   ") if part.strip()
    }
    assert "\x1b[34m" in picture.as_text(80, has_colors=True)


def test_plot_as_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    args = ["plot", *SIZES, "--restart_period=1", "--cycles=2"]
    png = tmp_path / "x.png"
    assert answer(capsys, *args, "--out", str(png)) == {
        "axis": "samples",
        "written": str(png),
        "schedules": ["options"],
    }
    monkeypatch.setitem(sys.modules, "uniplot", None)  # nothing is drawn
    found = answer(capsys, *args, "--axis=epochs")["schedules"]["options"]
    assert found["restarts"] == [1]
    assert set(found["values"]) == {"lr", "weight decay, lambda_i of AdamWR"}
    assert len(found["x"]) == len(found["epochs"]) == len(found["values"]["lr"])


# ---------------------------------------------------------------- curves


def test_restarts_stand_where_they_happen() -> None:
    curves = scheduler().preview(cycles=2).curves()
    assert curves.restarts == [1000]
    lr = dict(zip(curves.x, curves.values["lr"], strict=True))
    assert lr[999] < 1e-5
    assert lr[1000] == 1e-3
    assert curves.x[-1] == 3000
    assert curves.values["lr"][-1] < 1e-5  # the last update, not the restart after it


def test_the_axes() -> None:
    preview = scheduler(batch_size={0: 50, 1000: 100}).preview(cycles=2)
    samples, epochs, updates = (preview.curves(axis) for axis in ("samples", "epochs", "updates"))
    assert (samples.restarts, epochs.restarts, updates.restarts) == ([1000], [1], [20])
    assert (samples.x[-1], epochs.x[-1], updates.x[-1]) == (3000, 3, 20 + 20)
    assert samples.epochs == epochs.epochs == updates.epochs == epochs.x
    assert overlay({"": updates}).epochs == (updates.x, updates.epochs)
    assert overlay({"": epochs}).epochs is None
    with pytest.raises(ValueError, match="axis must be samples, epochs or updates, got 'steps'"):
        preview.curves("steps")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "label", "expected"),
    [
        ({}, "weight decay,\nlambda_i of AdamWR", [0.05 * math.sqrt(50 / length) for length in (1000, 2000)]),
        ({"weight_decay_norm": "first_cycle"}, "weight decay,\nas torch's AdamW", [0.05, 0.05 * math.sqrt(0.5)]),
        ({"weight_decay_timescale": "1 cycle"}, "weight decay,\ntime scale, epochs", [1.0, 2.0]),
        ({"normalize_weight_decay": False}, "weight decay,\nconstant", [0.05, 0.05]),
    ],
)
def test_weight_decay_is_drawn_in_the_recipes_reading(
    options: dict[str, Any], label: str, expected: list[float]
) -> None:
    curves = scheduler(**options).preview(cycles=2).curves()
    assert list(curves.values) == ["lr", label]
    found = dict(zip(curves.x, curves.values[label], strict=True))
    assert [found[0], found[999], found[1000], found[2999]] == pytest.approx([expected[0]] * 2 + [expected[1]] * 2)


def test_a_decay_in_the_gradient_is_not_drawn() -> None:
    sgd = CyclicLRWithRestarts(SGD([torch.zeros(1)], lr=0.1, weight_decay=0.1), 50, 1000)
    assert list(sgd.preview().curves().values) == ["lr"]


def test_several_schedules_share_axes_only_if_they_have_the_same() -> None:
    one, longer = scheduler().preview().curves(), scheduler(restart_period=2).preview().curves()
    same = overlay({"a": one, "b": scheduler(policy="wsd").preview().curves()})
    assert same.restarts == one.restarts
    assert same.epochs is not None
    assert [line.name for line in same.panels[0].lines] == ["a", "b"]
    assert overlay({"a": one, "b": longer}).restarts == ()
    other = CyclicLRWithRestarts(DistAdamW([torch.zeros(1)]), 50, 999, 1).preview().curves()
    assert overlay({"a": one, "b": other}).epochs is None


def test_nothing_is_drawn_over_a_curve(tmp_path: Path) -> None:
    """The legend lies below the panels, and levels have no labels in them."""
    from matplotlib.figure import Figure

    drawn: list[Figure] = []
    before = Figure.savefig
    try:
        Figure.savefig = lambda self, path, **_: drawn.append(self)  # type: ignore[method-assign]
        line = Line("training", [0, 1, 2], [3.0, 2.0, 1.0])
        Picture([Panel("loss", [line], {"unigram": 2.5, "bigram": 1.5})], "samples", title="a title").save(
            tmp_path / "x.png"
        )
    finally:
        Figure.savefig = before  # type: ignore[method-assign]
    (figure,) = drawn
    figure.draw_without_rendering()
    (legend,), (axis,) = figure.legends, figure.axes
    assert [text.get_text() for text in legend.get_texts()] == ["training", "unigram", "bigram"]
    assert not axis.texts
    assert legend.get_window_extent().y1 < axis.get_tightbbox().y0  # type: ignore[union-attr]
    assert figure._suptitle.get_window_extent().y0 > axis.get_window_extent().y1  # type: ignore[attr-defined]
