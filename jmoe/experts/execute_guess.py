"""Computing guessed experts in place of those that the router chose. This CHANGES WHAT THE MODEL SAYS.

It is the mode of *Speculating Experts* (arXiv 2603.19289), here for comparison: what a layer asks for is known while
the layer before it runs, since nothing later has a say. Off unless asked for; docs/prefetch.md has what it costs.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jmoe.experts.look_ahead import Foresight
from jmoe.experts.prefetch import Predictor, is_token, predict, predicted_logits
from jmoe.experts.residency import Residency
from jmoe.model.decoder import MoE
from jmoe.model.router import Routing
from kernels_pallas.route.api import route


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ExecutedGuess(Foresight):
    """What `layers` (MoE layers, from 1 on; static) compute, as `predictor` guesses one layer ahead of each.

    It is a predictor for prefetching too: of these layers it knows what they will ask for.
    """

    predictor: Predictor
    layers: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    norm_topk_prob: bool = dataclasses.field(metadata={"static": True})
    implementation: str | None = dataclasses.field(default=None, metadata={"static": True})

    def routing(self, layer: int, residual: Float[Array, "T D"], routing: Routing) -> Routing | None:
        """What layer `layer + 1` computes in place of its router's choice; None where that stands.

        For each row the A experts of the largest guessed logits, with the guessed router's weights, renormalised as
        the model's are. So does the paper (§4.2: the speculated experts, with the speculated weights), and then nothing
        of the true router is needed. `residual` and `routing` are what layer `layer` got and computes, which may have
        been a guess itself: guesses go on from guesses.
        """
        if layer + 1 not in self.layers:
            return None
        logits = predicted_logits(self.predictor, layer, residual, routing)
        chosen = {"num_chosen": routing.expert_ids.shape[1], "normalize": self.norm_topk_prob}
        valid = is_token(routing)[:, 0]
        return Routing(*route(logits, valid, **chosen, implementation=self.implementation), logits)

    def odds(
        self, layer: int, residual: Float[Array, "T D"], routing: Routing, residency: Residency
    ) -> Float[Array, " E"]:
        """For prefetching: the weights of what layer `layer + 1` will ask for, and else its guess."""
        certain = self.routing(layer, residual, routing)
        if certain is None:
            return predict(self.predictor, layer, residual, routing)
        experts = jnp.arange(certain.logits.shape[-1], dtype=jnp.int32)
        asked = certain.expert_ids[..., None] == experts[None, None]  # [T, A, E]
        return jnp.sum(jnp.where(asked, certain.combine_weights[..., None], 0.0), axis=(0, 1))


@dataclasses.dataclass(frozen=True)
class GuessedRouting(MoE):
    """Experts that get what was guessed for their layer, where `guess` says so, and never what its router chose.

    The carry is theirs, and beside it what each layer so far, and the next one, computes (None: what its router says).
    """

    experts: MoE
    guess: ExecutedGuess

    def start(self, carry) -> tuple:
        """The carry, from that of the experts."""
        return carry, (None,)

    def look_ahead(self, moe_layer: int, residual: Float[Array, "T D"], routing: Routing, carry: tuple) -> tuple:
        inner, guesses = carry
        routing = guesses[moe_layer] or routing
        inner = self.experts.look_ahead(moe_layer, residual, routing, inner)
        return inner, (*guesses, self.guess.routing(moe_layer, residual, routing))

    def __call__(self, moe_layer: int, x: Float[Array, "T D"], routing: Routing, carry: tuple):
        inner, guesses = carry
        y, inner = self.experts(moe_layer, x, guesses[moe_layer] or routing, inner)
        return y, (inner, guesses)
