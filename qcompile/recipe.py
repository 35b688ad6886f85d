"""Recipes: a pipeline, the schemes of the layers, and the calibration defaults, as one validated YAML file."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from qcompile.errors import Refused
from qcompile.nearest import nearest_name
from qcompile.pipeline import Pipeline, parse_pipeline
from qcompile.registry import find_pass

DEFAULT_RECIPE = "w8a8"
CODES_RECIPE = "stored"  # the default for a model whose weights have codes already


class Schemes(BaseModel):
    """Schemes by kind of layer, as ``parse_layer_scheme`` reads them, and by pattern over names of weights, nodes and modules.

    ``depthwise`` convolutions have one input channel for each group; empty, they are as ``conv2d``. ``attention`` and ``matmul`` (of two
    values that are both computed) have no weight: what they name is the scheme of their operands.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    linear: str = "float"
    conv2d: str = "float"
    depthwise: str = ""
    embedding: str = "float"
    attention: str = "float"
    matmul: str = "float"
    layers: dict[str, str] = Field(default_factory=dict)

    @field_validator("linear", "conv2d", "embedding", "attention", "matmul")
    @classmethod
    def _known(cls, value: str) -> str:
        from qcompile.formats import parse_layer_scheme

        parse_layer_scheme(value)
        return value

    @field_validator("depthwise")
    @classmethod
    def _known_or_empty(cls, value: str) -> str:
        return cls._known(value) if value else value

    @field_validator("layers")
    @classmethod
    def _known_layers(cls, value: dict[str, str]) -> dict[str, str]:
        return {pattern: cls._known(text) for pattern, text in value.items()}


class Recipe(BaseModel):
    """What to do with a model.

    Attributes:
        name: the recipe's name.
        summary: one line.
        pipeline: passes as text.
        schemes: what each layer becomes.
        calibration_samples: how many samples of the calibration data are used.
        needs_data: the pipeline reads calibration data.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    summary: str = ""
    pipeline: str
    schemes: Schemes = Schemes()
    calibration_samples: int = Field(default=128, ge=1)
    needs_data: bool = True

    @field_validator("pipeline", mode="before")
    @classmethod
    def _joined(cls, value: Any) -> Any:
        """A pipeline may be a list of passes, one a line."""
        return ", ".join(value) if isinstance(value, list) and all(isinstance(item, str) for item in value) else value

    def parsed_pipeline(self) -> Pipeline:
        """Return the pipeline with its order checked."""
        pipeline = parse_pipeline(self.pipeline, find_pass)
        pipeline.check_order()
        return pipeline

    def canonical(self) -> str:
        """Return the recipe as YAML that says everything, for digests and the manifest."""
        return yaml.safe_dump(self.model_dump(), sort_keys=True)


def recipe_names() -> list[str]:
    """Return the names of the recipes that ship."""
    return sorted(item.name.removesuffix(".yaml") for item in resources.files("qcompile.recipes").iterdir() if item.name.endswith(".yaml"))


def load_recipe(recipe: str | Path | Recipe) -> Recipe:
    """Return a recipe from its name, a YAML file, the text of a pipeline, or a Recipe itself.

    Raises:
        Refused: unknown name, key or scheme, each with the nearest known one.
    """
    if isinstance(recipe, Recipe):
        return recipe
    text = str(recipe)
    if text in recipe_names():
        return _validated(resources.files("qcompile.recipes").joinpath(f"{text}.yaml").read_text(), text)
    path = Path(text)
    if path.suffix in (".yaml", ".yml"):
        return _validated(_read(path), text)
    if "," in text or "{" in text or _is_pass(text):
        return Recipe(
            name="custom",
            summary="given as pipeline text",
            pipeline=str(parse_pipeline(text, find_pass)),
            schemes=Schemes(linear="W8A8", conv2d="W8A8", embedding=_TABLE),
        )
    raise Refused(f"unknown recipe '{text}'", way_out=nearest_name(text, recipe_names()))


def _read(path: Path) -> str:
    if not path.is_file():
        raise Refused("there is no such recipe file", node=str(path))
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(f"the recipe is no text that can be read: {error}", node=str(path)) from error


_TABLE = "weight=int8 channel=0 sym; activation=float"


def _is_pass(text: str) -> bool:
    from qcompile.registry import names

    return text in names("pass")


def _validated(text: str, source: str) -> Recipe:
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise Refused(f"the recipe is no YAML: {' '.join(str(error).split())}", node=source) from error
    if not isinstance(content, dict):
        raise Refused("the recipe is no mapping of keys", node=source)
    try:
        recipe = Recipe(**content)
    except (ValidationError, TypeError) as error:
        raise _invalid(error, source) from error
    recipe.parsed_pipeline()
    return recipe


def _invalid(error: ValidationError | TypeError, source: str) -> Refused:
    if isinstance(error, TypeError):
        return Refused(f"a key of the recipe is no text: {error}", node=source)
    first = error.errors()[0]
    place = ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        known = Schemes.model_fields if first["loc"][0] == "schemes" else Recipe.model_fields
        return Refused(f"unknown key '{place}'", node=source, way_out=nearest_name(str(first["loc"][-1]), known))
    return Refused(f"{place}: {first['msg'].removeprefix('Value error, ')}", node=source)
