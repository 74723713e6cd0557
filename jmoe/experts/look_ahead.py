"""What is brought early: the beginnings of the experts that the next layer's router will most probably ask for.

The guess (`jmoe.experts.prefetch`) is made while the experts of a layer are on their way, and brought while the
attention of the next one runs and the link has nothing else to do. It only brings weights; the true router decides
what is computed.
"""

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jmoe.experts.residency import NONE, Residency
from jmoe.experts.slots import SlotLayout
from jmoe.model.router import Routing
from kernels_pallas.prefetch.arrivals import Arrivals, share_out


class Foresight(Protocol):
    """Whoever says what comes next: a pytree, since it goes through jitted steps. See `jmoe.experts.prefetch`.

    `residency` is that of the steps before this one.
    """

    def odds(
        self, layer: int, residual: Float[Array, "T D"], routing: Routing, residency: Residency
    ) -> Float[Array, " E"]:
        """How likely each expert of layer `layer + 1` is asked for, 0 if never, once `layer` has routed."""
        ...

    def odds_at_start(self, residency: Residency) -> Float[Array, " E"] | None:
        """The same of layer 0, when a step begins. None, as by default, if nothing is known of it."""
        return None


@dataclasses.dataclass(frozen=True)
class Prefetch:
    """`num_rows` rows of D values (3F an expert) for each layer that `predictor` knows of: its most probable experts.

    They are at most `num_experts`, at least num_rows / 3F: the first comes whole before the next begins. The rows of a
    step make `num_choices` of experts in a layer. Both are static.
    """

    num_experts: int
    num_rows: Int[Array, ""]
    predictor: Foresight
    num_choices: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prefetched:
    """Rows of D values that came before a router had asked, one count a layer: of experts that it then did, or not.

    `late` are those of the useful ones that were still on their way when the layer's demand was known, and so were
    waited for; `untimed` those of which nobody knows, since there is no clock: all of them, or none.
    """

    useful: Int[Array, " L"]
    wasted: Int[Array, " L"]
    late: Int[Array, " L"]
    untimed: Int[Array, " L"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Guess:
    """The most probable experts of a layer that are not resident, or NONE, and how many rows each is to bring."""

    expert_ids: Int[Array, " P"]
    num_rows: Int[Array, " P"]


def pays(layout: SlotLayout, num_choices: int) -> bool:
    """Whether steps that admit, and make so many choices a layer, have anything to prefetch for.

    They have not where every expert is resident, nor where a layer may ask for more experts than it has slots: what
    has no slot then goes through the staging slots, which take nothing that came early.
    """
    return not layout.all_resident and not layout.overflows(num_choices)


def guess(odds: Float[Array, " E"], slot_of: Int[Array, " E"], ahead: Prefetch, rows_of_expert: int) -> Guess:
    """What `ahead` brings of a layer, by how probably it asks for each of its experts; of equals the first.

    A layer is guessed to ask for the most probable ones, as many as it makes choices: what is missing of others is none
    of them. One maximum after the other, and then the place of each, for these are few: in a few small kernels.
    """
    at, left = jnp.arange(odds.size), jnp.where(slot_of == NONE, odds, 0.0)
    ids, best = [], []
    for _ in range(ahead.num_experts):
        ids.append(jnp.argmax(left).astype(jnp.int32))
        best.append(jnp.max(left))
        left = jnp.where(at == ids[-1], 0.0, left)
    expert_ids, values = jnp.stack(ids), jnp.stack(best)[:, None]
    before = (odds[None] > values) | ((odds[None] == values) & (at[None] < expert_ids[:, None]))  # [P, E]
    is_guessed = (values[:, 0] > 0) & (jnp.sum(before, axis=1) < ahead.num_choices)  # the first of them, or none
    rows = jnp.where(is_guessed, share_out(ahead.num_rows, ahead.num_experts, rows_of_expert), 0)
    return Guess(jnp.where(is_guessed, expert_ids, NONE), rows)


def no_rows(num_layers: int) -> Prefetched:
    """Nothing has come yet."""
    return Prefetched(*(jnp.zeros((num_layers,), jnp.int32) for _ in range(4)))


def count(
    arrivals: Sequence[Arrivals], needed: Bool[Array, "L E"], known_at: Sequence[Int[Array, ""]] = ()
) -> Prefetched:
    """Of a step which needed these experts, and to whose layers, or all but the first, these came early.

    `known_at` are the times when the demand of these layers was known; empty where there is no clock.
    """
    ids = jnp.stack([each.expert_ids for each in arrivals])  # [L, P], or [L - 1, P]
    rows, without = jnp.stack([each.num_rows for each in arrivals]), len(needed) - len(arrivals)
    was_needed = jnp.take_along_axis(needed[without:], jnp.maximum(ids, 0), axis=1)  # NONE came with no row
    late_rows = _late_rows(arrivals, rows, jnp.stack(known_at)) if known_at else jnp.zeros_like(rows)
    useful, late = (jnp.sum(jnp.where(was_needed, each, 0), axis=1, dtype=jnp.int32) for each in (rows, late_rows))
    wasted = jnp.sum(rows, axis=1, dtype=jnp.int32) - useful
    counts = useful, wasted, late, jnp.zeros_like(useful) if known_at else useful
    return Prefetched(*(jnp.pad(found, (without, 0)) for found in counts))


def _late_rows(arrivals: Sequence[Arrivals], rows: Int[Array, "l P"], known_at: Int[Array, " l"]) -> Int[Array, "l P"]:
    """How many of these first rows came after `known_at`: a row has come with the part in which its last value lies."""
    came_at = jnp.stack([each.came_at for each in arrivals if each.came_at is not None])  # [l, P, n]
    rows_of_expert, num_parts = 3 * arrivals[0].weights.shape[2], came_at.shape[-1]
    ends = np.arange(num_parts + 1) * rows_of_expert // num_parts  # of the rows that have come with so many parts
    begin, end = (part.astype(np.int32)[None, None] for part in (ends[:-1], ends[1:]))
    rows_of_part = jnp.clip(rows[..., None], begin, end) - begin
    is_late = came_at - known_at[:, None, None] > 0  # in int32, as the clock wraps around
    return jnp.sum(jnp.where(is_late, rows_of_part, 0), axis=-1, dtype=jnp.int32)
