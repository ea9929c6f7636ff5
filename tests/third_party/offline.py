"""Data, a metric and a model in place of those that Accelerate's scripts download from the hub.

Modules ``datasets`` and ``evaluate`` with the few names that the scripts use, and a BERT of two small layers.
"""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
import transformers
from transformers import BatchEncoding, BertConfig, BertForSequenceClassification

Row = dict[str, Any]
WORDS = 60
ROWS = {"train": 80, "validation": 40}


class Rows(list[Row]):
    """One split."""

    def map(
        self, function: Callable[[Mapping[str, Sequence[Any]]], Mapping[str, Sequence[Any]]], drop: list[str]
    ) -> Rows:
        columns = function({name: [row[name] for row in self] for name in self[0]})
        return Rows(
            {**{n: v for n, v in row.items() if n not in drop}, **{n: columns[n][i] for n in columns}}
            for i, row in enumerate(self)
        )


class Splits(dict[str, Rows]):
    """A data set: the methods of ``datasets.DatasetDict`` that the scripts call."""

    def map(self, function: Any, batched: bool, remove_columns: list[str], load_from_cache_file: bool) -> Splits:
        return Splits({name: rows.map(function, remove_columns) for name, rows in self.items()})

    def rename_column(self, old: str, new: str) -> Splits:
        return Splits(
            {k: Rows({new if n == old else n: v for n, v in r.items()} for r in rows) for k, rows in self.items()}
        )


def load_dataset(*_: str) -> Splits:
    """Return pairs of sentences; the label says whether their first words are equal."""
    draw = random.Random(0)

    def pair(i: int) -> Row:
        first, second = ([draw.randrange(3, WORDS) for _ in range(draw.randrange(3, 9))] for _ in range(2))
        label = draw.randrange(2)
        second[0] = first[0] if label else second[0]
        return {"idx": i, "sentence1": first, "sentence2": second, "label": label}

    return Splits({name: Rows(pair(i) for i in range(count)) for name, count in ROWS.items()})


class Tokenizer:
    """Sentences are numbers of words already."""

    def __call__(self, first: Sequence[list[int]], second: Sequence[list[int]], **_: Any) -> dict[str, list[list[int]]]:
        ids = [[1, *a, 2, *b, 2] for a, b in zip(first, second, strict=True)]
        return {"input_ids": ids, "attention_mask": [[1] * len(one) for one in ids]}

    def pad(self, examples: Sequence[Row], **_: Any) -> BatchEncoding:
        longest = max(len(row["input_ids"]) for row in examples)

        def padded(name: str) -> torch.Tensor:
            return torch.tensor([row[name] + [0] * (longest - len(row[name])) for row in examples])

        labels = torch.tensor([row["labels"] for row in examples])
        return BatchEncoding({name: padded(name) for name in ("input_ids", "attention_mask")} | {"labels": labels})


class Accuracy:
    """The metric."""

    def __init__(self) -> None:
        self._right: list[bool] = []

    def add_batch(self, predictions: torch.Tensor, references: torch.Tensor) -> None:
        self._right += (predictions == references).tolist()

    def compute(self) -> dict[str, float]:
        right, self._right = self._right, []
        return {"accuracy": sum(right) / len(right)}


def _model(*_: Any, **__: Any) -> BertForSequenceClassification:
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    # The scripts compare accuracies before and after a resume exactly; they evaluate without dropout.
    return BertForSequenceClassification(BertConfig(vocab_size=WORDS, max_position_embeddings=32, **sizes))


@contextlib.contextmanager
def hub() -> Iterator[None]:
    """Let the scripts import and load what they would download."""
    modules = {}
    quiet = SimpleNamespace(set_verbosity_warning=lambda: None, set_verbosity_error=lambda: None)
    for name, contents in (
        ("datasets", {"load_dataset": load_dataset, "utils": SimpleNamespace(logging=quiet)}),
        ("evaluate", {"load": lambda *_: Accuracy()}),
    ):
        modules[name] = ModuleType(name)
        modules[name].__spec__ = ModuleSpec(name, None)
        vars(modules[name]).update(contents)
    with (
        mock.patch.dict(sys.modules, modules),
        mock.patch.object(transformers.AutoTokenizer, "from_pretrained", return_value=Tokenizer()),
        mock.patch.object(transformers.AutoModelForSequenceClassification, "from_pretrained", _model),
    ):
        yield
