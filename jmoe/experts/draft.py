"""The draft: the model itself, restricted to a few resident experts a layer (SpecMoE, arXiv 2604.10152, §3).

It has the target's trunk, routers and KV cache, and fetches nothing. Which experts it keeps changes after every
verification; what the routers choose beyond them is computed by the kept expert that is most like it, or left out.
"""

import dataclasses
from typing import get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jmoe.config import DraftPolicy, Missing
from jmoe.experts.groups import Groups, multiply, tokens_of_experts
from jmoe.experts.policies import POLICIES
from jmoe.experts.residency import NONE
from jmoe.experts.slots import ExpertSlots
from jmoe.model.decoder import MoE
from jmoe.model.router import Routing
from kernels_pallas.admit.api import admit

# What is left of a count after each verification. "hot" lies between the paper's two policies, and accepts most where
# few experts are kept (docs/speculative.md).
_REMEMBERED = {"hot": 0.9, "hot_temporal": 0.0, "hot_global": 1.0, "frozen": 1.0}


@dataclasses.dataclass(frozen=True)
class DraftConfig:
    """`num_experts` a layer are kept, chosen by `policy`; `missing` says what becomes of the choice of others.

    - hot: those that verifications chose most, older ones counting less; hot_temporal: the last one alone; hot_global:
      all alike; frozen: the first one alone; random: anew each time; resident: whatever has a slot, all of it
    - reroute: the router chooses among the kept; substitute: the kept expert that is most like the chosen one computes
      in its place (the paper); drop: the others of the token take its weight
    """

    num_experts: int
    policy: DraftPolicy = "hot"
    missing: Missing = "reroute"

    def __post_init__(self) -> None:
        if self.num_experts < 1:
            raise ValueError(f"draft experts={self.num_experts} must be at least 1 a layer")
        for name, kinds in (("policy", get_args(DraftPolicy)), ("missing", get_args(Missing))):
            if getattr(self, name) not in kinds:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; expected one of {', '.join(kinds)}")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DraftSet:
    """Which experts a draft may use, and how much verifications have used each.

    `stand_in` is the kept expert that computes for each: itself where it is kept, NONE where nothing does.
    """

    stand_in: Int[Array, "L E"]
    heat: Float[Array, "L E"]
    num_cycles: Int[Array, ""]


def resident_experts(slots: ExpertSlots) -> Bool[Array, "L E"]:
    return slots.residency.stacked.slot_of != NONE


def start(
    config: DraftConfig, slots: ExpertSlots, distances: Float[Array, "L E E"] | None = None, policy: str | None = None
) -> DraftSet:
    """Before the first verification: the residents that `policy` (of residency) values most. Raises as `refresh`.

    What they are worth says which come first, and is less than one use: verifications decide from then on. Without a
    policy none is hotter than another.
    """
    zero = jnp.zeros((), jnp.int32)
    heat = jnp.zeros(slots.residency.stacked.slot_of.shape, jnp.float32)
    return _chosen(config, heat if policy is None else _worth(slots, policy), zero, slots, distances)


def _worth(slots: ExpertSlots, policy: str) -> Float[Array, "L E"]:
    """Each expert's rank by what keeping it is worth, in 0 … 1."""
    residency = slots.residency
    num_experts = residency.stacked.slot_of.shape[1]
    unused = jnp.zeros((num_experts,), jnp.int32)
    outlook = POLICIES[policy].outlook(residency.tracked[policy])
    values = jax.vmap(lambda row: POLICIES[policy].value(row, unused, residency.clock))(outlook)
    return jnp.argsort(jnp.argsort(values, axis=1), axis=1) / num_experts


def refresh(
    config: DraftConfig,
    before: DraftSet,
    counts: Float[Array, "L E"],
    slots: ExpertSlots,
    distances: Float[Array, "L E E"] | None = None,
) -> DraftSet:
    """The draft set after a verification that chose the experts so often.

    `distances` of the experts (`expert_distances`) are what "substitute" goes by. Raises ValueError if it has none.
    """
    if config.policy == "frozen":
        counts = jnp.where(before.num_cycles == 0, counts, 0.0)
    heat = _REMEMBERED.get(config.policy, 0.0) * before.heat + counts
    return _chosen(config, heat, before.num_cycles + 1, slots, distances)


def _chosen(config: DraftConfig, heat, num_cycles, slots: ExpertSlots, distances) -> DraftSet:
    resident = resident_experts(slots)
    kept = resident if config.policy == "resident" else _keep(config, heat, num_cycles, resident)
    return DraftSet(_stand_ins(config, kept, distances), heat, num_cycles)


def _keep(config: DraftConfig, heat, num_cycles, resident) -> Bool[Array, "L E"]:
    if config.policy == "random":
        heat = jax.random.uniform(jax.random.fold_in(jax.random.key(0), num_cycles), heat.shape)
    return hottest(jnp.where(resident, heat, -1.0), config.num_experts) & resident


