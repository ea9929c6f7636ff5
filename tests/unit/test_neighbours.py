"""CyclicLRWithRestarts with optimizers of others, and DistAdamW with schedulers of others."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim import lr_scheduler as torchs

from dist_adamw import CyclicLRWithRestarts, DistAdamW

UPDATES = 30
LAMBDA = 0.05 * math.sqrt(0.1)  # of weight_decay=0.05, a batch of 100 and cycles of 1000 samples


def network() -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(6, 17), nn.Tanh(), nn.Linear(17, 2))


def loss_of(model: nn.Module, update: int) -> Tensor:
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(update))
    return nn.functional.mse_loss(model(x), torch.sin(x[:, :2] * 3))


def cycles(optimizer: Optimizer, **options: Any) -> CyclicLRWithRestarts:
    """Cycles of ten updates."""
    return CyclicLRWithRestarts(optimizer, 100, 1000, **{"restart_period": 1, "t_mult": 1, "min_lr": 0.0, **options})


def weights(model: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def train(model: nn.Module, optimizer: Optimizer, after: Callable[[Tensor], object]) -> list[list[float]]:
    """Update, call ``after(loss)``; the lr of every group at every update."""
    rows = []
    for update in range(UPDATES):
        rows.append([float(group["lr"]) for group in optimizer.param_groups])
        loss = loss_of(model, update)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        after(loss.detach())
    return rows


# ---------------------------------------------------------------- our scheduler, their optimizers


class FlaggedAdam(torch.optim.Adam):
    """torch's Adam, decoupled or not, that says so only as apex and DeepSpeed do.

    Their own classes compile an extension when they are built, for which a test suite has no time.
    """

    def __init__(self, params: Any, flag: str, decoupled: bool, **options: Any) -> None:
        super().__init__(params, decoupled_weight_decay=decoupled, **options)
        for group in self.param_groups:
            group.pop("decoupled_weight_decay")
        self._decoupled = decoupled
        setattr(self, flag, decoupled)

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["decoupled_weight_decay"] = self._decoupled
        try:
            return super().step(closure)
        finally:
            for group in self.param_groups:
                group.pop("decoupled_weight_decay")


OTHERS: dict[str, tuple[Callable[[Any], Optimizer], bool]] = {  # and whether their decay is decoupled
    "AdamW": (lambda params: torch.optim.AdamW(params, lr=0.01, weight_decay=0.05), True),
    "AdamW fused": (lambda params: torch.optim.AdamW(params, lr=0.01, weight_decay=0.05, fused=True), True),
    "SGD": (lambda params: torch.optim.SGD(params, lr=0.01, momentum=0.9, weight_decay=0.05), False),
    "SGD Nesterov": (
        lambda params: torch.optim.SGD(params, lr=0.01, momentum=0.9, nesterov=True, weight_decay=0.05),
        False,
    ),
    "CPUAdam": (lambda params: FlaggedAdam(params, "adamw_mode", True, lr=0.01, weight_decay=0.05), True),
    "CPUAdam L2": (lambda params: FlaggedAdam(params, "adamw_mode", False, lr=0.01, weight_decay=0.05), False),
    "FusedAdam": (lambda params: FlaggedAdam(params, "adam_w_mode", True, lr=0.01, weight_decay=0.05), True),
    "FusedAdam L2": (lambda params: FlaggedAdam(params, "adam_w_mode", False, lr=0.01, weight_decay=0.05), False),
}


@pytest.mark.parametrize("name", OTHERS)
def test_our_scheduler_drives_it_as_by_hand(name: str) -> None:
    make, decoupled = OTHERS[name]
    model, twin = network(), network()
    optimizer, reference = make(model.parameters()), make(twin.parameters())
    scheduler = cycles(optimizer)
    decay = scheduler.get_last_weight_decay()[0]
    assert decay == (pytest.approx(LAMBDA / 0.01) if decoupled else 0.05)

    def by_hand(update: int) -> None:
        group = reference.param_groups[0]
        group["lr"], group["weight_decay"] = 0.01 * (1 + math.cos(math.pi * (update % 10) / 10)) / 2, decay

    by_hand(0)
    updates = iter(range(1, UPDATES + 1))
    lrs = train(model, optimizer, lambda _: scheduler.step())
    expected = train(twin, reference, lambda _: by_hand(next(updates)))
    assert [lr for (lr,) in lrs] == pytest.approx([lr for (lr,) in expected])
    torch.testing.assert_close(weights(model), weights(twin), rtol=1e-6, atol=1e-7)
    assert scheduler.samples == 100 * UPDATES
    if not decoupled:
        with pytest.raises(ValueError, match=r"is to be normalised, but .* adds weight_decay=0\.05"):
            cycles(make(network().parameters()), normalize_weight_decay=True)


def test_a_subclass_that_calls_its_parents_step_makes_one_update() -> None:
    """Once torch has made an Adam itself, it runs the hooks of both classes."""
    torch.optim.Adam(network().parameters())
    model = network()
    optimizer = FlaggedAdam(model.parameters(), "adam_w_mode", True, lr=0.01)
    calls: list[int] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append(1))
    scheduler = cycles(optimizer)
    train(model, optimizer, lambda _: scheduler.step())
    assert len(calls) == 2 * UPDATES
    assert scheduler.samples == 100 * UPDATES


def test_an_update_that_failed_is_not_in_the_way_of_the_next() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    scheduler = cycles(optimizer)
    optimizer.param_groups[0]["lr"] = "0.01"
    with pytest.raises(TypeError):
        train(model, optimizer, lambda _: None)
    scheduler.step()
    assert scheduler.samples == 0
    optimizer.param_groups[0]["lr"] = 0.01
    train(model, optimizer, lambda _: scheduler.step())
    assert scheduler.samples == 100 * UPDATES


@pytest.mark.parametrize("name", ["DeepSpeedCPUAdam", "FusedAdam"])
def test_deepspeeds_own_adams_carry_the_flag_that_is_read(name: str) -> None:
    """Building one compiles an extension; which attribute its __init__ sets can be seen without."""
    adam = pytest.importorskip("deepspeed.ops.adam", reason="DeepSpeed is not installed")
    assert "adam_w_mode" in getattr(adam, name).__init__.__code__.co_names


# ---------------------------------------------------------------- groups as timm and transformers make them


def stepping(scheduler: CyclicLRWithRestarts) -> Callable[[Tensor], object]:
    return lambda _: scheduler.step()


def timm_groups(model: nn.Sequential) -> list[dict[str, Any]]:
    """Make groups as timm's param_groups_layer_decay: a scale per layer, no decay for vectors, no lr."""
    return [
        {"params": [p for p in layer.parameters() if (p.ndim == 1) == vector], "lr_scale": scale, "weight_decay": decay}
        for layer, scale in ((model[0], 0.25), (model[2], 1.0))
        for vector, decay in ((True, 0.0), (False, 0.05))
    ]


