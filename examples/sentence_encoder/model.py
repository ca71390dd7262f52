"""The encoder of all-MiniLM-L6-v2: a BERT of 6 layers and 12 heads with the mean over the tokens behind it.

Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding", 2019; Wang et al.,
"MiniLM: Deep Self-Attention Distillation", 2020; Reimers and Gurevych, "Sentence-BERT", 2019. The published model
divides the result by its length; cosine similarity does not depend on that, so it is left to whoever needs it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

VOCABULARY, POSITIONS = 30_522, 512
WIDTH, HEADS, HIDDEN, LAYERS = 384, 12, 1_536, 6
LENGTH = 32
"""Tokens of an input: longer sentences are cut, shorter ones padded."""
MASKED = -1e4
"""Added to the scores of padding: ``exp(-1e4)`` is 0 in float32."""


def build(length: int = LENGTH) -> nn.Module:
    """The untrained encoder for inputs of ``length`` tokens, 1 to 512."""
    return SentenceEncoder(length)


class SentenceEncoder(nn.Module):
    """Token ids and mask to a vector: the mean of the last layer over the tokens of the sentence."""

    def __init__(self, length: int = LENGTH) -> None:
        super().__init__()
        self.embeddings = Embeddings(length)
        self.layers = nn.Sequential(*(Layer(length) for _ in range(LAYERS)))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """``input_ids`` ``[N, length]`` int64; ``attention_mask`` ``[N, length]``, 1 for tokens and 0 for padding.

        Returns ``[N, 384]``.
        """
        mask = attention_mask.to(torch.float32)
        bias = ((1.0 - mask) * MASKED).unsqueeze(1).unsqueeze(1)
        x = self.embeddings(input_ids)
        for layer in self.layers:
            x = layer(x, bias)
        weights = mask.unsqueeze(-1)
        return (x * weights).sum(1) / weights.sum(1)  # type: ignore[no-any-return]


class Embeddings(nn.Module):
    """Vector of the token plus vector of its position, normalized."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Parameter(torch.zeros(1, length, WIDTH))
        self.norm = _norm()

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.norm(self.tokens(input_ids) + self.positions)  # type: ignore[no-any-return]


class Layer(nn.Module):
    """Self-attention and two linear layers, each added to its input and normalized after that."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.attention = Attention(length)
        self.attention_norm = _norm()
        self.expand = nn.Linear(WIDTH, HIDDEN)
        self.gelu = nn.GELU()
        self.contract = nn.Linear(HIDDEN, WIDTH)
        self.norm = _norm()

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        x = self.attention_norm(self.attention(x, bias) + x)
        return self.norm(self.contract(self.gelu(self.expand(x))) + x)  # type: ignore[no-any-return]


class Attention(nn.Module):
    """``softmax(q kᵀ / sqrt(32) + bias) v`` in each of 12 heads of width 32."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length
        self.query = nn.Linear(WIDTH, WIDTH)
        self.key = nn.Linear(WIDTH, WIDTH)
        self.value = nn.Linear(WIDTH, WIDTH)
        self.softmax = nn.Softmax(dim=-1)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        query, key, value = (self._heads(linear(x)) for linear in (self.query, self.key, self.value))
        scores = torch.matmul(query, key.transpose(-2, -1)) / math.sqrt(WIDTH // HEADS)
        mixed = torch.matmul(self.softmax(scores + bias), value)
        return self.out(mixed.transpose(1, 2).reshape(-1, self.length, WIDTH))  # type: ignore[no-any-return]

    def _heads(self, x: Tensor) -> Tensor:
        """``[N, length, 384]`` to ``[N, 12, length, 32]``."""
        return x.reshape(-1, self.length, HEADS, WIDTH // HEADS).transpose(1, 2)


def _norm() -> nn.LayerNorm:
    return nn.LayerNorm(WIDTH, eps=1e-12)


def from_published(weights: dict[str, Tensor], length: int = LENGTH) -> dict[str, Tensor]:
    """The published weights, by the names of this model.

    ``weights`` are those of ``model.safetensors`` of all-MiniLM-L6-v2. The vector of token type 0, which every token
    of a single sentence has, is added to that of the position; the pooler, which sentence vectors do not use, is left
    out. Raises KeyError if a weight is missing.
    """
    positions = weights["embeddings.position_embeddings.weight"][:length]
    own = {
        "embeddings.tokens.weight": weights["embeddings.word_embeddings.weight"],
        "embeddings.positions": (positions + weights["embeddings.token_type_embeddings.weight"][0]).unsqueeze(0),
    }
    for kind in ("weight", "bias"):
        own[f"embeddings.norm.{kind}"] = weights[f"embeddings.LayerNorm.{kind}"]
        for layer in range(LAYERS):
            for name, published in _LAYER.items():
                own[f"layers.{layer}.{name}.{kind}"] = weights[f"encoder.layer.{layer}.{published}.{kind}"]
    return own


_LAYER = {
    "attention.query": "attention.self.query",
    "attention.key": "attention.self.key",
    "attention.value": "attention.self.value",
    "attention.out": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "expand": "intermediate.dense",
    "contract": "output.dense",
    "norm": "output.LayerNorm",
}
