"""Read and write the training state of models in plain torch, DDP or FSDP2."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from dist_adamw.checkpoint.local_state import (
    ADAM_FAMILY,
    MASTER,
    MODEL,
    SCALARS,
    CheckpointContents,
    LocalState,
    buffers,
    family_of,
    only_mine,
    outside,
    parameter_names,
    plain_groups,
)
from dist_adamw.checkpoint.storage.partial_tensor import PartialTensor, Values, evaluated
from dist_adamw.checkpoint.storage.regions import Region
from dist_adamw.errors import CheckpointError
from dist_adamw.optimizer.adamw import DistAdamW
from dist_adamw.optimizer.sharding.bucket_views import MASTERS, MOMENTS
from dist_adamw.optimizer.sharding.dtensors import local_of
from dist_adamw.optimizer.sharding.memory_order import axes_in_memory, storage_order
from dist_adamw.optimizer.sharding.shard import Shard
from dist_adamw.optimizer.sharding.values import exact_weights, set_exact_weights
from dist_adamw.optimizer.shown_weights import reshard
from dist_adamw.ranks import collectives
from dist_adamw.wrappers import bare, unwrap


class TorchAccess:
    """Access to whole parameters on every rank, or DTensors: one process, DDP, FSDP2, tensor parallelism.

    Making one has FSDP2 drop the whole weights that it keeps after a forward pass without a backward pass.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer | None) -> None:
        self.model = bare(model)
        reshard([self.model])
        self.optimizer = None if optimizer is None else unwrap(optimizer)
        self.names = parameter_names(model)
        for g, group in enumerate([] if self.optimizer is None else self.optimizer.param_groups):
            for i, param in enumerate(group["params"]):
                self.names.setdefault(param, outside(i, g))
        if any(isinstance(param, DTensor) for param in self.names):
            self.engine = "FSDP2"
        else:
            self.engine = "single" if collectives.world_size() == 1 else "DDP"

    def parameters(self) -> dict[str, tuple[int, ...]]:
        """See `Access`."""
        found = {name: tuple(param.shape) for param, name in self.names.items()}
        return {**found, **{name: tuple(buffer.shape) for name, buffer in buffers(self.model)}}

    def without_memory(self) -> list[str]:
        """See `Access`."""
        everything = (*((name, param) for param, name in self.names.items()), *buffers(self.model))
        return [name for name, tensor in everything if tensor.is_meta]

    def groups(self) -> list[dict[str, Any]]:
        """See `Access`."""
        return plain_groups(self.optimizer, lambda _, group: [self.names[param] for param in group["params"]])

    def to_save(self) -> LocalState:
        """See `Access`."""
        local_state = LocalState()
        if isinstance(self.optimizer, DistAdamW):
            self.optimizer.wait()  # parameters in flight still have their old values
            self._of_shards(self.optimizer, local_state)
        elif self.optimizer is not None:
            self._of_states(self.optimizer, local_state)
        # Where the state is sharded, `_of_shards` has set this rank's runs: each rank writes a part of the weights.
        for param, name in self.names.items():
            local_state.tensors.setdefault(f"{MODEL}.{name}", param.detach())
        local_state.tensors |= {f"{MODEL}.{name}": buffer.detach() for name, buffer in buffers(self.model)}
        local_state.tensors = only_mine(local_state.tensors)
        return local_state

    def _of_shards(self, optimizer: DistAdamW, local_state: LocalState) -> None:
        for shard in optimizer.shards:
            steps = shard.steps.tolist()  # at once: each transfer would wait for the device
            for i, param in enumerate(shard.params):
                name = self.names[param]
                local_state.scalars[name] = {"step": steps[i]}
                for kind in shard.moments.keys() - MASTERS:
                    local_state.tensors[f"{kind}.{name}"] = _moment(shard, i, kind)
                if shard.has_master:
                    local_state.tensors[f"{MASTER}.{name}"] = _master(shard, i)
                if shard.process_group is not None:
                    local_state.tensors[f"{MODEL}.{name}"] = _runs(param.detach(), shard.owned.ranges_of(i))

    def _of_states(self, optimizer: Optimizer, local_state: LocalState) -> None:
        for param, state in optimizer.state.items():
            name = self.names[param]
            for kind, value in state.items():
                if kind != "step" and isinstance(value, Tensor):
                    local_state.tensors[f"{kind}.{name}"] = value
                    continue
                value = float(value) if isinstance(value, Tensor) else value
                if type(value) not in SCALARS:
                    raise CheckpointError(
                        f"{type(optimizer).__name__} has {kind} of {name}, a {type(value).__name__}: only tensors and "
                        "numbers can be saved. Use another optimizer, or pass None and save its state yourself."
                    )
                local_state.scalars.setdefault(name, {})[kind] = value

    def to_load(self, found: CheckpointContents) -> Callable[[], LocalState]:
        """See `Access`."""
        local_state = LocalState()
        for param, name in self.names.items():
            local_state.read(MODEL, name, param.detach(), found)
        for name, buffer in buffers(self.model):
            local_state.read(MODEL, name, buffer.detach(), found)
        if isinstance(self.optimizer, DistAdamW):
            self._check_shards(self.optimizer, found)
        elif self.optimizer is not None:
            self._check_states(self.optimizer, found)

        def forget_gradients() -> None:
            self.model.zero_grad()  # accumulated before the load
            if isinstance(self.optimizer, DistAdamW):
                self.optimizer.zero_grad()  # also drops what was already reduced to owners

        def make_room() -> LocalState:
            local_state.finish = forget_gradients
            if isinstance(self.optimizer, DistAdamW):
                self._into_shards(self.optimizer, local_state, found)
            elif self.optimizer is not None:
                self._into_states(self.optimizer, local_state, found)
            return local_state

        return make_room

    def _with_state(self, found: CheckpointContents) -> list[Tensor]:
        """Return the parameters with optimizer state in the checkpoint."""
        return [p for p, name in self.names.items() if found.kinds.get(name, set()) - {MODEL, MASTER}]

    def _check_shards(self, optimizer: DistAdamW, found: CheckpointContents) -> None:
        chosen = {*self._with_state(found)}
        for group in optimizer.param_groups:
            for param in {*group["params"]} & chosen:
                found.need_adam(self.names[param], param.shape, group["amsgrad"])

    def _into_shards(self, optimizer: DistAdamW, local_state: LocalState, found: CheckpointContents) -> None:
        optimizer._lay_out(self._with_state(found))
        remainders = []
        for shard in optimizer.shards:
            for i, param in enumerate(shard.params):
                name = self.names[param]
                shard.steps[i] = found.scalars.get(name, {}).get("step", 0.0)
                lacking = shard.averages - found.kinds.get(name, set())  # they begin at the next update
                for kind in shard.moments.keys() - {"remainder", *lacking}:
                    local_state.read(kind, name, _moment(shard, i, kind), found)
                if "remainder" in shard.moments:
                    remainders.append((shard, i, name))

        def later() -> Iterator[tuple[LocalState, Callable[[], None]]]:
            # A remainder is computed from fp32 weights, which take memory: one parameter at a time.
            for shard, i, name in remainders:
                weights = exact_weights(shard, i)
                one = LocalState()
                one.read(MASTER, name, _like_param(shard, i, weights, torch.float32), found)
                yield one, lambda shard=shard, i=i, weights=weights: set_exact_weights(shard, i, weights)  # type: ignore[misc]

        forget_gradients = local_state.finish

        def finish() -> None:
            optimizer.recount()
            forget_gradients()

        local_state.later, local_state.finish = later, finish

    def _check_states(self, optimizer: Optimizer, found: CheckpointContents) -> None:
        for group in optimizer.param_groups:
            for param in group["params"]:
                name = self.names[param]
                kinds, numbers = self._state_of(name, optimizer, found)
                if kinds and type(optimizer).__name__ in ADAM_FAMILY:
                    found.need_adam(name, param.shape, group.get("amsgrad", False))
                if twice := sorted(kinds & numbers.keys()):
                    raise CheckpointError(f"the checkpoint has {twice[0]} of {name} twice: it is damaged.")

    def _state_of(self, name: str, optimizer: Optimizer, found: CheckpointContents) -> tuple[set[str], dict[str, Any]]:
        """Return the tensors and numbers of a parameter's saved state that an optimizer takes."""
        kinds, numbers = found.kinds.get(name, set()) - {MODEL, MASTER}, dict(found.scalars.get(name, {}))
        if type(optimizer).__name__ in ADAM_FAMILY:  # a subclass may have more state, and takes all
            return kinds & {*MOMENTS}, {kind: value for kind, value in numbers.items() if kind == "step"}
        return kinds, numbers

    def _into_states(self, optimizer: Optimizer, local_state: LocalState, found: CheckpointContents) -> None:
        states: dict[Tensor, dict[str, Any]] = {}
        for group in optimizer.param_groups:
            for param in group["params"]:
                name = self.names[param]
                state: dict[str, Any] = {}
                kinds, numbers = self._state_of(name, optimizer, found)
                for kind in sorted(kinds):
                    key = f"{kind}.{name}"
                    before = optimizer.state.get(param, {}).get(kind)
                    state[kind] = _room_for(param, before, found.shapes[key], found.dtypes[key])
                    local_state.read(kind, name, state[kind], found)
                for kind, value in numbers.items():
                    state[kind] = _number_in_state(optimizer, group, param, kind, value)
                if state:
                    states[param] = state
        # Replaced only at the end: `_room_for` reuses tensors of the old state.
        optimizer.state.clear()
        optimizer.state.update(states)


