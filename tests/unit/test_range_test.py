"""The range test in one process: the rule, the lr of each update, what is restored, bad input."""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dist_adamw import CyclicLRWithRestarts, DistAdamW, lr_range
from dist_adamw.range_test.curve import Divergence, RangeResult, lr_of, make_result
from dist_adamw.range_test.prepared import stop_watching, watch
from dist_adamw.range_test.script import ScriptRange, ScriptTest
from tests.known import grad_of

UPDATES = 100


def lrs_of(updates: int = UPDATES) -> list[float]:
    return [lr_of(i, 1e-6, 1.0, updates) for i in range(updates)]


def fall(lr: float, begin: float = 1e-4, end: float = 1e-2) -> float:
    """1 up to ``begin``, a straight line over log lr down to 0 at ``end``, and up after 10 times that."""
    position = min(max(math.log(lr / begin) / math.log(end / begin), 0.0), 1.0)
    return 1 - position + max(0.0, math.log(lr / (10 * end)))


def result_of(losses: list[float], **options: Any) -> RangeResult:
    updates = options.pop("updates", UPDATES)
    told: dict[str, Any] = {"has_diverged": False, "was_left": False, **options}
    return make_result(lrs_of(updates)[: len(losses)], losses, updates, "the end", **told)


# ---------------------------------------------------------------- the rule


def test_the_lr_is_a_geometric_sequence_with_the_very_ends() -> None:
    lrs = lrs_of()
    assert lrs[0] == 1e-6
    assert lrs[-1] == 1.0
    for before, after in itertools.pairwise(lrs):
        assert after / before == pytest.approx(1e6 ** (1 / (UPDATES - 1)))


@pytest.mark.parametrize("updates", [50, 100, 400])
def test_the_suggestion_is_where_a_tenth_and_nine_tenths_of_the_fall_lie(updates: int) -> None:
    result = result_of([fall(lr) for lr in lrs_of(updates)], updates=updates)
    assert result.problem is None
    # A straight line over log lr from 1e-4 to 1e-2, smoothed: 10% and 90% of the way.
    step = math.log(1e6) / (updates - 1)
    assert math.log(result.suggested_min or 0) == pytest.approx(math.log(10**-3.8), abs=2 * step)
    assert math.log(result.suggested_max or 0) == pytest.approx(math.log(10**-2.2), abs=2 * step)


@pytest.mark.parametrize("level", [0.0, -50.0, 1000.0])
def test_it_does_not_depend_on_the_level_of_the_loss(level: float) -> None:
    plain, moved = (result_of([fall(lr) + up for lr in lrs_of()]) for up in (5.0, level))
    assert (moved.suggested_min, moved.suggested_max) == (plain.suggested_min, plain.suggested_max)


def test_it_is_stable_against_noise() -> None:
    draw = random.Random(4)
    found = [result_of([fall(lr) + draw.gauss(0, 0.05) for lr in lrs_of()]) for _ in range(200)]
    decades = [
        (math.log10((one.suggested_min or 0) / 10**-3.8), math.log10((one.suggested_max or 0) / 10**-2.2))
        for one in found
    ]
    assert max(abs(low) for low, _ in decades) < 0.3
    assert max(abs(high) for _, high in decades) < 0.3


def test_noise_alone_has_no_suggestion() -> None:
    draw = random.Random(5)
    found = [result_of([2 + draw.gauss(0, 0.3) for _ in range(UPDATES)]) for _ in range(300)]
    suggested = [one for one in found if one.problem is None]
    assert suggested == []


@pytest.mark.parametrize(
    ("losses", "options", "sentence"),
    [
        ([1.0] * 100, {}, "never fell below its level at the start, 1: raise highest"),
        ([1 + lr for lr in lrs_of()], {}, "never fell"),
        ([fall(lr, end=1.0) for lr in lrs_of()], {}, "still falling at the largest lr, 1: raise highest"),
        ([fall(lr) for lr in lrs_of()[:60]], {"was_left": True}, "must run for all 100 updates, .* still falling"),
        (
            [fall(lr, begin=1e-7, end=1e-4) for lr in lrs_of()],
            {},
            "falls from the first update on, at lr 1e-06: lower lowest",
        ),
        (
            [1.0] * 10,
            {"has_diverged": True},
            "10 updates are too few, and 20 needed: pass more updates, or a smaller lowest",
        ),
    ],
)
def test_no_suggestion_is_one_sentence(losses: list[float], options: dict[str, Any], sentence: str) -> None:
    result = result_of(losses, **options)
    assert (result.suggested_min, result.suggested_max) == (None, None)
    assert result.problem is not None
    assert re.search(sentence, result.problem)
    assert result.problem.endswith(".")
    assert result.problem.count("\n") == 0
    assert f"no suggestion: {result.problem}" in str(result)


