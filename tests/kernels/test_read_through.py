"""The pass that fetches and multiplies, interpreted on the CPU: the sums of `expert_mlp`, the slots of `fetch`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks  # the races found have no public name
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.admit.result import NONE, Admitted
from kernels_pallas.expert_mlp import mosaic_gpu_fma, read_through, reference
from kernels_pallas.expert_mlp.mosaic_gpu_fma import ITEM_ROWS
from tests.kernels.arrivals import SHARES, split

NUM_EXPERTS, NUM_SLOTS, F, D = 8, 6, 12, 256
GROUPS = (5, 2, 7, NONE)
SLOTS = (3, 0, 5, 0)
TOLERANCES = {"float32": 2e-6, "bfloat16": 0.01}  # of the reference, which rounds what the kernel does not


def admitted(fetched: tuple[int, ...], num_rows: int) -> Admitted:
    """Three groups of which some have to be fetched; the residency is of no matter here."""
    weights = np.random.default_rng(1).uniform(0.1, 1, (len(GROUPS), num_rows)).astype(np.float32)
    weights[np.array(GROUPS) == NONE] = 0
    ints = (jnp.asarray(row, jnp.int32) for row in (GROUPS, SLOTS, fetched))
    experts, slots, fetched_here = ints
    none = jnp.zeros(0, jnp.int32)
    return Admitted(experts, slots, jnp.asarray(weights), fetched_here, *[none] * 4, *[jnp.asarray(0)] * 3)


def check(
    fetched: tuple[int, ...],
    num_rows: int,
    come: tuple[int, ...] = (),
    share: float = 0.0,
    dtype: str = "float32",
    after: tuple[jax.Array, ...] = (),
) -> None:
    """What lies in a slot that is fetched into is NaN before, so that a group that reads it early shows.

    Of what has come, `come` one after the other, the store is NaN too.
    """
    rng = np.random.default_rng(0)
    shapes = (NUM_EXPERTS, 3, F, D), (NUM_SLOTS, 3, F, D), (num_rows, D)
    store, slots, x = (np.array(jnp.asarray(rng.normal(size=shape), dtype)) for shape in shapes)
    wanted_slots = slots.copy()
    for expert, slot, comes in zip(GROUPS, SLOTS, fetched, strict=True):
        if comes:
            slots[slot], wanted_slots[slot] = np.nan, store[expert]
    left, arrivals = split(jnp.asarray(store), come, share, ITEM_ROWS * D) if come else (store, None)
    plan = admitted(fetched, num_rows)
    wanted = reference.expert_mlp(*map(jnp.asarray, (x, wanted_slots)), plan.group_slots, plan.group_weights)
    y, slots_after = mosaic_gpu_fma.read_through(
        *map(jnp.asarray, (x, left, slots)),
        plan.group_experts,
        plan.group_slots,
        plan.group_fetched,
        plan.group_weights,
        arrivals,
        after,
        config=mosaic_gpu_fma.Config(num_blocks=2, max_warpgroups=2),
        interpret=plgpu.InterpretGPUParams(detect_races=True),
    )
    np.testing.assert_array_equal(np.asarray(slots_after), wanted_slots)
    np.testing.assert_allclose(y, wanted, rtol=0, atol=TOLERANCES[dtype] * np.abs(wanted).max())
    assert not gpu_callbacks.get_races().races_found


@pytest.mark.parametrize("num_rows", [1, 2])
@pytest.mark.parametrize("fetched", [(0, 1, 1, 0), (1, 1, 1, 0), (0, 0, 0, 0)], ids=str)
def test_the_pass_fetches_and_multiplies(fetched: tuple[int, ...], num_rows: int) -> None:
    check(fetched, num_rows)


@pytest.mark.parametrize("share", SHARES.values(), ids=SHARES)
def test_what_has_come_is_read_from_there(share: float) -> None:
    check((0, 1, 1, 0), 1, (7, 2), share)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_of_two_rows_and_16_bit_too(dtype: str) -> None:
    check((0, 1, 1, 0), 2, (7, 2), 1.6, dtype)


@pytest.mark.parametrize("come", [(5, 7), (NONE, 7), (4,), (0, 1, 2, 7)], ids=str)
def test_arrivals_that_nobody_fetches_are_no_matter(come: tuple[int, ...]) -> None:
    """Expert 5 lies in its slot, 0, 1 and 4 are not asked for."""
    check((0, 1, 1, 0), 1, come, 1.6)


@pytest.mark.parametrize("come", [(), (7, 2)], ids=str)
def test_what_it_waits_for_is_not_read(come: tuple[int, ...]) -> None:
    check((0, 1, 1, 0), 1, come, 1.6, after=(jnp.full((3, 5), jnp.nan), jnp.full(4, 10**6)))


def test_arrivals_that_do_not_fit_are_refused() -> None:
    slots = jnp.zeros((NUM_SLOTS, 3, F, D))
    _, arrivals = split(jnp.zeros((NUM_EXPERTS, 3, F, D // 2)), (2,), 1.0, D)
    with pytest.raises(ValueError, match=r"expert_mlp: arrivals float32\[1, 3, 12, 128\] and slots "):
        read_through.expert_mlp(jnp.zeros((1, D)), slots, slots, admitted((0, 1, 1, 0), 1), arrivals)


def test_it_is_for_few_rows_on_a_gpu() -> None:
    x, slots = jnp.zeros((1, D)), jnp.zeros((NUM_SLOTS, 3, F, D))
    assert not read_through.can("reference", x, slots)
    assert not read_through.can(None, jnp.zeros((3, D)), slots)
    assert not read_through.can(None, x, slots), "there is no GPU here"
