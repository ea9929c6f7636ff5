"""The one-pass update of mixed dtypes: torch.optim.AdamW's bits, and masters that come back exactly."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dist_adamw.optimizer.kernels import mixed
from dist_adamw.optimizer.kernels.mixed import join_master, mixed_adamw_update_, split_master_

SIZES = (1, 31, 33, 4099, 200_001)
BF16, FP16, FP32, INT16 = torch.bfloat16, torch.float16, torch.float32, torch.int16


@pytest.fixture(autouse=True, params=[1 << 12, 1 << 18], ids=["small_blocks", "usual_blocks"])
def _block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small blocks: 4099 and 200,001 are cut, and 1, 31 and 33 share a block."""
    monkeypatch.setattr(mixed, "_block_numel", lambda device: request.param)


@dataclass
class Weights:
    """A model of odd sizes: its weights in ``dtype``, their masters, and their state."""

    dtype: torch.dtype = BF16
    master: torch.dtype | None = FP32
    state: torch.dtype = FP32
    amsgrad: bool = False
    sizes: tuple[int, ...] = SIZES
    updates: int = 0
    params: list[Tensor] = field(init=False)
    masters: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        start = [torch.randn(n, generator=generator) for n in self.sizes]
        self.params = [w.to(self.dtype) for w in start]
        self.masters = start if self.master == FP32 else []
        if self.master == INT16:
            self.masters = [torch.empty(n, dtype=INT16) for n in self.sizes]
            for triple in zip(start, self.params, self.masters, strict=True):
                split_master_(*triple)
        self.moments = [[torch.zeros(n, dtype=self.state) for n in self.sizes] for _ in range(3 if self.amsgrad else 2)]
        self.steps = torch.zeros(len(self.sizes))

    def update(self, grads: list[Tensor], **options: Any) -> None:
        defaults: dict[str, Any] = {
            "scale": None, "found_inf": None, "lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8,
            "weight_decay": 1e-2, "decay_by": "lr", "maximize": False,
        }  # fmt: skip
        self.steps += 1
        maxima = self.moments[2] if self.amsgrad else []
        mixed_adamw_update_(
            self.params, grads, self.masters, self.moments[0], self.moments[1], maxima, list(self.steps.unbind()),
            **{**defaults, **options},
        )  # fmt: skip

    def weights(self) -> list[Tensor]:
        """The fp32 weights, however they are kept."""
        if self.master is None:
            return [p.float() for p in self.params]
        if self.master == INT16:
            return [join_master(p, r) for p, r in zip(self.params, self.masters, strict=True)]
        return self.masters


def gradients(seed: int, dtype: torch.dtype, sizes: tuple[int, ...] = SIZES) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 + seed)
    return [torch.randn(n, generator=generator).to(dtype) for n in sizes]


def torch_adamw(start: list[Tensor], **options: Any) -> tuple[list[Tensor], torch.optim.AdamW]:
    copies = [w.clone().requires_grad_() for w in start]
    return copies, torch.optim.AdamW(copies, **{"lr": 1e-3, "weight_decay": 1e-2, "fused": True, **options})


def assert_same_bits(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b.detach()), f"{(a != b).sum()} of {a.numel()} differ"


