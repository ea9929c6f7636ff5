"""The models that `benchmarks.plan_accuracy` measures: each has ``blocks`` and returns its loss."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.models import GPT, Block


class Uneven(nn.Module):
    """Layers whose rows divide by no number of ranks, with a frozen one and a tied one; called with rows."""

    def __init__(self) -> None:
        super().__init__()
        self.tied = nn.Linear(389, 389, bias=False)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(389, 1031), nn.Linear(1031, 389)) for _ in range(5))
        self.again, self.frozen = nn.Linear(389, 389, bias=False), nn.Linear(389, 211)
        self.again.weight = self.tied.weight
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.tied(x)
        for block in self.blocks:
            x = x + block(x)
        return self.frozen(self.again(x)).square().mean()


class Tied(nn.Module):
    """A GPT whose embedding, half of its parameters, is also its head; called with tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(8192, 192)
        self.blocks = nn.ModuleList(Block(192) for _ in range(4))
        self.head = nn.Linear(192, 8192, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens[:, :-1])
        for block in self.blocks:
            x = block(x)
        return functional.cross_entropy(self.head(x).flatten(0, 1), tokens[:, 1:].flatten())


class Small(nn.Module):
    """Many small tensors: 250 of at most 32,768 elements; called with rows."""

    def __init__(self) -> None:
        super().__init__()
        make = lambda: nn.Sequential(nn.LayerNorm(128), nn.Linear(128, 256), nn.GELU(), nn.Linear(256, 128))  # noqa: E731
        self.blocks = nn.ModuleList(make() for _ in range(40))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x.square().mean()


def _tokens() -> Tensor:
    return torch.zeros(1, 3, dtype=torch.long)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "GPT": (lambda: GPT(6, 256, 8), _tokens),
    "uneven": (Uneven, lambda: torch.ones(1, 389)),
    "wide": (lambda: GPT(2, 512, 8), _tokens),
    "tied": (Tied, _tokens),
    "small": (Small, lambda: torch.ones(1, 128)),
}
