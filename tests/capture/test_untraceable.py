"""Code that cannot become a graph is refused, naming module or node, operator, and the line of the user's file."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from qcompile.capture.torch_export import capture_module
from qcompile.errors import Refused

# The folder that holds this text has the names of packages: only what truly belongs to them is not the user's code.
FOLDER = Path("qcompile") / "torch"
CODE = """
import torch
from torch import nn

@torch.library.custom_op("untraceable::double", mutates_args=())
def double(x: torch.Tensor) -> torch.Tensor:
    return x * 2

@double.register_fake
def _(x):
    return torch.empty_like(x)

class Net(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.inner = kind()

    def forward(self, x):
        return self.inner(self.first(x))

class Branching(nn.Module):
    def forward(self, x):
        if x.sum() > 0: # Branching
            return x
        return -x

class Looping(nn.Module):
    def forward(self, x):
        while x.max() < 3: # Looping
            x = x + 1
        return x

class Cutting(nn.Module):
    def forward(self, x):
        return x[:, : int(x.sum())] # Cutting

class Numpy(nn.Module):
    def forward(self, x):
        return torch.from_numpy(x.numpy() + 1) # Numpy

class Misshapen(nn.Module):
    def forward(self, x):
        return x.view(5, 7) # Misshapen

class Narrow(nn.Module):
    def __init__(self):
        super().__init__()
        self.second = nn.Linear(4, 4)

    def forward(self, x):
        return self.second(x) # Narrow

class Conditional(nn.Module):
    def forward(self, x):
        return torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,)) # Conditional

class Foreign(nn.Module):
    def forward(self, x):
        return double(x) # Foreign

class Sized(nn.Module):
    def forward(self, x):
        return x, 3

class Two(nn.Module):
    def forward(self, x, y): # Two
        return x + y
"""


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    path = tmp_path_factory.mktemp("user") / FOLDER / "net.py"
    path.parent.mkdir(parents=True)
    path.write_text(CODE)
    spec = importlib.util.spec_from_file_location("untraceable_net", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def place(code: ModuleType, mark: str) -> str:
    """Return ``file:line`` of the line that ends with a mark."""
    (line,) = [number for number, text in enumerate(CODE.splitlines(), 1) if text.endswith(f"# {mark}")]
    return f"{code.__file__}:{line}"


@pytest.mark.parametrize(
    ("name", "node", "operator", "reason"),
    [
        ("Branching", "inner", "", "the model cannot be traced at 'if x.sum() > 0: # Branching': GuardOnDataDependentSymNode"),
        ("Looping", "inner", "", "the model cannot be traced at 'while x.max() < 3: # Looping': GuardOnDataDependentSymNode"),
        ("Cutting", "inner", "", "the model cannot be traced at 'return x[:, : int(x.sum())] # Cutting': GuardOnDataDependentSymNode"),
        ("Numpy", "inner", "", "the model cannot be traced at 'return torch.from_numpy(x.numpy() + 1) # Numpy': RuntimeError"),
        ("Misshapen", "inner", "aten.view.default", "the model cannot be traced at 'return x.view(5, 7) # Misshapen': RuntimeError"),
        ("Narrow", "inner", "aten.linear.default", "the model cannot be traced at 'return self.second(x) # Narrow': RuntimeError"),
        ("Conditional", "cond", "cond", "the call is not an operator"),
        ("Foreign", "double", "untraceable.double.default", "the operator is not one of PyTorch's, and an artifact holds no code"),
    ],
)
def test_the_message_names_node_operator_and_line(code: ModuleType, name: str, node: str, operator: str, reason: str) -> None:
    with pytest.raises(Refused) as error:
        capture_module(code.Net(getattr(code, name)).eval(), (torch.randn(3, 8),))
    assert error.value.reason.startswith(reason)
    assert (error.value.node, error.value.operator, error.value.source) == (node, operator, place(code, name))
    assert error.value.way_out
    assert "\n" not in str(error.value)
    assert all(part in str(error.value) for part in (node, operator, place(code, name), reason, error.value.way_out))


def test_the_whole_model_goes_by_its_class(code: ModuleType) -> None:
    with pytest.raises(Refused, match="the model cannot be traced") as error:
        capture_module(code.Branching(), (torch.randn(3, 8),))
    assert error.value.node == "Branching"


@pytest.mark.parametrize(
    ("examples", "reason"),
    [
        ((torch.ones(2),), "the example inputs do not fit forward(x, y): missing a required argument: 'y'"),
        ((torch.ones(2),) * 3, "the example inputs do not fit forward(x, y): too many positional arguments"),
        ({"x": torch.ones(2), "z": torch.ones(2)}, "the example inputs do not fit forward(x, y): missing a required argument: 'y'"),
    ],
    ids=["missing", "too many", "another name"],
)
def test_examples_that_do_not_fit_are_refused_with_the_signature(code: ModuleType, examples: object, reason: str) -> None:
    with pytest.raises(Refused) as error:
        capture_module(code.Two(), examples)  # type: ignore[arg-type]
    assert (error.value.reason, error.value.node, error.value.source) == (reason, "Two", place(code, "Two"))


def test_an_output_that_is_no_tensor_is_refused(code: ModuleType) -> None:
    with pytest.raises(Refused, match="output 1 of the model is 3, not a tensor; return tensors only"):
        capture_module(code.Sized(), (torch.ones(2),))


def test_a_node_knows_the_line_of_the_model_that_made_it(code: ModuleType) -> None:
    graph = capture_module(code.Narrow().eval(), (torch.randn(3, 4),))
    (linear,) = [node for node in graph.nodes if node.op == "call_function"]
    assert linear.meta["source"] == place(code, "Narrow")
