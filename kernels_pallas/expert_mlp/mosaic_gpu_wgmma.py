"""The decode form of the expert MLP for some tens of rows: two Mosaic GPU kernels on the tensor cores.

Bound by device memory. The weights are the left operand of every product (64 of their rows at a time) and the rows of x
its columns, so that few rows waste little. The first kernel makes the weighted hidden values of all groups asked for
from gate and up, the second the rows of y from those and down. Warpgroups work on their own, each through a ring of
tiles that TMA fills.

Which warpgroup has which tile depends on the number of groups asked for and on nothing else, and all orders are fixed.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import tuning
from kernels_pallas.expert_mlp.asked import asked_first
from kernels_pallas.multiprocessors import BESIDE_A_COPY

M = 64  # rows of the left operand of one tensor core instruction
CHUNK = 128  # columns of gate and up in a tile of the first kernel: what is multiplied at once
DOWN_ROWS, DOWN_COLUMNS, DOWN_STAGES = 64, 128, 5  # of a tile of the second kernel, and how many a warpgroup has
SWIZZLE = 128  # bytes: of a row of a tile in shared memory
MAX_ROWS = 32  # of x
MAX_STAGES = 8
SHARED_BYTES = 224 * 1024
DTYPES = ("bfloat16", "float16")
TRANSFORMS = (
    plgpu.TilingTransform((8, SWIZZLE // 2)),  # pyright: ignore[reportAbstractUsage]
    plgpu.SwizzleTransform(SWIZZLE),  # pyright: ignore[reportAbstractUsage]
)
# [M / 2, N] for a warpgroup: a warp has four rows of 8 columns at a time.
UNITS = plgpu.Layout.TILED(plgpu.Tiling(((16, 8), (4, 8), (1,))), warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """How many blocks run, and the most warpgroups in each. Raises ValueError for less than one."""

    num_blocks: int = BESIDE_A_COPY  # one on each of these multiprocessors
    max_warpgroups: int = 2

    def __post_init__(self) -> None:
        if self.num_blocks < 1 or self.max_warpgroups < 1:
            raise ValueError(
                f"expert_mlp: num_blocks={self.num_blocks} and max_warpgroups={self.max_warpgroups} must be at least 1"
            )


def num_columns(num_rows: int) -> int:
    """N, the rows of x filled up to what the tensor cores take."""
    return -(-num_rows // 8) * 8


def gate_up_stages(num_rows: int, width: int, num_warpgroups: int) -> int:
    """Tiles that a warpgroup of the first kernel has room for."""
    columns = num_columns(num_rows)
    left = SHARED_BYTES - columns * width * 2 - num_warpgroups * M * columns * 4
    return min(MAX_STAGES, left // (num_warpgroups * M * CHUNK * 2))


def down_bytes(num_rows: int, num_warpgroups: int) -> int:
    """Of shared memory, in a block of the second kernel: tiles of weights and of hidden values, of 16 bit."""
    return 2 * num_warpgroups * DOWN_STAGES * DOWN_ROWS * (DOWN_COLUMNS + num_columns(num_rows))


def problem(x, slots) -> str | None:
    """Why these shapes and dtypes cannot be done, or None. Takes arrays or anything that has their shape and dtype."""
    num_rows, (_, _, num_hidden, width) = x.shape[0], slots.shape
    if x.dtype != slots.dtype or x.dtype.name not in DTYPES:
        return f"x {x.dtype} and slots {slots.dtype} must be one of {', '.join(DTYPES)}, the same for both"
    if not 1 <= num_rows <= MAX_ROWS:
        return f"{num_rows} rows of x are not 1 to {MAX_ROWS}"
    if width % DOWN_COLUMNS or num_hidden % DOWN_ROWS:
        return f"D={width} must be a multiple of {DOWN_COLUMNS} and F={num_hidden} of {DOWN_ROWS}"
    if gate_up_stages(num_rows, width, 1) < 2:
        return f"{num_rows} rows of D={width} do not fit into shared memory"
    return None


def key(x, slots) -> tuning.Key:
    """What a configuration depends on: nothing that may differ where the same groups have to give the same bits."""
    columns, (_, _, num_hidden, width) = num_columns(x.shape[0]), slots.shape
    return tuning.key("expert_mlp.wgmma", x.dtype, columns=columns, num_hidden=num_hidden, width=width)


@functools.partial(jax.jit, static_argnames=("config", "interpret"))  # the layers of a model share one compilation
def expert_mlp(x, slots, group_slots, group_weights, num_asked=None, *, config: Config | None = None, interpret=None):
    if num_asked is None:
        group_slots, group_weights, num_asked = asked_first(group_slots, group_weights)
    config = config or tuning.configured(key(x, slots), Config())
    (num_rows, width), num_hidden = x.shape, slots.shape[2]
    columns = num_columns(num_rows)
    weights = jnp.pad(group_weights.astype(jnp.float32), ((0, 0), (0, columns - num_rows)))
    asked = num_asked.astype(jnp.int32).reshape(1), group_slots.astype(jnp.int32)
    padded = jnp.pad(x, ((0, columns - num_rows), (0, 0)))
    rows = slots.reshape(slots.shape[0], 3 * num_hidden, width)
    hidden = _gate_up(padded, rows, *asked, weights, config, interpret)
    parts = _down(hidden, rows, *asked, config, interpret)
    return jnp.sum(parts, axis=0).T[:num_rows]


def _span(n, size: int):
    """The n-th `size` elements, known to the compiler to be aligned."""
    return pl.ds(n * size if isinstance(n, int) else pl.multiple_of(n * size, size), size)


def _gate_up(x, slots, num_asked, group_slots, weights, config: Config, interpret):
    """[G, N, F], the hidden values of the groups asked for times their weights; nothing beyond those is written."""
    columns, num_chunks = x.shape[0], x.shape[1] // CHUNK
    num_hidden, num_groups = slots.shape[1] // 3, weights.shape[0]
    fits = [n for n in range(1, config.max_warpgroups + 1) if gate_up_stages(columns, slots.shape[2], n) >= 3]
    num_warpgroups = max(fits, default=1)
    num_stages = min(gate_up_stages(columns, slots.shape[2], num_warpgroups), num_chunks)
    num_workers = config.num_blocks * num_warpgroups
    num_units = M // 2  # of an item: their gates and ups make the rows of one product

    def gate_and_up(num_asked, group_slots, weights, x, slots, out, tiles, x_here, both, arrived, x_arrived):
        # num_asked [1], group_slots [G], weights [G, N]; x [N, D]; slots [R, 3F, D]; out [G, N, F]
        # shared memory: tiles [warpgroups, stages, M, CHUNK], x_here [n, N, CHUNK], both [warpgroups, M, N]
        mine = lax.axis_index("warpgroup")
        worker = mine * config.num_blocks + lax.axis_index("block")
        per_group = num_hidden // num_units

        def place(i):
            """Group and part of it of the i-th item of this warpgroup."""
            item = i * num_workers + worker
            return lax.div(item, per_group), lax.rem(item, per_group)

        def load(at, chunk, stage) -> None:
            group, unit = at
            for part in (0, 1):
                plgpu.copy_gmem_to_smem(
                    slots.at[group_slots[group], _span(part * per_group + unit, num_units), _span(chunk, CHUNK)],
                    tiles.at[mine, stage, pl.ds(part * num_units, num_units)],
                    arrived.at[mine * num_stages + stage],
                )

        num_items = num_asked[0] * per_group
        num_mine = lax.div(num_items - worker + num_workers - 1, num_workers)

        def turn(i, here):
            there = place(i + 1)

            def products(acc):
                @pl.loop(0, num_chunks)
                def _(chunk):
                    n = i * num_chunks + chunk
                    stage = lax.rem(n, num_stages)
                    plgpu.barrier_wait(arrived.at[mine * num_stages + stage])
                    plgpu.wgmma(acc, tiles.at[mine, stage], x_here.at[chunk].transpose((1, 0)))
                    plgpu.wgmma_wait(1)
                    plgpu.commit_smem()  # all warps are done with the tile before this one: its place is free
                    after = chunk + num_stages - 1
                    free = lax.rem(n + num_stages - 1, num_stages)

                    @pl.when((n > 0) & (after < num_chunks))
                    def _():
                        load(here, after, free)

                    @pl.when((n > 0) & (after >= num_chunks) & (i + 1 < num_mine))
                    def _():
                        load(there, after - num_chunks, free)

                return acc[...]

            both[mine] = pl.run_scoped(products, plgpu.WGMMAAccumulatorRef((M, columns), jnp.float32))
            group, unit = here
            gate, up = (plgpu.load(both.at[mine, pl.ds(n, num_units)], layout=UNITS) for n in (0, num_units))
            weight = plgpu.load(weights.at[group], layout=UNITS.reduce(0), optimized=False)
            weight = plgpu.layout_cast(lax.broadcast_in_dim(weight, (num_units, columns), (1,)), UNITS)
            value = gate * lax.logistic(gate) * up * weight
            out.at[group, :, _span(unit, num_units)].transpose((1, 0))[...] = value.astype(out.dtype)
            return there

        first = place(0)

        @pl.when(num_mine > 0)
        def _():
            for stage in range(num_stages):
                load(first, stage, stage)

        @pl.when(mine == 0)
        def _():
            for chunk in range(num_chunks):
                plgpu.copy_gmem_to_smem(x.at[:, _span(chunk, CHUNK)], x_here.at[chunk], x_arrived)

        plgpu.barrier_wait(x_arrived)
        lax.fori_loop(0, num_mine, turn, first)

    return plgpu.kernel(
        gate_and_up,
        out_type=jax.ShapeDtypeStruct((num_groups, columns, num_hidden), x.dtype),
        grid=(config.num_blocks,),
        grid_names=("block",),
        num_threads=num_warpgroups,
        thread_name="warpgroup",
        scratch_types=[
            plgpu.SMEM((num_warpgroups, num_stages, M, CHUNK), x.dtype, transforms=TRANSFORMS),
            plgpu.SMEM((num_chunks, columns, CHUNK), x.dtype, transforms=TRANSFORMS),
            plgpu.SMEM((num_warpgroups, M, columns), jnp.float32),
            plgpu.Barrier(num_barriers=num_warpgroups * num_stages, num_arrivals=2),
            plgpu.Barrier(num_arrivals=num_chunks),
        ],
        interpret=interpret,
    )(num_asked, group_slots, weights, x, slots)


def _down(hidden, slots, num_asked, group_slots, config: Config, interpret):
    """[splits, D, N]: y transposed, as a sum over the first axis."""
    _, columns, num_hidden = hidden.shape
    width = slots.shape[2]
    num_warpgroups, num_stages = config.max_warpgroups, DOWN_STAGES
    num_tiles = width // DOWN_COLUMNS
    num_splits = max(1, config.num_blocks * num_warpgroups // num_tiles)
    num_blocks = -(-num_splits * num_tiles // num_warpgroups)

    def down(num_asked, group_slots, hidden, slots, out, tiles, values, arrived):
        # num_asked [1], group_slots [G]; hidden [G, N, F]; slots [R, 3F, D]; out [splits, D, N]
        # shared memory: tiles [warpgroups, stages, DOWN_ROWS, DOWN_COLUMNS], values [warpgroups, stages, N, DOWN_ROWS]
        mine = lax.axis_index("warpgroup")
        worker = mine * num_blocks + lax.axis_index("block")
        split = lax.div(worker, num_tiles)
        columns_of_d = _span(lax.rem(worker, num_tiles), DOWN_COLUMNS)
        per_group = num_hidden // DOWN_ROWS
        num_mine = lax.div(num_asked[0] * per_group - split + num_splits - 1, num_splits)
        num_mine = jnp.where(split < num_splits, num_mine, 0)  # the last block may have a warpgroup too many

        def load(i, stage) -> None:
            item = i * num_splits + split
            group, unit = lax.div(item, per_group), lax.rem(item, per_group)
            at = arrived.at[mine * num_stages + stage]
            rows = _span(2 * per_group + unit, DOWN_ROWS)
            plgpu.copy_gmem_to_smem(slots.at[group_slots[group], rows, columns_of_d], tiles.at[mine, stage], at)
            plgpu.copy_gmem_to_smem(hidden.at[group, :, _span(unit, DOWN_ROWS)], values.at[mine, stage], at)

        for stage in range(num_stages):
            pl.when(stage < num_mine)(lambda stage=stage: load(stage, stage))

        def products(acc):
            @pl.loop(0, num_mine)
            def _(i):
                stage = lax.rem(i, num_stages)
                plgpu.barrier_wait(arrived.at[mine * num_stages + stage])
                plgpu.wgmma(acc, tiles.at[mine, stage].transpose((1, 0)), values.at[mine, stage].transpose((1, 0)))
                plgpu.wgmma_wait(1)
                plgpu.commit_smem()  # all warps are done with the tile before this one: its place is free

                @pl.when((i > 0) & (i + num_stages - 1 < num_mine))
                def _():
                    load(i + num_stages - 1, lax.rem(i + num_stages - 1, num_stages))

            return acc[...]

        y = pl.run_scoped(products, plgpu.WGMMAAccumulatorRef((DOWN_COLUMNS, columns), jnp.float32))

        @pl.when(split < num_splits)
        def _():
            out[split, columns_of_d] = y

    return plgpu.kernel(
        down,
        out_type=jax.ShapeDtypeStruct((num_splits, width, columns), jnp.float32),
        grid=(num_blocks,),
        grid_names=("block",),
        num_threads=num_warpgroups,
        thread_name="warpgroup",
        scratch_types=[
            plgpu.SMEM((num_warpgroups, num_stages, DOWN_ROWS, DOWN_COLUMNS), slots.dtype, transforms=TRANSFORMS),
            plgpu.SMEM((num_warpgroups, num_stages, columns, DOWN_ROWS), slots.dtype, transforms=TRANSFORMS),
            plgpu.Barrier(num_barriers=num_warpgroups * num_stages, num_arrivals=2),
        ],
        interpret=interpret,
    )(num_asked, group_slots, hidden, slots)
