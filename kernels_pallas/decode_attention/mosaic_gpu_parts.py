"""The first kernel of decode attention: each block attends over every n-th tile of one KV head of one sequence.

TMA brings the tiles while the block norms and rotates the queries, which are the rows of one product on the tensor
cores, filled up to 64. The block whose tile ends the sequence writes the new key and value into the KV cache, and into
its tile, and clears what lies behind: that may be anything, and 0 times NaN is NaN.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.decode_attention.shape import TILE, Shape

M = 64  # rows of one tensor core instruction
LOG2_E = math.log2(math.e)
# Lane semantics: layouts in shared memory are the ones written here. Approximate: exponentials and roots of 2 ulp.
COMPILER_PARAMS = plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane)
BY_ROWS, ROW, COLUMN = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)


def parts(shape: Shape, num_splits: int, num_stages: int, eps: float, interpret):
    """The kernel: sums [B, K, P, rows, H] of weights * values, and stats [B, K, P, 2, rows] that go with them.

    A row's weights are 2 ** (score - stats[0]), and stats[1] is their sum. Parts without a tile are not written.
    """
    halves = _tiled(shape.half, shape.half * 2)  # a swizzle of half a head: the two are written apart
    lead = (shape.batch, shape.num_kv_heads, num_splits)
    tiles = plgpu.SMEM((num_stages, TILE, shape.head_dim), shape.dtype, transforms=halves)
    return plgpu.kernel(
        _Attend(shape, num_splits, num_stages, eps).attend,
        out_type=(
            jax.ShapeDtypeStruct((*lead, shape.num_rows, shape.head_dim), jnp.float32),
            jax.ShapeDtypeStruct((*lead, 2, shape.num_rows), jnp.float32),
        ),
        grid=(num_splits, shape.num_kv_heads, shape.batch),
        grid_names=("split", "kv_head", "sequence"),
        scratch_types=[
            # The sums take the place of the tiles, so that a multiprocessor has room for two blocks.
            plgpu.RefUnion([tiles, tiles], plgpu.SMEM((M, shape.head_dim), jnp.float32, transforms=_tiled(32, 128))),
            plgpu.SMEM((M, shape.head_dim), shape.dtype, transforms=halves),
            plgpu.SMEM((M, TILE), shape.dtype, transforms=halves),
            plgpu.SMEM((2, 8, shape.head_dim), shape.dtype),
            plgpu.SMEM((2, M), jnp.float32),
            plgpu.Barrier(num_barriers=2 * num_stages),
        ],
        compiler_params=COMPILER_PARAMS,
        interpret=interpret,
    )


def shared_bytes(shape: Shape, num_stages: int) -> int:
    """What a block has in shared memory, less its barriers."""
    item, head = shape.dtype.itemsize, shape.head_dim
    tiles = max(2 * num_stages * TILE * head * item, M * head * 4)
    return tiles + (M * head + M * TILE + 2 * 8 * head) * item + 2 * M * 4


def _tiled(num_columns: int, swizzle: int) -> tuple:
    """How [rows, columns] lie in shared memory for the tensor cores; the swizzle, in bytes, is a tile's row."""
    return (
        plgpu.TilingTransform((8, num_columns)),  # pyright: ignore[reportAbstractUsage]
        plgpu.SwizzleTransform(swizzle),  # pyright: ignore[reportAbstractUsage]
    )


