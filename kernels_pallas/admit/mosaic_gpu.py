"""Admission as one Mosaic GPU kernel of one warpgroup, in place of a dozen small ones.

Bound by latency: there are a few hundred integers. They lie in shared memory as the rows of a table, and a thread
stands for one expert, slot, candidate, group and entry of the plan (for two of each where there are more than 128).
What it has to know of the others it adds up over the columns of the table, which is how `reference` compares all with
all. Candidates to be admitted are the choices, each expert once, or all experts where choices are many: few choices
are few columns. The residency changes in place.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.admit.reference import FIRST, NEVER
from kernels_pallas.admit.result import NONE, Admitted

WARPGROUP, WARP = 128, 32  # threads
MOST = 256  # of experts, and of choices: the most elements of one dimension of a TMA box
COPIED = 4  # elements: TMA copies 16 bytes at least, and a thread loads as many at once
COLUMNS = 32  # the most that one stretch of code adds up
NOBODY = -2  # equals neither an expert nor a slot nor NONE

# Rows of the table, each of one number for each thread: of experts, of slots, of candidates.
VALUE, SLOT_OF, OWNER, VICTIM, RANK, EXPERT, HELD, KEY, PLACE, ORDER, TAKEN, NUM_ROWS = range(12)
NUM_RESULTS = 9  # of integers, each as long: three of the groups, two of the plan, two of the residency, two counts

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
    groups, entries, threads = _whole(num_groups), _whole(num_entries), -(-num_experts // WARPGROUP) * WARPGROUP
    num_ids = _whole(expert_ids.size)
    sizes = 1, 1, groups, groups, groups, *((entries, entries) if admits else ())
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
    state = [_filled(row, NONE) for row in (slot_of, owner)]
    if admits:
        state = [jax.new_ref(row) for row in state]
    inputs = (*state, _filled(value, 0)) if admits else state[:1]
    weights, count, hits, *rows = kernel(ids, weights.astype(jnp.float32), *inputs)
    if admits:
        state = [jax.freeze(row) for row in state]
    group_experts, group_slots, group_fetched, *plan = rows
    plan = plan or [jnp.zeros((0,), jnp.int32)] * 2
    return Admitted(
        group_experts[:num_groups],
        group_slots[:num_groups],
        weights[:, :num_groups].T,
        group_fetched[:num_groups],
        state[0][:num_experts],
        state[1][:num_slots],
        plan[0][:num_entries],
        plan[1][:num_entries],
        count[0],
        hits[0],
    )


def _whole(size: int, unit: int = COPIED) -> int:
    return -(-size // unit) * unit


def _filled(row, value):
    """As long as can be copied: for most models and slots nothing is to be done."""
    return jnp.pad(row.astype(row.dtype), (0, _whole(row.size) - row.size), constant_values=value)


def _kernel(choices: tuple[int, int], num_experts: int, num_slots: int, threads: int, admits: bool):
    """The kernel body; see the module's docstring."""

    def admit_layer(ids, weights, *refs):
        # ids, weights [T*A]; slot_of [E] and, if it admits, owner [S], value [E]; outputs; then shared memory
        rows_in, refs = (refs[:3], refs[3:]) if admits else (refs[:1], refs[1:])
        weights_out, count_out, hits_out, *rows_out, table, ids_here, weights_here, results, sums, arrived = refs
        for source, place in zip(rows_in, (SLOT_OF, OWNER, VALUE)):
            plgpu.copy_gmem_to_smem(source, table.at[place, pl.ds(0, source.shape[0])], arrived)
        plgpu.copy_gmem_to_smem(ids, ids_here.at[pl.ds(0, ids.shape[0])], arrived)
        plgpu.copy_gmem_to_smem(weights, weights_here, arrived)
        plgpu.barrier_wait(arrived)

        look = _Looking(table, threads)
        size = _put_candidates(look, ids_here, ids.shape[0], num_experts)
        max_needed = min(math.prod(choices), num_experts)
        owner = _admit(look, size, num_experts, num_slots, max_needed) if admits else _keep(look, size)
        found = _lists(look, size, num_experts, admits)
        for n, row in enumerate((*found[:-2], *([owner] if admits else []), *found[-2:])):
            results[n] = row
        for t in range(choices[0]):
            sums[t] = _weights(look, found[0], ids_here, weights_here, t, choices[1])
        plgpu.commit_smem()

        rows_out = (*rows_out, *rows_in[:2]) if admits else rows_out
        for n, out in enumerate(rows_out):
            plgpu.copy_smem_to_gmem(results.at[n, pl.ds(0, out.shape[0])], out)
        for t in range(choices[0]):
            plgpu.copy_smem_to_gmem(sums.at[t, pl.ds(0, weights_out.shape[1])], weights_out.at[t])
        count_out[0], hits_out[0] = results[len(rows_out), 0], results[len(rows_out) + 1, 0]
        plgpu.wait_smem_to_gmem(0)

    return admit_layer


