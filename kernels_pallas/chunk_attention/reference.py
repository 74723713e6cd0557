"""Attention in jnp, which one new token's is made of too; a chunk goes a block of queries at a time."""

import functools

import jax
import jax.numpy as jnp

# Scores of one block of queries are materialised in float32; longer chunks go block by block.
MAX_SCORE_BYTES = 256 * 2**20


def chunk_attention(queries, keys, values, positions, *, sliding_window: int | None):
    block = query_block(queries.shape, keys.shape[1])
    if block == queries.shape[1]:
        return attend(queries, keys, values, positions, sliding_window)
    batch, num_queries = queries.shape[:2]

    # A backward pass computes the scores again: kept, they would be what blocks are there to avoid.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def one(queries, positions):
        return attend(queries, keys, values, positions, sliding_window)

    def replace(n, blocks):
        """With what attention gives in place of the queries: XLA would make an array for each layer's at once."""
        return blocks.at[n].set(one(blocks[n], block_positions[n]))

    blocks = jnp.moveaxis(queries.reshape(batch, num_queries // block, block, *queries.shape[2:]), 1, 0)
    block_positions = jnp.moveaxis(positions.reshape(batch, -1, block), 1, 0)
    out = jax.lax.fori_loop(0, num_queries // block, replace, blocks)
    return jnp.moveaxis(out, 0, 1).reshape(queries.shape)


def query_block(shape: tuple[int, ...], num_positions: int) -> int:
    """Largest power-of-two fraction of T whose float32 scores fit in MAX_SCORE_BYTES."""
    batch, block, heads, _ = shape
    while block % 2 == 0 and batch * heads * block * num_positions * 4 > MAX_SCORE_BYTES:
        block //= 2
    return block


def attend(queries, keys, values, positions, sliding_window: int | None):
    """[B, T, N, H]: queries at `positions` [B, T] over keys and values [B, S, K, H]; scores and softmax in float32."""
    batch, num_queries, heads, head_dim = queries.shape
    kv_heads = keys.shape[2]
    grouped = queries.reshape(batch, num_queries, kv_heads, heads // kv_heads, head_dim)
    scores = jnp.einsum("btkgh,bskh->bkgts", grouped, keys, preferred_element_type=jnp.float32)
    seen = visible(positions, keys.shape[1], sliding_window)  # [B, T, S]
    scores = jnp.where(seen[:, None, None], scores * head_dim**-0.5, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
    out = jnp.einsum("bkgts,bskh->btkgh", weights, values, preferred_element_type=jnp.float32)
    return out.astype(queries.dtype).reshape(queries.shape)


def visible(positions, num_positions: int, sliding_window: int | None):
    """Which positions a query sees, [B, T, S]: its own and those before, within the sliding window if there is one."""
    at = jnp.arange(num_positions)[None, None, :]
    query = positions[:, :, None]
    seen = at <= query
    return seen if sliding_window is None else seen & (at > query - sliding_window)


def workspace_bytes(queries, keys, sliding_window: int | None) -> int:
    """Of a block of queries: the scores, their softmax, the weights."""
    batch, _, heads, _ = queries.shape
    num_positions = keys.shape[1]
    block = query_block(queries.shape, num_positions)
    return batch * heads * block * num_positions * (4 + 4 + keys.dtype.itemsize)
