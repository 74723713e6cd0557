"""`fetch` and `expert_mlp` in one pass: what is not in its slot is multiplied with as it comes over the link.

Every weight that is missing goes from host memory into shared memory once, to the arithmetic and to its slot from
there; what is in its slot meanwhile keeps the device's memory busy. One kernel less, too, where nothing is missing.
"""

from collections.abc import Sequence

from jaxtyping import Array, Float

from kernels_pallas.admit.result import Admitted
from kernels_pallas.expert_mlp.api import choose
from kernels_pallas.prefetch import arrivals as prefetched
from kernels_pallas.prefetch.arrivals import Arrivals

MAX_ROWS = 2  # of x; where there are more, others of the kernel's forms are faster (`mosaic_gpu.FEW_ROWS`)


def can(implementation: str | None, x, slots) -> bool:
    """Whether the pass does these shapes here; where it does not, `fetch` comes before `expert_mlp`."""
    if x.shape[0] > MAX_ROWS or choose(implementation, x, slots) != "mosaic_gpu":
        return False
    from kernels_pallas.expert_mlp import mosaic_gpu_fma  # importing Mosaic takes seconds

    return mosaic_gpu_fma.problem(x, slots) is None


def expert_mlp(
    x: Float[Array, "T D"],
    store: Float[Array, "E 3 F D"],
    slots: Float[Array, "R 3 F D"],
    admitted: Admitted,
    arrivals: Arrivals | None = None,
    after: Sequence[Array] = (),
) -> tuple[Float[Array, "T D"], Float[Array, "R 3 F D"]]:
    """expert_mlp of the groups, and the slots with what the plan brings, in place where they are donated.

    Only for what `can` says, and for a plan whose every entry is a group that weighs something for some row. `store` is
    in host memory. Rows that are among `arrivals` are taken from there; those of experts that are not fetched are of no
    matter. It begins once `after` are computed, whose values are of no matter. Raises ValueError for arrivals whose
    shapes do not fit.
    """
    from kernels_pallas.expert_mlp import mosaic_gpu_fma

    if why := arrivals and prefetched.problem(arrivals, slots):
        raise ValueError(f"expert_mlp: {why}")
    groups = admitted.group_experts, admitted.group_slots, admitted.group_fetched, admitted.group_weights
    return mosaic_gpu_fma.read_through(x, store, slots, *groups, arrivals, tuple(after))
