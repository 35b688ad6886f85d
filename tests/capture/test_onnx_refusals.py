"""ONNX files that are damaged, hostile or outside what is imported: each is refused in one line that names the place."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from qcompile.capture.onnx import capture_onnx
from qcompile.errors import Refused

X = np.linspace(-2, 2, 15, dtype=np.float32).reshape(3, 5)


def make_model(
    nodes: list[Any], inputs: dict[str, Any], constants: dict[str, np.ndarray], output: str = "y", opset: int = 21
) -> onnx.ModelProto:
    """Return a model with one output; an input is an array or (dtype, shape)."""
    infos = [
        helper.make_tensor_value_info(
            name, *(value if isinstance(value, tuple) else (helper.np_dtype_to_tensor_dtype(value.dtype), value.shape))
        )
        for name, value in inputs.items()
    ]
    initializers = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "g", infos, [onnx.ValueInfoProto(name=output)], initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def floats(count: int) -> np.ndarray:
    return np.linspace(-1, 1, count, dtype=np.float32)


def ints(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def refusal(source: Any) -> Refused:
    with pytest.raises(Refused) as caught:
        capture_onnx(source)
    assert "\n" not in str(caught.value)
    return caught.value


def relu_model(**constants: np.ndarray) -> onnx.ModelProto:
    return make_model([helper.make_node("Add", ["x", "w"], ["y"], name="sum")], {"x": X}, constants)


def test_unknown_operator_is_named() -> None:
    error = refusal(make_model([helper.make_node("Frobnicate", ["x"], ["y"], name="n7")], {"x": X}, {}))
    assert (error.node, error.operator) == ("n7", "Frobnicate")
    assert error.way_out


def test_operator_of_another_domain_is_named() -> None:
    error = refusal(make_model([helper.make_node("Relu", ["x"], ["y"], name="n", domain="evil\x1b[31m")], {"x": X}, {}))
    assert error.operator == "Relu"
    assert "\x1b" not in str(error)


def test_missing_file(tmp_path: Path) -> None:
    assert "cannot be read" in str(refusal(tmp_path / "no.onnx"))
    assert "regular" in str(refusal(tmp_path))


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04 not a model", b"\x00" * 64, bytes(range(256))])
def test_other_files_are_refused(data: bytes) -> None:
    refusal(data)


def test_file_cut_at_any_place_is_refused() -> None:
    data = relu_model(w=floats(5)).SerializeToString()
    capture_onnx(data)
    for length in range(len(data)):
        refusal(data[:length])


def test_cycle_is_refused() -> None:
    nodes = [helper.make_node("Add", ["x", "b"], ["a"], name="first"), helper.make_node("Relu", ["a"], ["b"], name="second")]
    error = refusal(make_model(nodes, {"x": X}, {}, "b"))
    assert "cycle" in error.reason
    assert error.node in ("first", "second")


def test_undefined_input_is_refused() -> None:
    error = refusal(make_model([helper.make_node("Add", ["x", "ghost"], ["y"], name="sum")], {"x": X}, {}))
    assert "ghost" in error.reason
    assert error.node == "sum"
    error = refusal(make_model([helper.make_node("Add", ["x"], ["y"], name="sum")], {"x": X}, {}))
    assert "input 1 is missing" in error.reason


@pytest.mark.parametrize("dims", [(1 << 40,), (1 << 32, 1 << 32), (1 << 62, 4), (-4,), (0, 1 << 62, 3)])
def test_sizes_that_the_data_does_not_have_are_refused_before_memory_is_taken(dims: tuple[int, ...]) -> None:
    """CVE-2024-27319, GGUF's integer overflows: a file of a hundred bytes must not ask for terabytes."""
    for raw in (True, False):
        tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=dims)
        if raw:
            tensor.raw_data = b"\x00" * 4
        else:
            tensor.float_data.append(0.0)
        model = relu_model()
        model.graph.initializer.append(tensor)
        assert refusal(model).node == "w"


@pytest.mark.parametrize("operator", ["ConstantOfShape", "Expand", "Tile"])
def test_constants_computed_at_import_are_bounded(operator: str) -> None:
    inputs = ["shape"] if operator == "ConstantOfShape" else ["one", "shape"]
    nodes = [
        helper.make_node(operator, inputs, ["h"], name="huge"),
        helper.make_node("Exp", ["h"], ["e"]),
        helper.make_node("Add", ["x", "e"], ["y"]),
    ]
    assert "the result is a constant" in refusal(make_model(nodes, {"x": X}, {"shape": ints(1 << 40), "one": floats(1)})).reason


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_no_numbers_are_refused(bad: float) -> None:
    weight = floats(5)
    weight[2] = bad
    assert refusal(relu_model(w=weight)).node == "w"


def test_infinite_mask_is_accepted() -> None:
    capture_onnx(relu_model(w=np.array([0, -np.inf, 0, 0, -np.inf], np.float32)))


def test_string_and_control_flow_are_refused() -> None:
    refusal(make_model([helper.make_node("Identity", ["x"], ["y"])], {"x": (TensorProto.STRING, [2])}, {}))
    body = helper.make_graph([helper.make_node("Identity", ["x"], ["t"])], "b", [], [onnx.ValueInfoProto(name="t")])
    node = helper.make_node("If", ["c"], ["y"], name="branch", then_branch=body, else_branch=body)
    assert refusal(make_model([node], {"x": X, "c": np.array(True)}, {})).node == "branch"


