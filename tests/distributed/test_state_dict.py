"""``state_dict()`` on several ranks: all of the state after `consolidate_state_dict`, or a sentence; never a share."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.data import TensorDataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from dist_adamw import DistAdamW
from tests.distributed.test_mixed_precision import Pair
from tests.distributed.test_optimizer import Network, backward
from tests.known import unwrap
from tests.ranks import expect_error_on_all, run_ranks

BATCH, UPDATES, STOP = 12, 6, 3
ADAMW: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "eps": 0.1}
NAMES = "dist_adamw.save.*shard=False"


# ---------------------------------------------------------------- loops as other projects write them


def small() -> nn.Module:
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(6, 19), nn.Tanh(), nn.Linear(19, 3))


def samples() -> TensorDataset:
    generator = torch.Generator().manual_seed(6)
    count = BATCH * UPDATES
    return TensorDataset(torch.randn(count, 6, generator=generator), torch.randn(count, 3, generator=generator))


def batches(first: int, last: int) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's part of each global batch."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    x, y = samples().tensors
    for update in range(first, last):
        chosen = slice(update * BATCH + rank * BATCH // ranks, update * BATCH + (rank + 1) * BATCH // ranks)
        yield x[chosen], y[chosen]


def train(model: nn.Module, optimizer: Optimizer, first: int, last: int) -> None:
    for x, y in batches(first, last):
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def nano_gpt(file: Path, resume: bool) -> nn.Module:
    """Rank 0 saves a dict of state dicts."""
    raw_model = small()
    optimizer = DistAdamW(raw_model.parameters(), **ADAMW)
    if resume:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
        raw_model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        checkpoint = None  # free up memory
    model = DistributedDataParallel(raw_model)
    train(model, optimizer, *((STOP, UPDATES) if resume else (0, STOP)))
    if not resume:
        optimizer.consolidate_state_dict()
        if dist.get_rank() == 0:
            torch.save({"model": raw_model.state_dict(), "optimizer": optimizer.state_dict(), "iter_num": STOP}, file)
    return raw_model


def fabric(file: Path, resume: bool) -> nn.Module:
    """Save as Lightning's strategies do: consolidate if there is such a method, then state_dict on rank 0."""

    def get_optimizer_state(optimizer: Any) -> dict[str, Any]:
        if hasattr(optimizer, "consolidate_state_dict"):
            optimizer.consolidate_state_dict()
            return optimizer.state_dict() if dist.get_rank() == 0 else {}
        return optimizer.state_dict()

    module = small()
    optimizer = DistAdamW(module.parameters(), **ADAMW)
    optimizer.attach(module)  # plain modules, without DDP
    if resume:
        state = torch.load(file, weights_only=True)
        module.load_state_dict(state["state_dict"])
        for one, saved in zip([optimizer], state["optimizer_states"], strict=True):
            one.load_state_dict(saved)
    train(module, optimizer, *((STOP, UPDATES) if resume else (0, STOP)))
    if not resume:
        state = {"state_dict": module.state_dict(), "optimizer_states": [get_optimizer_state(optimizer)]}
        if dist.get_rank() == 0:
            torch.save(state, file)
    return module


