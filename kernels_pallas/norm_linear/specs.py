"""Named shapes of norms and projections: real models, single tokens and small batches, other dtypes, odd sizes."""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormLinearSpec:
    """T rows of K elements, N outputs.

    `norms` says if x is normed, `adds` if there is a residual, `sums` if there is something to add to x first.
    """

    name: str
    width: int
    num_outputs: int
    num_rows: int = 1
    norms: bool = True
    adds: bool = False
    sums: bool = False
    dtype: str = "bfloat16"
    out_dtype: str | None = None  # x's

    @property
    def kernel_shape(self) -> tuple[int, int]:
        return (self.num_outputs, self.width)

    @property
    def kernel_bytes(self) -> int:
        """What a call has to read."""
        return self.num_outputs * self.width * jnp.dtype(self.dtype).itemsize

    def kernel(self, key: jax.Array) -> jax.Array:
        """[N, K], random, whose products with a normed row are about 1."""
        return jax.random.normal(key, self.kernel_shape, self.dtype) * jnp.asarray(self.width**-0.5, self.dtype)

    def inputs(
        self, key: jax.Array
    ) -> tuple[jax.Array, jax.Array | None, jax.Array, jax.Array | None, jax.Array | None]:
        """The arguments, random: x, norm_scale, kernel, residual and added; None for what this spec has not."""
        x, scale, residual, added = self.rows(key)
        return x, scale, self.kernel(jax.random.fold_in(key, 0)), residual, added

    def rows(self, key: jax.Array) -> tuple[jax.Array, jax.Array | None, jax.Array | None, jax.Array | None]:
        """Random x [T, K], norm_scale [K], residual [T, N] and added [T, K]; None for what this spec has not."""
        of_x, of_scale, of_residual, of_added = jax.random.split(key, 4)
        x = 3 * jax.random.normal(of_x, (self.num_rows, self.width), self.dtype)
        scale = 1 + jax.random.normal(of_scale, (self.width,), self.dtype) / 4
        out = self.num_rows, self.num_outputs
        residual = jax.random.normal(of_residual, out, self.out_dtype or self.dtype)
        added = jax.random.normal(of_added, x.shape, self.dtype)
        return x, scale if self.norms else None, residual if self.adds else None, added if self.sums else None

    def scaled(self, factor: int) -> "NormLinearSpec":
        """As many outputs and elements, `factor` times as few, in steps of 4 and 256; for a CPU."""
        width = max(256, self.width // factor // 256 * 256)
        return dataclasses.replace(self, width=width, num_outputs=max(4, self.num_outputs // factor // 4 * 4))


_QKV = NormLinearSpec(name="qwen3_30b_qkv", width=2048, num_outputs=(32 + 2 * 4) * 128)
_O = NormLinearSpec(name="qwen3_30b_o", width=32 * 128, num_outputs=2048, norms=False, adds=True)
_ROUTER = NormLinearSpec(name="qwen3_30b_router", width=2048, num_outputs=128, out_dtype="float32")

SPECS: tuple[NormLinearSpec, ...] = (
    _QKV,
    _O,
    _ROUTER,
    dataclasses.replace(_QKV, name="summed_qkv", sums=True),
    dataclasses.replace(_QKV, name="two_rows_qkv", num_rows=2),
    dataclasses.replace(_QKV, name="four_rows_qkv", num_rows=4, sums=True),
    dataclasses.replace(_O, name="four_rows_o", num_rows=4),
    dataclasses.replace(_ROUTER, name="four_rows_router", num_rows=4),
    dataclasses.replace(_QKV, name="qwen3_235b_qkv", width=4096, num_outputs=(64 + 2 * 4) * 128),
    dataclasses.replace(_O, name="qwen3_235b_o", width=64 * 128, num_outputs=4096),
    dataclasses.replace(_ROUTER, name="qwen3_235b_router", width=4096),
    dataclasses.replace(_QKV, name="mixtral_qkv", width=4096, num_outputs=(32 + 2 * 8) * 128),
    dataclasses.replace(_O, name="mixtral_o", num_outputs=4096),
    dataclasses.replace(_ROUTER, name="mixtral_router", width=4096, num_outputs=8),
    dataclasses.replace(_QKV, name="float32", num_rows=2, sums=True, dtype="float32"),
    dataclasses.replace(_O, name="float16", num_rows=2, dtype="float16"),
    NormLinearSpec(name="odd", width=768, num_outputs=1004, num_rows=3, adds=True, sums=True),
    NormLinearSpec(name="one_item", width=256, num_outputs=4, norms=False),
)
