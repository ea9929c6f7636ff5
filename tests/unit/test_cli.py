"""The dist-adamw command."""

from __future__ import annotations

from pathlib import Path

import pytest

from dist_adamw.cli import main


def test_preview_prints_the_restarts_and_draws_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    png = tmp_path / "x.png"
    args = ["preview", "--batch_size=32", "--epoch_size=1000", "--restart_period=2.5", "--t_mult=1.5", f"--plot={png}"]
    assert main(args) == 0
    out = capsys.readouterr().out
    assert "6,250" in out  # first sample of cycle 2
    assert png.read_bytes().startswith(b"\x89PNG")


def test_preview_says_where_training_ends(capsys: pytest.CaptureFixture[str]) -> None:
    args = ["preview", "--batch_size=32", "--epoch_size=1000", "--restart_period=2.5"]
    assert main([*args, "--total_samples=20000"]) == 0
    assert "12.5% into cycle 3, with lr at 96.2% of its base value" in capsys.readouterr().out
    assert main([*args, "--total_samples=17500"]) == 0
    assert "end of cycle 2" in capsys.readouterr().out


def test_batch_solves(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["batch", "--size=256", "--micro_batch_size=8", "--data_parallel_size=4"]) == 0
    assert capsys.readouterr().out == "256 samples = 8 x 8 accumulation steps x 4 ranks\n"


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (
            ["batch", "--size=100", "--micro_batch_size=8", "--data_parallel_size=4"],
            "nearest sizes that work: 96 and 128",
        ),
        (["preview", "--batch_size=32", "--epoch_size=1000", "--policy=cosin"], "unknown policy 'cosin'"),
        (["preview", "--batch_size=32", "--epoch_size=1000", "--min_lr=1"], "min_lr must lie between 0"),
    ],
)
def test_a_mistake_is_one_sentence(args: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(args) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["--lowest=1", "--highest=1e-3", __file__], "lowest must be smaller than highest, got 1.0 and 0.001"),
        (["--updates", "3", __file__, "--lowest", "2"], "updates must be a whole number of at least 20, got 3"),
        (["--divergence", "0.5", __file__], "divergence must be above 1, got 0.5"),
        (["no/such/script.py", "--lowest", "2"], "no/such/script.py: there is no such script"),
        (["--ranks=0", __file__], "--ranks must be at least 1, got 0"),
    ],
)
def test_a_mistake_of_lr_range_is_one_sentence(
    args: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["lr-range", *args]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1


def test_ranks_inside_a_launcher_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "0")
    assert main(["lr-range", "--ranks", "2", __file__]) == 2
    assert "a launcher has already started this process" in capsys.readouterr().err
