"""The main job, really launched: to its end, with other ranks, stopped and resumed, with bad input."""

from __future__ import annotations

import csv
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import dist_adamw
from tests.conftest import ROOT

TINY = ["--config", str(ROOT / "configs/train/tiny.yaml")]
TIMEOUT = 100
History = list[dict[str, str]]


def environment() -> dict[str, str]:
    """This interpreter's tools first, and nothing of a launcher around the tests."""
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    env["CONFIG"] = "cpu_2"
    return env


def start(launcher: list[str], out: Path, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*launcher, *TINY, "--out", str(out), *options],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # so that all its ranks can be ended together
    )


def finish(process: subprocess.Popen[str]) -> str:
    try:
        output, _ = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return output


def train(launcher: list[str], out: Path, *options: str) -> str:
    process = start(launcher, out, *options)
    output = finish(process)
    assert process.returncode == 0, output
    return output


ACCELERATE = [str(ROOT / "launch/accelerate.sh")]
TORCHRUN = [str(ROOT / "launch/torchrun.sh")]
ONE_PROCESS = [sys.executable, str(ROOT / "launch/train.py")]


def history(out: Path) -> History:
    with (out / "history.csv").open() as file:
        return list(csv.DictReader(file))


def curve(out: Path) -> list[tuple[str, ...]]:
    """Everything but the time, as text: the bits."""
    return [tuple(row[key] for key in ("samples", "loss", "lr", "weight_decay", "val_loss")) for row in history(out)]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """One run on two ranks that many tests compare with."""
    out = tmp_path_factory.mktemp("two") / "run"
    return out, train(ACCELERATE, out)


def test_it_says_what_it_does_and_leaves_what_it_promises(two_ranks: tuple[Path, str]) -> None:
    out, output = two_ranks
    assert "global batch  8 samples = 2 x 2 accumulated x 2 ranks" in output
    for word in ("first sample", "memory", "held-out loss", "unigram entropy", "bigram entropy"):
        assert word in output, word
    rows = history(out)
    losses = [float(row["loss"]) for row in rows]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert len({row["lr"] for row in rows}) > 20
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    checkpoints = sorted(path.name for path in (out / "checkpoints").glob("sample-*"))
    assert len(checkpoints) == 2  # run.keep
    assert (out / "checkpoints" / "latest").read_text() == checkpoints[-1]
    assert checkpoints[-1] == f"sample-{int(rows[-1]['samples']):09d}"
    assert list(out.rglob("events.out.tfevents.*"))


def test_the_loss_curve_does_not_depend_on_the_ranks(two_ranks: tuple[Path, str], tmp_path: Path) -> None:
    train(ONE_PROCESS, tmp_path, "--run.overwrite", "true")
    one, two = history(tmp_path), history(two_ranks[0])
    assert len(one) == len(two) > 40
    for a, b in zip(one, two, strict=True):
        assert (a["samples"], a["lr"], a["weight_decay"]) == (b["samples"], b["lr"], b["weight_decay"])
        assert float(a["loss"]) == pytest.approx(float(b["loss"]), rel=1e-4)


def test_a_batch_size_schedule(tmp_path: Path) -> None:
    """On one process and on two ranks; the boundary is inside the second cycle."""
    options = ("--recipe.global_batch", "{0: 8, 1 epoch: 16}", "--recipe.cycles", "2")
    assert "global batch: 8 samples, 16 from sample 160 on" in train(ACCELERATE, tmp_path / "2", *options)
    train(ONE_PROCESS, tmp_path / "1", *options)
    two, one = history(tmp_path / "2"), history(tmp_path / "1")
    assert [int(row["samples"]) for row in one] == [*range(8, 161, 8), 176, 192, 208]
    for a, b in zip(one, two, strict=True):
        assert (a["samples"], a["lr"], a["weight_decay"]) == (b["samples"], b["lr"], b["weight_decay"])
        assert float(a["loss"]) == pytest.approx(float(b["loss"]), rel=1e-4)


def test_a_reproducible_run_has_the_same_bits_on_any_number_of_ranks(tmp_path: Path) -> None:
    """With dropout, and with an eps that does not hide a wrong scale of the gradient."""
    options = ("--recipe.reproducible", "true", "--model.dropout", "0.1", "--recipe.eps", "0.1")
    outputs = [train(ACCELERATE, tmp_path / "2", *options), train(ONE_PROCESS, tmp_path / "1", *options)]
    assert curve(tmp_path / "1") == curve(tmp_path / "2")
    hashes = [re.findall(r"sha256 of the weights after \d+ updates: (\w{64})", output) for output in outputs]
    assert len(hashes[0]) == 1
    assert hashes[0] == hashes[1]


