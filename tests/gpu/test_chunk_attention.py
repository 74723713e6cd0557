"""Attention of a chunk by cuDNN on a GPU, at true sizes, against the reference in float32, on fresh random inputs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.chunk_attention import reference
from kernels_pallas.chunk_attention.api import FEW_QUERIES, choose, chunk_attention
from kernels_pallas.chunk_attention.specs import SPECS, ChunkAttentionSpec

pytestmark = pytest.mark.gpu

TOLERANCE = {"bfloat16": 1.5e-2, "float16": 3e-3}  # of a row's norm: weights and two outputs are rounded
BY_NAME = {spec.name: spec for spec in SPECS}
CAN = [spec for spec in SPECS if spec.dtype in TOLERANCE and spec.head_dim != 12]
SOME = [BY_NAME[name] for name in ("qwen3_30b_512", "b8_uneven", "beyond_the_end", "window", "odd")]


@functools.partial(jax.jit, static_argnames=("spec", "seed", "behind"))
def make_inputs(spec: ChunkAttentionSpec, seed: int, behind: float = 1e4) -> tuple[jax.Array, ...]:
    """What the op takes. The KV cache is `behind` after each sequence's last query."""
    key = jax.random.fold_in(jax.random.key(len(spec.name)), seed)

    def normal(n: int, shape: tuple[int, ...]) -> jax.Array:
        return jax.random.normal(jax.random.fold_in(key, n), shape, spec.dtype)

    positions = jnp.asarray(spec.positions)
    beyond = (jnp.arange(spec.num_positions)[None, :] > positions[:, -1:])[:, :, None, None]
    keys, values = (jnp.where(beyond, jnp.asarray(behind, spec.dtype), normal(n, spec.cache_shape)) for n in (0, 1))
    return normal(2, spec.queries_shape), keys, values, positions


@functools.partial(jax.jit, static_argnames="spec")
def in_float32(spec: ChunkAttentionSpec, queries, keys, values, positions) -> jax.Array:
    wide = (x.astype(jnp.float32) for x in (queries, keys, values))
    with jax.default_matmul_precision("highest"):
        return reference.chunk_attention(*wide, positions, sliding_window=spec.sliding_window)


def by_cudnn(spec: ChunkAttentionSpec):
    return jax.jit(functools.partial(chunk_attention, sliding_window=spec.sliding_window, implementation="cudnn"))


def bits(spec: ChunkAttentionSpec, out) -> np.ndarray:
    """Those of tokens."""
    return np.asarray(out).view(np.uint16)[spec.valid]


@pytest.mark.parametrize("spec", CAN, ids=lambda spec: spec.name)
def test_cudnn_equals_the_reference_in_float32(spec: ChunkAttentionSpec) -> None:
    inputs = make_inputs(spec, 0)
    out, wanted = (np.asarray(x, np.float32) for x in (by_cudnn(spec)(*inputs), in_float32(spec, *inputs)))
    assert np.isfinite(out).all()
    out, wanted = out[spec.valid], wanted[spec.valid]  # [tokens, N, H]
    errors = np.linalg.norm(out - wanted, axis=-1) / np.linalg.norm(wanted, axis=-1)
    assert errors.max() <= TOLERANCE[spec.dtype], errors.max()


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_cudnn_runs_where_it_can_and_is_worth_it(spec: ChunkAttentionSpec) -> None:
    queries, keys = (jax.ShapeDtypeStruct(shape, spec.dtype) for shape in (spec.queries_shape, spec.cache_shape))
    best = spec in CAN and spec.num_queries > FEW_QUERIES
    assert choose(None, queries, keys) == ("cudnn" if best else "reference")


@pytest.mark.parametrize("spec", SOME, ids=lambda spec: spec.name)
def test_the_same_inputs_give_the_same_bits(spec: ChunkAttentionSpec) -> None:
    """Again and again, whatever number lies behind the sequences."""
    run = by_cudnn(spec)
    first = bits(spec, run(*make_inputs(spec, 3)))
    for behind in (0.0, -1e4, 1e30):
        inputs = make_inputs(spec, 3, behind)
        for _ in range(3):
            np.testing.assert_array_equal(bits(spec, run(*inputs)), first)


def test_a_sequence_does_not_depend_on_the_others() -> None:
    spec = BY_NAME["b8_uneven"]
    inputs, order = make_inputs(spec, 5), np.array([7, 6, 5, 4, 3, 2, 1, 0])
    run = by_cudnn(spec)
    np.testing.assert_array_equal(bits(spec, run(*(x[order] for x in inputs))), bits(spec, run(*inputs)[order]))


@pytest.mark.parametrize("name", ["qwen3_30b_512", "window"])
def test_many_chunks_in_one_program(name: str) -> None:
    """As part of a loop in a CUDA graph, each chunk after the one before."""
    spec = BY_NAME[name]
    queries, keys, values, positions = make_inputs(spec, 7)
    starts = jnp.arange(5, dtype=jnp.int32) * 300

    @functools.partial(jax.jit, static_argnames="implementation")
    def run(queries, implementation: str):
        def step(queries, start):
            at = positions - positions[:, :1] + start
            options = {"sliding_window": spec.sliding_window, "implementation": implementation}
            out = chunk_attention(queries, keys, values, at, **options)
            return queries + 0.01 * out, out

        return jax.lax.scan(step, queries, starts)[1]

    out, wanted = (np.asarray(run(queries, name), np.float32) for name in ("cudnn", "reference"))
    assert np.linalg.norm(out - wanted) <= TOLERANCE[spec.dtype] * np.linalg.norm(wanted)
