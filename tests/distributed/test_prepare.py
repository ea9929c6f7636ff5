"""prepare: one curve at every number of ranks, real samples, agreement, checkpoints."""

from __future__ import annotations

import itertools
import json
import math
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import DistributedType, GradientAccumulationPlugin
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, SequentialSampler, TensorDataset

from dist_adamw import CyclicLRWithRestarts, DistAdamW, GlobalBatch, ReduceMaxLROnRestart, prepare
from tests.ranks import expect_error_on_all, run_ranks

WORLDS = [1, 2, 3, 4]
RECIPE: dict[str, Any] = {
    "restart_period": 0.7,
    "t_mult": 1.5,
    "min_lr": 1e-5,
    "warmup_samples": 30,
    "eta_on_restart_cb": ReduceMaxLROnRestart(0.9),
}
Row = tuple[int, float, float]


def data(length: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(3)
    return TensorDataset(torch.randn(length, 6, generator=generator), torch.randn(length, 2, generator=generator))


def model_of_two_layers(width: int = 20) -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 2))


def job(
    accumulation: int = 1,
    length: int = 100,
    *,
    loader: dict[str, Any] | None = None,
    dataset: Dataset[Any] | None = None,
    recipe: dict[str, Any] | None = None,
    optimizer: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
    plugin: dict[str, Any] | None = None,
    width: int = 20,
) -> tuple[Accelerator, nn.Module, DistAdamW, DataLoader[Any], CyclicLRWithRestarts]:
    """The five objects, with a micro-batch of one sample unless ``loader`` says otherwise."""
    accelerator = Accelerator(
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=accumulation, **(plugin or {})),
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, **(config or {})),
    )
    model = model_of_two_layers(width)
    adamw = DistAdamW(model.parameters(), **{"lr": 1e-2, "weight_decay": 0.05, **(optimizer or {})})
    scheduler = CyclicLRWithRestarts(adamw, **{**RECIPE, **(recipe or {})})
    source = data(length) if dataset is None else dataset
    return accelerator, model, adamw, DataLoader(source, **{"batch_size": 1, **(loader or {})}), scheduler


def epochs(
    accelerator: Accelerator, model: nn.Module, optimizer: Any, loader: Any, scheduler: Any, count: int
) -> Iterator[Row]:
    """The loop every Accelerate user has; yields the clock, lr and decay of each update."""
    clock = getattr(scheduler, "scheduler", scheduler)  # accelerator.prepare wraps, prepare does not
    for _ in range(count):
        for x, y in loader:
            with accelerator.accumulate(model):
                accelerator.backward(nn.functional.mse_loss(model(x), y))
                group = optimizer.param_groups[0]
                row = (clock.samples, group["lr"], group["weight_decay"])
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
                if accelerator.sync_gradients:
                    yield row


# ---------------------------------------------------------------- one curve


