"""Graphs from short texts, and one run of one pass over them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from qcompile.backends.reference.target import ReferenceTarget

from qcompile.graph import Graph, parse_graph, print_graph, tensor_digest
from qcompile.pipeline import Context, Pass, Pipeline, sqnr_db


def _build(text: str, **constants: torch.Tensor) -> Graph:
    """Parse a text whose constants are written ``const @name``; types and digests are filled in."""
    digests = {tensor_digest(value)[:16]: value for value in constants.values()}

    def constant(match: re.Match[str]) -> str:
        value = constants[match[1]]
        kind = {"float32": "f32", "int64": "i64", "bool": "bool"}[str(value.dtype).removeprefix("torch.")]
        return f"const {kind}[{','.join(map(str, value.shape))}] @{tensor_digest(value)[:16]}"

    return parse_graph(re.sub(r"const @(\w+)", constant, text), digests)


@dataclass
class Ran:
    """What a pass did to a copy of a graph."""

    before: Graph
    after: Graph
    changes: int
    context: Context

    @property
    def text(self) -> str:
        return print_graph(self.after, comments=False)

    @property
    def golden_text(self) -> str:
        return f"{print_graph(self.before, comments=False)}->\n{self.text}"

    @property
    def operators(self) -> list[str]:
        return re.findall(r"= ([\w.]+)\(", self.text)

    def sqnr(self, *inputs: torch.Tensor) -> float:
        """Return the smallest SQNR over the outputs, in dB."""
        return min(sqnr_db(a, b) for a, b in zip(self.before(*inputs), self.after(*inputs), strict=True))


def _run(graph: Graph, *passes: Pass) -> Ran:
    """Run passes on a copy; a second run of the same must change nothing, and the result must print and parse."""
    after, context = graph.copy(), Context(target=ReferenceTarget())
    steps = Pipeline(passes).run(after, context)
    again = Pipeline(passes).run(after.copy(), Context(target=ReferenceTarget()))
    assert [step.changes for step in again] == [0] * len(passes), "a second run changes the graph"
    text = print_graph(after)
    assert print_graph(parse_graph(text, {tensor_digest(t)[:16]: t for t in after.tensors})) == text
    return Ran(graph, after, steps[-1].changes, context)


@pytest.fixture
def build() -> Callable[..., Graph]:
    return _build


@pytest.fixture
def run_pass() -> Callable[..., Ran]:
    return _run
