"""Attention of a chunk of new tokens over the KV cache that they are written to already."""
