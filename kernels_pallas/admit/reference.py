"""Admission in plain JAX. Any backend.

Ranks are found by comparing all with all instead of sorting: a layer has at most a few hundred slots, and XLA makes a
few small kernels of it where a sort is a dozen.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from kernels_pallas.admit.result import NONE, Admitted

NEVER, FIRST = jnp.iinfo(jnp.int32).max, jnp.iinfo(jnp.int32).min  # evicted never, and before all others


def rank_of(keys: Int[Array, " n"]) -> Int[Array, " n"]:
    """Position of each element in the stable ascending order: argsort(argsort(keys))."""
    at = jnp.arange(keys.shape[0])
    before = (keys[None, :] < keys[:, None]) | ((keys[None, :] == keys[:, None]) & (at[None, :] < at[:, None]))
    return jnp.sum(before, axis=1, dtype=jnp.int32)


def count_before(flags: Bool[Array, " n"]) -> Int[Array, " n"]:
    """How many flags are set before each place: cumsum(flags) - flags."""
    at = jnp.arange(flags.shape[0])
    return jnp.sum(flags[None, :] & (at[None, :] < at[:, None]), axis=1, dtype=jnp.int32)


def select(choose: Bool[Array, "n m"], values: Int[Array, " m"]) -> Int[Array, " n"]:
    """The value that each row chooses; 0 for a row that chooses none. Rows choose one at most."""
    return jnp.sum(jnp.where(choose, values[None, :], 0), axis=1, dtype=jnp.int32)


def compact(flags: Bool[Array, " n"], size: int) -> Int[Array, " m"]:
    """Places of the set flags, ascending; `size` entries, 0 where no flag is left. nonzero(flags, size=size)."""
    entries, places = jnp.arange(size)[:, None], jnp.arange(flags.shape[0], dtype=jnp.int32)
    return select(flags[None, :] & (count_before(flags)[None, :] == entries), places)


def admit(expert_ids, combine_weights, used, value, slot_of, owner) -> Admitted:
    needed = used > 0
    num_groups, before = min(expert_ids.size, slot_of.size), slot_of
    empty = jnp.zeros((0,), jnp.int32)
    plan = empty, empty, jnp.zeros((), jnp.int32)
    if value is not None:
        slot_of, owner, *plan = admit_needed(needed, value, slot_of, owner, num_groups)
    group_experts, group_weights = group(expert_ids, combine_weights, needed, num_groups)
    at = jnp.maximum(group_experts, 0)
    fetched = (group_experts != NONE) & (before[at] == NONE) & (slot_of[at] != NONE)
    return Admitted(
        group_experts=group_experts,
        group_slots=jnp.maximum(slot_of[at], 0),
        group_weights=group_weights,
        group_fetched=fetched.astype(jnp.int32),
        slot_of=slot_of,
        owner=owner,
        plan_experts=plan[0],
        plan_slots=plan[1],
        count=plan[2],
        num_used=jnp.sum(needed, dtype=jnp.int32),
        num_hits=jnp.sum(needed & (before != NONE), dtype=jnp.int32),
    )


def group(expert_ids, combine_weights, needed: Bool[Array, " E"], num_groups: int):
    """The needed experts, ascending, then NONE; and each one's weight for every row, [G, T]."""
    experts = jnp.arange(needed.shape[0], dtype=jnp.int32)
    mine = needed[None, :] & (count_before(needed)[None, :] == jnp.arange(num_groups)[:, None])  # [G, E]
    group_experts = select(mine, experts + 1) - 1  # NONE where no expert is left
    routed = expert_ids[None] == group_experts[:, None, None]  # [G, T, A]
    return group_experts, jnp.sum(jnp.where(routed, combine_weights[None], 0.0), axis=-1)


def admit_needed(needed: Bool[Array, " E"], value, slot_of, owner, max_needed: int):
    """(slot_of, owner) afterwards, and the plan: experts, their slots, how many."""
    num_slots, num_experts = owner.shape[0], slot_of.shape[0]
    resident, here = slot_of != NONE, jnp.maximum(owner, 0)
    missing = needed & ~resident  # [E]
    in_use = (owner != NONE) & needed[here]  # [S]
    kept_value = jnp.where(owner == NONE, FIRST, value[here])
    victim_rank = rank_of(jnp.where(in_use, NEVER, kept_value))  # [S]
    order = rank_of(jnp.where(missing, ~value, NEVER))  # [E] place in the plan; ~: the most valuable first
    gets = missing[None, :] & (order[None, :] == victim_rank[:, None])  # [S, E] slot gets expert
    admitted, taken = missing, victim_rank < jnp.sum(missing)
    if max_needed > num_slots:
        is_worth = (value[None, :] > kept_value[:, None]) & ~in_use[:, None]
        gets &= is_worth | (jnp.sum(needed) <= num_slots)
        admitted, taken = jnp.any(gets, axis=0), jnp.any(gets, axis=1)

    experts, slots = jnp.arange(num_experts, dtype=jnp.int32), jnp.arange(num_slots, dtype=jnp.int32)
    evicted = resident & taken[jnp.maximum(slot_of, 0)]
    entries = jnp.arange(min(max_needed, num_slots))[:, None]
    return (
        jnp.where(admitted, select(gets.T, slots), jnp.where(evicted, NONE, slot_of)),
        jnp.where(taken, select(gets, experts), owner),
        select(admitted[None, :] & (order[None, :] == entries), experts),
        select(taken[None, :] & (victim_rank[None, :] == entries), slots),
        jnp.sum(admitted, dtype=jnp.int32),
    )
