"""Routing as one Mosaic GPU kernel: a warpgroup for each row, a thread for each expert (for two of more than 128).

Bound by latency. An expert's rank is the number of experts with more weight, found by looking at each in turn, and so
is its place among the chosen ones.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.route.reference import LEAST_WEIGHT

WARPGROUP = 128  # threads
MAX_EXPERTS = 256  # the most elements of one dimension of a TMA box
MAX_ROWS = 1024  # beyond, XLA's sort is no slower
COPIED = 4  # elements: TMA copies 16 bytes at least
UNROLL = 8  # of the experts that are looked at: their loads are on their way together
UNCHOSEN = -1


def problem(logits) -> str | None:
    """Why these shapes cannot be done, or None. Takes anything that has their shape and dtype."""
    num_rows, num_experts = logits.shape
    if logits.dtype != jnp.float32:
        return f"logits are {logits.dtype}, not float32"
    if num_experts > MAX_EXPERTS or num_experts % COPIED or not 1 <= num_rows <= MAX_ROWS:
        return (
            f"{num_experts} experts must be a multiple of {COPIED} and at most {MAX_EXPERTS}, {num_rows} rows 1 to "
            f"{MAX_ROWS}"
        )
    return None


@functools.partial(jax.jit, static_argnames=("num_chosen", "normalize", "interpret"))  # compiled once for all layers
def route(logits, valid, *, num_chosen: int, normalize: bool, interpret=None):
    """Raises NotImplementedError where `problem` has an answer."""
    if why := problem(logits):
        raise NotImplementedError(f"route: mosaic_gpu cannot do this: {why}; use implementation='reference'")
    (num_rows, num_experts), room = logits.shape, -(-num_chosen // COPIED) * COPIED
    threads = -(-num_experts // WARPGROUP) * WARPGROUP
    kernel = plgpu.kernel(
        _kernel(num_experts, num_chosen, room, threads, normalize),
        out_type=[jax.ShapeDtypeStruct((num_rows, room), dtype) for dtype in (jnp.int32, jnp.float32)],
        grid=(num_rows,),
        grid_names=("row",),
        scratch_types=[
            plgpu.SMEM((threads,), jnp.float32),
            plgpu.SMEM((threads,), jnp.float32),
            plgpu.SMEM((threads,), jnp.int32),
            plgpu.SMEM((threads,), jnp.int32),
            plgpu.Barrier(),
        ],
        interpret=interpret,
    )
    expert_ids, weights = kernel(logits, valid.astype(jnp.int32))
    return expert_ids[:, :num_chosen], weights[:, :num_chosen]


def _kernel(num_experts: int, num_chosen: int, room: int, threads: int, normalize: bool):
    """The kernel body; see the module's docstring."""
    layout = plgpu.Layout.WG_STRIDED((threads,), threads // WARPGROUP)

    def each(step, start):
        return lax.fori_loop(0, num_experts, step, start, unroll=math.gcd(num_experts, UNROLL))

    def route_rows(logits, valid, ids_out, weights_out, numbers, weights, places, ids, arrived):
        # logits [T, E], valid [T]; ids_out, weights_out [T, room]; the others [threads] in shared memory
        row = lax.axis_index("row")
        plgpu.copy_gmem_to_smem(logits.at[row], numbers.at[pl.ds(0, num_experts)], arrived)
        plgpu.barrier_wait(arrived)
        me = plgpu.broadcasted_iota(jnp.int32, (threads,), 0, layout=layout)

        largest = each(lambda j, most: jnp.maximum(most, numbers[j]), jnp.float32(-math.inf))
        odds = jnp.exp(plgpu.load(numbers, layout=layout) - largest)
        weights[...] = odds
        plgpu.commit_smem()
        odds = odds / each(lambda j, total: total + weights[j], jnp.float32(0))
        numbers[...] = odds  # all have read the logits
        plgpu.commit_smem()

        def before(j, rank):
            other = numbers[j]
            return rank + ((other > odds) | ((other == odds) & (j < me))).astype(jnp.int32)

        rank = each(before, me * 0)
        places[...] = jnp.where(rank < num_chosen, me, UNCHOSEN)
        plgpu.commit_smem()
        place = each(lambda j, count: count + ((places[j] != UNCHOSEN) & (j < me)).astype(jnp.int32), me * 0)
        plgpu.commit_smem()  # all have seen who is chosen
        places[...] = jnp.where(rank < num_chosen, place, UNCHOSEN)
        plgpu.commit_smem()

        def chosen(j, found):
            expert, weight, total = found
            place, odds = places[j], numbers[j]
            total = total + jnp.where(place == UNCHOSEN, 0.0, odds)
            return jnp.where(place == me, j, expert), jnp.where(place == me, odds, weight), total

        nobody = jnp.where(me < 0, me, num_experts)
        expert, weight, total = each(chosen, (nobody, (me * 0).astype(jnp.float32), jnp.float32(0)))
        is_token = me * 0 < valid[row]
        ids[...] = jnp.where(is_token, expert, nobody)
        weight = jnp.maximum(weight / total if normalize else weight, LEAST_WEIGHT)
        weights[...] = jnp.where(is_token, weight, 0.0)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(ids.at[pl.ds(0, room)], ids_out.at[row])
        plgpu.copy_smem_to_gmem(weights.at[pl.ds(0, room)], weights_out.at[row])
        plgpu.wait_smem_to_gmem(0)

    return route_rows
