"""The router: which experts a token goes to, and with what weight."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jmoe.config import ModelConfig
from jmoe.model.layers import RMSNorm, init_kernel, project
from kernels_pallas.norm_linear.reference import matmul
from kernels_pallas.route.api import route


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routing:
    """`expert_ids` in [0, E), distinct and ascending within a token; E marks a row that is no token.

    Weights and logits are float32. `logits` are those of all experts, for losses and predictions; a step that does not
    look at them pays nothing.
    """

    expert_ids: Int[Array, "T A"]
    combine_weights: Float[Array, "T A"]
    logits: Float[Array, "T E"]


class Router(nnx.Module):
    """softmax over all experts, the largest A of them, renormalised to sum to 1 if `norm_topk_prob`.

    `implementation` is that of `route`, and of `norm_linear` in `after_norm`.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, implementation: str | None = "reference"):
        self.kernel = init_kernel(rngs, (config.num_experts, config.hidden_size), config.dtype)
        self.config, self.implementation = config, implementation

    def logits(self, x: Float[Array, "T D"]) -> Float[Array, "T E"]:
        """Of all experts, float32."""
        return matmul(x, self.kernel[...], jnp.float32)

    def __call__(self, x: Float[Array, "T D"], valid: Bool[Array, " T"] | None = None) -> Routing:
        """Rows that are not valid are no tokens, and ask for no expert. None: all are."""
        return self._routing(self.logits(x), valid)

    def after_norm(
        self, x: Float[Array, "*n D"], norm: RMSNorm, valid: Bool[Array, "*n"]
    ) -> tuple[Routing, Float[Array, "T D"]]:
        """The routing of the rows of norm(x), and those."""
        kernel = self.kernel[...]
        logits, normed, _ = project(x, kernel, norm, dtype=jnp.float32, implementation=self.implementation)
        routing = self._routing(logits.reshape(-1, kernel.shape[0]), valid.reshape(-1))
        return routing, normed.reshape(-1, x.shape[-1])

    def _routing(self, logits: Float[Array, "T E"], valid: Bool[Array, " T"] | None) -> Routing:
        expert_ids, weights = route(
            logits,
            jnp.ones(logits.shape[:1], bool) if valid is None else valid,
            num_chosen=self.config.num_experts_per_tok,
            normalize=self.config.norm_topk_prob,
            implementation=self.implementation,
        )
        return Routing(expert_ids, weights, logits)
