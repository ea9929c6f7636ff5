"""Several machines, rehearsed: namespaces with an address each; a cable is slowed, cut and put back."""

from __future__ import annotations

import re
import signal
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path
from statistics import median

import pytest

from tests.integration.agents import ELASTIC, JOB, Agent, rows, wait_until
from tests.integration.network import Network, UnavailableError
from tests.integration.test_elastic import assert_continuous
from tests.integration.test_train import History, history

pytestmark = pytest.mark.timeout(240)  # four ranks are started three times


@dataclass
class Rehearsal:
    """The result of one job: its folder, its log, and the time of its updates before and on a slow cable."""

    out: Path
    log: str
    paces: tuple[float, float] | None
    slowed: str


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> Rehearsal:
    """Two machines of two ranks each. The second one's cable is slowed for a while, cut, and put back."""
    try:
        network = Network(2)
    except UnavailableError as error:
        pytest.skip(f"no network namespaces: {error}")
    folder = tmp_path_factory.mktemp("nodes")
    out = folder / "run"
    variables = {"NNODES": "1:2", "RDZV": f"{network.addresses[0]}:29500", "NPROC": "2", "GLOO_SOCKET_IFNAME": "eth0"}
    # The machines share memory in truth, and a slow cable would slow nothing.
    variables |= {"WAIT": "2", "GONE": "5", "TIMEOUT": "6", "DIST_ADAMW_SHARED_MEMORY": "0"}
    agents = []
    try:
        for machine, address in enumerate(network.addresses):
            command = [*network.command(machine), *ELASTIC, *JOB, "--out", str(out)]
            agents.append(Agent(command, folder / f"log{machine}", variables | {"ADDRESS": address}))
        stays, goes = agents
        wait_until(lambda: "x 4 ranks" in stays.text and rows(out) > 15, "no 15 updates on two machines", agents)
        paces = None
        try:
            slowed = network.slow(1)
        except UnavailableError as error:
            slowed = str(error)
        else:
            first = rows(out)
            wait_until(lambda: rows(out) > first + 10, "no 10 updates on a slow cable", agents)
            seconds = [float(row["seconds"]) for row in history(out)]
            took = [b - a for a, b in pairwise(seconds)]
            paces = median(took[:first]), median(took[first + 1 :])
            network.at_full_speed(1)
        network.cut(1)
        wait_until(lambda: "x 2 ranks" in stays.text, "it does not go on without the second machine", agents)
        resumed = rows(out)
        wait_until(lambda: rows(out) > resumed, "no update on one machine", agents)
        # The job stands still until the other machine is there; else it would be over by then.
        stays.signal_ranks(signal.SIGSTOP)
        wait_until(lambda: "joining again" in goes.text, "the second machine gives up", agents)
        closed = stays.text.count("closing signal SIGTERM")
        network.mend(1)
        back = "the second machine does not come back"
        wait_until(lambda: stays.text.count("closing signal SIGTERM") > closed, back, agents)
        stays.signal_ranks(signal.SIGCONT)
        assert [agent.wait(120) for agent in agents] == [0, 0], stays.text
        return Rehearsal(out, stays.text, paces, slowed)
    finally:
        for agent in agents:
            agent.close()
        network.close()


def test_a_machine_that_is_cut_off_comes_back(rehearsal: Rehearsal, uninterrupted: History) -> None:
    starts = re.findall(r"global batch  12 samples = .* x (\d) ranks", rehearsal.log)
    # A busy machine may start them anew, and one before the other at the beginning.
    assert [ranks for ranks, _ in groupby(starts)][-3:] == ["4", "2", "4"], rehearsal.log
    assert_continuous(rehearsal.out, uninterrupted)


def test_a_slow_cable_costs_time_only(rehearsal: Rehearsal, uninterrupted: History) -> None:
    if rehearsal.paces is None:
        pytest.skip(f"cables cannot be slowed: {rehearsal.slowed}")
    before, slow = rehearsal.paces
    assert slow > 2 * before, rehearsal.slowed
    assert_continuous(rehearsal.out, uninterrupted)
