"""Attention of one new token a sequence: norms, rotation, write to the KV cache, and the attention over it."""
