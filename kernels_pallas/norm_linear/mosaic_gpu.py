"""RMSNorm and a projection of very few rows as one Mosaic GPU kernel that reads each weight once.

Bound by device memory. An item is four outputs, a row of the kernel for each warp of a warpgroup. Blocks take items in
turn, and so do the warpgroups of a block, each through a ring of its own: TMA brings a tile of an item, the products
are float32 sums of products. While the first tiles are on their way every block norms all of x for itself: that is a
few KB from L2, and no block has to wait for another. What is to be added to x before the norm is added there too.
x and its scale are asked for before any weight, so that they do not queue behind all that a multiprocessor can hold,
and once: a thread squares and norms what it has in registers.

All orders are fixed, and an output is one warp's sum in one order however the work is cut up: the same row gives the
same bits in every configuration, and beside any other rows.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import tuning
from kernels_pallas.multiprocessors import BESIDE_A_COPY
from kernels_pallas.norm_linear import row_norm
from kernels_pallas.row_dots import (
    COLUMNS,
    DTYPES,
    ITEM_ROWS,
    MAX_ROWS,
    SHARED_BYTES,
    add_products,
    by_rows,
    lane_zeros,
)

# What experts give to more rows than these is a slice, and as an operand it would keep the kernel out of XLA's command
# buffer: XLA adds it then.
MAX_SUMMED_ROWS = 2
MAX_WIDTH = 8192  # a thread has 1/128 of a row of x and of its scale in registers
WARPS = 4  # of a warpgroup, which share a row of x
OTHER_BYTES = 2048  # of shared memory: barriers and sums of squares


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """How many blocks run, the most warpgroups in each, the most tiles that one has in shared memory, and their bytes.

    Raises ValueError for less than one, and for a tile of less than the 256 columns of float32 that it has at least.
    """

    num_blocks: int = BESIDE_A_COPY  # one on each of these multiprocessors
    max_warpgroups: int = 4
    max_stages: int = 8
    tile_bytes: int = 16 * 1024

    def __post_init__(self) -> None:
        least = ITEM_ROWS * COLUMNS * 4
        if min(self.num_blocks, self.max_warpgroups, self.max_stages) < 1 or self.tile_bytes < least:
            raise ValueError(
                f"norm_linear: num_blocks={self.num_blocks}, max_warpgroups={self.max_warpgroups} and "
                f"max_stages={self.max_stages} must be at least 1, and tile_bytes={self.tile_bytes} at least {least}"
            )


@dataclasses.dataclass(frozen=True)
class Shape:
    """T rows of x of K elements, N outputs, and how they are cut up."""

    num_rows: int
    num_outputs: int
    width: int
    dtype: jnp.dtype
    config: Config

    @property
    def num_columns(self) -> int:
        """n: x is seen as [T, n, COLUMNS], the kernel as [N, n, COLUMNS]."""
        return self.width // COLUMNS

    @property
    def tile(self) -> tuple[int, int, int]:
        """Of an item, what one copy brings: the largest that cuts it evenly and is small enough."""
        most = self.config.tile_bytes // (ITEM_ROWS * COLUMNS * self.dtype.itemsize)
        columns = next(c for c in range(min(most, self.num_columns), 0, -1) if self.num_columns % c == 0)
        return ITEM_ROWS, columns, COLUMNS

    @property
    def tiles_per_item(self) -> int:
        return self.num_columns // self.tile[1]

    @property
    def tile_bytes(self) -> int:
        return ITEM_ROWS * self.tile[1] * COLUMNS * self.dtype.itemsize

    @property
    def num_items(self) -> int:
        return self.num_outputs // ITEM_ROWS

    @property
    def num_blocks(self) -> int:
        return min(self.config.num_blocks, self.num_items)

    @property
    def most_tiles(self) -> int:
        """That fit into a multiprocessor beside x, 0 if none does."""
        return max(0, SHARED_BYTES - OTHER_BYTES - self.num_rows * self.width * self.dtype.itemsize) // self.tile_bytes

    @property
    def num_warpgroups(self) -> int:
        """Enough for the items of a block and the rows of x, as far as each has room for a tile.

        Two at least: with one, which has x for certain, ptxas waits for x before it asks for the scale and for tiles.
        """
        useful = max(2, self.num_rows, -(-self.num_items // self.num_blocks))
        return min(self.config.max_warpgroups, useful, self.most_tiles)

    @property
    def most_turns(self) -> int:
        """Tiles that a warpgroup ever has."""
        return -(-self.num_items // (self.num_blocks * self.num_warpgroups)) * self.tiles_per_item

    @property
    def num_stages(self) -> int:
        """Tiles of a warpgroup in shared memory: all that it ever has, if there is room."""
        return min(self.most_turns, self.config.max_stages, self.most_tiles // self.num_warpgroups)


def shape_of(x, kernel, config: Config = Config()) -> Shape:
    return Shape(x.size // x.shape[-1], kernel.shape[0], kernel.shape[1], jnp.dtype(x.dtype), config)


def problem(x, kernel, config: Config = Config()) -> str | None:
    """Why these shapes and dtypes cannot be done, or None. Takes arrays or anything that has their shape and dtype."""
    shape = shape_of(x, kernel, config)
    if x.dtype != kernel.dtype or x.dtype.name not in DTYPES:
        return f"x {x.dtype} and kernel {kernel.dtype} must be one of {', '.join(DTYPES)}, the same for both"
    if not 1 <= shape.num_rows <= MAX_ROWS:
        return f"{shape.num_rows} rows of x are not 1 to {MAX_ROWS}"
    if shape.width % COLUMNS or shape.width > MAX_WIDTH or shape.num_outputs % ITEM_ROWS or not shape.num_outputs:
        return (
            f"K={shape.width} must be a multiple of {COLUMNS}, at most {MAX_WIDTH}, and N={shape.num_outputs} of "
            f"{ITEM_ROWS}"
        )
    if not shape.most_tiles:
        return (
            f"{shape.num_rows} rows of K={shape.width} {x.dtype} and a tile of {shape.tile_bytes} bytes do not fit "
            "into a multiprocessor"
        )
    return None


def key(x, kernel) -> tuning.Key:
    """What a configuration depends on; no bit of the result depends on that."""
    num_outputs, width = kernel.shape
    return tuning.key("norm_linear", x.dtype, num_rows=x.size // width, num_outputs=num_outputs, width=width)


@functools.partial(jax.jit, static_argnames=("eps", "out_dtype", "config", "interpret"))  # compiled once for all layers
def norm_linear(
    x, norm_scale, kernel, residual, added, *, eps: float, out_dtype, config: Config | None = None, interpret=None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Raises NotImplementedError where `problem` has an answer."""
    config = config or tuning.configured(key(x, kernel), Config())
    if reason := problem(x, kernel, config):
        raise NotImplementedError(f"norm_linear: mosaic_gpu cannot do this: {reason}; use implementation='reference'")
    shape = shape_of(x, kernel, config)
    if added is not None and shape.num_rows > MAX_SUMMED_ROWS:
        x, added = x + added, None
    row = (shape.num_columns, COLUMNS)
    rows = jax.ShapeDtypeStruct((shape.num_rows, *row), x.dtype)
    out = jax.ShapeDtypeStruct((shape.num_rows, shape.num_outputs), out_dtype)
    arrays = [x.reshape(rows.shape), kernel.reshape(shape.num_outputs, *row)]
    arrays += [] if norm_scale is None else [norm_scale.reshape(row)]
    arrays += [] if residual is None else [residual.reshape(out.shape)]
    arrays += [] if added is None else [added.reshape(rows.shape)]
    num_warpgroups, num_stages = shape.num_warpgroups, shape.num_stages
    call = plgpu.kernel(
        _kernel(shape, None if norm_scale is None else eps, adds=residual is not None, sums=added is not None),
        out_type=[out] + [rows] * (added is not None) + [rows] * (norm_scale is not None),
        grid=(shape.num_blocks,),
        grid_names=("block",),
        num_threads=num_warpgroups,
        thread_name="warpgroup",
        scratch_types=[
            plgpu.SMEM((num_warpgroups, num_stages, *shape.tile), x.dtype),
            plgpu.SMEM(rows.shape, x.dtype),
            plgpu.SMEM((num_warpgroups, WARPS), jnp.float32),
            plgpu.Barrier(num_barriers=num_warpgroups * num_stages),
            plgpu.Barrier(num_arrivals=num_warpgroups),
        ],
        interpret=interpret,
    )
    y, *of_x = call(*arrays)
    seen = [x, *(each.reshape(x.shape) for each in of_x)]  # as it came, with what was added, normed
    return y.reshape(*x.shape[:-1], shape.num_outputs), seen[-1], seen[0 if added is None else 1]