@pytest.mark.parametrize(
    ("losses", "at"),
    [
        ([1.0] * 40 + [50.0] * 10, 40),  # the mean of 5 updates is above 4 at once
        ([-10.0] * 40 + [15.0] * 10, None),  # 25 above -10, and 30 needed
        ([-10.0] * 40 + [25.0] * 20, 46),  # the mean must come within 5 of 25: 5 times log(7) updates
        ([10.0] * 20 + [10.0 - i for i in range(11)] + [0.001] * 20 + [0.5] * 20, None),  # 500 times the smallest
        ([0.01, 0.3, 0.02, 0.25, 0.01, 0.28, 0.02, 0.3, 0.01, 0.3] * 9, None),  # a trained model: small and noisy
    ],
)
def test_divergence(losses: list[float], at: int | None) -> None:
    watch = Divergence(UPDATES, 4.0)
    found = [i for i, loss in enumerate(losses) if watch.add(loss)]
    if at is None:
        assert found == []
    else:
        assert found
        assert at <= found[0] <= at + 4


# ---------------------------------------------------------------- a real optimizer


def quadratic(curvature: float, optimizer: Callable[[list[Tensor]], Optimizer], **options: Any) -> Any:
    """A range test of curvature / 2 * x**2."""
    x = nn.Parameter(torch.ones((), dtype=torch.float64))
    model = nn.Module()
    model.x = x
    with lr_range(model, one := optimizer([x]), **options) as test:
        while True:
            loss = 0.5 * curvature * x**2
            one.zero_grad()
            loss.backward()
            one.step()
            if test.record(loss):
                break
    assert x.item() == 1.0
    assert test.result is not None
    return test.result


@pytest.mark.parametrize("curvature", [0.5, 4000.0])
def test_gradient_descent_on_a_quadratic_diverges_where_it_must(curvature: float) -> None:
    make = lambda params: torch.optim.SGD(params, lr=0.1)  # noqa: E731
    result = quadratic(curvature, make, lowest=1e-6 / curvature, highest=100 / curvature, updates=200)
    # x *= 1 - lr * curvature: the loss of the next update is larger if and only if lr > 2 / curvature.
    turned = next(i for i in range(199) if result.losses[i + 1] > result.losses[i])
    assert result.lrs[turned - 1] <= 2 / curvature < result.lrs[turned]
    assert "diverged" in result.ended_by
    assert result.suggested_min < result.suggested_max < 2 / curvature
    # The loss falls by x**2, and x by lr after lr: 10% and 90% of the way have closed forms.
    steps = torch.tensor(result.lrs, dtype=torch.float64)
    levels = torch.cumprod((1 - steps * curvature) ** 2, 0)
    for suggested, level in ((result.suggested_min, 0.9), (result.suggested_max, 0.1)):
        exact = result.lrs[int((levels < level).nonzero()[0])]
        assert 0.6 < suggested / exact < 1.6


def loss_of(model: nn.Module, update: int) -> Tensor:
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(update))
    return nn.functional.mse_loss(model(x), 2 * torch.sin(x[:, :2]))


def network() -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.BatchNorm1d(32), nn.Dropout(0.1), nn.Linear(32, 2))


def weights(model: nn.Module) -> Tensor:
    return torch.cat([one.detach().double().reshape(-1) for one in model.state_dict().values()])


def train(model: nn.Module, optimizer: Any, updates: range, scheduler: Any = None, test: Any = None) -> list[float]:
    losses = []
    for update in updates:
        optimizer.zero_grad()
        loss = loss_of(model, update)
        loss.backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        losses.append(loss.item())
        if test is not None and test.record(loss):
            break
    return losses


