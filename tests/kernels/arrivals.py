"""Experts of which a part has come, such that a kernel which reads the wrong source shows it."""

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.prefetch.arrivals import NONE, Arrivals

SHARES = {"nothing": 0.0, "a_row": 0.05, "a_part": 0.4, "exactly_one": 1.0, "one_and_a_part": 1.6, "all": 9.0}


def split(experts: jax.Array, come: tuple[int, ...], share: float, unit: int) -> tuple[jax.Array, Arrivals]:
    """A store of the experts [E, 3, F, D] and arrivals, of which neither holds everything: what is missing is NaN.

    `share` experts of `come` have arrived, one after the other, in whole rows. A reader takes `unit` elements at once:
    only those units that have arrived whole are in the arrivals, and only they are missing in the store.
    """
    store, width, size = np.array(experts).reshape(experts.shape[0], -1), experts.shape[3], experts[0].size
    arrived, num_rows = np.full((len(come), size), np.nan, experts.dtype), []
    left = round(share * size / width)
    for entry, expert in enumerate(come):
        num_rows.append(0 if expert == NONE else min(left, size // width))
        left -= num_rows[-1]
        whole = num_rows[-1] * width // unit * unit
        arrived[entry, :whole] = store[expert, :whole]
        store[expert, :whole] = np.nan
    ints = (jnp.asarray(part, jnp.int32) for part in (come, num_rows))
    weights = jnp.asarray(arrived.reshape(-1, *experts.shape[1:]))
    return jnp.asarray(store.reshape(experts.shape)), Arrivals(*ints, weights)
