"""What an engine needs: bytes of memory on a rank, and bytes that it sends in an update."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields

import torch

from dist_adamw.optimizer.averages import EMA, Mean, dtypes_of
from dist_adamw.optimizer.sharding.shard import Shard
from dist_adamw.optimizer.transport.tree_sum import BLOCK_NUMEL
from dist_adamw.schedule.batch import check_positive_int, shown

DEVICES = ("cuda", "cpu")


@dataclass(frozen=True, kw_only=True, slots=True)
class Setup:
    """The options of a job that memory and traffic depend on.

    Args:
        accumulation: Micro-batches of an update on one rank.
        device: "cuda", where collectives send (NCCL), or "cpu", where ranks of one host share memory.
        bf16: Whether the loop runs with Accelerate's ``mixed_precision="bf16"``. Parameters stay fp32 in one process
            and under DDP (the cast copies of autocast count as activations); FSDP2 gathers and reduces in bf16;
            DeepSpeed keeps bf16 parameters and fp32 masters.
        master_dtype: See `DistAdamW`, also for the next four.
        reshard_after_forward: Of FSDP2's layers.
        reduce_bucket_size: DeepSpeed's, in elements; this and the next four have its defaults.
        param_persistence_threshold: Of ZeRO-3: smaller parameters are whole on every rank.
        max_live_parameters: Of ZeRO-3: elements that may be whole at a time, and also its ``max_reuse_distance``.
        prefetch_bucket_size: Of ZeRO-3: elements that are gathered ahead.
        activations: Bytes of activations and everything else that is not counted.
    """

    accumulation: int = 1
    device: str = "cuda"
    bf16: bool = False
    master_dtype: torch.dtype | None = None
    state_dtype: torch.dtype | None = None
    reduce_dtype: torch.dtype | None = None
    averages: Mapping[str, EMA | Mean] = field(default_factory=dict)
    amsgrad: bool = False
    reproducible: bool = False
    reshard_after_forward: bool = True
    reduce_bucket_size: int = 500_000_000
    param_persistence_threshold: int = 100_000
    max_live_parameters: int = 1_000_000_000
    prefetch_bucket_size: int = 50_000_000
    activations: int = 0

    def __post_init__(self) -> None:
        check_positive_int("accumulation", self.accumulation)
        if self.device not in DEVICES:
            raise ValueError(f"device must be cuda or cpu, got {shown(self.device)}.")

    def state_bytes(self, dtype: torch.dtype) -> int:
        """Return the bytes of state of one element of a parameter of ``dtype``. Local."""
        # The optimizer's own shard says which tensors there are, and of which dtypes.
        shard = Shard(
            [torch.empty(1, dtype=dtype, device="meta")],
            groups=[{"amsgrad": self.amsgrad}],
            process_group=None,
            max_bucket_numel=None,
            master_dtype=self.master_dtype,
            state_dtype=self.state_dtype,
            averages=dtypes_of(self.averages),
        )
        return sum(moment.dtype.itemsize for moment in shard.moments.values())


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on the rank that needs most.

    Attributes:
        parameters: And buffers of the model, as they are between updates.
        gradients: At the end of the last backward pass of an update.
        state: Moments, masters, averages of the weights and step counts.
        staging: What the peak has beyond the others: buckets that are sent, gathered layers, whole gradients.
        activations: As given; they are not computed.
    """

    parameters: int
    gradients: int
    state: int
    staging: int
    activations: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return sum(getattr(self, part.name) for part in fields(self))


@dataclass(frozen=True, slots=True)
class Cost:
    """An engine on a number of ranks.

    Attributes:
        sent: Bytes that one rank sends per update.
        note: What is peculiar here.
    """

    engine: str
    ranks: int
    memory: Memory
    sent: int
    note: str = ""


class Timeline:
    """Bytes over the course of an update, of which the largest is kept."""

    def __init__(self, start: int = 0) -> None:
        self.now = self.peak = start

    def add(self, nbytes: int) -> None:
        """Allocate."""
        self.now += nbytes
        self.peak = max(self.peak, self.now)

    def drop(self, nbytes: int) -> None:
        """Free."""
        self.now -= nbytes


def sum_bytes(setup: Setup, terms: int, numel: int, sums: int, *, dtype: torch.dtype, home: bool) -> int:
    """Return the bytes of `TreeSum`s besides their homes. Local.

    Args:
        terms: Micro-batches that are added at a time, ``setup.accumulation`` times.
        numel: Elements of all sums together.
        sums: The number of sums. On CPUs each has blocks of scratch memory of one size.
        dtype: Of the terms.
        home: Whether the averages have memory that a sum may use.
    """
    levels, scratch = num_sums(setup.accumulation, terms)
    block = numel if setup.device == "cuda" else sums * BLOCK_NUMEL  # on an accelerator as large as a sum
    return ((levels - home) * numel + scratch * block) * torch.promote_types(dtype, torch.float32).itemsize


def num_sums(rounds: int, terms: int) -> tuple[int, int]:
    """Return the levels and the scratch blocks of a `TreeSum` for ``rounds`` of ``terms`` micro-batches each. Local.

    `TreeSum` is a binary counter of micro-batches, so arithmetic answers for any number of them.
    """
    count = rounds * terms
    bits = terms.bit_length()
    # A level has a partial sum if its bit is set in the count after some round. Rounds advance by `terms`, so they skip
    # no bit above those of `terms`; bits of `terms` itself repeat after at most 2 * terms rounds.
    low = 0
    for number in range(1, min(rounds, 2 * terms) + 1):
        low |= number * terms
    levels = (low & (1 << bits) - 1).bit_count() + count.bit_length() - bits
    # Sums that a round adds up at once are in scratch memory: one block for each level that two sums of it complete.
    scratch = max(0, count.bit_length() - 2) + _second_blocks(rounds, terms)
    return levels, scratch + (count.bit_count() > 1)  # `write` adds the levels up


def _second_blocks(rounds: int, terms: int) -> int:
    """Return the number of levels of which one round computes both sums that make the next level's."""
    always = max(0, terms.bit_length() - 2)
    half = 1 << max(0, terms.bit_length() - 1)
    in_some_round = any(half < -number * terms % (2 * half) <= terms for number in range(min(rounds, 2 * half)))
    return always + (in_some_round and half > 1)