@pytest.mark.parametrize("cls", [DistAdamW, torch.optim.AdamW])
def test_lr_scale_multiplies_the_scheduled_lr_as_under_timm(cls: Any) -> None:
    model = network()
    optimizer = cls(timm_groups(model), lr=0.01)
    scheduler = cycles(optimizer, min_lr=1e-4, warmup_samples=500, warmup_start_lr=1e-3)
    lrs = train(model, optimizer, lambda _: scheduler.step())
    for first_bias, first, last_bias, last in lrs:
        assert first_bias == first == 0.25 * last
        assert last_bias == last
    assert (lrs[0][3], lrs[5][3]) == (1e-3, 0.01)  # warm-up from its start to the base
    assert scheduler.get_last_lr() == scheduler.get_lr()


def test_a_normalised_decay_does_not_follow_lr_scale_and_another_does() -> None:
    """AdamW decays a weight by lr * weight_decay; a group's base lr and scale have no influence."""
    for normalize, per_update in (("auto", [0.0, LAMBDA, 0.0, LAMBDA]), (False, [0.0, 1.25e-4, 0.0, 5e-4])):
        optimizer = torch.optim.AdamW(timm_groups(network()), lr=0.01)
        cycles(optimizer, normalize_weight_decay=normalize)
        taken = [group["lr"] * group["weight_decay"] for group in optimizer.param_groups]
        assert taken == pytest.approx(per_update)