def deep(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    sizes = [6, 64, 64, 64]
    layers = [layer for i, o in itertools.pairwise(sizes) for layer in (nn.Linear(i, o), nn.Tanh())]
    return nn.Sequential(*layers, nn.Linear(64, 2))


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_adamw_trains_best_near_the_suggested_maximum(seed: int) -> None:
    model = deep(seed)
    with lr_range(model, optimizer := DistAdamW(model.parameters()), updates=100, highest=10.0) as test:
        train(model, optimizer, range(1000), test=test)
    result: Any = test.result
    assert result.problem is None
    ends = []
    for lr in (result.suggested_min, result.suggested_max, 30 * result.suggested_max):
        model = deep(seed)
        ends.append(train(model, DistAdamW(model.parameters(), lr=lr), range(150))[-30:])
    at_min, at_max, beyond = map(sum, ends)
    assert at_max < 0.5 * at_min
    assert at_max < 0.5 * beyond


OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "DistAdamW": lambda params: DistAdamW(params, lr=1e-2, weight_decay=0.1),
    "clipped": lambda params: DistAdamW(params, lr=1e-2, max_grad_norm=1.0),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=1e-2, amsgrad=True),
    "momentum": lambda params: torch.optim.SGD(params, lr=1e-2, momentum=0.9),
    "tensor lr": lambda params: torch.optim.AdamW(params, lr=torch.tensor(1e-2), foreach=False, fused=True),
}


