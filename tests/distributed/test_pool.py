"""The pool of ranks itself: results in order, every rank's error, no hang."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist

from tests.ranks import RankError, expect_error_on_all, run_ranks


def _sum_of_ranks(offset: int) -> float:
    value = torch.tensor(float(dist.get_rank() + offset))
    dist.all_reduce(value)
    return value.item() + dist.get_rank()


def _fail() -> None:
    raise ValueError(f"rank {dist.get_rank()} fails")


def _one_fails_and_one_waits() -> None:
    if dist.get_rank() == 0:
        raise ValueError("rank 0 fails")
    time.sleep(100)


def test_results_come_back_in_rank_order() -> None:
    assert run_ranks(3, _sum_of_ranks, 1) == [6.0, 7.0, 8.0]


def test_errors_of_all_ranks_are_reported() -> None:
    assert expect_error_on_all(2, _fail) == ["ValueError: rank 0 fails", "ValueError: rank 1 fails"]


def test_a_rank_that_hangs_after_anothers_failure_is_ended() -> None:
    start = time.monotonic()
    with pytest.raises(RankError) as raised:
        run_ranks(2, _one_fails_and_one_waits)
    assert time.monotonic() - start < 20
    assert raised.value.errors[1].startswith("Timeout")
    assert run_ranks(2, _sum_of_ranks, 0) == [1.0, 2.0]


def replace_linear_as_zero3_does() -> None:
    from deepspeed.runtime.zero.linear import zero3_linear_wrap

    torch.nn.functional.linear = zero3_linear_wrap


def linear_is_torchs() -> bool:
    return torch.nn.functional.linear is torch._C._nn.linear


def test_a_job_under_zero3_leaves_torchs_linear_to_the_next() -> None:
    run_ranks(1, replace_linear_as_zero3_does)
    assert run_ranks(1, linear_is_torchs) == [True]
