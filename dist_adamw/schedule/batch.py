"""The global batch: micro-batch, accumulation and ranks."""

from __future__ import annotations

import operator
from dataclasses import dataclass, fields


def check_whole(name: str, value: object, least: int = 0) -> int:
    """Return ``value`` as an int if it is a whole number: Python's, numpy's, or a tensor of one integer.

    Raises:
        ValueError: anything else, or a number below ``least`` (0 or 1) or not below 2**62; with the value received.
    """
    # bool is an int in Python, and a tensor of one bool has __index__ too: True is not a size.
    is_bool = isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool")
    try:
        number = None if is_bool else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = None
    if number is None or number < least:
        raise ValueError(f"{name} must be a whole number {'above 0' if least else '>= 0'}, got {shown(value)}.")
    if number >= 1 << 62:
        raise ValueError(f"{name} must be below 2**62, got {shown(value)}.")
    return number


def check_positive_int(name: str, value: object) -> int:
    """Return ``value`` as an int if it is a whole number above zero: see `check_whole`.

    Raises:
        ValueError: anything else, with the value received.
    """
    return check_whole(name, value, least=1)


def shown(value: object) -> str:
    """Return the ``repr`` of a value, cut to 200 characters."""
    try:
        text = repr(value)
    except ValueError:  # an int of more digits than Python converts to text
        return "a number of thousands of digits"
    return text if len(text) <= 200 else f"{text[:200]}..."


@dataclass(frozen=True, slots=True)
class GlobalBatch:
    """The samples that one update averages over.

    Args:
        micro_batch_size: Samples of one rank in one forward pass.
        gradient_accumulation_steps: Forward passes per update.
        data_parallel_size: The number of ranks that see different samples.

    Raises:
        ValueError: a factor is not a whole number above 0.
    """

    micro_batch_size: int
    gradient_accumulation_steps: int = 1
    data_parallel_size: int = 1

    def __post_init__(self) -> None:
        for field in fields(self):
            object.__setattr__(self, field.name, check_positive_int(field.name, getattr(self, field.name)))

    def __str__(self) -> str:
        steps, ranks = self.gradient_accumulation_steps, self.data_parallel_size
        return (
            f"{_counted(self.size, 'sample')} = {self.micro_batch_size:,} per micro-batch x "
            f"{_counted(steps, 'accumulation step')} x {_counted(ranks, 'rank')}"
        )

    @property
    def size(self) -> int:
        """The global batch, in samples."""
        return self.micro_batch_size * self.gradient_accumulation_steps * self.data_parallel_size

    @classmethod
    def solve(cls, *, size: int, micro_batch_size: int, data_parallel_size: int = 1) -> GlobalBatch:
        """Find the gradient accumulation for a global batch of ``size`` samples.

        Raises:
            ValueError: no whole number of accumulation steps gives ``size``; the
                message names the nearest sizes that work.
        """
        size = check_positive_int("size", size)
        one_pass = cls(micro_batch_size, 1, data_parallel_size).size
        steps, rest = divmod(size, one_pass)
        if rest:
            nearest = [str(n * one_pass) for n in (steps, steps + 1) if n]
            raise ValueError(
                f"global batch size {size} is not a multiple of micro_batch_size x data_parallel_size = "
                f"{micro_batch_size} x {data_parallel_size} = {one_pass}. "
                f"The nearest size{'s' if len(nearest) > 1 else ''} that work{'' if len(nearest) > 1 else 's'}: "
                f"{' and '.join(nearest)}."
            )
        return cls(micro_batch_size, steps, data_parallel_size)


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def samples_of_batch(batch_size: int | GlobalBatch) -> int:
    """Return the number of samples in a global batch.

    Raises:
        ValueError: not a whole number above 0.
    """
    return batch_size.size if isinstance(batch_size, GlobalBatch) else check_positive_int("batch_size", batch_size)
