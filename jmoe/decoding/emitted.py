"""What steps hand back to the host, collected in arrays of fixed size."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jmoe.decoding.sampling import NO_TOKEN
from jmoe.experts.look_ahead import Prefetched
from jmoe.experts.residency import Counters
from jmoe.model.router import Routing


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routed:
    """What the L MoE layers routed in n steps of T tokens a sequence: as `Routing`, with expert E for no token.

    uint16 and float16, what `jmoe.traces` keeps at most. No memory plan counts it, since it is small: 4 bytes a choice,
    for Qwen3-30B-A3B's 48 layers of 8 choices 0.8 MB for a chunk of 512 tokens, and 50 kB for 32 decoded ones.
    """

    expert_ids: Int[Array, "n L B T A"]
    combine_weights: Float[Array, "n L B T A"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Emitted:
    """Tokens of one decode call, [B, n]; NO_TOKEN where a sequence was done. `num_steps` of the n columns are used.

    `done` says which sequences are at the end of the call, and `counters` which experts decode steps asked for so far;
    None until then. They are the state's, but a later call takes that.
    `routed`, of `num_steps` steps of one token, is None unless the steps record; `prefetched`, of all of them together,
    None unless they prefetch.
    """

    token_ids: Int[Array, "B n"]
    logprobs: Float[Array, "B n"]
    num_steps: Int[Array, ""]
    done: Bool[Array, " B"] | None = None
    counters: Counters | None = None
    routed: Routed | None = None
    prefetched: Prefetched | None = None


def nothing_emitted(batch_size: int, capacity: int) -> Emitted:
    """Room for the tokens of `capacity` steps."""
    return Emitted(
        token_ids=jnp.full((batch_size, capacity), NO_TOKEN, jnp.int32),
        logprobs=jnp.zeros((batch_size, capacity), jnp.float32),
        num_steps=jnp.zeros((), jnp.int32),
    )


def routed_in(routings: tuple[Routing, ...], batch_size: int) -> Routed:
    """What the layers of one step routed."""
    expert_ids = jnp.stack([routing.expert_ids for routing in routings])  # [L, B*T, A]
    weights = jnp.stack([routing.combine_weights for routing in routings])
    shape = 1, len(routings), batch_size, -1, expert_ids.shape[-1]
    return Routed(expert_ids.astype(jnp.uint16).reshape(shape), weights.astype(jnp.float16).reshape(shape))


def emit(
    emitted: Emitted,
    tokens: Int[Array, " B"],
    logprobs: Float[Array, " B"],
    was_done: Bool[Array, " B"],
    routings: tuple[Routing, ...],
    prefetched: Prefetched | None,
) -> Emitted:
    """With one more step as the next column: its tokens, of sequences that were not done, its routings and counts."""
    routed = emitted.routed
    if routed is not None:
        row, place = routed_in(routings, was_done.size), (emitted.num_steps, 0, 0, 0, 0)
        routed = jax.tree.map(lambda rows, new: jax.lax.dynamic_update_slice(rows, new, place), routed, row)
    shown = jnp.where(was_done, NO_TOKEN, tokens)[:, None]
    at = (0, emitted.num_steps)
    return Emitted(
        token_ids=jax.lax.dynamic_update_slice(emitted.token_ids, shown, at),
        logprobs=jax.lax.dynamic_update_slice(emitted.logprobs, logprobs[:, None], at),
        num_steps=emitted.num_steps + 1,
        routed=routed,
        prefetched=jax.tree.map(jnp.add, emitted.prefetched, prefetched),
    )