@dataclasses.dataclass(frozen=True)
class _Attend:
    """The body of the first kernel; see the module's docstring."""

    shape: Shape
    num_splits: int
    num_stages: int
    eps: float

    def attend(self, positions, valid, heads, q_scale, k_scale, cos, sin, keys, values, sums, stats, *scratch):
        # positions, valid [B]; heads [B, N + 2K, 2, H/2]; q_scale, k_scale [2, H/2]; cos, sin [B, H/2]
        # keys, values [B, S, K, H]; sums [B, K, P, rows, H]; stats [B, K, P, 2, rows]
        # shared memory: key_tiles, value_tiles [stages, TILE, H] or sums_here [M, H], queries [M, H],
        # weights [M, TILE], new [2, 8, H], the key and the value eight times, stats_here [2, M]; arrived [2 stages]
        ((key_tiles, value_tiles), sums_here), queries, weights, new, stats_here, arrived = scratch
        shape, num_splits = self.shape, self.num_splits
        split, kv_head, sequence = (lax.axis_index(name) for name in ("split", "kv_head", "sequence"))
        position = positions[sequence]
        first, num_tiles = shape.tiles_of(position, valid[sequence])
        num_mine = lax.div(num_tiles - split + num_splits - 1, num_splits)

        def place(i):
            """The first position of the i-th tile of this block, and the first one read: no tile leaves the array."""
            start = (first + i * num_splits + split) * TILE
            return start, jnp.minimum(start, shape.num_positions - TILE)

        def load(i, stage) -> None:
            span = pl.ds(place(i)[1], TILE)
            for n, (cached, tiles) in enumerate(((keys, key_tiles), (values, value_tiles))):
                plgpu.copy_gmem_to_smem(cached.at[sequence, span, kv_head], tiles.at[stage], arrived.at[2 * stage + n])

        for stage in range(self.num_stages):
            pl.when(stage < num_mine)(lambda stage=stage: load(stage, stage))

        def turn(i, state):
            stage = lax.rem(i, self.num_stages)
            start, read_from = place(i)
            key_tile, value_tile = key_tiles.at[stage], value_tiles.at[stage]
            is_last = i * num_splits + split == num_tiles - 1
            plgpu.barrier_wait(arrived.at[2 * stage])

            @pl.when(is_last)
            def _():
                plgpu.barrier_wait(arrived.at[2 * stage + 1])
                for n, (tile, cached) in enumerate(((key_tile, keys), (value_tile, values))):
                    _end(tile, new.at[n, 0], position - read_from)
                    plgpu.copy_smem_to_gmem(new.at[n, 0], cached.at[sequence, position, kv_head])
                plgpu.commit_smem()

            scores = _product(queries, key_tile.transpose((1, 0)))
            seen = self._seen(start, read_from, position)
            largest, total, weight, shrunk = _softmax(scores, seen, shape.head_dim**-0.5, *state[:2])
            weights[...] = weight.astype(shape.dtype)
            plgpu.commit_smem()

            @pl.when(jnp.logical_not(is_last))
            def _():
                plgpu.barrier_wait(arrived.at[2 * stage + 1])

            added = _product(weights, value_tile)
            plgpu.commit_smem()  # all warps are done with the tiles: their places are free
            pl.when(i + self.num_stages < num_mine)(lambda: load(i + self.num_stages, stage))
            return largest, total, state[2] * lax.broadcast_in_dim(shrunk, added.shape, (0,)) + added

        @pl.when(num_mine > 0)
        def _():
            # While tiles are on their way, all else is asked for before anything of it is waited for.
            norms, at = _Heads(shape, self.eps), shape.num_heads + kv_head
            of_queries = norms.loaded(heads.at[sequence, pl.ds(kv_head * shape.group, shape.num_rows)])
            of_key, of_value = (norms.loaded(heads.at[sequence, n]) for n in (at, at + shape.num_kv_heads))
            angles = [norms.row(ref.at[sequence]) for ref in (cos, sin)]
            q_scales, k_scales = ([norms.row(scale.at[n]) for n in (0, 1)] for scale in (q_scale, k_scale))
            norms.store(norms.rotated(of_queries, q_scales, angles), queries.at[pl.ds(0, shape.num_rows)])

            @pl.when(lax.rem(num_tiles - 1, num_splits) == split)
            def _():
                norms.store(norms.rotated(of_key, k_scales, angles), new.at[0])
                norms.store(of_value, new.at[1])

            plgpu.commit_smem()
            state = (
                plgpu.layout_cast(jnp.full((M,), -jnp.inf, jnp.float32), ROW),
                plgpu.layout_cast(jnp.zeros((M,), jnp.float32), ROW),
                plgpu.layout_cast(jnp.zeros((M, shape.head_dim), jnp.float32), BY_ROWS),
            )
            stats_here[0], stats_here[1], sums_here[...] = lax.fori_loop(0, num_mine, turn, state)
            plgpu.commit_smem()
            mine, part = pl.ds(0, shape.num_rows), (sequence, kv_head, split)
            plgpu.copy_smem_to_gmem(sums_here.at[mine], sums.at[part])
            for n in (0, 1):
                plgpu.copy_smem_to_gmem(stats_here.at[n, mine], stats.at[(*part, n)])
            plgpu.wait_smem_to_gmem(0)

    def _seen(self, start, read_from, position):
        at = read_from + plgpu.broadcasted_iota(jnp.int32, (M, TILE), 1, layout=BY_ROWS)
        seen = (at >= start) & (at <= position)
        window = self.shape.sliding_window
        return seen if window is None else seen & (at > position - window)