def stop_in_the_middle(launcher: list[str], out: Path, number: signal.Signals, after: int) -> str:
    """Start a run and send it a signal once ``after`` updates are recorded."""
    process = start(launcher, out)
    deadline = time.monotonic() + TIMEOUT
    while time.monotonic() < deadline and process.poll() is None:
        if (out / "history.csv").exists() and len((out / "history.csv").read_text().splitlines()) > after:
            break
        time.sleep(0.01)
    if number == signal.SIGKILL:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)  # to the launcher, as a scheduler or Ctrl-C would
    return finish(process)


@pytest.mark.parametrize(
    ("launcher", "number"),
    [
        (ACCELERATE, signal.SIGTERM),
        (TORCHRUN, signal.SIGINT),
        (ACCELERATE, signal.SIGKILL),
    ],
    ids=["accelerate-term", "torchrun-int", "accelerate-kill"],
)
def test_a_stopped_run_goes_on_with_the_same_bits(
    launcher: list[str], number: signal.Signals, two_ranks: tuple[Path, str], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    output = stop_in_the_middle(launcher, out, number, after=18)
    done = len(history(out))
    assert done < len(history(two_ranks[0])), "it ended before it was stopped"
    newest = sorted(p.name for p in (out / "checkpoints").glob("sample-*") if "." not in p.name)[-1]
    if number != signal.SIGKILL:
        assert "--resume" in output
        assert newest == f"sample-{int(history(out)[-1]['samples']):09d}"
        assert (out / "curves.png").exists()
    assert f"resuming from {out / 'checkpoints' / newest}" in train(launcher, out, "--resume")
    assert curve(out) == curve(two_ranks[0])


# ---------------------------------------------------------------- bad input


@pytest.fixture
def _own_signal_handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def sentence(*options: str) -> str:
    """Run the job in this process; return the sentence it ends with."""
    import train as job
    from options import parse

    with pytest.raises((ValueError, OSError)) as raised:
        job.run(parse([*TINY, "--run.tracker", "none", *options]))
    text = str(raised.value)
    assert "\n" not in text.strip()
    return text


@pytest.mark.usefixtures("_own_signal_handlers")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--recipe.policy", "cosin"], "cosin"),
        (["--recipe.restart_period", "0"], "restart_period .*finite.* got 0"),
        (["--recipe.t_mult", "-1"], "t_mult .*finite.* -1"),
        (["--recipe.min_lr", "1"], r"min_lr .* 0\.003, got 1"),
        (["--recipe.lr", "nan"], "Got value: nan"),
        (["--recipe.eps", "nan"], "Got value: nan"),
        (["--recipe.global_batch", "7"], "global batch size 7 .*multiple"),
        (["--recipe.global_batch", "{0: 8, 1 epoch: 7}"], "global batch size 7 .*multiple"),
        (["--recipe.global_batch", "{1: 8, 1 epoch: 16}"], "first key of batch_size must be 0, .* got 1"),
        (["--recipe.global_batch", "{0: 8, 1 moon: 16}"], "unknown unit"),
        (["--recipe.global_batch", "{0: 8, 5: true}"], "Expected a int. Got value: True"),
        (["--data", "no/such/file"], "--data no/such/file: .*no such"),
        (["--text.max_bytes", "300"], "too small: 300 bytes"),
        (["--resume"], "no checkpoint in"),
        (["--resume", "no/such/folder"], "--resume no/such/folder: .*no such"),
        (["--recipe.lrr", "1"], "lrr"),
    ],
)
def test_bad_input_is_one_sentence(options: list[str], message: str, tmp_path: Path) -> None:
    assert re.search(message, sentence("--out", str(tmp_path / "run"), *options))


@pytest.fixture
def copied(two_ranks: tuple[Path, str], tmp_path: Path) -> Path:
    return Path(shutil.copytree(two_ranks[0], tmp_path / "copy"))


@pytest.mark.usefixtures("_own_signal_handlers")
def test_a_run_is_not_overwritten(copied: Path) -> None:
    before = curve(copied)
    assert "the newest sample-" in sentence("--out", str(copied))
    assert curve(copied) == before


