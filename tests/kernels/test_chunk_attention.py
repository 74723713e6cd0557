"""Attention of a chunk: blocks of queries, what is handed to cuDNN and made of it, and what the api refuses."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import export
from jax._src import xla_bridge
from jax._src.cudnn import fused_attention_stablehlo as library

from kernels_pallas import backends
from kernels_pallas.chunk_attention import api, cudnn, reference
from kernels_pallas.chunk_attention.api import chunk_attention
from kernels_pallas.chunk_attention.reference import MAX_SCORE_BYTES, query_block
from kernels_pallas.chunk_attention.specs import SPECS, ChunkAttentionSpec

SHAPE = B, T, N, H = 2, 24, 4, 8
S, K = 40, 2
BY_NAME = {spec.name: spec for spec in SPECS}
SMALL = ChunkAttentionSpec(
    name="small", num_heads=4, num_kv_heads=2, head_dim=8, num_queries=24, num_positions=40, starts=(10, 0, 33, 16)
)


def inputs(spec: ChunkAttentionSpec, dtype: str = "float32") -> tuple[jax.Array, ...]:
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = spec.queries_shape, spec.cache_shape, spec.cache_shape
    arrays = (jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True))
    return (*arrays, jnp.asarray(spec.positions))


def expected(spec: ChunkAttentionSpec, arrays: tuple[jax.Array, ...]) -> np.ndarray:
    """[B, T, N, H] in float64; 0 for what is no token."""
    queries, keys, values = (np.asarray(x, np.float64) for x in arrays[:3])
    out = np.zeros(queries.shape)
    group = np.arange(spec.num_heads) // (spec.num_heads // spec.num_kv_heads)
    for n, t in np.argwhere(spec.valid):
        end = spec.positions[n, t] + 1
        seen = slice(max(0, end - (spec.sliding_window or end)), end)
        scores = np.einsum("nh,snh->ns", queries[n, t], keys[n, seen][:, group]) / np.sqrt(spec.head_dim)
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        out[n, t] = np.einsum("ns,snh->nh", weights / weights.sum(axis=1, keepdims=True), values[n, seen][:, group])
    return out


@pytest.mark.parametrize("sliding_window", [None, 5])
@pytest.mark.parametrize("block", [3, 12])
def test_blocks_of_queries_give_what_all_give_at_once(
    block: int, sliding_window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = dataclasses.replace(SMALL, starts=(10, 3))
    *arrays, positions = inputs(spec)

    def loss(*arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = chunk_attention(*arrays, positions, sliding_window=sliding_window, implementation="reference")
        return jnp.sum(out * jnp.arange(out.size).reshape(out.shape) / out.size), out

    both = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)
    assert query_block(SHAPE, S) == T
    (_, whole), whole_gradients = jax.jit(both)(*arrays)
    monkeypatch.setattr(reference, "MAX_SCORE_BYTES", B * N * block * S * 4)
    assert query_block(SHAPE, S) == block
    (_, out), gradients = jax.jit(lambda *arrays: both(*arrays))(*arrays)
    np.testing.assert_allclose(out, whole, atol=1e-6)
    for got, wanted in zip(gradients, whole_gradients, strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-5)


@given(st.integers(0, 12), st.integers(1, 64), st.integers(1, 64), st.integers(1, 2**18))
def test_query_blocks_divide_the_chunk_and_fit(exponent: int, batch: int, heads: int, num_positions: int) -> None:
    chunk = 2**exponent
    block = query_block((batch, chunk, heads, 64), num_positions)
    score_bytes = batch * heads * num_positions * 4
    assert chunk % block == 0
    assert block == 1 or block * score_bytes <= MAX_SCORE_BYTES
    assert block == chunk or 2 * block * score_bytes > MAX_SCORE_BYTES, "a larger block would have fitted"


@pytest.mark.parametrize("sliding_window", [None, 1, 5, 40])
def test_the_reference_is_the_formula(sliding_window: int | None) -> None:
    spec = dataclasses.replace(SMALL, sliding_window=sliding_window)
    arrays = inputs(spec)
    out = np.asarray(chunk_attention(*arrays, sliding_window=sliding_window))
    np.testing.assert_allclose(out[spec.valid], expected(spec, arrays)[spec.valid], atol=1e-5)


# cuDNN runs on a GPU alone. Here stands in for it what its documentation says, so that what is made of it is tested.


def flash(queries, keys, values, *, num_keys=None, sliding_window=None):
    """`cudnn._flash` in float32."""
    out, sums = jax.nn.dot_product_attention(
        queries,
        keys,
        values,
        is_causal=num_keys is None,
        key_value_seq_lengths=num_keys,
        local_window_size=sliding_window and (sliding_window - 1, 0),
        implementation="xla",
        return_residual=True,
    )
    return out, jnp.moveaxis(sums, 1, 2)


@pytest.mark.parametrize("sliding_window", [None, 1, 5, 16, 17, 30, 39, 40, 100])
def test_what_cudnn_gives_is_put_together_right(sliding_window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cudnn, "_flash", flash)
    monkeypatch.setattr(cudnn, "problem", lambda queries, keys: None)
    spec = dataclasses.replace(SMALL, sliding_window=sliding_window)
    arrays = inputs(spec)
    run = jax.jit(functools.partial(cudnn.chunk_attention, sliding_window=sliding_window))
    out = np.asarray(run(*arrays))
    assert np.isfinite(out).all()
    np.testing.assert_allclose(out[spec.valid], expected(spec, arrays)[spec.valid], atol=1e-5)
    behind = (np.arange(S)[None] > spec.positions[:, -1:])[:, :, None, None]
    keys, values = (jnp.where(behind, 1e4, x) for x in arrays[1:3])
    other = np.asarray(run(arrays[0], keys, values, arrays[3]))
    np.testing.assert_array_equal(other[spec.valid], out[spec.valid])


@pytest.fixture
def lowered_for_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library looks for the GPU and its cuDNN; for lowering alone there need be none."""
    monkeypatch.setattr(library, "check_cudnn_version", lambda: 91900)
    monkeypatch.setattr(library, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(library, "is_cuda_compute_capability_equal", lambda capability: False)
    monkeypatch.setattr(backends, "cudnn_problem", lambda: None)
    assert xla_bridge.default_backend() == "cpu"


CAN = [spec for spec in SPECS if spec.dtype != "float32" and spec.head_dim % 8 == 0]


@pytest.mark.usefixtures("lowered_for_hopper")
@pytest.mark.parametrize("spec", CAN, ids=lambda spec: spec.name)
def test_cudnn_is_called_at_true_sizes(spec: ChunkAttentionSpec) -> None:
    run = functools.partial(chunk_attention, sliding_window=spec.sliding_window, implementation="cudnn")
    arrays = jax.eval_shape(lambda: inputs(spec, spec.dtype))
    program = export.export(
        jax.jit(run),
        platforms=["cuda"],
        disabled_checks=[export.DisabledSafetyCheck.custom_call("__cudnn$fmhaSoftmax")],
    )(*arrays)
    text = str(program.mlir_module())
    assert text.count("__cudnn$fmhaSoftmax") == (2 if spec.sliding_window is None else 1)
    assert text.count("\\22mask_type\\22: \\22CAUSAL") == 1


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": "float32"}, "queries float32 and keys float32 must be one of bfloat16, float16"),
        ({"head_dim": 12}, "heads of 12 elements are not a multiple of 8, of at most 256"),
        ({"head_dim": 264}, "heads of 264 elements are not a multiple of 8, of at most 256"),
    ],
    ids=str,
)
def test_what_cudnn_cannot_do_goes_to_the_reference(
    changes: dict, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "cudnn_problem", lambda: None)
    can = BY_NAME["qwen3_30b_512"]
    assert chosen(can) == "cudnn"
    other = dataclasses.replace(can, **changes)
    assert chosen(other) == "reference"
    with pytest.raises(NotImplementedError, match=f"cudnn cannot do this: {reason}.*'reference'"):
        jax.eval_shape(lambda: chunk_attention(*inputs(other, other.dtype), implementation="cudnn"))


