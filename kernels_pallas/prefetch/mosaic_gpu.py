"""The prefetch as one Mosaic GPU kernel on a stream of its own: TMA from pinned host memory into a fresh buffer.

Its results are outputs, and no arrays that something else may write: only so may XLA let it run beside other kernels.
They overlap where the program around it is compiled with `api.COMPILER_OPTIONS`; elsewhere it runs in its place.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.compute_on import compute_on
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import clock, tile_ring
from kernels_pallas.host_view import device_view
from kernels_pallas.multiprocessors import COPYING
from kernels_pallas.prefetch.arrivals import Arrivals
from kernels_pallas.tile_ring import Config, Tiling, tiling

STREAM = "gpu_stream:1"
CONFIG = Config(num_blocks=COPYING)


def prefetch(store, expert_ids, num_rows, after=None, *, config: Config = CONFIG, interpret=None) -> Arrivals:
    """`after` is an operand of the kernel that it does not read: XLA starts it no sooner.

    A tile is a part of `came_at`, timed once it lies in shared memory; nothing is where the kernel is interpreted.
    """
    expert_ids, num_rows = (part.astype(jnp.int32) for part in (expert_ids, num_rows))
    size, width = expert_ids.shape[0], store.shape[3]
    tile = tiling(math.prod(store.shape[1:]), store.dtype.itemsize, config.tile_bytes)

    def copy(store, expert_ids, num_rows, *after):
        out = [jax.ShapeDtypeStruct((size, tile.num_tiles * tile.rows, tile.columns), store.dtype)]
        out += [] if interpret else [jax.ShapeDtypeStruct((size, tile.num_tiles), jnp.int32)]
        body = _copy_rows(tile, config, width, is_timed=not interpret)
        kernel = tile_ring.kernel(body, tile, config, store.dtype, out_type=out, interpret=interpret)
        weights, *came_at = kernel(expert_ids, num_rows, device_view(tile.flat(store)), *after)
        return weights.reshape(size, *store.shape[1:]), *came_at

    beside = compute_on(copy, compute_type=STREAM, out_memory_spaces=jax.memory.Space.Device)
    weights_and_times = beside(store, expert_ids, num_rows, *(() if after is None else (after,)))  # pyright: ignore[reportCallIssue]  # a decorator too
    return Arrivals(expert_ids, num_rows, *weights_and_times)


def _copy_rows(tile: Tiling, config: Config, width: int, *, is_timed: bool):
    """The kernel body: the tiles in which the first rows lie."""
    step = math.gcd(width, tile.size)  # of elements, so that their number stays an int32

    def copy_rows(expert_ids, num_rows, store, *refs):
        # expert_ids, num_rows [P]; store [E, rows, columns] (host); after what it waits for weights
        # [P, rows, columns] and, if it is timed, came_at [P, tiles]
        *refs, stages, arrived = refs
        weights, came_at = refs[-2:] if is_timed else (refs[-1], None)
        wanted = sum(num_rows[entry] for entry in range(num_rows.shape[0])) * (width // step)  # those before come whole
        num_tiles = lax.div(wanted + tile.size // step - 1, tile.size // step)

        def load(entry, rows, stage, arrived) -> None:
            plgpu.copy_gmem_to_smem(store.at[expert_ids[entry], rows], stage, arrived)

        def keep(entry, rows, stage) -> None:
            time = None if came_at is None else clock.read()  # before anything else, since the tile has just come
            plgpu.copy_smem_to_gmem(stage, weights.at[entry, rows])
            if came_at is not None:
                came_at[entry, lax.div(rows.start, tile.rows)] = time

        tile_ring.copy_tiles(tile, config, num_tiles, load, keep, stages, arrived)

    return copy_rows