OPTIONS = [{}, {"eps": 0.1}, {"amsgrad": True}, {"maximize": True}, {"weight_decay": 0.0, "betas": (0.8, 0.95)}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("scale", [None, 0.37])
@pytest.mark.parametrize(
    ("dtype", "master", "grad_dtype"),
    [
        (BF16, FP32, BF16),
        (BF16, FP32, FP32),
        (FP16, FP32, FP16),
        (BF16, INT16, BF16),
        (BF16, INT16, FP32),
        (FP32, None, FP32),
        (FP32, None, BF16),
    ],
    ids=str,
)
def test_the_masters_have_torchs_bits(
    options: dict[str, Any],
    scale: float | None,
    dtype: torch.dtype,
    master: torch.dtype | None,
    grad_dtype: torch.dtype,
) -> None:
    ours = Weights(dtype, master, amsgrad=options.get("amsgrad", False))
    theirs, reference = torch_adamw([w.clone() for w in ours.weights()], **options)
    factor = None if scale is None else torch.tensor(scale)
    passed = {k: v for k, v in options.items() if k != "amsgrad"}
    for step in range(20):
        grads = gradients(step, grad_dtype)
        kept = [g.clone() for g in grads]
        ours.update(grads, scale=factor, **passed)
        assert_same_bits(grads, kept)
        for copy, grad in zip(theirs, grads, strict=True):
            copy.grad = grad.float() if factor is None else grad.float() * factor
        reference.step()
    assert_same_bits(ours.weights(), theirs)
    if master == FP32:
        assert_same_bits(ours.params, [w.detach().to(dtype) for w in theirs])
    names = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    for moments, name in zip(ours.moments, names, strict=False):
        assert_same_bits(moments, [reference.state[w][name] for w in theirs])


@pytest.mark.parametrize("master", [FP32, INT16])
def test_many_updates_of_a_remainder_are_those_of_a_master(master: torch.dtype) -> None:
    sizes = (33, 515)
    ours, theirs = Weights(BF16, master, sizes=sizes), Weights(FP32, None, sizes=sizes)
    for step in range(400):  # weights near zero cross it, and every binade above
        grads = gradients(step, BF16, sizes)
        ours.update(grads, lr=3e-2)
        theirs.update([g.float() for g in grads], lr=3e-2)
    assert_same_bits(ours.weights(), theirs.weights())


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("master", [FP32, INT16])
def test_the_papers_convention(master: torch.dtype, as_tensor: bool) -> None:
    ours = Weights(BF16, master)
    before = [w.clone() for w in ours.weights()]

    def lr(value: float) -> float | Tensor:
        return torch.tensor(value) if as_tensor else value

    zeros = [torch.zeros_like(p) for p in ours.params]
    ours.update(zeros, lr=lr(1e-3), weight_decay=0.25, decay_by="schedule")
    for now, was in zip(ours.weights(), before, strict=True):
        torch.testing.assert_close(now, 0.75 * was, rtol=2e-7, atol=0)
    kept = [w.clone() for w in ours.weights()]
    ours.update(gradients(1, BF16), lr=lr(0.0), weight_decay=0.25, decay_by="schedule")
    assert_same_bits(ours.weights(), kept)


@pytest.mark.parametrize(("dtype", "master"), [(BF16, FP32), (BF16, INT16), (FP32, None), (BF16, None)], ids=str)
@pytest.mark.parametrize("state", [FP32, BF16], ids=str)
def test_an_overflow_leaves_everything_as_it_is(
    dtype: torch.dtype, master: torch.dtype | None, state: torch.dtype
) -> None:
    ours = Weights(dtype, master, state, amsgrad=True)
    ours.update(gradients(0, dtype), found_inf=torch.tensor(0.0))
    everything = [*ours.params, *ours.masters, *(m for column in ours.moments for m in column)]
    kept = [t.clone() for t in everything]
    grads = [g.fill_(math.inf) for g in gradients(1, dtype)]
    ours.update(grads, found_inf=torch.tensor(1.0), scale=torch.tensor(0.5))
    assert_same_bits(everything, kept)
    ours.update(gradients(2, dtype), found_inf=torch.tensor(0.0))
    changed = [not torch.equal(t, k) for t, k in zip(everything, kept, strict=True) if t.numel() > 1000]
    assert all(changed)


@pytest.mark.parametrize("sizes", [(5, 70, 33, 1), (5, 9000, 3), (20_000,)], ids=str)
def test_a_write_to_any_piece_is_followed_to_the_bit(sizes: tuple[int, ...]) -> None:
    for i, numel in enumerate(sizes):
        for place in {0, numel // 2, numel - 1}:
            written, expected = Weights(sizes=sizes), Weights(sizes=sizes)
            bits = written.params[i].view(INT16)
            bits[place] += 1
            expected.params[i].view(INT16)[place] += 1
            expected.masters[i][place] = written.params[i][place].float()
            for weights in (written, expected):
                weights.update(gradients(1, BF16, sizes))
            assert_same_bits(written.masters, expected.masters)


@pytest.mark.parametrize("scale", [None, 0.37])
def test_a_gradient_in_fp32_keeps_its_bits_beside_one_in_bf16(scale: float | None) -> None:
    grads = [*gradients(1, BF16, (40,)), *gradients(2, FP32, (50,))]
    mixture, wide = Weights(sizes=(40, 50)), Weights(sizes=(40, 50))
    factor = None if scale is None else torch.tensor(scale)
    mixture.update(grads, scale=factor)
    wide.update([g.float() for g in grads], scale=factor)
    assert_same_bits(mixture.masters, wide.masters)


def test_without_a_master_bf16_is_torchs_bf16() -> None:
    sizes = (64, 4096, 4096 + 64)  # torch's bf16 vectors are longer than fp32's, so tails would differ
    ours = Weights(BF16, None, BF16, sizes=sizes)
    theirs, reference = torch_adamw(ours.params)
    for step in range(20):
        grads = gradients(step, BF16, sizes)
        ours.update(grads)
        for copy, grad in zip(theirs, grads, strict=True):
            copy.grad = grad
        reference.step()
    assert_same_bits(ours.params, theirs)
    assert_same_bits(ours.moments[1], [reference.state[w]["exp_avg_sq"] for w in theirs])


def test_bf16_moments_stay_near_fp32_ones() -> None:
    """Each store rounds by at most 2**-8 of the value. With beta2 = 0.95 the last 20 of them count, with changing
    signs: about sqrt(20) = 4.5 together, 8 at the worst seen here. Weights move by lr times as much per update.
    """
    narrow, wide = Weights(BF16, FP32, BF16), Weights(BF16, FP32, FP32)
    for step in range(40):
        grads = [g.abs() + 0.5 for g in gradients(step, BF16)]  # no cancellation in exp_avg
        narrow.update(grads, betas=(0.9, 0.95))
        wide.update(grads, betas=(0.9, 0.95))
    assert all(m.dtype == BF16 for column in narrow.moments for m in column)
    for few, many in zip(narrow.moments, wide.moments, strict=True):
        for a, b in zip(few, many, strict=True):
            torch.testing.assert_close(a.float(), b, rtol=8 * 2**-8, atol=0)
    for a, b in zip(narrow.weights(), wide.weights(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=40 * 1e-3 * 8 * 2**-8)


def test_bf16_moments_are_stored_to_nearest_even() -> None:
    ours = Weights(BF16, FP32, BF16, sizes=(4096,))
    grads = gradients(0, BF16, (4096,))
    ours.update(grads)
    wide = Weights(BF16, FP32, FP32, sizes=(4096,))
    wide.update(grads)
    for few, many in zip(ours.moments, wide.moments, strict=True):
        assert_same_bits(few, [m.to(BF16) for m in many])


@pytest.mark.parametrize(("beta2", "shrinks"), [(0.995, True), (0.999, False)])
def test_a_bf16_second_moment_shrinks_only_with_a_smaller_beta2(beta2: float, shrinks: bool) -> None:
    """The limit that the docstring states."""
    ours = Weights(BF16, FP32, BF16, sizes=(512,))
    ours.update([torch.linspace(1, 2, 512).to(BF16)])
    before = ours.moments[1][0].clone()
    ours.update([torch.zeros(512, dtype=BF16)], betas=(0.9, beta2))
    assert bool((ours.moments[1][0] < before).all()) == shrinks
    assert torch.equal(ours.moments[1][0], before) != shrinks


def test_slicing_changes_nothing() -> None:
    """A piece may begin anywhere in its parameter; cuts on a multiple of 32 keep torch's vectors whole."""
    whole, parts = Weights(sizes=(4099,)), Weights(sizes=(4099,))
    for step in range(5):
        (grad,) = gradients(step, BF16, (4099,))
        whole.update([grad])
        parts.steps += 1
        for cut in (slice(0, 1024), slice(1024, 4099)):
            mixed_adamw_update_(
                [parts.params[0][cut]], [grad[cut]], [parts.masters[0][cut]],
                [parts.moments[0][0][cut]], [parts.moments[1][0][cut]], [], [parts.steps[0]],
                scale=None, found_inf=None, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2,
                decay_by="lr", maximize=False,
            )  # fmt: skip
    assert_same_bits(parts.params + parts.masters, whole.params + whole.masters)


def test_pieces_may_have_different_steps_and_be_empty() -> None:
    ours = Weights(sizes=(0, 40, 0, 40))
    ours.steps += torch.tensor([0.0, 0.0, 0.0, 5.0])
    same = gradients(0, BF16, (40,))[0]
    ours.masters[3].copy_(ours.masters[1])
    ours.update([same[:0], same, same[:0], same])
    assert not torch.equal(ours.masters[1], ours.masters[3])
    Weights(sizes=()).update([])


# ---------------------------------------------------------------- remainders


def split(bits: Tensor) -> tuple[Tensor, Tensor]:
    param, remainder = torch.empty(bits.shape, dtype=BF16), torch.empty(bits.shape, dtype=INT16)
    split_master_(bits.view(FP32), param, remainder)
    return param, remainder


def as_int32(patterns: list[int]) -> Tensor:
    return torch.tensor(patterns, dtype=torch.int64).to(torch.int32)


def check_exact(bits: Tensor) -> None:
    """Every number comes back; its parameter is the nearest bf16, which on ties is the one away from zero."""
    kept = bits.clone()
    param, remainder = split(bits)
    assert torch.equal(bits, kept)
    master = bits.view(FP32)
    number = ~master.isnan()
    back = join_master(param, remainder)
    assert torch.equal(back.view(torch.int32)[number], bits[number])
    assert back[~number].isnan().all()
    assert param[~number].isnan().all()
    tie = (bits & 0xFFFF) == 0x8000
    assert torch.equal(param[number & ~tie], master[number & ~tie].to(BF16))
    away = (master.double() * (1 + 2**-20)).float().to(BF16)  # tips a tie; subnormals and the largest are told apart
    normal = (master.abs() > 1e-30) & (master.abs() < 3.38e38)
    assert torch.equal(param[number & tie & normal], away[number & tie & normal])


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=64))
def test_any_bits_come_back(patterns: list[int]) -> None:
    check_exact(as_int32(patterns))


def test_every_upper_half_with_the_lower_halves_that_matter() -> None:
    upper = torch.arange(1 << 16) << 16
    for lower in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFE, 0xFFFF):
        check_exact((upper + lower).to(torch.int32))