def test_few_queries_go_to_the_reference_unless_cudnn_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "cudnn_problem", lambda: None)
    few, more = (dataclasses.replace(BY_NAME["qwen3_30b_512"], num_queries=api.FEW_QUERIES + n) for n in (0, 1))
    assert [chosen(few), chosen(few, "cudnn"), chosen(more), chosen(more, "reference")] == [
        "reference", "cudnn", "cudnn", "reference"
    ]  # fmt: skip


def chosen(spec: ChunkAttentionSpec, implementation: str | None = None) -> str:
    shapes = spec.queries_shape, spec.cache_shape
    return api.choose(implementation, *(jax.ShapeDtypeStruct(shape, spec.dtype) for shape in shapes))


def test_before_hopper_heads_are_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    class Ampere:
        compute_capability = "8.0"

    monkeypatch.setattr(cudnn.jax, "devices", lambda: [Ampere()])
    large, small = (jax.ShapeDtypeStruct((1, 100, 4, size), jnp.bfloat16) for size in (136, 128))
    assert "heads of 136 elements are not a multiple of 8, of at most 128" in str(cudnn.problem(large, large))
    assert cudnn.problem(small, small) is None


class _Device:
    """A device of JAX, as far as the choice looks at it."""

    def __init__(self, platform: str, capability: str = "0"):
        self.platform, self.compute_capability = platform, capability


