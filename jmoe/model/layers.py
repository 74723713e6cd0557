"""Small layers. Kernels are [out, in], as in Hugging Face: a row is contiguous, which is what a decode step reads."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from kernels_pallas.decode_attention.reference import rms_norm
from kernels_pallas.norm_linear.reference import matmul

_INIT = nnx.initializers.normal(0.02)


def init_kernel(rngs: nnx.Rngs, shape: tuple[int, ...], dtype: str) -> nnx.Param:
    return nnx.Param(_INIT(rngs.params(), shape, dtype))


class Linear(nnx.Module):
    """y = x @ kernel.T (+ bias), for x [..., in]."""

    def __init__(self, num_in: int, num_out: int, *, dtype, use_bias: bool = False, rngs: nnx.Rngs):
        self.kernel = init_kernel(rngs, (num_out, num_in), dtype)
        self.bias = nnx.Param(jnp.zeros((num_out,), dtype)) if use_bias else None

    def __call__(self, x: Float[Array, "*n I"]) -> Float[Array, "*n O"]:
        y = matmul(x, self.kernel[...])
        return y if self.bias is None else y + self.bias[...].reshape((1,) * (y.ndim - 1) + (-1,))


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x²) + eps) * scale, in float32 (arXiv 1910.07467)."""

    def __init__(self, num_features: int, *, eps: float, dtype):
        self.scale = nnx.Param(jnp.ones((num_features,), dtype))
        self.eps = eps

    def __call__(self, x: Float[Array, "*n D"]) -> Float[Array, "*n D"]:
        return rms_norm(x, self.scale[...], self.eps)


class Embedding(nnx.Module):
    def __init__(self, num_rows: int, num_features: int, *, dtype, rngs: nnx.Rngs):
        self.embedding = init_kernel(rngs, (num_rows, num_features), dtype)

    def __call__(self, token_ids):
        return jnp.take(self.embedding[...], token_ids, axis=0)


class DenseMLP(nnx.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (arXiv 2002.05202), for the layers that are not a mixture of experts."""

    def __init__(self, hidden_size: int, intermediate_size: int, *, dtype, rngs: nnx.Rngs):
        self.gate_up_proj = Linear(hidden_size, 2 * intermediate_size, dtype=dtype, rngs=rngs)
        self.down_proj = Linear(intermediate_size, hidden_size, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "*n D"]) -> Float[Array, "*n D"]:
        gate, up = jnp.split(self.gate_up_proj(x), 2, axis=-1)
        return self.down_proj(jax.nn.silu(gate) * up)
