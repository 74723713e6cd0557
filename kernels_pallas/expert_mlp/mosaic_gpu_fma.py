"""The expert MLP for very few rows: one Mosaic GPU kernel that reads each weight of the groups asked for once.

Bound by device memory. A group is cut into items of four hidden units: their rows of gate, up and down, which need
nothing of the other units. Warpgroups take items in turn, each through a ring of its own (gate, up and down of one
item): TMA brings a tile, the products are float32 sums of products, and the next item's tile takes its place at once.
Every block keeps one float32 sum of what its units add to y; the blocks' sums are added up after the kernel.

Which warpgroup has which item depends on the number of groups asked for and on nothing else, and all orders are fixed:
the same groups give the same bits wherever their weights lie and whatever other groups nobody asks for.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import tuning
from kernels_pallas.expert_mlp.asked import AskedGroups
from kernels_pallas.host_view import device_view
from kernels_pallas.multiprocessors import COUNT
from kernels_pallas.prefetch.arrivals import Arrivals, entry_of
from kernels_pallas.row_dots import (
    COLUMNS,
    DTYPES,
    ITEM_ROWS,
    MAX_ROWS,
    REGISTERS,
    SHARED_BYTES,
    WARPGROUP,
    lane_vector,
    row_dots,
    strided_vector,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """How many blocks run, and the most warpgroups in each. Raises ValueError for less than one."""

    num_blocks: int = COUNT  # one on each multiprocessor
    max_warpgroups: int = 4

    def __post_init__(self) -> None:
        if self.num_blocks < 1 or self.max_warpgroups < 1:
            raise ValueError(
                f"expert_mlp: num_blocks={self.num_blocks} and max_warpgroups={self.max_warpgroups} must be at least 1"
            )


@dataclasses.dataclass(frozen=True)
class Shape:
    """T rows of x, F hidden units, width D = num_tiles * COLUMNS."""

    num_rows: int
    num_hidden: int
    width: int
    itemsize: int

    @property
    def num_tiles(self) -> int:
        return self.width // COLUMNS

    @property
    def items_per_group(self) -> int:
        return self.num_hidden // ITEM_ROWS

    def slots(self, slots) -> tuple[int, ...]:
        """How the kernel sees the slots, or the store: [R, 3F, n, 256]."""
        return slots.shape[0], 3 * self.num_hidden, self.num_tiles, COLUMNS

    def shared_bytes(self, num_warpgroups: int) -> int:
        ring = 3 * ITEM_ROWS * self.width * self.itemsize
        rows = self.num_rows * self.width
        return num_warpgroups * ring + rows * self.itemsize + (num_warpgroups - 1) * rows * 4 + 2048

    @property
    def registers(self) -> int:
        """Of a thread, roughly: the sums of y, those of gate and up, and what it works with."""
        return self.num_rows * (self.width // WARPGROUP + 2 * lane_vector(self.itemsize)) + 40

    def num_warpgroups(self, most: int) -> int:
        """The most that fit into a multiprocessor, 0 if none does."""
        fits = [
            n
            for n in range(1, most + 1)
            if self.shared_bytes(n) <= SHARED_BYTES and self.registers <= min(255, REGISTERS // (n * WARPGROUP))
        ]
        return max(fits, default=0)


def problem(x, slots) -> str | None:
    """Why these shapes and dtypes cannot be done, or None. Takes arrays or anything that has their shape and dtype."""
    num_rows, (_, _, num_hidden, width) = x.shape[0], slots.shape
    if x.dtype != slots.dtype or x.dtype.name not in DTYPES:
        return f"x {x.dtype} and slots {slots.dtype} must be one of {', '.join(DTYPES)}, the same for both"
    if not 1 <= num_rows <= MAX_ROWS:
        return f"{num_rows} rows of x are not 1 to {MAX_ROWS}"
    if width % COLUMNS or num_hidden % ITEM_ROWS:
        return f"D={width} must be a multiple of {COLUMNS} and F={num_hidden} of {ITEM_ROWS}"
    if not Shape(num_rows, num_hidden, width, x.dtype.itemsize).num_warpgroups(1):
        return f"{num_rows} rows of D={width} {x.dtype} do not fit into a multiprocessor"
    return None


def key(x, slots) -> tuning.Key:
    """What a configuration depends on: nothing that may differ where the same groups have to give the same bits."""
    num_rows, (_, _, num_hidden, width) = x.shape[0], slots.shape
    return tuning.key("expert_mlp.fma", x.dtype, num_rows=num_rows, num_hidden=num_hidden, width=width)


@functools.partial(jax.jit, static_argnames=("config", "interpret"))  # the layers of a model share one compilation
def expert_mlp(x, slots, group_slots, group_weights, *, config: Config | None = None, interpret=None):
    """Of slots that hold every expert asked for."""
    config = config or tuning.configured(key(x, slots), Config())
    shape = shape_of(x, slots)
    return _run(x, (slots.reshape(shape.slots(slots)),), group_slots, group_weights, shape, config, interpret)


@functools.partial(jax.jit, static_argnames=("config", "interpret"))
def read_through(
    x,
    store,
    slots,
    experts,
    group_slots,
    fetched,
    group_weights,
    arrivals: Arrivals | None = None,
    after=(),
    *,
    config: Config | None = None,
    interpret=None,
):
    """(y, slots): a group that is fetched is read from the arrivals as far as it has come, else from the store, and
    written to its slot on the way. In place. `after` are operands that the kernel does not read."""
    config = config or tuning.configured(key(x, slots), Config())
    shape = shape_of(x, slots)
    ref = jax.new_ref(slots.reshape(shape.slots(slots)))
    weights = ref, device_view(store.reshape(shape.slots(store))), experts, fetched
    if arrivals is not None:
        weights += arrivals.expert_ids, arrivals.num_rows, arrivals.weights.reshape(shape.slots(arrivals.weights))
    y = _run(x, weights, group_slots, group_weights, shape, config, interpret, after)
    return y, jax.freeze(ref).reshape(slots.shape)


def shape_of(x, slots) -> Shape:
    return Shape(x.shape[0], slots.shape[2], x.shape[1], x.dtype.itemsize)


def _run(x, weights, group_slots, group_weights, shape: Shape, config: Config, interpret, after=()):
    """`weights` are the slots, and what else is needed to read through them."""
    num_warpgroups = shape.num_warpgroups(config.max_warpgroups)
    row = (shape.num_tiles, COLUMNS)
    kernel = plgpu.kernel(
        _kernel(shape, config.num_blocks, num_warpgroups, group_slots.shape[0], len(weights) - 1),
        out_type=jax.ShapeDtypeStruct((config.num_blocks, shape.num_rows, *row), jnp.float32),
        grid=(config.num_blocks,),
        grid_names=("block",),
        num_threads=num_warpgroups,
        thread_name="warpgroup",
        scratch_types=[
            plgpu.SMEM((num_warpgroups, 3, ITEM_ROWS, *row), x.dtype),
            plgpu.SMEM((shape.num_rows, *row), x.dtype),
            plgpu.SMEM((num_warpgroups, shape.num_rows, ITEM_ROWS), jnp.float32),
            plgpu.SMEM((num_warpgroups - 1, shape.num_rows, *row) if num_warpgroups > 1 else (1,), jnp.float32),
            plgpu.Barrier(num_barriers=3 * num_warpgroups),
            plgpu.Barrier(),
            plgpu.Barrier(num_arrivals=max(1, num_warpgroups - 1)),
        ],
        interpret=interpret,
    )
    group_weights = group_weights.astype(jnp.float32)
    asked = group_weights[:, 0] if shape.num_rows == 1 else jnp.max(jnp.abs(group_weights), axis=1)
    groups = group_slots.astype(jnp.int32), asked, group_weights
    parts = kernel(*groups, x.reshape(shape.num_rows, *row), *weights, *after)
    return jnp.sum(parts, axis=0).reshape(x.shape)


def _kernel(shape: Shape, num_blocks: int, num_warpgroups: int, num_groups: int, num_through: int):
    """The kernel body; see the module's docstring. Beside the slots it reads from `num_through` arrays."""
    num_workers = num_blocks * num_warpgroups
    num_rows, num_tiles = shape.num_rows, shape.num_tiles
    strided = plgpu.Layout.WG_STRIDED((num_tiles, COLUMNS), strided_vector(shape.itemsize, shape.width))

    def multiply_groups(group_slots, asked, weights, x, slots, *refs):
        # group_slots, asked [G], weights [G, T]; x [T, n, 256]; slots [R, 3F, n, 256]; out [num_blocks, T, n, 256]
        # to read through: store [E, 3F, n, 256] (host), experts, fetched [G]
        # and what has come before, if anything: expert_ids, num_rows [P], weights [P, 3F, n, 256]; what it waits for
        # shared memory: tiles [warpgroups, 3, 4, n, 256], x_here [T, n, 256], hidden [warpgroups, T, 4],
        # sums [warpgroups - 1, T, n, 256]; arrived [3 warpgroups]
        through, (out, tiles, x_here, hidden, sums, arrived, x_arrived, summed) = refs[:num_through], refs[-8:]
        block, mine = lax.axis_index("block"), lax.axis_index("warpgroup")
        worker = mine * num_blocks + block
        groups = AskedGroups(asked, group_slots, num_groups)

        def place(i):
            """Group, slot and first hidden unit of the i-th item of this warpgroup."""
            item = i * num_workers + worker
            group, slot = groups.at(lax.div(item, shape.items_per_group))
            return group, slot, lax.rem(item, shape.items_per_group) * ITEM_ROWS

        def load(part: int, at) -> None:
            group, slot, unit = at
            rows, place = pl.ds(part * shape.num_hidden + unit, ITEM_ROWS), arrived.at[mine * 3 + part]

            def copy(source) -> None:
                plgpu.copy_gmem_to_smem(source, tiles.at[mine, part], place)

            if not through:
                copy(slots.at[slot, rows])
                return
            store, experts, fetched, *come = through
            pl.when(fetched[group] == 0)(lambda: copy(slots.at[slot, rows]))
            if not come:
                pl.when(fetched[group] != 0)(lambda: copy(store.at[experts[group], rows]))
                return

            @pl.when(fetched[group] != 0)  # what lies in its slot does not wait for what has come to be read
            def _():
                arrivals = Arrivals(*come)
                found = entry_of(arrivals, experts[group], rows.start + ITEM_ROWS)
                pl.when(found < 0)(lambda: copy(store.at[experts[group], rows]))
                pl.when(found >= 0)(lambda: copy(arrivals.weights.at[found, rows]))

        def keep(parts: tuple[int, ...], at) -> None:
            """Sends tiles that came from the store to their slot."""
            group, slot, unit = at
            if through:

                @pl.when(through[2][group] != 0)
                def _():
                    for part in parts:
                        rows = pl.ds(part * shape.num_hidden + unit, ITEM_ROWS)
                        plgpu.copy_smem_to_gmem(tiles.at[mine, part], slots.at[slot, rows])

        def kept() -> None:
            """The tiles that were sent have been read, and may be overwritten."""
            if through:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        num_items = groups.count() * shape.items_per_group
        num_mine = lax.div(num_items - worker + num_workers - 1, num_workers)

        def turn(i, state):
            here, y = state
            group, (more, there) = here[0], (i + 1 < num_mine, place(i + 1))
            plgpu.barrier_wait(arrived.at[mine * 3])
            plgpu.barrier_wait(arrived.at[mine * 3 + 1])
            keep((0, 1), here)
            dots = row_dots(x_here, [tiles.at[mine, part] for part in (0, 1)], shape.itemsize)
            for row, (gate, up) in enumerate(dots):
                hidden[mine, row] = gate * lax.logistic(gate) * up * weights[group, row]
            plgpu.commit_smem()  # all warps have read the tiles: the next ones may take their place

            kept()

            @pl.when(more)
            def _():
                load(0, there)
                load(1, there)

            plgpu.barrier_wait(arrived.at[mine * 3 + 2])
            keep((2,), here)
            for unit in range(ITEM_ROWS):
                down = plgpu.load(tiles.at[mine, 2, unit], layout=strided).astype(jnp.float32)
                y = [y[row] + hidden[mine, row, unit] * down for row in range(num_rows)]
            plgpu.commit_smem()
            kept()
            pl.when(more)(lambda: load(2, there))
            return there, y

        first = place(0)

        @pl.when(num_mine > 0)
        def _():
            for part in range(3):
                load(part, first)

        @pl.when(mine == 0)
        def _():
            plgpu.copy_gmem_to_smem(x, x_here, x_arrived)

        plgpu.barrier_wait(x_arrived)
        zero = plgpu.layout_cast(jnp.zeros((num_tiles, COLUMNS), jnp.float32), strided)
        y = lax.fori_loop(0, num_mine, turn, (first, [zero] * num_rows))[1]

        if num_warpgroups > 1:
            _send_sums(y, sums, summed, mine)

        @pl.when(mine == 0)
        def _():
            if num_warpgroups > 1:
                plgpu.barrier_wait(summed)
            for row in range(num_rows):
                total = y[row]
                for other in range(num_warpgroups - 1):
                    total = total + plgpu.load(sums.at[other, row], layout=strided)
                out[block, row] = total

        if through:
            plgpu.wait_smem_to_gmem(0)

    return multiply_groups


def _send_sums(y, sums, summed, mine) -> None:
    """From all warpgroups to the first."""

    @pl.when(mine > 0)
    def _():
        for row, total in enumerate(y):
            sums[mine - 1, row] = total
        plgpu.barrier_arrive(summed)