def curve(way: str, accumulation: int, length: int, drop_last: bool, decay_by: str) -> list[Row]:
    options: dict[str, Any] = {"loader": {"shuffle": True, "drop_last": drop_last}, "optimizer": {"decay_by": decay_by}}
    if way == "accelerate":
        options["recipe"] = {"batch_size": 12, "epoch_size": length // 12 * 12 if drop_last else length}
    accelerator, *objects = job(accumulation, length, **options)
    prepared = prepare(accelerator, *objects) if way == "prepare" else accelerator.prepare(*objects)
    return list(epochs(accelerator, *prepared, count=6))


def plain_curve(length: int, decay_by: str) -> list[Row]:
    model = model_of_two_layers()
    optimizer = DistAdamW(model.parameters(), lr=1e-2, weight_decay=0.05, decay_by=decay_by)  # type: ignore[arg-type]
    scheduler = CyclicLRWithRestarts(optimizer, 12, length, **RECIPE)
    rows = []
    for _ in range(6):
        for x, y in DataLoader(data(length), batch_size=12):
            group = optimizer.param_groups[0]
            rows.append((scheduler.samples, group["lr"], group["weight_decay"]))
            nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    return rows


@pytest.mark.parametrize("decay_by", ["lr", "schedule"])
@pytest.mark.parametrize("length", [96, 101])  # whole batches; a partial last one
@pytest.mark.parametrize("way", ["prepare", "accelerate"])
def test_same_bits_at_every_world_size(way: str, length: int, decay_by: str) -> None:
    reference = plain_curve(length, decay_by)
    assert len({lr for _, lr, _ in reference}) > 30
    for world_size in WORLDS:
        for rows in run_ranks(world_size, curve, way, 12 // world_size, length, False, decay_by):
            assert rows == reference


@pytest.mark.parametrize("world_size", WORLDS)
def test_drop_last_has_one_epoch_size_at_every_world_size(world_size: int) -> None:
    reference = plain_curve(96, "lr")[:8]  # 101 samples, but whole batches only
    for rows in run_ranks(world_size, curve, "prepare", 12 // world_size, 101, True, "lr"):
        assert rows[:8] == reference


# ---------------------------------------------------------------- real samples


class Stream(IterableDataset):  # type: ignore[type-arg]
    """No length, as data from a network has none."""

    def __init__(self, length: int) -> None:
        self.data = data(length)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        return iter(self.data[i] for i in range(len(self.data)))


class SizedStream(Stream):
    def __len__(self) -> int:
        return len(self.data)


def counts(accumulation: int, count: int, options: dict[str, Any]) -> tuple[list[int], int | None, int | None]:
    """Samples of each update, global batch and epoch size."""
    if options.get("dataset") == "stream":
        options = {**options, "dataset": Stream(26)}
    if options.get("dataset") == "sized stream":
        options = {**options, "dataset": SizedStream(26)}
    if options.get("loader") == "batch sampler":
        options = {
            **options,
            "loader": {"batch_size": 1, "batch_sampler": BatchSampler(SequentialSampler(range(26)), 4, False)},
        }
    accelerator, *objects = job(accumulation, options.pop("length", 26), **options)
    prepared = prepare(accelerator, *objects)
    scheduler = prepared[3]
    samples = [row[0] for row in epochs(accelerator, *prepared, count=count)] + [scheduler.samples]
    return [b - a for a, b in itertools.pairwise(samples)], scheduler.batch_size, scheduler.epoch_size


@pytest.mark.parametrize(
    ("name", "accumulation", "options", "batch", "epoch", "expected"),
    [
        ("padded by even_batches", 1, {"loader": {"batch_size": 4}}, 8, 26, [8, 8, 8, 2] * 2),
        ("short last accumulation", 2, {"loader": {"batch_size": 4}}, 16, 26, [16, 10] * 2),
        ("very short last accumulation", 3, {"loader": {"batch_size": 4}}, 24, 26, [24, 2] * 2),
        ("split_batches", 1, {"loader": {"batch_size": 8}, "config": {"split_batches": True}}, 8, 26, [8, 8, 8, 2] * 2),
        (
            "dispatch_batches",
            1,
            {"loader": {"batch_size": 4}, "config": {"dispatch_batches": True}},
            8,
            26,
            [8, 8, 8, 2] * 2,
        ),
        ("drop_last", 1, {"loader": {"batch_size": 4, "drop_last": True}}, 8, 24, [8, 8, 8] * 2),
        (
            "accumulation across epochs",
            3,
            {"loader": {"batch_size": 4}, "plugin": {"sync_with_dataloader": False}},
            24,
            26,
            [24, 18, 18, 18],  # the passes have 8, 8, 8, 2 | 8, 8, 8, 2 | 8, 8, 8, 2
        ),
        (
            "a stream with a length",
            1,
            {"loader": {"batch_size": 4}, "dataset": "sized stream"},
            8,
            26,
            [8, 8, 8, 2] * 2,
        ),
        (
            "a stream without",
            1,
            {"loader": {"batch_size": 4}, "dataset": "stream", "recipe": {"epoch_size": 26}},
            8,
            26,
            [8, 8, 8, 2] * 2,
        ),
        (
            "even by itself",
            1,
            {"loader": {"batch_size": 4}, "length": 30, "config": {"even_batches": False}},
            8,
            30,
            [8, 8, 8, 6],
        ),
    ],
)
def test_real_samples_are_counted(
    name: str, accumulation: int, options: dict[str, Any], batch: int, epoch: int, expected: list[int]
) -> None:
    for got, got_batch, got_epoch in run_ranks(2, counts, accumulation, 3, options):
        assert (got_batch, got_epoch) == (batch, epoch), name
        assert got[: len(expected)] == expected, name


def test_a_custom_batch_sampler_with_a_size_works() -> None:
    dataset = data(26)
    accelerator = Accelerator()
    model = model_of_two_layers()
    optimizer = DistAdamW(model.parameters(), lr=1e-2)
    scheduler = CyclicLRWithRestarts(optimizer, **RECIPE)
    loader = DataLoader(dataset, batch_sampler=BatchSampler(SequentialSampler(range(20)), 8, False))
    prepared = prepare(accelerator, model, optimizer, loader, scheduler)
    assert (scheduler.batch_size, scheduler.epoch_size) == (8, 20)
    assert [row[0] for row in epochs(accelerator, *prepared, count=2)] == [0, 8, 16, 20, 28, 36]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": Stream(26)}, r"no length.* Pass epoch_size=<samples per epoch>"),
        (
            {"recipe": {"batch_size": 5}},
            r"batch_size=5 was given, but .* 1 samples x 3 accumulation steps x 1 ranks = 3",
        ),
        ({"loader": {"batch_size": None}}, "no batch size"),
        ({"loader": {"drop_last": True}, "dataset": data(2)}, "2 samples, fewer than one global batch of 3"),
    ],
)
def test_what_cannot_be_derived_is_an_error_that_says_what_to_do(options: dict[str, Any], message: str) -> None:
    accelerator, *objects = job(3, **options)
    with pytest.raises(ValueError, match=message):
        prepare(accelerator, *objects)


def test_a_foreign_scheduler_is_refused() -> None:
    accelerator, model, optimizer, loader, _ = job()
    other = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    with pytest.raises(ValueError, match=r"scheduler must be a CyclicLRWithRestarts .* got StepLR"):
        prepare(accelerator, model, optimizer, loader, other)  # type: ignore[arg-type]


def test_an_engine_that_is_not_supported_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator, *objects = job()
    # Accelerate never enables FSDP on a CPU, so its word for the engine is replaced.
    monkeypatch.setattr(accelerator.state, "distributed_type", DistributedType.FSDP)
    with pytest.raises(ValueError, match="the engine FSDP is not supported yet"):
        prepare(accelerator, *objects)


def cannot_split(options: dict[str, Any]) -> None:
    accelerator, *objects = job(1, 27, **options)
    prepare(accelerator, *objects)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loader": {"batch_size": 7}, "config": {"split_batches": True}}, "nearest sizes that work: 6 and 9"),
        (
            {"loader": {"batch_size": 4}, "config": {"even_batches": False}},
            "even_batches=False gives 3 ranks different",
        ),
    ],
)
def test_batches_that_ranks_cannot_share_are_refused(options: dict[str, Any], message: str) -> None:
    for error in expect_error_on_all(3, cannot_split, options):
        assert message in error