def test_both_conventions_give_the_same_weights_under_lr_scale() -> None:
    results = []
    for decay_by in ("lr", "schedule"):
        model = network()
        optimizer = DistAdamW(timm_groups(model), lr=0.01, decay_by=decay_by)
        train(model, optimizer, stepping(cycles(optimizer)))
        results.append(weights(model))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-7)


def test_lr_scale_zero_freezes_a_group() -> None:
    model = network()
    before = copy.deepcopy(model[0])
    groups = [{**group, "lr_scale": group["lr_scale"] == 1.0} for group in timm_groups(model)]
    optimizer = torch.optim.AdamW(groups, lr=0.01)
    scheduler = cycles(optimizer)
    train(model, optimizer, lambda _: scheduler.step())
    assert torch.equal(weights(before), weights(model[0]))
    assert not torch.equal(weights(network()[2]), weights(model[2]))


@pytest.mark.parametrize("scale", [-0.5, math.nan, math.inf])
def test_a_bad_lr_scale_is_refused(scale: float) -> None:
    groups = [{"params": network().parameters(), "lr_scale": scale}]
    with pytest.raises(ValueError, match=f"lr_scale .*finite.* {scale!r}"):
        cycles(torch.optim.AdamW(groups))


def test_lr_scale_is_part_of_what_a_checkpoint_must_agree_on() -> None:
    saved = cycles(torch.optim.AdamW(timm_groups(network()), lr=0.01)).state_dict()
    groups = timm_groups(network())
    cycles(torch.optim.AdamW(groups, lr=0.01)).load_state_dict(saved)
    groups[0]["lr_scale"] = 0.5
    other = cycles(torch.optim.AdamW(groups, lr=0.01))
    with pytest.raises(ValueError, match=r"\[0\.01, 0\.0, 0\.0, 0\.25\].* and is .*\[0\.01, 0\.0, 0\.0, 0\.5\]"):
        other.load_state_dict(saved)
    other.load_state_dict(saved, on_difference="checkpoint")
    assert other.get_last_lr()[0] == pytest.approx(0.25 * 0.01)


def hf_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Make groups as transformers' Trainer: no decay for biases."""
    named = list(model.named_parameters())
    return [
        {"params": [p for n, p in named if "bias" not in n], "weight_decay": 0.05},
        {"params": [p for n, p in named if "bias" in n], "weight_decay": 0.0},
    ]


@pytest.mark.parametrize("cls", [DistAdamW, torch.optim.AdamW])
def test_after_another_scheduler_the_base_is_initial_lr(cls: Any) -> None:
    """lr is what the former scheduler has annealed; initial_lr is what the user chose."""
    model = network()
    optimizer = cls(hf_groups(model), lr=0.01)
    former = torchs.ExponentialLR(optimizer, 0.8)
    train(model, optimizer, lambda _: former.step())
    assert optimizer.param_groups[0]["lr"] < 1e-4
    scheduler = cycles(optimizer)
    assert scheduler.get_last_lr() == [0.01, 0.01]
    assert scheduler.get_last_weight_decay() == [pytest.approx(LAMBDA / 0.01), 0.0]


# ---------------------------------------------------------------- their schedulers, our optimizer


def cosine_with_warmup(optimizer: Optimizer) -> Any:
    from transformers import get_cosine_schedule_with_warmup

    return get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=5, num_training_steps=UPDATES)


