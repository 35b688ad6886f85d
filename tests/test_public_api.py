"""What `import qcompile` offers: these names, documented, and nothing else."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
import torch

import qcompile
from qcompile import Artifact, Refused

DECLARED = [
    "Artifact",
    "BITS",
    "Context",
    "Graph",
    "Keeps",
    "Pass",
    "Pipeline",
    "Recipe",
    "Refused",
    "VALUES",
    "approximately",
    "compile",
    "load",
    "load_recipe",
]


def public_names(module: ModuleType) -> list[str]:
    return sorted(name for name in vars(module) if not name.startswith("_") and name != "annotations")


def test_declared_names() -> None:
    assert sorted(qcompile.__all__) == DECLARED
    assert dir(qcompile) == sorted([*DECLARED, "__version__"])
    for name in DECLARED:
        assert getattr(qcompile, name) is not None


def test_no_other_name_is_public() -> None:
    """In a fresh process: modules that other tests import become attributes of the package."""
    code = "import qcompile; print(*sorted(n for n in vars(qcompile) if not n.startswith('_')))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert set(found) <= {"annotations", "importlib", "TYPE_CHECKING", "Any"}
    with pytest.raises(AttributeError, match="has no attribute 'quantize'"):
        qcompile.quantize  # noqa: B018


@pytest.mark.parametrize("name", DECLARED)
def test_every_name_is_documented(name: str) -> None:
    item = getattr(qcompile, name)
    assert (inspect.getdoc(item) or "").splitlines()[0].endswith((".", ":"))
    if inspect.isclass(item):
        undocumented = [
            member
            for member, value in vars(item).items()
            if not member.startswith("_") and callable(value) and not inspect.getdoc(getattr(item, member))
        ]
        assert not undocumented


def test_compile_has_the_agreed_signature() -> None:
    parameters = inspect.signature(qcompile.compile).parameters
    assert list(parameters) == ["model", "example_inputs", "recipe", "target", "calibration", "dynamic_shapes", "native"]
    assert [p.kind for p in parameters.values()][2:] == [inspect.Parameter.KEYWORD_ONLY] * 5
    assert parameters["recipe"].default is None  # w8a8, or stored for a model that brings codes
    assert parameters["target"].default == "cpu"
    assert all(p.annotation is not inspect.Parameter.empty for p in parameters.values())
    assert inspect.signature(qcompile.compile).return_annotation == "Artifact"
    assert list(inspect.signature(qcompile.load).parameters) == ["path", "target", "threads", "trust_code"]
    assert (parameters["native"].default, inspect.signature(qcompile.load).parameters["trust_code"].default) == (False, False)


def test_refused_is_a_value_error_with_its_parts() -> None:
    error = Refused("no kernel", node="conv1", operator="aten.conv2d", way_out="use W8A8", source="net.py:7")
    assert isinstance(error, ValueError)
    assert str(error) == "conv1 (aten.conv2d) at net.py:7: no kernel; use W8A8"
    assert (error.reason, error.node, error.operator, error.way_out, error.source) == (
        "no kernel",
        "conv1",
        "aten.conv2d",
        "use W8A8",
        "net.py:7",
    )
    assert "\n" not in str(Refused("two\nlines", way_out="a\nb"))


# ---- every kind of model --------------------------------------------------------------------------------------------------


def compiled(model: Any, examples: Any = None, recipe: Any = "w8a8-dynamic", **more: Any) -> Artifact:
    return qcompile.compile(model, examples, recipe=recipe, target="reference", **more)


def relative_error(found: Any, expected: torch.Tensor) -> float:
    return float((torch.as_tensor(found) - expected).norm() / expected.norm())


@pytest.fixture
def mlp(tiny: ModuleType) -> tuple[torch.nn.Module, tuple[torch.Tensor, ...]]:
    return tiny.mlp()[:2]


def test_takes_a_module_and_leaves_it_as_it_was(mlp: Any) -> None:
    module, examples = mlp
    module.train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    artifact = compiled(module, examples)
    assert module.training
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert relative_error(artifact(*examples), module(*examples).detach()) < 0.05


def test_takes_an_exported_program_and_its_file(mlp: Any, tmp_path: Path) -> None:
    module, examples = mlp
    program = torch.export.export(module, examples)
    torch.export.save(program, tmp_path / "net.pt2")
    direct, file = compiled(program), compiled(tmp_path / "net.pt2")
    assert direct.graph.digest == file.graph.digest
    assert relative_error(direct(*examples), module(*examples).detach()) < 0.05


def linear_onnx() -> onnx.ModelProto:
    helper, weight = onnx.helper, np.random.default_rng(0).standard_normal((8, 4)).astype(np.float32)
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    x, y = (helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", size]) for name, size in (("x", 8), ("y", 4)))
    graph = helper.make_graph([node], "net", [x], [y], [onnx.numpy_helper.from_array(weight, "w")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def test_takes_an_onnx_model_and_its_file(tmp_path: Path) -> None:
    model = linear_onnx()
    onnx.save(model, tmp_path / "net.onnx")
    direct, file = compiled(model), compiled(str(tmp_path / "net.onnx"))
    assert direct.graph.digest == file.graph.digest
    x = torch.randn(3, 8)
    weight = torch.from_numpy(onnx.numpy_helper.to_array(model.graph.initializer[0]).copy())
    assert relative_error(direct(x), x @ weight) < 0.05


def test_takes_a_python_function(repository: Path, mlp: Any) -> None:
    artifact = compiled(f"python:{repository / 'tests' / 'tiny_models.py'}:mlp")
    module, _ = mlp
    x = torch.randn(6, 8)  # the function says that the batch is dynamic
    assert relative_error(artifact(x), module(x).detach()) < 0.05


def test_takes_a_hugging_face_folder(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="the extra hf is not installed")
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, max_position_embeddings=32
    )
    module = transformers.BertModel(config).eval()
    module.save_pretrained(tmp_path)
    artifact = compiled(tmp_path)
    tokens = torch.randint(0, 40, (3, 9))
    with torch.no_grad():
        expected = module(input_ids=tokens, attention_mask=torch.ones_like(tokens)).last_hidden_state
    assert relative_error(artifact(input_ids=tokens, attention_mask=torch.ones_like(tokens)), expected) < 0.05
    assert {layer["op"] for layer in artifact.report["layers"]} == {"qc.linear", "qc.embedding"}


@pytest.mark.parametrize("model", [42, None, object(), torch.zeros(3)], ids=["number", "none", "object", "tensor"])
def test_refuses_what_is_no_model(model: Any) -> None:
    with pytest.raises(Refused, match="is no model that can be compiled"):
        compiled(model)


def test_refuses_a_module_without_examples(mlp: Any) -> None:
    with pytest.raises(Refused, match="example inputs, none were given"):
        compiled(mlp[0])


def test_refuses_what_cannot_be_traced_with_its_line(tiny: ModuleType) -> None:
    with pytest.raises(Refused, match=r"tiny_models\.py:\d+: the model cannot be traced") as error:
        compiled(*tiny.untraceable())
    line = int(error.value.source.rsplit(":", 1)[1])
    assert "x.sum() > 0" in Path(tiny.__file__).read_text().splitlines()[line - 1]


# ---- sizes ----------------------------------------------------------------------------------------------------------------


def test_without_dynamic_shapes_every_size_is_the_examples(mlp: Any) -> None:
    artifact = compiled(*mlp)
    with pytest.raises(Refused, match=r"x: axis 0 has size 3, expected 1 of f32\[1,8\]"):
        artifact(torch.zeros(3, 8))


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("size", [1, 3])
def test_a_batch_of_one_can_be_traced_as_dynamic(tiny: ModuleType, by_name: bool, size: int) -> None:
    module, examples, sizes = tiny.two()
    examples = tuple(example.repeat(size, 1) for example in examples)
    named = dict(zip(("tokens", "shift"), sizes, strict=True)) if by_name else sizes
    artifact = compiled(
        module, dict(zip(("tokens", "shift"), examples, strict=True)) if by_name else examples, recipe="float", dynamic_shapes=named
    )
    assert [str(kind) for kind in artifact.graph.input_types] == ["i64[batch,seq]", "f32[batch,8]"]
    for batch, length in ((1, 1), (2, 7), (5, 3)):
        tokens, shift = torch.randint(0, 20, (batch, length)), torch.randn(batch, 8)
        with torch.no_grad():
            expected = module(tokens, shift)
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(artifact(tokens, shift), expected, strict=True))


def test_dynamic_shapes_that_do_not_fit_are_refused(tiny: ModuleType) -> None:
    module, examples, _ = tiny.two()
    with pytest.raises(Refused, match="dynamic sizes are given for 1 inputs, the examples are 2"):
        compiled(module, examples, dynamic_shapes=[{0: "batch"}])
    with pytest.raises(Refused, match=r"token: dynamic sizes are given for it and there is no such input"):
        compiled(module, examples, dynamic_shapes={"token": {0: "batch"}})


# ---- calibration and recipes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tuples", "dicts", "numpy", "generator", "tensors"])
def test_every_iterable_calibrates_alike(mlp: Any, kind: str) -> None:
    module, examples = mlp
    data = [torch.randn(1, 8, generator=torch.Generator().manual_seed(i)) * (i + 1) for i in range(3)]
    forms: dict[str, Callable[[], Any]] = {
        "tuples": lambda: [(x,) for x in data],
        "dicts": lambda: [{"x": x} for x in data],
        "numpy": lambda: [(x.numpy(),) for x in data],
        "generator": lambda: ((x,) for x in data),
        "tensors": lambda: data,
    }
    artifact = compiled(module, examples, "w8a8", calibration=forms[kind]())
    scale = artifact.graph.constant(artifact.graph.node("x.quantizer_scale"))
    low, high = min(float(x.min()) for x in data), max(float(x.max()) for x in data)
    assert float(scale) == pytest.approx((high - low) / 255, rel=1e-6)


def test_calibration_that_does_not_fit_is_refused(mlp: Any) -> None:
    with pytest.raises(Refused, match=r"input 'x' is f32\[1,8\], the data is f32\[1,9\]"):
        compiled(*mlp, "w8a8", calibration=[(torch.zeros(1, 9),)])
    with pytest.raises(Refused, match="NaN or infinity"):
        compiled(*mlp, "w8a8", calibration=[(torch.full((1, 8), torch.nan),)])
    with pytest.raises(Refused, match="there is no calibration data in it"):
        compiled(*mlp, "w8a8", calibration=iter(()))


PIPELINE = "canonicalize, assign-bits{scheme=W8A8-dynamic}, insert-quantizers, quantize-weights, materialize, fuse-epilogue"


@pytest.mark.parametrize("kind", ["name", "path", "recipe", "pipeline"])
def test_a_recipe_is_a_name_a_path_a_recipe_or_pipeline_text(mlp: Any, tmp_path: Path, kind: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(f"name: mine\nneeds_data: false\npipeline: '{PIPELINE}'\n")
    given = {
        "name": "w8a8-dynamic",
        "path": file,
        "recipe": qcompile.Recipe(name="mine", pipeline=PIPELINE, needs_data=False),
        "pipeline": PIPELINE,
    }[kind]
    artifact = compiled(*mlp, given)
    assert [(layer["weight"], layer["activation"]) for layer in artifact.report["layers"]] == [
        ("int8 channel=0 sym", "int8 token sym dynamic")
    ] * 2


def test_the_float_recipe_changes_no_value(tiny: ModuleType) -> None:
    module, examples, _ = tiny.cnn()
    assert relative_error(compiled(module, examples, "float")(*examples), module(*examples).detach()) < 1e-5


# ---- calling --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two(tiny_artifact: Callable[..., Artifact], tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    path = tmp_path_factory.mktemp("two") / "model.qc"
    tiny_artifact("two").save(path)
    return qcompile.load(path)


def arrays(batch: int = 2, length: int = 4) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {"tokens": generator.integers(0, 20, (batch, length)), "shift": generator.standard_normal((batch, 8)).astype(np.float32)}


def test_numpy_in_numpy_out_torch_in_torch_out(two: Artifact) -> None:
    given = arrays()
    by_numpy = two(given["tokens"], given["shift"])
    by_torch = two(*(torch.from_numpy(value) for value in given.values()))
    assert [type(value) for value in by_numpy] == [np.ndarray] * 2
    assert [type(value) for value in by_torch] == [torch.Tensor] * 2
    assert [value.shape for value in by_numpy] == [(2, 4, 8), (2, 8)]
    for ways in (two(given), two(**given), two(given["tokens"], shift=given["shift"])):
        assert all(np.array_equal(a, b) for a, b in zip(ways, by_numpy, strict=True))
    assert all(np.array_equal(a.numpy(), b) for a, b in zip(by_torch, by_numpy, strict=True))


def test_arrays_are_not_written_and_need_not_be_contiguous(two: Artifact) -> None:
    given = arrays()
    expected = two(given)
    wide = np.zeros((4, 16), np.float32)
    wide[::2, ::2] = given["shift"]
    strange = {"tokens": np.asfortranarray(given["tokens"]), "shift": wide[::2, ::2]}
    strange["tokens"].flags.writeable = False
    assert not strange["shift"].flags.c_contiguous
    assert all(np.array_equal(a, b) for a, b in zip(two(strange), expected, strict=True))
    swapped = {"tokens": given["tokens"].astype(">i8"), "shift": given["shift"][:, ::-1].copy()[:, ::-1]}
    assert all(np.array_equal(a, b) for a, b in zip(two(swapped), expected, strict=True))


def bad_calls() -> Iterator[tuple[str, Callable[[dict[str, np.ndarray]], tuple[tuple[Any, ...], dict[str, Any]]], str]]:
    yield "missing", lambda a: ((a["tokens"],), {}), r"shift: the input is missing; inputs are tokens, shift"
    yield "unknown", lambda a: ((), a | {"mask": a["shift"]}), r"mask: there is no such input"
    yield "twice", lambda a: ((a["tokens"],), a), r"tokens: it is given twice"
    yield "many", lambda a: ((*a.values(), 1), {}), r"takes 2 inputs \(tokens, shift\), 3 were given"
    yield "dtype", lambda a: ((), a | {"shift": a["shift"].astype(np.float64)}), r"shift: expected f32\[batch,8\], the array is f64\[2, 8\]"
    yield "rank", lambda a: ((), a | {"shift": a["shift"][0]}), r"shift: expected f32\[batch,8\], the array has shape \[8\]"
    yield "size", lambda a: ((), a | {"shift": a["shift"][:, :7]}), r"shift: axis 1 has size 7, expected 8"
    yield "symbol", lambda a: ((), a | {"shift": a["shift"][:1]}), r"shift: axis 0 \(batch\) has size 1, input tokens has 2"
    yield "empty", lambda a: ((), {k: v[:0] for k, v in a.items()}), r"tokens: axis 0 \(batch\) has size 0, allowed are 1 to"
    yield "text", lambda a: ((), a | {"shift": "abc"}), r"shift: a str is no array that can be taken"
    yield "objects", lambda a: ((), a | {"shift": np.array([None] * 8)}), r"shift: a ndarray is no array that can be taken"


BAD = list(bad_calls())


@pytest.mark.parametrize(("change", "message"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_arrays_that_do_not_fit_are_refused(two: Artifact, change: Any, message: str) -> None:
    args, kwargs = change(arrays())
    with pytest.raises(Refused, match=message):
        two(*args, **kwargs)


@pytest.mark.parametrize("index", [20, -1, 2**40])
def test_a_table_is_not_read_beyond_its_end(two: Artifact, index: int) -> None:
    given = arrays()
    given["tokens"][1, 2] = index
    with pytest.raises(Refused, match="tokens: it holds an index outside of its table, allowed are 0 to 19"):
        two(given)