def _kernel(shape: Shape, eps: float | None, *, adds: bool, sums: bool):
    """The body. Without a norm `eps` is None; `adds` says if there is a residual, `sums` if x is yet to be added to."""
    num_blocks, num_warpgroups, num_stages = shape.num_blocks, shape.num_warpgroups, shape.num_stages
    per_item, columns = shape.tiles_per_item, shape.tile[1]
    of_item = by_rows(shape.dtype.itemsize).reduce(1)

    def project(x, kernel, *refs):
        # x [T, n, 256], kernel [N, n, 256]; those that there are: scale [n, 256], residual [T, N], added [T, n, 256]
        # out [T, N]; if something is added to x the sum [T, n, 256]; with a norm normed [T, n, 256]
        # shared memory: tiles [warpgroups, stages, 4, columns, 256], x_here [T, n, 256], sums_here [warpgroups, 4]
        *refs, tiles, x_here, sums_here, arrived, x_arrived = refs
        scale = None if eps is None else refs.pop(0)
        residual = refs.pop(0) if adds else None
        parts = [x, refs.pop(0)] if sums else [x]
        out, *of_x = refs
        rows = range(shape.num_rows)
        block, mine = lax.axis_index("block"), lax.axis_index("warpgroup")
        worker = mine * num_blocks + block
        num_mine = lax.div(shape.num_items - worker + num_blocks * num_warpgroups - 1, num_blocks * num_warpgroups)

        def outputs(i):
            """Of the i-th item of this warpgroup."""
            return pl.ds((i * num_blocks * num_warpgroups + worker) * ITEM_ROWS, ITEM_ROWS)

        def load(n, stage) -> None:
            """The n-th tile of this warpgroup."""
            part = pl.ds(lax.rem(n, per_item) * columns, columns)
            source = kernel.at[outputs(lax.div(n, per_item)), part]
            plgpu.copy_gmem_to_smem(source, tiles.at[mine, stage], arrived.at[mine * num_stages + stage])

        def part_of(i, part, totals):
            """With the products of one more tile of the i-th item."""
            n = i * per_item + part
            stage = lax.rem(n, num_stages)
            plgpu.barrier_wait(arrived.at[mine * num_stages + stage])
            x_part = x_here.at[:, pl.ds(part * columns, columns)]
            totals = add_products(totals, x_part, [tiles.at[mine, stage]], shape.dtype.itemsize)
            if shape.most_turns > num_stages:
                plgpu.commit_smem()  # all warps have read the tile: the next one may take its place
                pl.when(n + num_stages < num_mine * per_item)(lambda: load(n + num_stages, stage))
            return totals

        def residuals(here) -> list:
            """Of each row, if there is a residual."""
            refs = [] if residual is None else [residual.at[row, here] for row in rows]
            return [plgpu.load(ref, layout=of_item, optimized=False).astype(jnp.float32) for ref in refs]

        def turn(i, carry):
            here = outputs(i)
            others = residuals(here)  # asked for before the products, so that they are there when they are needed
            totals = lane_zeros(shape.num_rows, shape.dtype.itemsize)
            totals = lax.fori_loop(0, per_item, functools.partial(part_of, i), totals)
            for row in rows:
                y = jnp.sum(totals[row], axis=1).astype(out.dtype)
                out[row, here] = (others[row] + y.astype(jnp.float32)).astype(out.dtype) if adds else y
            return carry

        def prepare(row, loaded: list, scales) -> None:
            """What is multiplied with the weights, in shared memory; one block returns it as well."""
            value = row_norm.added(loaded)
            normed = value if eps is None else row_norm.normed(value, scales, eps, x_here.at[row], sums_here.at[mine])
            x_here[row] = normed

            @pl.when(block == num_blocks - 1 - lax.rem(row, num_blocks))  # the last blocks have the fewest items
            def _():
                for ref, each in zip(of_x, [value] * sums + [normed] * (eps is not None), strict=True):
                    ref[row] = each

        turns = range(-(-shape.num_rows // num_warpgroups))
        mine_of = [mine + n * num_warpgroups for n in turns]  # rows; beyond the last one, it is loaded for nothing
        layout = row_norm.layout(shape.width, shape.dtype.itemsize)
        here = [
            [plgpu.load(part.at[lax.min(row, shape.num_rows - 1)], layout=layout, optimized=False) for part in parts]
            for row in mine_of
        ]
        scales = None if scale is None else plgpu.load(scale, layout=layout, optimized=False)

        @pl.loop(0, lax.min(num_stages, num_mine * per_item))
        def _(stage):
            load(stage, stage)

        for row, loaded in zip(mine_of, here, strict=True):
            pl.when(row < shape.num_rows)(functools.partial(prepare, row, loaded, scales))
        plgpu.barrier_arrive(x_arrived)
        plgpu.barrier_wait(x_arrived)
        lax.fori_loop(0, num_mine, turn, 0)

    return project
