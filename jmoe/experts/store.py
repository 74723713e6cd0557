"""Every routed expert, in host memory."""

import dataclasses

import jax
from jaxtyping import Array, Float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ExpertStore:
    """One array [E, 3, F, D] for each MoE layer, in `pinned_host` memory.

    An expert is one contiguous block (gate, up, transposed down: all rows of D), so a fetch is one copy. An array a
    layer, so that loading streams and nothing is ever held twice. Read only: evicting an expert copies nothing back.
    """

    layers: tuple[Float[Array, "E 3 F D"], ...]

    @property
    def expert_bytes(self) -> int:
        layer = self.layers[0]
        return layer.nbytes // layer.shape[0]

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)
