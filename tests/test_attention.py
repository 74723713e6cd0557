"""Attention of a chunk, a block of queries at a time: what it gives at once, forwards and backwards."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.model import attention

SHAPE = B, T, N, H = 2, 24, 4, 8
S, K = 40, 2


def inputs() -> tuple[jax.Array, ...]:
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = SHAPE, (B, S, K, H), (B, S, K, H)
    return tuple(jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))


@pytest.mark.parametrize("sliding_window", [None, 5])
@pytest.mark.parametrize("block", [3, 12])
def test_blocks_of_queries_give_what_all_give_at_once(
    block: int, sliding_window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    positions = jnp.asarray([[10], [3]]) + jnp.arange(T)[None]

    def loss(*arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = attention.attend(*arrays, positions, sliding_window)
        return jnp.sum(out * jnp.arange(out.size).reshape(out.shape) / out.size), out

    both = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)
    assert attention.query_block(SHAPE, S) == T
    (_, whole), whole_gradients = jax.jit(both)(*inputs())
    monkeypatch.setattr(attention, "MAX_SCORE_BYTES", B * N * block * S * 4)
    assert attention.query_block(SHAPE, S) == block
    (_, out), gradients = jax.jit(lambda *arrays: both(*arrays))(*inputs())
    np.testing.assert_allclose(out, whole, atol=1e-6)
    for got, wanted in zip(gradients, whole_gradients, strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-5)
