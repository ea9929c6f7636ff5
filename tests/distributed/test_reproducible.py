"""The same bits on any number of ranks: hashes of the weights after every update."""

from __future__ import annotations

import hashlib
import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate.utils import DataLoaderConfiguration
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from dist_adamw import CyclicLRWithRestarts, DistAdamW, prepare, rest_of_epoch
from dist_adamw.optimizer import transport
from dist_adamw.optimizer.gradients import ddp
from tests.distributed.engines import accelerator_on
from tests.distributed.test_attach import constants
from tests.ranks import expect_error_on_all, run_ranks

K = 24  # micro-batches of an update
UPDATES = 3


class Model(nn.Module):
    """Large and small parameters, one of them not used in every micro-batch."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(300, 97, dtype=dtype)
        self.layers = nn.Sequential(
            nn.Linear(97, 181, dtype=dtype),
            nn.LayerNorm(181, dtype=dtype),
            nn.GELU(),
            nn.Linear(181, 300, dtype=dtype),
        )
        self.dropout = nn.Dropout(0.1)
        self.scale = nn.Parameter(torch.ones(3, dtype=dtype))

    def forward(self, tokens: Tensor, scaled: bool) -> Tensor:
        x: Tensor = self.layers(self.dropout(self.embedding(tokens)))
        return x * self.scale[0] if scaled else x


def loss_of(model: nn.Module, update: int, number: int) -> Tensor:
    """Return the loss of micro-batch ``number`` of an update."""
    generator = torch.Generator().manual_seed(1000 * update + number)
    tokens = torch.randint(0, 300, (4, 9), generator=generator)
    logits = model(tokens[:, :-1], number % 5 == 0)
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


def digest(model: nn.Module) -> str:
    sums = hashlib.sha256()
    for param in model.parameters():
        whole: Any = param.detach()
        if isinstance(whole, DTensor):
            whole = whole.full_tensor()
        sums.update(whole.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return sums.hexdigest()[:16]


def train(
    way: str, options: dict[str, Any], dtype: torch.dtype = torch.float32, by: str = "shared memory"
) -> list[str]:
    """Train for some updates of K micro-batches; return a digest of the weights after each."""
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if by == "messages":
        os.environ["DIST_ADAMW_SHARED_MEMORY"] = "0"
    try:
        with constants(transport, **({"sends_from_host": lambda *_: False} if by == "collectives" else {})):
            model: nn.Module = Model(dtype)
            if way == "ddp":
                model = DistributedDataParallel(model, gradient_as_bucket_view=True, find_unused_parameters=True)
            optimizer = DistAdamW(model.parameters(), 1e-2, weight_decay=0.1, **options)
            optimizer.attach(model)
            digests = []
            for update in range(UPDATES):
                for j in range(-(-K // ranks)):
                    if j * ranks + rank < K:
                        loss_of(model, update, j * ranks + rank).backward()
                    else:
                        optimizer.join_backward()
                optimizer.step()
                optimizer.zero_grad()
                digests.append(digest(model))
            return digests
    finally:
        os.environ.pop("DIST_ADAMW_SHARED_MEMORY", None)


def in_one_process(options: dict[str, Any], dtype: torch.dtype = torch.float32) -> list[str]:
    return run_ranks(1, train, "plain", options, dtype)[0]


BF16: dict[str, Any] = {"reproducible": True, "master_dtype": torch.float32, "max_grad_norm": 0.01}
CASES: dict[str, tuple[dict[str, Any], torch.dtype]] = {
    "fp32": ({"reproducible": True}, torch.float32),
    "fp32, clipped": ({"reproducible": True, "max_grad_norm": 0.01}, torch.float32),
    "bf16, clipped": (BF16, torch.bfloat16),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("ranks", [2, 3, 4, 5, 6, 7, 8])
def test_one_digest_for_every_number_of_ranks(ranks: int, case: str) -> None:
    options, dtype = CASES[case]
    expected = in_one_process(options, dtype)
    assert len(set(expected)) == UPDATES
    assert run_ranks(ranks, train, "plain", options, dtype) == [expected] * ranks


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("by", ["messages", "collectives"])
def test_one_digest_for_every_transport(by: str, ranks: int) -> None:
    options, dtype = CASES["bf16, clipped"]
    assert run_ranks(ranks, train, "plain", options, dtype, by) == [in_one_process(options, dtype)] * ranks


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_one_digest_with_ddp(ranks: int, case: str) -> None:
    options, dtype = CASES[case]
    assert run_ranks(ranks, train, "ddp", options, dtype) == [in_one_process(options, dtype)] * ranks


def train_on_a_gpu_so_to_speak() -> list[str]:
    """Train where DDP's reducer stands aside only if it must."""
    with constants(ddp, _ASIDE=frozenset()):
        return train("ddp", {"reproducible": True})


