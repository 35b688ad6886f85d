"""Groups that do not lie side by side (``desc_act``, ``actorder``): sort a weight's columns so that they do."""

from __future__ import annotations

import dataclasses

import torch

from qcompile.errors import Refused
from qcompile.formats import Group, Quantized
from qcompile.interchange.checkpoint import StoredWeight


def sorted_columns(quantized: Quantized, groups: torch.Tensor, place: str) -> StoredWeight:
    """Return a weight whose columns are sorted by group, in their old order inside of each; no code changes.

    Args:
        quantized: codes [out, in] in the order of the inputs; scales [out, groups].
        groups: int[in], the group of each input.
        place: file and layer, for messages.

    Raises:
        Refused: a group has not as many inputs as the scheme says.
    """
    granularity = quantized.scheme.granularity
    inputs = quantized.codes.shape[1]
    if not isinstance(granularity, Group):
        return StoredWeight(quantized)
    sizes = torch.full((granularity.scale_shape((1, inputs))[1],), granularity.size)
    sizes[-1] = inputs - granularity.size * (len(sizes) - 1)
    groups = groups.to(torch.int64)
    if len(groups) != inputs or int(groups.min()) < 0 or int(groups.max()) >= len(sizes):
        raise Refused(f"g_idx does not name one of {len(sizes)} groups for each of {inputs} inputs", node=place)
    if not torch.equal(torch.bincount(groups, minlength=len(sizes)), sizes):
        raise Refused(f"g_idx gives some group another number of inputs than {granularity.size}", node=place)
    order = torch.argsort(groups, stable=True)
    if torch.equal(order, torch.arange(inputs)):
        return StoredWeight(quantized)
    return StoredWeight(dataclasses.replace(quantized, codes=quantized.codes[:, order].contiguous()), order=order)
