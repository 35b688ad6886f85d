"""Recipes are checked whole before any work starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from qcompile import Recipe, Refused, load_recipe
from qcompile.formats import parse_layer_scheme
from qcompile.recipe import recipe_names

SHIPPED = ["bf16", "dfq", "float", "w4a16", "w4a8", "w4a8kv4", "w8a8", "w8a8-dynamic"]


def test_the_recipes_that_ship() -> None:
    assert set(SHIPPED) <= set(recipe_names())


@pytest.mark.parametrize("name", recipe_names())
def test_a_shipped_recipe_is_whole(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.summary
    texts = {item.name() for item in recipe.parsed_pipeline().passes}
    assert recipe.needs_data == (name not in ("float", "bf16", "dfq", "w8a8-dynamic", "stored"))
    chooses = {"keep-codes"} if name == "stored" else {"assign-bits", "insert-quantizers", "quantize-weights"}
    assert name == "float" or {*chooses, "materialize", "fuse-epilogue"} <= texts
    for text in (recipe.schemes.linear, recipe.schemes.conv2d, recipe.schemes.embedding):
        parse_layer_scheme(text)


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_can_be_written_out_and_read_again(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    (tmp_path / "again.yaml").write_text(recipe.canonical())
    assert load_recipe(tmp_path / "again.yaml") == recipe


WHOLE = {"name": "mine", "pipeline": ["canonicalize"]}


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: m\npipeline: canonicalize\npipline: x", r"mine\.yaml: unknown key 'pipline'; did you mean 'pipeline'\?"),
        ("name: m\npipeline: canonicalize\nschemes: {liner: W8A8}", r"unknown key 'schemes\.liner'; did you mean 'linear'\?"),
        ("name: m\npipeline: canonicalize\nschemes: {linear: W8B8}", r"schemes\.linear: unknown scheme name 'W8B8'"),
        ("name: m\npipeline: canonicalize\nschemes: {layers: {'*.head': int99}}", r"schemes\.layers: .*'int99'"),
        ("name: m\npipeline: canonicalise", r"unknown pass 'canonicalise'; did you mean 'canonicalize'\?"),
        ("name: m\npipeline: [canonicalize, 3]", "pipeline: Input should be a valid string"),
        ("name: m\npipeline: [insert-quantizers]", "insert-quantizers needs assign-bits before it"),
        ("name: m", "pipeline: Field required"),
        ("name: m\npipeline: canonicalize\ncalibration_samples: 0", "calibration_samples: Input should be greater than or equal to 1"),
        ("name: m\npipeline: canonicalize\nneeds_data: maybe", "needs_data: Input should be a valid boolean"),
        ("- a\n- b", "the recipe is no mapping of keys"),
        ("", "the recipe is no mapping of keys"),
        ("{", "the recipe is no YAML"),
        ("name: !!python/object/apply:os.system [ls]", "the recipe is no YAML"),
        ("1: a", "a key of the recipe is no text"),
    ],
)
def test_a_recipe_that_is_wrong_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(Refused, match=message) as error:
        load_recipe(written(tmp_path, text))
    assert "\n" not in str(error.value)


def test_a_file_that_is_missing_or_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="there is no such recipe file"):
        load_recipe(tmp_path / "absent.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(Refused, match=r"bytes\.yaml: the recipe is no"):
        load_recipe(tmp_path / "bytes.yaml")


def test_names_are_refused_with_the_nearest() -> None:
    with pytest.raises(Refused, match=r"unknown recipe 'w8a'; did you mean 'w8a8'\?"):
        load_recipe("w8a")
    with pytest.raises(Refused, match="unknown recipe 'zzzz'; known are bf16, dfq, "):
        load_recipe("zzzz")


def test_a_recipe_is_frozen() -> None:
    recipe = Recipe(name="mine", pipeline="canonicalize")
    assert load_recipe(recipe) is recipe
    with pytest.raises(ValueError, match="frozen"):
        recipe.name = "other"  # type: ignore[misc]
