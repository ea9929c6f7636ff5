"""Read and write weights and optimizer state in DeepSpeed 0.19's ZeRO engines, by parameter name.

Stages 1 and 2 concatenate the parameters of a group and give each rank an interval; stage 3 cuts each parameter into
equal parts. Either way a rank has fp32 weights and state in a few flat partitions, and this module maps the elements of
parameters to their offsets in them. It uses internals of DeepSpeed's optimizers, without importing DeepSpeed.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dist_adamw.checkpoint.local_state import (
    MASTER,
    MODEL,
    Access,
    CheckpointContents,
    LocalState,
    buffers,
    only_mine,
    parameter_names,
    plain_groups,
)
from dist_adamw.checkpoint.save_load import Checkpoint, load, save
from dist_adamw.checkpoint.storage.files import inside
from dist_adamw.checkpoint.storage.index import INDEX, write_text
from dist_adamw.checkpoint.storage.partial_tensor import PartialTensor
from dist_adamw.checkpoint.torch_state import TorchAccess
from dist_adamw.checkpoint.unpickling import nothing_executed
from dist_adamw.errors import CheckpointError
from dist_adamw.integrations.deepspeed.averaged_weights import begin_averages, show_averages, to_read
from dist_adamw.optimizer.adamw import DistAdamW
from dist_adamw.ranks import collectives
from dist_adamw.ranks.run_on_all import run_on_all_ranks
from dist_adamw.wrappers import unwrap


@dataclass(frozen=True, slots=True)
class Fragment:
    """Elements ``start`` to ``stop`` of a parameter, which begin at ``offset`` in a flat fp32 ``partition``.

    Attributes:
        name: The parameter's name.
        shape: The shape of the whole parameter.
        weights: The same elements in the model's dtype, 1-D.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    partition: Tensor
    offset: int
    weights: Tensor

    def of(self, flat: Tensor) -> PartialTensor:
        """Return these elements of a tensor with the partition's layout."""
        return PartialTensor.of_ranges(self.shape, self.flat(flat), [(self.start, self.stop)], dtype=flat.dtype)

    def flat(self, flat: Tensor) -> Tensor:
        """Return these elements of a tensor with the partition's layout, 1-D."""
        return flat.detach()[self.offset : self.offset + self.stop - self.start]

    @property
    def model(self) -> PartialTensor:
        """These elements of the model's weights, as a partial tensor."""
        return PartialTensor.of_ranges(self.shape, self.weights, [(self.start, self.stop)], dtype=self.weights.dtype)


