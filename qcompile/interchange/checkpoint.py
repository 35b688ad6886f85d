"""A checkpoint of a language model as all formats are read to and written from: configuration, weights with codes, float tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from qcompile.formats import Group, Quantized


@dataclass(frozen=True)
class StoredWeight:
    """A weight [out, in] with the codes that its checkpoint stores.

        value[r, order[c]] = scale[r, g] * (code[r, c] - zero_point[r, g]) - minimum[r, g]        g = the group of c

    Attributes:
        quantized: codes [out, in], scale, zero point and scheme.
        minimum: f32[out, groups], subtracted from every value of a group, where the format has real minima instead of integer zero points.
        order: i64[in], which input each column of codes multiplies, where groups do not lie side by side; None: column c, input c.
    """

    quantized: Quantized
    minimum: torch.Tensor | None = None
    order: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.quantized.codes.shape)

    def dequantize(self) -> torch.Tensor:
        """Return the values f32[out, in], columns in the order of the model's inputs."""
        values = self.quantized.dequantize()
        if self.minimum is not None:
            granularity = self.quantized.scheme.granularity
            assert isinstance(granularity, Group)
            values = values - granularity.expand(self.minimum, self.shape)
        if self.order is not None:
            values = torch.empty_like(values).index_copy_(1, self.order, values)
        return values


@dataclass
class Checkpoint:
    """A model as a file or folder of another tool says it.

    Attributes:
        config: the Hugging Face configuration, without what it says of quantization.
        weights: by the model's own names, such as ``model.layers.0.mlp.up_proj.weight``: float tensors, and weights with codes.
        tokenizer: content of a ``tokenizer.json``.
        end_tokens: that end a text.
    """

    config: dict[str, Any]
    weights: Mapping[str, torch.Tensor | StoredWeight]
    tokenizer: bytes | None = None
    end_tokens: tuple[int, ...] = ()
    notes: list[str] = field(default_factory=list)

    @property
    def stored(self) -> dict[str, StoredWeight]:
        """The weights that have codes."""
        return {name: weight for name, weight in self.weights.items() if isinstance(weight, StoredWeight)}