def test_a_global_batch_may_be_given_if_it_is_right() -> None:
    accelerator, *objects = job(3, recipe={"batch_size": GlobalBatch(1, 3, 1)})
    assert prepare(accelerator, *objects)[3].batch_size == 3


def test_accumulation_changed_in_mid_run_is_counted() -> None:
    accelerator, *objects = job(1, 24)
    *prepared, scheduler = prepare(accelerator, *objects)
    accelerator.gradient_accumulation_steps = 4
    assert [row[0] for row in epochs(accelerator, *prepared, scheduler, count=1)] == [0, 4, 8, 12, 16, 20]
    assert scheduler.samples == 24


def test_another_loader_is_counted_by_the_nominal_rule() -> None:
    accelerator, *objects = job(1, 22, loader={"batch_size": 4})
    model, optimizer, loader, scheduler = prepare(accelerator, *objects)
    other = accelerator.prepare(DataLoader(data(9), batch_size=3))
    assert [row[0] for row in epochs(accelerator, model, optimizer, other, scheduler, count=1)] == [0, 4, 8]
    list(epochs(accelerator, model, optimizer, loader, scheduler, count=1))
    assert scheduler.samples == 12 + 22


def test_a_short_accumulation_with_drop_last_is_counted_and_said() -> None:
    accelerator, *objects = job(4, 22, loader={"batch_size": 2, "drop_last": True})
    with pytest.warns(UserWarning, match=r"11 micro-batches, and the last 3 .* accumulation of 6 samples beyond the"):
        prepared = prepare(accelerator, *objects)
    assert prepared[3].epoch_size == 16
    assert [row[0] for row in epochs(accelerator, *prepared, count=2)] == [0, 8, 16, 22, 30, 38]