@pytest.mark.parametrize(
    ("device", "problem"),
    [
        (_Device("gpu", "8.0"), None),
        (_Device("gpu", "7.5"), "compute capability 7.5 is below 8.0 (Ampere)"),
        (_Device("cpu"), "the default device is a cpu, not a GPU"),
    ],
)
def test_a_device_without_cudnn_gets_the_reference(device, problem, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends.jax, "devices", lambda: [device])
    monkeypatch.setattr(library, "check_cudnn_version", lambda: 91900)
    assert backends.cudnn_problem() == problem
    assert api.resolve(None) == ("reference" if problem else "cudnn")
    if problem:
        with pytest.raises(NotImplementedError, match=r"cudnn cannot run here.*'reference'"):
            api.resolve("cudnn")


def test_a_gpu_whose_jax_has_no_cudnn_gets_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends.jax, "devices", lambda: [_Device("gpu", "9.0")])
    monkeypatch.setattr(library, "cuda_versions", None)
    assert backends.cudnn_problem() == "JAX finds no cuDNN"
    assert api.resolve(None) == "reference"


@pytest.mark.parametrize(
    ("number", "array", "message"),
    [
        (0, jnp.zeros((4, 24, 3, 8)), r"queries \(4, 24, 3, 8\) must be .* B=4, H=8 and N a multiple of 2"),
        (0, jnp.zeros((4, 24, 4, 16)), r"queries \(4, 24, 4, 16\) must be .* H=8"),
        (1, jnp.zeros((4, 40, 1, 8)), r"keys float32\[4, 40, 1, 8\] and values float32\[4, 40, 2, 8\] must both"),
        (3, jnp.zeros((4, 1), jnp.int32), r"positions \(4, 1\) must be \[B, T\] = \(4, 24\)"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(number: int, array: jax.Array, message: str) -> None:
    arguments = list(inputs(SMALL))
    arguments[number] = array
    with pytest.raises(ValueError, match=message):
        chunk_attention(*arguments)


def test_a_window_of_nothing_and_an_unknown_name_are_refused() -> None:
    with pytest.raises(ValueError, match="sliding_window=0 must be at least 1"):
        chunk_attention(*inputs(SMALL), sliding_window=0)
    with pytest.raises(ValueError, match="unknown implementation 'flash'; expected one of reference, cudnn"):
        chunk_attention(*inputs(SMALL), implementation="flash")


def test_the_named_shapes_are_what_they_say() -> None:
    assert len(BY_NAME) == len(SPECS)
    for spec in (*SPECS, *(spec.scaled(16) for spec in SPECS)):
        assert spec.valid[:, 0].all(), spec.name
        assert spec.num_seen >= spec.valid.sum(), spec.name
    assert BY_NAME["qwen3_30b_4096"].num_seen == 4096 * 4097 // 2
