"""Averages of the weights in one process: torch's bits, what a user's loop does to them, and each mistake."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn, update_bn

import dist_adamw
from dist_adamw import EMA, CheckpointError, CyclicLRWithRestarts, DistAdamW, Mean
from dist_adamw.optimizer.averages import check_averages
from dist_adamw.optimizer.kernels.averaging import mean_of, move_toward_, unless_skipped

ALL = {"ema": EMA(decay=0.9), "mean": Mean(every=None), "lawa": Mean(every=None, last=2)}


def network(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 13), nn.Tanh(), nn.Linear(13, 3)).to(dtype)


def update(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int = 0, scale: float = 1.0) -> None:
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(seed)).to(next(model.parameters()).dtype)
    optimizer.zero_grad()
    (scale * model(x).square().sum()).backward()
    optimizer.step()


def weights(model: nn.Module) -> list[Tensor]:
    return [param.detach().clone() for param in model.parameters()]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(map(torch.equal, one, other))


def shown(model: nn.Module, optimizer: DistAdamW, name: str) -> list[Tensor]:
    with optimizer.averaged(name):
        return weights(model)


def ema_of(series: list[list[Tensor]], decay: float = 0.9) -> list[Tensor]:
    average = [w.clone() for w in series[0]]
    for current in series[1:]:
        get_ema_multi_avg_fn(decay)(average, current, torch.tensor(1))
    return average


def mean(series: list[list[Tensor]]) -> list[Tensor]:
    average = [w.clone() for w in series[0]]
    for n, current in enumerate(series[1:], 1):
        get_swa_multi_avg_fn()(average, current, n)
    return average


# ---------------------------------------------------------------- torch's result


def test_the_bits_of_averaged_models_and_nothing_else_changes() -> None:
    model, other = network(), network()
    optimizer = DistAdamW(model.parameters(), averages=ALL)
    theirs = torch.optim.AdamW(other.parameters(), fused=True)
    ema = AveragedModel(other, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    series = []
    for k in range(7):
        update(model, optimizer, k)
        update(other, theirs, k)
        ema.update_parameters(other)
        series.append(weights(other))
        optimizer.add_to_average("mean")
        optimizer.add_to_average("lawa")
        assert same(weights(model), weights(other))
    assert same(shown(model, optimizer, "ema"), weights(ema.module))
    assert same(shown(model, optimizer, "mean"), mean(series))
    assert same(shown(model, optimizer, "lawa"), mean(series[-2:]))
    assert same(weights(model), weights(other))
    assert [optimizer.contributions(name) for name in ALL] == [7, 7, 7]


@pytest.mark.parametrize("resumed", [False, True])
def test_every_few_updates_with_the_decay_of_all_of_them(resumed: bool) -> None:
    model = network()
    averages = {"ema": EMA(decay=0.9, every=3)}
    optimizer = DistAdamW(model.parameters(), averages=averages)
    series = []
    for k in range(12):
        if resumed and k == 5:
            saved, optimizer = optimizer.state_dict(), DistAdamW(model.parameters(), averages=averages)
            optimizer.load_state_dict(saved)
        update(model, optimizer, k)
        series.append(weights(model))
        assert optimizer.contributions("ema") == k + 1
    assert same(shown(model, optimizer, "ema"), ema_of(series[::3], 0.9**3))


@pytest.mark.parametrize("cut", [1, 3, 16, 33, 1 << 18])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_an_element_does_not_depend_on_where_a_tensor_is_cut(cut: int, dtype: torch.dtype) -> None:
    whole, given = torch.randn(300_001).to(dtype), torch.randn(300_001)
    given = given.double() if dtype == torch.float64 else given
    parts, others = [p.clone() for p in whole[:999].split(cut)], list(given[:999].split(cut))
    move_toward_([whole], [given], 0.1)
    move_toward_(parts, others, 0.1)
    assert torch.equal(torch.cat(parts), whole[:999])


def test_an_average_of_bf16_is_computed_in_fp32_and_rounded_once() -> None:
    kept, given = torch.randn(1000).bfloat16(), torch.randn(1000)
    expected = torch.lerp(kept.float(), given, 0.25).bfloat16()
    move_toward_([kept], [given], 0.25)
    assert torch.equal(kept, expected)
    assert mean_of([kept, kept]).dtype == torch.float32


@pytest.mark.parametrize("master", [torch.float32, torch.int16])
def test_masters_are_averaged_not_their_rounded_parameters(master: torch.dtype) -> None:
    model, exact = network(torch.bfloat16), network(torch.bfloat16).float()
    optimizer = DistAdamW(model.parameters(), lr=1e-3, master_dtype=master, averages={"ema": EMA(decay=0.9)})
    theirs = torch.optim.AdamW(exact.parameters(), lr=1e-3, fused=True)
    series = []
    for k in range(5):
        update(model, optimizer, k)
        for ours, param in zip(model.parameters(), exact.parameters(), strict=True):
            param.grad = ours.grad.float()
        theirs.step()
        series.append(weights(exact))
    before = weights(model)
    expected = ema_of(series)
    assert all(torch.equal(s, w.bfloat16()) for s, w in zip(shown(model, optimizer, "ema"), expected, strict=True))
    entries = [optimizer.state[param]["ema"].view_as(param) for param in model.parameters()]
    assert same(entries, expected)
    assert same(weights(model), before)
    plain = network(torch.bfloat16)
    without = DistAdamW(plain.parameters(), lr=1e-3, master_dtype=master)
    for k in (*range(5), 9):
        update(plain, without, k)
    update(model, optimizer, 9)  # masters are still those of the weights, not of the average
    assert same(weights(model), weights(plain))
    key = "master" if master == torch.float32 else "remainder"
    for ours, theirs_ in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(optimizer.state[ours][key], without.state[theirs_][key])


# ---------------------------------------------------------------- what loops do


def test_parameters_without_a_gradient_are_averaged_too() -> None:
    model = network()
    optimizer = DistAdamW(model.parameters(), averages={"ema": EMA(decay=0.9)})
    series = []
    for k in range(6):
        model[0].requires_grad_(k in (1, 2))  # frozen before and after
        update(model, optimizer, k)
        series.append(weights(model))
    expected = ema_of(series)
    assert same(shown(model, optimizer, "ema"), expected)
    assert not torch.equal(expected[0], series[-1][0])


def test_a_shard_without_any_gradient_is_averaged_too() -> None:
    single, double = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = DistAdamW([single, double], averages={"ema": EMA(decay=0.9)})
    series = []
    for k in range(6):
        optimizer.zero_grad()
        ((k + 1) * single.sum() if k % 2 else single.square().sum() + double.square().sum()).backward()
        optimizer.step()
        series.append([single.detach().clone(), double.detach().clone()])
    with optimizer.averaged("ema"):
        assert same([single, double], ema_of(series))


def test_a_group_that_is_added_later_counts_as_constant_before() -> None:
    model = network()
    optimizer = DistAdamW(model[0].parameters(), averages={"ema": EMA(decay=0.9), "mean": Mean(every=None)})
    series = []
    for k in range(6):
        if k == 3:
            optimizer.add_param_group({"params": list(model[2].parameters()), "lr": 1e-2})
        update(model, optimizer, k)
        optimizer.add_to_average("mean")
        series.append(weights(model))
    assert same(shown(model, optimizer, "ema"), ema_of(series))
    for found, expected in zip(shown(model, optimizer, "mean"), mean(series), strict=True):
        torch.testing.assert_close(found, expected)  # the mean of equal numbers may be off by an ulp


def test_a_skipped_update_moves_no_average() -> None:
    model = network()
    optimizer = DistAdamW(model.parameters(), max_grad_norm=1.0, averages={"ema": EMA(decay=0.9)})
    series = []
    for k in range(6):
        update(model, optimizer, k, scale=float("inf") if k in (0, 3) else 1.0)
        assert optimizer.step_was_skipped == (k in (0, 3))
        if not optimizer.step_was_skipped:
            series.append(weights(model))
    assert optimizer.contributions("ema") == len(series) == 4
    assert same(shown(model, optimizer, "ema"), ema_of(series))


def test_a_device_decides_without_the_host() -> None:
    """What a GPU computes whose host does not know whether an update was skipped; here on a CPU and the meta device."""
    found_inf = torch.zeros((), device="meta")
    moves = unless_skipped({"ema": 0.1, "new": 1.0}, found_inf)
    assert isinstance(moves["ema"], Tensor)
    assert moves["ema"].is_meta
    assert moves["new"] == 1.0
    for skipped in (0.0, 1.0):
        average, given = torch.randn(100), torch.randn(100)
        expected = average if skipped else torch.lerp(average, given, 0.1)
        kept = average.clone()
        move_toward_([kept], [given], 0.1 * (1 - torch.tensor(skipped).double()))
        assert torch.equal(kept, expected)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_and_pickles_go_on(again: Callable[[Any], Any]) -> None:
    model = network()
    optimizer = DistAdamW(model.parameters(), averages=ALL)
    for k in range(3):
        update(model, optimizer, k)
        optimizer.add_to_average("lawa")
    both = again((model, optimizer))
    for one, other in [(model, optimizer), both]:
        update(one, other, 9)
        other.add_to_average("lawa")
    for name in ("ema", "lawa"):
        assert both[1].contributions(name) == 4
        assert same(shown(both[0], both[1], name), shown(model, optimizer, name))


@pytest.mark.parametrize("kept", [True, False])
def test_a_state_dict_goes_on(kept: bool) -> None:
    model, other = network(), network()
    optimizer, theirs = DistAdamW(model.parameters(), averages=ALL), DistAdamW(other.parameters(), averages=ALL)
    for k in range(3):
        update(model, optimizer, k)
        optimizer.add_to_average("mean")
    saved = copy.deepcopy(optimizer.state_dict())
    told = json.loads(saved["param_groups"][0]["averaged"])
    assert {name: average["count"] for name, average in told.items()} == {"ema": 3, "mean": 3, "lawa": 0}
    if not kept:  # torch.optim.AdamW's: averages begin
        for entry in saved["state"].values():
            for name in ("ema", "mean", "lawa_0", "lawa_1"):
                del entry[name]
        del saved["param_groups"][0]["averaged"]
    other.load_state_dict(model.state_dict())
    theirs.load_state_dict(saved)
    for one, mine in ((model, optimizer), (other, theirs)):
        update(one, mine, 9)
        mine.add_to_average("mean")
    assert theirs.contributions("ema") == (4 if kept else 1)
    for name in ("ema", "mean"):
        expected = shown(model, optimizer, name) if kept else weights(other)
        assert same(shown(other, theirs, name), expected)
    torch.optim.AdamW(network().parameters()).load_state_dict(optimizer.state_dict())


def test_an_average_that_the_user_replaces_or_removes() -> None:
    model = network()
    optimizer = DistAdamW(model.parameters(), averages={"ema": EMA(decay=0.5)})
    update(model, optimizer)
    param = model[0].weight
    optimizer.state[param]["ema"] = torch.zeros_like(param)
    optimizer.state[model[2].weight] = {}
    start = weights(model)
    update(model, optimizer, 1)
    now = weights(model)
    found = shown(model, optimizer, "ema")
    assert torch.equal(found[0], torch.lerp(torch.zeros_like(param), now[0], 0.5))
    assert torch.equal(found[2], torch.lerp(start[2], now[2], 0.5))  # it begins as the weights


def test_the_block_restores_weights_and_buffers_whatever_happens_inside() -> None:
    model: Any = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4))
    optimizer = DistAdamW(model.parameters(), averages={"ema": EMA(decay=0.5)})
    optimizer.attach(model)
    for k in range(3):
        update(model, optimizer, k)
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def inside() -> None:
        with optimizer.averaged("ema"):
            update_bn([torch.randn(8, 5) for _ in range(3)], model)
            assert not torch.equal(model[1].running_mean, before["1.running_mean"])
            with torch.no_grad():
                model[0].weight.zero_()
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        inside()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    update(model, optimizer, 4)


@pytest.mark.parametrize("options", [{}, {"master_dtype": torch.float32}, {"master_dtype": torch.int16}])
def test_a_mean_takes_weights_that_the_loop_has_changed_or_moved(options: dict[str, Any]) -> None:
    model = network(torch.bfloat16)
    optimizer = DistAdamW(model.parameters(), averages={"mean": Mean(every=None)}, **options)
    update(model, optimizer)
    with torch.no_grad():
        for param in model.parameters():
            param.data = param.detach().clone()  # other memory
            param.clamp_(-0.1, 0.1)
    optimizer.add_to_average("mean")
    assert same(shown(model, optimizer, "mean"), weights(model))
    assert float(model[0].weight.detach().abs().max()) <= 0.1001


# ---------------------------------------------------------------- the schedule


def scheduled(averages: dict[str, Any], updates: int, **recipe: Any) -> tuple[nn.Module, DistAdamW, list[list[Tensor]]]:
    """A run with a batch of 8 and an epoch of 40 samples."""
    model = network()
    optimizer = DistAdamW(model.parameters(), averages=averages)
    scheduler = CyclicLRWithRestarts(optimizer, 8, 40, **{"restart_period": "3 updates", "t_mult": 1, **recipe})
    series = []
    for k in range(updates):
        update(model, optimizer, k)
        scheduler.step()
        series.append(weights(model))
    return model, optimizer, series


@pytest.mark.parametrize(
    ("average", "moments"),
    [
        (Mean(), [3, 6, 9]),
        (Mean(last=2), [6, 9]),
        (Mean(every="2 updates"), [2, 4, 6, 8, 10]),
        (Mean(every="20 samples"), [3, 5, 8, 10]),  # at the update that reaches 20, 40, 60, 80
        (Mean(every="1 epoch", start="2 updates"), [2, 7]),
        (Mean(every=1, start=72), [9, 10]),  # more often than updates
        (Mean(every="cycle", start="4 updates"), [6, 9]),
    ],
)
def test_means_take_the_weights_at_their_moments(average: Mean, moments: list[int]) -> None:
    model, optimizer, series = scheduled({"it": average}, 10)
    assert same(shown(model, optimizer, "it"), mean([series[k - 1] for k in moments]))


def test_a_mean_waits_to_hear_from_the_device_whether_the_update_was_skipped() -> None:
    """On a GPU the clock moves before that is known, and is moved back later: here the outcome is set by hand."""
    _, optimizer, scheduler = trained({"it": Mean(every="1 update")}, 2)
    for skipped, count in ((1.0, 2), (0.0, 3)):
        optimizer._outcome.found_inf = torch.tensor(skipped)
        optimizer._outcome._copy = SimpleNamespace(read=lambda skipped=skipped: skipped)  # type: ignore[assignment]
        assert not optimizer.skip_is_known
        optimizer.follow_clock(scheduler.schedule, 16, 24)
        assert optimizer.contributions("it") == count


def test_a_skipped_update_after_one_that_ended_a_cycle_hides_nothing() -> None:
    """The scheduler is stepped once for several updates."""
    model, optimizer, scheduler = trained({"it": Mean(every="1 update")}, 1)
    optimizer.max_grad_norm = 1.0
    update(model, optimizer, 1)
    update(model, optimizer, 2, scale=float("inf"))
    assert optimizer.step_was_skipped
    scheduler.step()
    assert optimizer.contributions("it") == 2


def test_the_end_of_training_ends_a_cycle() -> None:
    model, optimizer, series = scheduled({"it": Mean()}, 7, total_samples="7 updates")
    assert optimizer.contributions("it") == 2  # the last cycle is cut, or extended, to end there
    assert torch.equal(shown(model, optimizer, "it")[0], mean([series[2], series[6]])[0])


def test_a_time_scale_averages_over_the_same_samples_with_any_batch() -> None:
    optimizer = DistAdamW(network().parameters(), averages={"ema": EMA(timescale="1 epoch")})
    CyclicLRWithRestarts(optimizer, 8, 40)
    one: Any = optimizer._decays["ema"]
    scheduler = CyclicLRWithRestarts(optimizer, 16, 40)
    assert one == pytest.approx(torch.exp(torch.tensor(-8 / 40, dtype=torch.float64)).item(), rel=1e-15)
    assert optimizer._decays["ema"] == pytest.approx(one**2, rel=1e-15)
    scheduler.batch_size = 4
    assert optimizer._decays["ema"] == pytest.approx(one**0.5, rel=1e-15)
    with pytest.raises(ValueError, match=r"timescale='1 epoch' is 40 samples, less than an update of 48"):
        scheduler.batch_size = 48
    assert scheduler.batch_size == 4
    with pytest.raises(ValueError, match=r"timescale='1 epoch' is 40 samples, less than an update of 48"):
        scheduler.batch_size = {0: 8, "2 epochs": 48}
    scheduler.batch_size = {0: 8, "2 epochs": 16}
    scheduler.go_to(samples=80)
    assert optimizer._decays["ema"] == pytest.approx(one**2, rel=1e-15)


# ---------------------------------------------------------------- checkpoints


def trained(averages: dict[str, Any], updates: int = 3) -> tuple[nn.Module, DistAdamW, CyclicLRWithRestarts]:
    model = network()
    optimizer = DistAdamW(model.parameters(), averages=averages)
    scheduler = CyclicLRWithRestarts(optimizer, 8, 40)
    for k in range(updates):
        update(model, optimizer, k)
        scheduler.step()
    return model, optimizer, scheduler


def test_a_checkpoint_with_other_averages_is_refused_unless_new(tmp_path: Path) -> None:
    model, optimizer, scheduler = trained({"ema": EMA(decay=0.9), "old": Mean(every="1 update")})
    dist_adamw.save(tmp_path, model, optimizer, scheduler)
    wanted = {"ema": EMA(decay=0.9), "last": Mean(every="1 update", last=2)}
    other, theirs, schedule = trained(wanted, 1)
    with pytest.raises(
        CheckpointError,
        match=r"averages of the weights: ema: EMA\(decay=0.9\), old: .* keeps: ema: .*, last: Mean\(.*last=2\)",
    ):
        dist_adamw.load(tmp_path, other, theirs, schedule)
    dist_adamw.load(tmp_path, other, theirs, schedule, on_difference="new")
    assert theirs.contributions("ema") == 3
    assert same(shown(other, theirs, "ema"), shown(model, optimizer, "ema"))
    with pytest.raises(RuntimeError, match=r"the average 'last' has had no weights added yet"):
        shown(other, theirs, "last")
    update(other, theirs, 9)
    schedule.step()
    assert same(shown(other, theirs, "last"), weights(other))
    adamw = torch.optim.AdamW(other.parameters())
    with pytest.raises(CheckpointError, match=r"old: Mean\(.*\); and this optimizer keeps: none"):
        dist_adamw.load(tmp_path, other, adamw, CyclicLRWithRestarts(adamw, 8, 40))


def test_an_average_is_loaded_and_exported_for_inference(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model, optimizer, scheduler = trained({"ema": EMA(decay=0.5), "last": Mean(every="1 update", last=2)})
    dist_adamw.save(tmp_path / "saved", model, optimizer, scheduler)
    fresh = network()
    (tmp_path / "folder").mkdir()
    shutil.copytree(tmp_path / "saved", tmp_path / "folder" / "dist_adamw")
    with pytest.raises(CheckpointError, match=r"written by accelerator.save_state, which has its .*folder/dist_adamw"):
        dist_adamw.load(tmp_path / "folder", fresh, average="ema")
    dist_adamw.load(tmp_path / "saved", fresh, average="ema")
    assert same(weights(fresh), shown(model, optimizer, "ema"))
    for name in ("ema", "last"):
        dist_adamw.export_checkpoint(tmp_path / "saved", tmp_path / name, "safetensors", average=name)
        found = load_file(tmp_path / name)
        assert same([found[key] for key, _ in model.named_parameters()], shown(model, optimizer, name))
    for message, act in {
        r"has 'last' as 2 tensors.*--average last": lambda: dist_adamw.load(tmp_path / "saved", fresh, average="last"),
        r"no average 'swa' of the weights; it has ema, last": lambda: dist_adamw.load(
            tmp_path / "saved", fresh, average="swa"
        ),
        r"replaces the weights, so leave optimizer": lambda: dist_adamw.load(
            tmp_path / "saved", model, optimizer, average="ema"
        ),
        r"exported as safetensors.*got 'torch'": lambda: dist_adamw.export_checkpoint(
            tmp_path / "saved", tmp_path / "x", "torch", average="ema"
        ),
    }.items():
        with pytest.raises(CheckpointError, match=message):
            act()


def test_a_load_of_an_older_checkpoint_begins_averages(tmp_path: Path) -> None:
    model, optimizer, scheduler = trained({})
    dist_adamw.save(tmp_path / "without", model, optimizer, scheduler)
    other, theirs, schedule = trained({"ema": EMA(decay=0.9)})
    dist_adamw.save(tmp_path / "with", other, theirs, schedule)
    dist_adamw.load(tmp_path / "without", other, theirs, schedule, on_difference="new")
    assert theirs.contributions("ema") == 0
    update(other, theirs, 9)
    assert same(shown(other, theirs, "ema"), weights(other))


def test_a_checkpoint_without_averages_is_what_it_was(tmp_path: Path) -> None:
    model, optimizer, scheduler = trained({})
    dist_adamw.save(tmp_path, model, optimizer, scheduler)
    assert all("averaged" not in group for group in optimizer.param_groups)
    with pytest.raises(
        CheckpointError, match=r"these averages of the weights: none; and this optimizer keeps: ema: EMA"
    ):
        dist_adamw.load(tmp_path, *trained({"ema": EMA(decay=0.9)}))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (Mean(every="1 update", last=3), Mean(every="1 update", last=2)),
        (Mean(every="1 update", last=2), Mean(every="1 update", last=3)),
        (Mean(every="1 update", last=2), Mean(every="1 update")),
        (EMA(decay=0.9), Mean(every="1 update")),
        (Mean(every="1 update"), EMA(decay=0.9)),
    ],
)
@pytest.mark.parametrize("by_state_dict", [False, True])
def test_another_kind_of_the_same_name_begins_again(
    before: Any, after: Any, by_state_dict: bool, tmp_path: Path
) -> None:
    model, optimizer, scheduler = trained({"it": before}, 4)
    dist_adamw.save(tmp_path, model, optimizer, scheduler)
    other, theirs, schedule = trained({"it": after}, 1)
    if by_state_dict:
        other.load_state_dict(model.state_dict())
        theirs.load_state_dict(optimizer.state_dict())
    else:
        with pytest.raises(CheckpointError, match="has these averages"):
            dist_adamw.load(tmp_path, other, theirs, schedule)
        dist_adamw.load(tmp_path, other, theirs, schedule, on_difference="new")
    assert theirs.contributions("it") == 0
    series = []
    for k in range(3):
        update(other, theirs, k)
        schedule.step()
        series.append(weights(other))
    expected = ema_of(series) if isinstance(after, EMA) else mean(series[-(after.last or 3) :])
    assert same(shown(other, theirs, "it"), expected)


@pytest.mark.parametrize(
    ("was", "now"),
    [(EMA(decay=0.9), EMA(decay=0.99)), (Mean(), Mean(every="1 update")), (EMA(decay=0.9), EMA(decay=0.9, every=2))],
)
def test_other_options_are_a_difference_as_other_betas_are(was: Any, now: Any, tmp_path: Path) -> None:
    model, optimizer, scheduler = trained({"it": was})
    dist_adamw.save(tmp_path, model, optimizer, scheduler)
    other, theirs, schedule = trained({"it": now}, 1)
    with pytest.raises(CheckpointError, match="has these averages"):
        dist_adamw.load(tmp_path, other, theirs, schedule)
    dist_adamw.load(tmp_path, other, theirs, schedule, on_difference="new")
    assert theirs.contributions("it") == optimizer.contributions("it")


def test_a_checkpoint_from_before_the_first_update(tmp_path: Path) -> None:
    averages = {"ema": EMA(decay=0.9), "last": Mean(every="1 update", last=2)}
    fresh = trained(averages, 0)
    dist_adamw.save(tmp_path, *fresh)
    for updates in (0, 3):
        model, optimizer, scheduler = trained(averages, updates)
        dist_adamw.load(tmp_path, model, optimizer, scheduler)
        assert optimizer.contributions("ema") == optimizer.contributions("last") == 0
        update(model, optimizer)
        scheduler.step()
        assert same(shown(model, optimizer, "ema"), weights(model))


@pytest.mark.parametrize("kind", ["torch", "dcp", "universal"])
def test_a_round_trip_through_other_formats(kind: Any, tmp_path: Path) -> None:
    averages = {"ema": EMA(decay=0.5), "last": Mean(every="1 update", last=2)}
    model, optimizer, scheduler = trained(averages)
    dist_adamw.save(tmp_path / "saved", model, optimizer, scheduler)
    dist_adamw.export_checkpoint(tmp_path / "saved", tmp_path / "theirs", kind)
    dist_adamw.import_checkpoint(tmp_path / "theirs", tmp_path / "ours", kind)
    other, theirs, _ = trained(averages, 0)
    if kind == "universal":  # DeepSpeed has no averages
        dist_adamw.load(tmp_path / "ours", other, theirs, on_difference="new")
        assert theirs.contributions("ema") == 0
        return
    dist_adamw.load(tmp_path / "ours", other, theirs)
    for name in averages:
        assert same(shown(other, theirs, name), shown(model, optimizer, name))


def test_a_state_dict_that_a_user_saved_is_imported(tmp_path: Path) -> None:
    model, optimizer, _ = trained({"ema": EMA(decay=0.5)})
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "mine.pt")
    dist_adamw.import_checkpoint(tmp_path / "mine.pt", tmp_path / "ours")
    fresh = network()
    dist_adamw.load(tmp_path / "ours", fresh, average="ema")
    assert same(weights(fresh), shown(model, optimizer, "ema"))


def test_an_optimizer_without_averages_does_not_speak_of_those_that_it_loaded(tmp_path: Path) -> None:
    _, optimizer, _ = trained({"ema": EMA(decay=0.5)})
    other, theirs, schedule = trained({}, 0)
    theirs.load_state_dict(optimizer.state_dict())
    dist_adamw.save(tmp_path, other, theirs, schedule)
    with pytest.raises(CheckpointError, match=r"no average 'ema' of the weights; it has none"):
        dist_adamw.load(tmp_path, network(), average="ema")


@pytest.mark.parametrize("text", ["{", "[]", '{"ema": 3}', '{"ema": {"count": -1, "options": "", "tensors": ["ema"]}}'])
def test_a_damaged_description(text: str, tmp_path: Path) -> None:
    model, optimizer, scheduler = trained({"ema": EMA(decay=0.5)})
    optimizer._write_counts = lambda: None  # type: ignore[method-assign]
    for group in optimizer.param_groups:
        group["averaged"] = text
    dist_adamw.save(tmp_path, model, optimizer, scheduler)
    with pytest.raises(
        CheckpointError, match=r"damaged: averaged of a parameter group is .*does not describe averages"
    ):
        dist_adamw.load(tmp_path, *trained({"ema": EMA(decay=0.5)}))


def test_torchs_adamw_does_not_save_averages_that_it_does_not_move(tmp_path: Path) -> None:
    model, optimizer, _ = trained({"ema": EMA(decay=0.5)})
    theirs = torch.optim.AdamW(model.parameters())
    theirs.load_state_dict(optimizer.state_dict())
    dist_adamw.save(tmp_path, model, theirs)
    with pytest.raises(CheckpointError, match=r"no average 'ema' of the weights; it has none"):
        dist_adamw.load(tmp_path, network(), average="ema")


@pytest.mark.parametrize("updates", [0, 4])
def test_a_range_test_leaves_averages_as_they_were(updates: int) -> None:
    averages = {"ema": EMA(decay=0.9), "last": Mean(every="1 update", last=2)}
    runs = [trained(averages, updates) for _ in range(2)]
    model, optimizer, scheduler = runs[0]
    optimizer.state_dict()  # which writes counts into the groups
    for run in runs:
        update(run[0], run[1], 8)
        run[2].step()
    with dist_adamw.lr_range(model, optimizer, scheduler=scheduler, updates=20) as test:
        for k in range(20):
            update(model, optimizer, k)
            scheduler.step()
            if test.record(model(torch.ones(1, 5)).square().mean().detach()):
                break
    for run in runs:
        update(run[0], run[1], 9)
        run[2].step()
        assert run[1].contributions("ema") == run[1].contributions("last") == updates + 2
    for name in averages:
        assert same(shown(model, optimizer, name), shown(runs[1][0], runs[1][1], name))


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"ema": 0.999}, r"the average 'ema' must be an EMA or a Mean of dist_adamw, got 0.999"),
        ([EMA(decay=0.9)], r"averages must be a dict such as .*, got \["),
        ({"exp_avg": EMA(decay=0.9)}, r"not one of .*exp_avg.*, got 'exp_avg'"),
        ({"my ema": EMA(decay=0.9)}, r"must be a word.*, got 'my ema'"),
        ({"a.b": EMA(decay=0.9)}, r"must be a word.*, got 'a.b'"),
        ({"a": Mean(last=2), "a_1": EMA(decay=0.9)}, r"the averages 'a' and 'a_1' both have 'a_1' in state"),
        (
            {"ema": {"decay": 0.9, "warmup": 3}},
            r"the average 'ema' has no option 'warmup'. Options are decay, timescale, every, dtype of an EMA; every",
        ),
        ({"m": {"every": "1 fortnight"}}, r"unknown unit"),
    ],
)
def test_wrong_averages(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DistAdamW(network().parameters(), averages=given)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EMA(), r"EMA needs decay or timescale, and not both"),
        (lambda: EMA(decay=0.9, timescale=100), r"EMA needs decay or timescale, and not both"),
        (lambda: EMA(decay=1.0), r"decay must be above 0 and below 1, got 1.0"),
        (lambda: EMA(decay=float("nan")), r"decay must be above 0 and below 1, got nan"),
        (lambda: EMA(decay="0.9"), r"decay must be above 0 and below 1, got '0.9'"),  # type: ignore[arg-type]
        (lambda: EMA(timescale=0), r"timescale must be a finite number above 0, got 0"),
        (lambda: EMA(timescale="3 moons"), r"timescale='3 moons' has an unknown unit"),
        (lambda: EMA(decay=0.9, dtype=torch.float16), r"dtype of an average must be .*, got torch.float16"),
        (lambda: EMA(decay=0.9, every=0), r"EMA's every must be a whole number above 0, got 0"),
        (lambda: Mean(every=0), r"every must be a finite number above 0, got 0"),
        (lambda: Mean(last=0), r"last must be a whole number above 0, got 0"),
        (lambda: Mean(start=-3), r"start must be a finite number above 0, got -3"),
    ],
)
def test_wrong_arguments(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_an_ema_in_bf16_that_would_stand_still_warns() -> None:
    with pytest.warns(UserWarning, match=r"decay=0.999.*bfloat16\) stands still: a move by 0.001"):
        EMA(decay=0.999, dtype=torch.bfloat16)
    EMA(decay=0.999, every=20, dtype=torch.bfloat16)  # moves by 0.02
    assert check_averages({"ema": {"decay": 0.9, "dtype": "bfloat16"}})["ema"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("average", "message"),
    [
        (Mean(every="50%"), r"every='50%' cannot be a share of a cycle"),
        (Mean(every="1 epoch", start="1 cycle"), r"start='1 cycle' cannot be a share of a cycle"),
        (Mean(every="1e6 tokens", start="5 epochs"), r"every='1e6 tokens' is in tokens: pass tokens_per_sample"),
        (EMA(timescale="1 cycle"), r"timescale='1 cycle' cannot be a share of a cycle"),
    ],
)
def test_a_length_that_the_schedule_cannot_convert_is_refused_when_it_is_made(average: Any, message: str) -> None:
    optimizer = DistAdamW(network().parameters(), averages={"it": average})
    with pytest.raises(ValueError, match=message):
        CyclicLRWithRestarts(optimizer, 8, 40)


def test_a_start_of_zero_may_have_a_unit() -> None:
    assert scheduled({"it": Mean(every="2 updates", start="0 epochs")}, 4)[1].contributions("it") == 2


def test_an_average_before_there_is_one() -> None:
    model = network()
    averages = {"ema": EMA(decay=0.9), "ends": Mean(), "swa": Mean(every="1 epoch", start=80), "mine": Mean(every=None)}
    optimizer = DistAdamW(model.parameters(), averages=averages)
    for name, message in {
        "ema": r"'ema' has had no weights added yet: the first update begins it",
        "ends": r"'ends' .*begins it at the end of the first cycle\.",
        "swa": r"'swa' .*begins it at '1 epoch', not before start=80\.",
        "mine": r"'mine' .*optimizer.add_to_average\('mine'\) begins it\.",
    }.items():
        with pytest.raises(RuntimeError, match=message):
            shown(model, optimizer, name)
    with pytest.raises(RuntimeError, match=r"add_to_average\('mine'\) needs an update before it"):
        optimizer.add_to_average("mine")
    with pytest.raises(ValueError, match=r"keeps no average 'emma'. It keeps ema, ends, swa, mine"):
        shown(model, optimizer, "emma")
    with pytest.raises(ValueError, match=r"keeps no average 'ema'. It keeps none: name them"):
        shown(model, DistAdamW(model.parameters()), "ema")
    with pytest.raises(ValueError, match=r"'ema' is an EMA, which every update moves"):
        optimizer.add_to_average("ema")
    with pytest.raises(TypeError):
        optimizer.averages["late"] = EMA(decay=0.9)  # type: ignore[index]
    with pytest.raises(AttributeError, match="chosen when the optimizer is created"):
        optimizer.averages = {"late": EMA(decay=0.9)}


def test_what_a_cuda_graph_cannot_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    first = DistAdamW(model.parameters(), averages={"ema": EMA(decay=0.9)})
    seldom = DistAdamW(model.parameters(), averages={"ema": EMA(decay=0.9, every=2)})
    update(model, seldom)
    for name in ("averaged_optimizer", "outcome"):
        monkeypatch.setattr(f"dist_adamw.optimizer.{name}.is_capturing", lambda: True)
    for optimizer in (first, seldom):
        with pytest.raises(RuntimeError, match=r"a CUDA graph repeats one update, and the average 'ema' needs"):
            update(model, optimizer)
    assert seldom._outcome.number == 2  # the captured update is the second, although it is not counted


def test_a_time_scale_without_a_schedule() -> None:
    model = network()
    optimizer = DistAdamW(model.parameters(), averages={"ema": EMA(timescale="1 epoch")})
    before = weights(model)
    with pytest.raises(RuntimeError, match=r"a time scale needs a CyclicLRWithRestarts"):
        update(model, optimizer)
    assert same(weights(model), before)


@pytest.mark.parametrize(
    "act",
    [
        lambda m, o: o.step(),
        lambda m, o: o.state_dict(),
        lambda m, o: o.load_state_dict({}),
        lambda m, o: copy.deepcopy(o),
        lambda m, o: o.averaged("ema").__enter__(),
        lambda m, o: o.add_to_average("mean"),
        lambda m, o: o.consolidate_state_dict(),
    ],
)
def test_what_needs_the_weights_is_refused_inside(act: Callable[[nn.Module, Any], object]) -> None:
    model = network()
    optimizer = DistAdamW(model.parameters(), averages=ALL)
    for k in range(2):
        update(model, optimizer, k)
    before, state = weights(model), copy.deepcopy(optimizer.state_dict())
    with optimizer.averaged("ema"), pytest.raises(RuntimeError, match=r"inside `with optimizer.averaged\('ema'\)`"):
        act(model, optimizer)
    assert same(weights(model), before)
    for entry, other in zip(state["state"].values(), optimizer.state_dict()["state"].values(), strict=True):
        assert all(torch.equal(entry[name], other[name]) for name in entry)


def test_saving_is_refused_inside_but_not_the_weights_alone(tmp_path: Path) -> None:
    model, optimizer, scheduler = trained({"ema": EMA(decay=0.9)})
    with optimizer.averaged("ema"):
        with pytest.raises(RuntimeError, match=r"saving the optimizer inside"):
            dist_adamw.save(tmp_path / "all", model, optimizer, scheduler)
        dist_adamw.save(tmp_path / "weights", model)
    other = network()
    dist_adamw.load(tmp_path / "weights", other)
    assert same(weights(other), shown(model, optimizer, "ema"))


def test_setting_the_state_of_an_optimizer_in_use_keeps_its_averages() -> None:
    model, undisturbed = network(), network()
    optimizer, other = (DistAdamW(one.parameters(), averages={"ema": EMA(decay=0.9)}) for one in (model, undisturbed))
    for seed in range(4):
        update(model, optimizer, seed)
        update(undisturbed, other, seed)
        optimizer.__setstate__(optimizer.__getstate__())
    assert same(shown(model, optimizer, "ema"), shown(undisturbed, other, "ema"))
    with pytest.raises(AttributeError, match="when the optimizer is created"):
        optimizer.averages = {"ema": EMA(decay=0.99)}
