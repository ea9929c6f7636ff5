"""The engines that are compared, each behind the same few methods.

Each library is imported when its engine is built. An engine that cannot be used raises `Skip` with
the reason.

All of them get the same recipe (AdamW, fp32, fused where the engine lets torch's kernel run) and the workload's
parameter groups, and each the settings that its authors give for speed and memory.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from benchmarks.groups import RECIPE
from benchmarks.workloads import Model, Workload


class Skip(Exception):  # noqa: N818 - not an error
    """The reason why an engine cannot be used here."""


class Engine:
    """A model and an optimizer, wrapped in one engine's way.

    Args:
        module: The module to call.
        optimizer: The object to step.
        model: The bare model inside.
        inner: The optimizer that holds the state; default: ``optimizer``.
        detail: Notes on the set-up for readers of the results.
        sharded: Whether its state is.
        shards_gradients: Whether it promises to keep only a W-th of the gradients between backward and step.
    """

    def __init__(
        self,
        module: Any,
        optimizer: Any,
        model: Model,
        *,
        inner: Any = None,
        detail: str = "",
        sharded: bool = True,
        shards_gradients: bool = False,
    ) -> None:
        self.module, self.optimizer, self.model = module, optimizer, model
        self.inner = optimizer if inner is None else inner
        self.detail, self.sharded, self.shards_gradients = detail, sharded, shards_gradients
        self._loss: Tensor | None = None

    def forward(self) -> None:
        """Run the forward pass before an update, in which some engines gather parameters."""
        self._loss = self.module(torch.zeros(()))

    def backward(self) -> None:
        """Run the backward pass: hand out gradients, and start or finish their synchronisation."""
        assert self._loss is not None
        self._loss.backward()

    def backward_passes(self, accumulation: int) -> None:
        """Run all backward passes of an update, with a forward pass before each but the first."""
        for _ in range(accumulation - 1):
            with self.accumulating():
                self.backward()
                self.forward()
        self.backward()

    def step(self) -> None:
        """Run the update, and the synchronisation of parameters if it is part of it."""
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def accumulating(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which backward passes are not the last of an update."""
        no_sync: Any = getattr(self.module, "no_sync", contextlib.nullcontext)
        return no_sync()

    def set_eps(self, eps: float) -> None:
        """Change AdamW's eps from the next update on."""
        for group in self.optimizer.param_groups:
            group["eps"] = eps

    def weights(self) -> Iterator[Tensor]:
        """Return the whole parameters, in order. Collective."""
        for param in self.model.parameters():
            yield param.full_tensor() if isinstance(param, DTensor) else param.detach()

    def sizes(self) -> dict[str, int]:
        """Return the bytes of this rank's known tensors: the rest of the peak is staging and buffers."""
        params = list(self.model.parameters())
        return {
            "parameters": _storage_bytes(params),
            "state": _storage_bytes(v for s in self.inner.state.values() for v in _tensors(s)),
        }

    def gradients(self) -> Iterator[Tensor]:
        """Return the gradients that exist now."""
        for param in self.model.parameters():
            if param.grad is not None:
                yield param.grad

    def grad_bytes(self) -> int:
        """Return the bytes of the gradients that exist now."""
        return _storage_bytes(self.gradients())


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)


def _storage_bytes(tensors: Iterable[Tensor]) -> int:
    storages = {}
    for tensor in tensors:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        storage = local.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


class _DistAdamWEngine(Engine):
    """DistAdamW; with reduce_every_backward its gradients are in flat memory of its shards, not in ``.grad``."""

    def gradients(self) -> Iterator[Tensor]:
        yield from super().gradients()
        for shard in self.optimizer.shards:
            if shard.gradients._accumulated is not None:
                yield shard.gradients._accumulated


def _ddp(model: Model) -> DistributedDataParallel:
    return DistributedDataParallel(model, gradient_as_bucket_view=True)