class ZeroAccess:
    """Access to the state of a DeepSpeed engine with ZeRO-1, 2 or 3.

    Raises:
        CheckpointError: the engine keeps state outside of the partitions (NVMe, experts).
    """

    def __init__(self, engine: Any, with_state: bool) -> None:
        self.of, self.zero, self.with_state = engine, engine.optimizer, with_state
        self.model: nn.Module = engine.module
        self.names: dict[Any, str] = parameter_names(self.model)
        self.is_stage_3 = hasattr(self.zero, "fp16_partitioned_groups_flat")
        self.optimizer: Optimizer = unwrap(self.zero)
        self.engine = f"ZeRO-{engine.zero_optimization_stage()}"
        swaps = getattr(self.zero, "swap_optimizer", False) or getattr(self.zero, "params_in_nvme_and_cpu", False)
        if swaps or getattr(engine, "has_moe_layers", False):
            raise CheckpointError(
                f"{self.engine} with {'state on NVMe' if swaps else 'experts'} keeps parts of the state where other "
                "engines cannot read them. Save with DeepSpeed's own engine.save_checkpoint."
            )

    def _shape(self, param: Any) -> tuple[int, ...]:
        return tuple(param.ds_shape if self.is_stage_3 else param.shape)

    def parameters(self) -> dict[str, tuple[int, ...]]:
        """See `Access`."""
        found = {name: self._shape(param) for param, name in self.names.items()}
        return {**found, **{name: tuple(buffer.shape) for name, buffer in buffers(self.model)}}

    def without_memory(self) -> list[str]:
        """See `Access`."""
        return [name for name, buffer in buffers(self.model) if buffer.is_meta]

    def groups(self) -> list[dict[str, Any]]:
        """See `Access`."""
        members: list[list[str]] = [[] for _ in self.optimizer.param_groups]
        for group, params in self._groups():
            members[group] += [self.names[param] for param in params]
        return plain_groups(self.optimizer, lambda g, _: members[g])

    def _groups(self) -> Iterator[tuple[int, list[Any]]]:
        """Yield the group and the parameters of each partition."""
        if self.is_stage_3:
            for i, params in enumerate(self.zero.fp16_groups):
                yield self.zero.sub_group_to_group_id[i], params
        else:
            yield from enumerate(self.zero.bit16_groups)

    def _partitions(self) -> list[tuple[int, Tensor]]:
        if self.is_stage_3:
            flat = self.zero.fp32_partitioned_groups_flat
            return [(self.zero.sub_group_to_group_id[i], partition) for i, partition in enumerate(flat)]
        return list(enumerate(self.zero.single_partition_of_fp32_groups))

    def fragments(self) -> Iterator[Fragment]:
        """Yield this process's part of each trained parameter."""
        partitions = self._partitions()
        for i, (_, params) in enumerate(self._groups()):
            for param in params:
                name, shape = self.names[param], self._shape(param)
                if self.is_stage_3:
                    _, offset, _ = self.zero.grad_position[self.zero.get_param_id(param)]
                    start, stop, weights = self._part(param)
                elif (mapping := param._hp_mapping) is not None:
                    start = mapping.lp_fragment_address.start
                    stop = start + mapping.lp_fragment_address.numel
                    offset = mapping.hp_fragment_address.start
                    weights = param.detach().view(-1)[start:stop]
                else:
                    continue
                yield Fragment(name, shape, start, stop, partitions[i][1], offset, weights)

    def _part(self, param: Any) -> tuple[int, int, Tensor]:
        """Return begin, end and elements of stage 3's part of a parameter, trained or frozen."""
        rank, numel = self.zero._get_param_partition_rank(param), param.ds_tensor.ds_numel
        start, stop = (min(edge, param.ds_numel) for edge in (rank * numel, (rank + 1) * numel))
        return start, stop, param.ds_tensor.detach()[: stop - start]

    def to_save(self) -> LocalState:
        """See `Access`."""
        local_state = LocalState()
        for part in self.fragments():
            exact = part.weights.dtype == part.partition.dtype
            local_state.tensors[f"{MODEL}.{part.name}"] = part.of(part.partition) if exact else part.model
            if not exact:
                local_state.tensors[f"{MASTER}.{part.name}"] = part.of(part.partition)
            for kind, value in self.optimizer.state.get(part.partition, {}).items() if self.with_state else ():
                if kind == "step":
                    local_state.scalars[part.name] = {"step": float(value)}
                else:
                    local_state.tensors[f"{kind}.{part.name}"] = part.of(value)
        if self.with_state:
            self._let_all_know_steps(local_state)
        local_state.tensors |= {f"{MODEL}.{name}": weights for name, weights in self._rest()}
        local_state.tensors |= {f"{MODEL}.{name}": buffer.detach() for name, buffer in buffers(self.model)}
        local_state.tensors = only_mine(local_state.tensors)
        return local_state

    def _let_all_know_steps(self, local_state: LocalState) -> None:
        """Add the steps of all parameters: the main rank writes them, and may have no elements of some."""
        for (_, params), (_, partition) in zip(self._groups(), self._partitions(), strict=True):
            if "step" in (state := self.optimizer.state.get(partition, {})):
                local_state.scalars |= {self.names[param]: {"step": float(state["step"])} for param in params}

    def _rest(self) -> Iterator[tuple[str, Tensor]]:
        """Yield frozen parameters."""
        trained = {param for _, params in self._groups() for param in params}
        for param, name in self.names.items():
            if param in trained:
                continue
            if self.is_stage_3:
                start, stop, part = self._part(param)
                yield name, PartialTensor.of_ranges(self._shape(param), part, [(start, stop)], dtype=part.dtype)
            else:
                yield name, param.detach()

    def to_load(self, found: CheckpointContents) -> Callable[[], LocalState]:
        """See `Access`."""
        local_state = LocalState()
        for param, name in self.names.items():
            if not self.is_stage_3:
                local_state.read(MODEL, name, param.detach(), found)  # every rank has whole weights
        for name, weights in self._rest():
            local_state.read(MODEL, name, weights, found)
        for name, buffer in buffers(self.model):
            local_state.read(MODEL, name, buffer.detach(), found)
        for part in self.fragments():
            if self.is_stage_3:
                local_state.read(MODEL, part.name, part.model, found)
            local_state.read(MASTER, part.name, part.of(part.partition), found)
        if not self.with_state:
            local_state.finish = partial(self._finish, {*self.names.values()})
            return lambda: local_state
        kinds = to_read(found, self.optimizer)
        # A parameter that was never updated has no saved state; ZeRO has state for whole partitions: zeros.
        used = {name for name, of in found.kinds.items() if of - {MODEL, MASTER}}
        local_state.finish = partial(self._finish, used)
        self._check_state(found, kinds, used)  # before anything is changed

        def make_room() -> LocalState:
            state = self._room_for(kinds)
            for part in self.fragments():
                if part.name in used:
                    for kind in kinds:
                        local_state.read(kind, part.name, part.of(state[part.partition][kind]), found)
            self._set_steps(state, found)
            return local_state

        return make_room

    def _check_state(self, found: CheckpointContents, kinds: list[str], used: set[str]) -> None:
        """Raise if state of an updated parameter is missing or has another shape."""
        for _, params in self._groups():
            for param in params:
                name = self.names[param]
                for kind in kinds if name in used else []:
                    found.need(kind, name)
                    found.need_shape(f"{kind}.{name}", self._shape(param))

    def _room_for(self, kinds: list[str]) -> dict[Tensor, dict[str, Any]]:
        """Allocate zeros as the state of every partition, and return it; without ``kinds`` clear all state."""
        partitions, state = self._partitions() if kinds else [], self.optimizer.state
        if isinstance(self.optimizer, DistAdamW):
            with self._partitions_shown(partitions):
                self.optimizer._lay_out([partition for _, partition in partitions])
        else:
            state.clear()
            for _, partition in partitions:
                state[partition] = {"step": torch.zeros(()), **{kind: torch.zeros_like(partition) for kind in kinds}}
        return {partition: state[partition] for _, partition in partitions}

    @contextlib.contextmanager
    def _partitions_shown(self, partitions: list[tuple[int, Tensor]]) -> Iterator[None]:
        """Put the partitions into the optimizer's groups, where stage 3 has them only during a step."""
        shown = [group["params"] for group in self.optimizer.param_groups]
        for g, group in enumerate(self.optimizer.param_groups):
            group["params"] = [partition for of, partition in partitions if of == g]
        try:
            yield
        finally:
            for group, params in zip(self.optimizer.param_groups, shown, strict=True):
                group["params"] = params

    def _set_steps(self, state: dict[Tensor, dict[str, Any]], found: CheckpointContents) -> None:
        for (_, params), (_, partition) in zip(self._groups(), self._partitions(), strict=True):
            numbers_of_params = (found.scalars.get(self.names[param], {}) for param in params)
            steps = {float(numbers["step"]) for numbers in numbers_of_params if "step" in numbers}
            if len(steps) > 1:
                warnings.warn(
                    f"parameters of one group have had {sorted(steps)} updates, and {self.engine} keeps one count "
                    f"for all of them: they continue with {max(steps):g}.",
                    stacklevel=2,
                )
            if partition in state and steps:
                state[partition]["step"].fill_(max(steps))

    def _finish(self, used: set[str]) -> None:
        self._forget_gradients()
        if isinstance(self.optimizer, DistAdamW):
            self.optimizer.recount()
        for part in self.fragments():
            if part.name not in used:
                begin_averages(self.optimizer, part.partition, part.flat)
        # DeepSpeed caches views of the previous state: link them again.
        if hasattr(self.zero, "_hp_optimizer_states_linked"):
            self.zero._hp_optimizer_states_linked = False
        if self.is_stage_3:  # persistent and still gathered parameters have the old values: partition them again
            self.zero.checkpoint_event_prologue()
            self.zero.checkpoint_event_epilogue()

    def _forget_gradients(self) -> None:
        """Drop gradients accumulated before the load, much as DeepSpeed does when an update overflows."""
        zero = self.zero
        zero.zero_grad()  # stage 1 accumulates in the model's gradients
        if self.is_stage_3:
            zero.grad_partitions_flat_buffer.zero_()  # all of it: the next micro-batch may not overwrite every part
        else:
            zero.all_grad_tensors.clear()  # stage 2 accumulates here,
            zero.averaged_gradients.clear()  # or here if gradients have more precision than weights
            if zero.cpu_offload:
                zero.reset_cpu_buffers()
                zero.accumulated_grads_in_cpu.clear()
                zero._offload_accumulated_param_ids.clear()
        _begin_update(self.of)


