"""Which operators the CPU runs with its own kernels.

A legalizer emits a node with a kernel and returns the node's value, or None if it bound the node itself, or a reason (text) why
no kernel fits; then the generic composition of ``lowering`` runs and the reason is listed.
"""

from __future__ import annotations

from qcompile.backends.cpu.legalize_codebooks import LEGALIZE_LINEAR
from qcompile.backends.cpu.legalize_images import LEGALIZE_IMAGES
from qcompile.backends.cpu.legalize_layers import LEGALIZE_LAYERS
from qcompile.backends.cpu.legalize_products import LEGALIZE_PRODUCTS
from qcompile.backends.cpu.legalize_sums import LEGALIZE_SUMS
from qcompile.backends.lowering.translate import Legalizer

LEGALIZE: dict[str, Legalizer] = {**LEGALIZE_LINEAR, **LEGALIZE_LAYERS, **LEGALIZE_IMAGES, **LEGALIZE_PRODUCTS, **LEGALIZE_SUMS}
