"""DeepSpeed's ZeRO-1 and ZeRO-2 with DistAdamW, from what deepspeed/runtime/zero of DeepSpeed 0.19.8 allocates.

stage_1_and_2.py: the parameters are one flat tensor, padded to a multiple of 2 W elements. Each rank has an fp32 copy
of its partition, also if parameters are fp32 (``single_partition_of_fp32_groups``). A backward pass allocates
``reduce_bucket_size`` elements (``setup_buckets``), to which gradients move, but for those that are larger. Averages of
the parameters that lie in the partition, wholly or in part, get memory when the first of them is reduced
(``copy_grads_in_partition``); ``step`` takes their norms in fp64, and copies those of the partition to a flat tensor,
and then to fp32.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import torch

from dist_adamw.planning.memory import Cost, Memory, Setup, Timeline
from dist_adamw.planning.model import ModelShapes, Parameter

ZERO = {1: "ZeRO-1", 2: "ZeRO-2", 3: "ZeRO-3"}
STEP = 4  # bytes of the step count of a partition
MASTER = 4  # bytes of an fp32 weight
NORM = 8  # bytes of an element of a gradient while its norm is computed (``get_norm_dtype``)


def zero_1(model: ModelShapes, ranks: int, setup: Setup) -> Cost:
    """Return what ZeRO-1 needs."""
    return _stage_1_or_2(model, ranks, setup, stage=1)


def zero_2(model: ModelShapes, ranks: int, setup: Setup) -> Cost:
    """Return what ZeRO-2 needs."""
    return _stage_1_or_2(model, ranks, setup, stage=2)


def width_of(param: Parameter, setup: Setup) -> int:
    """Return the bytes of an element of a parameter that DeepSpeed trains."""
    return 2 if setup.bf16 and param.dtype.is_floating_point else param.dtype.itemsize


def state_bytes(setup: Setup) -> int:
    """Return the bytes of state of an element, of which DeepSpeed keeps the weight itself."""
    own = replace(setup, master_dtype=None, state_dtype=None)
    return MASTER + own.state_bytes(torch.float32)


def _stage_1_or_2(model: ModelShapes, ranks: int, setup: Setup, *, stage: int) -> Cost:
    numel = sum(param.numel for param in model.trained)
    width = max((width_of(param, setup) for param in model.trained), default=0)
    padded = -(-numel // (2 * ranks)) * 2 * ranks
    partition = padded // ranks
    frozen = sum(param.numel * width_of(param, setup) for param in model.parameters if not param.trained)
    partitions = _partitions(model, partition)
    most = max(partitions, key=lambda rank: sum(model.parameters[param].numel for param in partitions[rank]))
    backward = max(
        (_Backward(model, partitions[rank], setup, stage) for rank in {min(partitions), most, max(partitions)}),
        key=lambda backward: backward.time.peak,
    )
    largest = max(model.parameters[param].numel for param in backward.owned)
    norms = backward.time.now * width + min(largest, partition) * NORM
    step = (backward.averages + partition) * width + (0 if width == MASTER else partition * MASTER)
    gradients = backward.time.now * width
    memory = Memory(
        padded * width + frozen + model.buffer_bytes,
        gradients,
        partition * state_bytes(setup) + STEP,
        max(backward.time.peak * width, norms, step) - gradients,
        setup.activations,
    )
    rounds = setup.accumulation if stage == 2 else 1
    sent = (ranks - 1) * (2 * rounds * numel * width + padded * width) // ranks
    return Cost(ZERO[stage], ranks, memory, sent)


def _partitions(model: ModelShapes, partition: int) -> dict[int, set[int]]:
    """Return the parameters that lie, wholly or in part, in a rank's partition, for each partition that differs."""
    found: dict[int, set[int]] = {}
    start = 0
    for place, param in enumerate(model.parameters):
        if param.trained and param.numel:
            stop = start + param.numel
            first, last = start // partition, -(-stop // partition) - 1
            # Between the first and the last partition that it touches there is nothing else: one stands for all.
            for rank in {first, min(first + 1, last), last}:
                found.setdefault(rank, set()).add(place)
            start = stop
    return found


class _Backward:
    """The backward pass that ends an update on one rank, in elements.

    Attributes:
        owned: The parameters in its partition.
        averages: Elements of their gradients, which are whole also if only a part lies in the partition.
        time: Gradients and the bucket that they are reduced in.
    """

    def __init__(self, model: ModelShapes, owned: set[int], setup: Setup, stage: int) -> None:
        self._params, self._size, self._stage, self.owned = model.parameters, setup.reduce_bucket_size, stage, owned
        self.averages = sum(self._params[param].numel for param in owned)
        self.time = Timeline()
        self._gradients: dict[int, int] = {}  # those in memory of their own
        self._pending: set[int] = set()
        self._bucket: list[int] = []
        self._filled = 0  # its elements
        self._has_averages = False
        if setup.accumulation > 1:
            if stage == 2:  # averages of the earlier micro-batches
                self.time.add(self.averages)
            else:  # ZeRO-1 adds micro-batches up in whole gradients, and reduces them in the last one
                self._gradients = {place: param.numel for place, param in enumerate(self._params) if param.trained}
                self.time.add(sum(self._gradients.values()))
        self.time.add(self._size)
        for param, is_last in _order_of_gradients(model):
            self._arrive(param, is_last)
            if stage == 2 and is_last:
                self._add_to_bucket(param)
        if stage == 1:  # ``reduce_gradients``, after the pass
            for param in sorted(self._gradients):
                self._add_to_bucket(param)
        self._reduce()
        self.time.drop(self._size)
        if setup.accumulation > 1 and stage == 2:  # added to the earlier ones
            self.time.drop(self.averages)

    def _arrive(self, param: int, is_last: bool) -> None:
        """Take the gradient of one use of a parameter; of its last use, with that of the others added."""
        numel = self._params[param].numel
        self.time.add(numel)
        if param in self._pending:  # torch's sum is a third tensor
            self.time.add(numel)
            self.time.drop(2 * numel)
        if not is_last:
            self._pending.add(param)
            return
        if param in self._gradients:  # that of the earlier micro-batches
            self.time.drop(numel)
        self._gradients[param] = numel

    def _add_to_bucket(self, param: int) -> None:
        """Move a gradient to the bucket, and reduce that when it is full."""
        numel = self._params[param].numel
        if self._filled + numel > self._size:
            self._reduce()
        if numel <= self._size:  # else it is reduced where it is
            self.time.drop(self._gradients.pop(param))
        self._bucket.append(param)
        self._filled += numel

    def _reduce(self) -> None:
        """Reduce the bucket, and copy the averages of this rank's parameters (``copy_grads_in_partition``)."""
        for param in self._bucket:
            if param in self.owned and not self._has_averages:
                self._has_averages = True
                self.time.add(self.averages)
            if param in self.owned or self._stage == 2:
                self.time.drop(self._gradients.pop(param, 0))
        self._bucket.clear()
        self._filled = 0


def _order_of_gradients(model: ModelShapes) -> list[tuple[int, bool]]:
    """Return each use of a trained parameter in the order of a backward pass, and whether it is the last one."""
    uses = [
        param
        for module in model.modules.in_order(forward=False)
        for param in module.parameters
        if model.parameters[param].trained
    ]
    left = Counter(uses)
    found = []
    for param in uses:
        left[param] -= 1
        found.append((param, not left[param]))
    return found