def test_a_scheduler_of_another_optimizer_is_refused() -> None:
    accelerator, model, _, loader, scheduler = job()
    with pytest.raises(ValueError, match="the scheduler drives another DistAdamW than the one given here"):
        prepare(accelerator, model, DistAdamW(model.parameters()), loader, scheduler)


# ---------------------------------------------------------------- clipping


def clipped_by_accelerate(max_norm: float) -> None:
    accelerator, *objects = job(2, 48, loader={"batch_size": 4}, optimizer={"eps": 0.1})
    model, optimizer, loader, _ = prepare(accelerator, *objects)
    twin = model_of_two_layers()
    reference = torch.optim.AdamW(twin.parameters(), lr=1e-2, eps=0.1, fused=True)
    for x, y in loader:
        with accelerator.accumulate(model):
            accelerator.backward(nn.functional.mse_loss(model(x), y))
            if accelerator.sync_gradients:
                grads = [p.grad.clone() for p in model.parameters()]  # type: ignore[union-attr]
                norm = accelerator.clip_grad_norm_(model.parameters(), max_norm)
                expected = torch.stack([g.norm() for g in grads]).norm()
                torch.testing.assert_close(norm, expected, rtol=1e-6, atol=0)
                for q, p in zip(twin.parameters(), model.parameters(), strict=True):
                    q.grad = p.grad.clone()  # type: ignore[union-attr]
                for ours, theirs in zip(optimizer.param_groups, reference.param_groups, strict=True):
                    theirs.update({k: ours[k] for k in ("lr", "weight_decay")})
                reference.step()
            optimizer.step()
            optimizer.zero_grad()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("world_size", [1, 3])
def test_accelerates_own_clipping_is_right(world_size: int) -> None:
    run_ranks(world_size, clipped_by_accelerate, 0.1)


# ---------------------------------------------------------------- agreement


def disagree_at_prepare(what: str) -> None:
    odd = dist.get_rank() == 1
    options: dict[str, Any] = {
        "lr": {"optimizer": {"lr": 2e-2 if odd else 1e-2}},
        "betas": {"optimizer": {"betas": (0.8 if odd else 0.9, 0.999)}},
        "period": {"recipe": {"restart_period": 3 if odd else 2}},
        "epoch": {"recipe": {"epoch_size": 90 if odd else 100}},
        "width": {"width": 20},
    }[what]
    accelerator, *objects = job(**options)
    prepare(accelerator, *objects)


@pytest.mark.parametrize(
    ("what", "field"),
    [
        (
            "lr",
            "groups (lr, min_lr, weight_decay) is [[0.01, 1e-05, 0.05]] on rank 0 and [[0.02, 1e-05, 0.05]] on rank 1",
        ),
        ("betas", "'betas': [0.8, 0.999]"),
        ("period", "restart_period is 2 on rank 0 and 3 on rank 1"),
        ("epoch", "epoch_size is 100 on rank 0 and 90 on rank 1"),
    ],
)
def test_ranks_that_differ_at_prepare_all_raise(what: str, field: str) -> None:
    for error in expect_error_on_all(3, disagree_at_prepare, what):
        assert error.startswith("AgreementError: rank 1 disagrees with rank 0: ")
        assert field in error


def wrong_on_one_rank() -> None:
    accelerator, *objects = job(recipe={"batch_size": 5 if dist.get_rank() == 1 else 3})
    prepare(accelerator, *objects)


def test_what_is_wrong_on_one_rank_is_raised_on_all() -> None:
    for error in expect_error_on_all(3, wrong_on_one_rank):
        assert error.startswith("ValueError: batch_size=5 was given, but")
        assert error.endswith("(rank 1)")


def diverge(what: str) -> None:
    accelerator, *objects = job(length=24)
    model, optimizer, loader, scheduler = prepare(accelerator, *objects)
    update = 0
    for _ in range(2):
        for x, y in loader:
            accelerator.backward(nn.functional.mse_loss(model(x), y))
            odd = dist.get_rank() == 2 and update == 3
            if odd and what == "lr":
                optimizer.param_groups[0]["lr"] *= 2
            if odd and what == "eps":
                optimizer.param_groups[0]["eps"] = 1e-6
            optimizer.step()
            scheduler.step(samples=2 if odd and what == "samples" else 3)
            optimizer.zero_grad()
            update += 1
            assert update <= 5, "nobody noticed for two updates"


