"""One rank acts alone: the result is torch's on the averages, or one error on every rank."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate.data_loader import DataLoaderShard
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from dist_adamw import AgreementError
from dist_adamw.integrations.accelerate import loader as loaders
from dist_adamw.integrations.accelerate import loader_iteration
from dist_adamw.optimizer.gradients import sources
from dist_adamw.optimizer.gradients.handshake import RankMessages
from tests.distributed.test_attach import WAYS, attach, average_gradients
from tests.distributed.test_whose_gradients import layers, loss_of, ours, same, theirs, wrap
from tests.ranks import expect_error_on_all, run_ranks


def check_clipped_beside_another(setting_zeros: bool) -> None:
    """A GAN's discriminator is set to zero, while the generator's gradients wait, clipped by a local norm."""
    model = wrap(layers(), gradient_as_bucket_view=False)
    first, last = ours(model.module[0].parameters()), ours(model.module[4].parameters())
    attach(first, model, aside=False)
    attach(last, model, aside=False)
    for step in range(2):
        loss_of(model, step).backward()
        nn.utils.clip_grad_norm_(model.module[0].parameters(), 1e-3)
        last.zero_grad(set_to_none=not setting_zeros)
        first.step()


@pytest.mark.parametrize("setting_zeros", [False, True])
def test_zero_grad_of_another_optimizer_hides_no_change(setting_zeros: bool) -> None:
    for error in expect_error_on_all(2, check_clipped_beside_another, setting_zeros):
        assert error.startswith("RuntimeError: gradients were changed"), error


def check_zeros_beside_another() -> None:
    """``model.zero_grad(set_to_none=False)`` and then one optimizer's: nothing of the other's was changed."""
    model = wrap(layers(), gradient_as_bucket_view=False)
    optimizers = [ours(model.module[0].parameters()), ours(model.module[4].parameters())]
    for optimizer in optimizers:
        attach(optimizer, model, aside=False)
    for step in range(3):
        loss_of(model, step).backward()
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad(set_to_none=False)
        optimizers[1].zero_grad(set_to_none=False)


def test_zeros_are_no_change_of_another_optimizers_gradients() -> None:
    run_ranks(2, check_zeros_beside_another)


def check_amsgrad(way: dict[str, Any] | None) -> None:
    model = layers()
    optimizer = ours(model.parameters())
    if way is not None:
        attach(optimizer, model, **way)
    for step in range(3):
        if step == 1 and dist.get_rank() == 0:
            optimizer.param_groups[0]["amsgrad"] = True
        loss_of(model, step).backward()
        if way is None:
            average_gradients(model)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("way", [None, WAYS["plain"]], ids=["averaged by hand", "attached"])
def test_amsgrad_set_on_one_rank_alone(way: dict[str, Any] | None) -> None:
    for error in expect_error_on_all(2, check_amsgrad, way):
        assert "amsgrad of group 0 is True on rank 0 and False on rank 1" in error, error


def check_state_before(call: str) -> None:
    """Disable announcements between ranks, as over NCCL."""
    model = wrap(layers(), gradient_as_bucket_view=False)
    optimizer = ours(model.parameters())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RankMessages, "open", lambda self, groups, tag, device: None)
        attach(optimizer, model, aside=False)
    for step in range(3):
        loss_of(model, step).backward()
        if step == 1 and dist.get_rank() == 0:
            optimizer.state[model.module[0].weight] = {}
        optimizer.clip_grad_norm_(1.0) if call == "clip" else optimizer.gather_gradients()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("call", ["clip", "gather"])
def test_state_changed_on_one_rank_alone_before_gradients_are_read(call: str) -> None:
    for error in expect_error_on_all(2, check_state_before, call):
        assert error.startswith("AgreementError: rank 1 disagrees with rank 0"), error


def check_dropped(way: dict[str, Any] | None, how: str) -> None:
    """Before update 2 rank 1 alone sets gradients to None, one of them or all."""
    bare = layers()
    model = wrap(bare) if way is None or way.get("ddp") else bare
    optimizer = ours(bare.parameters())
    if way is not None:
        attach(optimizer, model, **{key: value for key, value in way.items() if key not in ("ddp", "view")})
    for step in range(3):
        loss_of(model, step).backward()
        if step == 1 and dist.get_rank() == 1:
            for param in list(bare.parameters())[: 1 if how == "one" else None]:
                param.grad = None
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("how", ["one", "all"])
@pytest.mark.parametrize("way", ["ddp", "ddp, buckets", "plain", "plain, no overlap", ""])
def test_gradients_set_to_none_on_one_rank_alone(way: str, how: str) -> None:
    for error in expect_error_on_all(2, check_dropped, WAYS[way] if way else None, how):
        assert error.startswith("AgreementError"), error
        assert "set to None" in error or "without a gradient" in error, error


def check_dropped_by_all(way: dict[str, Any]) -> None:
    bare = layers()
    twin = wrap(copy.deepcopy(bare))
    model = wrap(bare) if way.get("ddp") else bare
    optimizer, reference = ours(bare.parameters()), theirs(twin.parameters())
    attach(optimizer, model, **{key: value for key, value in way.items() if key not in ("ddp", "view")})
    for step in range(4):
        for one, net, by in ((model, bare, optimizer), (twin, twin.module, reference)):
            by.zero_grad()
            loss_of(one, step).backward()
            if step == 1:
                net[2].weight.grad = None
            by.step()
        same(bare, twin.module, f"update {step}")


@pytest.mark.parametrize("way", ["ddp", "ddp, buckets", "plain"])
def test_gradients_set_to_none_on_all_ranks(way: str) -> None:
    run_ranks(2, check_dropped_by_all, WAYS[way])


def check_sparse(way: dict[str, Any] | None) -> None:
    torch.manual_seed(0)
    bare = nn.Embedding(50, 8, sparse=True)
    optimizer = ours(bare.parameters())
    model = wrap(bare, gradient_as_bucket_view=False) if way is None or way.get("ddp") else bare
    if way is not None:
        attach(optimizer, model)
    model(torch.tensor([1, 2])).sum().backward()
    optimizer.step()


@pytest.mark.parametrize("way", ["ddp", "plain", ""])
def test_sparse_gradients_are_refused(way: str) -> None:
    for error in expect_error_on_all(2, check_sparse, WAYS[way] if way else None):
        assert "sparse gradients" in error, error


def check_scaled_zeros() -> None:
    """Clipped by a local norm, behind autograd's back: of an embedding's gradient nearly everything is zero."""
    torch.manual_seed(0)
    model = nn.Embedding(2000, 16)
    optimizer = ours(model.parameters())
    attach(optimizer, model)
    model(torch.tensor([7, 8 + dist.get_rank()])).square().sum().backward()
    assert model.weight.grad is not None
    model.weight.grad.data.mul_(0.5)
    optimizer.step()


def test_a_factor_on_gradients_that_are_mostly_zero_is_seen() -> None:
    for error in expect_error_on_all(2, check_scaled_zeros):
        assert "gradients were changed" in error, error


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.branch = layers(), layers(1)

    def forward(self, x: Tensor, *, both: bool) -> Tensor:
        x = self.trunk(x)
        return self.branch(x) if both else x


def check_frozen(attached: str) -> None:
    """Rank 0 alone uses the branch, which is frozen between backward and the update."""
    model = Branches()
    twin = copy.deepcopy(model)
    optimizer, reference = ours(model.parameters()), theirs(twin.parameters())
    attach(optimizer, model if attached == "all" else model.trunk)
    for step in range(4):
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(10 * step + dist.get_rank()))
        for one in (model, twin):
            one(x, both=dist.get_rank() == 0).square().mean().backward()
            one.branch.requires_grad_(step != 1)
        for param in twin.parameters():
            param.grad = torch.zeros_like(param) if param.grad is None else param.grad
        average_gradients(twin)
        optimizer.step()
        reference.step()
        same(model, twin, f"update {step}")
        for one in (model, twin):
            one.branch.requires_grad_(True)
            one.zero_grad()
        optimizer.zero_grad()


@pytest.mark.parametrize("attached", ["all", "trunk"])
def test_a_gradient_of_a_frozen_parameter_on_one_rank_alone(attached: str) -> None:
    run_ranks(2, check_frozen, attached)


def check_saliency(way: dict[str, Any]) -> None:
    model = layers()
    twin = copy.deepcopy(model)
    optimizer, reference = ours(model.parameters()), theirs(twin.parameters())
    attach(optimizer, model, **way)
    for step in range(4):
        for one, by in ((model, optimizer), (twin, reference)):
            by.zero_grad()
            loss_of(one, step).backward()
            if one is twin:
                average_gradients(twin)
            by.step()
        if dist.get_rank() == 0:  # the gradients of the update are still there
            x = torch.ones(2, 8, requires_grad=True)
            torch.autograd.grad(model(x).sum(), x)
        same(model, twin, f"update {step}")


@pytest.mark.parametrize("way", ["plain", "plain, no overlap", "every backward"])
def test_gradients_of_an_input_on_one_rank_alone(way: str) -> None:
    run_ranks(2, check_saliency, WAYS[way])


class Breaks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, breaks: bool) -> Tensor:
        ctx.breaks = breaks
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        if ctx.breaks:
            raise ValueError("out of memory")
        return grad, None


def check_broken_off(way: dict[str, Any]) -> None:
    """Rank 0 catches what its backward pass raised, when buckets have gone, and updates by the gradients it has."""
    model = layers()
    twin = copy.deepcopy(model)
    optimizer, reference = ours(model.parameters(), bucket_numel=64), theirs(twin.parameters())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "_LOOK_EVERY", 1)
        attach(optimizer, model, **way)
    for step in range(4):
        breaks = step == 1 and dist.get_rank() == 0
        for one, by in ((model, optimizer), (twin, reference)):
            x = torch.randn(4, 8, generator=torch.Generator().manual_seed(10 * step + dist.get_rank()))
            by.zero_grad()
            try:
                one[3:](Breaks.apply(one[:3](x), breaks)).square().mean().backward()
            except ValueError:
                assert breaks
            if one is twin:
                for param in twin.parameters():
                    param.grad = torch.zeros_like(param) if param.grad is None else param.grad
                average_gradients(twin)
            by.step()
        same(model, twin, f"update {step}")


@pytest.mark.parametrize("way", ["plain", "plain, no overlap", "every backward"])
def test_a_backward_pass_that_raised_on_one_rank_alone(way: str) -> None:
    run_ranks(2, check_broken_off, WAYS[way])


def check_let_go() -> None:
    model = wrap(layers(), gradient_as_bucket_view=False)
    optimizer = ours(model.parameters())
    attach(optimizer, model, aside=False)
    loss_of(model, 0).backward()
    optimizer.step()
    optimizer.zero_grad()
    gone = weakref.ref(model)
    gc.collect()
    gc.disable()
    try:
        optimizer.param_groups[0]["params"] = [nn.Parameter(torch.zeros(3))]
        assert optimizer._path is not None
        reducers = [weakref.ref(reducer) for reducer in optimizer._path.sources.reducers()]
        assert reducers
        del model
        assert gone() is None
        assert all(ref() is None for ref in reducers)
    finally:
        gc.enable()


def test_a_module_is_let_go_of_while_its_optimizer_lives() -> None:
    run_ranks(2, check_let_go)


def check_the_last_optimizer_is_there_on_one_rank_alone(way: dict[str, Any]) -> None:
    model, twin = layers(), layers()
    way = dict(way)
    net = wrap(model) if way.pop("ddp", False) else model
    first = ours(model.parameters())
    attach(first, net, **way)
    loss_of(net, 0).backward()
    first.step()
    first.zero_grad(set_to_none=False)
    gone, held = weakref.ref(first), [first] * dist.get_rank()  # by a logger of one rank, say
    del first
    assert (gone() is None) == (not held)
    optimizer = ours(model.parameters())
    attach(optimizer, net, **way)
    reference = theirs(twin.parameters())
    twin.load_state_dict(model.state_dict())
    for step in range(1, 3):
        for module, by in ((net, optimizer), (twin, reference)):
            by.zero_grad()
            loss_of(module, step).backward()
        average_gradients(twin)
        optimizer.step()
        reference.step()
        same(model, twin, f"update {step}")
    for other in held:
        with pytest.raises(RuntimeError, match="no longer exists on other ranks"):
            other.step()


@pytest.mark.parametrize("way", [{}, {"ddp": True}, {"ddp": True, "aside": False}], ids=str)
def test_the_last_optimizer_is_there_on_one_rank_alone(way: dict[str, Any]) -> None:
    run_ranks(2, check_the_last_optimizer_is_there_on_one_rank_alone, way)


def check_parts_of_an_optimizer_that_is_there_on_one_rank_alone(way: dict[str, Any]) -> None:
    """Its gradients are parts of averages on the rank that still holds it, too."""
    model, way = layers(), dict(way)
    net = wrap(model) if way.pop("ddp", False) else model
    first = ours(model.parameters())
    attach(first, net, **way)
    loss_of(net, 0).backward()
    held = [first] * dist.get_rank()
    del first
    attach(ours(model.parameters()), net, **way)
    del held


@pytest.mark.parametrize("way", [{}, {"ddp": True}, {"ddp": True, "aside": False}], ids=str)
def test_parts_of_an_optimizer_that_is_there_on_one_rank_alone(way: dict[str, Any]) -> None:
    for error in expect_error_on_all(2, check_parts_of_an_optimizer_that_is_there_on_one_rank_alone, way):
        assert "part of the average" in error


def check_parts_of_averages(way: dict[str, Any], kind: str) -> None:
    """Gradients are left in ``param.grad`` when the optimizer that reduced them to their owners goes."""
    model, way = layers(), dict(way)
    net = wrap(model) if way.pop("ddp", False) else model
    first = ours(model.parameters())
    attach(first, net, **way)
    loss_of(net, 0).backward()
    first.step()
    del first
    last: Any = (ours if kind == "ours" else theirs)(model.parameters())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="part of the average"):
        last.step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    if net is not model:  # DDP would put the sums into its buckets
        with pytest.raises(RuntimeError, match="part of the average"):
            loss_of(net, 1)
    last.zero_grad(set_to_none=kind == "theirs")
    if kind == "ours":
        attach(last, net, **way)
    loss_of(net, 1).backward()
    last.step()


@pytest.mark.parametrize("kind", ["ours", "theirs"])
@pytest.mark.parametrize("way", [{}, {"ddp": True}, {"ddp": True, "aside": False}], ids=str)
def test_parts_of_averages_that_an_optimizer_leaves_are_refused(way: dict[str, Any], kind: str) -> None:
    run_ranks(2, check_parts_of_averages, way, kind)


def check_changes_that_raised_hold_nothing() -> None:
    model = layers()
    optimizer = ours(model.parameters())
    attach(optimizer, model)
    loss_of(model, 0).backward()
    optimizer.step()
    if dist.get_rank() == 1:
        optimizer.state[next(model.parameters())]["exp_avg"] = torch.zeros(0, 3)
    loss_of(model, 1).backward()
    gc.collect()
    gc.disable()
    try:
        with pytest.raises(AgreementError):
            optimizer.step()
        gone = weakref.ref(optimizer)
        del optimizer
        assert gone() is None
    finally:
        gc.enable()


def test_changes_that_raised_hold_nothing() -> None:
    run_ranks(2, check_changes_that_raised_hold_nothing)


class Meeting(TensorDataset):
    """Wait for the other thread's data until both loaders have begun to fetch, and neither has drawn anything."""

    def __init__(self, count: int, barrier: threading.Barrier) -> None:
        super().__init__(torch.arange(count))
        self.barrier = barrier

    def set_epoch(self, epoch: int) -> None:
        self.barrier.wait(10)


class Counter:
    """Return where in its epoch each batch of each loader ends, by the length of its data."""

    def __init__(self) -> None:
        self.ends: dict[int, list[int]] = {}

    def begins(self, run: loader_iteration.Run) -> None: ...

    def handed_out(self, batch: loader_iteration.Batch) -> None:
        loader = batch.run.loader()
        assert loader is not None
        self.ends.setdefault(len(loader.dataset), []).append(batch.end)

    def ended(self, run: loader_iteration.Run) -> None: ...


def test_loaders_in_two_threads() -> None:
    barrier, counter = threading.Barrier(2), Counter()
    loaders.listen(counter)

    def read(count: int) -> None:
        for _ in DataLoaderShard(Meeting(count, barrier), batch_size=3):
            pass

    threads = [threading.Thread(target=read, args=(count,)) for count in (7, 11)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert counter.ends == {7: [3, 6, 7], 11: [3, 6, 9, 11]}
