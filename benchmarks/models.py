"""Real models for whole training steps: a GPT, and a multilayer perceptron so small that only overhead counts.

Both return the loss when called, have ``blocks`` to shard one by one, and ``layers`` for layer-wise groups.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

VOCABULARY = 256
HEAD_WIDTH = 64


class Block(nn.Module):
    """A pre-norm transformer block with causal attention."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = max(1, width // HEAD_WIDTH)
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.attention_norm(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(self.mlp_norm(x))


class GPT(nn.Module):
    """A language model; called with tokens (batch, context + 1), it returns the mean loss of the next token."""

    def __init__(self, layers: int, width: int, context: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1] - 1
        x = self.tokens(tokens[:, :-1]) + self.positions(torch.arange(length))
        for block in self.blocks:
            x = block(x)
        return functional.cross_entropy(self.head(self.norm(x)).flatten(0, 1), tokens[:, 1:].flatten())

    def layers(self) -> list[list[nn.Parameter]]:
        """Return the parameters by layer."""
        first = [*self.tokens.parameters(), *self.positions.parameters()]
        last = [*self.norm.parameters(), *self.head.parameters()]
        return [first, *(list(block.parameters()) for block in self.blocks), last]


class Perceptron(nn.Module):
    """A chain of linear layers; called with rows (batch, width), it returns the mean square of its output."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = torch.tanh(block(x))
        return x.square().mean()

    def layers(self) -> list[list[nn.Parameter]]:
        """Return the parameters by layer."""
        return [list(block.parameters()) for block in self.blocks]
