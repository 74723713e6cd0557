"""The trunk's layers: norms, projections and sums are what they say, and few rows go to the kernels."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import export

from jmoe.config import ModelConfig
from jmoe.experts.layer import ResidentExperts
from jmoe.model.decoder import build_decoder
from jmoe.model.families import trunk_shapes
from jmoe.model.kv_cache import init_kv_cache
from jmoe.model.layers import Linear, RMSNorm
from jmoe.model.router import Router
from kernels_pallas import backends
from tests.models import SMALL

# Of the least sizes that all kernels take. One layer is dense, one a mixture of experts.
WIDE = dataclasses.replace(
    SMALL, hidden_size=256, num_hidden_layers=2, num_attention_heads=4, head_dim=64, moe_intermediate_size=64,
    dtype="bfloat16",
)  # fmt: skip


def normal(n: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(n), shape)


@pytest.mark.parametrize("use_bias", [False, True])
@pytest.mark.parametrize("rows", [(1, 1), (2, 1), (2, 3)], ids=str)
def test_a_projection_norms_what_is_added_up(rows: tuple[int, int], use_bias: bool) -> None:
    linear, norm, bias = made(use_bias)
    x, added, kernel = normal(3, *rows, 8), normal(4, *rows, 8), np.asarray(linear.kernel[...])
    for other in (None, added):
        summed = np.asarray(x, np.float64) + (0 if other is None else np.asarray(other))
        normed = summed / np.sqrt(np.mean(summed * summed, axis=-1, keepdims=True) + 1e-5) * np.asarray(norm.scale[...])
        y, carried = linear.after_norm(x, norm, other)
        np.testing.assert_allclose(y, normed @ kernel.T + bias, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(carried, x if other is None else x + other)


@pytest.mark.parametrize("use_bias", [False, True])
@pytest.mark.parametrize("rows", [(1, 1), (2, 1), (2, 3)], ids=str)
def test_a_projection_is_added_to_the_residual(rows: tuple[int, int], use_bias: bool) -> None:
    linear, _, bias = made(use_bias)
    x, residual, kernel = normal(3, *rows, 8), normal(4, *rows, 12), np.asarray(linear.kernel[...])
    y = np.asarray(x, np.float64) @ kernel.T + bias
    np.testing.assert_allclose(linear(x), y, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(linear(x, residual), y + np.asarray(residual), rtol=1e-5, atol=1e-6)


def made(use_bias: bool) -> tuple[Linear, RMSNorm, np.ndarray]:
    """From 8 to 12 features, with its bias, and a norm before it."""
    linear = Linear(8, 12, dtype="float32", use_bias=use_bias, rngs=nnx.Rngs(0))
    norm, bias = RMSNorm(8, eps=1e-5, dtype="float32"), np.zeros(12)
    norm.scale.set_value(normal(1, 8))
    if linear.bias is not None:
        linear.bias.set_value(normal(2, 12))
        bias = np.asarray(linear.bias[...])
    return linear, norm, bias


def test_a_router_norms_its_rows_and_returns_them() -> None:
    router, norm = Router(SMALL, rngs=nnx.Rngs(0)), RMSNorm(SMALL.hidden_size, eps=1e-5, dtype="float32")
    norm.scale.set_value(normal(1, SMALL.hidden_size))
    x, valid = normal(2, 4, SMALL.hidden_size), jnp.array([True, False, True, True])
    routing, normed = router.after_norm(x, norm, valid)
    np.testing.assert_array_equal(normed, norm(x))
    for got, wanted in zip(jax.tree.leaves(routing), jax.tree.leaves(router(normed, valid)), strict=True):
        np.testing.assert_array_equal(got, wanted)


def lowered_step(config: ModelConfig, batch: int, length: int, implementation: str | None) -> str:
    """A program for CUDA of `length` tokens of each sequence, all experts resident."""
    params = {path: jax.ShapeDtypeStruct(shape, config.dtype) for path, shape in trunk_shapes(config).items()}
    experts = jax.ShapeDtypeStruct((config.num_experts, *config.expert_shape), config.dtype)

    def step(params, experts, ids, cache):
        decoder = build_decoder(config, params, implementation)
        moe = ResidentExperts((experts,), implementation=implementation)
        return decoder(ids, jnp.ones(ids.shape, bool), cache.lengths, cache, moe, None)[:2]

    cache = jax.eval_shape(lambda: init_kv_cache(config, batch, 64))
    ids = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    exported = export.export(jax.jit(step), platforms=["cuda"])(params, experts, ids, cache)
    return exported.mlir_module()


def norm_linear_calls(*arguments) -> int:
    return lowered_step(*arguments).count("call @norm_linear")


def test_few_rows_of_a_step_go_to_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two projections of attention in each layer, and the router of one; more rows, and the reference, have none."""
    monkeypatch.setattr(backends, "mosaic_gpu_problem", lambda: None)
    assert norm_linear_calls(dataclasses.replace(WIDE, attention_bias=True), 1, 1, None) == 5
    assert norm_linear_calls(WIDE, 2, 2, None) == 5
    assert norm_linear_calls(WIDE, 5, 1, None) == 0
    assert norm_linear_calls(WIDE, 1, 1, "reference") == 0


def test_of_the_residual_stream_only_the_last_sum_is_not_in_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "mosaic_gpu_problem", lambda: None)

    def sums(batch: int, implementation: str | None) -> int:
        text = lowered_step(WIDE, batch, 1, implementation)
        return len(re.findall(rf"stablehlo.add .*tensor<{batch}x1x256xbf16>", text))

    assert sums(1, None) == 1
    assert sums(3, None) == 2, "what the experts give to three rows is a slice, which is no operand for a kernel"
    assert sums(1, "reference") == 4
