"""The undisturbed job that tests of interrupted jobs compare with."""

from __future__ import annotations

import sys

import pytest

from tests.conftest import ROOT
from tests.integration.agents import JOB, Agent
from tests.integration.test_train import History, history


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> History:
    """Run the job of `agents` in one process, undisturbed."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    agent = Agent([sys.executable, str(ROOT / "launch/train.py"), *JOB, "--out", str(folder)], folder / "log")
    assert agent.wait(60) == 0, agent.text
    return history(folder)
