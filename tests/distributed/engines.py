"""Accelerate on each engine, inside the ranks of the pool.

FSDP2: Accelerate enables it on accelerators only, so its idea of the machine is patched; everything after that is
Accelerate's own path over a CPU mesh. DeepSpeed: the shared-memory collectives that it would compile are declared
incompatible (a build killed half-way leaves a lock on which every later run waits).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin, InitProcessGroupKwargs

from dist_adamw import prepare
from dist_adamw.integrations.accelerate.accelerator_methods import patch_accelerator

ZERO: dict[str, dict[str, Any]] = {
    "ZeRO-1": {"stage": 1},
    "ZeRO-2": {"stage": 2},
    "ZeRO-3": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "ZeRO-2 offload": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
}
ENGINES = ["single", "DDP", "FSDP2", *ZERO]


@contextlib.contextmanager
def environment(**values: str | None) -> Iterator[None]:
    """Variables as a launcher would set them; None unsets."""
    before = {name: os.environ.get(name) for name in values}
    try:
        for name, value in values.items():
            _set(name, value)
        yield
    finally:
        for name, value in before.items():
            _set(name, value)


def _set(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


@contextlib.contextmanager
def accelerator_on(engine: str, accumulation: int = 1, **config: Any) -> Iterator[Accelerator]:
    """An Accelerator whose engine is ``engine``, and is said to be.

    Args:
        accumulation: Micro-batches of an update.
        config: For DeepSpeed, keys of its configuration; else of ``Accelerator``.
    """
    if engine in ZERO or engine == "FSDP2":
        made = _deepspeed(engine, accumulation, config) if engine in ZERO else _fsdp2(accumulation, config)
        with made as accelerator:
            yield accelerator
        return
    # One rank of one is still a process group to the pool, and none to Accelerate.
    alone = dict.fromkeys(("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR"))
    with environment(**(alone if engine == "single" else {})):
        yield Accelerator(gradient_accumulation_steps=accumulation, **config)


def prepare_plain(accelerator: Accelerator, model: Any, optimizer: Any, loader: Any, scheduler: Any) -> Any:
    """Call ``prepare`` with a module that Accelerate leaves as it is, without DDP, and attach the optimizer to it."""
    model._is_accelerate_prepared = True
    prepared = prepare(accelerator, model, optimizer, loader, scheduler)
    optimizer.attach(model)
    patch_accelerator(accelerator, optimizer)
    return prepared


@contextlib.contextmanager
def fsdp2_on_a_cpu() -> Iterator[None]:
    """Have Accelerate take FSDP2 on a CPU, where it would not."""
    from accelerate.state import DistributedType, PartialState

    patch = mock.patch.object(PartialState, "_prepare_backend", return_value=("gloo", DistributedType.MULTI_GPU))
    machine = {"ACCELERATE_USE_CPU": "false", "ACCELERATE_TORCH_DEVICE": "cpu", "ACCELERATE_USE_FSDP": None}
    with environment(**machine), patch:
        yield


@contextlib.contextmanager
def _fsdp2(accumulation: int, config: dict[str, Any]) -> Iterator[Accelerator]:
    from accelerate.state import DistributedType

    with fsdp2_on_a_cpu():
        told = {
            "fsdp_version": 2,
            "auto_wrap_policy": "size_based_wrap",
            "min_num_params": 100,
            **config.pop("fsdp", {}),
        }
        plugin = FullyShardedDataParallelPlugin(**told)
        accelerator = Accelerator(fsdp_plugin=plugin, gradient_accumulation_steps=accumulation, **config)
        assert accelerator.distributed_type == DistributedType.FSDP
        yield accelerator


@contextlib.contextmanager
def _deepspeed(engine: str, accumulation: int, config: dict[str, Any]) -> Iterator[Accelerator]:
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    machine = {"ACCELERATE_USE_CPU": "false", "ACCELERATE_TORCH_DEVICE": "cpu", "ACCELERATE_USE_DEEPSPEED": None}
    with environment(**machine):
        told = {
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": accumulation,
            "zero_optimization": ZERO[engine],
            **config,
        }
        accelerator = Accelerator(
            deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=told),
            kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")],
        )
        assert accelerator.num_processes == dist.get_world_size()
        yield accelerator
