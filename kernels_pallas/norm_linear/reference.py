"""RMSNorm and a projection in plain JAX. Any backend, any number of rows; has a gradient."""

import jax
import jax.numpy as jnp

from kernels_pallas.decode_attention.reference import rms_norm


def norm_linear(x, norm_scale, kernel, residual, added, *, eps: float, out_dtype):
    x = x if added is None else x + added
    normed = x if norm_scale is None else rms_norm(x, norm_scale, eps)
    y = matmul(normed, kernel, out_dtype)
    return (y if residual is None else residual + y), normed, x


def matmul(x, kernel, dtype=None):
    """einsum("...i,oi->...o", x, kernel), accumulated in float32, returned as `dtype` (default: x's).

    A single row is a product and a sum: XLA makes one kernel of it that reads each row of the kernel once, on a GPU and
    on a CPU, where the matrix-vector product that it picks for a dot is often slower.
    """
    rows = x.reshape(-1, x.shape[-1])
    if rows.shape[0] == 1:
        y = jnp.sum(kernel.astype(jnp.float32) * rows.astype(jnp.float32), axis=1)
    else:
        y = jax.lax.dot_general(rows, kernel, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    return y.astype(dtype or x.dtype).reshape(*x.shape[:-1], kernel.shape[0])
