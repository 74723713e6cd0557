"""The fetch as one Mosaic GPU kernel: TMA from pinned host memory through shared memory into the slots, in place.

Bound by the link (see `tile_ring`); what a prefetch has brought comes from the device's own memory instead. The plan's
count is read on the device.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import tile_ring, tuning
from kernels_pallas.host_view import device_view
from kernels_pallas.prefetch.arrivals import Arrivals, entry_of
from kernels_pallas.tile_ring import Config, Tiling, tiling


def key(store) -> tuning.Key:
    """What a configuration depends on. Takes anything that has the store's shape and dtype."""
    return tuning.key("fetch", store.dtype, num_hidden=store.shape[2], width=store.shape[3])


@functools.partial(jax.jit, static_argnames=("config", "interpret"))  # the layers of a model share one compilation
def fetch(
    store,
    slots,
    expert_ids,
    slot_ids,
    count,
    arrivals: Arrivals | None = None,
    after=None,
    *,
    config: Config | None = None,
    interpret=None,
):
    """`after` is an operand of the kernel that it does not read: XLA starts it no sooner."""
    config = config or tuning.configured(key(store), Config())
    tile = tiling(math.prod(store.shape[1:]), store.dtype.itemsize, config.tile_bytes)
    ref = jax.new_ref(tile.flat(slots))
    body = _copy_plan(tile, config, store.shape[3], takes_arrivals=arrivals is not None)
    kernel = tile_ring.kernel(body, tile, config, store.dtype, interpret=interpret)
    plan = (expert_ids.astype(jnp.int32), slot_ids.astype(jnp.int32), count.astype(jnp.int32).reshape(1))
    come = () if arrivals is None else (arrivals.expert_ids, arrivals.num_rows, tile.flat(arrivals.weights))
    kernel(*plan, device_view(tile.flat(store)), *come, *(() if after is None else (after,)), ref)
    return jax.freeze(ref).reshape(slots.shape)


def _copy_plan(tile: Tiling, config: Config, width: int, *, takes_arrivals: bool):
    """The kernel body: the plan's experts, from where they lie to their slots."""

    def copy_plan(expert_ids, slot_ids, count, store, *refs):
        # expert_ids, slot_ids [P], count [1]; store [E, rows, columns] (host); slots [R, rows, columns]
        # come, if there are arrivals: expert_ids, num_rows, weights [_, rows, columns]; and what it waits for
        *come, slots, stages, arrived = refs

        def load(entry, rows, stage, arrived) -> None:
            def copy(source) -> None:
                plgpu.copy_gmem_to_smem(source, stage, arrived)

            if not takes_arrivals:
                copy(store.at[expert_ids[entry], rows])
                return
            arrivals = Arrivals(*come[:3])
            end_row = lax.div((rows.start + tile.rows) * tile.columns + width - 1, width)
            found = entry_of(arrivals, expert_ids[entry], end_row)
            pl.when(found < 0)(lambda: copy(store.at[expert_ids[entry], rows]))
            pl.when(found >= 0)(lambda: copy(arrivals.weights.at[found, rows]))

        def keep(entry, rows, stage) -> None:
            plgpu.copy_smem_to_gmem(stage, slots.at[slot_ids[entry], rows])

        # In turn, so that the link is busy while what has arrived, of some, is copied on the device.
        num_tiles = count[0] * tile.num_tiles
        tile_ring.copy_tiles(tile, config, num_tiles, load, keep, stages, arrived, in_turn=takes_arrivals)

    return copy_plan