@pytest.mark.parametrize("before", [0, 5])
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("kind", ["ours", "StepLR", "none"])
def test_training_continues_with_the_same_bits(kind: str, name: str, before: int) -> None:
    """Without Accelerate, in a loop that passes its scheduler."""
    if (kind, name) == ("StepLR", "tensor lr"):
        return  # its state has tensors, which a checkpoint refuses
    ends = []
    for has_test in (False, True):
        model = network()
        optimizer = OPTIMIZERS[name](model.parameters())
        scheduler: Any = None
        if kind == "ours":
            scheduler = CyclicLRWithRestarts(optimizer, 16, 160, 1, min_lr=0.0, warmup_samples=32)
        elif kind == "StepLR":
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
        torch.manual_seed(7)
        train(model, optimizer, range(before), scheduler)
        if has_test:
            with lr_range(model, optimizer, scheduler=scheduler, updates=40) as test:
                train(model, optimizer, range(900, 1000), scheduler, test)
            assert test.result is not None
            assert all(param.grad is None or not param.grad.any() for param in model.parameters())
            assert bool(optimizer.state) == bool(before)
        train(model, optimizer, range(before, before + 6), scheduler)
        group = {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
        ends.append((weights(model).tolist(), str(group), torch.rand(1).item(), scheduler and scheduler.last_epoch))
    assert ends[0] == ends[1]


@pytest.mark.filterwarnings("error:.*has not written")
def test_groups_keep_their_ratios_and_the_normalised_decay_stays() -> None:
    model = network()
    groups = [
        {"params": model[0].parameters(), "lr": 1e-3},
        {"params": model[2].parameters(), "weight_decay": 0.0},
        {"params": model[4].parameters(), "lr_scale": 0.5},
    ]
    optimizer = DistAdamW(groups, lr=4e-3, weight_decay=0.3)
    scheduler = CyclicLRWithRestarts(optimizer, 16, 160, 1, warmup_samples=32, min_lr=0.0)
    seen: list[list[tuple[float, float]]] = []
    outside: list[bool] = []
    with lr_range(model, optimizer, scheduler=scheduler, updates=30, lowest=1e-4, highest=1e-1, divergence=1e9) as test:
        optimizer.register_step_pre_hook(
            lambda one, *_: seen.append([(g["lr"], g["weight_decay"]) for g in one.param_groups])
        )
        # Outside of step the groups are the schedule's.
        optimizer.register_step_post_hook(
            lambda one, *_: outside.append([g["lr"] for g in one.param_groups] == scheduler.get_last_lr())
        )
        train(model, optimizer, range(100), scheduler, test)
    assert len(seen) == 30
    assert outside == [True] * 30
    decay = 0.3 * math.sqrt(16 / 160)
    for i, ((first, first_decay), (second, second_decay), (third, third_decay)) in enumerate(seen):
        assert second == lr_of(i, 1e-4, 1e-1, 30)
        assert first == pytest.approx(second / 4)
        assert third == pytest.approx(second / 2)
        assert second_decay == 0.0
        assert first * first_decay == pytest.approx(decay)
        assert third * third_decay == pytest.approx(decay)


def test_a_decay_of_the_schedule_is_that_of_the_peak() -> None:
    model = network()
    optimizer = DistAdamW(model.parameters(), lr=4e-3, weight_decay=0.3, decay_by="schedule")
    scheduler = CyclicLRWithRestarts(optimizer, 16, 160, 1, warmup_samples=320, min_lr=0.0)
    seen: list[float] = []
    with lr_range(model, optimizer, scheduler=scheduler, updates=20, divergence=1e9) as test:
        optimizer.register_step_pre_hook(lambda one, *_: seen.append(one.param_groups[0]["weight_decay"]))
        train(model, optimizer, range(100), scheduler, test)
    assert len(seen) == 20
    assert seen == [pytest.approx(0.3 * math.sqrt(16 / 160))] * 20


@pytest.mark.filterwarnings("error:the schedule ended")
def test_the_end_of_the_schedule_is_no_matter_of_the_test() -> None:
    model = network()
    optimizer = DistAdamW(model.parameters())
    scheduler = CyclicLRWithRestarts(optimizer, 16, 160, 1, total_samples=96)
    train(model, optimizer, range(5), scheduler)
    with lr_range(model, optimizer, scheduler=scheduler, updates=20, divergence=1e9) as test:
        train(model, optimizer, range(100), scheduler, test)
    with pytest.warns(UserWarning, match="the schedule ended at sample 96"):
        train(model, optimizer, range(5, 9), scheduler)


# ---------------------------------------------------------------- which loss belongs to which update


@pytest.mark.parametrize(
    ("kind", "place"), [("tensor", "before backward"), ("tensor", "after step"), ("number", "after step")]
)
@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_loss_belongs_to_its_update(kind: str, accumulation: int, place: str) -> None:
    x = nn.Parameter(torch.zeros(()))
    model = nn.Module()
    model.x = x
    optimizer = torch.optim.SGD([x], lr=1.0)
    told, updates = 0.0, 20
    with lr_range(model, optimizer, updates=updates, divergence=1e9) as test:
        for micro_batch in range(1000):
            loss = x * 0 + 10.0 + micro_batch % 7 + micro_batch // accumulation
            told += 1
            shown = loss if kind == "tensor" else loss.item()
            if place == "before backward" and test.record(shown):
                break
            loss.backward()
            if micro_batch % accumulation == accumulation - 1:
                optimizer.step()
                optimizer.zero_grad()
            if place == "after step" and test.record(shown):
                break
    assert test.result is not None
    means = [
        sum(10.0 + m % 7 + m // accumulation for m in range(u * accumulation, (u + 1) * accumulation)) / accumulation
        for u in range(updates)
    ]
    assert test.result.losses == pytest.approx(means)
    assert test.result.lrs == tuple(lr_of(i, 1e-6, 1.0, updates) for i in range(updates))


def test_skipped_updates_do_not_advance_it_and_many_end_it() -> None:
    model = network()
    optimizer = DistAdamW(model.parameters(), max_grad_norm=1.0)
    with lr_range(model, optimizer, updates=30) as test:
        for update in range(1000):
            optimizer.zero_grad()
            loss = loss_of(model, update)
            loss.backward()
            if update % 2 or update >= 10:
                grad_of(next(model.parameters())).fill_(math.nan)
            lr = test.lr
            optimizer.step()
            assert (test.lr == lr) == bool(update % 2 or update >= 10)
            if test.record(loss):
                break
    assert test.result is not None
    assert len(test.result.lrs) == 5
    assert "the gradients of 20 updates in a row were not finite" in test.result.ended_by


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_it_ends_when_the_loss_is_not_finite(value: float) -> None:
    model = network()
    with lr_range(model, optimizer := DistAdamW(model.parameters()), updates=30) as test:
        for update in range(7):
            train(model, optimizer, range(update, update + 1))
            assert test.record(1.0 if update < 6 else value) is (update == 6)
        assert test.record(1.0) is True
    assert test.result is not None
    assert "diverged: the loss became" in test.result.ended_by
    assert test.result.losses == (1.0,) * 6


# ---------------------------------------------------------------- leaving the block


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
def test_an_exception_passes_and_everything_is_restored(error: type[BaseException]) -> None:
    model = network()
    optimizer = DistAdamW(model.parameters())
    train(model, optimizer, range(3))
    before = weights(model)
    test = lr_range(model, optimizer)

    def loop() -> None:
        with test:
            train(model, optimizer, range(3, 9))
            assert not torch.equal(weights(model), before)
            raise error("the user's")

    with pytest.raises(error):
        loop()
    assert torch.equal(weights(model), before)
    assert optimizer.updates == 3
    assert test.result is None
    assert not optimizer._optimizer_step_pre_hooks


def test_a_loop_that_ends_early_has_a_curve_and_no_suggestion() -> None:
    model = network()
    with lr_range(model, optimizer := DistAdamW(model.parameters())) as test:
        train(model, optimizer, range(30), test=test)
    assert test.result is not None
    assert len(test.result.losses) == 30
    assert test.result.ended_by == "the loop ended after 30 of 100 updates"
    assert "the loop must run for all 100 updates" in str(test.result.problem)


def test_the_picture_and_the_table(tmp_path: Path) -> None:
    result = result_of([fall(lr) if lr < 0.5 else 1e30 for lr in lrs_of()])
    assert result.plot(tmp_path / "new" / "x.png").read_bytes().startswith(b"\x89PNG")
    assert f"suggested: lr from {result.suggested_min:.2e} to {result.suggested_max:.2e}" in str(result)


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"lowest": 0.0}, "lowest must be a finite number above 0, got 0.0"),
        ({"lowest": -1e-3}, "lowest must be a finite number above 0, got -0.001"),
        ({"highest": math.inf}, "highest must be a finite number above 0, got inf"),
        ({"highest": math.nan}, "highest must be a finite number above 0, got nan"),
        ({"highest": "1"}, "highest must be a finite number above 0, got '1'"),
        ({"lowest": 1.0}, "lowest must be smaller than highest, got 1.0 and 1.0"),
        ({"updates": 19}, "updates must be a whole number of at least 20, got 19"),
        ({"updates": 50.0}, "updates must be a whole number of at least 20, got 50.0"),
        ({"updates": True}, "updates must be a whole number of at least 20, got True"),
        ({"divergence": 1.0}, "divergence must be above 1, got 1.0"),
    ],
)
def test_a_bad_option_is_one_sentence(options: dict[str, Any], sentence: str) -> None:
    model = network()
    with (
        pytest.raises(ValueError, match=r"^lr_range") as raised,
        lr_range(model, DistAdamW(model.parameters()), **options),
    ):
        pass
    assert sentence in str(raised.value)
    assert "\n" not in str(raised.value)