def dist_adamw_engine(
    workload: Workload,
    *,
    ddp: bool = True,
    attach: bool = True,
    into_shard: bool = False,
    package: Any = None,
    kind: type[Engine] = _DistAdamWEngine,
    **options: Any,
) -> Engine:
    """Return one of our engines, before its first forward pass. Collective.

    Args:
        workload: What it trains.
        ddp: Whether the model is wrapped in DistributedDataParallel.
        attach: Whether the optimizer reduces the gradients.
        into_shard: reduce_every_backward.
        package: Another version of ``dist_adamw``.
        kind: The class of the engine.
        options: More options of DistAdamW.
    """
    package = importlib.import_module("dist_adamw") if package is None else package
    model = workload.model()
    module = _ddp(model) if ddp else model
    optimizer = package.DistAdamW(workload.parameter_groups(model), **RECIPE, **options)
    if attach:
        optimizer.attach(module, reduce_every_backward=into_shard)
    detail = "DDP" if ddp else "plain module"
    detail += ", attached" if attach else ", not attached: DDP's own all-reduce"
    detail += ", reduce_every_backward=True" if into_shard else ""
    detail += "".join(f", {name}={value}" for name, value in options.items())
    return kind(module, optimizer, model, detail=detail, shards_gradients=into_shard)


class _SumsInsideFirst(_DistAdamWEngine):
    """Reproducible in another order: each rank adds its own backward passes up in a tree, and sends only their sum.

    A trial of what ADR 17 did not choose. The last gradient is added to the tree as autograd hands it over, so the sum
    is sent during that backward pass.
    """

    def __init__(self, module: Any, optimizer: Any, model: Model, **options: Any) -> None:
        super().__init__(module, optimizer, model, **options)
        self._params = list(model.parameters())
        self._levels: list[list[Tensor] | None] = []  # a binary counter: at l, the sum of 2^l passes or nothing
        self._passes, self._is_last, self._nothing = 0, True, torch.empty(0)
        for n, param in enumerate(self._params):
            param.register_hook(functools.partial(self._with_others, n))

    def _with_others(self, n: int, grad: Tensor) -> Tensor | None:
        if not (self._is_last and self._passes):
            return None
        for level in self._levels:  # the lowest first, as a binary tree of 2^n passes has it
            if level is not None:
                grad, level[n] = level[n].add_(grad), self._nothing  # with another reference autograd would copy it
        return grad.div_(self._passes + 1)

    def accumulating(self) -> contextlib.AbstractContextManager[None]:
        return self._add_up()

    @contextlib.contextmanager
    def _add_up(self) -> Iterator[None]:
        self._is_last = False
        yield
        self._is_last = True

    def backward(self) -> None:
        if self._is_last:
            super().backward()
            return
        assert self._loss is not None
        carry: list[Tensor] | None = list(torch.autograd.grad(self._loss, self._params))
        self._passes += 1
        for n, level in enumerate(self._levels):
            if carry is None or level is None:
                self._levels[n], carry = carry or level, None
                continue
            torch._foreach_add_(level, carry)
            carry, self._levels[n] = level, None
        if carry is not None:
            self._levels.append(carry)

    def step(self) -> None:
        super().step()
        self._levels, self._passes = [], 0


def _ddp_adamw(workload: Workload) -> Engine:
    model = workload.model()
    optimizer = torch.optim.AdamW(workload.parameter_groups(model), fused=True, **RECIPE)
    return Engine(_ddp(model), optimizer, model, sharded=False)


def _zero_redundancy(workload: Workload) -> Engine:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = workload.model()
    module = _ddp(model)
    optimizer = ZeroRedundancyOptimizer(
        workload.parameter_groups(model), torch.optim.AdamW, parameters_as_bucket_view=True, fused=True, **RECIPE
    )
    return Engine(module, optimizer, model, inner=optimizer.optim, detail="parameters_as_bucket_view=True, fused")


def _fairscale(workload: Workload) -> Engine:
    oss = _import("fairscale.optim.oss")
    model = workload.model()
    module = _ddp(model)
    optimizer = oss.OSS(workload.parameter_groups(model), optim=torch.optim.AdamW, fused=True, **RECIPE)
    return Engine(module, optimizer, model, inner=optimizer.optim, detail="fused")


