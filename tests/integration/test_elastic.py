"""The main job under launchers that start it again: ranks die, agents come and go, and the curve stays one."""

from __future__ import annotations

import re
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import ranks
from tests.conftest import ROOT
from tests.integration.agents import ELASTIC, JOB, Agent, rows, wait_until
from tests.integration.test_train import History, _own_signal_handlers, history, sentence  # noqa: F401


def assert_continuous(out: Path, expected: History) -> None:
    found = history(out)
    for exact in ("samples", "lr", "weight_decay"):
        assert [row[exact] for row in found] == [row[exact] for row in expected]
    for close in ("loss", "val_loss"):
        losses = [[float(row[close] or "nan") for row in rows] for rows in (found, expected)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5, nan_ok=True)


@pytest.fixture
def agents() -> Iterator[list[Agent]]:
    started: list[Agent] = []
    yield started
    for agent in started:
        agent.close()


def test_accelerate_starts_killed_ranks_again(uninterrupted: History, agents: list[Agent], tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [str(ROOT / "launch/accelerate.sh"), *JOB, "--resume", "auto", "--out", str(out)]
    agent = Agent(command, tmp_path / "log", {"CONFIG": "cpu_2", "MAX_RESTARTS": "1"})
    agents.append(agent)
    wait_until(lambda: rows(out) > 25, "no 25 updates", agents)
    agent.signal_ranks(signal.SIGKILL, only=1)
    lost = rows(out)
    assert lost < len(uninterrupted), "it ended before a rank was killed"
    assert agent.wait(60) == 0, agent.text
    (resumed,) = re.findall(r"resuming from .*-(\d+)", agent.text)
    assert 0 < int(resumed) // 12 <= lost
    assert_continuous(out, uninterrupted)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.mark.timeout(240)  # ranks are started four times
def test_ranks_die_and_agents_join_and_leave(uninterrupted: History, agents: list[Agent], tmp_path: Path) -> None:
    """Under torchrun. Two ranks, again two, then three, then two: the global batch and the schedule stay."""
    out = tmp_path / "run"
    log = tmp_path / "log"
    variables = {"NNODES": "1:2", "RDZV": f"127.0.0.1:{free_port()}", "WAIT": "1", "GONE": "3"}
    command = [*ELASTIC, *JOB, "--out", str(out)]
    stays = Agent(command, log, variables | {"NPROC": "2", "ADDRESS": "127.0.0.1"})
    agents.append(stays)
    wait_until(lambda: rows(out) > 15, "no 15 updates on two ranks", agents)
    stays.signal_ranks(signal.SIGKILL, only=1)
    resumed = "sample-000000120"
    wait_until(lambda: resumed in stays.text.partition("resuming from ")[2], "the killed rank stays dead", agents)
    wait_until(lambda: rows(out) > 20, "no 20 updates once it is back", agents)
    # The job stands still until the other is there; else it would be over by then.
    stays.signal_ranks(signal.SIGSTOP)
    joins = Agent(command, log, variables | {"NPROC": "1", "ADDRESS": "localhost"})
    agents.append(joins)
    signals = stays.text.count("closing signal SIGTERM")
    wait_until(lambda: stays.text.count("closing signal SIGTERM") > signals, "nobody joins", agents)
    stays.signal_ranks(signal.SIGCONT)
    wait_until(lambda: "x 3 ranks" in stays.text and rows(out) > 40, "no 40 updates on three ranks", agents)
    joins.close()  # without a word, as a machine that loses its power
    left = rows(out)
    assert left < len(uninterrupted), "it ended before an agent left"
    assert stays.wait(60) == 0, stays.text
    begun = re.findall(r"global batch  12 samples = 1 x (\d) accumulated x (\d) ranks", log.read_text())
    assert begun == [("6", "2"), ("6", "2"), ("4", "3"), ("6", "2")]
    assert_continuous(out, uninterrupted)


@pytest.mark.usefixtures("_own_signal_handlers")
def test_an_older_checkpoint_serves_where_nobody_can_be_asked(
    uninterrupted: History, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import train as job
    from options import parse

    options = [*JOB, "--out", str(tmp_path), "--resume", "auto"]
    assert job.run(parse([*options, "--recipe.cycles", "2"])) == 0  # nothing to resume from: it begins
    ranks._forget_accelerate()
    older, newest = sorted((tmp_path / "checkpoints").glob("sample-*"))
    weights = max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    weights.write_bytes(weights.read_bytes()[:-1])
    assert job.run(parse([*options, "--recipe.cycles", "3"])) == 0
    output = capsys.readouterr().out
    assert f"not resumed from: {weights} is damaged" in output
    assert f"resuming from {older}\n" in output
    done = len(history(tmp_path))
    assert 33 <= done < len(uninterrupted)
    assert_continuous(tmp_path, uninterrupted[:done])


@pytest.mark.usefixtures("_own_signal_handlers")
@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--run.save_every=-1", "run.save_every must be >= 0, got -1"),
        ("--run.timeout=0", "run.timeout must be above 0"),
    ],
)
def test_intervals_that_cannot_be(option: str, message: str, tmp_path: Path) -> None:
    assert message in sentence("--out", str(tmp_path), option)
