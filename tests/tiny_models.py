"""Models of a few hundred parameters, as ``python:FILE:FUNCTION`` takes them: seeded, so that every call gives the same."""

from __future__ import annotations

import torch
from torch import nn


class Mlp(nn.Module):
    """Two linear layers: f32[batch,8] to f32[batch,4]."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 32), nn.Linear(32, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(x)))


class Cnn(nn.Module):
    """Convolutions with batch normalisation, a residual sum and a concatenation: f32[batch,3,8,8] to f32[batch,4]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.body, self.body_norm = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.side, self.last = nn.Conv2d(8, 4, 1), nn.Conv2d(12, 8, 1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.nn.functional.relu6(self.stem_norm(self.stem(x)))
        x = torch.relu(x + self.body_norm(self.body(x)))
        x = torch.relu(self.last(torch.cat([x, torch.relu(self.side(x))], 1)))
        return self.head(x.mean((2, 3)))


class Two(nn.Module):
    """Two inputs, two outputs: a table of 20 rows, i64[batch,seq] and f32[batch,8]."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.mix = nn.Embedding(20, 8), nn.Linear(8, 8)

    def forward(self, tokens: torch.Tensor, shift: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        states = self.mix(self.table(tokens)) + shift.unsqueeze(1)
        return states, states.mean(1)


def _seeded(kind: type[nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(7)
        net = kind()
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                for tensor, low, high in (
                    (module.weight, 0.5, 1.5),
                    (module.bias, -0.5, 0.5),
                    (module.running_mean, -0.5, 0.5),
                    (module.running_var, 0.5, 1.5),
                ):
                    assert tensor is not None
                    tensor.uniform_(low, high)
        return net.eval()


def _noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def mlp() -> tuple[nn.Module, tuple[torch.Tensor, ...], list[dict[int, str]]]:
    """Return Mlp and a batch of one."""
    return _seeded(Mlp), (_noise(1, 8),), [{0: "batch"}]


def cnn() -> tuple[nn.Module, tuple[torch.Tensor, ...], list[dict[int, str]]]:
    """Return Cnn and a batch of one."""
    return _seeded(Cnn), (_noise(1, 3, 8, 8),), [{0: "batch"}]


def two() -> tuple[nn.Module, tuple[torch.Tensor, ...], list[dict[int, str]]]:
    """Return Two and a batch of one with five tokens."""
    return _seeded(Two), (torch.arange(5).view(1, 5), _noise(1, 8)), [{0: "batch", 1: "seq"}, {0: "batch"}]


class LanguageModel(nn.Module):
    """One block of a decoder, learned positions for 32 tokens: i64[batch,seq] to f32[batch,seq,20]."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.positions = nn.Embedding(20, 8), nn.Embedding(32, 8)
        self.norm, self.mix, self.out, self.head = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8), nn.Linear(8, 20)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.table(tokens) + self.positions(torch.arange(tokens.shape[1]))
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in self.mix(self.norm(x)).chunk(3, -1))
        seen = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head(x + self.out(seen.transpose(1, 2).flatten(2)))


def language_model() -> tuple[nn.Module, tuple[torch.Tensor, ...], list[dict[int, str]]]:
    """Return LanguageModel and a text of six tokens."""
    return _seeded(LanguageModel), (torch.arange(6).view(1, 6),), [{0: "batch", 1: "seq"}]


def damaged() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """Return Mlp with a weight that is not a number."""
    net, examples, _ = mlp()
    with torch.no_grad():
        net.first.weight[3, 2] = torch.nan  # type: ignore[union-attr,index,operator]
    return net, examples


class Branching(nn.Module):
    """Goes one way or the other by a value: cannot be traced."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1 if x.sum() > 0 else x - 1


def untraceable() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """Return Branching and a batch of one."""
    return Branching(), (_noise(1, 8),)


class Spectrum(nn.Module):
    """A linear layer and a Fourier transform, which only the reference runs: f32[batch,8] to f32[batch,8]."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.fft.fft(self.mix(x)).real


def spectrum() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """Return Spectrum and a batch of one."""
    return _seeded(Spectrum), (_noise(1, 8),)


def failing() -> None:
    """Fail."""
    raise RuntimeError("out of ideas")


class Wide(nn.Module):
    """A table and two linear layers, large enough that headers and activation scales do not count: i64[batch,seq] to f32[batch,seq,256]."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.first, self.second = nn.Embedding(500, 256), nn.Linear(256, 512), nn.Linear(512, 256)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(self.table(tokens))))


def wide() -> tuple[nn.Module, tuple[torch.Tensor, ...], list[dict[int, str]]]:
    """Return Wide and one row of nine tokens."""
    return _seeded(Wide), (torch.arange(9).view(1, 9),), [{0: "batch", 1: "seq"}]
