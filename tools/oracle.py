"""An oracle for prefetching: it knows what each step will ask for, since the same steps have been run before."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jmoe.experts.look_ahead import Foresight
from jmoe.experts.residency import Residency
from jmoe.model.router import Routing
from jmoe.traces import Trace


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Oracle(Foresight):
    """A predictor of N decode steps, the first that an engine does.

    Of experts that a step asks for it says 1, of the others 0, whatever it is shown; after the last step nothing.
    """

    needed: Bool[Array, "N L E"]

    def odds(
        self, layer: int, residual: Float[Array, "T D"], routing: Routing, residency: Residency
    ) -> Float[Array, " E"]:
        """1 for each expert that layer `layer + 1` asks for in the step that the residency's clock counts."""
        clock, (num_steps, _, num_experts) = residency.clock, self.needed.shape
        step = jnp.minimum(clock, num_steps - 1)
        row = jax.lax.dynamic_slice(self.needed, (step, layer + 1, 0), (1, 1, num_experts))[0, 0]
        return jnp.where(clock < num_steps, row.astype(jnp.float32), 0.0)

    @classmethod
    def of(cls, traces: Sequence[Trace]) -> "Oracle":
        """Of generations one after another. Raises ValueError for none, or of several models."""
        return cls(jnp.asarray(Trace.concatenate(traces).needed(prefill=False)))