def _layout(width: int):
    """Of [threads, width]: a thread has a row (two of 256), and loads up to four neighbouring columns at once."""
    vector = math.gcd(width, COPIED)
    tiling = plgpu.Tiling(((WARPGROUP, vector), (WARP, vector)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-4,), lane_dims=(-2,), vector_dim=-1)


@dataclasses.dataclass(frozen=True)
class _Pairs:
    """Each thread with each of some columns: what it makes is [threads, width]."""

    table: Any
    threads: int
    start: Any
    width: int

    def mine(self, row):
        """A number of each thread."""
        return self._spread(row, 0)

    def other(self, place: int):
        """Each column's number in a row of the table."""
        return self.of(self.table.at[place])

    def of(self, row):
        """The same of a row in shared memory."""
        layout = _layout(self.width).reduce((0,))
        return self._spread(plgpu.load(row.at[pl.ds(self.start, self.width)], layout=layout), 1)

    @property
    def before(self):
        """Whether the column is before the thread's own."""
        me = plgpu.broadcasted_iota(jnp.int32, (self.threads, self.width), 0, layout=_layout(self.width))
        return self.number < me

    @property
    def number(self):
        """Each column's own number."""
        shape, layout = (self.threads, self.width), _layout(self.width)
        return self.start + plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=layout)

    def _spread(self, row, dimension: int):
        pairs = lax.broadcast_in_dim(row, (self.threads, self.width), (dimension,))
        return plgpu.layout_cast(pairs, _layout(self.width))