def test_every_lower_half() -> None:
    lower = torch.arange(1 << 16)
    for upper in (0x0000, 0x8000, 0x3F80, 0xBF81, 0x7F7F, 0xFF7F, 0x0080, 0x7F80, 0xFF80, 0x7FFF, 0xFFFF):
        check_exact((lower + (upper << 16)).to(torch.int32))


@pytest.mark.parametrize("grad_dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("pattern", [0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0x7FC00000])
def test_a_nan_gradient_shows_in_the_parameter(pattern: int, grad_dtype: torch.dtype) -> None:
    """With all its bits set a NaN would carry into the sign, and the parameter would be a harmless -0."""
    ours = Weights(BF16, INT16, sizes=(40,))
    grad = torch.zeros(40)
    grad.view(torch.int32)[7] = as_int32([pattern])[0]
    wide = grad if grad_dtype == FP32 else grad.to(BF16)
    ours.update([wide])
    assert ours.params[0].isnan().nonzero().tolist() == [[7]]
    assert ours.weights()[0].isnan().nonzero().tolist() == [[7]]


# ---------------------------------------------------------------- mistakes


def test_what_has_no_meaning_is_refused_before_anything_changes() -> None:
    ours = Weights(sizes=(8,))
    kept = [t.clone() for t in ours.params + ours.masters]
    grads = gradients(0, BF16, (8,))
    with pytest.raises(ValueError, match=r"equally long.*grads 2"):
        ours.update(grads * 2)
    with pytest.raises(ValueError, match=r"grads must be .* got torch\.float64"):
        ours.update([g.double() for g in grads])
    ours.moments[0][0] = ours.moments[0][0].double()
    with pytest.raises(ValueError, match=r"exp_avgs must be .* got torch\.float64"):
        ours.update(grads)
    assert_same_bits(ours.params + ours.masters, kept)
    half = Weights(FP16, FP32, sizes=(8,))
    half.masters = [torch.zeros(8, dtype=INT16)]
    with pytest.raises(ValueError, match=r"complete bfloat16 parameters only, got torch\.float16"):
        half.update([g.to(FP16) for g in grads])
    with pytest.raises(ValueError, match="must be split from float32"):
        split_master_(torch.zeros(3), torch.zeros(3), torch.zeros(3, dtype=INT16))
    with pytest.raises(ValueError, match="joined from bfloat16 and int16"):
        join_master(torch.zeros(3), torch.zeros(3, dtype=INT16))
