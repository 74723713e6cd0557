"""The dimension legend. One letter, one meaning, everywhere in jmoe.

B  sequences in the batch        T  query tokens (of one sequence, or of all of them in the MoE layer)
S  KV positions                  D  model width
N  query heads                   K  key/value heads
H  head dimension                V  vocabulary
E  experts of one layer          A  active experts per token
F  expert width                  G  expert groups of one expert_mlp call
R  slots on the device           W  experts of a wave
L  layers                        P  entries of a fetch plan
"""

from typing import TypeAlias

from jaxtyping import Array, Bool, Float, Int

TokenIds: TypeAlias = Int[Array, "B T"]
Positions: TypeAlias = Int[Array, "B T"]
Hidden: TypeAlias = Float[Array, "B T D"]
Rows: TypeAlias = Float[Array, "T D"]
Logits: TypeAlias = Float[Array, "B V"]
ExpertBlock: TypeAlias = Float[Array, "3 F D"]
StoreLayer: TypeAlias = Float[Array, "E 3 F D"]
Slots: TypeAlias = Float[Array, "R 3 F D"]
Mask: TypeAlias = Bool[Array, "B T"]
