"""The fetch kernel on a GPU: bit-equal to the experts it was asked for, and nothing else touched."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe import memory
from kernels_pallas.fetch.api import fetch, resolve
from kernels_pallas.fetch.specs import SPECS, FetchSpec

pytestmark = pytest.mark.gpu

MOST = 12  # experts and slots of a test, if the plan does not need more: true sizes are in the gigabytes


def random_bits(shape, dtype, seed: int) -> np.ndarray:
    """Every bit pattern, NaNs too: a copy must not care."""
    unsigned = np.uint16 if jnp.dtype(dtype).itemsize == 2 else np.uint32
    bits = np.random.default_rng(seed).integers(0, np.iinfo(unsigned).max, shape, unsigned, endpoint=True)
    return bits.view(dtype)


def bits(array) -> np.ndarray:
    array = np.asarray(array)
    return array.view(np.uint16 if array.itemsize == 2 else np.uint32)


def fitted(spec: FetchSpec) -> FetchSpec:
    most = max(MOST, spec.count)
    return dataclasses.replace(spec, num_experts=min(spec.num_experts, most), num_slots=min(spec.num_slots, most))


@pytest.mark.parametrize("spec", [fitted(spec) for spec in SPECS], ids=lambda spec: spec.name)
def test_fetch_copies_the_plan_and_nothing_else(spec: FetchSpec) -> None:
    assert resolve(None) == "mosaic_gpu"
    jitted = jax.jit(fetch, donate_argnums=1)
    for seed in range(2):
        store = random_bits(spec.store_shape, spec.dtype, seed)
        poison = random_bits(spec.slots_shape, spec.dtype, 100 + seed)
        expert_ids, slot_ids, count = spec.plan(seed)
        pool = jitted(
            jax.device_put(store, memory.host_sharding()),
            jax.device_put(poison, memory.device_sharding()),
            *(jnp.asarray(part) for part in (expert_ids, slot_ids, count)),
        )
        expected = bits(poison).copy()
        expected[slot_ids[:count]] = bits(store)[expert_ids[:count]]
        np.testing.assert_array_equal(bits(pool), expected)


def test_fetch_is_in_place() -> None:
    store = jax.device_put(random_bits((4, 3, 96, 128), jnp.float32, 0), memory.host_sharding())
    pool = jax.device_put(jnp.zeros((4, 3, 96, 128), jnp.float32), memory.device_sharding())
    plan = (jnp.arange(4, dtype=jnp.int32), jnp.arange(4, dtype=jnp.int32), jnp.asarray(4, jnp.int32))
    before = pool.unsafe_buffer_pointer()
    after = jax.jit(fetch, donate_argnums=1)(store, pool, *plan)
    assert after.unsafe_buffer_pointer() == before


def test_many_fetches_in_one_program() -> None:
    """As a decode does: one after another into one pool, each with its own count, over and over."""
    store = random_bits((32, 3, 96, 256), jnp.float32, 1)
    on_host = jax.device_put(store, memory.host_sharding())
    rng = np.random.default_rng(2)
    plans = [
        (rng.integers(0, 32, 6).astype(np.int32), rng.permutation(9)[:6].astype(np.int32), int(rng.integers(0, 7)))
        for _ in range(40)
    ]

    @jax.jit
    def run(store, pool):
        for expert_ids, slot_ids, count in plans:
            pool = fetch(store, pool, jnp.asarray(expert_ids), jnp.asarray(slot_ids), jnp.asarray(count, jnp.int32))
        return pool

    expected = random_bits((9, 3, 96, 256), jnp.float32, 3).copy()
    pool = jax.device_put(expected, memory.device_sharding())
    for _ in range(5):
        pool = run(on_host, pool)
        for expert_ids, slot_ids, count in plans:
            expected[slot_ids[:count]] = store[expert_ids[:count]]
        np.testing.assert_array_equal(bits(pool), bits(expected))
