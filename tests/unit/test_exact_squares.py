"""The sum of squares does not depend on how elements are divided."""

import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from dist_adamw.optimizer.kernels.exact_squares import BLOCK, digits_of_squares, value_of

CPU = torch.device("cpu")


def random_values(seed: int, numel: int, spread: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(numel, generator=generator) * 2.0 ** torch.randint(
        -spread, spread + 1, (numel,), generator=generator
    )


def value(pieces: list[Tensor]) -> Tensor:
    return value_of(digits_of_squares(pieces, CPU))


@pytest.mark.parametrize("spread", [0, 8, 40])
@pytest.mark.parametrize("seed", range(5))
def test_any_division_gives_the_same_bits(seed: int, spread: int) -> None:
    values = random_values(seed, 200_003, spread)
    whole = value([values])
    generator = torch.Generator().manual_seed(seed)
    for ranks in (2, 3, 7, 60):
        cuts = torch.randint(0, len(values) // BLOCK, (ranks - 1,), generator=generator).sort().values * BLOCK
        pieces = list(torch.tensor_split(values, cuts))
        assert torch.equal(value(pieces), whole)
        of_ranks = [digits_of_squares(pieces[rank::ranks], CPU) for rank in range(ranks)]
        assert torch.equal(value_of(sum(of_ranks[1:], of_ranks[0])), whole)
        assert torch.equal(value_of(sum(of_ranks[-2::-1], of_ranks[-1])), whole)
    exact = sum(Fraction(v) ** 2 for v in values.tolist())
    assert abs(Fraction(whole.item()) / exact - 1) < Fraction(1, 2**45)
    plain = {values[offset:].double().square().sum().item() + values[:offset].double().square().sum().item()
             for offset in range(0, 100_000, 997)}  # fmt: skip
    assert len(plain) > 1  # a plain sum does depend on it


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_small_tensors_and_dtypes(dtype: torch.dtype) -> None:
    values = [random_values(n, n, 5).to(dtype) for n in (1, 3, 31, 32, 33, 100, 100, 5000)]
    found = value([*values, torch.empty(0, dtype=dtype)])
    assert found.item() == pytest.approx(math.fsum(x * x for v in values for x in v.tolist()), rel=1e-14)
    assert torch.equal(found, value(values[::-1]))


def test_the_ends_of_the_range() -> None:
    assert value([]).item() == 0.0
    assert value([torch.zeros(5)]).item() == 0.0
    assert value([torch.full((3,), 2.0**-149)]).item() == 3 * 2.0**-298
    largest = torch.finfo(torch.float32).max
    assert value([torch.tensor([largest, 1.0])]).item() == float(largest) ** 2
    assert value([torch.tensor([1.0, math.inf])]).item() == math.inf
    assert math.isnan(value([torch.tensor([1.0, math.nan])]).item())
    assert math.isnan(value_of(digits_of_squares([torch.tensor([math.nan])], CPU) + digits_of_squares([], CPU)).item())
