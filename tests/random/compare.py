"""Compare the two worlds."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dist_adamw.optimizer.kernels.mixed import join_master
from tests.random.reference import HYPER, MOMENTS, Reference
from tests.random.tensors import near, same_bits
from tests.random.worlds import Ours, Torchs


def differences(ours: Ours, theirs: Torchs, *, gradients: bool = True) -> list[str]:
    """Return the differences in weights, gradients, groups and state. Collective after an inexact update."""
    inexact = any(optimizer.inexact for optimizer in theirs.optimizers)
    # A clipped gradient of 16 bits may be rounded to its other neighbour.
    rough = any(optimizer.rough for optimizer in theirs.optimizers)
    same: Any = same_bits
    if inexact:
        same = functools.partial(near, unit=2**-6) if rough else near
    found = []
    named, their_named = list(ours.model.named_parameters()), list(theirs.model.named_parameters())
    if [name for name, _ in named] != [name for name, _ in their_named]:
        return ["the models have other parameters"]
    for (name, p), (_, q) in zip(named, their_named, strict=True):
        if not same(p, q):
            found.append(f"weights of {name}")
        if gradients and not ours.sequence.is_attached and not _same_gradient(p.grad, q.grad, same):
            found.append(f"gradient of {name}")
    for which, (a, b) in enumerate(zip(ours.optimizers, theirs.optimizers, strict=True)):
        found += [f"{what} (optimizer {which})" if which else what for what in _of_optimizers(ours, a, b, same)]
    if inexact and not _found_anywhere(found, ours):
        _take_over(ours, theirs)
    return found


def _found_anywhere(found: list[str], ours: Ours) -> bool:
    everywhere = [bool(found)]
    if ours.sequence.ranks > 1:
        everywhere = [False] * ours.sequence.ranks
        dist.all_gather_object(everywhere, bool(found), group=ours.group)
    return any(everywhere)


def _same_gradient(a: Tensor | None, b: Tensor | None, same: Any) -> bool:
    return (a is None and b is None) or (a is not None and b is not None and same(a, b))


def _of_optimizers(world: Ours, ours: Any, theirs: Reference, same: Any) -> list[str]:
    names = {id(param): name for name, param in world.model.named_parameters()}
    if len(ours.param_groups) != len(theirs.param_groups):
        return ["number of groups"]
    found = []
    for i, (group, other) in enumerate(zip(ours.param_groups, theirs.param_groups, strict=True)):
        found += [f"{key} of group {i}" for key in HYPER if _plain(group[key]) != _plain(other[key])]
        if len(group["params"]) != len(other["params"]):
            found.append(f"number of parameters in group {i}")
            continue
        for j, (p, q) in enumerate(zip(group["params"], other["params"], strict=True)):
            name = names.get(id(p), f"parameter {j} of group {i}")
            if id(p) not in names and not same(p, q):
                found.append(f"weights of {name}")
            found += [f"{what} of {name}" for what in _of_state(ours, theirs, p, q, group["amsgrad"], same)]
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.item()
    return tuple(value) if isinstance(value, list) else value


def _of_state(ours: Any, theirs: Reference, p: Tensor, q: Tensor, amsgrad: bool, same: Any) -> list[str]:
    state, other = ours.state.get(p) or {}, theirs.state.get(q) or {}
    found = []
    step, their_step = float(state.get("step", 0.0)), float(other.get("step", 0.0))
    if step != their_step:
        found.append(f"step ({step:g}, and {their_step:g} in torch)")
    for key in MOMENTS[: 2 + amsgrad]:
        mine, whole = state.get(key), other.get(key)
        if mine is None or whole is None:  # state of zeros is no state
            there = mine if mine is not None else whole
            if there is not None and bool(there.any()):
                found.append(f"{key} ({'not there' if mine is None else 'there'}, unlike in torch)")
        elif not _same_share(ours, p, mine, whole, _allowing_for_terms(theirs, key, same)):
            found.append(key)
    if theirs.master_dtype is not None and p.dtype.itemsize == 2 and other.get("master") is not None:
        weight = theirs.effective_weight(q)
        mine = fp32_weight(ours, p)
        if mine is None or not _same_share(ours, p, mine, weight, same):
            found.append("fp32 weights")
    return found


def _allowing_for_terms(theirs: Reference, key: str, same: Any) -> Any:
    """``same`` for a moment whose terms may cancel: clipped gradients, which are at most the largest norm."""
    limit = theirs.max_grad_norm
    if same is same_bits or key != "exp_avg" or limit is None or not math.isfinite(limit):
        return same
    return functools.partial(same, largest_term=limit)


def fp32_weight(optimizer: Any, param: Tensor) -> Tensor | None:
    """Return this rank's part of the fp32 weight, as the next update will read it."""
    state = optimizer.state.get(param) or {}
    exact = state.get("master", state.get("remainder"))
    if exact is None:
        return None
    weight = param.detach()
    if exact.shape != param.shape:
        if (ranges := ranges_of(optimizer, param)) is None:
            return exact
        flat = _as_laid_out(optimizer, param, weight)
        weight = torch.cat([flat[:0], *(flat[a:b] for a, b in ranges)])
    if "remainder" in state:
        return join_master(weight.contiguous(), exact.contiguous())
    return torch.where(exact.to(weight.dtype) == weight, exact, weight.float())


