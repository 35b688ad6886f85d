"""stories260K: a Llama-type language model of 260 thousand parameters (Karpathy, llama2.c), and its tokenizer of 512 tokens.

Input tokens i64[batch,seq], output logits f32[batch,seq,512]. Five layers of width 64, eight heads on four, SwiGLU, RMSNorm, tied head;
rotary positions turn adjacent pairs. Tokens are those of llama2.c: merges by best score, bytes at 3 and up, 1 begins a text.
"""

from __future__ import annotations

import functools
import os
import struct
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

BEGIN = 1


def folder() -> Path:
    """Return the folder of the checkpoint and its tokenizer."""
    data = os.environ.get("QCOMPILE_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data"
    return Path(data) / "llama2c_stories260K"


class Layer(nn.Module):
    """Attention and a gated feed-forward part, each behind a normalisation."""

    def __init__(self, width: int, hidden: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.size = heads, kv_heads, width // heads
        self.attention_norm, self.hidden_norm = nn.RMSNorm(width, 1e-5), nn.RMSNorm(width, 1e-5)
        self.q, self.k = nn.Linear(width, width, bias=False), nn.Linear(width, kv_heads * self.size, bias=False)
        self.v, self.o = nn.Linear(width, kv_heads * self.size, bias=False), nn.Linear(width, width, bias=False)
        self.gate, self.up = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        normed = self.attention_norm(x)
        q, k, v = (part(normed).unflatten(-1, (-1, self.size)).transpose(1, 2) for part in (self.q, self.k, self.v))
        q, k = _turned(q, cos, sin), _turned(k, cos, sin)
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o(seen.transpose(1, 2).flatten(2))
        normed = self.hidden_norm(x)
        return x + self.down(F.silu(self.gate(normed)) * self.up(normed))


def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn adjacent pairs of x [batch, heads, seq, size] by the angles of their positions, cos and sin [seq, size / 2]."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


class Stories(nn.Module):
    """The model of a file of llama2.c (version 0, with a tied head)."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        data = path.read_bytes()
        width, hidden, layers, heads, kv_heads, vocabulary, self.context = struct.unpack_from("<7i", data)
        values = torch.from_numpy(np.frombuffer(data, np.float32, offset=28).copy())
        self.table = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(Layer(width, hidden, heads, kv_heads) for _ in range(layers))
        self.norm, self.head = nn.RMSNorm(width, 1e-5), nn.Linear(width, vocabulary, bias=False)
        kinds = ("attention_norm", "q", "k", "v", "o", "hidden_norm", "gate", "down", "up")
        order = [self.table, *(getattr(layer, kind) for kind in kinds for layer in self.layers), self.norm]
        place = 0
        with torch.no_grad():
            for part in order:
                count = part.weight.numel()
                part.weight.copy_(values[place : place + count].view_as(part.weight))
                place += count
            self.head.weight.copy_(self.table.weight)
        size = width // heads
        angles = torch.outer(torch.arange(self.context), 10000.0 ** (-torch.arange(0, size, 2) / size))
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        count = tokens.shape[1]
        x = self.table(tokens)
        for layer in self.layers:
            x = layer(x, self.cos[:count], self.sin[:count])
        return self.head(self.norm(x))


def stories260k() -> tuple[Stories, tuple[torch.Tensor, ...], list[dict[int, str]]]:
    """Return the model and a text of eight tokens."""
    net = Stories(folder() / "stories260K.bin").eval()
    return net, (torch.tensor([[1, 403, 407, 261, 378, 3, 10, 20]]),), [{0: "batch", 1: "seq"}]


def read_tokens(path: Path) -> tuple[list[bytes], list[float]]:
    """Return text and score of every token of a file of llama2.c."""
    data, place = path.read_bytes(), 4
    texts, scores = [], []
    while place < len(data):
        score, length = struct.unpack_from("<fi", data, place)
        texts.append(data[place + 8 : place + 8 + length])
        scores.append(score)
        place += 8 + length
    return texts, scores


def encode(text: str) -> list[int]:
    """Return the tokens of a text, the beginning one first; no token has a space but at its front, so words are coded one by one."""
    return [BEGIN, *(token for word in f" {text}".split(" ")[1:] for token in _encode_word(f" {word}"))]


@functools.cache
def _encode_word(word: str) -> tuple[int, ...]:
    """Return a word's tokens: its characters, then the neighbours whose merge scores best joined, until none can be."""
    texts, scores, numbers = _vocabulary()
    found: list[int] = []
    for character in word:
        coded = character.encode()
        found += [numbers[coded]] if coded in numbers else [byte + 3 for byte in coded]
    while True:
        pairs = [(scores[n], -i) for i in range(len(found) - 1) if (n := numbers.get(texts[found[i]] + texts[found[i + 1]])) is not None]
        if not pairs:
            return tuple(found)
        at = -max(pairs)[1]
        found[at : at + 2] = [numbers[texts[found[at]] + texts[found[at + 1]]]]


@functools.cache
def _vocabulary() -> tuple[list[bytes], list[float], dict[bytes, int]]:
    texts, scores = read_tokens(folder() / "tok512.bin")
    return texts, scores, {token: number for number, token in enumerate(texts)}
