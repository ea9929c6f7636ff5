"""Importing the package imports what is cheap alone."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.conftest import ROOT

SLOW = ["torch._dynamo", "torch.distributed.checkpoint", "torch.distributed.tensor", "torch._inductor", "sympy"]
NEIGHBOURS = [
    "accelerate",
    "deepspeed",
    "transformers",
    "matplotlib",
    "jsonargparse",
    "triton",
    "safetensors",
    "pydantic",
]


def modules_after(statement: str) -> set[str]:
    """The modules that ``statement`` imports beyond those of torch."""
    program = f"import sys, torch\nbefore = set(sys.modules)\n{statement}\nprint(*(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "statement",
    [
        "import dist_adamw",
        "from dist_adamw import CyclicLRWithRestarts, DistAdamW, check_replicas, prepare, rest_of_epoch",
    ],
)
def test_nothing_slow_is_imported(statement: str) -> None:
    imported = modules_after(statement)
    assert "dist_adamw" in imported
    assert not imported & {*SLOW, *NEIGHBOURS}


def test_names_of_the_package_are_its_attributes() -> None:
    program = "import dist_adamw\nfor name in dir(dist_adamw): assert getattr(dist_adamw, name) is not None, name"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)
