"""GlobalBatch: its size, solving for accumulation, and the error's arithmetic."""

from __future__ import annotations

from typing import Any

import pytest

from dist_adamw import GlobalBatch


def test_size_is_the_product() -> None:
    assert GlobalBatch(8, 4, 2).size == 64
    assert GlobalBatch(8).size == 8


def test_solve_finds_the_accumulation() -> None:
    assert GlobalBatch.solve(size=256, micro_batch_size=8, data_parallel_size=4) == GlobalBatch(8, 8, 4)


@pytest.mark.parametrize(
    ("size", "micro", "ranks", "nearest"),
    [(100, 8, 4, "nearest sizes that work: 96 and 128"), (20, 8, 4, "nearest size that works: 32")],
)
def test_solve_names_the_nearest_sizes(size: int, micro: int, ranks: int, nearest: str) -> None:
    with pytest.raises(ValueError, match=nearest) as raised:
        GlobalBatch.solve(size=size, micro_batch_size=micro, data_parallel_size=ranks)
    assert f"global batch size {size}" in str(raised.value)


@pytest.mark.parametrize("bad", [0, -1, 1.5, True, "8", None])
def test_factors_are_whole_and_positive(bad: Any) -> None:
    with pytest.raises(ValueError, match=f"gradient_accumulation_steps .*whole number.* {bad!r}"):
        GlobalBatch(8, bad)