class _Looking:
    """The table from inside the kernel: whole rows for all threads, and what each adds up of the columns."""

    def __init__(self, table, threads: int):
        self.table, self.threads, self.layout = table, threads, _layout(COPIED).reduce((1,))
        self.me = plgpu.broadcasted_iota(jnp.int32, (threads,), 0, layout=self.layout)

    def row(self, place: int):
        return plgpu.load(self.table.at[place], layout=self.layout)

    def put(self, rows: dict) -> None:
        for place, row in rows.items():
            self.table[place] = row
        plgpu.commit_smem()

    def sums(self, size: int, terms):
        """For each thread the sums, over so many columns, of each of `terms(pairs)`."""
        width = size if size <= COLUMNS else math.gcd(size, COLUMNS)

        def part(n):
            pairs = _Pairs(self.table, self.threads, n * width, width)
            return tuple(jnp.sum(term.astype(jnp.int32), axis=1) for term in terms(pairs))

        def add(n, totals):
            return tuple(total + more for total, more in zip(totals, part(n)))

        return part(0) if size == width else lax.fori_loop(1, size // width, add, part(0))


def _columns(size: int) -> int:
    """How many columns of the table are looked at for so many: beyond are some that count for nothing."""
    return _whole(size, COPIED if size <= COLUMNS else COLUMNS)


def _put_candidates(look: _Looking, ids, num_ids: int, num_experts: int) -> int:
    """Puts candidates and the slots that hold them into the table; how many columns they are.

    E stands for what is no candidate: a choice of an expert that is one already, an expert that is not used.
    """
    if 2 * num_ids > num_experts:
        (uses,) = look.sums(num_ids, lambda pairs: (pairs.of(ids) == pairs.mine(look.me),))
        expert = jnp.where((uses > 0) & (look.me < num_experts), look.me, num_experts)
        held, value, size = look.row(SLOT_OF), look.row(VALUE), _columns(num_experts)
    else:
        chosen, size = plgpu.load(ids.at[pl.ds(0, look.threads)], layout=look.layout), num_ids
        (twice,) = look.sums(num_ids, lambda pairs: ((pairs.of(ids) == pairs.mine(chosen)) & pairs.before,))
        expert = jnp.where((twice == 0) & (look.me < num_ids), chosen, num_experts)
        held, value = _of_choices(look, ids, num_ids, num_experts)
    missing = (expert < num_experts) & (held == NONE)
    look.put({EXPERT: expert, HELD: held, KEY: jnp.where(missing, -1 - value, NEVER)})  # the most valuable come first
    return size


def _of_choices(look: _Looking, ids, num_ids: int, num_experts: int):
    """The slot and the value of each choice's expert."""

    def choice(j, rows):
        expert = jnp.minimum(ids[j], num_experts - 1)
        return tuple(jnp.where(look.me == j, look.table[n, expert], row) for n, row in zip((SLOT_OF, VALUE), rows))

    return lax.fori_loop(0, num_ids, choice, (look.me, look.me), unroll=COPIED)


def _keep(look: _Looking, size: int) -> None:
    expert = look.row(EXPERT)
    (place,) = look.sums(size, lambda pairs: (pairs.other(EXPERT) < pairs.mine(expert),))
    look.put({PLACE: place, ORDER: look.me * 0 + NOBODY, TAKEN: look.me * 0 + NONE})


def _admit(look: _Looking, size: int, num_experts: int, num_slots: int, max_needed: int):
    """`owner` afterwards; puts each candidate's place among the groups and in the plan, and its new slot, if any."""
    me, owner, expert, key = look.me, look.row(OWNER), look.row(EXPERT), look.row(KEY)
    (value,) = look.sums(
        _columns(num_experts), lambda pairs: (jnp.where(pairs.number == pairs.mine(owner), pairs.other(VALUE), 0),)
    )

    def candidates(pairs: _Pairs):
        other, others_key, mine = pairs.other(EXPERT), pairs.other(KEY), pairs.mine(expert)
        comes_before = _is_before(others_key, other, pairs.mine(key), mine)
        return other < mine, comes_before, other == pairs.mine(owner), other < num_experts

    place, order, in_use, num_needed = look.sums(size, candidates)
    order = jnp.where(key == NEVER, NOBODY, order)
    kept_value = jnp.where(owner == NONE, FIRST, value)
    victim = jnp.where((in_use > 0) | (me >= num_slots), NEVER, kept_value)
    look.put({PLACE: place, ORDER: order, VICTIM: victim})

    (rank,) = look.sums(
        _columns(num_slots),
        lambda pairs: (_is_before(pairs.other(VICTIM), pairs.number, pairs.mine(victim), pairs.mine(me)),),
    )
    rank = jnp.where(me < num_slots, rank, NONE)

    def comers(pairs: _Pairs):
        gets = pairs.other(ORDER) == pairs.mine(rank)
        return jnp.where(gets, pairs.other(EXPERT) + 1, 0), jnp.where(gets, pairs.other(KEY), 0)

    comer, comers_key = look.sums(size, comers)
    taken = comer > 0
    if max_needed > num_slots:
        is_worth = (comers_key < -1 - kept_value) & (in_use == 0)
        taken &= is_worth | (num_needed <= num_slots)
    look.put({RANK: jnp.where(taken, rank, NONE)})

    (slot,) = look.sums(
        _columns(num_slots), lambda pairs: (jnp.where(pairs.other(RANK) == pairs.mine(order), pairs.number + 1, 0),)
    )
    look.put({TAKEN: slot - 1})
    return jnp.where(taken, comer - 1, owner)


def _is_before(key, number, than, thans_number):
    return (key < than) | ((key == than) & (number < thans_number))


def _lists(look: _Looking, size: int, num_experts: int, admits: bool) -> list:
    """Groups' experts, slots and whether they are fetched; the plan's experts and slots, `slot_of`; the two counts."""
    slot_of = look.row(SLOT_OF)

    def groups(pairs: _Pairs):
        expert, taken, held = (pairs.other(place) for place in (EXPERT, TAKEN, HELD))
        asked, fetched = expert < num_experts, taken != NONE
        mine = asked & (pairs.other(PLACE) == pairs.mine(look.me))
        slot = jnp.where(mine, jnp.maximum(jnp.maximum(taken, held), 0), 0)
        return jnp.where(mine, expert + 1, 0), slot, mine & fetched, fetched, asked & (held != NONE)

    def plan(pairs: _Pairs):
        expert, taken = pairs.other(EXPERT), pairs.other(TAKEN)
        mine = (taken != NONE) & (pairs.other(ORDER) == pairs.mine(look.me))
        comes = jnp.where(expert == pairs.mine(look.me), taken + 1, 0)
        return jnp.where(mine, expert, 0), jnp.where(mine, taken, 0), comes, taken == pairs.mine(slot_of)

    expert, slot, fetched, *counts = look.sums(size, groups)
    found = [expert - 1, slot, fetched]
    if admits:
        *rows, new_slot, evicted = look.sums(size, plan)
        kept = jnp.where(evicted > 0, NONE, slot_of)
        found += [*rows, jnp.where(new_slot > 0, new_slot - 1, kept)]
    return found + counts


def _weights(look: _Looking, group_expert, ids, weights, row, num_chosen: int):
    """What each group's expert weighs for a row."""
    pairs = _Pairs(look.table, look.threads, row * num_chosen, num_chosen)
    return jnp.sum(jnp.where(pairs.of(ids) == pairs.mine(group_expert), pairs.of(weights), 0.0), axis=1)
