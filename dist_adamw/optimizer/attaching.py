"""Check ranks and give them the same weights when a model is attached, before any gradient is reduced to its owner."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from dist_adamw.optimizer.gradients.gradient_path import GradientPath
from dist_adamw.optimizer.gradients.keyed_random import find_running_statistics
from dist_adamw.optimizer.gradients.registry import gather_from_owners
from dist_adamw.optimizer.sharding.fingerprints import fingerprints
from dist_adamw.optimizer.sharding.schemes import ShardingRanks
from dist_adamw.optimizer.transport import sends_from_host
from dist_adamw.optimizer.transport.pipes import open_pipes
from dist_adamw.optimizer.transport.rollcall import Channel
from dist_adamw.ranks import agreement, collectives

_last_tag = 0


def new_tag(ranks: ShardingRanks) -> int:
    """Return a number that no path of these ranks has used, the same on all of them. Collective."""
    global _last_tag
    # The maximum, since ranks may be in other groups too and have used different numbers of tags.
    tag = _last_tag + 1
    for group in ranks.groups:
        tag = max(collectives.all_gather_objects(tag, group))
    _last_tag = tag
    return tag


def open_channel(ranks: ShardingRanks, device: torch.device) -> Channel:
    """Return a channel for the messages of a path. Collective."""
    group, tag = ranks.process_group, new_tag(ranks)
    assert group is not None
    pipes = open_pipes(group) if sends_from_host(group, device) else None
    return Channel(tag, pipes, may_share=pipes is not None)


def check_options_alike(record: dict[str, Any], ranks: ShardingRanks) -> None:
    """Raise on every rank if ``record`` is not the same on all. Collective.

    All ranks of the job take part, whatever their options; with a mesh of only some ranks, those of the mesh.

    Raises:
        AgreementError: names the rank, the option and both values.
    """
    mesh = ranks.mesh
    groups: list[dist.ProcessGroup | None] = [None]
    if mesh is not None and mesh.size() < collectives.world_size():
        groups = [mesh.get_group(axis) for axis in range(mesh.ndim)]
    for group in groups:
        agreement.check_agreement(record, group)


def check_averaging(model: nn.Module, ranks: ShardingRanks) -> None:
    """Refuse a module whose gradients would not be averaged, or not over the ranks that share the state. Local.

    Raises:
        ValueError: names the ranks.
    """
    is_ddp = isinstance(model, DistributedDataParallel)
    if ranks.process_group is None:
        several = collectives.initialized() and collectives.world_size() > 1
        if several and not is_ddp:
            raise ValueError(
                "attach() needs sharded state, and this optimizer has shard=False: nothing would average the "
                "gradients. Leave shard='auto', or wrap the model in DistributedDataParallel."
            )
        return
    if isinstance(model, DistributedDataParallel) and not averages_over(ranks, model.process_group):
        raise ValueError(
            f"DistributedDataParallel averages over ranks {dist.get_process_group_ranks(model.process_group)}, but "
            f"attach() would average gradients over {ranks.averaged()}, the ranks of the optimizer's state. Pass "
            "DistAdamW a mesh of all the module's ranks (two axes to replicate state), or do not call attach()."
        )


def averages_over(ranks: ShardingRanks, group: dist.ProcessGroup) -> bool:
    """Return whether gradients that `DistAdamW.attach` averages are averaged over the ranks of ``group``. Local."""
    return ranks.averaged() == sorted(dist.get_process_group_ranks(group))


def check_reproducible(model: nn.Module) -> None:
    """Refuse a module whose results depend on which rank computes which micro-batches. Local.

    Raises:
        ValueError: names the module.
    """
    name = find_running_statistics(model)
    if name is not None:
        raise ValueError(
            f"reproducible=True cannot keep the running statistics of {name!r}, a "
            f"{type(model.get_submodule(name)).__name__}: a rank knows only its micro-batches. Use GroupNorm or "
            "LayerNorm, track_running_stats=False, or freeze it with eval() before attach() or dist_adamw.prepare."
        )


def agree_on_seed(group: dist.ProcessGroup | None) -> tuple[int, str]:
    """Return the first rank's seed of torch's random numbers and its machine; warn if ranks differ. Collective."""
    here = (torch.initial_seed() & ((1 << 63) - 1), describe_machine())
    (seed, machine), *others = [here] if group is None else collectives.all_gather_objects(here, group)
    for other in dict.fromkeys(theirs for _, theirs in others if theirs != machine):
        if collectives.rank(group) == 0:
            warn_of_other_bits("ranks may compute other bits", machine, other, stacklevel=5)
    return seed, machine


def describe_machine() -> str:
    """Return what the last bits of results on a CPU depend on. Local."""
    facts = {
        "torch": torch.__version__,
        "threads (OMP_NUM_THREADS, torch.set_num_threads)": torch.get_num_threads(),
        "instruction set (torch.backends.cpu.get_cpu_capability)": torch.backends.cpu.get_cpu_capability(),
    }
    return "; ".join(f"{name}: {value}" for name, value in facts.items())


def warn_of_other_bits(what: str, one: str, other: str, *, stacklevel: int) -> None:
    """Warn of two machines that differ, and name in what. Local.

    Args:
        what: What may happen.
        one: The result of `describe_machine` on one of them.
        other: On the other.
        stacklevel: That of the warning, counted from the caller.
    """
    ours, theirs = (dict(fact.partition(": ")[::2] for fact in text.split("; ")) for text in (one, other))
    differ = [f"{name}: {ours[name]} and {theirs.get(name)}" for name in ours if ours[name] != theirs.get(name)]
    warnings.warn(
        f"reproducible=True: {what}, because they differ in {'; '.join(differ)}.",
        stacklevel=stacklevel + 1,
    )


def copy_first_rank(model: nn.Module, ranks: ShardingRanks) -> None:
    """Broadcast the first rank's parameters and buffers to all ranks. Collective.

    Raises:
        AgreementError: their shapes or dtypes differ.
    """
    tensors = {
        name: tensor.detach()
        for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers())
        if not (tensor.is_meta or is_lazy(tensor))
    }
    record = {name: [list(tensor.shape), str(tensor.dtype)] for name, tensor in tensors.items()}
    for group in ranks.groups:
        agreement.check_agreement(record, group)  # a broadcast of different sizes would abort or hang
        collectives.broadcast_from_first(list(tensors.values()), group)


def check_gradients_before(path: GradientPath, params: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    """Refuse gradients from before `attach` that are not averages. Collective.

    Args:
        path: The path that will receive the gradients.
        params: Parameters of the module whose gradients it does not receive yet.

    Raises:
        ValueError: they differ over ranks. On every rank.
        RuntimeError: they are parts of averages, left by an optimizer that no longer exists. On every rank.
    """
    has_gradients = any(p.grad is not None for p in params)
    if not any(collectives.all_gather_objects(has_gradients, group)):
        return
    gather_from_owners(path, params)
    found = fingerprints([p.grad for p in params if p.grad is not None and p.grad.layout == torch.strided])
    if len(set(map(tuple, collectives.all_gather_objects(found, group)))) > 1:
        raise ValueError(
            "attach() was called for a module whose gradients differ over ranks: they may be local ones, or averages "
            "of which another optimizer left a part on each rank. Call zero_grad() before attach()."
        )


def warn_of_local_gradients(
    params: Sequence[Tensor], ranks: ShardingRanks, device: torch.device, *, stacklevel: int
) -> None:
    """Compare the gradients of ``params`` over ranks, and warn if they differ. Collective; costs one pass over them.

    Args:
        params: The parameters of an optimizer that is not attached.
        device: The device of its state.
        stacklevel: That of the warning, counted from the caller.
    """
    group = ranks.process_group
    assert group is not None
    grads = [param.grad for param in params if param.grad is not None]
    value = agreement.fingerprint({"": fingerprints([grad for grad in grads if grad.layout == torch.strided])})
    extremes = torch.tensor([value, -value], device="cpu" if collectives.serves_host(group) else device)
    for one in ranks.groups:
        dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=one)
    most, minus_least = extremes.tolist()
    if most != -minus_least:
        warnings.warn(
            f"gradients differ over the {collectives.world_size(group)} ranks before the second update: nothing "
            "averages them, so each rank updates its share with its own gradients alone. Call "
            "optimizer.attach(model) before training, use dist_adamw.prepare, or wrap the model in "
            "DistributedDataParallel. If ranks are meant to train separately, pass shard=False.",
            stacklevel=stacklevel + 1,
        )


def reads_compiled(model: nn.Module | None, compiled: type | tuple[()]) -> bool:
    """Return whether ``model`` contains a compiled module, which other classes of parameters would recompile. Local.

    Args:
        compiled: torch._dynamo's class of such modules; () if it was never imported.
    """
    if model is None:
        return False
    return any(isinstance(m, compiled) or m._compiled_call_impl is not None for m in model.modules())
