"""Every file of configs/ and launch/ loads."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
from torch import nn

from dist_adamw import CyclicLRWithRestarts, DistAdamW, RestartSchedule
from dist_adamw.schedule.preview import training_end
from tests.conftest import ROOT


@pytest.mark.parametrize("path", sorted((ROOT / "configs/train").glob("*.yaml")), ids=lambda p: p.stem)
def test_a_training_configuration_loads(path: Path) -> None:
    from gpt import ModelConfig
    from options import parse

    config = parse(["--config", str(path)])
    assert isinstance(config.model, ModelConfig)
    assert not [size for size in config.recipe.batch_sizes if size % config.recipe.micro_batch]


@pytest.mark.parametrize("path", sorted((ROOT / "configs/accelerate").glob("*.yaml")), ids=lambda p: p.stem)
def test_an_accelerate_configuration_loads(path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    machine = path.stem.split("_zero")[0].removesuffix("_fsdp2")
    assert config.num_processes == {"cpu_1": 1, "cpu_2": 2, "gpu_1": 1, "gpu_8": 8, "multi_node": 16}[machine]
    engine = str(getattr(config.distributed_type, "value", config.distributed_type))
    plain = "NO" if config.num_processes == 1 else "MULTI_GPU"  # MULTI_CPU starts one process, and says nothing
    assert engine == ("DEEPSPEED" if "zero" in path.stem else "FSDP" if "fsdp2" in path.stem else plain)
    if engine == "DEEPSPEED":
        assert (ROOT / config.deepspeed_config["deepspeed_config_file"]).is_file()


@pytest.mark.parametrize("path", sorted((ROOT / "configs/deepspeed").glob("*.json")), ids=lambda p: p.stem)
def test_a_deepspeed_configuration_loads(path: Path) -> None:
    from accelerate.utils import DeepSpeedPlugin

    config = DeepSpeedPlugin(hf_ds_config=str(path)).deepspeed_config
    assert f"zero{config['zero_optimization']['stage']}" in path.stem
    assert "gradient_clipping" in config  # DeepSpeed clips to 1.0 where nothing is said


@pytest.mark.parametrize("path", sorted((ROOT / "launch").glob("*.sh")), ids=lambda p: p.stem)
def test_a_launcher_is_valid_bash(path: Path) -> None:
    assert path.stat().st_mode & 0o111, "not executable"
    subprocess.run(["bash", "-n", str(path)], check=True, timeout=20)


def test_the_default_configuration_is_the_one_in_the_code(tmp_path: Path) -> None:
    from options import Config, parse

    assert parse(["--config", str(ROOT / "configs/train/small.yaml")]) == Config()


@pytest.mark.parametrize("epoch_size", [1000, 1001, 1_281_167])
@pytest.mark.parametrize("path", sorted((ROOT / "configs/train").glob("*.yaml")), ids=lambda p: p.stem)
def test_training_by_a_configuration_ends_at_a_cycles_end(path: Path, epoch_size: int) -> None:
    from options import parse

    recipe = parse(["--config", str(path)]).recipe
    scheduler = recipe.make_scheduler(recipe.make_optimizer(nn.Linear(2, 2)))
    scheduler.batch_size, scheduler.epoch_size = recipe.global_batch, epoch_size
    last = scheduler.preview(cycles=recipe.cycles).rows[-1]
    end = last.first_sample + last.samples  # train.py goes on until then
    batches = scheduler.preview().batches
    assert batches is not None
    _, samples = batches.updates(0, end)
    reached = training_end(scheduler.schedule, samples)
    assert reached.is_at_cycle_end
    assert reached.cycle == recipe.cycles - 1


def test_the_recipe_of_the_json_ends_at_a_cycles_end() -> None:
    """train_json.py trains to the end of so many cycles, as train.py does."""
    told = json.loads((ROOT / "configs/deepspeed/adamwr_zero2.json").read_text())["scheduler"]["params"]
    optimizer = DistAdamW(nn.Linear(2, 2).parameters())
    scheduler = CyclicLRWithRestarts(optimizer, **{**told, "batch_size": 16, "epoch_size": 2000})
    for cycles in (1, 2, 3):
        last = scheduler.preview(cycles=cycles).rows[-1]
        samples = -(-(last.first_sample + last.samples) // 16) * 16
        assert training_end(scheduler.schedule, samples).is_at_cycle_end


def test_the_recipes_of_the_readme_end_at_a_cycles_end() -> None:
    text = (ROOT / "README.md").read_text()
    recipes = re.findall(r'restart_period(?:=|": |: )([\d.]+)(?: epoch)?(?:,\s*"?t_mult(?:=|": |: )([\d.]+))?', text)
    assert len(recipes) == 3
    epochs = [*re.findall(r"in range\((\d+)\):", text), 3, *re.findall(r"total_samples: (\d+) epochs", text)]
    assert len(epochs) == 3  # 3: TrainingArguments' own
    for (period, t_mult), count in zip(recipes, epochs, strict=True):
        schedule = RestartSchedule(epoch_size=50_000, batch_size=32, restart_period=period, t_mult=t_mult or 2)
        assert training_end(schedule, int(count) * 50_000).is_at_cycle_end