def ranges_of(optimizer: Any, param: Tensor) -> list[list[int]] | None:
    """Which elements this rank owns, counted in the order of memory; None of a parameter that has no place yet."""
    for shard in optimizer.shards:
        for i, other in enumerate(shard.params):
            if other is param:
                return shard.owned.ranges_of(i)
    return None


def _as_laid_out(optimizer: Any, param: Tensor, whole: Tensor) -> Tensor:
    """``whole``, of the parameter's shape, in the order of memory that the parameter had when it got its place."""
    return whole.permute(_order_of(optimizer, param)).reshape(-1)


def _order_of(optimizer: Any, param: Tensor) -> list[int]:
    (order,) = (
        shard.order.of(i) for shard in optimizer.shards for i, other in enumerate(shard.params) if other is param
    )
    return order


def _same_share(optimizer: Any, p: Tensor, mine: Tensor, whole: Tensor, same: Any) -> bool:
    if mine.shape == whole.shape:
        return bool(same(mine, whole))
    if (ranges := ranges_of(optimizer, p)) is None:
        return True  # a share of another parameter that the user has moved: the next update shows whether it is right
    if mine.shape != (sum(stop - start for start, stop in ranges),):
        return False
    flat = _as_laid_out(optimizer, p, whole)
    expected = torch.cat([flat[:0], *(flat[start:stop] for start, stop in ranges)])
    if bool(mine.any()) != bool(expected.any()):
        return False
    ours = whole.to(mine.dtype, copy=True)  # `same` refuses another dtype
    _put_share(ours, mine, ranges, _order_of(optimizer, p))
    return bool(same(ours, whole))  # the tolerance is that of the whole tensor, not of a share of one element


def _put_share(whole: Tensor, share: Tensor, ranges: list[list[int]], order: list[int]) -> None:
    """Write ``share``, the elements in ``ranges`` counted by the axes in ``order``, to ``whole``."""
    permuted = whole.permute(order)
    flat, place = permuted.reshape(-1).clone(), 0
    for start, stop in ranges:
        flat[start:stop] = share[place : place + stop - start]
        place += stop - start
    permuted.copy_(flat.view(permuted.shape))


def _take_over(ours: Ours, theirs: Torchs) -> None:
    """Continue torch's world from our bits, which were found to be close to torch's."""
    pairs = [
        (a, b, p, q)
        for a, b in zip(ours.optimizers, theirs.optimizers, strict=True)
        for group, other in zip(a.param_groups, b.param_groups, strict=True)
        for p, q in zip(group["params"], other["params"], strict=True)
    ]
    values: list[Any] = []
    for a, b, p, q in pairs:
        state = a.state.get(p) or {}
        held = {key: state[key] for key in MOMENTS if key in state and key in b.state.get(q, {})}
        if b.state.get(q, {}).get("master") is not None:
            # Not what follows from the parameter, which may be what it was by the time it is looked at again.
            held["master"] = state["master"] if "master" in state else fp32_weight(a, p)
        values.append({key: (ranges_of(a, p), value.detach().clone()) for key, value in held.items()})
    everywhere: list[Any] = [values]
    if ours.sequence.ranks > 1:
        everywhere = [None] * ours.sequence.ranks
        dist.all_gather_object(everywhere, values, group=ours.group)
    with torch.no_grad():
        for i, (a, b, p, q) in enumerate(pairs):
            q.copy_(p)
            if not ours.sequence.is_attached and p.grad is not None:
                q.grad = torch.empty_like(q).copy_(p.grad)
            for key in values[i]:
                whole = b.state[q][key]
                for parts in everywhere:
                    ranges, part = parts[i][key]
                    if part.shape == whole.shape and a.process_group is None:
                        whole.copy_(part)
                    elif ranges:
                        _put_share(whole, part.reshape(-1), ranges, _order_of(a, p))
    for optimizer in theirs.optimizers:
        optimizer.inexact = False