def _room_for(param: Tensor, before: Any, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return a tensor to read state of ``param`` into: the present one, if it fits."""
    if isinstance(before, Tensor) and (tuple(before.shape), before.dtype) == (shape, dtype):
        return before  # a second one would double the state's memory
    if shape == tuple(param.shape):
        return torch.zeros_like(param, dtype=dtype, requires_grad=False)
    return torch.zeros(shape, dtype=dtype, device=param.device)


def _number_in_state(optimizer: Optimizer, group: dict[str, Any], param: Tensor, kind: str, value: Any) -> Any:
    """Return a number as ``optimizer`` stores it: Adam's step is a tensor, on the device for some kernels."""
    is_tensor = kind == "step" and (family_of(optimizer) in ADAM_FAMILY or type(value) is float)
    if not is_tensor:
        return value
    on_device = group.get("fused") or group.get("capturable")
    return torch.tensor(float(value), device=local_of(param).device if on_device else "cpu")


def _like_param(shard: Shard, i: int, values: Values, dtype: torch.dtype) -> Tensor:
    """Return ``values``, this rank's elements of parameter ``i`` in memory order, as a partial tensor."""
    param = shard.params[i]
    if not isinstance(param, DTensor):
        made = PartialTensor.of_ranges(
            param.shape, values, shard.owned.ranges_of(i), dtype=dtype, order=axes_in_memory(param)
        )
        made.shared = shard.process_group is not None
        return made
    if isinstance(values, Tensor):
        return PartialTensor.of(shard.shaped(values, param))
    like = PartialTensor.of(param.detach())
    return PartialTensor(
        param.shape, dtype, {region: partial(_part, shard, param, values, region) for region in like.parts}
    )


def _part(shard: Shard, param: DTensor, values: Callable[[], Tensor], region: Region) -> Tensor:
    return evaluated(PartialTensor.of(shard.shaped(values(), param)).parts[region])


def _moment(shard: Shard, i: int, kind: str) -> Tensor:
    values = shard.owned_moment(i, kind)
    return _like_param(shard, i, values, values.dtype)


def _master(shard: Shard, i: int) -> Tensor:
    if "master" in shard.moments:
        return _moment(shard, i, "master")
    return _like_param(shard, i, partial(exact_weights, shard, i), torch.float32)


def _runs(tensor: Tensor, ranges: Iterable[Sequence[int]]) -> PartialTensor:
    """Return the elements of a whole tensor in ``ranges``, counted in memory order."""
    flat, order = storage_order(tensor), axes_in_memory(tensor)
    parts: dict[Region, Values] = {}
    for start, stop in ranges:
        parts |= PartialTensor.of_ranges(
            tensor.shape, flat[start:stop], [(start, stop)], dtype=tensor.dtype, order=order
        ).parts
    if not tensor.numel():  # ranges are empty, but the index must list the tensor
        return PartialTensor.of(tensor)
    return PartialTensor(tensor.shape, tensor.dtype, parts)