class WholeAccess(TorchAccess):
    """Access to the state of a DeepSpeed engine without ZeRO, or with a plain optimizer."""

    def __init__(self, engine: Any, optimizer: Optimizer | None) -> None:
        super().__init__(engine.module, optimizer)
        self.of = engine

    def to_load(self, found: CheckpointContents) -> Callable[[], LocalState]:
        """See `Access`."""
        make_theirs = super().to_load(found)

        def make_room() -> LocalState:
            local_state = make_theirs()
            finish = local_state.finish

            def begin_update() -> None:
                finish()
                _begin_update(self.of)

            local_state.finish = begin_update
            return local_state

        return make_room


def _begin_update(engine: Any) -> None:
    """Make the next micro-batch the first of an update. Local."""
    engine.micro_steps -= engine.micro_steps % engine.gradient_accumulation_steps()


def find_access(model: nn.Module, optimizer: Optimizer | None) -> Access | None:
    """Return the adapter for a DeepSpeed engine's state; None if ``model`` is not one. Local.

    Raises:
        CheckpointError: DeepSpeed keeps its weights in a way that is not supported.
    """
    inner: Any = getattr(model, "optimizer", None)
    if not hasattr(model, "zero_optimization_stage"):
        return None
    if hasattr(inner, "single_partition_of_fp32_groups") or hasattr(inner, "fp16_partitioned_groups_flat"):
        return ZeroAccess(model, with_state=optimizer is not None)
    if inner is None or isinstance(inner, Optimizer):
        return WholeAccess(model, inner)
    raise CheckpointError(
        f"{type(inner).__name__} keeps its weights in an unsupported way. Use ZeRO stage 1 or 2, without "
        "grad_accum_dtype: it does the same in less memory."
    )


