"""Fixtures for every test: one thread per process, and a clean Accelerate state."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("ACCELERATE_USE_CPU", "true")

import pytest
import torch

from tests import ranks

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "launch"))
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _fresh_process_state() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    if "accelerate" in sys.modules:
        ranks._forget_accelerate()
