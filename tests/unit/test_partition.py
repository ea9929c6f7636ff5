"""FlatLayout: every element has one owner, shares are equal, cuts are aligned."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_adamw.partition import ALIGNMENT, FlatLayout


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
    start = time.perf_counter()
    layout = FlatLayout((12288 * 12288 * 4,) * 166, 4096)
    assert layout.numel > 10**11
    pieces = sum(map(len, layout.owned(1234)))
    assert pieces >= layout.num_buckets
    assert layout.shard_numel == -(-layout.numel // 4096)
    assert time.perf_counter() - start < 30
