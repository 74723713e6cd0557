"""Small layers. Kernels are [out, in], as in Hugging Face: a row is contiguous, which is what a decode step reads."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from kernels_pallas.decode_attention.reference import rms_norm
from kernels_pallas.norm_linear.api import norm_linear

_INIT = nnx.initializers.normal(0.02)


def init_kernel(rngs: nnx.Rngs, shape: tuple[int, ...], dtype: str) -> nnx.Param:
    return nnx.Param(_INIT(rngs.params(), shape, dtype))


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x²) + eps) * scale, in float32 (arXiv 1910.07467)."""

    def __init__(self, num_features: int, *, eps: float, dtype):
        self.scale = nnx.Param(jnp.ones((num_features,), dtype))
        self.eps = eps

    def __call__(self, x: Float[Array, "*n D"]) -> Float[Array, "*n D"]:
        return rms_norm(x, self.scale[...], self.eps)


class Linear(nnx.Module):
    """y = x @ kernel.T (+ bias), for x [..., in]; `implementation` is that of `norm_linear`."""

    def __init__(
        self,
        num_in: int,
        num_out: int,
        *,
        dtype,
        use_bias: bool = False,
        rngs: nnx.Rngs,
        implementation: str | None = "reference",
    ):
        self.kernel = init_kernel(rngs, (num_out, num_in), dtype)
        self.bias = nnx.Param(jnp.zeros((num_out,), dtype)) if use_bias else None
        self.implementation = implementation

    def __call__(self, x: Float[Array, "*n I"], residual: Float[Array, "*n O"] | None = None) -> Float[Array, "*n O"]:
        """y, added to the residual if there is one."""
        if self.bias is None:
            return project(x, self.kernel[...], residual=residual, implementation=self.implementation)[0]
        y = self._biased(project(x, self.kernel[...], implementation=self.implementation)[0])
        return y if residual is None else residual + y

    def after_norm(
        self, x: Float[Array, "*n I"], norm: RMSNorm, added: Float[Array, "*n I"] | None = None
    ) -> tuple[Float[Array, "*n O"], Float[Array, "*n I"]]:
        """(y of norm(x + added), x + added)."""
        y, _, x = project(x, self.kernel[...], norm, added=added, implementation=self.implementation)
        return self._biased(y), x

    def _biased(self, y: Float[Array, "*n O"]) -> Float[Array, "*n O"]:
        return y if self.bias is None else y + self.bias[...].reshape((1,) * (y.ndim - 1) + (-1,))


def project(
    x: Float[Array, "*n I"],
    kernel: Float[Array, "O I"],
    norm: RMSNorm | None = None,
    *,
    residual: Float[Array, "*n O"] | None = None,
    added: Float[Array, "*n I"] | None = None,
    dtype=None,
    implementation: str | None,
) -> tuple[Float[Array, "*n O"], Float[Array, "*n I"], Float[Array, "*n I"]]:
    """(normed @ kernel.T (+ residual), normed, x (+ added)), normed by `norm` if there is one; see `norm_linear`."""
    scale, eps = (None, 0.0) if norm is None else (norm.scale[...], norm.eps)
    return norm_linear(x, scale, kernel, residual, added, eps=eps, out_dtype=dtype, implementation=implementation)


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
