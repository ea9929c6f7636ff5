"""DeepSpeed's ZeRO-3 with DistAdamW, from what deepspeed/runtime/zero of DeepSpeed 0.19.8 allocates and sends.

stage3.py: each parameter is divided by itself and padded. Averages have memory that stays
(``grad_partitions_flat_buffer``), and so has the bucket (``ipg_buckets``). ``step`` partitions all parameters first,
then takes the norms of averages in fp64, copies the averages of one sub-group after another, and gathers the small
(persistent) parameters last.

partitioned_param_coordinator.py: which parameters are whole at a time. It follows the order in which modules were
called, gathers those of the next modules ahead, and keeps those that are used again soon. `_Pass` does the same.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, deque
from dataclasses import dataclass

from dist_adamw.planning.memory import Cost, Memory, Setup, Timeline
from dist_adamw.planning.model import ModelShapes, Submodule
from dist_adamw.planning.zero import MASTER, NORM, STEP, ZERO, state_bytes, width_of

_SUB_GROUP = 10**9  # DeepSpeed's sub_group_size, in elements


def zero_3(model: ModelShapes, ranks: int, setup: Setup) -> Cost:
    """Return what ZeRO-3 needs."""
    width = max((width_of(param, setup) for param in model.parameters), default=0)
    partitions = [-(-param.numel // ranks) for param in model.parameters]
    trained = [part for part, param in zip(partitions, model.parameters, strict=True) if param.trained]
    whole = _Pass(model, ranks, setup)
    whole.run()
    averages, bucket = sum(trained) * width, setup.reduce_bucket_size * width
    copied = _largest_sub_group(trained) * (width if width == MASTER else width + MASTER)
    step = max(copied, max(trained, default=0) * NORM) - whole.persistent * width
    memory = Memory(
        (sum(partitions) + whole.persistent) * width + model.buffer_bytes,
        averages,
        sum(trained) * state_bytes(setup) + STEP,
        bucket + max(whole.time.peak * width, step),
        setup.activations,
    )
    rounds = setup.accumulation
    sent = rounds * (whole.gathered + ranks * sum(trained)) + whole.persistent
    return Cost(ZERO[3], ranks, memory, (ranks - 1) * sent * width // ranks)


def _largest_sub_group(partitions: list[int]) -> int:
    """Return the elements of the largest sub-group that `_create_fp16_sub_groups` makes."""
    largest = now = 0
    for part in partitions:
        now += part
        largest = max(largest, now)
        if now >= _SUB_GROUP:
            now = 0
    return largest


@dataclass(slots=True)
class _Gather:
    """Parameters that were gathered in one message, and the buffer it arrives in, until all of them were needed."""

    params: list[int]
    buffer: int
    waiting: int
    is_complete: bool = False


class _Pass:
    """The forward and backward pass of one micro-batch, in elements.

    Attributes:
        time: The whole parameters that are not persistent, and gradients on their way to the owners.
        gathered: Elements that are gathered, padding included.
        persistent: Elements of the parameters that stay whole, padding included.
    """

    def __init__(self, model: ModelShapes, ranks: int, setup: Setup) -> None:
        self._params, self._setup = model.parameters, setup
        self._padded = [-(-param.numel // ranks) * ranks for param in model.parameters]
        self._stays = [param.numel <= setup.param_persistence_threshold for param in model.parameters]
        self.persistent = sum(n for n, stays in zip(self._padded, self._stays, strict=True) if stays)
        self.time, self.gathered = Timeline(), 0
        self._root = model.modules
        backward = list(self._root.in_order(forward=False))
        self._steps = [*self._root.in_order(forward=True), *backward]
        self._uses: list[list[int]] = [[] for _ in model.parameters]  # the steps that use a parameter
        self._before = [0]  # elements of the steps before each step
        for step, module in enumerate(self._steps):
            for param in module.parameters:
                self._uses[param].append(step)
            self._before.append(self._before[-1] + sum(self._params[param].numel for param in module.parameters))
        self._queue = deque((param, step) for step, module in enumerate(self._steps) for param in module.parameters)
        self._fetched_for = [-1] * len(model.parameters)  # the last use that a fetch has provided for
        self._whole: dict[int, int] = {}  # elements of the memory of each whole parameter
        self._arriving: dict[int, _Gather] = {}
        self._live = self._step = 0
        self._left = Counter(param for module in backward for param in module.parameters)
        self._gradients: dict[int, int] = {}  # whole gradients, as backward computes them
        self._bucket: list[int] = []
        self._filled = 0  # its elements

    def run(self) -> None:
        """Follow the pass."""
        self._visit(self._root, forward=True)
        self._visit(self._root, forward=False)
        self._reduce()

    def _visit(self, module: Submodule, *, forward: bool) -> None:
        if module.is_called:
            self._fetch(module)
            self._step += 1
        for child in module.children if forward else reversed(module.children):
            self._visit(child, forward=forward)
        if module.is_called:
            if not forward:
                self._compute_gradients(module)
            self._release(module)

    # ---------------------------------------------------------------- parameters

    def _is_partitioned(self, param: int) -> bool:
        return not (self._stays[param] or param in self._whole or param in self._arriving)

    def _fetch(self, module: Submodule) -> None:
        """Make a module's parameters whole, and gather those of the next modules (``fetch_sub_module``)."""
        self._gather([param for param in module.parameters if self._is_partitioned(param)])
        for param in module.parameters:
            if param in self._arriving:
                self._wait(param)
        wanted = {param for param in module.parameters if self._fetched_for[param] < self._step}
        while self._queue and wanted:
            param, self._fetched_for[param] = self._queue.popleft()
            wanted.discard(param)
        setup = self._setup
        room = min(setup.max_live_parameters - self._live, setup.prefetch_bucket_size)
        ahead: dict[int, None] = {}
        numel = 0
        while self._queue and numel < room:
            param, step = self._queue.popleft()
            self._fetched_for[param] = max(self._fetched_for[param], step)
            if self._is_partitioned(param) and param not in ahead:
                ahead[param] = None
                numel += self._params[param].numel
        self._gather(list(ahead))

    def _gather(self, params: list[int]) -> None:
        if not params:
            return
        padded = sum(self._padded[param] for param in params)
        self.gathered += padded
        self._live += sum(self._params[param].numel for param in params)
        self.time.add(padded)
        gather = _Gather(params, padded, len(params))
        if len(params) == 1:  # the buffer is the parameter
            self._whole[params[0]], gather.buffer, gather.is_complete = padded, 0, True
        for param in params:
            self._arriving[param] = gather

    def _wait(self, param: int) -> None:
        """Copy all parameters out of the buffer that this one arrived in."""
        gather = self._arriving.pop(param)
        if not gather.is_complete:
            gather.is_complete = True
            for one in gather.params:
                self._whole[one] = self._params[one].numel
                self.time.add(self._whole[one])
        gather.waiting -= 1
        if not gather.waiting:
            self.time.drop(gather.buffer)

    def _release(self, module: Submodule) -> None:
        """Free a module's parameters but those that are used again soon (``__params_to_release``)."""
        for param in module.parameters:
            if param not in self._whole or self._fetched_for[param] > self._step:
                continue
            uses = self._uses[param]
            place = bisect_left(uses, self._step)
            if place < len(uses):
                between = self._before[uses[place]] - self._before[self._step]
                if between < self._setup.max_live_parameters:
                    continue
            self.time.drop(self._whole.pop(param))
            self._live -= self._params[param].numel

    # ---------------------------------------------------------------- gradients

    def _compute_gradients(self, module: Submodule) -> None:
        """Compute the gradients of a module's parameters; one that several modules use is complete after the last."""
        for param in module.parameters:
            if self._params[param].trained:
                self.time.add(self._params[param].numel)
                if param in self._gradients:
                    self.time.drop(self._params[param].numel)
                self._gradients[param] = self._params[param].numel
        for param in module.parameters:
            self._left[param] -= 1
            if param in self._gradients and not self._left[param]:
                self._add_to_bucket(param)

    def _add_to_bucket(self, param: int) -> None:
        """Copy a gradient to the bucket if it has room (``reduce_independent_p_g_buckets_and_remove_grads``)."""
        size = self._setup.reduce_bucket_size
        numel = self._params[param].numel
        if self._bucket and self._filled + numel > size:
            self._reduce()
        if self._filled + numel <= size:
            self.time.drop(self._gradients.pop(param))
        self._bucket.append(param)
        self._filled += numel

    def _reduce(self) -> None:
        """Reduce-scatter the bucket, from a padded copy (``reduce_scatter_coalesced``)."""
        padded = sum(self._padded[param] for param in self._bucket)
        if len(self._bucket) == 1 and padded == self._filled:
            padded = 0  # sent from where it is
        self.time.add(padded)
        self.time.drop(padded + sum(self._gradients.pop(param, 0) for param in self._bucket))
        self._bucket.clear()
        self._filled = 0
