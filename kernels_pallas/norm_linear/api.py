"""`norm_linear`: validates, then runs the best implementation here."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas import backends
from kernels_pallas.norm_linear import reference


def _mosaic_gpu(*arrays, **options):
    from kernels_pallas.norm_linear import mosaic_gpu  # importing Mosaic takes seconds, and a CPU needs none of it

    return mosaic_gpu.norm_linear(*arrays, **options)


IMPLEMENTATIONS = {"reference": reference.norm_linear, "mosaic_gpu": _mosaic_gpu}


def resolve(implementation: str | None) -> str:
    """The name of the implementation that runs for this request. Raises as `norm_linear` does."""
    return backends.resolve("norm_linear", IMPLEMENTATIONS, implementation)


def choose(implementation: str | None, x, kernel) -> str:
    """`resolve`, and for None the reference where the kernel cannot do these shapes. Raises as `norm_linear` does."""
    return backends.choose("norm_linear", IMPLEMENTATIONS, implementation, lambda: _mosaic_gpu_problem(x, kernel))


def _mosaic_gpu_problem(x, kernel) -> str | None:
    from kernels_pallas.norm_linear import mosaic_gpu

    return mosaic_gpu.problem(x, kernel)


def norm_linear(
    x: Float[Array, "*n K"],
    norm_scale: Float[Array, " K"] | None,
    kernel: Float[Array, "N K"],
    residual: Float[Array, "*n N"] | None = None,
    added: Float[Array, "*n K"] | None = None,
    *,
    eps: float = 0.0,
    out_dtype=None,
    implementation: str | None = None,
) -> tuple[Float[Array, "*n N"], Float[Array, "*n K"], Float[Array, "*n K"]]:
    """(normed @ kernel.T (+ residual), normed, sum), for the sum x (+ added), and for
    normed = sum / sqrt(mean(sum²) + eps) * norm_scale (arXiv 1910.07467).

    Without a scale the sum is taken as it is. Norm and products are float32; the sum, what is normed, what is scaled
    and the product (before the residual is added) are rounded, the first three to x's dtype, the last to `out_dtype`,
    which is x's too unless it is given.

    mosaic_gpu is for very few rows (see `mosaic_gpu.problem`), and has no gradient. For implementation=None other calls
    go to the reference.

    Raises ValueError for shapes that do not fit, NotImplementedError for an implementation that cannot run here or
    cannot do these shapes.
    """
    out_dtype = jnp.dtype(out_dtype or x.dtype)
    _require_fitting(x, norm_scale, kernel, residual, added, out_dtype)
    run = IMPLEMENTATIONS[choose(implementation, x, kernel)]
    return run(x, norm_scale, kernel, residual, added, eps=eps, out_dtype=out_dtype)


def _require_fitting(x, norm_scale, kernel, residual, added, out_dtype) -> None:
    if kernel.ndim != 2 or x.ndim < 1 or x.shape[-1] != kernel.shape[1]:
        raise ValueError(f"norm_linear: x {x.shape} must be [..., K], and kernel {kernel.shape} [N, K]")
    if norm_scale is not None and (norm_scale.shape, norm_scale.dtype) != (x.shape[-1:], x.dtype):
        raise ValueError(
            f"norm_linear: norm_scale {norm_scale.dtype}{list(norm_scale.shape)} must be {x.dtype}[{x.shape[-1]}]"
        )
    if added is not None and (added.shape, added.dtype) != (x.shape, x.dtype):
        raise ValueError(
            f"norm_linear: added {added.dtype}{list(added.shape)} must be {x.dtype}{list(x.shape)}, as x is"
        )
    shape = (*x.shape[:-1], kernel.shape[0])
    if residual is not None and (residual.shape, residual.dtype) != (shape, out_dtype):
        raise ValueError(
            f"norm_linear: residual {residual.dtype}{list(residual.shape)} must be {out_dtype}{list(shape)}, as what "
            "comes out"
        )
