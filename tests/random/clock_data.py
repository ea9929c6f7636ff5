"""The data of a random program: every row is its id, so that a batch shows which rows it has."""

from __future__ import annotations

import multiprocessing
import random
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

Spec = dict[str, Any]


class Rows(Dataset[Any]):
    """Row ``i`` is ``[i, 1]``. It may grow."""

    def __init__(self, rows: int, form: str) -> None:
        self.rows, self.form = rows, form

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> Any:
        return _row(index, self.form)


class Stream(IterableDataset[Any]):
    """The same rows in their order, without a length."""

    def __init__(self, rows: int, form: str) -> None:
        self.rows, self.form = rows, form

    def __iter__(self) -> Iterator[Any]:
        return (_row(index, self.form) for index in range(self.rows))


class SizedStream(Stream):
    """With a length, which may be wrong by ``lie``."""

    lie = 0

    def __len__(self) -> int:
        return self.rows + self.lie


class Uneven(BatchSampler):
    """Batches of 1 to ``batch`` rows, of the user's own making."""

    def __init__(self, rows: int, batch: int) -> None:
        self.batch_size, self.drop_last, self.batches = batch, False, []
        order = random.Random(rows * 100 + batch).sample(range(rows), rows)
        while order:
            size = 1 + (len(order) * 7 + batch) % batch
            self.batches.append(order[:size])
            order = order[size:]

    def __iter__(self) -> Iterator[list[int]]:
        return map(list, self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def _row(index: int, form: str) -> Any:
    values = torch.tensor([index, 1.0])
    if form == "tuple":
        return values, torch.tensor(0.0)
    if form == "dict":
        return {"y": torch.tensor(0.0), "nested": [{"x": values}]}
    return values


def _packed(rows: list[Tensor]) -> Tensor:
    """All rows of a batch in one sequence, as language models have them: its first size is 1."""
    return torch.cat(rows).unsqueeze(0)


def _as_they_are(rows: list[Tensor]) -> list[Tensor]:
    """A list of rows, as detection models have them: each tensor's first size is that of a row."""
    return rows


def dataset_of(spec: Spec) -> Any:
    if spec["kind"] == "map":
        return Rows(spec["rows"], spec["form"])
    if spec["kind"] == "stream":
        return Stream(spec["rows"], spec["form"])
    sized = SizedStream(spec["rows"], spec["form"])
    sized.lie = spec.get("lie", 0)
    return sized


def loader_of(spec: Spec, dataset: Any) -> DataLoader[Any]:
    """Data as a user would write it."""
    options: dict[str, Any] = {}
    if spec["form"] == "packed":
        options["collate_fn"] = _packed
    if spec["form"] == "list":
        options["collate_fn"] = _as_they_are
    if spec.get("workers"):
        multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  # as a job's rank
        options["num_workers"] = spec["workers"]
    if spec["kind"] != "map":
        return DataLoader(dataset, spec["batch"], drop_last=spec["drop_last"], **options)
    kind = spec["sampler"]
    if kind == "uneven batches":
        return DataLoader(dataset, batch_sampler=Uneven(len(dataset), spec["batch"]), **options)
    sampler: Any = None
    draws = draws_of(spec, len(dataset))
    if kind == "replacement":
        sampler = RandomSampler(dataset, replacement=True, num_samples=draws)
    elif kind == "weighted":
        sampler = WeightedRandomSampler([1.0 + i % 3 for i in range(len(dataset))], draws)
    elif kind == "subset":
        sampler = SubsetRandomSampler(range(0, len(dataset), 2))
    if spec.get("batch_sampler") and sampler is not None:
        return DataLoader(dataset, batch_sampler=BatchSampler(sampler, spec["batch"], spec["drop_last"]), **options)
    return DataLoader(
        dataset, spec["batch"], shuffle=kind == "shuffle", sampler=sampler, drop_last=spec["drop_last"], **options
    )


def draws_of(spec: Spec, rows: int) -> int:
    """Return the rows of one epoch: those of the user's sampler or data set, before Accelerate repeats any."""
    if spec["kind"] == "map" and spec["sampler"] in ("replacement", "weighted"):
        return spec["draws"]
    if spec["kind"] == "map" and spec["sampler"] == "subset":
        return -(-spec["rows"] // 2)  # the subset does not grow
    if spec["kind"] == "map" and spec["sampler"] == "uneven batches":
        return spec["rows"]
    return rows


def ids_of(batch: Any) -> list[int]:
    """The ids of a batch of any form."""
    return [int(i) for i in inputs_of(batch)[:, 0].tolist()]


def inputs_of(batch: Any) -> Tensor:
    """Rows of a batch of any form as one tensor, a row each."""
    if isinstance(batch, dict):
        return batch["nested"][0]["x"]
    if isinstance(batch, Tensor):
        return batch.reshape(-1, 2)
    if len(batch) == 2 and batch[0].ndim == 2:
        return batch[0]
    return torch.stack(tuple(batch))
