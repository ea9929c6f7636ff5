"""The same bits under FSDP2 on any number of ranks as in one process without it."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from dist_adamw import DistAdamW
from dist_adamw.optimizer.clipping import global_norm, squares_on_this_rank
from dist_adamw.optimizer.kernels.exact_squares import digits_of_squares, value_of
from dist_adamw.optimizer.sharding.cut_blocks import CutBlocks
from tests.distributed.test_reproducible import CASES, UPDATES, K, Model, digest, in_one_process, loss_of
from tests.ranks import run_ranks


def sharded(wrapping: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """Return the model of `test_reproducible`; its layers have rows that no number of ranks divides."""
    model: Any = Model(dtype)
    if wrapping == "checkpointed inside":
        model.layers[3] = fully_shard(checkpoint_wrapper(model.layers[3]), **options)
    elif wrapping == "checkpointed outside":
        fully_shard(model.layers[3], **options)
        model.layers[3] = checkpoint_wrapper(model.layers[3])
    elif wrapping == "layers":
        for layer in (model.embedding, *model.layers):
            if next(layer.parameters(), None) is not None:
                fully_shard(layer, **options)
    fully_shard(model, **options)
    return model


def whole(model: nn.Module) -> nn.Module:
    """Return a copy of ``model`` that is not sharded."""
    first = next(model.parameters())
    copy = Model(first.dtype)
    for ours, theirs in zip(copy.parameters(), model.parameters(), strict=True):
        full: Any = theirs.detach()
        ours.data = full.full_tensor()
    return copy


def train(wrapping: str, options: dict[str, Any], dtype: torch.dtype = torch.float32, **more: Any) -> list[str]:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    model = sharded(wrapping, dtype, **more)
    optimizer = DistAdamW(model.parameters(), 1e-2, weight_decay=0.1, **options)
    optimizer.attach(model)
    digests = []
    for update in range(UPDATES):
        for j in range(K // ranks):
            loss_of(model, update, j * ranks + rank).backward()
        optimizer.step()
        optimizer.zero_grad()
        digests.append(digest(whole(model)))
    return digests


@pytest.mark.parametrize("wrapping", ["root", "layers"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6, 8])
def test_one_digest_for_every_number_of_ranks(ranks: int, case: str, wrapping: str) -> None:
    options, dtype = CASES[case]
    assert run_ranks(ranks, train, wrapping, options, dtype) == [in_one_process(options, dtype)] * ranks


def norms(is_sharded: bool, dtype: torch.dtype, max_norm: float) -> list[str]:
    """Return the norms of two updates of 24 micro-batches, and a digest of the weights."""
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if is_sharded else (0, 1)
    model = sharded("layers", dtype) if is_sharded else Model(dtype)
    options: dict[str, Any] = {"master_dtype": torch.float32} if dtype == torch.bfloat16 else {}
    optimizer = DistAdamW(model.parameters(), 1e-2, eps=0.1, max_grad_norm=max_norm, reproducible=True, **options)
    optimizer.attach(model)
    found = []
    for update in range(2):
        for j in range(K // ranks):
            loss_of(model, update, j * ranks + rank).backward()
        optimizer.step()
        optimizer.zero_grad()
        norm = optimizer.grad_norm
        assert norm is not None
        found.append(float(norm).hex())
        assert norm > max_norm
    return [*found, digest(whole(model) if is_sharded else model)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_every_bit_of_the_norm(ranks: int, dtype: torch.dtype) -> None:
    """The norm exceeds the limit, and a large eps lets its bits reach the weights."""
    assert run_ranks(ranks, norms, True, dtype, 0.01) == run_ranks(1, norms, False, dtype, 0.01) * ranks


def sum_over_ranks(runs: list[Tensor]) -> Tensor:
    digits = digits_of_squares(runs, torch.device("cpu"))
    dist.all_reduce(digits)
    return value_of(digits)


def check_digits() -> bool:
    """Compare sums of squares of gradients; return whether sums within blocks of the local shards are others."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    generator = torch.Generator().manual_seed(5)
    whole_grads, params, differs = [], [], False
    for rows in (1, 2, 7, 20, 50, 97, 333):
        for columns in (1, 5, 13, 32):
            scales = 2.0 ** torch.randint(-8, 9, (rows, columns), generator=generator)
            whole_grads.append((torch.randn(rows, columns, generator=generator) * scales).flatten())
            params.append(nn.Parameter(distribute_tensor(torch.zeros(rows, columns), mesh, [Shard(0)])))
            grad: Any = distribute_tensor(whole_grads[-1].view(rows, columns), mesh, [Shard(0)])
            params[-1].grad = grad
            expected = value_of(digits_of_squares(whole_grads[-1:], torch.device("cpu")))
            assert torch.equal(sum_over_ranks(CutBlocks(params[-1:]).gradients()), expected)
            differs |= not torch.equal(sum_over_ranks([grad.to_local().flatten()]), expected)
    params[3].grad = params[9].grad = None  # as on every rank
    fewer = [grad for i, grad in enumerate(whole_grads) if i not in (3, 9)]
    expected = value_of(digits_of_squares(fewer, torch.device("cpu")))
    assert torch.equal(sum_over_ranks(CutBlocks(params).gradients()), expected)
    return differs


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 8])
def test_sums_of_squares_of_cut_blocks(ranks: int) -> None:
    assert run_ranks(ranks, check_digits) == [ranks > 1] * ranks