def timm(file: Path, resume: bool) -> nn.Module:
    """Epoch by epoch; a saver on rank 0, that keeps the optimizer and asks it."""

    class CheckpointSaver:
        def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
            self.model, self.optimizer = model, optimizer

        def save_checkpoint(self, epoch: int) -> None:
            save_state = {
                "epoch": epoch,
                "state_dict": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
            }
            torch.save(save_state, file)

    model = small()
    groups = [{"params": [p for p in model.parameters() if p.ndim == d]} for d in (1, 2)]
    optimizer = DistAdamW(groups, **ADAMW)
    start = 0
    if resume:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
        model.load_state_dict(checkpoint["state_dict"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        start = checkpoint["epoch"] + 1
    wrapped = DistributedDataParallel(model)
    saver = CheckpointSaver(model, optimizer) if dist.get_rank() == 0 else None
    for epoch in range(start, UPDATES if resume else STOP):
        train(wrapped, optimizer, epoch, epoch + 1)
        optimizer.consolidate_state_dict()
        if saver is not None and not resume:
            saver.save_checkpoint(epoch)
    return model


def accelerate_alone(file: Path, resume: bool) -> nn.Module:
    """accelerator.prepare and save_state, which asks every rank and writes what rank 0 says."""
    accelerator = Accelerator()
    model = small()
    optimizer = DistAdamW(model.parameters(), **ADAMW)
    model, stepped = accelerator.prepare(model, optimizer)
    folder = str(file.with_suffix(""))
    if resume:
        accelerator.load_state(folder)
    train(model, stepped, *((STOP, UPDATES) if resume else (0, STOP)))
    if not resume:
        optimizer.consolidate_state_dict(to=None)
        accelerator.save_state(folder)
    return accelerator.unwrap_model(model)


class Loss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = small()

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        return {"loss": nn.functional.mse_loss(self.body(x), y)}


class Consolidate(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        if control.should_save:
            unwrap(objects["optimizer"]).consolidate_state_dict()


def trainer_alone(file: Path, resume: bool) -> nn.Module:
    """Trainer(optimizers=...) without prepare_trainer."""
    x, y = samples().tensors
    data = [{"x": a, "y": b} for a, b in zip(x, y, strict=True)]
    model = Loss()
    optimizer = DistAdamW(model.parameters(), **ADAMW)
    constant: Any = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    args = TrainingArguments(
        output_dir=str(file.with_suffix("")),
        per_device_train_batch_size=BATCH // dist.get_world_size(),
        train_sampling_strategy="sequential",
        max_grad_norm=0.0,
        max_steps=UPDATES if resume else STOP,
        save_strategy="steps",
        save_steps=STOP,
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(model, args, train_dataset=data, optimizers=(optimizer, constant), callbacks=[Consolidate()])
    trainer.train(resume_from_checkpoint=f"{args.output_dir}/checkpoint-{STOP}" if resume else None)
    assert trainer.state.global_step == (UPDATES if resume else STOP)
    return model.body


LOOPS: list[Callable[[Path, bool], nn.Module]] = [nano_gpt, fabric, timm, accelerate_alone, trainer_alone]


def run_loops(folder: str, resume: bool) -> list[list[Tensor]]:
    weights = []
    for loop in LOOPS:
        AcceleratorState._reset_state(reset_partial_state=True)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            warnings.filterwarnings("ignore", module="transformers|torch")
            model = loop(Path(folder) / f"{loop.__name__}.pt", resume)
        weights.append([p.detach().clone() for p in model.parameters()])
    return weights


def never_stopped() -> list[Tensor]:
    model = small()
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    x, y = samples().tensors
    for update in range(UPDATES):
        nn.functional.mse_loss(model(x[update * BATCH :][:BATCH]), y[update * BATCH :][:BATCH]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("before", [1, 2, 3])
def test_other_peoples_loops_resume_on_any_number_of_ranks(before: int, tmp_path: Path) -> None:
    run_ranks(before, run_loops, str(tmp_path), False)
    for after in (1, 2, 3):
        for loop, found in zip(LOOPS, run_ranks(after, run_loops, str(tmp_path), True)[-1], strict=True):
            for weight, expected in zip(found, never_stopped(), strict=True):
                assert torch.allclose(weight, expected, rtol=1e-5, atol=1e-6), (loop.__name__, after)
    for name in ("nano_gpt", "fabric"):  # and torch's own AdamW goes on with it
        saved = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        model = small()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1.0)
        model.load_state_dict(saved["model" if name == "nano_gpt" else "state_dict"])
        optimizer.load_state_dict(saved["optimizer"] if name == "nano_gpt" else saved["optimizer_states"][0])
        x, y = samples().tensors
        for update in range(STOP, UPDATES):
            nn.functional.mse_loss(model(x[update * BATCH :][:BATCH]), y[update * BATCH :][:BATCH]).backward()
            optimizer.step()
            optimizer.zero_grad()
        for weight, expected in zip(model.parameters(), never_stopped(), strict=True):
            assert torch.allclose(weight, expected, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- the same bits as on one rank


def check_bits(options: dict[str, Any]) -> None:
    """Against the optimizer that shares nothing out, given the same gradients; small messages, many buckets."""
    model = Network()
    twin = copy.deepcopy(model)
    sharded = DistAdamW(model.parameters(), **ADAMW, **options)
    whole = DistAdamW(twin.parameters(), shard=False, **ADAMW, **options)
    for step in range(3):
        backward(model, step)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            if p.grad is not None:
                dist.all_reduce(p.grad)
                q.grad = p.grad.clone()
        for optimizer in (sharded, whole):
            optimizer.step()
            optimizer.zero_grad()
    expected = whole.state_dict()
    for to in (*range(dist.get_world_size()), None):
        sharded.consolidate_state_dict(to)
        if to not in (None, dist.get_rank()):
            with pytest.raises(RuntimeError, match=f"consolidated on rank {to}, and this is rank {dist.get_rank()}"):
                sharded.state_dict()
            continue
        found = sharded.state_dict()
        assert found.keys() == expected.keys()
        assert found["param_groups"] == expected["param_groups"]
        assert found["state"].keys() == expected["state"].keys()
        for i, state in expected["state"].items():
            assert found["state"][i].keys() == state.keys()
            for key, value in state.items():
                assert found["state"][i][key].shape == value.shape
                assert torch.equal(found["state"][i][key], value), (i, key)
    with pytest.raises(ValueError, match=f"to must be a rank .* {dist.get_world_size()}\\."):
        sharded.consolidate_state_dict(dist.get_world_size())


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_bits_of_whole_state(world_size: int) -> None:
    for options in ({}, {"amsgrad": True, "bucket_numel": 500}, {"state_dtype": torch.bfloat16, "betas": (0.9, 0.99)}):
        run_ranks(world_size, check_bits, options)


def check_messages() -> None:
    """State of several messages."""
    from dist_adamw.optimizer import state_dict as share

    before, share._MESSAGE_BYTES = share._MESSAGE_BYTES, 1000
    try:
        check_bits({"bucket_numel": 500})
    finally:
        share._MESSAGE_BYTES = before


def test_state_in_several_messages() -> None:
    run_ranks(3, check_messages)


def check_hooks() -> list[object]:
    model = small()
    optimizer = DistAdamW(model.parameters(), **ADAMW)
    train(DistributedDataParallel(model), optimizer, 0, 2)
    optimizer.consolidate_state_dict(to=None)
    optimizer.register_state_dict_post_hook(lambda _, saved: saved["state"].update(mine=1))
    found: list[object] = list(optimizer.state_dict()["state"])
    optimizer.register_state_dict_pre_hook(lambda one: one.state.update(mine=1))  # type: ignore[call-overload]
    with pytest.raises(ValueError, match=r"optimizer\.state\['mine'\] is not the state of a parameter"):
        optimizer.state_dict()
    return found


def test_what_hooks_of_state_dict_add_stays_or_is_refused() -> None:
    assert run_ranks(2, check_hooks) == [[0, 1, 2, 3, "mine"]] * 2


def check_masters() -> None:
    for master_dtype in (torch.float32, torch.int16):
        pair, other = Pair(master_dtype=master_dtype), Pair(master_dtype=master_dtype)
        pair.train(range(3), follow=False)
        pair.optimizer.consolidate_state_dict()
        boxes: list[Any] = [pair.optimizer.state_dict() if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(boxes, src=0)
        other.model.load_state_dict(pair.model.state_dict())
        other.optimizer.load_state_dict(boxes[0])
        for p in (pair, other):
            p.train(range(3, 6), follow=False)
        assert all(itertools.starmap(torch.equal, zip(pair.masters(), other.masters(), strict=True)))


def test_masters_go_with_it() -> None:
    run_ranks(2, check_masters)


def check_nodes() -> list[int]:
    """State shared inside a node and copied over nodes: the first rank of each has it."""
    model = small()
    optimizer = DistAdamW(model.parameters(), mesh=init_device_mesh("cpu", (2, 2)), **ADAMW)
    train(DistributedDataParallel(model), optimizer, 0, 2)
    optimizer.consolidate_state_dict()
    if dist.get_rank() % 2:
        with pytest.raises(RuntimeError, match="consolidated on rank 0, and this is rank 1"):
            optimizer.state_dict()
        return []
    return [value["exp_avg"].numel() for value in optimizer.state_dict()["state"].values()]


def test_with_replicas() -> None:
    sizes = [6 * 19, 19, 19 * 3, 3]
    assert run_ranks(4, check_nodes) == [sizes, [], sizes, []]


# ---------------------------------------------------------------- never a share, and never an old one


def trained() -> tuple[nn.Module, DistAdamW]:
    model = small()
    optimizer = DistAdamW(model.parameters(), **ADAMW)
    train(DistributedDataParallel(model), optimizer, 0, 2)
    return model, optimizer


def ask_for_a_share() -> None:
    _, optimizer = trained()
    optimizer.state_dict()


def test_a_share_is_not_handed_out() -> None:
    for rank, error in enumerate(expect_error_on_all(2, ask_for_a_share)):
        assert f"rank {rank} of 2 has its own share" in error
        assert all(name in error for name in ("dist_adamw.save", "consolidate_state_dict", "shard=False"))


def save_state_alone(folder: str) -> None:
    accelerator = Accelerator()
    model = small()
    model, optimizer = accelerator.prepare(model, DistAdamW(model.parameters(), **ADAMW))
    train(model, optimizer, 0, 1)
    accelerator.save_state(folder)


def test_save_state_after_accelerates_own_prepare(tmp_path: Path) -> None:
    for error in expect_error_on_all(2, save_state_alone, str(tmp_path)):
        assert "accelerator.save_state does after dist_adamw.prepare" in error


def write_state(optimizer: DistAdamW, how: str) -> None:
    first = optimizer.param_groups[0]["params"][0]
    if how == "update":
        train(write_state.model, optimizer, 2, 3)  # type: ignore[attr-defined]
    elif how == "in place":
        optimizer.state[first]["exp_avg"].mul_(0.5)
    elif how == "replaced":
        optimizer.state[first]["exp_avg"] = optimizer.state[first]["exp_avg"].clone()
    elif how == "load":
        optimizer.load_state_dict(optimizer.state_dict())
    elif how == "recount":
        optimizer.recount()


def check_old_state() -> None:
    for how in ("update", "in place", "replaced", "load", "recount"):
        model, optimizer = trained()
        write_state.model = DistributedDataParallel(model)  # type: ignore[attr-defined]
        optimizer.consolidate_state_dict(None)
        optimizer.param_groups[0]["lr"] = 0.5  # groups are as they are when they are asked for
        assert optimizer.state_dict()["param_groups"][0]["lr"] == 0.5
        write_state(optimizer, how)
        with pytest.raises(RuntimeError, match="not consolidated"):
            optimizer.state_dict()
        optimizer.consolidate_state_dict(None)
        optimizer.state_dict()
        assert "share" not in optimizer.state_dict()


def test_old_state_is_not_handed_out() -> None:
    run_ranks(2, check_old_state)


def check_round_trips() -> None:
    """Accelerate's wrapper asks and loads at once: when there is nothing, when all was loaded, in mid-training."""
    saved = trained()[1]
    saved.consolidate_state_dict(None)
    whole = saved.state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model, twin = small(), small()
        optimizer, reference = DistAdamW(model.parameters(), **ADAMW), torch.optim.AdamW(twin.parameters(), **ADAMW)
        Accelerator().prepare(DistAdamW(small().parameters()))
        for one in (optimizer, reference):
            one.load_state_dict(whole)
        accelerator = Accelerator()
        prepared, stepped = accelerator.prepare(model, optimizer)
        other = DistributedDataParallel(twin)
        for first in (2, 4):
            train(prepared, stepped, first, first + 2)
            train(other, reference, first, first + 2)
            accelerator.free_memory()
            AcceleratorState._reset_state(reset_partial_state=True)
            accelerator = Accelerator()
            stepped = accelerator.prepare(optimizer)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-5, atol=1e-7)
    copied = copy.deepcopy(optimizer)  # has a path of its own
    assert copied.updates == optimizer.updates == 6


def test_a_wrapper_may_go_round() -> None:
    run_ranks(2, check_round_trips)


def check_nothing_to_do() -> None:
    model = small()
    ways: list[dict[str, Any]] = [{"shard": False}, {}]
    for options in ways:
        optimizer = DistAdamW(model.parameters(), **ADAMW, **options)
        optimizer.consolidate_state_dict()
        assert optimizer.state_dict()["state"] == {}
        if options:
            train(DistributedDataParallel(model), optimizer, 0, 1)
            assert len(optimizer.state_dict()["state"]) == 4


def test_whole_state_needs_no_consolidation() -> None:
    for world_size in (1, 2):
        run_ranks(world_size, check_nothing_to_do)
