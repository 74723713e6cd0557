"""RMSNorm and a projection: the reference and the interpreted kernel against float64, and what the api refuses."""

import dataclasses
import functools
from typing import Any

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
from kernels_pallas.norm_linear import api, mosaic_gpu, reference
from kernels_pallas.norm_linear.specs import SPECS, NormLinearSpec

EPS = 1e-6
BY_NAME = {spec.name: spec for spec in SPECS}
# Two blocks of two warpgroups, each with two tiles of 4 KiB: rings that come round, and unequal shares.
CONFIG = mosaic_gpu.Config(num_blocks=2, max_warpgroups=2, max_stages=2, tile_bytes=4096)
CASES = (
    NormLinearSpec(name="normed", width=1280, num_outputs=28, num_rows=4),
    NormLinearSpec(name="added", width=1024, num_outputs=20, num_rows=3, norms=False, adds=True, dtype="float16"),
    NormLinearSpec(name="all", width=768, num_outputs=20, num_rows=2, adds=True, sums=True, dtype="float32"),
    NormLinearSpec(name="summed", width=512, num_outputs=36, norms=False, sums=True, out_dtype="float32"),
)
TOLERANCE = {"float32": 2e-6, "bfloat16": 8e-3, "float16": 1e-3}  # of the largest output


def shapes(spec: NormLinearSpec) -> tuple:
    return jax.eval_shape(lambda: spec.inputs(jax.random.key(0)))


def make_inputs(spec: NormLinearSpec) -> tuple:
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda each: jnp.asarray(rng.standard_normal(each.shape), each.dtype), shapes(spec))


