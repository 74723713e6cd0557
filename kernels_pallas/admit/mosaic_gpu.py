"""Admission as one Mosaic GPU kernel of one warpgroup, in place of a dozen small ones.

Bound by latency: there are a few hundred integers. They lie in shared memory as the rows of a table, and a thread
stands for one expert, slot, group or entry of the plan (for two of them where there are more than 128). What it has to
know of the others it learns by looking at each in turn, which is how `reference` compares all with all. The residency
changes in place.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.admit.reference import FIRST, NEVER
from kernels_pallas.admit.result import NONE, Admitted

WARPGROUP = 128  # threads
MOST = 256  # of experts, and of choices: the most elements of one dimension of a TMA box
COPIED = 4  # elements: TMA copies 16 bytes at least
UNROLL = 8  # of those that are looked at: their loads are on their way together
NOBODY = -2  # equals neither an expert nor a slot nor NONE

# Rows of the table, each of one number for each thread.
USED, VALUE, SLOT_OF, OWNER, ORDER, VICTIM, RANK, NEW_SLOT, PLACE, GROUP, NUM_ROWS = range(11)
NUM_RESULTS = 7  # of integers, each as long: three of the groups, two of the plan, two of the residency


def problem(expert_ids, slot_of) -> str | None:
    """Why these shapes cannot be done, or None. Takes anything that has their shape."""
    if slot_of.shape[0] > MOST or expert_ids.size > MOST:
        return f"{slot_of.shape[0]} experts and {expert_ids.size} choices are not both at most {MOST}"
    return None


@functools.partial(jax.jit, static_argnames="interpret")  # the layers of a model share one compilation
def admit(expert_ids, combine_weights, used, value, slot_of, owner, *, interpret=None):
    """Raises NotImplementedError where `problem` has an answer."""
    if why := problem(expert_ids, slot_of):
        raise NotImplementedError(f"admit: mosaic_gpu cannot do this: {why}; use implementation='reference'")
    num_experts, num_slots, admits = slot_of.size, owner.size, value is not None
    num_groups = min(expert_ids.size, num_experts)
    num_entries = min(num_groups, num_slots) if admits else 1
    groups, entries, threads = _whole(num_groups), _whole(num_entries), -(-num_experts // WARPGROUP) * WARPGROUP
    sizes = 1, 1, groups, groups, groups, entries, entries
    kernel = plgpu.kernel(
        _kernel(expert_ids.shape, num_experts, num_slots, threads, admits),
        out_type=(
            jax.ShapeDtypeStruct((expert_ids.shape[0], groups), jnp.float32),
            *(jax.ShapeDtypeStruct((size,), jnp.int32) for size in sizes),
        ),
        grid=(1,),
        grid_names=("block",),
        scratch_types=[
            plgpu.SMEM((NUM_ROWS, threads), jnp.int32),
            plgpu.SMEM((_whole(expert_ids.size),), jnp.int32),
            plgpu.SMEM((_whole(expert_ids.size),), jnp.float32),
            plgpu.SMEM((NUM_RESULTS, threads), jnp.int32),
            plgpu.SMEM((expert_ids.shape[0], threads), jnp.float32),
            plgpu.Barrier(num_arrivals=6),
        ],
        interpret=interpret,
    )
    slot_of, owner = (_filled(row, NONE) for row in (slot_of, owner))
    refs = [jax.new_ref(slot_of), jax.new_ref(owner)] if admits else []
    weights, count, hits, group_experts, group_slots, group_fetched, *plan = kernel(
        _filled(expert_ids.reshape(-1), num_experts),
        _filled(combine_weights.astype(jnp.float32).reshape(-1), 0),
        *(_filled(row, 0) for row in (used, used if value is None else value)),
        *(refs or (slot_of, owner)),
    )
    slot_of, owner = map(jax.freeze, refs) if refs else (slot_of, owner)
    num_entries = num_entries if admits else 0
    return Admitted(
        group_experts[:num_groups],
        group_slots[:num_groups],
        weights[:, :num_groups].T,
        group_fetched[:num_groups],
        slot_of[:num_experts],
        owner[:num_slots],
        plan[0][:num_entries],
        plan[1][:num_entries],
        count[0],
        hits[0],
    )


def _whole(size: int) -> int:
    return -(-size // COPIED) * COPIED


def _filled(row, value):
    """As long as can be copied: for most models and slots nothing is to be done."""
    return jnp.pad(row.astype(row.dtype), (0, _whole(row.size) - row.size), constant_values=value)


def _kernel(choices: tuple[int, int], num_experts: int, num_slots: int, threads: int, admits: bool):
    """The kernel body; see the module's docstring."""
    layout = plgpu.Layout.WG_STRIDED((threads,), threads // WARPGROUP)

    def admit_layer(ids, weights, used, value, slot_of, owner, *refs):
        # ids, weights [T*A]; used, value, slot_of [E]; owner [S]; outputs; then shared memory
        weights_out, count_out, hits_out, *outs, table, ids_here, weights_here, results, sums, arrived = refs
        for source, place in ((used, USED), (value, VALUE), (slot_of, SLOT_OF), (owner, OWNER)):
            plgpu.copy_gmem_to_smem(source, table.at[place, pl.ds(0, source.shape[0])], arrived)
        plgpu.copy_gmem_to_smem(ids, ids_here, arrived)
        plgpu.copy_gmem_to_smem(weights, weights_here, arrived)
        plgpu.barrier_wait(arrived)

        look = _Looking(table, layout, threads)
        state = _admit(look, num_experts, num_slots) if admits else _keep(look)
        groups, plan, count_out[0] = _lists(look, state[0], num_experts)
        hits_out[0] = _num_hits(table, num_experts)
        for n, row in enumerate((*groups, *plan, *state)):
            results[n] = row
        for t, row in enumerate(_weights(groups[0], ids_here, weights_here, choices)):
            sums[t] = row
        plgpu.commit_smem()
        for n, out in enumerate((*outs, slot_of, owner) if admits else outs):
            plgpu.copy_smem_to_gmem(results.at[n, pl.ds(0, out.shape[0])], out)
        for t in range(choices[0]):
            plgpu.copy_smem_to_gmem(sums.at[t, pl.ds(0, weights_out.shape[1])], weights_out.at[t])
        plgpu.wait_smem_to_gmem(0)

    return admit_layer


class _Looking:
    """The table from inside the kernel: whole rows for all threads, and one entry after another."""

    def __init__(self, table, layout, threads: int):
        self.table, self.layout = table, layout
        self.me = plgpu.broadcasted_iota(jnp.int32, (threads,), 0, layout=layout)

    def row(self, place: int):
        return plgpu.load(self.table.at[place], layout=self.layout)

    def put(self, place: int, row) -> None:
        self.table[place] = row
        plgpu.commit_smem()

    def each(self, size: int, step, *start):
        """What `step(j, *numbers)` makes of numbers for every thread, with j from 0 to size - 1.

        A number that starts as an array is the same for all threads.
        """
        carry = tuple(jnp.where(self.me < 0, self.me, n) if isinstance(n, int) else n for n in start)
        return lax.fori_loop(0, size, lambda j, carry: step(j, *carry), carry, unroll=math.gcd(size, UNROLL))


def _admit(look: _Looking, num_experts: int, num_slots: int):
    """`slot_of` and `owner` afterwards; leaves each admitted expert's place in the plan in the table."""
    table, me = look.table, look.me
    slot_of, owner, value = look.row(SLOT_OF), look.row(OWNER), look.row(VALUE)
    key = _admission_key(look.row(USED), slot_of, value)

    def expert(j, order, kept_value, in_use, num_needed):
        used, value = table[USED, j], table[VALUE, j]
        other = _admission_key(used, table[SLOT_OF, j], value)
        needed = (used > 0).astype(jnp.int32)
        order += ((other < key) | ((other == key) & (j < me))).astype(jnp.int32)
        kept_value = jnp.where(owner == j, value, kept_value)
        return order, kept_value, jnp.where(owner == j, needed, in_use), num_needed + needed

    order, kept_value, in_use, num_needed = look.each(num_experts, expert, 0, FIRST, 0, 0)
    order = jnp.where(key == NEVER, NOBODY, order)
    victim = jnp.where(in_use > 0, NEVER, kept_value)
    look.put(ORDER, order)
    look.put(VICTIM, victim)

    def slot(j, rank):
        other = table[VICTIM, j]
        return (rank + ((other < victim) | ((other == victim) & (j < me))).astype(jnp.int32),)

    (rank,) = look.each(num_slots, slot, 0)

    def candidate(j, comer, worth):
        gets = table[ORDER, j] == rank
        return jnp.where(gets, j, comer), jnp.where(gets, table[VALUE, j], worth)

    comer, worth = look.each(num_experts, candidate, NONE, FIRST)
    is_worth = ((worth > kept_value) & (in_use == 0)) | (num_needed <= num_slots)
    taken = (comer != NONE) & is_worth
    look.put(RANK, jnp.where(taken, rank, NONE))

    def place(j, mine, evicted):
        rank = table[RANK, j]
        gone = (slot_of == j) & (rank != NONE)
        return jnp.where(order == rank, j, mine), jnp.where(gone, 1, evicted)

    mine, evicted = look.each(num_slots, place, NONE, 0)
    look.put(PLACE, jnp.where(mine == NONE, NOBODY, order))
    kept = jnp.where(evicted > 0, NONE, slot_of)
    return jnp.where(mine == NONE, kept, mine), jnp.where(taken, comer, owner)


def _admission_key(used, slot_of, value):
    """Ascending in the order of the plan: the most valuable first, NEVER for what is not missing."""
    return jnp.where((used > 0) & (slot_of == NONE), -1 - value, NEVER)


def _keep(look: _Looking):
    look.put(PLACE, jnp.where(look.me < 0, look.me, NOBODY))
    return look.row(SLOT_OF), look.row(OWNER)


def _lists(look: _Looking, slot_of, num_experts: int):
    """The groups' experts, slots and whether they are fetched; the plan's experts and slots; how many."""
    table, me = look.table, look.me

    def before(j, count):
        return (count + ((table[USED, j] > 0) & (j < me)).astype(jnp.int32),)

    (rank,) = look.each(num_experts, before, 0)
    look.put(GROUP, jnp.where(look.row(USED) > 0, rank, NOBODY))
    look.put(NEW_SLOT, jnp.where(slot_of == NONE, 0, slot_of))

    def expert(j, group_expert, group_slot, group_fetched, plan_expert, plan_slot, count):
        in_group, in_plan, slot = table[GROUP, j] == me, table[PLACE, j] == me, table[NEW_SLOT, j]
        fetched = (table[PLACE, j] >= 0).astype(jnp.int32)
        return (
            jnp.where(in_group, j, group_expert),
            jnp.where(in_group, slot, group_slot),
            jnp.where(in_group, fetched, group_fetched),
            jnp.where(in_plan, j, plan_expert),
            jnp.where(in_plan, slot, plan_slot),
            count + fetched,
        )

    *found, count = look.each(num_experts, expert, NONE, 0, 0, 0, 0, jnp.int32(0))
    return found[:3], found[3:], count


def _num_hits(table, num_experts: int):
    def expert(j, count):
        return count + ((table[USED, j] > 0) & (table[SLOT_OF, j] != NONE)).astype(jnp.int32)

    return lax.fori_loop(0, num_experts, expert, jnp.int32(0), unroll=math.gcd(num_experts, UNROLL))


def _weights(group_expert, ids, weights, choices: tuple[int, int]):
    """What each group's expert weighs for each of the rows."""
    nothing = group_expert.astype(jnp.float32) * 0
    for row in range(choices[0]):
        total = nothing
        for choice in range(row * choices[1], (row + 1) * choices[1]):
            total += jnp.where(ids[choice] == group_expert, weights[choice], nothing)
        yield total