@pytest.mark.parametrize(
    ("what", "field"), [("lr", "lr is ["), ("eps", "'eps': 1e-06"), ("samples", "samples is 12 on")]
)
def test_ranks_that_diverge_later_all_raise(what: str, field: str) -> None:
    for error in expect_error_on_all(3, diverge, what):
        assert error.startswith("AgreementError: rank 2 disagrees with rank 0: ")
        assert field in error


# ---------------------------------------------------------------- save_state, load_state


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def save_then_go_on(
    folder: str, accumulation: int, save_at: int, bucket_numel: int = 1
) -> tuple[list[Row], list[Tensor]]:
    options = {"bucket_numel": bucket_numel}  # 1: every rank owns several runs of a parameter
    accelerator, *objects = job(accumulation, 48, loader={"batch_size": 2}, optimizer=options)
    prepared = prepare(accelerator, *objects)
    rows = []
    for i, row in enumerate(epochs(accelerator, *prepared, count=4)):
        rows.append(row)
        if i + 1 == save_at:
            accelerator.save_state(folder)
    return rows[save_at:], weights(prepared[0])


def load_and_go_on(folder: str, accumulation: int, done: int) -> tuple[list[Row], list[Tensor], int]:
    accelerator, *objects = job(accumulation, 48, loader={"batch_size": 2})
    prepared = prepare(accelerator, *objects)
    accelerator.load_state(folder)
    model, optimizer, loader, scheduler = prepared
    per_epoch = 48 // scheduler.batch_size  # type: ignore[operator]
    rest = accelerator.skip_first_batches(loader, done % per_epoch * accumulation)
    rows = list(epochs(accelerator, model, optimizer, rest, scheduler, count=1))
    rows += epochs(accelerator, *prepared, count=4 - done // per_epoch - 1)
    return rows, weights(model), objects[1].state_bytes  # type: ignore[union-attr]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("bucket_numel", [1, 1 << 23])
def test_a_resumed_run_has_the_bits_of_one_never_stopped(world_size: int, bucket_numel: int, tmp_path: Path) -> None:
    accumulation = 6 // world_size
    gone_on = run_ranks(world_size, save_then_go_on, str(tmp_path), accumulation, 6, bucket_numel)
    resumed = run_ranks(world_size, load_and_go_on, str(tmp_path), accumulation, 6)
    for (rows, end), (rows_again, end_again, _) in zip(gone_on, resumed, strict=True):
        assert rows_again == rows
        assert all(torch.equal(a, b) for a, b in zip(end, end_again, strict=True))


@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 2), (2, 1)])
def test_resuming_on_another_number_of_ranks(before: int, after: int, tmp_path: Path) -> None:
    gone_on = run_ranks(before, save_then_go_on, str(tmp_path), 6 // before, 6)[0]
    for rows, end, _ in run_ranks(after, load_and_go_on, str(tmp_path), 6 // after, 6):
        assert rows == gone_on[0]
        for a, b in zip(gone_on[1], end, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)  # gradients are averaged in another order


def test_shares_on_disk_are_a_whole(tmp_path: Path) -> None:
    run_ranks(3, save_then_go_on, str(tmp_path), 2, 6)
    folder = tmp_path / "dist_adamw"
    index = json.loads((folder / "index.json").read_text())
    assert sorted(p.name for p in folder.iterdir()) == [
        "index.json",
        *(f"share-{r:05d}-of-00003.safetensors" for r in range(3)),
    ]
    covered: dict[str, list[list[int]]] = {}
    for share in index["shares"]:
        for name, entry in share["entries"].items():
            covered.setdefault(name, []).extend(entry["ranges"])
    assert sorted(covered) == sorted(index["parameters"])
    for name, ranges in covered.items():
        edges = sorted(map(tuple, ranges))
        assert edges[0][0] == 0
        assert edges[-1][1] == math.prod(index["parameters"][name]["shape"])
        assert all(a[1] == b[0] for a, b in itertools.pairwise(edges))
    # rank 0's own file has no moments, so nobody takes a third for the whole
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.load(tmp_path / "optimizer.bin", weights_only=True)["state"] == {}


def load_only(folder: str, width: int) -> str:
    accelerator, *objects = job(2, 48, loader={"batch_size": 2}, width=width)
    model, _optimizer, *_ = prepare(accelerator, *objects)
    before = weights(model)
    try:
        accelerator.load_state(folder)
    except ValueError as error:
        assert all(torch.equal(a, b) for a, b in zip(before, weights(model), strict=True)), "something was loaded"
        assert not objects[1].state, "something was loaded"  # type: ignore[union-attr]
        return f"{type(error).__name__}: {error}"
    return "loaded"


def damage(folder: Path, how: str) -> None:
    share = folder / "dist_adamw" / "share-00001-of-00002.safetensors"
    index = folder / "dist_adamw" / "index.json"
    content = bytearray(share.read_bytes())
    if how == "truncated":
        share.write_bytes(content[:-7])
    elif how == "flipped":
        content[-3] ^= 4
        share.write_bytes(content)
    elif how == "missing":
        share.unlink()
    elif how == "no index":
        index.unlink()
    elif how == "torn index":
        index.write_text(index.read_text()[:-20])
    elif how == "version":
        index.write_text(index.read_text().replace('"version": 1', '"version": 99'))
    elif how == "outside":
        index.write_text(index.read_text().replace('"share-00000', '"../share-00000'))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("truncated", "share-00001-of-00002.safetensors is damaged: it has"),
        ("flipped", "share-00001-of-00002.safetensors is damaged: it has"),
        ("missing", "share-00001-of-00002.safetensors cannot be read"),
        ("no index", "is not a whole checkpoint: index.json is missing"),
        ("torn index", "index.json is damaged"),
        ("version", "has version 99; this release reads version 1"),
        ("outside", "names a file outside its folder: '../share-00000-of-00002.safetensors'"),
    ],
)
def test_a_damaged_checkpoint_is_named_on_every_rank(how: str, message: str, tmp_path: Path) -> None:
    run_ranks(2, save_then_go_on, str(tmp_path), 2, 2)
    damage(tmp_path, how)
    for world_size in (2, 1):
        for error in run_ranks(world_size, load_only, str(tmp_path), 20):
            assert error.startswith("CheckpointError: ")
            assert message in error


