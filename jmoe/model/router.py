"""The router: which experts a token goes to, and with what weight."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jmoe.config import ModelConfig
from jmoe.model.layers import init_kernel, matmul


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routing:
    """`expert_ids` in [0, E), distinct within a token; E marks a row that is no token. Weights and logits are float32.

    `logits` are those of all experts, for losses and predictions; a step that does not look at them pays nothing.
    """

    expert_ids: Int[Array, "T A"]
    combine_weights: Float[Array, "T A"]
    logits: Float[Array, "T E"]

    def masked(self, valid: Bool[Array, " T"], num_experts: int) -> "Routing":
        """Rows that are no token ask for no expert."""
        keep = valid[:, None]
        return Routing(
            jnp.where(keep, self.expert_ids, num_experts),
            jnp.where(keep, self.combine_weights, 0.0),
            self.logits,
        )


class Router(nnx.Module):
    """softmax over all experts, the largest A of them, renormalised to sum to 1 if `norm_topk_prob`."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.kernel = init_kernel(rngs, (config.num_experts, config.hidden_size), config.dtype)
        self.config = config

    def __call__(self, x: Float[Array, "T D"]) -> Routing:
        logits = matmul(x, self.kernel[...], jnp.float32)
        weights, expert_ids = jax.lax.top_k(jax.nn.softmax(logits, axis=-1), self.config.num_experts_per_tok)
        if self.config.norm_topk_prob:
            weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        return Routing(expert_ids.astype(jnp.int32), weights, logits)
