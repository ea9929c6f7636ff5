"""Silent traps of launchers, Accelerate and DeepSpeed give an error or a warning with the remedy."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, DistributedDataParallelKwargs
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from dist_adamw import CyclicLRWithRestarts, DistAdamW, prepare
from tests.distributed.engines import ZERO, accelerator_on, environment
from tests.distributed.jobs import job
from tests.distributed.test_deepspeed import initialize
from tests.distributed.test_engines import RECIPE, data, network
from tests.known import unwrap
from tests.ranks import expect_error_on_all, run_ranks

ROOT = Path(__file__).parents[2]


def prepared(accelerator: Accelerator, **options: Any) -> tuple[Any, DistAdamW, Any, CyclicLRWithRestarts]:
    """Model, DistAdamW itself, loader and scheduler."""
    model = network()
    optimizer = DistAdamW(model.parameters(), **{"lr": 1e-2, "weight_decay": 0.1, **options})
    scheduler = CyclicLRWithRestarts(optimizer, **RECIPE)
    model, wrapped, loader, scheduler = prepare(
        accelerator, model, optimizer, DataLoader(data(), batch_size=6), scheduler
    )
    assert unwrap(wrapped) is optimizer
    return model, optimizer, loader, scheduler


# ---------------------------------------------------------------- fewer processes than asked for

SCRIPT = """
from tests.distributed.jobs import job
from dist_adamw import prepare
accelerator, objects = job()
print("global batch", prepare(accelerator, *objects)[3].batch_size)
"""


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--cpu", "--num_processes", "2"], "asked for several processes"),
        (["--cpu", "--num_processes", "1"], "global batch 1"),  # and one that was asked for is none
    ],
)
def test_accelerate_launch_on_cpu_starts_one_process(tmp_path: Path, arguments: list[str], says: str) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "MASTER_"))}
    launch = [
        "-m",
        "accelerate.commands.launch",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
    ]
    done = subprocess.run(
        [sys.executable, *launch, *arguments, str(script)],
        env={**clean, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert says in done.stdout + done.stderr
    assert (done.returncode == 0) == (says not in done.stderr)
    if done.returncode:
        assert "accelerate launch --multi_gpu --num_processes N" in done.stderr  # the cure


def deepspeed_without_a_backend() -> None:
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    told = {"train_micro_batch_size_per_gpu": "auto", "zero_optimization": {"stage": 1}}
    with environment(ACCELERATE_USE_CPU="false", ACCELERATE_TORCH_DEVICE="cpu", ACCELERATE_USE_DEEPSPEED=None):
        prepared(Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=told)))


def test_ranks_that_accelerate_does_not_count_are_counted() -> None:
    for error in expect_error_on_all(2, deepspeed_without_a_backend):
        assert re.search(r"2 ranks run \(WORLD_SIZE\).*Accelerate counts 1\b", error)
        assert 'InitProcessGroupKwargs(backend="gloo")' in error


def launched_without_a_gpu() -> None:
    with environment(ACCELERATE_USE_CPU="false"):
        prepared(Accelerator())


def test_a_plain_script_that_torchrun_starts_without_a_gpu() -> None:
    for error in expect_error_on_all(2, launched_without_a_gpu):
        assert "Without a GPU set ACCELERATE_USE_CPU=true, or pass Accelerator(cpu=True)." in error


# ---------------------------------------------------------------- another engine than asked for


def asked_for(name: str) -> None:
    with environment(**{name: "true"}):
        accelerator, objects = job()
        prepare(accelerator, *objects)


@pytest.mark.parametrize("engine", ["FSDP", "DEEPSPEED"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_an_engine_that_was_asked_for_and_is_not_there(engine: str, world_size: int) -> None:
    name = f"ACCELERATE_USE_{engine}"
    for error in expect_error_on_all(world_size, asked_for, name):
        assert f"{engine} was asked for ({name}=true)" in error
        assert f"or unset {name}." in error


def fsdp1() -> None:
    with accelerator_on("FSDP2", fsdp={"fsdp_version": 1}) as accelerator:
        prepared(accelerator)


def test_fsdp1_is_refused() -> None:
    for error in expect_error_on_all(2, fsdp1):
        assert re.search(r"FSDP1 .*fsdp_version: 1\b.*fsdp_version: 2", error)


def hooked() -> None:
    hook: Any = default_hooks.fp16_compress_hook
    prepared(Accelerator(kwargs_handlers=[DistributedDataParallelKwargs(comm_hook=hook)]))


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_communication_hook_that_accelerate_ignores(world_size: int) -> None:
    for error in expect_error_on_all(world_size, hooked):
        assert "Accelerate silently ignores comm_hook=<function fp16_compress_hook" in error
        assert "Give DistributedDataParallelKwargs a member of DDPCommunicationHookType" in error


def bucket_views(**given: Any) -> tuple[bool, bool, bool]:
    handler = DistributedDataParallelKwargs(**given)
    model, *_ = prepared(Accelerator(kwargs_handlers=[handler]))
    return model.gradient_as_bucket_view, model.find_unused_parameters, handler.gradient_as_bucket_view


def test_ddp_keeps_no_second_copy_of_gradients_whatever_else_was_asked_for() -> None:
    for views, unused, given in run_ranks(2, functools.partial(bucket_views, find_unused_parameters=True)):
        assert views, "gradients exist twice, and nothing is sent during backward"
        assert unused, "the script's own choice is lost"
        assert not given, "the script's own object was changed"


# ---------------------------------------------------------------- the optimizer and its groups


def under_offload(told: dict[str, Any]) -> str:
    with accelerator_on("ZeRO-2 offload", **told) as accelerator:
        engine, *_ = prepared(accelerator)
        return type(engine.optimizer.optimizer).__name__


@pytest.mark.parametrize("told", [{}, {"zero_force_ds_cpu_optimizer": False}])
def test_offload_keeps_the_optimizer(told: dict[str, Any]) -> None:
    assert run_ranks(2, under_offload, told) == ["DistAdamW"] * 2


def test_offload_to_deepspeeds_own_optimizer_is_refused() -> None:
    for error in expect_error_on_all(2, under_offload, {"zero_force_ds_cpu_optimizer": True}):
        assert '"zero_force_ds_cpu_optimizer": true asks for DeepSpeedCPUAdam' in error


class Swapping(Accelerator):  # type: ignore[misc]
    """An engine that puts its own optimizer there, as DeepSpeed's offload and MS-AMP do."""

    def prepare_optimizer(self, optimizer: Optimizer, device_placement: bool | None = None) -> Any:
        return super().prepare_optimizer(torch.optim.Adam(optimizer.param_groups), device_placement)