def test_a_checkpoint_of_another_model_is_named(tmp_path: Path) -> None:
    run_ranks(2, save_then_go_on, str(tmp_path), 2, 2)
    for error in run_ranks(2, load_only, str(tmp_path), 21):
        assert "is a checkpoint of another model: 0.weight is {'shape': [20, 6]" in error
    assert run_ranks(2, load_only, str(tmp_path), 20) == ["loaded", "loaded"]


def test_moments_that_lie_elsewhere_are_not_forgotten_in_silence(tmp_path: Path) -> None:
    run_ranks(1, save_then_go_on, str(tmp_path), 2, 2)
    shutil.rmtree(tmp_path / "dist_adamw")
    optimizer = DistAdamW(model_of_two_layers().parameters())
    with pytest.raises(ValueError, match="has no moments: they are in a folder beside it"):
        optimizer.load_state_dict(torch.load(tmp_path / "optimizer.bin", weights_only=True))


def save_where_one_rank_cannot(folder: str) -> None:
    accelerator, *objects = job(2, 48)
    prepared = prepare(accelerator, *objects)
    next(iter(epochs(accelerator, *prepared, count=1)))
    accelerator.save_state(folder)


def test_a_folder_that_cannot_be_written_is_an_error_on_every_rank(tmp_path: Path) -> None:
    (tmp_path / "dist_adamw").write_text("a file where the folder should be")
    for error in expect_error_on_all(2, save_where_one_rank_cannot, str(tmp_path)):
        assert error.startswith("CheckpointError: ")
        assert "FileExistsError" in error


