"""Activation-aware residency (MoE-Infinity, arXiv 2401.14361): what past requests used tells what this one will use.

An expert activation matrix (EAM) counts the tokens of a request that went to each expert, [L, E]. A collection keeps
the matrices of past requests; the one that is most like the present moment predicts what comes. All of it is decode:
prefill admits nothing, and uses experts in other proportions.

The requests of a batch share the slots, so they count as one request.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

COLLECTION_SIZE = 128  # the paper finds 120 best; more than that is slower and no better
_MEMORY = 0.5  # what a step's use weighs a step later, in what is matched
_VALUE_UNIT = 1 << 20


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Activation:
    """`collection` of past EAMs (0 where there is none yet), the EAM of this `request`, and its `recent` steps.

    `expected` is each layer's prediction, see `update`.
    """

    collection: Float[Array, "*L C E"]
    request: Float[Array, "*L E"]
    recent: Float[Array, "*L E"]
    expected: Float[Array, "*L E"]


def start(num_layers: int, num_experts: int) -> Activation:
    """Nothing seen, and an empty collection. Arrays of their own, so that they can be donated."""
    rows = (jnp.zeros((num_layers, num_experts), jnp.float32) for _ in range(3))
    return Activation(jnp.zeros((num_layers, COLLECTION_SIZE, num_experts), jnp.float32), *rows)


def value(row: Activation, used: Int[Array, " E"], clock: Int[Array, ""]) -> Int[Array, " E"]:
    """What the last step predicted; what this step uses is in use anyway."""
    return jnp.round(row.expected * _VALUE_UNIT).astype(jnp.int32)


def update(state: Activation, used: Int[Array, "L E"], clock: Int[Array, ""]) -> Activation:
    """Matches once a step, all layers together: a layer's share of the best match, plus its share of this request."""
    request, recent = state.request + used, _MEMORY * state.recent + used
    match = jnp.argmax(similarity(state.collection, recent))
    expected = share(state.collection[:, match]) + share(request)
    return Activation(state.collection, request, recent, expected)


def finish(state: Activation) -> Activation:
    """The request is done: its EAM goes into the collection.

    It takes the first empty place, else that of the most similar matrix, which keeps the collection diverse.
    """
    empty = jnp.all(state.collection == 0, axis=(0, 2))  # [C]
    place = jnp.where(jnp.any(empty), jnp.argmax(empty), jnp.argmax(similarity(state.collection, state.request)))
    chosen = (jnp.arange(empty.size) == place) & jnp.any(state.request > 0)
    collection = jnp.where(chosen[None, :, None], state.request[:, None], state.collection)
    rows = jnp.zeros_like(state.request)
    return Activation(collection, rows, rows, rows)


def similarity(collection: Float[Array, "L C E"], matrix: Float[Array, "L E"]) -> Float[Array, " C"]:
    """Cosine of each matrix of the collection with this one, times the norm of this one; 0 for an empty place."""
    products = jnp.sum(collection * matrix[:, None], axis=(0, 2))
    return products / jnp.maximum(jnp.sqrt(jnp.sum(collection**2, axis=(0, 2))), 1.0)  # counts: a norm is 1 or more


def share(counts: Float[Array, "*L E"]) -> Float[Array, "*L E"]:
    """Rows that sum to 1, or to 0 where nothing was counted."""
    return counts / jnp.maximum(jnp.sum(counts, axis=-1, keepdims=True), 1.0)


def predict(state: Activation, layer: Int[Array, ""] | int) -> Float[Array, "L E"]:
    """What is worth prefetching while `layer` runs, [L, E]: the layers after it, the nearest first.

    The paper's (1 - (i - l) / L) for layer i > l; 0 for those that are done. Within a layer the factor is the same
    for every expert, which is why `value` has none.
    """
    num_layers = state.expected.shape[0]
    ahead = jnp.arange(num_layers) - layer
    proximity = jnp.where(ahead > 0, 1 - ahead / num_layers, 0.0)
    return state.expected * proximity[:, None]
