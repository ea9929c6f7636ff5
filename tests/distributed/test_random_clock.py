"""The clock under random training loops: a short form of ``python -m tests.random.clock``."""

from __future__ import annotations

import pytest

from tests.random.clock import Tally, judge, outcomes
from tests.random.clock_table import TABLE


@pytest.mark.parametrize("case", TABLE)
def test_a_sample_counts_in_the_update_that_its_first_backward_pass_went_into(case: str) -> None:
    program, rows = TABLE[case]
    (outcome,) = outcomes([program])
    assert outcome.samples == rows, "the truth of the test itself"
    assert not outcome.problems


@pytest.mark.parametrize(("world", "loops"), [(1, 80), (2, 30)])
def test_random_loops(world: int, loops: int) -> None:
    tally = Tally()
    for _ in judge(range(loops), world, tally):
        pass
    assert tally.loops == loops
    assert tally.updates > 3 * loops
    assert not tally.found, "\n".join(map(str, tally.found))