def test_bad_use_is_one_sentence(tmp_path: Path) -> None:
    model: Any = network()
    optimizer = DistAdamW(model.parameters())
    before = weights(model)
    with pytest.raises(ValueError, match="got dict"), lr_range(model, {}):  # type: ignore[arg-type]
        pass
    with pytest.raises(ValueError, match="a model as its first argument, got DistAdamW"), lr_range(optimizer, model):  # type: ignore[arg-type]
        pass
    test = lr_range(model, optimizer)
    with pytest.raises(ValueError, match="belongs inside the block"):
        test.record(1.0)
    with pytest.raises(ValueError, match=r"record\(loss\) was not called"), test:
        train(model, optimizer, range(3))
    assert torch.equal(weights(model), before)
    with pytest.raises(ValueError, match="entered before"), test:
        pass
    with (
        pytest.raises(ValueError, match="no curve: the loop ended after 0 of 100 updates"),
        lr_range(model, optimizer) as test,
    ):
        test.record(1.0)
    with (
        pytest.raises(ValueError, match="no curve: diverged: the loss became nan at lr 1e-06, after 0 updates"),
        lr_range(model, optimizer) as test,
    ):
        test.record(math.nan)
    with pytest.raises(ValueError, match="another range test of this optimizer"):  # noqa: SIM117
        with lr_range(model, optimizer), lr_range(model, optimizer):
            pass
    with pytest.raises(ValueError, match=r"must be one number, got a tensor of shape \(2,\)"):  # noqa: SIM117
        with lr_range(model, optimizer) as test:
            test.record(torch.ones(2))
    with pytest.raises(ValueError, match="must be one number, got dict"), lr_range(model, optimizer) as test:
        test.record({})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="add_param_group inside of lr_range"), lr_range(model, optimizer):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
    frozen = DistAdamW(network().parameters(), lr=0.0)
    with pytest.raises(ValueError, match="largest lr of a parameter group is 0"), lr_range(model, frozen):
        pass
    watcher = ScriptTest(ScriptRange(1e-6, 1.0, 20, 4.0, str(tmp_path / "it.png")))
    watch(watcher)
    try:
        with pytest.raises(ValueError, match="runs under dist-adamw lr-range"), lr_range(model, optimizer):
            pass
    finally:
        stop_watching(watcher)
    # Nothing of the failed ones is left.
    with lr_range(model, optimizer, updates=20) as test:
        train(model, optimizer, range(100), test=test)
    assert torch.equal(weights(model), before)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]})


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    model = network()
    optimizer = DistAdamW(model.parameters())
    missing = tmp_path / "missing"
    with pytest.raises(Exception, match="missing"), lr_range(model, optimizer, folder=missing):
        pass
    assert not optimizer._optimizer_step_pre_hooks
