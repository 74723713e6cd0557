"""Attention of one new token a sequence as two Mosaic GPU kernels: parts of each sequence, then their sum.

Bound by device memory, and for short sequences by latency: the positions of a sequence are split over many blocks. The
second kernel adds up the parts of a head, each with its weight (arXiv 2205.14135, and flash decoding).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import tuning
from kernels_pallas.decode_attention.mosaic_gpu_parts import COMPILER_PARAMS, parts
from kernels_pallas.decode_attention.shape import LANES, TILE, WARPS, Shape
from kernels_pallas.multiprocessors import BESIDE_A_COPY

HEAD_DIMS = (64, 128)
MAX_GROUP = 16  # queries of a KV head
DTYPES = ("bfloat16", "float16")
LOWEST = -1e30  # below all scores, and finite: the difference of two is a number


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """About how many blocks run. Raises ValueError for less than one."""

    num_blocks: int = 2 * BESIDE_A_COPY  # two on each of these multiprocessors
    max_stages: int = 2  # tiles of keys and of values in shared memory

    def __post_init__(self) -> None:
        if self.num_blocks < 1 or self.max_stages < 1:
            raise ValueError(
                f"decode_attention: num_blocks={self.num_blocks} and max_stages={self.max_stages} must be at least 1"
            )


def problem(qkv, keys, num_heads: int) -> str | None:
    """Why these shapes and dtypes cannot be done, or None. Takes arrays or anything that has their shape and dtype."""
    _, num_positions, num_kv_heads, head_dim = keys.shape
    if qkv.dtype != keys.dtype or qkv.dtype.name not in DTYPES:
        return f"qkv {qkv.dtype} and keys {keys.dtype} must be one of {', '.join(DTYPES)}, the same for both"
    if head_dim not in HEAD_DIMS:
        return f"heads of {head_dim} elements are not of {' or '.join(map(str, HEAD_DIMS))}"
    if num_heads // num_kv_heads > MAX_GROUP:
        return f"{num_heads} heads for {num_kv_heads} KV heads are more than {MAX_GROUP} each"
    if num_positions < TILE or num_positions % 8:
        return f"room for {num_positions} positions is not a multiple of 8, of at least {TILE}"
    capability = getattr(jax.devices()[0], "compute_capability", None)  # none on a CPU, where kernels are interpreted
    if capability is not None and int(float(capability)) != 9:
        return f"compute capability {capability} is not 9 (Hopper), which alone has these instructions"
    return None


def key(shape: Shape) -> tuning.Key:
    """What a configuration depends on."""
    sizes = {field.name: getattr(shape, field.name) for field in dataclasses.fields(shape) if field.name != "dtype"}
    return tuning.key("decode_attention", shape.dtype, **sizes)


@functools.partial(jax.jit, static_argnames=("num_heads", "sliding_window", "eps", "config", "interpret"))
def decode_attention(
    qkv,
    q_scale,
    k_scale,
    cos,
    sin,
    keys,
    values,
    positions,
    valid,
    *,
    num_heads: int,
    sliding_window: int | None,
    eps: float,
    config: Config | None = None,
    interpret=None,
):
    """Raises NotImplementedError where `problem` has an answer."""
    if reason := problem(qkv, keys, num_heads):
        raise NotImplementedError(
            f"decode_attention: mosaic_gpu cannot do this: {reason}; use implementation='reference'"
        )
    batch, num_positions, num_kv_heads, head_dim = keys.shape
    shape = Shape(batch, num_heads, num_positions, num_kv_heads, head_dim, keys.dtype, sliding_window)
    config = config or tuning.configured(key(shape), Config())
    num_splits = shape.num_splits(config.num_blocks)
    heads = qkv.reshape(shape.batch, -1, 2, shape.half)
    # The rows of the last KV head's queries, filled up, must lie within the array.
    missing = (shape.num_kv_heads - 1) * shape.group + shape.num_rows - heads.shape[1]
    heads = jnp.pad(heads, ((0, 0), (0, max(0, missing)), (0, 0), (0, 0)))
    positions, valid = positions.astype(jnp.int32), (valid & (positions < num_positions)).astype(jnp.int32)
    q_scale, k_scale = (scale.reshape(2, shape.half) for scale in (q_scale, k_scale))
    key_ref, value_ref = jax.new_ref(keys), jax.new_ref(values)
    num_stages = shape.num_stages(num_splits, config.max_stages)
    sums, stats = parts(shape, num_splits, num_stages, eps, interpret)(
        positions, valid, heads, q_scale, k_scale, cos, sin, key_ref, value_ref
    )
    out = _combine(shape, num_splits, interpret)(positions, valid, sums, stats)
    return out.reshape(shape.batch, -1), jax.freeze(key_ref), jax.freeze(value_ref)


def _combine(shape: Shape, num_splits: int, interpret):
    """The second kernel: [B, N, H], each head's sums over its parts; 0 for sequences that are not valid."""
    lane_rows, whole = shape.lane_rows(num_splits), (num_splits, shape.head_dim)
    vector = shape.head_dim * lane_rows // (WARPS * LANES)
    # A warp has a quarter of the columns of `lane_rows` parts at a time.
    tiling = plgpu.Tiling(((lane_rows, shape.head_dim), (lane_rows, shape.head_dim // WARPS), (vector,)))
    layout = plgpu.Layout.TILED(tiling, warp_dims=(-4,), lane_dims=(-3, -2), vector_dim=-1)

    def add_parts(positions, valid, sums, stats, out):
        sequence, head = lax.axis_index("sequence"), lax.axis_index("head")
        kv_head, row = lax.div(head, shape.group), lax.rem(head, shape.group)
        _, num_tiles = shape.tiles_of(positions[sequence], valid[sequence])
        written = plgpu.broadcasted_iota(jnp.int32, whole, 0, layout=layout) < num_tiles

        def stat_of(n: int):
            stat = plgpu.load(stats.at[sequence, kv_head, :, n, row], layout=layout.reduce(1), optimized=False)
            return plgpu.layout_cast(lax.broadcast_in_dim(stat, whole, (0,)), layout)

        def over_parts(reduce, x):
            return plgpu.layout_cast(lax.broadcast_in_dim(reduce(x, axis=0), whole, (1,)), layout)

        of_parts = plgpu.load(sums.at[sequence, kv_head, :, row], layout=layout, optimized=False)
        largest, total = jnp.where(written, stat_of(0), LOWEST), jnp.where(written, stat_of(1), 0.0)
        weight = jnp.exp2(largest - over_parts(jnp.max, largest))
        total = jnp.sum(total * weight, axis=0)
        summed = jnp.sum(jnp.where(written, of_parts, 0.0) * weight, axis=0)
        out[sequence, head] = (summed / jnp.where(total > 0.0, total, 1.0)).astype(out.dtype)

    return plgpu.kernel(
        add_parts,
        out_type=jax.ShapeDtypeStruct((shape.batch, shape.num_heads, shape.head_dim), shape.dtype),
        grid=(shape.num_heads, shape.batch),
        grid_names=("head", "sequence"),
        compiler_params=COMPILER_PARAMS,
        interpret=interpret,
    )