def hottest(heat: Float[Array, "L E"], num_experts: int) -> Bool[Array, "L E"]:
    """The experts of each layer with the largest values; of equals, the first."""
    at = jnp.arange(heat.shape[1])
    before = (heat[:, None, :] > heat[:, :, None]) | (
        (heat[:, None, :] == heat[:, :, None]) & (at[None, None, :] < at[None, :, None])
    )
    return jnp.sum(before, axis=-1) < num_experts


def _stand_ins(config: DraftConfig, kept: Bool[Array, "L E"], distances) -> Int[Array, "L E"]:
    if config.missing == "substitute":
        if distances is None:
            raise ValueError('missing="substitute" needs the distances of the experts; see expert_distances')
        return nearest_kept(kept, distances)
    return jnp.where(kept, jnp.arange(kept.shape[1], dtype=jnp.int32).reshape(1, -1), NONE)


def nearest_kept(kept: Bool[Array, "L E"], distances: Float[Array, "L E E"]) -> Int[Array, "L E"]:
    """The nearest kept expert of each, itself if it is kept."""
    reach = jnp.where(kept[:, None, :], distances, jnp.inf)
    nearest = jnp.argmin(reach, axis=-1).astype(jnp.int32)
    return jnp.where(kept, jnp.arange(kept.shape[1], dtype=jnp.int32).reshape(1, -1), nearest)


@dataclasses.dataclass(frozen=True)
class DraftExperts(MoE):
    """Multiplies with the draft set's experts where they are, and changes nothing."""

    slots: ExpertSlots
    draft: DraftSet
    reroutes: bool
    implementation: str | None = None

    def __call__(self, moe_layer: int, x: Float[Array, "T D"], routing: Routing, carry: None):
        stand_in, layer = self.draft.stand_in[moe_layer], self.slots.residency.layers[moe_layer]
        kept = rerouted(routing, stand_in) if self.reroutes else substituted(routing, stand_in)
        ids, weights, used = kept.expert_ids, kept.combine_weights, tokens_of_experts(kept.expert_ids, stand_in.size)
        here = admit(ids, weights, used, None, layer.slot_of, layer.owner, implementation=self.implementation)
        groups = Groups.of(here, ids.shape[1])
        y = multiply(x, self.slots.layers[moe_layer], here.group_slots, groups, self.implementation)
        return y.astype(x.dtype), carry


def substituted(routing: Routing, stand_in: Int[Array, " E"]) -> Routing:
    """Each choice's stand-in, with its weight; what has none leaves its weight to the token's others.

    Two choices of one token may have the same stand-in, which `admit` adds up.
    """
    num_experts = stand_in.shape[0]
    chosen = jnp.append(stand_in, NONE)[routing.expert_ids]  # NONE for what is no token
    left = jnp.where(chosen == NONE, 0.0, routing.combine_weights)
    return Routing(jnp.where(chosen == NONE, num_experts, chosen), _as_much(left, routing), routing.logits)


def rerouted(routing: Routing, stand_in: Int[Array, " E"]) -> Routing:
    """The router's choice among the experts that stand in for themselves."""
    num_experts = stand_in.shape[0]
    kept = (stand_in == jnp.arange(num_experts)) & (stand_in != NONE)
    odds = jnp.where(kept.reshape(1, -1), jax.nn.softmax(routing.logits, axis=-1), 0.0)
    weights, expert_ids = jax.lax.top_k(odds, routing.expert_ids.shape[1])
    chosen = (weights > 0) & (routing.expert_ids[:, :1] < num_experts)  # no more than are kept, and none for no token
    weights = _as_much(jnp.where(chosen, weights, 0.0), routing)
    return Routing(jnp.where(chosen, expert_ids.astype(jnp.int32), num_experts), weights, routing.logits)


def _as_much(weights: Float[Array, "T A"], routing: Routing) -> Float[Array, "T A"]:
    """The weights, scaled so that a token's sum is what its routing gave."""
    asked, left = (jnp.sum(each, axis=-1, keepdims=True) for each in (routing.combine_weights, weights))
    return weights * asked / jnp.maximum(left, 1e-30)


def expert_distances(layer: Float[Array, "E 3 F D"]) -> Float[Array, "E E"]:
    """Euclidean distance of each two experts' weights, flattened, as a share of the mean."""
    flat = layer.reshape(layer.shape[0], -1)
    products = jnp.einsum("ix,jx->ij", flat, flat, preferred_element_type=jnp.float32)
    squares = jnp.diagonal(products)
    distances = jnp.sqrt(jnp.maximum(squares[:, None] + squares[None, :] - 2 * products, 0.0))
    return distances / jnp.maximum(jnp.mean(distances), 1e-30)
