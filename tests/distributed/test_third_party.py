"""The quick part of `python -m tests.third_party`: see docs/third_party_tests.md for all of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.ranks import run_ranks
from tests.third_party import accelerate_scripts, swap, torch_files

QUICK = {
    "test_script.training_check": accelerate_scripts.MODES,
    "test_sync.test_gradient_accumulation_with_opt_and_scheduler": accelerate_scripts.MODES,
    "external_deps.test_checkpointing": ("dist_adamw.prepare",),
    "external_deps.test_metrics.test_gather_for_metrics_with_iterable_dataset": ("dist_adamw.prepare",),
}


@pytest.mark.parametrize(("name", "mode"), [(name, mode) for name, modes in QUICK.items() for mode in modes])
def test_accelerate_script(name: str, mode: accelerate_scripts.Mode, tmp_path: Path) -> None:
    index = next(i for i, script in enumerate(accelerate_scripts.SCRIPTS) if script.name == name)
    run_ranks(2, accelerate_scripts.run_script, index, mode, str(tmp_path))
    assert torch.optim.AdamW is swap.TORCH_ADAMW


def of_database() -> tuple[dict[str, str], dict[str, str]]:
    from tests.third_party import optimizer_info

    return optimizer_info.run_checks((torch.float32,)), optimizer_info.run_error_inputs()


@pytest.mark.parametrize("world_size", [1, 2])
def test_inputs_of_torchs_database_of_optimizers(world_size: int) -> None:
    for checks, errors in run_ranks(world_size, of_database):
        assert len(checks) == 8 * 15
        assert {name: outcome for name, outcome in checks.items() if outcome != "passed"} == {}
        assert {name: outcome for name, outcome in errors.items() if outcome != "passed"} == {}


FILE = """
import unittest
from torch.optim import AdamW

class Mine(unittest.TestCase):
    def test_class(self):
        self.assertEqual(AdamW.__qualname__, "SwappedAdamW")
    def test_arithmetic(self):
        self.assertEqual(1, 2)
    def test_left_out(self):
        self.fail()
    @unittest.skip("no device")
    def test_skip(self):
        pass
"""


def test_a_file_of_torchs_tests_runs_with_our_classes(tmp_path: Path) -> None:
    path = tmp_path / "test_mine.py"
    path.write_text(FILE)
    file = torch_files.TestFile(("test_mine.py",), "optimizer", without=("left_out",))
    results = torch_files.run_in_process(path, file, "optimizer")
    assert list(results) == ["Mine.test_arithmetic", "Mine.test_class", "Mine.test_skip"]
    assert results["Mine.test_class"] == "passed"
    assert results["Mine.test_skip"] == "skipped: no device"
    assert results["Mine.test_arithmetic"] == "AssertionError: 1 != 2"
    assert "SwappedAdamW" in torch_files.run_in_process(path, file, "none")["Mine.test_class"]