def test_one_digest_with_ddp_where_its_buckets_are_otherwise_used() -> None:
    assert run_ranks(2, train_on_a_gpu_so_to_speak) == [in_one_process({"reproducible": True})] * 2


# ---------------------------------------------------------------- Accelerate's loop


MICRO_BATCH, MICRO_BATCHES = 2, 12  # samples, and micro-batches of an update


def accelerates_loop(
    engine: str,
    clip: bool,
    last: int,
    *,
    reproducible: bool = True,
    load: str | None = None,
    save: str | None = None,
    shuffle: bool = True,
    config: dict[str, Any] | None = None,
    size: int = 96,
    max_grad_norm: float | None = None,
) -> list[str]:
    """Train through `prepare` until update ``last``; return a digest of the weights after each update."""
    ranks = dist.get_world_size()
    with accelerator_on(engine, MICRO_BATCHES // ranks, **(config or {})) as accelerator:
        torch.manual_seed(0)
        model: Any = Model()
        ours = DistAdamW(model.parameters(), 1e-2, weight_decay=0.1, reproducible=reproducible)
        ours.max_grad_norm = max_grad_norm
        optimizer: Any = ours
        scheduler: Any = CyclicLRWithRestarts(optimizer, restart_period=1)
        tokens = torch.randint(0, 300, (size, 9), generator=torch.Generator().manual_seed(1))
        loader: Any = DataLoader(TensorDataset(tokens), MICRO_BATCH, shuffle=shuffle)
        model, optimizer, loader, scheduler = prepare(accelerator, model, optimizer, loader, scheduler)
        if load is not None:
            accelerator.load_state(load)
        digests: list[str] = []
        while True:
            for (batch,) in rest_of_epoch(loader):
                with accelerator.accumulate(model):
                    logits = model(batch[:, :-1], True)
                    loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
                    accelerator.backward(loss)
                    if clip and accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(model.parameters(), 0.01)
                    optimizer.step()
                    scheduler.step()
                    optimizer.zero_grad()
                if accelerator.sync_gradients:
                    digests.append(digest(accelerator.unwrap_model(model)))
                    if ours.updates == last:
                        if save is not None:
                            accelerator.save_state(save)
                        return digests


@pytest.mark.parametrize("clip", [False, True])
def test_one_digest_with_accelerate(clip: bool) -> None:
    (expected,) = run_ranks(1, accelerates_loop, "single", clip, 10)
    assert len(set(expected)) == 10
    for ranks in (2, 3, 4, 6):
        assert run_ranks(ranks, accelerates_loop, "DDP", clip, 10) == [expected] * ranks
    plain = [run_ranks(ranks, accelerates_loop, "DDP", clip, 10, reproducible=False)[0] for ranks in (2, 3)]
    assert plain[0] != plain[1]


def test_one_digest_with_accelerate_under_fsdp2(tmp_path: Path) -> None:
    """Also resumed from DDP."""
    (expected,) = run_ranks(1, accelerates_loop, "single", False, 8, max_grad_norm=0.01)
    path = str(tmp_path / "ddp")
    for ranks in (2, 3):
        assert run_ranks(ranks, accelerates_loop, "FSDP2", False, 5, max_grad_norm=0.01) == [expected[:5]] * ranks
    run_ranks(3, accelerates_loop, "DDP", False, 5, max_grad_norm=0.01, save=path)
    found = run_ranks(2, accelerates_loop, "FSDP2", False, 8, max_grad_norm=0.01, load=path)
    assert found == [expected[5:]] * 2
    refused(2, accelerates_loop, "FSDP2", True, 1, match="ValueError: .*pass max_grad_norm to DistAdamW")


def test_one_digest_across_stops(tmp_path: Path) -> None:
    """Stopped twice in an epoch, and resumed on other numbers of ranks."""
    (expected,) = run_ranks(1, accelerates_loop, "single", True, 10)
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    assert run_ranks(3, accelerates_loop, "DDP", True, 3, save=first) == [expected[:3]] * 3
    assert run_ranks(2, accelerates_loop, "DDP", True, 7, load=first, save=second) == [expected[3:7]] * 2
    assert run_ranks(4, accelerates_loop, "DDP", True, 10, load=second) == [expected[7:]] * 4
    assert run_ranks(1, accelerates_loop, "single", True, 10, load=second) == [expected[7:]]


def test_a_discarded_micro_batch_does_not_count() -> None:
    """However it is discarded."""
    for way in ("optimizer", "optimizer to zero", "model", "model to zero"):
        assert run_ranks(1, discarding, "single", way) == [(24, 0.0)], way
    for way in ("optimizer", "optimizer to zero"):
        assert run_ranks(2, discarding, "DDP", way) == [(24, 0.0)] * 2, way


def discarding(engine: str, way: str) -> tuple[int, float]:
    """Discard the gradients of one micro-batch; return the clock after the update, and what the discarded one added."""
    ranks = dist.get_world_size()
    with accelerator_on(engine, MICRO_BATCHES // ranks) as accelerator:
        torch.manual_seed(0)
        model: Any = nn.Linear(5, 1, bias=False)
        ours = DistAdamW(model.parameters(), 1e-2, reproducible=True)
        optimizer: Any = ours
        scheduler: Any = CyclicLRWithRestarts(optimizer, restart_period=1)
        # Only the discarded micro-batches have a gradient.
        data = torch.zeros(48, 5)
        data[: 2 * ranks] = 1.0
        loader: Any = DataLoader(TensorDataset(data), MICRO_BATCH)
        model, optimizer, loader, scheduler = prepare(accelerator, model, optimizer, loader, scheduler)
        for i, (batch,) in enumerate(rest_of_epoch(loader)):
            with accelerator.accumulate(model):
                accelerator.backward(model(batch).square().sum())
                if i == 0:
                    (ours if "optimizer" in way else model).zero_grad(set_to_none="to zero" not in way)
                optimizer.step()
                scheduler.step()
                if accelerator.sync_gradients:
                    break
        moments = ours.state[next(iter(ours.state))]["exp_avg"]
        return scheduler.samples + MICRO_BATCH * ranks, float(moments.abs().sum())


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_loop_that_may_divide_the_loss_is_told_once(ranks: int) -> None:
    told, *others = run_ranks(ranks, warned_of, train, "plain", {"reproducible": True})
    assert [*map(len, (told, *others))] == [1] + [0] * (ranks - 1)
    assert told[0].startswith(f"reproducible=True: this update is the average of {K // ranks} micro-batches")
    assert run_ranks(2, warned_of, accelerates_loop, "DDP", False, 2) == [[], []]


def warned_of(job: Callable[..., object], *args: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        job(*args)
    return [text for one in caught if (text := str(one.message)).startswith("reproducible")]


# ---------------------------------------------------------------- refused


def refused(ranks: int, job: Callable[..., object], *args: Any, match: str, **options: Any) -> None:
    for error in expect_error_on_all(ranks, job, *args, **options):
        assert re.match(match, error), error


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)


def attach(model: nn.Module, **options: Any) -> None:
    DistAdamW(model.parameters(), reproducible=True, **options).attach(model)


def test_running_statistics_are_refused() -> None:
    refused(2, attach, Normed(), match="ValueError: .*running statistics of 'norm', a BatchNorm1d")
    frozen = Normed()
    frozen.norm.eval()
    run_ranks(2, attach, frozen)


def without_views() -> None:
    attach(DistributedDataParallel(nn.Linear(3, 3)))


def not_attached() -> None:
    model = nn.Linear(3, 3)
    optimizer = DistAdamW(model.parameters(), reproducible=True)
    model(torch.ones(3)).sum().backward()
    optimizer.step()


@pytest.mark.parametrize(
    ("job", "ranks", "match"),
    [
        (without_views, 2, "ValueError: .*gradient_as_bucket_view=True"),
        (not_attached, 1, "RuntimeError: .*no module is attached"),
        (not_attached, 2, "RuntimeError: .*no module is attached"),
    ],
)
def test_what_would_add_micro_batches_up_is_refused(job: Any, ranks: int, match: str) -> None:
    refused(ranks, job, match=match)


class Used(nn.Module):
    """A parameter that forward does not use, and one that is frozen; `buffer` changes if asked to."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(5, 5)
        self.outside = nn.Parameter(torch.ones(()))
        self.late = nn.Parameter(torch.ones(5), requires_grad=False)
        self.register_buffer("average", torch.zeros(5))

    def forward(self, x: Tensor, *, average: bool = False) -> Tensor:
        if average:
            self.get_buffer("average").lerp_(x.mean(0), 0.1)
        return torch.as_tensor(self.layer(x) * self.late)


def use(thaw: bool, average: bool = False) -> str:
    """Two updates of 4 micro-batches, with a parameter that is used in the loss alone, or before forward."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    model = Used()
    optimizer = DistAdamW(model.parameters(), 1e-2, eps=0.1, reproducible=True)
    optimizer.attach(model)
    for update in range(2):
        model.late.requires_grad_(thaw and update == 1)
        for number in range(rank, 4, ranks):
            x = torch.randn(3, 5, generator=torch.Generator().manual_seed(10 * update + number))
            (model(x, average=average).sum() * model.outside.exp()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert model.outside != 1.0
    return digest(model)


def test_a_parameter_that_is_used_in_the_loss_alone() -> None:
    assert len({found for ranks in (1, 2, 4) for found in run_ranks(ranks, use, False)}) == 1


def test_a_parameter_that_was_frozen_when_attached_is_refused() -> None:
    refused(2, use, True, match="RuntimeError: .*1 parameters have gradients that were not summed in the order")


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_forward_pass_that_changes_a_buffer_is_refused(ranks: int) -> None:
    refused(ranks, use, False, True, match="RuntimeError: forward has changed the buffer 'average'")


def drawn_with_two_optimizers() -> int:
    """Return a number drawn after a forward pass that two optimizers follow."""
    model = Model()
    halves = [*model.layers.parameters()], [model.embedding.weight, model.scale]
    for params in halves:
        DistAdamW(params, reproducible=True).attach(model)
    torch.manual_seed(5)
    loss_of(model, 0, dist.get_rank())
    return int(torch.randint(1 << 40, ()))


def test_random_numbers_outside_of_forward_stay_as_they_were() -> None:
    assert len(set(run_ranks(2, drawn_with_two_optimizers))) == 1


SPLIT = DataLoaderConfiguration(split_batches=True)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"size": 97}, "ValueError: .*48 micro-batches of 2 and 1 samples, which do not .*to 96 or 120 samples"),
        ({"size": 94}, "ValueError: .*47 micro-batches of 2"),
        ({"config": {"dataloader_config": SPLIT}}, "ValueError: .*split_batches=True would compute .* of 1 samples"),
    ],
)
def test_what_depends_on_the_ranks_is_refused(options: dict[str, Any], match: str) -> None:
    refused(2, accelerates_loop, "DDP", False, 1, **options, match=match)


def test_deepspeed_is_refused() -> None:
    refused(2, accelerates_loop, "ZeRO-1", False, 1, match="ValueError: .*DeepSpeed, which adds")


def test_options_that_exclude_it() -> None:
    param = nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match="shard='auto'"):
        DistAdamW([param], reproducible=True, shard=False)
