"""RMSNorm and a projection on a GPU, at true sizes, against the reference in float32, on fresh random inputs."""

import dataclasses
import functools
import secrets

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.norm_linear import mosaic_gpu, reference
from kernels_pallas.norm_linear.api import choose, norm_linear
from kernels_pallas.norm_linear.specs import SPECS, NormLinearSpec

pytestmark = pytest.mark.gpu

EPS = 1e-6
TOLERANCE = {"bfloat16": 6e-3, "float16": 8e-4, "float32": 2e-6}  # of the norm: x is rounded, and what comes out
BY_NAME = {spec.name: spec for spec in SPECS}


def options(spec: NormLinearSpec) -> dict:
    return {"eps": EPS, "out_dtype": jnp.dtype(spec.out_dtype or spec.dtype)}


@jax.jit
def in_float32(*inputs):
    wide = jax.tree.map(lambda each: each.astype(jnp.float32), inputs)
    with jax.default_matmul_precision("highest"):
        return reference.norm_linear(*wide, eps=EPS, out_dtype=jnp.dtype("float32"))


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_norm_linear_equals_the_reference_in_float32(spec: NormLinearSpec) -> None:
    seed = secrets.randbelow(2**31)
    inputs = spec.inputs(jax.random.key(seed))
    assert choose(None, inputs[0], inputs[2]) == "mosaic_gpu"
    run = jax.jit(functools.partial(norm_linear, **options(spec)))
    outputs = run(*inputs)
    for got, wanted in zip(outputs, in_float32(*inputs), strict=True):
        got, wanted = np.asarray(got, np.float32), np.asarray(wanted)
        assert np.isfinite(got).all()
        error = np.linalg.norm(got - wanted, axis=1) / np.linalg.norm(wanted, axis=1)
        assert error.max() <= TOLERANCE[spec.dtype], f"seed {seed}: {error}"
    for first, again in zip(outputs, run(*inputs), strict=True):
        np.testing.assert_array_equal(np.asarray(first, np.float32), np.asarray(again, np.float32))


@pytest.mark.parametrize("name", ["four_rows_qkv", "four_rows_o", "four_rows_router"])
def test_a_row_has_the_same_bits_alone(name: str) -> None:
    spec = BY_NAME[name]
    x, scale, kernel, *of_rows = spec.inputs(jax.random.key(5))
    together = mosaic_gpu.norm_linear(x, scale, kernel, *of_rows, **options(spec))
    for row in range(spec.num_rows):
        here = slice(row, row + 1)
        others = [None if each is None else each[here] for each in of_rows]
        alone = mosaic_gpu.norm_linear(x[here], scale, kernel, *others, **options(spec))
        for all_rows, one in zip(together, alone, strict=True):
            np.testing.assert_array_equal(np.asarray(all_rows, np.float32)[here], np.asarray(one, np.float32))


def test_configurations_agree() -> None:
    """To the bit: however the work is cut up, an output is one warp's sum in one order."""
    spec = dataclasses.replace(BY_NAME["qwen3_235b_qkv"], num_rows=2)
    inputs = spec.inputs(jax.random.key(7))
    wanted = np.asarray(mosaic_gpu.norm_linear(*inputs, **options(spec))[0], np.float32)
    for config in (
        mosaic_gpu.Config(num_blocks=1),
        mosaic_gpu.Config(num_blocks=264, max_warpgroups=1),
        mosaic_gpu.Config(max_warpgroups=2, tile_bytes=32 * 1024),
        mosaic_gpu.Config(tile_bytes=4096),
    ):
        got = np.asarray(mosaic_gpu.norm_linear(*inputs, **options(spec), config=config)[0], np.float32)
        np.testing.assert_array_equal(got, wanted, err_msg=str(config))
