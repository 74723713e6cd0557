"""Attention of one new token: the reference and the interpreted kernels against float64, and what the api refuses."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import export
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks  # the races found have no public name
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import backends
from kernels_pallas.decode_attention import api, mosaic_gpu, reference
from kernels_pallas.decode_attention.shape import MAX_SPLITS, Shape
from kernels_pallas.decode_attention.specs import SPECS, DecodeAttentionSpec

EPS = 1e-6
BY_NAME = {spec.name: spec for spec in SPECS}
SMALL = DecodeAttentionSpec(
    name="small", num_heads=8, num_kv_heads=2, head_dim=64, num_positions=136, lengths=(135, 0, -1), dtype="bfloat16"
)
WINDOW = dataclasses.replace(
    SMALL,
    name="window",
    num_heads=6,
    num_kv_heads=1,
    head_dim=128,
    num_positions=392,
    sliding_window=300,
    lengths=(391, 40),
)
TOLERANCE = {"float32": 2e-6, "bfloat16": 2e-2, "float16": 3e-3}  # of the largest output: q, k and weights are rounded


def make_inputs(spec: DecodeAttentionSpec, seed: int = 0) -> tuple[jax.Array, ...]:
    """What the op takes. The KV cache is NaN from each sequence's length on."""
    rng = np.random.default_rng(seed)
    qkv, q_scale, k_scale, keys, values = (
        rng.normal(size=shape) for shape in (spec.qkv_shape, spec.head_dim, spec.head_dim, *[spec.cache_shape] * 2)
    )
    angles = rng.uniform(0, 2 * np.pi, (spec.batch, spec.head_dim // 2))
    behind = np.arange(spec.num_positions)[None, :] >= spec.positions[:, None]
    keys[behind], values[behind] = np.nan, np.nan
    qkv, q_scale, k_scale, keys, values = (jnp.asarray(x, spec.dtype) for x in (qkv, q_scale, k_scale, keys, values))
    cos, sin = (jnp.asarray(f(angles), jnp.float32) for f in (np.cos, np.sin))
    return qkv, q_scale, k_scale, cos, sin, keys, values, jnp.asarray(spec.positions), jnp.asarray(spec.valid)


def expected(spec: DecodeAttentionSpec, inputs: tuple[jax.Array, ...]) -> np.ndarray:
    """The outputs [B, N, H] in float64, 0 for sequences that are not valid."""
    qkv, q_scale, k_scale, cos, sin, keys, values = (np.asarray(x, np.float64) for x in inputs[:7])
    heads = qkv.reshape(spec.batch, -1, spec.head_dim)
    out = np.zeros((spec.batch, spec.num_heads, spec.head_dim))

    def turned(x, scale, sequence):
        x = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + EPS) * scale
        pairs = (x[..., : spec.head_dim // 2] + 1j * x[..., spec.head_dim // 2 :]) * (cos + 1j * sin)[sequence]
        return np.concatenate([pairs.real, pairs.imag], axis=-1)

    for n in np.flatnonzero(spec.valid):
        queries, key, value = np.split(heads[n], [spec.num_heads, spec.num_heads + spec.num_kv_heads])
        end = spec.positions[n]
        seen = slice(end + 1 - spec.num_seen[n], end)
        seen_keys = np.concatenate([keys[n, seen], turned(key, k_scale, n)[None]])
        seen_values = np.concatenate([values[n, seen], value[None]])
        group = np.arange(spec.num_heads) // (spec.num_heads // spec.num_kv_heads)
        scores = np.einsum("nh,snh->ns", turned(queries, q_scale, n), seen_keys[:, group]) / np.sqrt(spec.head_dim)
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        out[n] = np.einsum("ns,snh->nh", weights / weights.sum(axis=1, keepdims=True), seen_values[:, group])
    return out


def options(spec: DecodeAttentionSpec) -> dict:
    return {"num_heads": spec.num_heads, "sliding_window": spec.sliding_window, "eps": EPS}


def check(spec: DecodeAttentionSpec, inputs: tuple, outputs: tuple) -> None:
    """The outputs are the formula's, and of the KV cache only the new positions have changed."""
    out, *cached = (np.array(x, np.float32) for x in outputs)
    wanted = expected(spec, inputs)
    got = out.reshape(wanted.shape)[spec.valid]
    np.testing.assert_allclose(got, wanted[spec.valid], rtol=0, atol=TOLERANCE[spec.dtype] * np.abs(wanted).max())
    before = [np.asarray(x, np.float32) for x in inputs[5:7]]
    rows = np.flatnonzero(spec.valid)
    for was, now in zip(before, cached, strict=True):
        assert np.isfinite(now[rows, spec.positions[rows]]).all()
        now[rows, spec.positions[rows]] = was[rows, spec.positions[rows]]
        np.testing.assert_array_equal(now, was)


@functools.cache
def interpreted(spec: DecodeAttentionSpec):
    """On few blocks, so that a block has several tiles; one compilation a case.

    The interpreter models loads in flight, and sees a tile that is overwritten while it may still be read.
    """
    config = mosaic_gpu.Config(num_blocks=1, max_stages=1 if spec is SMALL else 2)
    interpret = plgpu.InterpretGPUParams(detect_races=True)
    return functools.partial(mosaic_gpu.decode_attention, **options(spec), config=config, interpret=interpret)


@pytest.mark.parametrize(
    "name", ["b8", "first_tokens", "last_position", "not_valid", "window", "window_of_one", "no_groups", "head_dim_96"]
)
def test_the_reference_is_the_formula(name: str) -> None:
    exact = dataclasses.replace(BY_NAME[name].scaled(16), dtype="float32")
    inputs = clean(make_inputs(exact))
    check(exact, inputs, jax.jit(functools.partial(api.decode_attention, **options(exact)))(*inputs))


def clean(inputs: tuple) -> tuple:
    """With 0 where the KV cache holds nothing: the reference multiplies that with 0."""
    return (*inputs[:5], *(jnp.nan_to_num(x) for x in inputs[5:7]), *inputs[7:])


@pytest.mark.parametrize("lengths", [(135, 0, -1), (63, 64, 127)], ids=str)
def test_the_kernels_are_the_formula(lengths: tuple[int, ...]) -> None:
    check_kernels(SMALL, lengths)


def test_the_kernels_have_a_sliding_window() -> None:
    """Of 300 positions: six tiles, of which the first and the last are seen in part."""
    check_kernels(WINDOW, WINDOW.lengths)


def check_kernels(spec: DecodeAttentionSpec, lengths: tuple[int, ...]) -> None:
    case = dataclasses.replace(spec, lengths=lengths)
    inputs = make_inputs(case)
    outputs = interpreted(spec)(*inputs)
    check(case, inputs, outputs)
    assert not np.asarray(outputs[0][~case.valid], np.float32).any()
    assert not gpu_callbacks.get_races().races_found
    plain = reference.decode_attention(*clean(inputs), **options(case))
    for got, wanted in zip(outputs[1:], plain[1:], strict=True):
        np.testing.assert_array_equal(jnp.nan_to_num(got), wanted)


def test_who_else_is_in_the_batch_changes_no_bit() -> None:
    inputs, order = make_inputs(SMALL), np.array([2, 0, 1])
    by_row = [x if x.shape == (SMALL.head_dim,) else x[order] for x in inputs]
    for moved, first in zip(interpreted(SMALL)(*by_row), interpreted(SMALL)(*inputs), strict=True):
        np.testing.assert_array_equal(np.asarray(moved, np.float32), np.asarray(first, np.float32)[order])


def test_a_position_beyond_the_end_writes_nothing() -> None:
    *inputs, _, valid = make_inputs(SMALL)
    outputs = interpreted(SMALL)(*inputs, jnp.array([SMALL.num_positions, 0, 10**6]), jnp.ones_like(valid))
    assert not np.asarray(outputs[0], np.float32)[[0, 2]].any()
    for was, now in zip(inputs[5:7], outputs[1:], strict=True):
        np.testing.assert_array_equal(np.asarray(now, np.float32)[[0, 2]], np.asarray(was, np.float32)[[0, 2]])


@pytest.mark.parametrize("name", ["qwen3_30b", "b64_uneven", "head_dim_64"])
def test_the_kernels_compile_for_cuda_at_true_sizes(name: str) -> None:
    spec = BY_NAME[name]
    exported = export.export(
        jax.jit(functools.partial(mosaic_gpu.decode_attention, **options(spec))), platforms=["cuda"]
    )(*jax.eval_shape(lambda: shaped(spec)))
    assert str(exported.mlir_module()).count("custom_call @mosaic_gpu_v2") == 2


def shaped(spec: DecodeAttentionSpec) -> tuple[jax.Array, ...]:
    """Arguments of these shapes."""
    half, scale = (spec.batch, spec.head_dim // 2), jnp.zeros(spec.head_dim, spec.dtype)
    cached, angles = jnp.zeros(spec.cache_shape, spec.dtype), jnp.zeros(half)
    places = jnp.zeros(spec.batch, jnp.int32), jnp.ones(spec.batch, bool)
    return (jnp.zeros(spec.qkv_shape, spec.dtype), scale, scale, angles, angles, cached, cached, *places)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": "float32"}, "qkv float32 and keys float32 must be one of bfloat16, float16"),
        ({"head_dim": 96}, "heads of 96 elements are not of 64 or 128"),
        ({"num_heads": 68}, "68 heads for 4 KV heads are more than 16 each"),
        ({"num_positions": 56}, "room for 56 positions is not a multiple of 8, of at least 64"),
        ({"num_positions": 100}, "room for 100 positions is not a multiple of 8"),
    ],
    ids=str,
)
def test_what_the_kernels_cannot_do_goes_to_the_reference(
    changes: dict, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "mosaic_gpu_problem", lambda: None)
    can = dataclasses.replace(BY_NAME["qwen3_30b"], lengths=(3,), num_positions=64)
    arguments, others = shaped(can), shaped(dataclasses.replace(can, **changes))
    assert api.choose(None, arguments[0], arguments[5], can.num_heads) == "mosaic_gpu"
    num_heads = changes.get("num_heads", can.num_heads)
    assert api.choose(None, others[0], others[5], num_heads) == "reference"
    with pytest.raises(NotImplementedError, match=f"mosaic_gpu cannot do this: {reason}.*'reference'"):
        api.decode_attention(*others, num_heads=num_heads, eps=EPS, implementation="mosaic_gpu")


def test_other_devices_with_tma_have_no_wgmma(monkeypatch: pytest.MonkeyPatch) -> None:
    class Blackwell:
        compute_capability = "10.0"

    monkeypatch.setattr(mosaic_gpu.jax, "devices", lambda: [Blackwell()])
    arguments = shaped(SMALL)
    assert "compute capability 10.0 is not 9" in str(mosaic_gpu.problem(arguments[0], arguments[5], SMALL.num_heads))


@pytest.mark.parametrize(
    ("number", "array", "message"),
    [
        (0, jnp.zeros((3, 764)), r"qkv \(3, 764\) must be \(3, 768\) for num_heads=8 and keys \(3, 136, 2, 64\)"),
        (1, jnp.zeros(63), r"q_scale \(63,\) must be \(64,\)"),
        (3, jnp.zeros((3, 64)), r"cos \(3, 64\) must be \(3, 32\)"),
        (
            6,
            jnp.zeros((3, 128, 2, 64)),
            r"keys bfloat16\[3, 136, 2, 64\] and values float32\[3, 128, 2, 64\] must both",
        ),
        (7, jnp.zeros((3, 1), jnp.int32), r"positions \(3, 1\) must be \(3,\)"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(number: int, array: jax.Array, message: str) -> None:
    arguments = list(shaped(SMALL))
    arguments[number] = array
    with pytest.raises(ValueError, match=message):
        api.decode_attention(*arguments, num_heads=8, eps=EPS)


def test_heads_that_no_kv_head_can_have_are_refused() -> None:
    with pytest.raises(ValueError, match="num_heads=7 must be a multiple of the 2 heads of keys"):
        api.decode_attention(*shaped(SMALL), num_heads=7, eps=EPS)


@given(
    batch=st.integers(1, 64),
    kv_heads=st.integers(1, 16),
    num_positions=st.integers(8, 8192).map(lambda n: 8 * n),
    head_dim=st.sampled_from([64, 128]),
    window=st.none() | st.integers(1, 5000),
    num_blocks=st.integers(1, 600),
)
def test_splits_fill_the_threads_of_the_second_kernel(
    batch: int, kv_heads: int, num_positions: int, head_dim: int, window: int | None, num_blocks: int
) -> None:
    dtype = jnp.dtype("bfloat16")
    shape = Shape(batch, kv_heads, num_positions, kv_heads, head_dim, dtype, window)
    num_splits = shape.num_splits(num_blocks)
    rows = shape.lane_rows(num_splits)
    assert num_splits % rows == 0
    assert 1 <= head_dim * rows // 128 <= 4, "elements of 4 bytes that a thread loads at once"
    assert num_splits <= MAX_SPLITS
    assert num_splits < shape.num_tiles + rows, "a whole row of parts without a tile"


@pytest.mark.parametrize("wrong", [{"num_blocks": 0}, {"max_stages": 0}])
def test_a_configuration_without_blocks_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="=".join(map(str, *wrong.items()))):
        mosaic_gpu.Config(**wrong)


def test_the_named_shapes_are_what_they_say() -> None:
    assert len(BY_NAME) == len(SPECS)
    for spec in (*SPECS, *(spec.scaled(16) for spec in SPECS)):
        assert (spec.positions < spec.num_positions).all(), spec.name
        assert (spec.num_seen <= spec.positions + 1).all(), spec.name
        assert ((spec.num_seen > 0) == spec.valid).all(), spec.name
