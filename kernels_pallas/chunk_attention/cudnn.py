"""Attention of a chunk by cuDNN's flash attention, which keeps no scores.

cuDNN's causal mask begins at the first query and the first key, while a chunk begins anywhere, elsewhere in each
sequence. A mask of our own would be an array for it to read, and no tile would be left out. So a chunk attends twice:
to its own tokens, causally, and to all positions before them, whose number cuDNN takes. The two are added up by the
sums of their weights, as flash attention does with its tiles (arXiv 2205.14135). With a sliding window a chunk sees
little before itself: one call, over a stretch of the cache on which the queries are placed where they belong.
"""

import jax
import jax.numpy as jnp

DTYPES = ("bfloat16", "float16")
HOPPER = 9.0  # the first whose kernels have heads of more than 128 elements


def problem(queries, keys) -> str | None:
    """Why these shapes and dtypes cannot be done, or None. Takes arrays or anything that has their shape and dtype."""
    head_dim = queries.shape[-1]
    if queries.dtype != keys.dtype or queries.dtype.name not in DTYPES:
        return f"queries {queries.dtype} and keys {keys.dtype} must be one of {', '.join(DTYPES)}, the same for both"
    capability = getattr(jax.devices()[0], "compute_capability", None)  # none on a CPU, where this is only lowered
    most = 256 if capability is None or float(capability) >= HOPPER else 128
    if head_dim % 8 or head_dim > most:
        return f"heads of {head_dim} elements are not a multiple of 8, of at most {most}"
    return None


def chunk_attention(queries, keys, values, positions, *, sliding_window: int | None):
    """Raises NotImplementedError where `problem` has an answer."""
    if reason := problem(queries, keys):
        raise NotImplementedError(f"chunk_attention: cudnn cannot do this: {reason}; use implementation='reference'")
    positions = positions.astype(jnp.int32)
    window = _narrow(keys, sliding_window)
    if window is None:
        return _in_two(queries, keys, values, positions)
    return _within_window(queries, keys, values, positions, window)


def workspace_bytes(queries, keys, sliding_window: int | None) -> int:
    """Of a call: keys and values gathered, queries placed, two outputs, what goes with them, and their sum."""
    batch, num_rows, heads, head_dim = queries.shape
    window = _narrow(keys, sliding_window)
    if window is not None:
        num_rows = _stretch(queries, keys, window)
    of_heads = (2 * keys.shape[2] + 3 * heads) * head_dim * keys.dtype.itemsize
    return batch * num_rows * (of_heads + 4 * 4 * heads)


def _narrow(keys, sliding_window: int | None) -> int | None:
    """The sliding window, if it hides any position of the KV cache."""
    return None if sliding_window is None or sliding_window >= keys.shape[1] else sliding_window


def _in_two(queries, keys, values, positions):
    """Of the chunk's own tokens, which see themselves and so some position, and of those before, if there are any."""
    num_before = positions[:, 0]
    own, own_sums = _flash(queries, _at(keys, positions), _at(values, positions))
    # At least one, which is not counted below: without any key there would be no softmax.
    num_keys = jnp.clip(num_before, 1, keys.shape[1])
    before, before_sums = _flash(queries, keys, values, num_keys=num_keys)
    share = jnp.where((num_before > 0)[:, None, None], jax.nn.sigmoid(before_sums - own_sums), 0.0)
    share = jnp.moveaxis(share, 1, 2)[..., None]  # of the positions before, [B, T, N, 1]
    own, before = own.astype(jnp.float32), before.astype(jnp.float32)
    return (own + share * (before - own)).astype(queries.dtype)


def _within_window(queries, keys, values, positions, sliding_window: int):
    """Over the stretch from the first position that the first query sees; rows of it that are no query mean nothing."""
    length = _stretch(queries, keys, sliding_window)
    first = jnp.clip(positions[:, :1] - (sliding_window - 1), 0, keys.shape[1] - length)  # [B, 1]
    seen, rows = first + jnp.arange(length)[None, :], positions - first
    placed = jnp.zeros((queries.shape[0], length, *queries.shape[2:]), queries.dtype)
    placed = placed.at[_sequences(rows), rows].set(queries, mode="drop")
    out, _ = _flash(placed, _at(keys, seen), _at(values, seen), sliding_window=sliding_window)
    return _at(out, rows)


def _stretch(queries, keys, sliding_window: int) -> int:
    """Positions that the queries of a sequence see together, at most."""
    return min(keys.shape[1], queries.shape[1] + sliding_window - 1)


def _flash(queries, keys, values, *, num_keys=None, sliding_window: int | None = None) -> tuple[jax.Array, jax.Array]:
    """The output, and the logarithm of the sum of each query's weights, [B, N, T], float32.

    Over the first `num_keys` [B] positions of each sequence, or else causal: query n sees the keys up to the n-th.
    """
    # What `jax.nn.dot_product_attention` calls: that rounds the sums to 16 bit, too coarse for weights.
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

    batch, num_queries, _, head_dim = queries.shape
    out, sums = dot_product_attention(  # pyright: ignore[reportGeneralTypeIssues, reportAssignmentType]
        queries,
        keys,
        values,
        q_seqlen=None if num_keys is None else jnp.full((batch,), num_queries, jnp.int32),
        kv_seqlen=num_keys,
        scale=head_dim**-0.5,
        mask_type=MaskType.CAUSAL if num_keys is None else MaskType.PADDING,
        sliding_window_length=sliding_window,
        return_residual=True,
    )
    return out, sums


def _at(cached, positions):
    """[B, T, …] of `cached` [B, S, …]; beyond the end that of the last position."""
    return cached.at[_sequences(positions), positions].get(mode="clip")


def _sequences(positions):
    return jnp.arange(positions.shape[0])[:, None]
