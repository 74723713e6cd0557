"""What is brought early: the beginnings of the experts that a layer's router will most probably ask for.

The guess is made before the layer's attention, by the layer's own router from the residual stream as it is then, so it
leaves out no more than what the attention adds. While the attention runs the link has nothing else to do. A guess only
brings weights; the true router decides what is computed.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jmoe.experts.residency import NONE
from jmoe.experts.slots import SlotLayout
from kernels_pallas.admit.reference import rank_of, select
from kernels_pallas.prefetch import api
from kernels_pallas.prefetch.arrivals import Arrivals


@dataclasses.dataclass(frozen=True)
class Prefetch:
    """In each layer `num_rows` rows of D values (an expert has 3F), of the `num_experts` most probable experts.

    `num_experts` is static, and at least num_rows / 3F: the first expert comes whole before the next begins. A token
    asks for `per_row` experts.
    """

    num_experts: int
    num_rows: Int[Array, ""]
    per_row: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prefetched:
    """Rows of D values that came before a router had asked, one count a layer: of experts that it then did, or not."""

    useful: Int[Array, " L"]
    wasted: Int[Array, " L"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Guess:
    """The most probable experts of a layer that are not resident, the first `count` of the list."""

    expert_ids: Int[Array, " P"]
    count: Int[Array, ""]


def pays(layout: SlotLayout, num_choices: int) -> bool:
    """Whether steps that admit, and make so many choices a layer, have anything to prefetch for.

    They have not where every expert is resident, nor where a layer may ask for more experts than it has slots: then
    what comes for one expert takes the place of another that the same step needs.
    """
    return not layout.all_resident and min(num_choices, layout.num_experts) <= layout.slots_per_layer


def guess(logits: Float[Array, "T E"], valid: Bool[Array, " T"], slot_of: Int[Array, " E"], num_experts: int) -> Guess:
    """At most `num_experts`, by the router's softmax summed over the rows that are tokens; of equals the first.

    Ranks are found as `kernels_pallas.admit.reference` does, in a few small kernels and without a sort.
    """
    odds = jnp.sum(jnp.where(valid[:, None], jax.nn.softmax(logits, axis=-1), 0.0), axis=0)
    odds = jnp.where(slot_of == NONE, odds, 0.0)  # [E]
    chosen = rank_of(-odds)[None, :] == jnp.arange(num_experts)[:, None]  # [P, E]
    count = jnp.minimum(jnp.sum(odds > 0, dtype=jnp.int32), num_experts)
    return Guess(select(chosen, jnp.arange(odds.size, dtype=jnp.int32)), count)


def bring(
    prefetch: Prefetch,
    x: Float[Array, "B T D"],
    store: Float[Array, "E 3 F D"],
    logits: Float[Array, "T E"],
    valid: Bool[Array, "B T"],
    slot_of: Int[Array, " E"],
    implementation: str | None,
) -> tuple[Float[Array, "B T D"], Arrivals]:
    """x, and the rows of the experts that these logits say, of those that have no slot.

    The guess comes before what needs x: else XLA makes it part of the kernel in which the router decides, once
    attention is over, since both read the router's weights.
    """
    best = guess(logits, valid.reshape(-1), slot_of, prefetch.num_experts)
    x, best = jax.lax.optimization_barrier((x, best))
    return x, api.prefetch(store, best.expert_ids, best.count, prefetch.num_rows, implementation=implementation)


def no_rows(num_layers: int) -> Prefetched:
    """Nothing has come yet."""
    return Prefetched(*(jnp.zeros((num_layers,), jnp.int32) for _ in range(2)))


def count(arrivals: Sequence[Arrivals], needed: Bool[Array, "L E"]) -> Prefetched:
    """Of a step to whose layers these came early, and which needed these experts."""
    ids = jnp.stack([each.expert_ids for each in arrivals])  # [L, P]
    rows = jnp.stack([each.num_rows for each in arrivals])
    was_needed = jnp.take_along_axis(needed, jnp.maximum(ids, 0), axis=1)  # NONE came with no row
    useful = jnp.sum(jnp.where(was_needed, rows, 0), axis=1, dtype=jnp.int32)
    return Prefetched(useful, jnp.sum(rows, axis=1, dtype=jnp.int32) - useful)