class Overwriting(Accelerator):  # type: ignore[misc]
    """An engine that writes the hyper-parameters of its configuration into the groups."""

    def prepare_optimizer(self, optimizer: Optimizer, device_placement: bool | None = None) -> Any:
        optimizer.param_groups[0]["betas"] = (0.5, 0.5)
        return super().prepare_optimizer(optimizer, device_placement)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Swapping, r"put Adam in place of DistAdamW.*zero_force_ds_cpu"),
        (Overwriting, r"changed the parameter groups .*0\.9.* to .*\(0\.5, 0\.5\)"),
    ],
)
def test_another_optimizer_and_other_groups_are_seen(kind: type[Accelerator], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prepared(kind())


# ---------------------------------------------------------------- clipping under DeepSpeed


def clipping(stage: str, told: dict[str, Any], norm: float | None) -> tuple[float, float | None]:
    with accelerator_on(stage, **told) as accelerator:
        engine, optimizer, *_ = prepared(accelerator, max_grad_norm=norm)
        return engine.gradient_clipping(), optimizer.max_grad_norm


@pytest.mark.parametrize("stage", ["ZeRO-1", "ZeRO-3"])
@pytest.mark.parametrize(
    ("told", "norm", "expected"),
    [
        ({}, None, 0.0),  # DeepSpeed's own default is 1.0
        ({"gradient_clipping": "auto"}, None, 0.0),  # which Accelerate fills with 1.0
        ({}, 0.3, 0.3),
        ({"gradient_clipping": "auto"}, 0.3, 0.3),
        ({"gradient_clipping": 0.3}, 0.3, 0.3),
        ({"gradient_clipping": 0.7}, None, 0.7),
    ],
)
def test_one_norm_and_the_engine_clips(stage: str, told: dict[str, Any], norm: float | None, expected: float) -> None:
    assert run_ranks(2, clipping, stage, told, norm) == [(expected, None)] * 2


@pytest.mark.parametrize("told", [0.7, 0.0])
def test_two_norms_are_refused(told: float) -> None:
    for error in expect_error_on_all(2, clipping, "ZeRO-1", {"gradient_clipping": told}, 0.3):
        assert re.search(rf"max_grad_norm=0\.3 .*gradient_clipping={told} to DeepSpeed", error)
        assert "the same norm" in error


def clipped_by_hand(stage: str) -> list[tuple[str, str]]:
    with accelerator_on(stage, gradient_clipping=0.7) as accelerator, warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model, *_ = prepared(accelerator)
        for max_norm in (0.7, 0.3):
            accelerator.clip_grad_norm_(model.parameters(), max_norm)
    return [(str(one.message), one.filename) for one in told if "does not clip" in str(one.message)]


def test_clipping_by_hand_that_does_nothing_is_told() -> None:
    """Once, for the norm that is not the engine's, at the caller's line."""
    for told in run_ranks(2, clipped_by_hand, "ZeRO-2"):
        assert len(told) == 1
        assert re.search(r"max_norm=0\.3\) does not clip .*gradient_clipping is 0\.7", told[0][0])
        assert told[0][1] == __file__


def clip_alone(stage: str) -> None:
    model = network()
    optimizer = DistAdamW(model.parameters(), max_grad_norm=0.3)
    config = {
        "train_batch_size": 12,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": ZERO[stage],
    }
    engine = initialize(config, model, optimizer=optimizer)
    engine.backward(engine(torch.ones(6, 8)).sum())
    engine.step()


@pytest.mark.parametrize("stage", ZERO)
def test_max_grad_norm_without_prepare_is_refused(stage: str) -> None:
    for error in expect_error_on_all(2, clip_alone, stage):
        assert re.search(r"RuntimeError: max_grad_norm=0\.3 .*its own norm", error)
        assert re.search('"gradient_clipping".*max_grad_norm=None', error)


# ---------------------------------------------------------------- overflow under DeepSpeed

PRECISION: dict[str, dict[str, Any]] = {  # fp16 is not among them: DeepSpeed has none on CPU
    "fp32": {},
    "bf16": {"bf16": {"enabled": True, "check_grad_overflow": True}},
}


def overflows(stage: str, precision: str) -> tuple[list[int], list[int], bool]:
    """Clock and count after each of four updates, of which the second and third have a NaN on one rank."""
    with accelerator_on(stage, **PRECISION[precision]) as accelerator:
        model, optimizer, loader, scheduler = prepared(accelerator)
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        samples, updates = [], []
        for update, (x, y) in zip(range(4), loader, strict=False):
            loss = nn.functional.mse_loss(model(x.to(dtype)).float(), y)
            bad = update in (1, 2) and dist.get_rank() == 1
            accelerator.backward(loss * float("nan") if bad else loss)
            scheduler.step()
            samples.append(scheduler.samples)
            updates.append(optimizer.updates)
        return samples, updates, bool(torch.isfinite(model(x.to(dtype))).all())


@pytest.mark.parametrize("precision", PRECISION)
@pytest.mark.parametrize("stage", ZERO)
def test_an_update_that_zero_skips_holds_the_schedule(stage: str, precision: str) -> None:
    for samples, updates, finite in run_ranks(2, overflows, stage, precision):
        assert samples == [12, 12, 12, 24]
        assert updates == [1, 1, 1, 2]
        assert finite
