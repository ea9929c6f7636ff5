"""Trainer's clock counts the rows that were trained on: samplers, callbacks, evaluation, resumes, short windows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Sampler
from transformers import TrainerCallback

from dist_adamw import prepare_trainer
from tests.distributed.test_trainer import Network, Noting, Samples, arguments_on
from tests.ranks import run_ranks

FITS: dict[str, Any] = {"restart_period": 1, "t_mult": 1}
ENGINES = {1: "single", 2: "DDP"}
EVALUATE = {"eval_strategy": "steps", "eval_steps": 1, "label_names": ["y"], "prediction_loss_only": True}
SAVE: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}


class Drawn(Noting):
    """A sampler that draws some rows twice."""

    count = 14

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        class Repeats(Sampler[int]):
            def __iter__(self) -> Iterator[int]:
                return (i % 10 for i in range(Drawn.count))

            def __len__(self) -> int:
                return Drawn.count

        return Repeats()


class StopEpoch(TrainerCallback):
    """Leaves the first epoch after some updates, or in the middle of one."""

    def __init__(self, update: int) -> None:
        self.update = update

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_epoch_stop = state.global_step == self.update


class StopInside(TrainerCallback):
    """After the first micro-batch of the second update."""

    done = 0

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 1 and not self.done:
            self.done += 1
            control.should_epoch_stop = True


class Stream(IterableDataset[Any]):
    def __init__(self, size: int) -> None:
        self.rows = Samples(size)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return (self.rows[i] for i in range(len(self.rows)))


class Counts(TrainerCallback):
    def __init__(self) -> None:
        self.after: list[int] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        scheduler = objects["lr_scheduler"]
        self.after.append(getattr(scheduler, "scheduler", scheduler).samples)


def clock(
    folder: str,
    ranks: int,
    size: int,
    *,
    micro: int = 4,
    accumulation: int = 1,
    kind: type[Noting] = Noting,
    callbacks: Callable[[], list[Any]] = list,
    data: Callable[[int], Any] = Samples,
    recipe: dict[str, Any] | None = None,
    resume: str | None = None,
    **options: Any,
) -> list[int]:
    """The clock after each update."""
    AcceleratorState._reset_state(reset_partial_state=True)
    counts = Counts()
    told = {"num_train_epochs": 2, "per_device_train_batch_size": micro // ranks, **options}
    with arguments_on(ENGINES[ranks], folder, 1, gradient_accumulation_steps=accumulation, **told) as args:
        trainer = kind(Network(), args, train_dataset=data(size), eval_dataset=Samples(7))
        for callback in (*callbacks(), counts):
            trainer.add_callback(callback)
        prepare_trainer(trainer, scheduler={**FITS, **(recipe or {})})
        trainer.train(resume_from_checkpoint=resume)
    return counts.after


CASES: dict[str, tuple[int, dict[str, Any], list[int]]] = {
    "plain": (10, {}, [4, 8, 10, 14, 18, 20]),
    "accumulation, a short last window": (22, {"accumulation": 4}, [16, 22, 38, 44]),
    "drop_last": (10, {"dataloader_drop_last": True}, [4, 8, 12, 16]),
    "a sampler that draws 14 of 10": (10, {"kind": Drawn, "max_steps": 5}, [4, 8, 12, 14, 18]),
    "should_epoch_stop": (10, {"callbacks": lambda: [StopEpoch(2)]}, [4, 8, 12, 16, 18]),
    "should_epoch_stop inside an update": (
        24,
        {"accumulation": 2, "callbacks": lambda: [StopInside()]},
        [8, 20, 28, 36],  # the gradient of the micro-batch that was trained on is in the next update
    ),
    "evaluation at every update": (10, EVALUATE, [4, 8, 10, 14, 18, 20]),
    "evaluation with accumulation": (22, {"accumulation": 4, **EVALUATE}, [16, 22, 38, 44]),
    "the best model at the end": (
        10,
        {**EVALUATE, **SAVE, "load_best_model_at_end": True, "eval_steps": 2, "save_steps": 2},
        [4, 8, 10, 14, 18, 20],
    ),
    "data without a length": (
        10,
        {"data": Stream, "max_steps": 6, "recipe": {"epoch_size": 10}},
        [4, 8, 10, 14, 18, 20],
    ),
    "group_by_length": (10, {"train_sampling_strategy": "random"}, [4, 8, 10, 14, 18, 20]),
}


def all_cases(folder: str, ranks: int) -> dict[str, list[int]]:
    found = {}
    for name, (size, options, _) in CASES.items():
        found[name] = clock(f"{folder}/{name}", ranks, size, **options)
    return found


@pytest.mark.parametrize("ranks", [1, 2])
def test_rows_are_counted_that_were_trained_on(ranks: int, tmp_path: Path) -> None:
    for found in run_ranks(ranks, all_cases, str(tmp_path), ranks):
        assert found == {name: expected for name, (_, _, expected) in CASES.items()}


def resumed(folder: str, ranks: int) -> list[list[int]]:
    """From update 2 of 3: skipped batches, no skipping, and a checkpoint at an epoch's end."""
    clock(folder, ranks, 22, accumulation=2, **SAVE)
    found = []
    cases: list[tuple[int, dict[str, Any]]] = [(2, {}), (2, {"ignore_data_skip": True}), (4, {})]
    for resume, options in cases:
        checkpoint = f"{folder}/checkpoint-{resume}"
        found.append(clock(folder, ranks, 22, accumulation=2, resume=checkpoint, **options))
    return found


@pytest.mark.parametrize("ranks", [1, 2])
def test_after_a_resume(ranks: int, tmp_path: Path) -> None:
    for skipped, again, later in run_ranks(ranks, resumed, str(tmp_path), ranks):
        assert skipped == [22, 30, 38, 44]
        assert again[:1] == [24]  # the epoch begins again: a whole batch
        assert later == [38, 44]


class OutOfMemory(Noting):
    failed = False

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        if self._train_batch_size > 4 and not self.failed and self.state.global_step == 1:
            self.failed = True
            raise RuntimeError("CUDA out of memory.")
        return super().training_step(*args, **kwargs)


def found_batch_size(folder: str) -> list[int]:
    return clock(folder, 1, 10, micro=8, kind=OutOfMemory, auto_find_batch_size=True)


def test_auto_find_batch_size(tmp_path: Path) -> None:
    (found,) = run_ranks(1, found_batch_size, str(tmp_path))
    assert found[0] == 8
    step = found[1]
    assert found[1:] == [min(step * k, 10) for k in range(1, -(-10 // step) + 1)] + [
        10 + min(step * k, 10) for k in range(1, -(-10 // step) + 1)
    ]


class OwnLoader(Noting):
    """Batches of 2, whatever the arguments say."""

    def get_train_dataloader(self) -> Any:
        data: Any = self.train_dataset
        return self.accelerator.prepare(DataLoader(data, batch_size=2, collate_fn=self.data_collator))


def own_loader(folder: str, ranks: int) -> list[int]:
    told = {"batch_size": 2 * ranks, "epoch_size": 10}
    with pytest.raises(ValueError, match=f"batches of {2 * ranks} .* of 10.* 8 and 10"):
        clock(folder, ranks, 10, micro=8, kind=OwnLoader)
    return clock(folder, ranks, 10, micro=8, kind=OwnLoader, recipe=told)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_loader_of_the_subclass(ranks: int, tmp_path: Path) -> None:
    expected = [*range(2, 22, 2)] if ranks == 1 else [4, 8, 10, 14, 18, 20]
    assert run_ranks(ranks, own_loader, str(tmp_path), ranks) == [expected] * ranks