def test_old_operator_set_is_refused() -> None:
    assert "operator set 6" in refusal(make_model([helper.make_node("Relu", ["x"], ["y"])], {"x": X}, {}, opset=6)).reason


def external_model(location: str, length: int = 20, offset: int = 0) -> onnx.ModelProto:
    model = relu_model()
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[5], data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location, "offset": str(offset), "length": str(length)}.items():
        tensor.external_data.add(key=key, value=value)
    model.graph.initializer.append(tensor)
    return model


def saved(model: onnx.ModelProto, folder: Path) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def test_external_data_is_read(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    values = floats(5)
    (tmp_path / "data" / "w.bin").write_bytes(b"pad!" + values.tobytes())
    graph = capture_onnx(saved(external_model("data/w.bin", offset=4), tmp_path))
    assert torch.equal(graph.constants["w"], torch.from_numpy(values))


@pytest.mark.parametrize("location", ["../w.bin", "a/../../w.bin", "/etc/hostname", "..\\w.bin", "C:w.bin", "w\x00.bin", "absent.bin", ""])
def test_external_data_outside_the_folder_is_refused(tmp_path: Path, location: str) -> None:
    """CVE-2022-25882, CVE-2024-27318."""
    (tmp_path / "w.bin").write_bytes(bytes(20))
    inner = tmp_path / "inner"
    inner.mkdir()
    assert "data" in refusal(saved(external_model(location), inner)).reason


@pytest.mark.parametrize("kind", ["symlink", "parent symlink", "hard link", "fifo", "short", "length"])
def test_external_data_that_is_no_plain_file_is_refused(tmp_path: Path, kind: str) -> None:
    """CVE-2026-27489, CVE-2026-34446: links reach other files; a FIFO would wait for ever."""
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "w.bin").write_bytes(bytes(20))
    inner = tmp_path / "inner"
    inner.mkdir()
    location, length = "w.bin", 20
    if kind == "symlink":
        (inner / "w.bin").symlink_to(tmp_path / "secret" / "w.bin")
    elif kind == "parent symlink":
        (inner / "d").symlink_to(tmp_path / "secret")
        location = "d/w.bin"
    elif kind == "hard link":
        os.link(tmp_path / "secret" / "w.bin", inner / "w.bin")
    elif kind == "fifo":
        os.mkfifo(inner / "w.bin")
    else:
        (inner / "w.bin").write_bytes(bytes(8))
        length = 20 if kind == "short" else 8
    refusal(saved(external_model(location, length), inner))


def test_external_data_of_a_model_from_memory_is_refused() -> None:
    assert "folder" in refusal(external_model("w.bin")).reason


@pytest.mark.parametrize(
    ("operator", "constants", "attributes"),
    [
        ("Slice", {"a": ints(-1), "b": ints(-(1 << 50)), "c": ints(0), "d": ints(-1)}, {}),
        ("Pad", {"a": ints(1 << 40, 0)}, {"mode": "edge"}),
        ("Resize", {"a": np.zeros(0, np.float32), "b": np.zeros(0, np.float32), "c": ints(1 << 40)}, {"mode": "linear"}),
        ("Resize", {"a": np.zeros(0, np.float32), "b": np.zeros(0, np.float32), "c": ints(1 << 40)}, {"mode": "nearest"}),
        ("LRN", {}, {"size": 1 << 40}),
    ],
)
def test_tables_made_at_import_are_bounded(operator: str, constants: dict[str, np.ndarray], attributes: dict[str, Any]) -> None:
    shape = {"LRN": [1, 4, 2, 2], "Slice": [1 << 40]}.get(operator, [4])
    node = helper.make_node(operator, ["x", *constants], ["y"], name="n", **attributes)
    assert refusal(make_model([node], {"x": (TensorProto.FLOAT, shape)}, constants, opset=18)).node == "n"


def test_damaged_models_are_imported_or_refused() -> None:
    """Bits turned, bytes cut, put in, overwritten with large numbers: nothing else than Refused comes out."""
    nodes = [
        helper.make_node("Gemm", ["x", "w", "b"], ["h"], transB=1),
        helper.make_node("Reshape", ["h", "s"], ["r"]),
        helper.make_node("Slice", ["r", "from", "to"], ["p"]),
        helper.make_node("Pad", ["p", "pads"], ["y"]),
    ]
    constants = {
        "w": floats(20).reshape(4, 5),
        "b": floats(4),
        "s": ints(-1, 2, 2),
        "from": ints(0),
        "to": ints(2),
        "pads": ints(0, 1, 0, 0, 1, 0),
    }
    data = make_model(nodes, {"x": X}, constants).SerializeToString()
    generator = random.Random(3)
    refused = 0
    for _ in range(300):
        damaged = bytearray(data)
        for _ in range(generator.randint(1, 3)):
            place, kind = generator.randrange(len(damaged)), generator.randrange(4)
            if kind == 0:
                damaged[place] ^= 1 << generator.randrange(8)
            elif kind == 1:
                del damaged[place : place + generator.randint(1, 8)]
            elif kind == 2:
                damaged[place:place] = generator.randbytes(generator.randint(1, 8))
            else:
                damaged[place : place + 5] = b"\xff\xff\xff\xff\x07"
        try:
            capture_onnx(bytes(damaged))
        except Refused:
            refused += 1
    assert 100 < refused < 300