@pytest.mark.usefixtures("_own_signal_handlers")
def test_overwriting_waits_until_nothing_can_be_wrong(copied: Path) -> None:
    before = sorted(path.name for path in (copied / "checkpoints").iterdir())
    options = ["--run.overwrite", "true"]
    assert "Invalid epsilon value: -1.0" in sentence("--out", str(copied), *options, "--recipe.eps=-1")
    assert "no such file" in sentence("--out", str(copied), *options, "--data", "no/such/file")
    assert sorted(path.name for path in (copied / "checkpoints").iterdir()) == before


@pytest.mark.usefixtures("_own_signal_handlers")
def test_a_checkpoint_of_another_model_or_recipe_is_named(copied: Path) -> None:
    before = curve(copied)
    text = sentence("--out", str(copied), "--resume", "--model.width", "64", "--recipe.lr", "1e-3")
    assert "model.width was 32 and is 64" in text
    assert "recipe.lr was 0.003 and is 0.001" in text
    assert curve(copied) == before


@pytest.mark.usefixtures("_own_signal_handlers")
@pytest.mark.parametrize("name", ["dist_adamw/*-00001.safetensors", "dist_adamw/index.json", "progress.json"])
def test_a_truncated_checkpoint_is_named_and_an_older_one_offered(name: str, copied: Path) -> None:
    older, newest = sorted((copied / "checkpoints").glob("sample-*"))
    (file,) = newest.glob(name)
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    text = sentence("--out", str(copied), "--resume")
    assert str(newest) in text
    assert f"{file.name} is damaged" in text or "is damaged: progress.json has" in text
    assert f"newest whole one is {older}." in text


@pytest.mark.parametrize("launcher", ["torchrun.sh", "accelerate.sh", "elastic.sh"])
def test_a_mistake_ends_every_rank_in_its_sentence(launcher: str, tmp_path: Path) -> None:
    """Nothing of a launcher stands below it, and an elastic one does not try again."""
    process = start([str(ROOT / "launch" / launcher)], tmp_path / "run", "--recipe.global_batch", "7")
    output = finish(process)
    assert process.returncode == 2, output
    assert output.count("train.py: global batch size 7") == 1, output
    assert output.splitlines()[-1].startswith("train.py: global batch size 7")
    assert "that work: 4 and 8" in output.splitlines()[-1]
    assert "Traceback" not in output


def test_one_process_where_several_were_asked_for_is_refused(tmp_path: Path) -> None:
    launch = ["accelerate", "launch", "--cpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    script = [*launch, "--dynamo_backend", "no", str(ROOT / "launch/train.py")]
    process = start(script, tmp_path / "run")
    assert "Accelerate sees one" in finish(process)
    assert process.returncode != 0


def test_averages_and_snapshots_are_reported_with_the_losses_that_they_have(tmp_path: Path) -> None:
    """Averages, cycle ends and their ensemble, evaluated here by other means than the job's."""
    from gpt import GPT, ModelConfig, byte_losses
    from text import TextConfig, load_text

    averages = "{ema: {decay: 0.9}, ends: {every: cycle}}"
    options = ("--recipe.averages", averages, "--run.snapshots", "true")
    reported = train(TORCHRUN, tmp_path, *options).partition("bits/byte")[2]
    model = GPT(ModelConfig(layers=2, heads=2, width=32, context=32, dropout=0.0)).eval()
    text = load_text(None, TextConfig(max_bytes=6000, held_out=0.1, max_held_out_windows=8), context=32, global_batch=8)
    windows = torch.stack([text.held_out[i] for i in range(len(text.held_out))])

    @torch.no_grad()
    def losses(path: Path, average: str | None = None) -> torch.Tensor:
        dist_adamw.load(path, model, average=average)
        return byte_losses(model, windows).double()

    snapshots = sorted((tmp_path / "snapshots").glob("sample-*"))
    last = sorted((tmp_path / "checkpoints").glob("sample-*"))[-1] / "dist_adamw"
    ends = [losses(path) for path in snapshots]
    expected = {f"cycle {i} ends": float(end.mean()) for i, end in enumerate(ends)}
    expected |= {f"average {name}": float(losses(last, name).mean()) for name in ("ema", "ends")}
    expected["ensemble of 3 cycle ends"] = -float(torch.stack([(-end).exp() for end in ends]).mean(0).log().mean())
    found = {name: float(nats) for name, nats in re.findall(r"held-out loss, (.+?) +(\d+\.\d+) ", reported)}
    assert found == pytest.approx(expected, abs=1e-3)  # the table has three digits
    assert expected["ensemble of 3 cycle ends"] < expected["cycle 0 ends"]
