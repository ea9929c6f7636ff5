"""An update of a run of a parameter, cut anywhere, has the bits of an update of the whole parameter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dist_adamw.optimizer.kernels.foreach import adamw_update_
from dist_adamw.optimizer.kernels.mixed import mixed_adamw_update_
from dist_adamw.optimizer.kernels.ragged import BLOCK, RaggedRuns, Run

NUMELS = (1, 7, 31, 32, 33, 95, 200, 1000)
NAMES = ("params", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "masters", "grads")
HYPER: dict[str, Any] = {"lr": 0.013, "betas": (0.9, 0.97), "eps": 1e-7, "weight_decay": 0.1}


def random_columns(numel: int, dtype: torch.dtype, amsgrad: bool, master: torch.dtype | None) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(numel)
    wide = torch.promote_types(dtype, torch.float32)

    def some() -> Tensor:
        return torch.randn(numel, generator=generator, dtype=wide)

    weights = some()
    columns = {"params": weights.to(dtype), "exp_avgs": some(), "exp_avg_sqs": some().abs(), "grads": some().to(dtype)}
    if amsgrad:
        columns["max_exp_avg_sqs"] = some().abs()
    if master == torch.float32:
        columns["masters"] = weights
    elif master == torch.int16:
        columns["masters"] = torch.randint(-100, 100, (numel,), generator=generator, dtype=master)
    return columns


def update(columns: dict[str, list[Tensor]], kernel: str, clip: Tensor | None, **hyper: Any) -> None:
    lists = [columns.get(name, []) for name in NAMES]
    params, exp_avgs, exp_avg_sqs, maxima, masters, grads = lists
    state = (exp_avgs, exp_avg_sqs, maxima, columns["steps"])
    if kernel == "mixed":
        mixed_adamw_update_(params, grads, masters, *state, scale=clip, found_inf=None, **hyper)
    else:
        adamw_update_(params, *state, grads=grads, fused=kernel == "fused", **hyper)


@pytest.mark.parametrize("decay_by", ["lr", "schedule"])
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize(
    ("kernel", "dtype", "master", "clip"),
    [
        ("fused", torch.float32, None, None),
        ("fused", torch.float64, None, None),
        ("foreach", torch.float32, None, None),
        ("mixed", torch.float32, None, 0.3),
        ("mixed", torch.bfloat16, torch.float32, None),
        ("mixed", torch.bfloat16, torch.float32, 0.3),
        ("mixed", torch.bfloat16, torch.int16, 0.3),
    ],
)
def test_any_cut_gives_the_bits_of_the_whole(
    kernel: str, dtype: torch.dtype, master: torch.dtype | None, clip: float | None, amsgrad: bool, maximize: bool,
    decay_by: str,
) -> None:  # fmt: skip
    factor = None if clip is None else torch.tensor(clip)
    hyper = {**HYPER, "maximize": maximize, "decay_by": decay_by}
    steps = [torch.tensor(3.0)]
    differs = False
    for numel in NUMELS:
        whole = random_columns(numel, dtype, amsgrad, master)
        for chunk in {1, 2, 5, 13, 32, 45, 77, 333} - {n for n in (1, 2) if numel > 200}:
            cut = {name: column.clone() for name, column in whole.items()}
            naive = {name: column.clone() for name, column in whole.items()}
            bounds = [(start, min(start + chunk, numel)) for start in range(0, numel, chunk)]
            ragged = RaggedRuns([Run(start, stop, numel) for start, stop in bounds])
            pieces = {name: [column[start:stop] for start, stop in bounds] for name, column in cut.items()}
            divided = {n: ragged.divide_to_change(p) if n != "grads" else ragged.divide(p) for n, p in pieces.items()}
            update({**divided, "steps": ragged.repeat(steps * len(bounds))}, kernel, factor, **hyper)
            ragged.write_back()
            expected = {name: column.clone() for name, column in whole.items()}
            update({n: [c] for n, c in expected.items()} | {"steps": steps}, kernel, factor, **hyper)
            assert all(torch.equal(cut[name], expected[name]) for name in whole), (numel, chunk)
            runs = {name: [column[start:stop] for start, stop in bounds] for name, column in naive.items()}
            update({**runs, "steps": steps * len(bounds)}, kernel, factor, **hyper)
            differs |= not all(torch.equal(naive[name], expected[name]) for name in whole)
    if kernel != "foreach" and dtype != torch.float64:
        assert differs  # without `RaggedRuns`


def test_runs_that_fill_blocks_are_updated_in_place() -> None:
    values = torch.arange(5.0 * BLOCK)
    ragged = RaggedRuns([Run(BLOCK, 6 * BLOCK, 9 * BLOCK)])
    (part,) = ragged.divide_to_change([values])
    assert part.data_ptr() == values.data_ptr()
    assert part.numel() == values.numel()
    assert ragged.divide([]) == []
