"""Gather averaged gradients from their owners into ``param.grad``."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from dist_adamw.optimizer.sharding.shard import Shard
from dist_adamw.optimizer.transport.base import MAX_IN_FLIGHT, InFlightBucket
from dist_adamw.optimizer.transport.layout import Piece


def flat_gradient(shard: Shard, i: int) -> Tensor:
    """Return a 1-D view of the gradient of parameter ``i`` in the shard's order of elements. Local.

    If the gradient has another order, ``param.grad`` is replaced by a copy in this one, so that writes reach it.
    """
    param = shard.params[i]
    assert param.grad is not None
    flat = shard.order.flatten(i, param.grad)
    if flat.data_ptr() != param.grad.data_ptr():
        param.grad = shard.order.unflatten(i, flat)
    return flat


def turn_into_sums(shard: Shard, averages_in: Sequence[Collection[int]]) -> None:
    """Turn averages back into sums of local gradients, so that backward can add to them. Local.

    The owner keeps W times the average and the other ranks keep zero, so the next round counts nothing twice.

    Args:
        averages_in: For each bucket, ids of the parameters whose gradients in it are averages.
    """
    assert shard.transport is not None
    # In a pass that raised, averages may not lie in ``param.grad`` yet.
    flat = [None if param.grad is None else flat_gradient(shard, i) for i, param in enumerate(shard.params)]
    _write_own_runs(shard, flat)
    layout, own, others = shard.layout, list[Tensor](), list[Tensor]()
    for k, are_averages in enumerate(averages_in):
        (start, stop), (first, last) = layout.bucket(k), layout.slice_of(k, shard.rank)
        own += _runs(shard, flat, layout.pieces(first, last), are_averages)
        others += _runs(shard, flat, [*layout.pieces(start, first), *layout.pieces(last, stop)], are_averages)
    if own:
        torch._foreach_mul_(own, shard.transport.count)
    if others:
        torch._foreach_zero_(others)
    shard.gradients.reduced.clear()


def _runs(
    shard: Shard, flat: Sequence[Tensor | None], pieces: Sequence[Piece], chosen: Collection[int]
) -> list[Tensor]:
    """Return the runs ``pieces`` of ``flat``, the gradients, for parameters with an id in ``chosen``."""
    found = []
    for piece in pieces:
        grad = flat[piece.param]
        if grad is not None and id(shard.params[piece.param]) in chosen:
            found.append(grad[piece.start : piece.stop])
    return found


def gather_from_ranks(shard: Shard, only: Collection[int] | None) -> None:
    """Write the owners' averages into every ``param.grad``, on all ranks. Collective.

    Args:
        only: Ids of the parameters that have been averaged; None: all. The gradients of others are left alone.
    """
    flat: list[Tensor | None] = []
    for i, param in enumerate(shard.params):
        is_left_alone = only is not None and id(param) not in only
        flat.append(None if param.grad is None or is_left_alone else shard.order.flatten(i, param.grad))
    _write_own_runs(shard, flat)
    _gather(shard, flat)
    for i, (param, whole) in enumerate(zip(shard.params, flat, strict=True)):
        if whole is not None and param.grad is not None and whole.data_ptr() != param.grad.data_ptr():
            param.grad = shard.order.unflatten(i, whole)  # had other strides than the shard, so ``whole`` is a copy
    shard.gradients.reduced.clear()


def _write_own_runs(shard: Shard, flat: Sequence[Tensor | None]) -> None:
    for k, own in shard.gradients.reduced.items():
        for piece, run in zip(shard.owned.pieces[k], own, strict=True):
            whole = flat[piece.param]
            if run is None or whole is None:
                continue
            place = whole[piece.start : piece.stop]
            # Averages mostly lie in ``param.grad`` already; only those in shards or DDP's buckets are elsewhere.
            if place.data_ptr() != run.data_ptr():
                place.copy_(run)


def _gather(shard: Shard, flat: list[Tensor | None]) -> None:
    assert shard.transport is not None
    in_flight: deque[InFlightBucket] = deque()
    for k in range(shard.layout.num_buckets):
        # The same on every rank, since ranks have agreed on which parameters have a gradient.
        if all(flat[piece.param] is None for piece in shard.layout.pieces(*shard.layout.bucket(k))):
            continue
        if len(in_flight) == MAX_IN_FLIGHT:
            shard.transport.finish_gather(in_flight.popleft())
        in_flight.append(shard.transport.start_gather(k, flat))
    for sent in in_flight:
        shard.transport.finish_gather(sent)


def take_replaced(shard: Shard) -> None:
    """Use this rank's runs of gradients with which the user replaced reduced ones. Local."""
    for k, own in shard.gradients.reduced.items():
        for j, piece in enumerate(shard.owned.pieces[k]):
            grad = shard.params[piece.param].grad
            if own[j] is not None and grad is not None:
                own[j] = shard.order.flatten(piece.param, grad)[piece.start : piece.stop]


def zeros_for(params: Sequence[Tensor], has_grad: Sequence[bool]) -> None:
    """Give zeros as gradient to those of ``params`` that have a gradient, to receive it. Local."""
    for param, is_there in zip(params, has_grad, strict=True):
        if is_there:
            param.grad = torch.zeros_like(param)
