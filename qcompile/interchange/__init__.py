"""Quantized checkpoints of other tools: read with their codes unchanged, and written from artifacts.

One file for each format does nothing but bytes <-> (codes, scale, zero point, scheme): ``gptq``, ``awq``, ``compressed_tensors``, and the
blocks of ``gguf_blocks``. What they share is a ``Checkpoint``: ``install`` captures one as a graph whose weights bring their codes along,
``collect`` takes one out of an artifact.
"""

from qcompile.interchange.checkpoint import Checkpoint, StoredWeight
from qcompile.interchange.folder import is_quantized_folder, read_folder
from qcompile.interchange.install import capture_checkpoint

__all__ = ["Checkpoint", "StoredWeight", "capture_checkpoint", "is_quantized_folder", "read_folder"]
