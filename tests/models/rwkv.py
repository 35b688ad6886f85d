"""RWKV of version 4 and 5.1 as a function of one token and a state: a recurrent language model over bytes.

    step(token i64[batch], last f32[batch,layers,2,width], memory f32[batch,..]) -> logits f32[batch,256], last, memory

``last`` holds the inputs of both mixtures of each layer at the token before. ``memory`` is, in version 4, numerator, denominator and
exponent of a weighted mean, f32[batch,layers,3,width]; in version 5.1 a matrix for each head, f32[batch,layers,heads,size,size].
Peng et al., RWKV (2023), eq. 13 to 19; Eagle and Finch (2024), section 4.1. The files are those of rwkv.cpp.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy as np
import torch
from torch import nn

FILES = {"4": "tiny-rwkv-4v0-660K-FP32.bin", "5.1": "tiny-rwkv-5v1-730K-FP32.bin"}
Step = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def folder() -> Path:
    """Return the folder of both checkpoints."""
    data = os.environ.get("QCOMPILE_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data"
    return Path(data) / "rwkv_tiny"


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a file of rwkv.cpp: 6 numbers, then for each tensor 3 numbers, sizes (fastest first), name and float32 data."""
    data, place, found = path.read_bytes(), 24, {}
    while place < len(data):
        dims, length, kind = struct.unpack_from("<3I", data, place)
        assert kind == 0, "a tensor is not float32"
        sizes = struct.unpack_from(f"<{dims}I", data, place + 12)[::-1]
        place += 12 + 4 * dims
        name = data[place : place + length].decode()
        place += length
        count = int(np.prod(sizes))
        found[name] = torch.from_numpy(np.frombuffer(data, np.float32, count, place).copy()).reshape(sizes)
        place += 4 * count
    return found


