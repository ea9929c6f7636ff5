"""The sum of micro-batches: the same bits however many arrive at a time."""

import itertools

import pytest
import torch
from torch import Tensor

from dist_adamw.optimizer.transport.tree_sum import BLOCK_NUMEL, TreeSum

NUMEL = 1000


def by_definition(terms: list[Tensor]) -> Tensor:
    """Add pairs, then pairs of sums; a sum without a partner waits for the one before it."""
    left_over, level = [], terms
    while level:
        if len(level) % 2:
            left_over.append(level[-1])
            level = level[:-1]
        level = [a + b for a, b in zip(level[::2], level[1::2], strict=True)]
    total = left_over[0]
    for higher in left_over[1:]:
        total = higher + total
    return total


def random_terms(number: int, numel: int = NUMEL, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(number)
    scales = 2.0 ** torch.randint(-12, 12, (number, numel), generator=generator)
    return list((torch.randn(number, numel, generator=generator) * scales).to(dtype))


def summed(terms: list[Tensor], sizes: list[int], divisor: int) -> Tensor:
    """Sum ``terms``, of which ``sizes`` arrive at a time."""
    sums = TreeSum(terms[0].numel(), dtype=torch.float32, device=torch.device("cpu"))
    arriving = iter(terms)
    for size in sizes:
        together = list(itertools.islice(arriving, size))
        cut = terms[0].numel() // 3
        sums.add(len(together), [(0, [term[:cut] for term in together]), (cut, [term[cut:] for term in together])])
    assert sums.count == len(terms)
    out = torch.empty_like(terms[0])
    sums.write([(0, out[:7]), (7, out[7:])], divisor)
    return out


@pytest.mark.parametrize("number", [1, 2, 3, 5, 7, 8, 12, 13, 16, 24, 31, 60])
def test_any_number_at_a_time_gives_the_same_bits(number: int) -> None:
    terms = random_terms(number)
    before = [term.clone() for term in terms]
    wanted = by_definition(terms) / number
    in_order = sum(terms[1:], terms[0]) / number
    for size in range(1, number + 1):
        sizes = [size] * (number // size) + ([number % size] if number % size else [])
        assert torch.equal(summed(terms, sizes, number), wanted)
    assert all(map(torch.equal, terms, before))
    assert number <= 3 or not torch.equal(wanted, in_order)  # with up to 3 terms there is one order


@pytest.mark.parametrize("seed", range(20))
def test_random_numbers_at_a_time(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    number = int(torch.randint(1, 50, (), generator=generator))
    sizes: list[int] = []
    while sum(sizes) < number:
        sizes.append(min(int(torch.randint(1, 9, (), generator=generator)), number - sum(sizes)))
    terms = random_terms(number)
    assert torch.equal(summed(terms, sizes, number), by_definition(terms) / number)


def test_zeros_at_the_end_change_nothing() -> None:
    terms = random_terms(24)
    zeros = [torch.zeros(NUMEL)] * 4
    assert torch.equal(summed([*terms, *zeros], [7] * 4, 24), by_definition(terms) / 24)


def test_16_bit_terms_are_summed_in_fp32() -> None:
    terms = random_terms(12, dtype=torch.bfloat16)
    sums = TreeSum(NUMEL, dtype=torch.float32, device=torch.device("cpu"))
    for first in range(0, 12, 3):
        sums.add(3, [(0, terms[first : first + 3])])
    out = torch.empty(NUMEL, dtype=torch.bfloat16)
    sums.write([(0, out)], 12)
    assert torch.equal(out, (by_definition([term.float() for term in terms]) / 12).bfloat16())


def test_longer_than_a_block_and_used_again() -> None:
    numel = 2 * BLOCK_NUMEL + 5
    sums = TreeSum(numel, dtype=torch.float32, device=torch.device("cpu"))
    for number in (5, 3, 6):
        terms = random_terms(number, numel)
        for term in terms:
            sums.add(1, [(0, [term])])
        out = torch.empty(numel)
        for _ in range(2):
            sums.write([(0, out)], number)
            assert torch.equal(out, by_definition(terms) / number)
        sums.clear()