def _fsdp2(workload: Workload) -> Engine:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = workload.model()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=False)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    optimizer = torch.optim.AdamW(workload.parameter_groups(model), fused=True, **RECIPE)
    return Engine(model, optimizer, model, detail="fully_shard on each layer, reshard_after_forward=False, fused")


class _DeepSpeed(Engine):
    """A DeepSpeed engine, which calls zero_grad itself and holds the fp32 partitions."""

    def backward(self) -> None:
        self.module.backward(self._loss)

    def step(self) -> None:
        self.module.step()

    def sizes(self) -> dict[str, int]:
        sizes = super().sizes()
        sizes["state"] += _storage_bytes(self.optimizer.single_partition_of_fp32_groups)
        return sizes


def _deepspeed(workload: Workload, *, stage: int) -> Engine:
    # A build that another process abandoned would be waited for without end.
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", tempfile.mkdtemp(prefix="torch_extensions_"))
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    deepspeed = _import("deepspeed")
    _import("deepspeed.utils").logger.setLevel("ERROR")
    _import("deepspeed.ops").__compatible_ops__["deepspeed_shm_comm"] = False
    model = workload.model()
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,  # it clips to 1.0 when this is not said
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage},
    }
    inner = torch.optim.AdamW(workload.parameter_groups(model), fused=True, **RECIPE)
    module, optimizer, *_ = deepspeed.initialize(model=model, optimizer=inner, config=config, dist_init_required=False)
    return _DeepSpeed(module, optimizer, model, inner=inner, detail=f"stage {stage}, torch's fused AdamW")


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except Exception as problem:  # old packages fail on new torch in many ways
        raise Skip(f"import {name}: {type(problem).__name__}: {problem}") from problem


OURS, OURS_WITHOUT_DDP = "DistAdamW", "DistAdamW without DDP"
AVERAGING, AVERAGING_SELDOM = "DistAdamW, EMA", "DistAdamW, EMA every 4 updates"
REPRODUCIBLE, SUMS_INSIDE = "DistAdamW, reproducible", "DistAdamW, sums inside the rank first"
BUILDERS: dict[str, Callable[[Workload], Engine]] = {
    OURS: dist_adamw_engine,
    OURS_WITHOUT_DDP: lambda workload: dist_adamw_engine(workload, ddp=False),
    "DistAdamW, reduce every backward": lambda workload: dist_adamw_engine(workload, ddp=False, into_shard=True),
    REPRODUCIBLE: lambda workload: dist_adamw_engine(workload, reproducible=True),
    AVERAGING: lambda workload: dist_adamw_engine(workload, averages={"ema": {"decay": 0.999}}),
    AVERAGING_SELDOM: lambda workload: dist_adamw_engine(workload, averages={"ema": {"decay": 0.999, "every": 4}}),
    SUMS_INSIDE: lambda workload: dist_adamw_engine(workload, ddp=False, reproducible=True, kind=_SumsInsideFirst),
    "DistAdamW, all-reduce": lambda workload: dist_adamw_engine(workload, attach=False),
    "DDP + AdamW": _ddp_adamw,
    "DDP + ZeroRedundancyOptimizer": _zero_redundancy,
    "DDP + FairScale OSS": _fairscale,
    "FSDP2 + AdamW": _fsdp2,
    "DeepSpeed ZeRO-1": lambda workload: _deepspeed(workload, stage=1),
    "DeepSpeed ZeRO-2": lambda workload: _deepspeed(workload, stage=2),
}


def build(name: str, workload: Workload) -> Engine:
    """Return the engine ``name`` on ``workload``, after its first forward pass. Collective.

    Raises:
        Skip: the engine cannot be used here.
    """
    try:
        engine = BUILDERS[name](workload)
        engine.forward()
    except Skip:
        raise
    except Exception as problem:
        if name.startswith(OURS):
            raise
        raise Skip(f"{type(problem).__name__}: {problem}") from problem
    return engine