THEIRS: dict[str, Callable[[Optimizer], Any]] = {
    "CosineAnnealingWarmRestarts": lambda o: torchs.CosineAnnealingWarmRestarts(o, T_0=7, T_mult=2),
    "OneCycleLR": lambda o: torchs.OneCycleLR(o, max_lr=0.02, total_steps=UPDATES + 1),
    "LambdaLR": lambda o: torchs.LambdaLR(o, [lambda n: 0.9**n, lambda n: 1 / (n + 1)]),
    "ReduceLROnPlateau": lambda o: torchs.ReduceLROnPlateau(o, factor=0.5, patience=0),
    "SequentialLR": lambda o: torchs.SequentialLR(
        o, [torchs.LinearLR(o, 0.1, total_iters=5), torchs.CosineAnnealingLR(o, T_max=25)], milestones=[5]
    ),
    "transformers' cosine with warm-up": cosine_with_warmup,
}


def driven_by(scheduler: Any, optimizer: Optimizer, betas: list[Any]) -> Callable[[Tensor], None]:
    """Step after an update, and note the betas: OneCycleLR cycles them."""

    def after(loss: Tensor) -> None:
        scheduler.step(*([loss] if isinstance(scheduler, torchs.ReduceLROnPlateau) else []))
        betas.append(optimizer.param_groups[0]["betas"])

    return after


@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step")  # SequentialLR itself
@pytest.mark.parametrize("name", THEIRS)
def test_driven_by_their_scheduler_the_weights_are_torchs_to_the_bit(name: str) -> None:
    results = []
    for make in (DistAdamW, lambda groups, **options: torch.optim.AdamW(groups, fused=True, **options)):
        model = network()
        optimizer = make(hf_groups(model), lr=0.01)
        scheduler = THEIRS[name](optimizer)
        betas: list[Any] = []
        results.append((train(model, optimizer, driven_by(scheduler, optimizer, betas)), betas, weights(model)))
    (lrs, betas, ours), (their_lrs, their_betas, theirs) = results
    assert lrs == their_lrs
    assert len({lr for lr, _ in lrs}) > 2
    assert betas == their_betas
    assert (len(set(betas)) > 10) == (name == "OneCycleLR")
    assert torch.equal(ours, theirs)


# ---------------------------------------------------------------- timm's and Lightning's calls


def test_the_calls_of_timms_loop_are_explained() -> None:
    """train.py calls step_update after each update, and step(epoch, metric) after each epoch."""
    model = network()
    optimizer = DistAdamW(model.parameters())
    scheduler = cycles(optimizer)
    assert not hasattr(scheduler, "step_update")
    with pytest.raises(AttributeError, match=r"no step_update.*Call step\(\) after every optimizer\.step\(\)"):
        scheduler.step_update(num_updates=1, metric=0.5)  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"step\(1, 0\.5\) is not understood.*not after epochs"):
        scheduler.step(1, 0.5)
    with pytest.raises(AttributeError, match="has no attribute 'step_updates'"):
        scheduler.step_updates()  # type: ignore[attr-defined]
    copied = copy.deepcopy(scheduler)
    assert copied.state_dict() == scheduler.state_dict()


def test_one_call_after_many_updates_is_told_once() -> None:
    """As in Lightning with its default, "interval": "epoch"; the clock is right, and the lr too late."""
    model = network()
    optimizer = DistAdamW(model.parameters())
    scheduler = cycles(optimizer)

    def update(times: int) -> None:
        for _ in range(times):
            loss_of(model, 0).backward()
            optimizer.step()

    update(1)
    scheduler.step()
    update(3)
    with pytest.warns(UserWarning, match=r"called once for 3 updates.*\"interval\": \"step\""):
        scheduler.step()
    assert scheduler.samples == 400
    update(2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler.step()
        update(2)
        scheduler.step(samples=200)  # counted by the script
    assert scheduler.samples == 800
