"""Admission as one Mosaic GPU kernel of one warpgroup, in place of a dozen small ones.

Bound by latency: there are a few hundred integers. They lie in shared memory as the rows of a table, and threads stand
for experts, slots, candidates, groups and entries of the plan. What these have to know of each other they add up over
the columns of the table, which is how `reference` compares all with all. Candidates are the choices, each expert at its
first one, or all experts where choices are many: so few choices are few columns. The residency changes in place.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import clock
from kernels_pallas.admit.pairs import VECTOR, WARPGROUP, Pairs, Things, columns_of, put, whole
from kernels_pallas.admit.reference import FIRST, NEVER
from kernels_pallas.admit.result import NONE, Admitted

MOST = 256  # of experts, and of choices: the most elements of one dimension of a TMA box
COPIED = VECTOR  # elements: TMA copies 16 bytes at least
NOBODY = -2  # equals neither an expert nor a slot nor NONE

# Rows of the table: of experts, of slots, of candidates.
VALUE, SLOT_OF, OWNER, VICTIM, RANK, EXPERT, HELD, KEY, PLACE, ORDER, TAKEN, NUM_ROWS = range(12)
NUM_RESULTS = 10  # of integers, each as long: three of the groups, two of the plan, two of the residency, three counts

# Each row is written once, and read after a commit, which is a barrier too.
COMPILER_PARAMS = plgpu.CompilerParams(unsafe_no_auto_barriers=True)


def problem(expert_ids, slot_of) -> str | None:
    """Why these shapes cannot be done, or None. Takes anything that has their shape."""
    if slot_of.shape[0] > MOST or expert_ids.size > MOST:
        return f"{slot_of.shape[0]} experts and {expert_ids.size} choices are not both at most {MOST}"
    return None


@functools.partial(jax.jit, static_argnames="interpret")  # the layers of a model share one compilation
def admit(expert_ids, combine_weights, used, value, slot_of, owner, *, interpret=None):
    """Raises NotImplementedError where `problem` has an answer. What is used it sees from `expert_ids`."""
    if why := problem(expert_ids, slot_of):
        raise NotImplementedError(f"admit: mosaic_gpu cannot do this: {why}; use implementation='reference'")
    num_experts, num_slots, admits = slot_of.size, owner.size, value is not None
    num_groups = min(expert_ids.size, num_experts)
    num_entries = min(num_groups, num_slots) if admits else 0
    groups, entries, threads = whole(num_groups), whole(num_entries), whole(num_experts, WARPGROUP)
    num_ids = whole(expert_ids.size)
    is_timed = not interpret
    sizes = *[1] * (3 + is_timed), groups, groups, groups, *((entries, entries) if admits else ())
    kernel = plgpu.kernel(
        _kernel(expert_ids.shape, num_experts, num_slots, admits, is_timed),
        out_type=(
            jax.ShapeDtypeStruct((expert_ids.shape[0], groups), jnp.float32),
            *(jax.ShapeDtypeStruct((size,), jnp.int32) for size in sizes),
        ),
        grid=(1,),
        grid_names=("block",),
        scratch_types=[
            plgpu.SMEM((NUM_ROWS, threads), jnp.int32),
            plgpu.SMEM((max(num_ids, threads),), jnp.int32),
            plgpu.SMEM((num_ids,), jnp.float32),
            plgpu.SMEM((NUM_RESULTS, threads), jnp.int32),
            plgpu.SMEM((expert_ids.shape[0], threads), jnp.float32),
            plgpu.Barrier(num_arrivals=5 if admits else 3),
        ],
        compiler_params=COMPILER_PARAMS,
        interpret=interpret,
    )
    ids, weights = _filled(expert_ids.reshape(-1), num_experts), _filled(combine_weights.reshape(-1), 0)
    slot_of, owner = (_filled(row, NONE) for row in (slot_of, owner))
    refs = [jax.new_ref(slot_of), jax.new_ref(owner)] if admits else []
    inputs = (*refs, _filled(value, 0)) if admits else (slot_of,)
    weights, count, num_used, hits, *rows = kernel(ids, weights.astype(jnp.float32), *inputs)
    known_at = rows.pop(0)[0] if is_timed else None
    slot_of, owner = map(jax.freeze, refs) if refs else (slot_of, owner)
    group_experts, group_slots, group_fetched, *plan = rows
    plan = plan or [jnp.zeros((0,), jnp.int32)] * 2
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
        num_used[0],
        hits[0],
        known_at,
    )


def _filled(row, value):
    """As long as can be copied: for most models and slots nothing is to be done."""
    return jnp.pad(row.astype(row.dtype), (0, whole(row.size) - row.size), constant_values=value)


def _kernel(choices: tuple[int, int], num_experts: int, num_slots: int, admits: bool, is_timed: bool):
    """The kernel body; see the module's docstring."""
    max_needed = min(math.prod(choices), num_experts)

    def admit_layer(ids, weights, *refs):
        # ids, weights [T*A]; slot_of [E] and, if it admits, owner [S], value [E]; outputs; then shared memory
        rows_in, refs = (refs[:3], refs[3:]) if admits else (refs[:1], refs[1:])
        *out, table, ids_here, weights_here, results, sums, arrived = refs
        weights_out, count_out, used_out, hits_out, *rows_out = out
        known_out = rows_out.pop(0) if is_timed else None
        for source, place in zip(rows_in, (SLOT_OF, OWNER, VALUE), strict=False):
            plgpu.copy_gmem_to_smem(source, table.at[place, pl.ds(0, source.shape[0])], arrived)
        plgpu.copy_gmem_to_smem(ids, ids_here.at[pl.ds(0, ids.shape[0])], arrived)
        plgpu.copy_gmem_to_smem(weights, weights_here, arrived)
        plgpu.barrier_wait(arrived)

        columns = _put_candidates(table, ids_here, ids.shape[0], num_experts)
        owner = _admit(table, columns, num_experts, num_slots, max_needed) if admits else _keep(table, columns)
        groups = Things(table, max_needed)
        *found, count, num_used, hits = _groups(groups, columns, num_experts)
        _put_weights(groups, found[0], ids_here, weights_here, sums, choices)
        if admits:
            found += [*_plan(table, columns, min(max_needed, num_slots)), _slot_of(table, columns, num_experts), owner]
        put(results, dict(enumerate((*found, count, num_used, hits))))

        if known_out is not None:
            known_out[0] = clock.read()
        for n, out in enumerate((*rows_out, *rows_in[:2]) if admits else rows_out):
            plgpu.copy_smem_to_gmem(results.at[n, pl.ds(0, out.shape[0])], out)
        for t in range(choices[0]):
            plgpu.copy_smem_to_gmem(sums.at[t, pl.ds(0, weights_out.shape[1])], weights_out.at[t])
        for n, out in enumerate((count_out, used_out, hits_out)):
            out[0] = results[len(found) + n, 0]
        plgpu.wait_smem_to_gmem(0)

    return admit_layer


