"""Decode attention on a GPU, at true sizes, against the reference in float32, on fresh random inputs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.decode_attention import mosaic_gpu, reference
from kernels_pallas.decode_attention.api import choose, decode_attention
from kernels_pallas.decode_attention.specs import SPECS, DecodeAttentionSpec

pytestmark = pytest.mark.gpu

EPS = 1e-6
TOLERANCE = {"bfloat16": 1.5e-2, "float16": 3e-3}  # of the norm: queries, keys and weights are rounded
BY_NAME = {spec.name: spec for spec in SPECS}
CAN = [spec for spec in SPECS if spec.dtype in TOLERANCE and spec.head_dim != 96]
SOME = [BY_NAME["qwen3_30b"], BY_NAME["b8"], BY_NAME["long"], BY_NAME["window"], BY_NAME["head_dim_64"]]


def options(spec: DecodeAttentionSpec) -> dict:
    return {"num_heads": spec.num_heads, "sliding_window": spec.sliding_window, "eps": EPS}


@functools.partial(jax.jit, static_argnames=("spec", "seed", "behind"))
def make_inputs(spec: DecodeAttentionSpec, seed: int, behind: float = jnp.nan) -> tuple[jax.Array, ...]:
    """What the op takes. The KV cache is `behind` from each sequence's length on."""
    key = jax.random.fold_in(jax.random.key(len(spec.name)), seed)
    positions, head_dim = jnp.asarray(spec.positions), spec.head_dim

    def normal(n: int, shape: tuple[int, ...]) -> jax.Array:
        return jax.random.normal(jax.random.fold_in(key, n), shape, spec.dtype)

    beyond = (jnp.arange(spec.num_positions)[None, :] >= positions[:, None])[:, :, None, None]
    keys, values = (jnp.where(beyond, jnp.asarray(behind, spec.dtype), normal(n, spec.cache_shape)) for n in (0, 1))
    angles = 7 * jax.random.uniform(jax.random.fold_in(key, 2), (spec.batch, head_dim // 2))
    scales = normal(4, (head_dim,)), normal(5, (head_dim,))
    rest = keys, values, positions, jnp.asarray(spec.valid)
    return (normal(3, spec.qkv_shape), *scales, jnp.cos(angles), jnp.sin(angles), *rest)


def in_float32(spec: DecodeAttentionSpec, inputs: tuple) -> jax.Array:
    wide = [x.astype(jnp.float32) if x.dtype == spec.dtype else x for x in inputs]
    wide[5:7] = (jnp.nan_to_num(x) for x in wide[5:7])
    with jax.default_matmul_precision("highest"):
        return reference.decode_attention(*wide, **options(spec))[0]


def three_ways(spec: DecodeAttentionSpec):
    """A program of inputs: the kernels' outputs, the output in float32, and the KV cache as the reference writes it."""

    def run(*inputs):
        outputs = decode_attention(*inputs, **options(spec), implementation="mosaic_gpu")
        return outputs, in_float32(spec, inputs), reference.decode_attention(*inputs, **options(spec))[1:]

    return jax.jit(run)


def bits(x) -> np.ndarray:
    return np.asarray(x).view(np.uint16)


@pytest.mark.parametrize("spec", CAN, ids=lambda spec: spec.name)
def test_decode_attention_equals_the_reference_in_float32(spec: DecodeAttentionSpec) -> None:
    (out, *cached), wanted, plain = three_ways(spec)(*make_inputs(spec, 0))
    out, wanted = (np.asarray(x, np.float32)[spec.valid] for x in (out, wanted))
    assert np.isfinite(out).all()
    errors = np.linalg.norm(out - wanted, axis=1) / np.linalg.norm(wanted, axis=1)
    assert errors.max() <= TOLERANCE[spec.dtype], errors
    keys, plain_keys = (np.array(x) for x in (cached[0], plain[0]))
    new = np.flatnonzero(spec.valid), spec.positions[spec.valid]
    np.testing.assert_allclose(  # a root may be rounded otherwise
        keys[new].astype(np.float32), plain_keys[new].astype(np.float32), rtol=2.0**-6, atol=2.0**-6
    )
    keys[new] = plain_keys[new]
    np.testing.assert_array_equal(bits(keys), bits(plain_keys))
    np.testing.assert_array_equal(bits(cached[1]), bits(plain[1]))


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_the_kernels_run_where_they_can(spec: DecodeAttentionSpec) -> None:
    qkv, keys = (jax.ShapeDtypeStruct(shape, spec.dtype) for shape in (spec.qkv_shape, spec.cache_shape))
    assert choose(None, qkv, keys, spec.num_heads) == ("mosaic_gpu" if spec in CAN else "reference")


@pytest.mark.parametrize("spec", SOME, ids=lambda spec: spec.name)
def test_the_same_inputs_give_the_same_bits(spec: DecodeAttentionSpec) -> None:
    """Again and again, whatever lies behind the sequences."""
    run = jax.jit(functools.partial(decode_attention, **options(spec), implementation="mosaic_gpu"))
    first = bits(run(*make_inputs(spec, 3))[0])
    for behind in (0.0, 1e4, jnp.inf, jnp.nan):
        inputs = make_inputs(spec, 3, behind)
        for _ in range(5):
            np.testing.assert_array_equal(bits(run(*inputs)[0]), first)


@pytest.mark.parametrize("sliding_window", [None, 100])
def test_many_tokens_in_one_program(sliding_window: int | None) -> None:
    """As a decode does: each call reads what the ones before have written in place. The second stops early."""
    spec = dataclasses.replace(
        BY_NAME["qwen3_30b"], num_positions=256, lengths=(0, 30, 60), sliding_window=sliding_window
    )
    qkv, *rest, keys, values, positions, _ = make_inputs(spec, 0, 0.0)
    steps = jax.random.normal(jax.random.key(1), (150, *qkv.shape), spec.dtype)

    @functools.partial(jax.jit, static_argnames="implementation")
    def run(keys, values, implementation: str):
        def step(cached, new):
            n, qkv = new
            valid = jnp.array([True, False, True]) | (n < 50)
            out, *cached = decode_attention(
                qkv, *rest, *cached, positions + n, valid, **options(spec), implementation=implementation
            )
            return tuple(cached), jnp.where(valid[:, None], out, 0)

        return jax.lax.scan(step, (keys, values), (jnp.arange(len(steps)), steps))

    (keys_here, values_here), out = run(keys, values, "mosaic_gpu")
    (keys_there, values_there), wanted = run(keys, values, "reference")
    np.testing.assert_array_equal(bits(values_here), bits(values_there))
    keys_here, keys_there, out, wanted = (np.asarray(x, np.float32) for x in (keys_here, keys_there, out, wanted))
    np.testing.assert_allclose(keys_here, keys_there, rtol=2.0**-6, atol=2.0**-6)
    assert np.linalg.norm(out - wanted) <= TOLERANCE[spec.dtype] * np.linalg.norm(wanted)


def test_splits_agree() -> None:
    """One block a sequence and head, or many: the same sums in another order."""
    spec = dataclasses.replace(BY_NAME["long"], lengths=(8191, 5000))
    inputs = make_inputs(spec, 0)
    wanted = np.asarray(jax.jit(functools.partial(in_float32, spec))(inputs))
    for config in (mosaic_gpu.Config(num_blocks=1), mosaic_gpu.Config(), mosaic_gpu.Config(num_blocks=10**4)):
        out = mosaic_gpu.decode_attention(*inputs, **options(spec), config=config)[0]
        error = np.linalg.norm(np.asarray(out, np.float32) - wanted) / np.linalg.norm(wanted)
        assert error <= TOLERANCE[spec.dtype], config
