"""Workloads: modules whose backward passes only make gradients.

A layer's backward multiplies a stored tensor by a number (or returns what lies in memory, see `Gradients`), so that
what remains of a training step is the engine's own work: hooks, gradient synchronisation, AdamW, parameter
synchronisation.
Layers are chained, so gradients arrive last layer first and one layer at a time, as in training.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.groups import Group, parameter_groups

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
    "tiny": _gpt(layers=2, width=32, context=32),  # to try things out
}
TITLES = {
    "gpt": "GPT of 25M parameters",
    "many": "4,000 tensors of 1,024 elements",
    "embedding": "40,000 x 512 embedding beside 16 square layers",
}
ALLOCATED, KEPT, CONSTANT = "allocated", "kept", "constant"


class Gradients:
    """This rank's gradients in a workload: `ALLOCATED`, `KEPT` or `CONSTANT`.

    Args:
        layers: Shapes by layer.
        seed: Another one on every rank.
        kind: ``allocated``: each backward computes them into new tensors, as a stored tensor times a number, and they
            live as long as the engine keeps them, as in training. ``kept``: they lie in memory that stays, so backward
            neither computes nor allocates. ``constant``: as the first, all equal, without a stored tensor (for peak
            memory, and if only the host's time counts).
    """

    def __init__(self, layers: Sequence[Sequence[Shape]], *, seed: int, kind: str) -> None:
        if kind not in (ALLOCATED, KEPT, CONSTANT):
            raise ValueError(f"gradients must be {ALLOCATED}, {KEPT} or {CONSTANT}, got {kind!r}")
        self.kind = kind
        self._shapes = layers
        self._factor = self._value = 1.0 + seed
        self._stored: list[list[Tensor]] = []
        if kind != CONSTANT:
            numel = sum(_numel(shape) for layer in layers for shape in layer)
            self._base = torch.randn(numel, generator=torch.Generator().manual_seed(1000 + seed))
            self._flat = self._base.clone() if kind == KEPT else self._base
            self._stored = _views(self._flat, layers)

    def refill(self, update: int) -> None:
        """Set the values of ``update``; engines may have overwritten the last ones."""
        self._factor = 1.0 + 0.25 * (update % 3)
        if self.kind == KEPT:
            torch.mul(self._base, self._factor, out=self._flat)

    def flat(self) -> Tensor:
        """Return all gradients of this rank, 1-D; not of constant ones."""
        return self._base * self._factor

    def of(self, layer: int, places: slice) -> list[Tensor]:
        """Return gradients of one layer, as new tensor objects, so that autograd takes them without a copy.

        Args:
            places: Of which of its parameters.
        """
        if self.kind == CONSTANT:
            return [torch.full(shape, self._value) for shape in self._shapes[layer][places]]
        if self.kind == KEPT:
            return [grad.view_as(grad) for grad in self._stored[layer][places]]
        return list(torch._foreach_mul(self._stored[layer][places], self._factor))


class _Hand(torch.autograd.Function):
    """Return the input, and in backward the parameters' gradients: an ordinary node."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, grads: Callable[[], list[Tensor]], *params: Tensor) -> Tensor:
        ctx.grads = grads
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *out: Tensor) -> tuple[Tensor | None, ...]:
        return (out[0], None, *ctx.grads())


_NODE_NUMEL = 1 << 16


def _nodes(shapes: Sequence[Shape]) -> list[slice]:
    """Divide a layer's parameters among autograd's nodes: one for each matrix, and the small tensors before it."""
    nodes, start, numel = [], 0, 0
    for i, shape in enumerate(shapes, 1):
        numel += _numel(shape)
        if numel >= _NODE_NUMEL or i == len(shapes):
            nodes.append(slice(start, i))
            start, numel = i, 0
    return nodes


class Layer(nn.Module):
    """A layer with parameters and prepared gradients, which arrive matrix by matrix."""

    def __init__(self, index: int, shapes: Sequence[Shape], gradients: Gradients, generator: torch.Generator) -> None:
        super().__init__()
        self._nodes = [(places, functools.partial(gradients.of, index, places)) for places in _nodes(shapes)]
        for i, shape in enumerate(shapes):
            self.register_parameter(f"p{i}", nn.Parameter(torch.randn(shape, generator=generator) * 0.02))

    def forward(self, x: Tensor) -> Tensor:
        params = list(self._parameters.values())
        for places, gradients in self._nodes:
            x = _Hand.apply(x, gradients, *params[places])
        return x


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
    groups: str = "one"

    @classmethod
    def named(cls, name: str, *, rank: int, gradients: str = ALLOCATED, groups: str = "one") -> Workload:
        """Return the workload ``name``, with the gradients of ``rank``."""
        return cls.of(name, WORKLOADS[name], rank=rank, gradients=gradients, groups=groups)

    @classmethod
    def of(
        cls, name: str, layers: list[list[Shape]], *, rank: int, gradients: str = ALLOCATED, groups: str = "one"
    ) -> Workload:
        """Return a workload of the given shapes."""
        return cls(name, layers, Gradients(layers, seed=rank, kind=gradients), groups)

    @property
    def numel(self) -> int:
        return sum(_numel(shape) for layer in self.layers for shape in layer)

    def model(self) -> Model:
        return Model(self.layers, self.gradients)

    def parameter_groups(self, model: Model) -> list[Group]:
        """Return the groups of a model of this workload, as it is wrapped now."""
        return parameter_groups([list(layer.parameters()) for layer in model.layers], self.groups)


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
