"""The prefill form of the expert MLP for many rows: Mosaic GPU kernels on the tensor cores, over rows by groups.

The rows of each group are brought to lie together. One kernel makes their hidden values from gate and up, the next
their shares of y from those and down, in the dtype of x; then the shares of each row are weighted and added, in float32
and the order of its groups. Weights are read from their slots, from device memory once if a group has few rows
(which is then what the time goes to) or if its tiles are at work at the same time (many rows: arithmetic).

A row's result depends on its own groups and on nothing else: the same bits in any batch, wherever the weights lie.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import tuning
from kernels_pallas.expert_mlp import mosaic_gpu_rows, row_lists
from kernels_pallas.expert_mlp.mosaic_gpu_grouped import STEPS, STORED, Config, Weights, product, span
from kernels_pallas.expert_mlp.mosaic_gpu_rows import MAX_WIDTH

MAX_COLUMNS = 256  # of a product: the most that one tensor core instruction takes
MANY_ROWS = 48  # of a group on average, from which two warpgroups share the weights of a tile
USUAL_PER_ROW = 8  # groups that a row is in, for the choice of tiles, if the caller does not say
DTYPES = ("bfloat16", "float16")


def config_of(num_rows: int, num_groups: int, max_groups_per_row: int | None) -> Config:
    """The form's own choice, for rows that are spread evenly over the groups."""
    rows = num_rows * _usual_per_row(num_groups, max_groups_per_row) / num_groups
    return Config(num_warpgroups=1 if rows < MANY_ROWS else 2)


def key(x, slots, num_groups: int, max_groups_per_row: int | None) -> tuning.Key:
    """What a configuration depends on. Takes arrays or anything that has their shape and dtype."""
    return tuning.key(
        "expert_mlp.prefill",
        x.dtype,
        num_rows=x.shape[0],
        num_groups=num_groups,
        groups_per_row=_usual_per_row(num_groups, max_groups_per_row),
        num_hidden=slots.shape[2],
        width=slots.shape[3],
    )


def _usual_per_row(num_groups: int, max_groups_per_row: int | None) -> int:
    return min(max_groups_per_row or USUAL_PER_ROW, num_groups)


def problem(x, slots) -> str | None:
    """Why these shapes and dtypes cannot be done, or None. Takes arrays or anything that has their shape and dtype."""
    _, _, num_hidden, width = slots.shape
    if x.dtype != slots.dtype or x.dtype.name not in DTYPES:
        return f"x {x.dtype} and slots {slots.dtype} must be one of {', '.join(DTYPES)}, the same for both"
    if width % STEPS or num_hidden % STEPS or width > MAX_WIDTH:
        return f"D={width} and F={num_hidden} must be multiples of {STEPS}, and D at most {MAX_WIDTH}"
    return None


def workspace_bytes(num_rows: int, num_groups: int, width: int, num_hidden: int, max_groups_per_row: int) -> int:
    """Of device memory, about: the gathered rows or their shares of y, and their hidden values, all of 16 bit."""
    per_row = min(max_groups_per_row, num_groups)
    tile_rows = config_of(num_rows, num_groups, per_row).tile_rows
    lists = 4 * 4 * num_groups * num_rows
    return 2 * (width + num_hidden) * row_lists.num_places(num_rows, num_groups, per_row, tile_rows) + lists


@functools.partial(jax.jit, static_argnames=("max_groups_per_row", "config", "interpret"))  # one for all layers
def expert_mlp(
    x, slots, group_slots, group_weights, *, max_groups_per_row: int | None = None, config: Config | None = None,
    interpret=None,
):  # fmt: skip
    (num_rows, width), (num_slots, _, num_hidden, _) = x.shape, slots.shape
    num_groups = group_slots.shape[0]
    if not num_groups:
        return jnp.zeros(x.shape, jnp.float32)
    if config is None:
        heuristic = config_of(num_rows, num_groups, max_groups_per_row)
        config = tuning.configured(key(x, slots, num_groups, max_groups_per_row), heuristic)
    per_row = min(max_groups_per_row or num_groups, num_groups)
    lists = row_lists.row_lists(group_weights, per_row, config.tile_rows)
    weights = slots.reshape(num_slots, 3 * num_hidden, width), group_slots.astype(jnp.int32), lists
    placed = mosaic_gpu_rows.place(x, lists, config.num_blocks, interpret)  # [P, D]
    hidden = product(placed, *weights, _gate_up(num_hidden, width), config, interpret)
    shares = product(hidden, *weights, _down(num_hidden, width), config, interpret)
    return mosaic_gpu_rows.add(shares, lists, config.num_blocks, interpret)


def _largest(size: int, most: int) -> int:
    """The largest tile of a multiple of STORED that divides size."""
    return max(n for n in range(STORED, most + 1, STORED) if size % n == 0)


def _gate_up(num_hidden: int, width: int) -> Weights:
    """As many rows of gate as of up make a tile: each is [units, STEPS], and the two lie one after the other."""
    units = max(n for n in (STORED, MAX_COLUMNS // 2) if num_hidden % n == 0)

    def load(weights, column, step, to, barrier) -> None:
        for part in (0, 1):
            from_unit = weights.at[span(part * (num_hidden // units) + column, units), span(step, STEPS)]
            plgpu.copy_gmem_to_smem(from_unit, to.at[pl.ds(part * units, units)], barrier)

    def result(sums, n: int):
        gate, up = (sums[:, part * units + n * STORED : part * units + (n + 1) * STORED] for part in (0, 1))
        return gate * jax.lax.logistic(gate) * up

    return Weights(
        width=2 * units,
        tile=(2 * units, STEPS),
        num_copies=2,
        num_steps=width // STEPS,
        num_stored=units,
        num_columns=num_hidden,
        load=load,
        operand=lambda tile: tile.transpose((1, 0)),
        result=result,
    )


def _down(num_hidden: int, width: int) -> Weights:
    """Rows of down are steps of the sum: a tile is [STEPS, columns]."""
    columns = _largest(width, MAX_COLUMNS)

    def load(weights, column, step, to, barrier) -> None:
        at = span(2 * (num_hidden // STEPS) + step, STEPS)
        plgpu.copy_gmem_to_smem(weights.at[at, span(column, columns)], to, barrier)

    return Weights(
        width=columns,
        tile=(STEPS, columns),
        num_copies=1,
        num_steps=num_hidden // STEPS,
        num_stored=columns,
        num_columns=width,
        load=load,
        operand=lambda tile: tile,
        result=lambda sums, n: sums[:, n * STORED : (n + 1) * STORED],
    )
