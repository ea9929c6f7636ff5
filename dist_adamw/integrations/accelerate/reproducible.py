"""What ``DistAdamW(reproducible=True)`` needs of Accelerate: the same micro-batches, and their mean taken once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from dist_adamw.integrations.accelerate.checks import has_communication_hook
from dist_adamw.integrations.accelerate.data import LoaderFacts, engine_of

if TYPE_CHECKING:
    from accelerate import Accelerator


def check_reproducible(accelerator: Accelerator, facts: LoaderFacts, *, whole_gradients: bool) -> None:
    """Refuse what would make the weights depend on the number of ranks. Local, and the same on every rank.

    Raises:
        ValueError: says what to do instead.
    """
    if engine_of(accelerator) == "DEEPSPEED":
        raise ValueError(
            "reproducible=True is not supported under DeepSpeed, which adds gradients up itself, in an order that "
            "depends on the number of ranks. Use DDP or one process."
        )
    if accelerator.scaler is not None:
        raise ValueError(
            "reproducible=True is not supported with a GradScaler (fp16), whose scale depends on the gradients that a "
            "rank has seen. Use mixed_precision='bf16' or 'no'."
        )
    if whole_gradients or has_communication_hook(accelerator):
        raise ValueError(
            "reproducible=True averages gradients itself, in place of DistributedDataParallel. Leave whole_gradients "
            "and the communication hook out."
        )
    _check_micro_batches(accelerator, facts)


def _check_micro_batches(accelerator: Accelerator, facts: LoaderFacts) -> None:
    batch, ranks = facts.batch, facts.batch.data_parallel_size
    if accelerator.split_batches and ranks > 1:
        raise ValueError(
            f"reproducible=True with split_batches=True would compute micro-batches of {batch.micro_batch_size} "
            f"samples on {ranks} ranks, and larger or smaller ones on another number. Give the data loader the "
            "micro-batch as its batch_size, and leave split_batches=False."
        )
    if facts.samples is None:
        return
    count, rest = divmod(facts.samples, batch.micro_batch_size)
    if (rest and not facts.drop_last) or count % ranks:
        below = facts.samples // batch.size * batch.size
        sizes = " or ".join(str(size) for size in (below, below + batch.size) if size)
        raise ValueError(
            f"reproducible=True: an epoch of {facts.samples} samples is {count} micro-batches of "
            f"{batch.micro_batch_size} and {rest} samples, which do not divide among {ranks} ranks: Accelerate would "
            f"repeat or drop samples, others on another number of ranks. Cut or extend the data set to {sizes} samples."
        )


@contextlib.contextmanager
def undivided(accelerator: Accelerator) -> Iterator[None]:
    """Have ``accelerator.backward`` not divide the loss by the accumulation, which depends on the number of ranks.

    The optimizer divides the sum of the micro-batches by their number, once.
    """
    kwargs = accelerator.gradient_state.plugin_kwargs
    before = dict(kwargs)
    kwargs["num_steps"] = 1
    try:
        yield
    finally:
        kwargs.clear()
        kwargs.update(before)
