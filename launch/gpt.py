"""A byte-level GPT: pre-norm blocks, learned positions, tied embedding."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 - everybody's name for it
from torch import Tensor, nn

BYTES = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Sizes of the GPT.

    Args:
        layers: Transformer blocks.
        heads: Attention heads in each block.
        width: Features of each position; a multiple of heads.
        context: Bytes of context; also the length of a sample.
        dropout: Probability of dropping a feature.
    """

    layers: int = 4
    heads: int = 4
    width: int = 128
    context: int = 128
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("layers", "heads", "width", "context"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name} must be above 0, got {getattr(self, name)}.")
        if self.width % self.heads:
            raise ValueError(f"model.width must be a multiple of model.heads={self.heads}, got {self.width}.")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"model.dropout must lie in [0, 1), got {self.dropout}.")


class Block(nn.Module):
    """Attention to earlier positions, then a two-layer perceptron, each added to the residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.dropout = config.dropout
        self.norm_attention = nn.LayerNorm(config.width)
        self.query_key_value = nn.Linear(config.width, 3 * config.width)
        self.attention_out = nn.Linear(config.width, config.width)
        self.norm_mlp = nn.LayerNorm(config.width)
        self.mlp_in = nn.Linear(config.width, 4 * config.width)
        self.mlp_out = nn.Linear(4 * config.width, config.width)

    def forward(self, stream: Tensor) -> Tensor:
        """Return the new stream; both are (samples, positions, width)."""
        stream = stream + self._drop(self.attention_out(self._attend(self.norm_attention(stream))))
        hidden = F.gelu(self.mlp_in(self.norm_mlp(stream)), approximate="tanh")
        return stream + self._drop(self.mlp_out(hidden))

    def _attend(self, stream: Tensor) -> Tensor:
        samples, positions, width = stream.shape
        qkv = self.query_key_value(stream).view(samples, positions, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True)
        return mixed.transpose(1, 2).reshape(samples, positions, width)

    def _drop(self, stream: Tensor) -> Tensor:
        return F.dropout(stream, self.dropout, self.training)


class GPT(nn.Module):
    """A model that predicts each next byte.

    Source: Radford et al., Language Models are Unsupervised Multitask Learners, 2019.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_byte = nn.Embedding(BYTES, config.width)
        self.embed_position = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm_out = nn.LayerNorm(config.width)
        self._initialise()

    def _initialise(self) -> None:
        # Each block adds to the stream twice: small initial outputs keep its variance from growing with depth.
        into_stream = 0.02 / math.sqrt(2 * self.config.layers)
        for name, param in self.named_parameters():
            if param.ndim == 2:
                nn.init.normal_(param, std=into_stream if name.endswith("_out.weight") else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(param)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits of the next byte, (samples, positions, 256), for bytes, (samples, positions)."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        stream = self.embed_byte(tokens) + self.embed_position(positions)
        stream = F.dropout(stream, self.config.dropout, self.training)
        for block in self.blocks:
            stream = block(stream)
        return F.linear(self.norm_out(stream), self.embed_byte.weight)


def next_byte_losses(model: nn.Module, windows: Tensor) -> Tensor:
    """Return the mean cross-entropy of each window, (samples,), in nats per byte: see `byte_losses`."""
    return byte_losses(model, windows).mean(1)


def byte_losses(model: nn.Module, windows: Tensor) -> Tensor:
    """Return the cross-entropy of each byte, (samples, context), in nats.

    Args:
        model: Maps bytes to logits.
        windows: Bytes, (samples, context + 1): all but the last are inputs, all but the first are targets.
    """
    windows = windows.long()
    logits = model(windows[:, :-1])
    return F.cross_entropy(logits.transpose(1, 2), windows[:, 1:], reduction="none")