def _put_candidates(table, ids, num_ids: int, num_experts: int) -> int:
    """Puts each candidate, the slot that holds it and its key into the table; returns how many columns they have.

    E stands for what is no candidate: a choice of an expert that is one already, an expert that is not used.
    """
    if 2 * num_ids > num_experts:
        look, columns = Things(table, num_experts), columns_of(num_experts)
        (uses,) = look.sums(num_ids, lambda pairs: (pairs.of(ids) == pairs.mine(look.me),))
        expert = jnp.where((uses > 0) & (look.me < num_experts), look.me, num_experts)
        held, value = look.row(SLOT_OF), look.row(VALUE)
    else:
        look, columns = Things(table, num_ids), num_ids
        chosen = look.of(ids)
        (twice,) = look.sums(
            num_ids, lambda pairs: ((pairs.of(ids) == pairs.mine(chosen)) & (pairs.number < pairs.mine(look.me)),)
        )
        expert = jnp.where((twice == 0) & (look.me < num_ids), chosen, num_experts)
        held, value = _of_choices(look, ids, num_ids, num_experts)
    missing = (expert < num_experts) & (held == NONE)
    put(table, {EXPERT: expert, HELD: held, KEY: jnp.where(missing, -1 - value, NEVER)})  # the most valuable come first
    return columns


def _of_choices(look: Things, ids, num_ids: int, num_experts: int):
    """The slot and the value of each choice's expert."""

    def choice(j, rows):
        expert = jnp.minimum(ids[j], num_experts - 1)
        found = look.table[SLOT_OF, expert], look.table[VALUE, expert]
        return tuple(jnp.where(look.me == j, number, row) for number, row in zip(found, rows, strict=True))

    return lax.fori_loop(0, num_ids, choice, (look.me, look.me), unroll=COPIED)


def _keep(table, columns: int) -> None:
    look = Things(table, columns)
    expert, nothing = look.row(EXPERT), look.me * 0
    (place,) = look.sums(columns, lambda pairs: (pairs.other(EXPERT) < pairs.mine(expert),))
    put(table, {PLACE: place, ORDER: nothing + NOBODY, TAKEN: nothing + NONE})


