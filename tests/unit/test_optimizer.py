"""DistAdamW in one process: torch.optim.AdamW's bits and its contract."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections import defaultdict
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from dist_adamw import DistAdamW
from tests.known import grad_of, to_memory_format


def network() -> nn.Sequential:
    """Odd sizes, a permuted memory format, a scalar, an empty and a frozen parameter."""
    torch.manual_seed(1)
    first = to_memory_format(nn.Conv2d(3, 5, 3), torch.channels_last)
    model = nn.Sequential(first, nn.Flatten(), nn.Linear(5 * 36, 37), nn.Linear(37, 3))
    model.scale = nn.Parameter(torch.tensor(1.0))
    model.nothing = nn.Parameter(torch.zeros(0))
    model.frozen = nn.Parameter(torch.ones(5), requires_grad=False)
    return model


def backward(model: Any, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4, 3, 8, 8, generator=generator)
    loss: Tensor = (model(x) * model.scale).square().mean() + model.nothing.sum()
    loss.backward()
    return loss


def train(model: nn.Module, optimizer: torch.optim.Optimizer, updates: int, first: int = 0) -> None:
    for step in range(first, first + updates):
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()


def assert_same_bits(a: nn.Module, b: nn.Module) -> None:
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q), name


OPTIONS = [{}, {"amsgrad": True}, {"maximize": True, "lr": 1e-4}, {"eps": 0.1}, {"weight_decay": 0.0}]


def test_state_begins_at_places_of_its_own_in_a_page() -> None:
    """A CPU takes twice as long if the low address bits agree (benchmarks.local_step)."""
    param = nn.Parameter(torch.ones(1 << 18))
    param.grad = torch.ones_like(param)
    optimizer = DistAdamW([param], amsgrad=True)
    optimizer.step()
    state = optimizer.state[param]
    places = [state[name].data_ptr() % 4096 for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")]
    assert places == [704, 1344, 1984]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kernel", ["fused", "foreach"])
@pytest.mark.parametrize("bucket_numel", [64, 1 << 23])
def test_same_bits_as_torch(options: dict[str, Any], kernel: str, bucket_numel: int) -> None:
    ours, theirs = network(), network()
    options = {"lr": 1e-2, **options}
    reference = torch.optim.AdamW(theirs.parameters(), **{**options, kernel: True})
    optimizer = DistAdamW(ours.parameters(), **options, fused=kernel == "fused", bucket_numel=bucket_numel)
    train(theirs, reference, 12)
    train(ours, optimizer, 12)
    assert_same_bits(ours, theirs)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        for key, value in reference.state.get(q, {}).items():
            assert torch.equal(optimizer.state[p][key], value)
            assert optimizer.state[p][key].stride() == value.stride()
    assert optimizer.updates == 12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_same_bits_in_other_dtypes(dtype: torch.dtype) -> None:
    params = [nn.Parameter(torch.randn(n).to(dtype)) for n in (5, 100, 1000)]
    copies = [nn.Parameter(p.detach().clone()) for p in params]
    ours, theirs = DistAdamW(params, bucket_numel=128), torch.optim.AdamW(copies, fused=True)
    for _ in range(10):
        for p, q in zip(params, copies, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        ours.step()
        theirs.step()
    assert all(torch.equal(p, q) for p, q in zip(params, copies, strict=True))


@pytest.mark.parametrize("fused", [True, False])
def test_the_papers_convention_multiplies_by_one_minus_the_decay(fused: bool) -> None:
    param = nn.Parameter(torch.full((8,), 2.0))
    optimizer = DistAdamW([param], lr=1e-3, weight_decay=0.25, decay_by="schedule", fused=fused)
    param.grad = torch.zeros_like(param)
    optimizer.step()
    assert torch.equal(param, torch.full((8,), 1.5))
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    assert torch.equal(param, torch.full((8,), 1.5))


def test_a_tensor_lr_works_in_both_conventions() -> None:
    conventions: list[Literal["lr", "schedule"]] = ["lr", "schedule"]
    for decay_by in conventions:
        params = [nn.Parameter(torch.ones(40)) for _ in range(2)]
        lrs: list[float | Tensor] = [0.01, torch.tensor(0.01, dtype=torch.float64)]
        for param, lr in zip(params, lrs, strict=True):
            optimizer = DistAdamW([param], lr=lr, weight_decay=0.1, decay_by=decay_by)
            for _ in range(3):
                param.grad = torch.full_like(param, 0.5)
                optimizer.step()
        torch.testing.assert_close(params[0], params[1], rtol=1e-6, atol=0)


@pytest.mark.parametrize("max_norm", [0.01, 1e9, math.inf])
@pytest.mark.parametrize("fused", [True, False])
def test_clipping_is_by_the_global_norm_and_leaves_the_gradients_alone(max_norm: float, fused: bool) -> None:
    ours, theirs = network(), network()
    optimizer = DistAdamW(ours.parameters(), lr=1e-2, eps=0.1, max_grad_norm=max_norm, fused=fused, bucket_numel=64)
    reference = torch.optim.AdamW(theirs.parameters(), lr=1e-2, eps=0.1)
    assert optimizer.grad_norm is None
    for step in range(5):
        backward(ours, step)
        backward(theirs, step)
        grads = {p: p.grad.clone() for p in ours.parameters() if p.grad is not None}
        norm = nn.utils.clip_grad_norm_(theirs.parameters(), max_norm)
        optimizer.step()
        reference.step()
        # The norm is summed piece by piece, so it may round differently from torch's.
        assert optimizer.grad_norm is not None
        torch.testing.assert_close(optimizer.grad_norm, norm, rtol=1e-6, atol=0)
        assert all(torch.equal(p.grad, grad) for p, grad in grads.items())
        optimizer.zero_grad()
        reference.zero_grad()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_norm_that_is_not_finite_skips_the_update(fused: bool, bad: float) -> None:
    model = network()
    optimizer = DistAdamW(model.parameters(), max_grad_norm=1.0, fused=fused)
    train(model, optimizer, 2)
    before = copy.deepcopy(optimizer.state_dict())
    weights = [p.detach().clone() for p in model.parameters()]
    backward(model, 9)
    grad_of(model.get_parameter("scale")).fill_(bad)
    optimizer.step()
    assert optimizer.step_was_skipped
    assert optimizer.updates == 2
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    after = optimizer.state_dict()
    for i, state in before["state"].items():
        assert all(torch.equal(value, after["state"][i][key]) for key, value in state.items())
    optimizer.zero_grad()
    train(model, optimizer, 1)
    assert not optimizer.step_was_skipped
    assert optimizer.updates == 3


def test_state_dicts_go_to_torch_and_back() -> None:
    ours, theirs = network(), network()
    optimizer = DistAdamW(ours.parameters(), lr=1e-2)
    reference = torch.optim.AdamW(theirs.parameters(), lr=1e-2, fused=True)
    train(ours, optimizer, 3)
    train(theirs, reference, 3)
    into_ours = DistAdamW(theirs.parameters(), lr=1.0)
    into_torch = torch.optim.AdamW(ours.parameters(), lr=1.0, fused=True)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    into_torch.load_state_dict(torch.load(file, weights_only=True))
    into_torch.param_groups[0]["fused"] = True  # torch takes it from the loaded group, and ours has none
    into_ours.load_state_dict(reference.state_dict())
    assert into_ours.updates == 3
    train(theirs, into_ours, 3, first=3)
    train(ours, into_torch, 3, first=3)
    assert_same_bits(ours, theirs)
    assert into_ours.updates == 6


def test_pickling_and_copying_keep_everything() -> None:
    model = network()
    optimizer = DistAdamW(model.parameters(), lr=1e-2, max_grad_norm=0.5, decay_by="schedule", bucket_numel=64)
    train(model, optimizer, 3)
    model2, optimizer2 = pickle.loads(pickle.dumps((model, optimizer)))
    model3, optimizer3 = copy.deepcopy((model, optimizer))
    for m, o in ((model, optimizer), (model2, optimizer2), (model3, optimizer3)):
        train(m, o, 3, first=3)
        assert (o.max_grad_norm, o.decay_by, o.updates) == (0.5, "schedule", 6)
    assert_same_bits(model, model2)
    assert_same_bits(model, model3)


def test_hooks_closures_and_zero_grad_work_as_in_torch() -> None:
    model = network()
    optimizer = DistAdamW(model.parameters())
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))

    def closure() -> float:
        optimizer.zero_grad()
        calls.append("closure")
        return backward(model, 0).item()

    assert isinstance(optimizer.step(closure), float)
    assert calls == ["before", "closure", "after"]
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_a_step_without_gradients_is_not_an_update() -> None:
    model = network()
    optimizer = DistAdamW(model.parameters(), max_grad_norm=1.0)
    optimizer.step()
    assert optimizer.updates == 0


def test_groups_added_and_parameters_unfrozen_after_the_first_update() -> None:
    ours, theirs = network(), network()
    optimizer = DistAdamW([*ours[2].parameters(), ours.get_parameter("frozen")], lr=1e-2)
    unfrozen = [*theirs[2].parameters(), theirs.get_parameter("frozen")]
    reference = torch.optim.AdamW(unfrozen, lr=1e-2, fused=True)
    for model, opt in ((ours, optimizer), (theirs, reference)):
        train(model, opt, 2)
        opt.add_param_group({"params": list(model[3].parameters()), "lr": 1e-3})
        train(model, opt, 2, first=2)
        model.frozen.requires_grad_(True)
        for step in range(4, 7):
            backward(model, step)
            model.frozen.grad = torch.full((5,), 0.3)
            opt.step()
            opt.zero_grad()
    assert_same_bits(ours, theirs)
    assert optimizer.state[ours.get_parameter("frozen")]["step"] == 3


def test_parameters_without_a_gradient_this_time_keep_their_step() -> None:
    ours, theirs = network(), network()
    optimizer = DistAdamW(ours.parameters(), lr=1e-2)
    reference = torch.optim.AdamW(theirs.parameters(), lr=1e-2, fused=True)
    for model, opt in ((ours, optimizer), (theirs, reference)):
        for step in range(6):
            backward(model, step)
            if step % 2:
                model.get_parameter("2.weight").grad = None
            opt.step()
            opt.zero_grad()
    assert_same_bits(ours, theirs)


def test_storage_that_was_replaced_is_followed() -> None:
    ours, theirs = network(), network()
    optimizer = DistAdamW(ours.parameters(), lr=1e-2)
    reference = torch.optim.AdamW(theirs.parameters(), lr=1e-2, fused=True)
    for model, opt in ((ours, optimizer), (theirs, reference)):
        train(model, opt, 2)
        for p in model.parameters():
            p.data = p.data.clone()
        train(model, opt, 2, first=2)
    assert_same_bits(ours, theirs)


def test_parameters_keep_their_own_storage() -> None:
    model = network()
    optimizer = DistAdamW(model.parameters())
    before = [p.data_ptr() for p in model.parameters()]
    train(model, optimizer, 2)
    assert [p.data_ptr() for p in model.parameters()] == before
    storages = {p.untyped_storage().data_ptr() for p in model.parameters() if p.numel()}
    assert len(storages) == sum(p.numel() > 0 for p in model.parameters())


def test_tied_parameters_are_one() -> None:
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False))
    model[1].weight = model[0].weight
    optimizer = DistAdamW(model.parameters(), lr=1e-2)
    for _ in range(3):
        model(torch.randn(2, 6)).square().mean().backward()
        optimizer.step()
    assert optimizer.state[model.get_parameter("0.weight")]["step"] == 3


def test_sparse_gradients_are_refused_before_anything_changes() -> None:
    dense = nn.Parameter(torch.ones(3))
    table = nn.Embedding(4, 2, sparse=True)
    optimizer = DistAdamW([dense, *table.parameters()])
    dense.grad = torch.ones(3)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match=r"sparse gradients.*sparse=False"):
        optimizer.step()
    assert torch.equal(dense, torch.ones(3))
    assert optimizer.updates == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "Invalid learning rate: -1.0"),
        ({"lr": math.nan}, "Invalid learning rate: nan"),
        ({"lr": math.inf}, "Invalid learning rate: inf"),
        ({"eps": -1e-8}, "Invalid epsilon value: -1e-08"),
        ({"eps": math.nan}, "Invalid epsilon value: nan"),
        ({"betas": (1.0, 0.9)}, "Invalid beta parameter at index 0: 1.0"),
        ({"betas": (0.9, math.nan)}, "Invalid beta parameter at index 1: nan"),
        ({"betas": (0.9,)}, r"betas .*two numbers.* \(0\.9,"),
        ({"betas": (0.9, 0.95, 0.999)}, r"betas .*two numbers.* \(0\.9, 0\.95, 0\.999\)"),
        ({"betas": "", "state_dtype": torch.bfloat16}, "betas .*two numbers.* ''"),
        ({"betas": 0.9}, r"betas .*two numbers.* 0\.9"),
        ({"weight_decay": -0.1}, "Invalid weight_decay value: -0.1"),
        ({"weight_decay": math.nan}, "Invalid weight_decay value: nan"),
        ({"decay_by": "wd"}, "decay_by .*'wd'"),
        ({"max_grad_norm": 0.0}, r"max_grad_norm .*above 0.* 0\.0"),
        ({"max_grad_norm": math.nan}, "max_grad_norm .*above 0.* nan"),
        ({"shard": "yes"}, "shard .*'yes'"),
        ({"bucket_numel": 0}, "bucket_numel .*above 0.*got 0"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DistAdamW([nn.Parameter(torch.ones(1))], **options)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("betas", 0.5, r"betas must be two numbers, got 0\.5"),
        ("betas", (0.9, "0.99"), r"betas must be two numbers, got \(0\.9, '0\.99'\)"),
        ("lr", "1e-3", "lr must be a number, got '1e-3'"),
        ("weight_decay", None, "weight_decay must be a number, got None"),
    ],
)
def test_bad_values_in_a_group_before_anything_changes(name: str, value: Any, message: str) -> None:
    param = nn.Parameter(torch.ones(3))
    optimizer = DistAdamW([param])
    before, optimizer.param_groups[0][name] = optimizer.param_groups[0][name], value
    param.grad = torch.ones(3)
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert torch.equal(param, torch.ones(3))
    optimizer.param_groups[0][name] = list(before) if name == "betas" else before
    optimizer.step()
    assert optimizer.updates == 1


def test_an_empty_parameter_list_and_a_group_out_of_range() -> None:
    with pytest.raises(ValueError, match="empty parameter list"):
        DistAdamW([])
    with pytest.raises(ValueError, match="Invalid learning rate: nan"):
        DistAdamW([{"params": [nn.Parameter(torch.ones(1))], "lr": math.nan}])


def test_parameters_that_cannot_be_laid_out_are_refused() -> None:
    with pytest.raises(ValueError, match=r"complex parameters, got torch\.complex64"):
        DistAdamW([nn.Parameter(torch.ones(2, dtype=torch.complex64))])


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_a_parameter_that_is_twice_in_a_group_is_refused() -> None:
    tied, other = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    optimizer = DistAdamW([other])
    with pytest.raises(ValueError, match=r"parameter 0 of group 1 and parameter 2 of group 1 .*same"):
        optimizer.add_param_group({"params": [tied, nn.Parameter(torch.ones(1)), tied]})
    assert len(optimizer.param_groups) == 1

    for memory in (torch.ones(4, 4)[:, ::2], torch.ones(3).expand(2, 3)):
        with pytest.raises(ValueError, match="overlap or leave gaps"):
            DistAdamW([nn.Parameter(memory)])
    optimizer = DistAdamW([nn.Parameter(torch.ones(1))])
    with pytest.raises(ValueError, match="overlap or leave gaps"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(4, 4)[:, ::2])]})
    assert len(optimizer.param_groups) == 1
    DistAdamW([nn.Parameter(torch.ones(4, 4).t()), *nn.LazyLinear(3).parameters()])  # dense, and not there yet


@pytest.mark.parametrize("late", [False, True])
def test_hyper_parameters_that_torch_refuses_are_refused_before_anything_changes(late: bool) -> None:
    param = nn.Parameter(torch.ones(3))
    tensors: Any = (torch.tensor(0.9), torch.tensor(0.999))
    cases: list[tuple[dict[str, Any], str]] = [
        ({"betas": (0.9, torch.tensor(0.999))}, "both floats or both Tensors"),
        ({"betas": (torch.tensor([0.9, 0.8]), torch.tensor(0.999))}, r"Tensor betas\[0\] must be 1-element"),
        ({"lr": torch.tensor(0.1)}, "lr as a Tensor .*foreach"),
    ]
    for wrong, message in cases:
        params: list[Any] = [{"params": [param], **wrong}] if late else [param]
        with pytest.raises(ValueError, match=message):
            DistAdamW(params, fused=False, **({} if late else wrong))
    optimizer = DistAdamW([param], betas=tensors, fused=False)
    assert optimizer.param_groups[0]["betas"] == tuple(map(float, tensors))
    param.grad = torch.ones(3)
    optimizer.param_groups[0]["lr"] = torch.tensor(0.1)
    with pytest.raises(ValueError, match="lr as a Tensor"):
        optimizer.step()
    assert optimizer.updates == 0
    assert torch.equal(param, torch.ones(3))


def test_a_state_of_another_model_is_refused_and_nothing_is_lost() -> None:
    model = network()
    optimizer = DistAdamW(model.parameters(), lr=1e-2)
    train(model, optimizer, 2)
    other = nn.ParameterList([nn.Parameter(p.detach().clone().reshape(-1)) for p in model.parameters()])
    theirs = torch.optim.AdamW(other.parameters())
    sum(p.sum() for p in other).backward()
    theirs.step()
    with pytest.raises(ValueError, match=r"exp_avg of parameter 0 .*\(1,\).* \(\)"):
        optimizer.load_state_dict(theirs.state_dict())
    with pytest.raises(ValueError, match=r"different number of parameter groups|doesn't match the size"):
        optimizer.load_state_dict(torch.optim.AdamW(model[2].parameters()).state_dict())
    assert optimizer.updates == 2
    twin = network()
    reference = torch.optim.AdamW(twin.parameters(), lr=1e-2, fused=True)
    train(twin, reference, 4)
    train(model, optimizer, 2, first=2)
    assert_same_bits(model, twin)


def test_shard_true_without_ranks_is_an_error() -> None:
    model = network()
    optimizer = DistAdamW(model.parameters(), shard=True)
    with pytest.raises(RuntimeError, match=r"shard=True.*one rank"):
        train(model, optimizer, 1)


def test_repr_says_what_was_decided() -> None:
    model = network()
    optimizer = DistAdamW(model.parameters())
    assert "layout not built" in repr(optimizer)
    train(model, optimizer, 1)
    assert "shard: auto (state whole" in repr(optimizer)


def test_bf16_autocast_trains() -> None:
    ours, theirs = network(), network()
    optimizer = DistAdamW(ours.parameters(), lr=1e-2)
    reference = torch.optim.AdamW(theirs.parameters(), lr=1e-2, fused=True)
    for model, opt in ((ours, optimizer), (theirs, reference)):
        for step in range(3):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                backward(model, step)
            opt.step()
            opt.zero_grad()
    assert_same_bits(ours, theirs)


def test_fp64_parameters_are_clipped_too() -> None:
    params = [nn.Parameter(torch.ones(3, dtype=d)) for d in (torch.float64, torch.float32)]
    optimizer = DistAdamW(params, max_grad_norm=1.0)
    for p in params:
        p.grad = torch.full_like(p, 2.0)
    optimizer.step()
    assert optimizer.grad_norm == pytest.approx(math.sqrt(6 * 4))


def test_state_moves_with_its_parameters() -> None:
    model = network()
    optimizer = DistAdamW(model.parameters(), lr=1e-2)
    train(model, optimizer, 2)
    model.double()
    before = optimizer.state_dict()["state"][3]["exp_avg"].clone()
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(4, 3, 8, 8, generator=generator, dtype=torch.float64)
    (model(x) * model.scale).square().mean().backward()
    optimizer.step()
    after = optimizer.state_dict()["state"][3]["exp_avg"]
    assert after.dtype == torch.float64
    assert not torch.equal(before.double(), after)


def test_resetting_the_state_resets_it() -> None:
    """Some scripts do this at a warm restart."""
    model = network()
    optimizer = DistAdamW(model.parameters(), lr=1e-2)
    train(model, optimizer, 3)
    optimizer.state = defaultdict(dict)
    train(model, optimizer, 1)
    assert {int(state["step"]) for state in optimizer.state.values()} == {1}


def test_a_group_that_is_gone_leaves_the_others_alone() -> None:
    params = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = DistAdamW([{"params": [params[0]], "lr": 1.0}, {"params": [params[1]], "lr": 0.5}], weight_decay=0.0)
    for p in params:
        p.grad = torch.ones(3)
    optimizer.step()
    del optimizer.param_groups[0]
    optimizer.step()
    assert torch.allclose(params[1], torch.zeros(3), atol=1e-6)


def test_groups_that_were_replaced_are_followed() -> None:
    model = network()
    optimizer = DistAdamW(model.parameters())
    train(model, optimizer, 1)
    optimizer.param_groups = [{**group, "lr": 0.0} for group in optimizer.param_groups]
    before = copy.deepcopy(model.state_dict())
    train(model, optimizer, 1, first=1)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_amsgrad_cannot_be_changed_in_silence() -> None:
    model = network()
    optimizer = DistAdamW(model.parameters())
    train(model, optimizer, 1)
    optimizer.param_groups[0]["amsgrad"] = True
    with pytest.raises(RuntimeError, match="amsgrad cannot be changed"):
        train(model, optimizer, 1)


def test_loaded_state_is_there_before_the_next_update() -> None:
    model = network()
    optimizer = DistAdamW(model.parameters(), lr=1e-2)
    train(model, optimizer, 2)
    first = optimizer.state_dict()
    again = DistAdamW(model.parameters())
    again.load_state_dict(first)
    third = DistAdamW(model.parameters())
    third.load_state_dict(again.state_dict())
    assert third.state_dict()["state"].keys() == first["state"].keys()
    for i, state in first["state"].items():
        assert all(torch.equal(value, third.state_dict()["state"][i][key]) for key, value in state.items())
    assert third.state_bytes == optimizer.state_bytes