def _product(a, b):
    """a @ b, of references to shared memory, in float32."""

    def multiply(acc):
        plgpu.wgmma(acc, a, b)
        return acc[...]

    return pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef((a.shape[0], b.shape[1]), jnp.float32))


def _softmax(scores, seen, scale: float, largest, total):
    """Online softmax: the new largest score and total weight of each row, the weights, and what becomes of older ones.

    Scores count in powers of two (score * log2 e), which is what the hardware has an instruction for.
    """
    scores = jnp.where(seen, scores * (scale * LOG2_E), -jnp.inf)
    larger = jnp.maximum(largest, jnp.max(scores, axis=1))
    shrunk = jnp.exp2(largest - larger)
    weight = jnp.exp2(scores - lax.broadcast_in_dim(larger, scores.shape, (0,)))
    return larger, total * shrunk + jnp.sum(weight, axis=1), weight, shrunk


def _end(tile, new, row) -> None:
    """Puts `new` [H] at `row` of `tile` [TILE, H], in shared memory, and 0 behind it."""
    at = plgpu.broadcasted_iota(jnp.int32, tile.shape, 0, layout=BY_ROWS)
    here = lax.broadcast_in_dim(plgpu.load(new, layout=COLUMN, optimized=False), tile.shape, (1,))
    here = plgpu.layout_cast(here, BY_ROWS).astype(jnp.float32)
    before = plgpu.load(tile, layout=BY_ROWS).astype(jnp.float32)
    tile[...] = jnp.where(at < row, before, jnp.where(at == row, here, 0.0)).astype(tile.dtype)


@dataclasses.dataclass(frozen=True)
class _Heads:
    """Norm and rotation of heads inside a kernel, as two arrays [rows, H/2]: a pair that turns is one place in both."""

    shape: Shape
    eps: float

    @property
    def layout(self):
        """A warp has two of eight rows, and 16 of its threads share one."""
        half = self.shape.half
        tiling = plgpu.Tiling(((8, half), (2, half), (half // 16,)))
        return plgpu.Layout.TILED(tiling, warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)

    def row(self, ref):
        """[H/2] of a reference, float32."""
        return plgpu.load(ref, layout=self.layout.reduce(0), optimized=False).astype(jnp.float32)

    def _rows(self, row, num_rows: int):
        return plgpu.layout_cast(lax.broadcast_in_dim(row, (num_rows, self.shape.half), (1,)), self.layout)

    def loaded(self, heads):
        """Both halves of `heads` [rows, 2, H/2], or of one head [2, H/2] eight times; float32."""
        if len(heads.shape) == 2:
            return [self._rows(self.row(heads.at[n]), 8) for n in (0, 1)]
        halves = [plgpu.load(heads.at[:, n], layout=self.layout, optimized=False) for n in (0, 1)]
        return [half.astype(jnp.float32) for half in halves]

    def rotated(self, halves, scales, angles):
        """The same, normed, times the scale, and each pair turned by its angle; rounded where the reference rounds."""
        dtype, (num_rows, _) = self.shape.dtype, halves[0].shape
        squares = jnp.sum(halves[0] * halves[0] + halves[1] * halves[1], axis=1)
        by = lax.rsqrt(squares / self.shape.head_dim + self.eps)
        by = plgpu.layout_cast(lax.broadcast_in_dim(by, halves[0].shape, (0,)), self.layout)
        normed = [(half * by).astype(dtype).astype(jnp.float32) for half in halves]
        scaled = [half * self._rows(scale, num_rows) for half, scale in zip(normed, scales, strict=True)]
        first, second = (half.astype(dtype).astype(jnp.float32) for half in scaled)
        cos, sin = (self._rows(angle, num_rows) for angle in angles)
        return first * cos - second * sin, second * cos + first * sin

    def store(self, halves, ref) -> None:
        for n, half in enumerate(halves):
            ref[:, n * self.shape.half : (n + 1) * self.shape.half] = half.astype(self.shape.dtype)
