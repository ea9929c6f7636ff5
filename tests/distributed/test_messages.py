"""What an update sends under prepare: one message of 64 bytes, with any number of groups; none if reports take it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader

from dist_adamw import CyclicLRWithRestarts, DistAdamW, prepare
from dist_adamw.optimizer.transport.rollcall import Rollcall
from tests.distributed.jobs import data
from tests.ranks import expect_error_on_all, run_ranks


def messages(num_groups: int, ours: bool) -> tuple[list[int], int]:
    """Return the bytes of the all-reduces that are not DDP's, in four updates, and the clock."""
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 1))
    params = [*model.parameters()]
    optimizer = torch.optim.AdamW([{"params": params[i::num_groups], "lr": 1e-3 * (i + 1)} for i in range(num_groups)])
    scheduler: Any = CyclicLRWithRestarts(optimizer) if ours else torch.optim.lr_scheduler.StepLR(optimizer, 3)
    accelerator, loader = Accelerator(cpu=True), DataLoader(data(48), batch_size=4)
    prepared = prepare(accelerator, model, optimizer, loader, scheduler, check_weights_every=0)
    model, optimizer, loader, scheduler = prepared
    sent: list[int] = []
    all_reduce = dist.all_reduce

    def counted(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        sent.append(tensor.nbytes)
        return all_reduce(tensor, *args, **kwargs)

    for n, (x, y) in enumerate(loader):
        if n == 2:  # the first update compares options
            dist.all_reduce = counted
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    dist.all_reduce = all_reduce
    return sent, scheduler.samples if ours else 0


@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.parametrize("num_groups", [1, 8])
def test_an_update_sends_one_small_message(num_groups: int, ours: bool) -> None:
    for sent, samples in run_ranks(2, messages, num_groups, ours):
        assert sent == [64] * 4
        assert samples == (48 if ours else 0)


def attached_job(act: Callable[[int, Any, Any, Any], None], *, calls_closure: bool = False) -> tuple[list[int], int]:
    """Train five updates with a DistAdamW; return the messages of each, and the clock.

    Args:
        act: Called before each update with its number, the optimizer, the scheduler and the prepared optimizer.
        calls_closure: Whether gradients are computed inside ``step``.
    """
    model: nn.Module = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 2))
    optimizer = DistAdamW(model.parameters())
    # lr is the same at all samples, so that ranks differ in their samples alone.
    scheduler = CyclicLRWithRestarts(optimizer, policy_fn=lambda _: 1.0, normalize_weight_decay=False)
    accelerator, loader = Accelerator(cpu=True), DataLoader(data(40), batch_size=4)
    model, prepared, loader, _ = prepare(accelerator, model, optimizer, loader, scheduler, check_weights_every=2)
    sent, posted, all_reduce = [], 0, dist.all_reduce

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal posted
        posted += 100
        return all_reduce(*args, **kwargs)

    def post(self: Rollcall, *args: Any) -> None:
        nonlocal posted
        posted += 1
        rollcall_post(self, *args)

    rollcall_post = Rollcall.post
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", counted)
        patch.setattr(Rollcall, "post", post)
        for n, (x, y) in enumerate(loader):

            def compute(x: Any = x, y: Any = y) -> Any:
                loss = nn.functional.mse_loss(model(x), y)
                loss.backward()
                return loss

            posted = 0
            if calls_closure:
                prepared.step(compute)
            else:
                compute()
                act(n, optimizer, scheduler, prepared)
                prepared.step()
            scheduler.step()
            prepared.zero_grad()
            sent.append(posted)
    return sent, scheduler.samples


def nothing(n: int, *_: Any) -> None:
    pass


def test_reports_take_the_comparison_and_the_count_along() -> None:
    """An update announces its backward pass and reports its gradients; each second one compares weights as well.

    Two more messages say that a bucket of gradients, and one of parameters, is in shared memory, and two open that.
    """
    for sent, samples in run_ranks(2, attached_job, nothing):
        assert sent == [106, 4, 104, 4, 104]
        assert samples == 40


def with_closure() -> tuple[list[int], int]:
    return attached_job(nothing, calls_closure=True)


def test_a_closure_is_counted() -> None:
    for sent, samples in run_ranks(2, with_closure):
        assert all(count >= 100 for count in sent)
        assert samples == 40


def another_sample(n: int, _: Any, scheduler: Any, __: Any) -> None:
    if n == 3 and dist.get_rank() == 1:
        scheduler.go_to(samples=30)


def test_samples_that_differ_are_told_before_the_update() -> None:
    for error in expect_error_on_all(2, attached_job, another_sample):
        said = "AgreementError: rank 1 disagrees with rank 0: samples is 24 on rank 0 and 30 on rank 1."
        assert error.startswith(said), error


def gathers_alone(n: int, optimizer: Any, _: Any, __: Any) -> None:
    if n == 3 and dist.get_rank() == 1:
        optimizer.gather_gradients()


def clips_alone(n: int, optimizer: Any, _: Any, __: Any) -> None:
    if n == 3 and dist.get_rank() == 0:
        optimizer.clip_grad_norm_(1.0)


@pytest.mark.parametrize("act", [gathers_alone, clips_alone])
def test_a_call_on_one_rank_alone_is_told(act: Callable[..., None]) -> None:
    for error in expect_error_on_all(2, attached_job, act):
        assert error.startswith("AgreementError: rank "), error
        assert "calls step() for update 4" in error, error


def raises_once(n: int, optimizer: Any, _: Any, prepared: Any) -> None:
    """``step`` raises on every rank, since one has changed its gradients, and is called again."""
    if n == 3:
        if dist.get_rank() == 1:
            optimizer.param_groups[0]["params"][0].grad.mul_(0.5)
        with pytest.raises(RuntimeError, match="gradients were changed"):
            prepared.step()
        optimizer.accept_gradients()


def test_a_step_that_raised_and_is_made_again_counts_once() -> None:
    for _, samples in run_ranks(2, attached_job, raises_once):
        assert samples == 40
