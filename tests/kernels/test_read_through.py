"""The pass that fetches and multiplies, interpreted on the CPU: the sums of `expert_mlp`, the slots of `fetch`."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks  # the races found have no public name
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.admit.result import NONE, Admitted
from kernels_pallas.expert_mlp import mosaic_gpu_fma, read_through, reference

NUM_EXPERTS, NUM_SLOTS, F, D = 8, 6, 12, 256
GROUPS = (5, 2, 7, NONE)
SLOTS = (3, 0, 5, 0)


def admitted(fetched: tuple[int, ...], num_rows: int) -> Admitted:
    """Three groups of which some have to be fetched; the residency is of no matter here."""
    weights = np.random.default_rng(1).uniform(0.1, 1, (len(GROUPS), num_rows)).astype(np.float32)
    weights[np.array(GROUPS) == NONE] = 0
    ints = (jnp.asarray(row, jnp.int32) for row in (GROUPS, SLOTS, fetched))
    experts, slots, fetched_here = ints
    none = jnp.zeros(0, jnp.int32)
    return Admitted(experts, slots, jnp.asarray(weights), fetched_here, *[none] * 4, *[jnp.asarray(0)] * 2)


@pytest.mark.parametrize("num_rows", [1, 2])
@pytest.mark.parametrize("fetched", [(0, 1, 1, 0), (1, 1, 1, 0), (0, 0, 0, 0)], ids=str)
def test_the_pass_fetches_and_multiplies(fetched: tuple[int, ...], num_rows: int) -> None:
    """What lies in a slot that is fetched into is NaN before, so that a group that reads it early shows."""
    rng = np.random.default_rng(0)
    store = rng.normal(size=(NUM_EXPERTS, 3, F, D)).astype(np.float32)
    slots = rng.normal(size=(NUM_SLOTS, 3, F, D)).astype(np.float32)
    x = rng.normal(size=(num_rows, D)).astype(np.float32)
    wanted_slots = slots.copy()
    for expert, slot, comes in zip(GROUPS, SLOTS, fetched, strict=True):
        if comes:
            slots[slot], wanted_slots[slot] = np.nan, store[expert]
    plan = admitted(fetched, num_rows)
    wanted = reference.expert_mlp(*map(jnp.asarray, (x, wanted_slots)), plan.group_slots, plan.group_weights)
    y, after = mosaic_gpu_fma.read_through(
        *map(jnp.asarray, (x, store, slots)),
        plan.group_experts,
        plan.group_slots,
        plan.group_fetched,
        plan.group_weights,
        config=mosaic_gpu_fma.Config(num_blocks=2, max_warpgroups=2),
        interpret=plgpu.InterpretGPUParams(detect_races=True),
    )
    np.testing.assert_array_equal(after, wanted_slots)
    np.testing.assert_allclose(y, wanted, rtol=0, atol=2e-6 * np.abs(wanted).max())
    assert not gpu_callbacks.get_races().races_found


def test_it_is_for_few_rows_on_a_gpu() -> None:
    x, slots = jnp.zeros((1, D)), jnp.zeros((NUM_SLOTS, 3, F, D))
    assert not read_through.can("reference", x, slots)
    assert not read_through.can(None, jnp.zeros((3, D)), slots)
    assert not read_through.can(None, x, slots), "there is no GPU here"