def expected(inputs: tuple) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The outputs in float64."""
    x, scale, kernel, residual, added = (None if each is None else np.asarray(each, np.float64) for each in inputs)
    assert x is not None
    assert kernel is not None
    x = x if added is None else x + added
    normed = x if scale is None else x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + EPS) * scale
    return normed @ kernel.T + (0 if residual is None else residual), normed, x


def check(spec: NormLinearSpec, inputs: tuple, outputs: tuple) -> None:
    assert [out.dtype for out in outputs] == [spec.out_dtype or spec.dtype, spec.dtype, spec.dtype]
    for got, wanted in zip(outputs, expected(inputs), strict=True):
        got = np.asarray(got, np.float32)
        np.testing.assert_allclose(got, wanted, rtol=0, atol=TOLERANCE[spec.dtype] * np.abs(wanted).max())


def options(spec: NormLinearSpec) -> dict:
    return {"eps": EPS, "out_dtype": jnp.dtype(spec.out_dtype or spec.dtype)}


def interpreted(spec: NormLinearSpec, config: mosaic_gpu.Config = CONFIG):
    """One compilation a case and configuration. What nobody has written is NaN there, outputs too.

    The interpreter models loads in flight, and sees a tile that is overwritten while it may still be read.
    """
    interpret = plgpu.InterpretGPUParams(detect_races=True, uninitialized_memory="nan")
    return functools.partial(mosaic_gpu.norm_linear, **options(spec), config=config, interpret=interpret)


@pytest.mark.parametrize("name", ["qwen3_30b_qkv", "qwen3_30b_o", "four_rows_router", "odd"])
def test_the_reference_is_the_formula(name: str) -> None:
    spec = BY_NAME[name].scaled(16)
    inputs = make_inputs(spec)
    check(spec, inputs, jax.jit(functools.partial(api.norm_linear, **options(spec)))(*inputs))


@pytest.mark.parametrize("spec", CASES, ids=lambda spec: spec.name)
def test_the_kernel_is_the_formula(spec: NormLinearSpec) -> None:
    inputs = make_inputs(spec)
    outputs = _, normed, summed = interpreted(spec)(*inputs)
    check(spec, inputs, outputs)
    assert not gpu_callbacks.get_races().races_found
    _, plain, plain_sum = jax.jit(functools.partial(reference.norm_linear, **options(spec)))(*inputs)
    np.testing.assert_array_equal(summed, plain_sum)
    np.testing.assert_array_max_ulp(*(np.asarray(each, np.float32) for each in (normed, plain)), maxulp=ulps(spec))


def ulps(spec: NormLinearSpec) -> int:
    """Of float32, by which a normed element may be off: the root may be by two, what is multiplied by it by twice as
    many, and that is rounded twice; 0 without norm.
    """
    return 4 + 2 * 2 ** (23 - jnp.finfo(spec.dtype).nmant) if spec.norms else 0


def test_neither_the_batch_nor_the_configuration_changes_a_bit() -> None:
    spec = CASES[2]
    inputs = make_inputs(spec)
    order = np.array([1, 0])
    together, moved = interpreted(spec)(*inputs), interpreted(spec)(*rows_of(inputs, order))
    one = dataclasses.replace(spec, num_rows=1)
    config = mosaic_gpu.Config(num_blocks=1, max_warpgroups=1, tile_bytes=16 * 1024)
    alone = interpreted(one, config)(*rows_of(inputs, np.array([1])))
    for all_rows, permuted, row in zip(together, moved, alone, strict=True):
        np.testing.assert_array_equal(permuted, all_rows[order])
        np.testing.assert_array_equal(row[0], all_rows[1])


def rows_of(inputs: tuple, rows: np.ndarray) -> tuple:
    x, scale, kernel, residual, added = inputs
    return x[rows], scale, kernel, residual[rows], added[rows]


@pytest.mark.parametrize("name", ["summed_qkv", "qwen3_235b_o", "float32"])
def test_the_kernel_compiles_for_cuda_at_true_sizes(name: str) -> None:
    spec = BY_NAME[name]
    exported = export.export(jax.jit(functools.partial(mosaic_gpu.norm_linear, **options(spec))), platforms=["cuda"])(
        *shapes(spec)
    )
    assert str(exported.mlir_module()).count("custom_call @mosaic_gpu_v2") == 1


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": "int8"}, "x int8 and kernel int8 must be one of bfloat16, float16, float32"),
        ({"num_rows": 5}, "5 rows of x are not 1 to 4"),
        ({"width": 2176}, "K=2176 must be a multiple of 256"),
        ({"width": 16384}, "K=16384 must be a multiple of 256, at most 8192"),
        ({"num_outputs": 5122}, "N=5122 of 4"),
    ],
    ids=str,
)
def test_what_the_kernel_cannot_do_goes_to_the_reference(
    changes: dict, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "mosaic_gpu_problem", lambda: None)
    assert api.choose(None, *shaped(BY_NAME["four_rows_qkv"])) == "mosaic_gpu"
    x, kernel = shaped(dataclasses.replace(BY_NAME["four_rows_qkv"], **changes))
    assert api.choose(None, x, kernel) == "reference"
    with pytest.raises(NotImplementedError, match=f"mosaic_gpu cannot do this: .*{reason}.*'reference'"):
        jax.eval_shape(lambda x, kernel: api.norm_linear(x, None, kernel, implementation="mosaic_gpu"), x, kernel)


def shaped(spec: NormLinearSpec) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """x and kernel."""
    rows = spec.num_rows, spec.width
    return jax.ShapeDtypeStruct(rows, spec.dtype), jax.ShapeDtypeStruct(spec.kernel_shape, spec.dtype)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": jnp.zeros((2, 6))}, r"x \(2, 6\) must be \[..., K\], and kernel \(3, 8\) \[N, K\]"),
        ({"kernel": jnp.zeros((1, 3, 8))}, r"kernel \(1, 3, 8\) \[N, K\]"),
        ({"norm_scale": jnp.zeros(6)}, r"norm_scale float32\[6\] must be float32\[8\]"),
        ({"norm_scale": jnp.zeros(8, "bfloat16")}, r"norm_scale bfloat16\[8\] must be float32\[8\]"),
        ({"residual": jnp.zeros((2, 8))}, r"residual float32\[2, 8\] must be float32\[2, 3\]"),
        ({"added": jnp.zeros((2, 3))}, r"added float32\[2, 3\] must be float32\[2, 8\], as x is"),
        ({"added": jnp.zeros((2, 8), "bfloat16")}, r"added bfloat16\[2, 8\] must be float32\[2, 8\]"),
        ({"out_dtype": "bfloat16"}, r"residual float32\[2, 3\] must be bfloat16\[2, 3\]"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(changes: dict, message: str) -> None:
    fitting: dict[str, Any] = {
        "x": jnp.zeros((2, 8)), "norm_scale": jnp.zeros(8), "kernel": jnp.zeros((3, 8)), "residual": jnp.zeros((2, 3))
    }  # fmt: skip
    api.norm_linear(**fitting)
    with pytest.raises(ValueError, match=message):
        api.norm_linear(**(fitting | changes))


@pytest.mark.parametrize("wrong", [{"num_blocks": 0}, {"max_warpgroups": 0}, {"max_stages": 0}, {"tile_bytes": 4095}])
def test_a_configuration_without_workers_or_room_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="=".join(map(str, *wrong.items()))):
        mosaic_gpu.Config(**wrong)


@given(
    num_rows=st.integers(1, 4),
    width=st.integers(1, 32).map(lambda n: 256 * n),
    num_outputs=st.integers(1, 40000).map(lambda n: 4 * n),
    dtype=st.sampled_from(["bfloat16", "float32"]),
    max_warpgroups=st.integers(1, 8),
)
def test_a_block_fits_into_a_multiprocessor(
    num_rows: int, width: int, num_outputs: int, dtype: str, max_warpgroups: int
) -> None:
    x, kernel = shaped(NormLinearSpec(name="", width=width, num_outputs=num_outputs, num_rows=num_rows, dtype=dtype))
    shape = mosaic_gpu.shape_of(x, kernel, mosaic_gpu.Config(max_warpgroups=max_warpgroups))
    assert shape.tile[1] * shape.tiles_per_item == shape.num_columns
    assert mosaic_gpu.problem(x, kernel) is None
    assert shape.num_warpgroups >= 1
    assert shape.num_stages >= 1
    tiles = shape.num_warpgroups * shape.num_stages * shape.tile_bytes
    assert tiles + num_rows * width * shape.dtype.itemsize + 2048 <= 227 * 1024