def _linear(weight: torch.Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data = weight
    return layer


class Layer(nn.Module):
    """What both versions share: normalisations, mixtures with the token before, and the feed-forward part."""

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        super().__init__()
        width = weights["ln1.weight"].numel()
        self.width = width
        for part in ("att", "ffn"):
            matrices = {name.split(".")[1]: value for name, value in weights.items() if name.startswith(f"{part}.") and value.ndim == 2}
            setattr(self, part, nn.ModuleDict({name: _linear(value) for name, value in matrices.items()}))
            for name, value in weights.items():
                if name.startswith(f"{part}.time_mix"):
                    self.register_buffer(name.replace(".", "_"), value.flatten())
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        for name in ("ln1", "ln2"):
            getattr(self, name).weight.data, getattr(self, name).bias.data = weights[f"{name}.weight"], weights[f"{name}.bias"]

    def mixed(self, name: str, x: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        """Return x and the token before, mixed by learned shares."""
        share = getattr(self, name)
        return x * share + last * (1 - share)

    def feed_forward(self, x: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        receptance = torch.sigmoid(self.ffn["receptance"](self.mixed("ffn_time_mix_r", x, last)))
        return receptance * self.ffn["value"](torch.relu(self.ffn["key"](self.mixed("ffn_time_mix_k", x, last))).square())

    def forward(self, x: torch.Tensor, last: torch.Tensor, memory: torch.Tensor) -> Step:
        """Return x [batch, width], the new last [batch, 2, width] and the new memory of this layer."""
        now = self.ln1(x)
        added, memory = self.time_mix(now, last[:, 0], memory)
        x = x + added
        then = self.ln2(x)
        return x + self.feed_forward(then, last[:, 1]), torch.stack([now, then], 1), memory

    def time_mix(self, x: torch.Tensor, last: torch.Tensor, memory: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        raise NotImplementedError


class Layer4(Layer):
    """A weighted mean of the values so far, its weights falling with time; kept with its largest exponent taken out."""

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        super().__init__(weights)
        self.register_buffer("first", weights["att.time_first"].flatten())
        self.register_buffer("decay", weights["att.time_decay"].flatten())  # -exp(w)

    def time_mix(self, x: torch.Tensor, last: torch.Tensor, memory: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        receptance, key, value = (self.att[n](self.mixed(f"att_time_mix_{n[0]}", x, last)) for n in ("receptance", "key", "value"))
        above, below, exponent = memory[:, 0], memory[:, 1], memory[:, 2]
        largest = torch.maximum(exponent, self.first + key)
        old, new = torch.exp(exponent - largest), torch.exp(self.first + key - largest)
        mean = (old * above + new * value) / (old * below + new)
        largest = torch.maximum(exponent + self.decay, key)
        old, new = torch.exp(exponent + self.decay - largest), torch.exp(key - largest)
        memory = torch.stack([old * above + new * value, old * below + new, largest], 1)
        return self.att["output"](torch.sigmoid(receptance) * mean), memory


class Layer5(Layer):
    """A matrix for each head: products of keys and values, falling with time; read by the receptance."""

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        super().__init__(weights)
        self.heads = weights["att.time_decay"].numel()
        self.register_buffer("first", weights["att.time_first"].view(-1, 1, 1))
        self.register_buffer("decay", weights["att.time_decay"].view(-1, 1, 1))  # exp(-exp(w))
        self.register_buffer("gain", weights["att.ln_x.weight"])
        self.register_buffer("shift", weights["att.ln_x.bias"])

    def time_mix(self, x: torch.Tensor, last: torch.Tensor, memory: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        receptance, key, value = (self.att[n](self.mixed(f"att_time_mix_{n[0]}", x, last)) for n in ("receptance", "key", "value"))
        size = self.width // self.heads
        product = key.view(-1, self.heads, size, 1) * value.view(-1, self.heads, 1, size)
        read = torch.matmul(receptance.view(-1, self.heads, 1, size), self.first * product + memory)  # [batch, heads, 1, size]
        normed = nn.functional.layer_norm(read.view(-1, self.heads, size), (size,), eps=1e-5).view(-1, self.width)
        return self.att["output"](normed * self.gain + self.shift), product + self.decay * memory


class Rwkv(nn.Module):
    """The step function of a checkpoint."""

    def __init__(self, version: str) -> None:
        super().__init__()
        weights = read_tensors(folder() / FILES[version])
        kind = Layer4 if version == "4" else Layer5
        self.table = nn.Embedding.from_pretrained(weights["emb.weight"])
        count = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
        parts = [{n.removeprefix(f"blocks.{i}."): w for n, w in weights.items() if n.startswith(f"blocks.{i}.")} for i in range(count)]
        self.blocks = nn.ModuleList(kind(part) for part in parts)
        width = weights["emb.weight"].shape[1]
        self.before, self.after = nn.LayerNorm(width), nn.LayerNorm(width)
        for norm, name in ((self.before, "blocks.0.ln0"), (self.after, "ln_out")):
            norm.weight.data, norm.bias.data = weights[f"{name}.weight"], weights[f"{name}.bias"]
        self.head = _linear(weights["head.weight"])

    def forward(self, token: torch.Tensor, last: torch.Tensor, memory: torch.Tensor) -> Step:
        """Return logits [batch, 256] of the next byte, and the state after this one."""
        x = self.before(self.table(token))
        lasts, memories = [], []
        for number, block in enumerate(self.blocks):
            x, new_last, new_memory = block(x, last[:, number], memory[:, number])
            lasts.append(new_last)
            memories.append(new_memory)
        return self.head(self.after(x)), torch.stack(lasts, 1), torch.stack(memories, 1)

    def empty_state(self, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the state before a text: zeros, in version 4 with the smallest exponent."""
        layers, first = len(self.blocks), self.blocks[0]
        last = torch.zeros(batch, layers, 2, first.width)
        if isinstance(first, Layer5):
            size = first.width // first.heads
            return last, torch.zeros(batch, layers, first.heads, size, size)
        memory = torch.zeros(batch, layers, 3, first.width)
        memory[:, :, 2] = -1e30
        return last, memory


def _model(version: str) -> tuple[Rwkv, tuple[torch.Tensor, ...], list[dict[int, str]]]:
    net = Rwkv(version).eval().requires_grad_(False)
    return net, (torch.tensor([65]), *net.empty_state(1)), [{0: "batch"}] * 3


def rwkv4() -> tuple[Rwkv, tuple[torch.Tensor, ...], list[dict[int, str]]]:
    """Return version 4 and one byte with an empty state."""
    return _model("4")


def rwkv5() -> tuple[Rwkv, tuple[torch.Tensor, ...], list[dict[int, str]]]:
    """Return version 5.1 and one byte with an empty state."""
    return _model("5.1")