class Weighted(nn.Module):
    """A loss whose gradient is the input."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(rows, 5))

    def forward(self, x: Tensor) -> Tensor:
        return (self.weight * x).sum()


def check_norms_of_few_elements() -> None:
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(20, 5, generator=generator) * 2.0 ** torch.randint(-8, 9, (20, 5), generator=generator)
        model: Any = fully_shard(Weighted(20))
        optimizer = DistAdamW(model.parameters(), max_grad_norm=float("inf"), reproducible=True)
        optimizer.attach(model)
        model(x).backward()
        optimizer.step()
        shards = optimizer.shards
        squares = squares_on_this_rank(shards, [shard.gradients.owned() for shard in shards], reproducible=True)
        norm = global_norm(squares, optimizer._ranks, reproducible=True)  # `grad_norm` is rounded to fp32
        assert torch.equal(norm, value_of(digits_of_squares([x.flatten()], torch.device("cpu"))).sqrt())


def test_norms_of_few_elements() -> None:
    run_ranks(2, check_norms_of_few_elements)  # the mean of two equal gradients is exact


class Raising(torch.autograd.Function):
    """The identity, whose gradient cannot be computed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise ZeroDivisionError


def train_loop(
    wrapping: str,
    dtype: torch.dtype,
    events: list[str],
    passes: int,
    policy: dict[str, Any],
    reproducible: bool = True,
    max_grad_norm: float | None = 0.5,
) -> list[str]:
    """Train with ``events`` before every update; return a digest of the weights after each."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    mixed = MixedPrecisionPolicy(**policy) if policy else MixedPrecisionPolicy()
    model = sharded(wrapping, dtype, mp_policy=mixed)
    if not reproducible:  # which does this itself; without it, FSDP2's messages mismatch if ranks use other parameters
        model.set_reduce_scatter_unused_params(True)
    optimizer = DistAdamW(model.parameters(), 1e-2, max_grad_norm=max_grad_norm, reproducible=reproducible)
    optimizer.attach(model)
    digests = []
    for update in range(UPDATES):
        if "raised" in events and update == 1:
            loss_of(model, 6, rank).backward()
            handle = model.layers[2].register_forward_hook(lambda module, args, output: Raising.apply(output))
            with pytest.raises(ZeroDivisionError):
                loss_of(model, 7, 1).backward()
            handle.remove()
            with pytest.raises(RuntimeError, match="the last backward pass raised"):
                optimizer.step()
            model.reset_iter_state()
        if "discarded" in events:
            loss_of(model, 7, rank).backward()
            optimizer.zero_grad(set_to_none=update == 0)
        for j in range(passes // ranks):
            if "no sync" in events:
                model.set_requires_gradient_sync(j == passes // ranks - 1)
            if "last" in events:
                model.set_is_last_backward(j == passes // ranks - 1)
            loss_of(model, update, j * ranks + rank).backward()
        optimizer.step()
        if "not zeroed" not in events:
            optimizer.zero_grad()
        digests.append(digest(whole(model)))
    return digests


def one_digest(*args: Any, ranks: tuple[int, ...] = (1, 2, 3), **options: Any) -> bool:
    found = [one for n in ranks for one in run_ranks(n, train_loop, *args, **options)]
    assert all(len(set(digests)) == UPDATES for digests in found)
    return all(digests == found[0] for digests in found)


@pytest.mark.parametrize(
    "policy",
    [
        {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32},
        {"param_dtype": torch.bfloat16},
        {"param_dtype": torch.float16, "reduce_dtype": torch.float16},
        {"reduce_dtype": torch.float64},
    ],
)
def test_mixed_precision(policy: dict[str, Any]) -> None:
    assert one_digest("layers", torch.float32, [], 6, policy)


@pytest.mark.parametrize("events", [["discarded"], ["raised"], ["no sync"], ["last"], ["not zeroed"]])
def test_events_between_passes(events: list[str]) -> None:
    expected = run_ranks(1, train_loop, "layers", torch.float32, [], 6, {})[0]
    assert run_ranks(3, train_loop, "layers", torch.float32, events, 6, {}) == [expected] * 3


@pytest.mark.parametrize("wrapping", ["checkpointed inside", "checkpointed outside"])
def test_activation_checkpointing(wrapping: str) -> None:
    expected = run_ranks(1, train_loop, "layers", torch.float32, [], 6, {})[0]
    assert run_ranks(3, train_loop, wrapping, torch.float32, [], 6, {}) == [expected] * 3


def test_without_the_option_the_bits_depend_on_the_number_of_ranks() -> None:
    assert not one_digest("layers", torch.float32, [], 6, {}, reproducible=False, max_grad_norm=None)


class Partial(nn.Module):
    """Parameters that no micro-batch uses, only one, or only later ones, and such that have gradients of zeros."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.body, self.head = nn.Linear(5, 37), nn.Linear(37, 3)
        self.never, self.once, self.frozen = nn.Linear(3, 11), nn.Linear(37, 3), nn.Linear(37, 3)
        self.late = nn.Linear(37, 3)
        self.zero, self.unused = nn.Parameter(torch.ones(45)), nn.Parameter(torch.ones(50))
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor, number: int) -> Tensor:
        x = torch.tanh(self.body(x))
        y: Tensor = self.head(x) + self.frozen(x) + 0 * self.zero.sum()
        y = y + self.late(x) if number >= 6 else y
        return y + self.once(x) if number == 2 else y


