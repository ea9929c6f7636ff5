"""FlatLayout: every element has one owner, shares are equal, cuts are aligned."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_adamw.optimizer.transport.layout import (
    ALIGNMENT,
    BUCKET_NUMEL,
    FlatLayout,
    earlier_bucket_numel,
    footprint,
    suitable_bucket_numel,
)


@settings(max_examples=200, deadline=None)
@given(
    numels=st.lists(st.integers(0, 300), min_size=1, max_size=8),
    world_size=st.integers(1, 7),
    bucket=st.integers(1, 400),
)
def test_every_element_has_one_owner(numels: list[int], world_size: int, bucket: int) -> None:
    layout = FlatLayout(tuple(numels), world_size, bucket)
    owners: list[list[int]] = [[-1] * n for n in numels]
    for rank in range(world_size):
        buckets = layout.owned(rank)
        assert len(buckets) == layout.num_buckets
        taken: set[int] = set()
        for pieces in buckets:
            for piece in pieces:
                # Aligned within the parameter: torch's vector kernel then rounds every element alike.
                assert piece.start % ALIGNMENT == 0
                assert piece.stop % ALIGNMENT == 0 or piece.stop == numels[piece.param]
                for i in range(piece.start, piece.stop):
                    assert owners[piece.param][i] == -1
                    owners[piece.param][i] = rank
                place = set(range(piece.offset, piece.offset + piece.numel))
                assert not place & taken
                assert max(place) < layout.shard_numel
                taken |= place
    assert all(owner >= 0 for column in owners for owner in column)


@given(
    numels=st.lists(st.integers(0, 300), min_size=1, max_size=8),
    world_size=st.integers(1, 7),
    bucket=st.integers(1, 400),
)
def test_a_parameters_pieces_lie_side_by_side_in_the_shard(numels: list[int], world_size: int, bucket: int) -> None:
    """`Shard.owned_moment` returns them as one view."""
    layout = FlatLayout(tuple(numels), world_size, bucket)
    for rank in range(world_size):
        ends: dict[int, int] = {}
        for piece in (p for pieces in layout.owned(rank) for p in pieces):
            assert ends.get(piece.param, piece.offset) == piece.offset
            ends[piece.param] = piece.offset + piece.numel


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_shares_are_equal_and_padding_is_small(world_size: int) -> None:
    numels = (40_000 * 64, 64 * 64, 64, 1, 4 * 64 * 64)
    layout = FlatLayout(numels, world_size)
    assert layout.padded_numel - layout.numel < ALIGNMENT * (len(numels) + world_size)
    assert layout.shard_numel * world_size == layout.padded_numel


def test_a_bucket_is_no_larger_than_what_there_is() -> None:
    assert FlatLayout((10,), 4).bucket_numel == 4 * ALIGNMENT
    assert FlatLayout((10,), 4).num_buckets == 1
    assert FlatLayout((0,), 2).num_buckets == 0


def test_a_plan_for_ten_to_the_eleven_parameters_takes_seconds() -> None:
    """Check buckets, ownership, memory and traffic on 4,096 ranks, of a model that is not allocated."""
    start = time.perf_counter()
    width = 12288
    block = (width, 3 * width * width, width * width, width, 4 * width * width, 4 * width * width)
    layout = FlatLayout((50_000 * width, *(block * 56)), 4096)
    assert layout.numel > 10**11
    assert layout.padded_numel - layout.numel < ALIGNMENT * (len(layout.numels) + 4096)
    # Every slice of every bucket is as long as the others, and messages are long enough to be worth sending.
    assert {b - a for k in (0, layout.num_buckets // 2) for a, b in (layout.slice_of(k, r) for r in (0, 1, 4095))} == {
        1 << 15
    }
    # OwnedElements: what neighbours own meets, and is all there is.
    owned = [sum(p.numel for pieces in layout.owned(rank) for p in pieces) for rank in (0, 1, 2048, 4095)]
    assert max(owned) <= layout.shard_numel
    assert min(owned) > 0.99 * layout.shard_numel
    plan = footprint(layout, param_bytes=2, grad_bytes=2, state_bytes=12)
    n, f = layout.numel, 4095 / 4096
    assert plan.parameters + plan.gradients == 4 * n
    assert plan.state == pytest.approx(12 * n / 4096, rel=1e-5)
    assert plan.staging < 0.003 * plan.total
    assert plan.sent == pytest.approx(f * n * 4, rel=1e-5)
    assert time.perf_counter() - start < 30


@pytest.mark.parametrize("reduce_every_backward", [False, True])
def test_the_footprint_is_that_of_the_formulas(reduce_every_backward: bool) -> None:
    layout = FlatLayout((512,) * 50_000, 4, reduce_every_backward=reduce_every_backward)
    n = layout.numel
    plan = footprint(layout)
    gradients = 4 * (n / 4 + 3 * layout.bucket_numel) if reduce_every_backward else 4 * n
    assert plan.total == pytest.approx(4 * n + gradients + 8 * n / 4 + plan.staging)
    assert plan.staging <= 0.06 * plan.total
    assert plan.sent == 3 * n / 4 * 8


def test_a_large_parameters_gradient_exists_whole() -> None:
    """The footprint of an embedding with `reduce_every_backward`: autograd returns its gradient at once."""
    large, small = 40_000 * 512, (512 * 512,) * 16
    layout = FlatLayout((large, *small), 2, reduce_every_backward=True)
    assert footprint(layout).gradients == 4 * (layout.shard_numel + 2 * layout.bucket_numel + large)


def test_buckets_suit_the_model_and_the_ranks() -> None:
    assert suitable_bucket_numel(25_000_000, 1) == BUCKET_NUMEL
    assert suitable_bucket_numel(25_000_000, 2) == 1_562_500
    assert suitable_bucket_numel(25_000_000, 2, reduce_every_backward=True) == 781_250
    assert suitable_bucket_numel(10**6, 2) == 2 << 18  # no shorter
    assert suitable_bucket_numel(10**9, 2) == 1 << 22  # no longer
    assert suitable_bucket_numel(10**11, 4096) == 4096 << 15


def test_buckets_suit_collectives() -> None:
    """Check that 8B parameters are some 200 buckets, and that no slice is short on thousands of ranks."""
    buckets = [-(-8 * 10**9 // suitable_bucket_numel(8 * 10**9, ranks, by_collectives=True)) for ranks in (8, 64)]
    assert buckets == [200, 239]
    for world_size in (1024, 4096):
        slice_numel = suitable_bucket_numel(8 * 10**9, world_size, by_collectives=True) // world_size
        assert slice_numel == 1 << 18
    layout = FlatLayout((512,) * 50_000, 4, by_collectives=True)
    assert footprint(layout).staging == 2 * 4 * layout.bucket_numel


def test_an_earlier_version_cut_otherwise() -> None:
    assert earlier_bucket_numel(25_000_000, 2) == 3_125_000
    assert earlier_bucket_numel(25_000_000, 2, reduce_every_backward=True) == 1_562_500
    assert earlier_bucket_numel(10**9, 2) == 1 << 23