def _admit(table, columns: int, num_experts: int, num_slots: int, max_needed: int):
    """`owner` afterwards; puts each candidate's place among the groups and in the plan, and its new slot, if any."""
    slots, candidates, slot_columns = Things(table, num_slots), Things(table, columns), columns_of(num_slots)
    me, owner = slots.me, slots.row(OWNER)
    place, order = _places(candidates, columns)
    (value,) = slots.sums(
        columns_of(num_experts), lambda pairs: (jnp.where(pairs.number == pairs.mine(owner), pairs.other(VALUE), 0),)
    )
    in_use, num_needed = slots.sums(
        columns, lambda pairs: (pairs.other(EXPERT) == pairs.mine(owner), pairs.other(EXPERT) < num_experts)
    )
    kept_value = jnp.where(owner == NONE, FIRST, value)
    victim = jnp.where((in_use > 0) | (me >= num_slots), NEVER, kept_value)
    put(table, {PLACE: place, ORDER: order, VICTIM: victim})

    (rank,) = slots.sums(
        slot_columns,
        lambda pairs: (_is_before(pairs.other(VICTIM), pairs.number, pairs.mine(victim), pairs.mine(me)),),
    )
    rank = jnp.where(me < num_slots, rank, NONE)

    def comers(pairs: Pairs):
        gets = pairs.other(ORDER) == pairs.mine(rank)
        return jnp.where(gets, pairs.other(EXPERT) + 1, 0), jnp.where(gets, pairs.other(KEY), 0)

    comer, key = slots.sums(columns, comers)
    taken = comer > 0
    if max_needed > num_slots:
        taken &= ((key < -1 - kept_value) & (in_use == 0)) | (num_needed <= num_slots)
    put(table, {RANK: jnp.where(taken, rank, NONE)})

    (slot,) = candidates.sums(
        slot_columns, lambda pairs: (jnp.where(pairs.other(RANK) == pairs.mine(order), pairs.number + 1, 0),)
    )
    put(table, {TAKEN: slot - 1})
    return jnp.where(taken, comer - 1, owner)


def _places(candidates: Things, columns: int) -> tuple:
    """Each one's place among the groups, and in the order in which what is missing comes."""
    expert, key = candidates.row(EXPERT), candidates.row(KEY)

    def before(pairs: Pairs):
        other, mine = pairs.other(EXPERT), pairs.mine(expert)
        return other < mine, _is_before(pairs.other(KEY), other, pairs.mine(key), mine)

    place, order = candidates.sums(columns, before)
    return place, jnp.where(key == NEVER, NOBODY, order)


def _is_before(key, number, than, thans_number):
    return (key < than) | ((key == than) & (number < thans_number))


def _groups(look: Things, columns: int, num_experts: int) -> tuple:
    """Their experts, slots and whether they are fetched; how many are, how many are used, and were there before."""

    def group(pairs: Pairs):
        expert, taken, held = (pairs.other(place) for place in (EXPERT, TAKEN, HELD))
        used, fetched = expert < num_experts, taken != NONE
        mine = used & (pairs.other(PLACE) == pairs.mine(look.me))
        slot = jnp.where(mine, jnp.maximum(jnp.maximum(taken, held), 0), 0)
        return jnp.where(mine, expert + 1, 0), slot, mine & fetched, fetched, used, used & (held != NONE)

    expert, *others = look.sums(columns, group)
    return expert - 1, *others


def _plan(table, columns: int, size: int) -> tuple:
    """Its experts and their slots."""
    look = Things(table, size)

    def entry(pairs: Pairs):
        taken = pairs.other(TAKEN)
        mine = (taken != NONE) & (pairs.other(ORDER) == pairs.mine(look.me))
        return jnp.where(mine, pairs.other(EXPERT), 0), jnp.where(mine, taken, 0)

    return look.sums(columns, entry)


def _slot_of(table, columns: int, num_experts: int):
    """`slot_of` afterwards."""
    look = Things(table, num_experts)
    before = look.row(SLOT_OF)

    def slot(pairs: Pairs):
        taken = pairs.other(TAKEN)
        return jnp.where(pairs.other(EXPERT) == pairs.mine(look.me), taken + 1, 0), taken == pairs.mine(before)

    comes, evicted = look.sums(columns, slot)
    return jnp.where(comes > 0, comes - 1, jnp.where(evicted > 0, NONE, before))


def _put_weights(groups: Things, group_expert, ids, weights, sums, choices: tuple[int, int]) -> None:
    """What each group's expert weighs for each of the rows; commits later."""
    width = choices[1] if choices[0] > 1 else weights.shape[0]

    def weight(row):
        if width == 1:
            return jnp.where(group_expert == ids[row], weights[row], 0.0)
        pairs = groups.pairs(row * width, width)
        return jnp.sum(jnp.where(pairs.of(ids) == pairs.mine(group_expert), pairs.of(weights), 0.0), axis=1)

    def weigh(row, _):
        sums[row, pl.ds(0, groups.count)] = weight(row)

    if choices[0] == 1:
        weigh(0, None)
    else:
        lax.fori_loop(0, choices[0], weigh, None)
