"""Generation: a decoder's graph over whole texts becomes entries that continue a text from a cache, and a loop that samples from them."""

from qcompile.generation.entries import Cache, Decoder, decoder_entries

__all__ = ["Cache", "Decoder", "decoder_entries"]