_HOW_TO_TRUST = (
    "DeepSpeed wrote this folder, as pickles. If you trust it, pass load_checkpoint(..., weights_only=False), "
    "or set TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1."
)


def prepare_deepspeed(engine: Any, scheduler: Any = None) -> None:
    """Make ``engine.save_checkpoint`` and ``load_checkpoint`` use our checkpoints. Local.

    Arguments stay the same (but frozen weights are always saved, and names must always match), and so do the folders:
    ``<save_dir>/<tag>`` and a file ``latest``. DeepSpeed itself reads a folder that it wrote, and executes code in its
    pickles, so that needs ``load_checkpoint(..., weights_only=False)``.
    `dist_adamw.prepare` and `prepare_trainer` call this themselves.

    Args:
        engine: The engine that ``deepspeed.initialize`` returned.
        scheduler: Default: the engine's scheduler.
    """
    load_theirs = engine.load_checkpoint
    show_averages(engine)

    def ours() -> Any:
        found = engine.lr_scheduler if scheduler is None else scheduler
        return getattr(found, "scheduler", found)

    def save_checkpoint(
        save_dir: str,
        tag: str | None = None,
        client_state: dict[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        if exclude_frozen_parameters:
            warnings.warn(
                "exclude_frozen_parameters=True is ignored: frozen weights are saved too, so that the checkpoint loads "
                "on every engine.",
                stacklevel=2,
            )
        tag = f"global_step{engine.global_steps}" if tag is None else str(tag)
        counts = {name: getattr(engine, name) for name in ("global_steps", "global_samples", "skipped_steps")}
        extra = {"client_state": dict(client_state or {}), "engine": counts}
        save(Path(save_dir) / tag, engine, engine.optimizer, ours(), extra=extra)
        if save_latest:
            run_on_all_ranks(lambda: write_text(Path(save_dir) / "latest", tag) if collectives.rank() == 0 else None)
        return True

    def load_checkpoint(
        load_dir: str,
        tag: str | None = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        weights_only: bool = True,
        **theirs: Any,
    ) -> tuple[str | None, dict[str, Any] | None]:
        latest = Path(load_dir) / "latest"
        if tag is None and latest.is_file():
            tag = inside(latest, latest.read_text().strip())
        if tag is None or not (Path(load_dir) / tag / INDEX).exists():
            with nothing_executed(Path(load_dir), _HOW_TO_TRUST, trusted=not weights_only):
                found: tuple[str | None, dict[str, Any] | None] = load_theirs(
                    load_dir,
                    tag,
                    load_module_strict=load_module_strict,
                    load_optimizer_states=load_optimizer_states,
                    load_lr_scheduler_states=load_lr_scheduler_states,
                    load_module_only=load_module_only,
                    **theirs,
                )
            return found
        optimizer = engine.optimizer if load_optimizer_states and not load_module_only else None
        loaded = load(
            Path(load_dir) / tag,
            engine,
            optimizer,
            ours() if load_lr_scheduler_states and not load_module_only else None,
        )
        accept_counts(engine, loaded)
        return str(loaded.path), loaded.extra.get("client_state", {})

    engine.save_checkpoint, engine.load_checkpoint = save_checkpoint, load_checkpoint


def accept_counts(engine: Any, loaded: Checkpoint) -> None:
    """Set an engine's counters from a checkpoint of any engine. Local."""
    inner = unwrap(engine.optimizer)
    known = {"global_steps": getattr(inner, "updates", 0), "global_samples": loaded.samples or 0, "skipped_steps": 0}
    counts = loaded.extra.get("engine", {})
    for name, value in known.items():
        count = counts.get(name, value) if isinstance(counts, dict) else value
        setattr(engine, name, count if type(count) is int and count >= 0 else value)
    # At the beginning of an update: gradients of a partial accumulation are not saved.
    engine.micro_steps = engine.global_steps * engine.gradient_accumulation_steps()
