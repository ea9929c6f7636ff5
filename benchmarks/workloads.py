"""Workloads: modules whose forward and backward passes cost almost nothing.

A layer's backward returns prepared gradients, so that what remains of a training
step is the engine's own work: hooks, gradient synchronisation, AdamW, parameter synchronisation.
Layers are chained, so gradients arrive last layer first and one layer at a time, as in training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Shape = tuple[int, ...]


def _gpt(layers: int = 8, width: int = 512, vocabulary: int = 256, context: int = 512) -> list[list[Shape]]:
    w = width
    norm: list[Shape] = [(w,), (w,)]
    block: list[Shape] = [*norm, (3 * w, w), (3 * w,), (w, w), (w,), *norm, (4 * w, w), (4 * w,), (w, 4 * w), (w,)]
    embeddings: list[Shape] = [(vocabulary, w), (context, w)]
    return [embeddings, *(block for _ in range(layers)), norm]


_SQUARE: list[Shape] = [(512, 512)]
# Shapes by layer.
WORKLOADS: dict[str, list[list[Shape]]] = {
    "gpt": _gpt(),
    "many": [[(1024,)] * 32] * 125,
    "embedding": [[(40_000, 512)], *[_SQUARE] * 16],
}
TITLES = {
    "gpt": "GPT of 25M parameters",
    "many": "4,000 tensors of 1,024 elements",
    "embedding": "40,000 x 512 embedding beside 16 square layers",
}


class Gradients:
    """This rank's gradients in a workload.

    Args:
        layers: Shapes by layer.
        seed: Another one on every rank.
        kept: True: gradients lie in memory that stays (nothing is allocated or computed in
            backward: for timing). False: each backward allocates them, and they live as long as
            the engine keeps them, as in training (for peak memory); their values are all equal.
    """

    def __init__(self, layers: Sequence[Sequence[Shape]], *, seed: int, kept: bool = True) -> None:
        self._shapes = layers
        self._given: list[list[Tensor]] = []
        self._value = 1.0 + seed
        if kept:
            numel = sum(_numel(shape) for layer in layers for shape in layer)
            self._base = torch.randn(numel, generator=torch.Generator().manual_seed(1000 + seed))
            self._flat = self._base.clone()
            self._given = _views(self._flat, layers)

    def refill(self, update: int) -> None:
        """Write the gradients of ``update``; engines may have overwritten the last ones."""
        if self._given:
            torch.mul(self._base, 1.0 + 0.25 * (update % 3), out=self._flat)

    def flat(self) -> Tensor:
        """Return all gradients of this rank, 1-D; only if they are kept."""
        return self._flat

    def of(self, layer: int) -> list[Tensor]:
        """Return gradients of one layer, as new tensor objects, so that autograd takes them without a copy."""
        if self._given:
            return [grad.view_as(grad) for grad in self._given[layer]]
        return [torch.full(shape, self._value) for shape in self._shapes[layer]]


class _Hand(torch.autograd.Function):
    """Return the input, and in backward the parameters' gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, grads: Callable[[], list[Tensor]], *params: Tensor) -> Tensor:
        ctx.grads = grads
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *out: Tensor) -> tuple[Tensor | None, ...]:
        return (out[0], None, *ctx.grads())


class Layer(nn.Module):
    """A layer with parameters and prepared gradients."""

    def __init__(self, index: int, shapes: Sequence[Shape], gradients: Gradients, generator: torch.Generator) -> None:
        super().__init__()
        self._grads = lambda: gradients.of(index)
        for i, shape in enumerate(shapes):
            self.register_parameter(f"p{i}", nn.Parameter(torch.randn(shape, generator=generator) * 0.02))

    def forward(self, x: Tensor) -> Tensor:
        return _Hand.apply(x, self._grads, *self._parameters.values())


class Model(nn.Module):
    """A chain of a workload's layers, with the same weights on every rank and in every engine."""

    def __init__(self, layers: Sequence[Sequence[Shape]], gradients: Gradients) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.layers = nn.ModuleList(Layer(i, shapes, gradients, generator) for i, shapes in enumerate(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@dataclass(frozen=True, slots=True)
class Workload:
    """A named workload on this rank."""

    name: str
    layers: list[list[Shape]]
    gradients: Gradients

    @classmethod
    def named(cls, name: str, *, rank: int, kept: bool = True) -> Workload:
        """Return the workload ``name``, with the gradients of ``rank``."""
        return cls.of(name, WORKLOADS[name], rank=rank, kept=kept)

    @classmethod
    def of(cls, name: str, layers: list[list[Shape]], *, rank: int, kept: bool) -> Workload:
        """Return a workload of the given shapes."""
        return cls(name, layers, Gradients(layers, seed=rank, kept=kept))

    @property
    def numel(self) -> int:
        return sum(_numel(shape) for layer in self.layers for shape in layer)

    def model(self) -> Model:
        return Model(self.layers, self.gradients)


def _numel(shape: Shape) -> int:
    return torch.Size(shape).numel()


def _views(flat: Tensor, layers: Sequence[Sequence[Shape]]) -> list[list[Tensor]]:
    views, start = [], 0
    for layer in layers:
        row = []
        for shape in layer:
            row.append(flat[start : start + _numel(shape)].view(shape))
            start += _numel(shape)
        views.append(row)
    return views