def prepare_then_save(folder: str, how: str) -> int:
    """Save before the first update of a job that has state all the same."""
    accelerator, model, adamw, loader, scheduler = job(1, 24)
    for p in adamw.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    if how == "updated before":
        scheduler.epoch_size, scheduler.batch_size = 24, dist.get_world_size()
        adamw.step()
    elif how == "loaded torch":
        source = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.05)
        source.step()
        adamw.load_state_dict(source.state_dict())
    elif how == "loaded share":
        other = DistAdamW(model.parameters(), lr=1e-2, weight_decay=0.05)
        other.step()
        adamw.load_state_dict(other.state_dict())
    prepared = prepare(accelerator, model, adamw, loader, scheduler)
    accelerator.save_state(folder)
    adamw.state.clear()
    adamw._reset()
    accelerator.load_state(folder)
    del prepared
    return adamw.updates


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("how", ["updated before", "loaded torch", "loaded share"])
def test_saving_before_the_first_update_keeps_what_was_loaded(how: str, world_size: int, tmp_path: Path) -> None:
    assert run_ranks(world_size, prepare_then_save, str(tmp_path), how) == [1] * world_size


def prepare_again_after_free_memory(folder: str) -> None:
    accelerator, *objects = job(2, 48)
    prepare(accelerator, *objects)
    forgotten = objects[1]
    accelerator.free_memory()
    accelerator.step = 0
    _, *objects = job(2, 48)
    prepared = prepare(accelerator, *objects)
    next(iter(epochs(accelerator, *prepared, count=1)))
    accelerator.save_state(folder)
    assert (Path(folder) / "dist_adamw" / "index.json").exists()
    assert not forgotten._saved_apart, "what Accelerate forgot was saved too"  # type: ignore[union-attr]
    accelerator.load_state(folder)
    assert objects[1].updates == 1  # type: ignore[union-attr]


def test_preparing_again_after_free_memory(tmp_path: Path) -> None:
    run_ranks(2, prepare_again_after_free_memory, str(tmp_path))


def save_that_fails(folder: str) -> None:
    accelerator, *objects = job(1, 24)
    prepared = prepare(accelerator, *objects)
    rows = epochs(accelerator, *prepared, count=1)
    next(rows)

    def fail(*_: object) -> None:
        raise OSError("no space left")

    hook = accelerator.register_save_state_pre_hook(fail)
    with pytest.raises(OSError, match="no space left"):
        accelerator.save_state(folder)
    hook.remove()
    next(rows)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert objects[1].state_dict()["state"], "a later state dict lost the moments"  # type: ignore[union-attr]


def test_a_save_that_failed_leaves_state_dicts_whole(tmp_path: Path) -> None:
    run_ranks(2, save_that_fails, str(tmp_path))


def load_where_one_rank_sees_nothing(folder: str) -> None:
    accelerator, *objects = job(2, 48, loader={"batch_size": 2})
    prepare(accelerator, *objects)
    accelerator.load_state(folder if dist.get_rank() == 0 else folder + "-elsewhere")


def test_a_folder_that_one_rank_does_not_see_is_an_error_on_all(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    run_ranks(2, save_then_go_on, str(folder), 2, 2)
    shutil.copytree(folder, tmp_path / "checkpoint-elsewhere", ignore=shutil.ignore_patterns("dist_adamw"))
    for error in expect_error_on_all(2, load_where_one_rank_sees_nothing, str(folder)):
        assert "is there on some ranks and missing on rank 1" in error


def conv_job(folder: str, memory_format: torch.memory_format, save: bool) -> str:
    accelerator = Accelerator()
    model = nn.Conv2d(3, 4, 3).to(memory_format=memory_format)
    optimizer = DistAdamW(model.parameters(), lr=1e-2)
    scheduler = CyclicLRWithRestarts(optimizer, **RECIPE)
    loader = DataLoader(TensorDataset(torch.randn(8, 3, 5, 5)), batch_size=2)
    model_, optimizer_, loader_, _ = prepare(accelerator, model, optimizer, loader, scheduler)
    if not save:
        with pytest.raises(ValueError) as raised:  # noqa: PT011
            accelerator.load_state(folder)
        return str(raised.value)
    for (x,) in loader_:
        accelerator.backward(model_(x).square().mean())
        optimizer_.step()
        scheduler.step()
        optimizer_.zero_grad()
    accelerator.save_state(folder)
    return ""


def test_a_checkpoint_in_another_memory_format_is_refused(tmp_path: Path) -> None:
    run_ranks(2, conv_job, str(tmp_path), torch.channels_last, True)
    for text in run_ranks(2, conv_job, str(tmp_path), torch.contiguous_format, False):
        assert "'axes in memory': [0, 2, 3, 1]" in text