def check_partial(is_sharded: bool) -> list[list[float]]:
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if is_sharded else (0, 1)
    model: Any = Partial()
    if is_sharded:
        for layer in (
            model.body,
            model.never,
            model.late,
        ):  # FSDP2 needs all ranks to call a module that it has wrapped
            fully_shard(layer)
        fully_shard(model)
    optimizer = DistAdamW(model.parameters(), 1e-1, weight_decay=0.3, max_grad_norm=1.0, reproducible=True)
    optimizer.attach(model)
    for update in range(2):
        for j in range(12 // ranks):
            number = j * ranks + rank
            x = torch.randn(4, 5, generator=torch.Generator().manual_seed(10 * update + number))
            model(x, number).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    values: list[list[float]] = []
    for param in model.parameters():
        full: Any = param.detach()
        values.append((full.full_tensor() if is_sharded else full).flatten().tolist())
    return values


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_parameters_that_no_rank_uses_are_not_decayed(ranks: int) -> None:
    (expected,) = run_ranks(1, check_partial, False)
    assert expected[0][0] < 1 == expected[1][0]  # `zero` is decayed, `unused` is not
    assert run_ranks(ranks, check_partial, True) == [expected] * ranks


def check_shown() -> None:
    """Between passes ``param.grad`` is the average of the micro-batches so far."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    model, plain = sharded("layers"), Model()
    model.dropout.p = plain.dropout.p = 0.0
    optimizer = DistAdamW(model.parameters(), reproducible=True)
    optimizer.attach(model)
    for j in range(3):
        for number in range(j * ranks, (j + 1) * ranks):
            loss_of(plain, 0, number).backward()
        loss_of(model, 0, j * ranks + rank).backward()
        for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
            assert theirs.grad is not None
            torch.testing.assert_close(ours.grad.full_tensor(), theirs.grad / ((j + 1) * ranks))
    next(model.parameters()).grad.mul_(2)
    with pytest.raises(RuntimeError, match="between two backward passes"):
        loss_of(model, 0, 1).backward()


def test_gradients_between_passes() -> None:
    run_ranks(2, check_shown)


def check_refusals() -> None:
    model = sharded("layers")
    optimizer = DistAdamW(model.parameters(), reproducible=True)
    loss_of(model, 0, 1).backward()
    before = digest(whole(model))
    with pytest.raises(RuntimeError, match=r"attach\(model\)"):
        optimizer.step()
    assert digest(whole(model)) == before
    assert not optimizer.state
    optimizer.zero_grad()
    optimizer.attach(model)
    optimizer.attach(model)  # no difference
    with pytest.raises(RuntimeError, match="as many micro-batches"):
        optimizer.join_backward()
    with pytest.raises(ValueError, match="a second optimizer"):
        DistAdamW(model.parameters(), reproducible=True).attach(model)
    optimizer.zero_grad()
    x = torch.ones(2, 181, requires_grad=True)
    with pytest.raises(RuntimeError, match="reached no parameter"):
        torch.autograd.grad(model.layers[3](x).sum(), x)


def check_called_twice() -> None:
    layer: Any = fully_shard(nn.Linear(6, 6))
    model: Any = fully_shard(nn.Sequential(layer, nn.Tanh(), layer))
    optimizer = DistAdamW(model.parameters(), reproducible=True)
    optimizer.attach(model)
    with pytest.raises(RuntimeError, match="twice in one backward pass"):
        model(torch.ones(3, 6)).sum().backward()


def test_a_module_that_is_called_twice_is_refused() -> None:
    run_ranks(2, check_called_twice)


def test_refusals() -> None:
    run_ranks(2, check_refusals)


def refused(how: str) -> str:
    """Return why a model that is sharded in another way cannot be attached."""
    ranks = dist.get_world_size()
    model: Any = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    options: dict[str, Any] = {}
    if how == "hsdp":
        options["mesh"] = init_device_mesh("cpu", (ranks // 2, 2), mesh_dim_names=("outer", "inner"))
    elif how == "tensor parallel":
        mesh = init_device_mesh("cpu", (ranks // 2, 2), mesh_dim_names=("outer", "inner"))
        parallelize_module(model, mesh["inner"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
        options["mesh"] = mesh["outer"]
    elif how == "tensor parallel alone":
        parallelize_module(model, init_device_mesh("cpu", (ranks,)), {"0": ColwiseParallel(), "1": RowwiseParallel()})
    elif how == "offload":
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
    elif how == "columns":
        options["shard_placement_fn"] = lambda param: Shard(param.ndim - 1)
    elif how == "ignored":
        options["ignored_params"] = {model[0].bias}
    if how == "two meshes":
        fully_shard(model[0], mesh=init_device_mesh("cpu", (ranks // 2, 2), mesh_dim_names=("a", "b"))["b"])
    if how != "tensor parallel alone":
        fully_shard(model, **options)
    if how == "hook":
        model.set_all_reduce_hook(lambda output: None)
    elif how == "factor":
        model.set_gradient_divide_factor(2.0)
    elif how == "comm":
        model.set_custom_reduce_scatter(object())
    optimizer = DistAdamW(model.parameters(), reproducible=True)
    with pytest.raises(ValueError, match="reproducible=True") as error:
        optimizer.attach(model)
    return str(error.value)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("hsdp", "several axes"),
        ("tensor parallel", "several axes"),
        ("tensor parallel alone", "0.weight is in none"),
        ("offload", "CPUOffloadPolicy"),
        ("columns", "along their first dimension"),
        ("ignored", "0.bias is in none"),
        ("two meshes", "over the same ranks"),
        ("hook", "set_all_reduce_hook"),
        ("factor", "set_gradient_divide_factor"),
        ("comm", "set_custom_reduce_scatter"),
    ],
)
def test_other_ways_of_sharding_are_refused(how: str, words: str) -> None:
    assert all(words in error for error in run_ranks(4, refused, how))


def check_end_of_the_optimizer() -> None:
    """FSDP2 reduces as before once the optimizer no longer exists."""
    rank = dist.get_rank()
    model, other = sharded("layers"), sharded("layers")
    for one in (model, other):
        one.dropout.p = 0.0
        one.set_reduce_scatter_unused_params(True)
    optimizer = DistAdamW(model.parameters(), reproducible=True)
    optimizer.attach(model)
    loss_of(model, 0, rank).backward()
    optimizer.zero_grad()
    del optimizer
    gc.collect()
    for number in (rank, 2 + rank):
        for one in (model, other):
            loss_of(one, 0, number).backward()
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours.grad.to_local(), theirs.grad.to_local())


def test_the_end_of_the_optimizer() -> None:
    run_ranks(2, check_end_of_the_optimizer)
