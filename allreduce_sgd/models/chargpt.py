"""A small language model of characters: a decoder-only transformer after Radford et al. 2019 and Karpathy's nanoGPT.

Normalisation comes before attention and before the two-layer GELU network, positions are learned, and the projections
onto the residual stream begin smaller by the square root of their number. Four layers of 128 channels in four heads,
0.8 million parameters for blocks of 64 characters. Unlike nanoGPT, embedding and output layer share no weights, so
that every parameter gets its gradient at one place.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["CharGPT", "chargpt"]

_LAYERS = 4
_HEADS = 4
_CHANNELS = 128
_DEVIATION = 0.02


class _Attention(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.query_key_value = nn.Linear(_CHANNELS, 3 * _CHANNELS)
        self.project = nn.Linear(_CHANNELS, _CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        n, positions, channels = x.shape
        split = self.query_key_value(x).view(n, positions, 3, _HEADS, channels // _HEADS)
        query, key, value = split.permute(2, 0, 3, 1, 4).unbind()
        mixed = functional.scaled_dot_product_attention(
            query, key, value, dropout_p=self.dropout if self.training else 0.0, is_causal=True
        )
        projected: Tensor = self.project(mixed.transpose(1, 2).reshape(n, positions, channels))
        return functional.dropout(projected, self.dropout, self.training)


class _Layer(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.attention = nn.Sequential(nn.LayerNorm(_CHANNELS), _Attention(dropout))
        self.expand = nn.Sequential(nn.LayerNorm(_CHANNELS), nn.Linear(_CHANNELS, 4 * _CHANNELS), nn.GELU())
        self.project = nn.Linear(4 * _CHANNELS, _CHANNELS)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        added: Tensor = self.dropout(self.project(self.expand(x)))
        return x + added


class CharGPT(nn.Module):
    """Codes of characters (n, positions) int64 to scores of the next character (n, positions, outputs) float32."""

    def __init__(self, block_length: int, vocabulary: int, outputs: int, dropout: float) -> None:
        super().__init__()
        self.characters = nn.Embedding(vocabulary, _CHANNELS)
        self.positions = nn.Parameter(torch.empty(block_length, _CHANNELS))
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.Sequential(*(_Layer(dropout) for _ in range(_LAYERS)))
        self.head = nn.Sequential(nn.LayerNorm(_CHANNELS), nn.Linear(_CHANNELS, outputs))
        self._initialise()

    def _initialise(self) -> None:
        nn.init.normal_(self.positions, std=_DEVIATION)
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                onto_residual = name.endswith("project")
                nn.init.normal_(module.weight, std=_DEVIATION / (math.sqrt(2 * _LAYERS) if onto_residual else 1))
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, codes: Tensor) -> Tensor:
        embedded = self.characters(codes) + self.positions[: codes.shape[1]]
        scores: Tensor = self.head(self.layers(self.dropout(embedded)))
        return scores


def chargpt(block_length: int, vocabulary: int, outputs: int, dropout: float) -> nn.Module:
    """For blocks of at most `block_length` characters out of `vocabulary`; `outputs` is their number as a rule."""
    return CharGPT(block_length, vocabulary, outputs, dropout)
