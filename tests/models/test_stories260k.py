"""stories260K through a ``python:`` function: its published perplexity, and texts continued from caches as by the plain loop."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

import qcompile
from qcompile.generation import Generator


@pytest.fixture(scope="module")
def stories(repository: Path, data_folder: Path) -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(repository / "tests" / "models"))
        patch.setenv("QCOMPILE_DATA", str(data_folder))
        import stories260k

        yield stories260k
        del sys.modules["stories260k"]


@pytest.fixture(scope="module")
def artifact(repository: Path, stories: ModuleType) -> qcompile.Artifact:
    return qcompile.compile(f"python:{repository / 'tests' / 'models' / 'stories260k.py'}:stories260k", recipe="float")


def test_no_token_has_a_space_inside(stories: ModuleType) -> None:
    texts, _ = stories.read_tokens(stories.folder() / "tok512.bin")
    assert len(texts) == 512
    assert not [text for text in texts if b" " in text[1:]]
    assert b"".join(texts[token] for token in stories.encode("Once upon a time, there was")) == b"\n<s>\n Once upon a time, there was"


# 5.17 is the figure of the data's description: each line a text of its own, its first 512 tokens.
def test_perplexity_is_the_published_one(stories: ModuleType, artifact: qcompile.Artifact, data_folder: Path) -> None:
    lines = (data_folder / "tinystories_excerpt" / "TinyStories-valid_30KB.txt").read_text(encoding="utf-8").splitlines()
    nats, count = 0.0, 0
    for line in filter(str.strip, lines):
        tokens = torch.tensor([stories.encode(line)[:512]])
        likely = artifact(tokens)[0, :-1].double().log_softmax(-1)
        nats -= float(likely.gather(1, tokens[0, 1:, None]).sum())
        count += tokens.shape[1] - 1
    assert count == 9136
    assert math.exp(nats / count) == pytest.approx(5.1747, abs=5e-5)


def test_texts_go_on_as_by_the_plain_loop(stories: ModuleType, artifact: qcompile.Artifact) -> None:
    net, _, _ = stories.stories260k()
    generator = Generator(artifact)
    assert generator.model.context == net.context
    prompts = [stories.encode(text) for text in ("Once upon a time", "Tom and his dog went to the park. They", "")]
    for prompt, found in zip(prompts, generator.generate(prompts, max_tokens=60), strict=True):
        tokens = list(prompt)
        with torch.no_grad():
            for _ in range(60):
                tokens.append(int(net(torch.tensor([tokens]))[0, -1].argmax()))
        assert found.tokens == tokens[len(prompt) :]
