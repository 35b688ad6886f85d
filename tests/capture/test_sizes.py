"""Symbolic sizes fixed to numbers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qcompile.capture import Captured, capture
from qcompile.capture.sizes import fix_sizes, parse_sizes
from qcompile.errors import Refused


class Rows(nn.Module):
    """Reads its own size, so that a size is an operator of the graph too."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(x.shape[0] * 2, -1) + x.shape[0]


@pytest.fixture
def captured() -> Captured:
    return capture(Rows().eval(), (torch.arange(12.0).reshape(3, 4),), [{0: "batch"}])


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_a_fixed_size_is_a_number_everywhere(captured: Captured, size: int) -> None:
    fixed = fix_sizes(captured, {"batch": size})
    assert not fixed.graph.symbols.ranges
    assert fixed.graph.outputs[0].meta["val"].shape == (2 * size, 2)
    (example,) = fixed.example_inputs
    assert torch.equal(example, captured.example_inputs[0][torch.arange(size) % 3])
    assert torch.equal(fixed.graph(example)[0], Rows()(example))


def test_the_model_itself_stays_as_it_is(captured: Captured) -> None:
    fix_sizes(captured, {"batch": 2})
    assert "batch" in captured.graph.symbols.ranges


@pytest.mark.parametrize(("sizes", "said"), [({"bath": 1}, "no size named 'bath'"), ({"batch": 1 << 30}, "is between 1 and")])
def test_what_is_refused(captured: Captured, sizes: dict[str, int], said: str) -> None:
    with pytest.raises(Refused, match=said):
        fix_sizes(captured, sizes)


def test_text() -> None:
    assert parse_sizes(("batch=1", "tokens=64")) == {"batch": 1, "tokens": 64}
    for text in ("batch", "batch=", "batch=0", "=1", "batch=-1", "batch=x"):
        with pytest.raises(Refused, match="no size"):
            parse_sizes((text,))
