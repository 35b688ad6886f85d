"""Generation: a decoder's graph over whole texts becomes entries that continue a text from a cache, and a loop that samples from them."""

from qcompile.generation.entries import Cache, Decoder, decoder_entries
from qcompile.generation.generator import Continuation, Generator, Piece
from qcompile.generation.sampling import Sampling

__all__ = ["Cache", "Continuation", "Decoder", "Generator", "Piece", "Sampling", "decoder_entries"]
