"""RWKV through ``python:`` functions: a recurrent state instead of a cache, as inputs and outputs of a step of one token."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

import qcompile

EXPECTED = {"rwkv4": "expected-logits-4v0-660K.bin", "rwkv5": "expected-logits-5v1-730K.bin"}
PROMPT = b'"in'  # of rwkv.cpp's own test
WINDOW, WINDOWS = 48, 32


@pytest.fixture(scope="module")
def rwkv(repository: Path, data_folder: Path) -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(repository / "tests" / "models"))
        patch.setenv("QCOMPILE_DATA", str(data_folder))
        import rwkv

        yield rwkv
        del sys.modules["rwkv"]


@pytest.fixture(scope="module")
def compiled(rwkv: ModuleType, repository: Path) -> Callable[[str, str], qcompile.Artifact]:
    @functools.cache
    def make(name: str, recipe: str) -> qcompile.Artifact:
        return qcompile.compile(f"python:{repository / 'tests' / 'models' / 'rwkv.py'}:{name}", recipe=recipe)

    return make


def read(step: Any, net: Any, texts: torch.Tensor) -> torch.Tensor:
    """Return the logits f32[batch, count, 256] after every byte of texts i64[batch, count], the state carried along."""
    state = net.empty_state(len(texts))
    found = []
    for token in texts.unbind(1):
        logits, *state = step(token.contiguous(), *state)
        found.append(logits)
    return torch.stack(found, 1)


def perplexity(logits: torch.Tensor, texts: torch.Tensor) -> float:
    likely = logits[:, :-1].double().log_softmax(-1)
    return math.exp(-float(likely.gather(-1, texts[:, 1:, None]).mean()))


@pytest.mark.parametrize("name", EXPECTED)
def test_logits_are_those_of_its_authors(rwkv: ModuleType, compiled: Any, name: str) -> None:
    net, _, _ = getattr(rwkv, name)()
    expected = torch.from_numpy(np.fromfile(rwkv.folder() / EXPECTED[name], np.float32))
    found = read(compiled(name, "float"), net, torch.tensor([list(PROMPT)]))[0, -1]
    assert float((found - expected).abs().max()) <= 4e-6


@pytest.mark.parametrize("name", EXPECTED)
def test_the_state_is_carried_along_and_eight_bits_keep_the_text(rwkv: ModuleType, compiled: Any, name: str, data_folder: Path) -> None:
    text = (data_folder / "tinystories_excerpt" / "TinyStories-valid_30KB.txt").read_bytes()[: WINDOW * WINDOWS]
    texts = torch.tensor(list(text)).view(WINDOWS, WINDOW)
    net, _, _ = getattr(rwkv, name)()
    exact = read(net, net, texts)
    assert torch.allclose(read(compiled(name, "float"), net, texts), exact, atol=1e-3)
    low = compiled(name, "w8a8-dynamic")
    assert {layer["weight"] for layer in low.report["layers"]} == {"int8 channel=0 sym"}
    found = read(low, net, texts)
    assert not torch.allclose(found, exact, atol=1e-3)
    assert perplexity(found, texts) == pytest.approx(perplexity(exact, texts), rel=0.01)
