"""The prefetch, its reference and its kernel interpreted on the CPU; and the fetch that takes what has come."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks  # the races found have no public name
from jax.experimental.pallas import mosaic_gpu as plgpu

from jmoe import memory
from kernels_pallas import clock
from kernels_pallas.fetch import api as fetch_api
from kernels_pallas.fetch import mosaic_gpu as fetch_kernel
from kernels_pallas.fetch import reference as fetch_reference
from kernels_pallas.prefetch import api, mosaic_gpu, reference
from kernels_pallas.prefetch.arrivals import NONE, Arrivals
from kernels_pallas.prefetch.specs import SPECS, PrefetchSpec
from kernels_pallas.tile_ring import Config, tiling
from tests.kernels.arrivals import SHARES, split

NAMES = [spec.name for spec in SPECS]
SMALL = PrefetchSpec(name="small", num_experts=6, num_hidden=8, width=24, size=2, count=2, share=1.3)
ROWS_OF_SMALL = 3 * SMALL.num_hidden
NUM_SLOTS = 4
EXPERT_IDS = 4, 2, 5, 10**6  # to fetch: three, and one that must not be read
SLOT_IDS = 3, 0, 2, 10**6
COUNT = 3
COMERS = (2, 4), (1, 4), (NONE, 5), (5, NONE), (1, 0)  # nobody asks for 0 and 1
CONFIGS = {
    "bfloat16": Config(num_blocks=2, num_stages=3, tile_bytes=32),
    "float32": Config(num_blocks=3, num_stages=2, tile_bytes=500),
}


@functools.cache
def interpreted(kernel, config: Config, detect_races: bool = False):
    interpret = plgpu.InterpretGPUParams(detect_races=detect_races)
    return jax.jit(functools.partial(kernel, config=config, interpret=interpret))


def make_store(shape, dtype) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), dtype)


def assert_same_bits(got, wanted) -> None:
    """NaNs too, which numpy compares in no other way in bfloat16."""
    np.testing.assert_array_equal(np.asarray(got).view(np.uint8), np.asarray(wanted).view(np.uint8))


def rows_of(weights) -> np.ndarray:
    """[N, 3F, D]"""
    return np.asarray(weights).reshape(weights.shape[0], -1, weights.shape[3])


def tile_size(config: Config, dtype: str = "bfloat16") -> int:
    return tiling(ROWS_OF_SMALL * SMALL.width, jnp.dtype(dtype).itemsize, config.tile_bytes).size


def check(prefetch, spec: PrefetchSpec, *after: jax.Array) -> Arrivals:
    expert_ids, num_rows = spec.make()
    store = make_store(spec.store_shape, spec.dtype)
    got = prefetch(store, jnp.asarray(expert_ids), jnp.asarray(num_rows), *after)
    assert got.weights.shape == (spec.size, *spec.store_shape[1:])
    assert got.weights.dtype == store.dtype
    assert got.came_at is None, "neither plain JAX nor an interpreted kernel has a clock"
    np.testing.assert_array_equal(got.expert_ids, expert_ids)
    np.testing.assert_array_equal(got.num_rows, num_rows)
    assert num_rows.sum() == min(spec.num_rows, 3 * spec.num_hidden * spec.count)
    for entry, rows in enumerate(num_rows):
        if rows:
            wanted = rows_of(store)[expert_ids[entry], :rows]
            assert_same_bits(np.ascontiguousarray(rows_of(got.weights)[entry, :rows]), wanted)
    return got


@pytest.mark.parametrize("spec", [spec.scaled(64) for spec in SPECS], ids=NAMES)
def test_the_reference_brings_the_first_rows(spec: PrefetchSpec) -> None:
    check(jax.jit(reference.prefetch), spec)


@pytest.mark.parametrize("spec", [spec.scaled(64) for spec in SPECS], ids=NAMES)
def test_the_kernel_brings_the_first_rows(spec: PrefetchSpec) -> None:
    check(interpreted(mosaic_gpu.prefetch, Config(num_blocks=2, tile_bytes=2048)), spec)


def test_what_it_waits_for_is_not_read() -> None:
    config, waited_for = Config(num_blocks=2, tile_bytes=64), jnp.full((3, 5), jnp.nan)
    check(interpreted(mosaic_gpu.prefetch, config), SMALL, waited_for)
    check(jax.jit(api.prefetch), SMALL, waited_for)


@pytest.mark.parametrize("share", SHARES.values(), ids=SHARES)
def test_no_tile_comes_for_nothing(share: float) -> None:
    """The interpreter's fresh memory is NaN: tiles beyond the last that holds a wanted row stay so. And no races."""
    config, spec = Config(num_blocks=2, num_stages=2, tile_bytes=64), dataclasses.replace(SMALL, share=share)
    got = check(interpreted(mosaic_gpu.prefetch, config, detect_races=True), spec)
    assert not gpu_callbacks.get_races().races_found
    size = tile_size(config)
    elements = min(spec.num_rows, 2 * ROWS_OF_SMALL) * SMALL.width
    come = ~np.isnan(np.asarray(got.weights, np.float32).reshape(-1, size)).all(axis=1)
    np.testing.assert_array_equal(come, np.arange(come.size) < -(-elements // size))


@pytest.mark.parametrize("spec", SPECS, ids=NAMES)
def test_the_kernel_compiles_for_cuda_at_its_true_size(spec: PrefetchSpec) -> None:
    small = [((spec.size,), "int32")] * 2
    arguments = [jax.ShapeDtypeStruct(*one) for one in ((spec.store_shape, spec.dtype), *small)]
    made = export.export(jax.jit(mosaic_gpu.prefetch), platforms=["cuda"])(*arguments)
    assert "mosaic_gpu" in made.mlir_module()
    assert '_xla_stream_annotation = "1"' in made.mlir_module()
    *_, weights, came_at = made.out_avals
    assert weights.shape == (spec.size, *spec.store_shape[1:])
    assert (came_at.shape[0], came_at.dtype) == (spec.size, jnp.int32)
    assert 3 * spec.num_hidden * spec.width % came_at.shape[1] == 0, "equal parts"


def test_the_clock_compiles_for_cuda() -> None:
    """It waits for its operand, though it does not read it."""
    made = export.export(clock.now, platforms=["cuda"])(jax.ShapeDtypeStruct((), jnp.int32))
    assert re.search(r"custom_call @mosaic_gpu_v2\(%\w+\)", made.mlir_module())
    assert (made.out_avals[0].shape, made.out_avals[0].dtype) == ((), jnp.int32)


def test_other_backends_take_its_compiler_options() -> None:
    store = jax.device_put(make_store(SMALL.store_shape, SMALL.dtype), memory.host_sharding())
    prefetch = jax.jit(api.prefetch, compiler_options=api.COMPILER_OPTIONS)
    assert check(prefetch, SMALL).weights.sharding.memory_kind == "device"
    assert prefetch(store, *map(jnp.asarray, SMALL.make())).weights.sharding.memory_kind == "device"


def check_fetch(fetch, come: tuple[int, ...], share: float, dtype: str, unit: int) -> None:
    """Bit-equal to what it is without arrivals, though neither source is whole."""
    experts = make_store(SMALL.store_shape, dtype)
    store, arrivals = split(experts, come, share, unit)
    slots = jnp.full((NUM_SLOTS, *experts.shape[1:]), np.nan, dtype)
    wanted = np.array(slots)
    wanted[list(SLOT_IDS[:COUNT])] = np.asarray(experts)[list(EXPERT_IDS[:COUNT])]
    plan = (jnp.asarray(part, jnp.int32) for part in (EXPERT_IDS, SLOT_IDS, COUNT))
    assert_same_bits(fetch(store, slots, *plan, arrivals), wanted)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("share", SHARES.values(), ids=SHARES)
def test_the_reference_fetches_what_has_come_from_there(share: float, dtype: str) -> None:
    for come in COMERS:
        check_fetch(jax.jit(fetch_reference.fetch), come, share, dtype, SMALL.width)


@pytest.mark.parametrize(("dtype", "config"), CONFIGS.items(), ids=CONFIGS)
@pytest.mark.parametrize("share", SHARES.values(), ids=SHARES)
def test_the_kernel_fetches_what_has_come_from_there(share: float, dtype: str, config: Config) -> None:
    """Of tiles that are parts of rows, and that are several rows."""
    for come in COMERS:
        check_fetch(interpreted(fetch_kernel.fetch, config), come, share, dtype, tile_size(config, dtype))


def test_a_fetch_that_waits_takes_what_has_come_too() -> None:
    fetch = functools.partial(interpreted(fetch_kernel.fetch, CONFIGS["bfloat16"]), after=jnp.full((3, 5), jnp.nan))
    check_fetch(fetch, (2, 4), 1.6, "bfloat16", tile_size(CONFIGS["bfloat16"]))


def test_no_stage_is_overwritten_while_it_is_read_from_two_sources() -> None:
    config = Config(num_blocks=2, num_stages=2, tile_bytes=64)
    check_fetch(interpreted(fetch_kernel.fetch, config, detect_races=True), (2, 4), 1.6, "bfloat16", tile_size(config))
    assert not gpu_callbacks.get_races().races_found


def test_arrivals_are_no_matter_where_nothing_is_fetched() -> None:
    _, arrivals = split(make_store(SMALL.store_shape, SMALL.dtype), (2, 4), 1.6, SMALL.width)
    store, slots = (jnp.full((n, *SMALL.store_shape[1:]), np.nan, SMALL.dtype) for n in (SMALL.num_experts, NUM_SLOTS))
    plan = jnp.asarray(EXPERT_IDS), jnp.asarray(SLOT_IDS), jnp.asarray(0)
    for fetch in (fetch_reference.fetch, interpreted(fetch_kernel.fetch, CONFIGS["bfloat16"])):
        assert_same_bits(fetch(store, slots, *plan, arrivals), slots)


@pytest.mark.parametrize("donate", [False, True])
def test_what_a_prefetch_brings_is_what_a_fetch_takes(donate: bool) -> None:
    """In one program, with the store in host memory."""
    experts = make_store(SMALL.store_shape, SMALL.dtype)

    @functools.partial(jax.jit, donate_argnums=1 if donate else ())
    def run(store, slots):
        come = api.prefetch(store, *map(jnp.asarray, SMALL.make()))
        plan = (jnp.asarray(part, jnp.int32) for part in (EXPERT_IDS, SLOT_IDS, COUNT))
        return fetch_api.fetch(store, slots, *plan, come)

    slots = jnp.zeros((NUM_SLOTS, *experts.shape[1:]), experts.dtype)
    got = np.asarray(run(jax.device_put(experts, memory.host_sharding()), slots))
    assert_same_bits(got[list(SLOT_IDS[:COUNT])], np.asarray(experts)[list(EXPERT_IDS[:COUNT])])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"weights": jnp.zeros((2, 3, 8, 16), jnp.bfloat16)},
            r"arrivals bfloat16\[2, 3, 8, 16\] and slots .* one shape",
        ),
        ({"weights": jnp.zeros((2, 3, 8, 24))}, r"arrivals float32\[2, 3, 8, 24\] and slots bfloat16.* and dtype"),
        ({"expert_ids": jnp.zeros(1, jnp.int32)}, r"expert_ids \(1,\), num_rows \(2,\) and weights \(2, 3, 8, 24\)"),
        ({"num_rows": jnp.zeros(3, jnp.int32)}, r"num_rows \(3,\)"),
    ],
)
def test_arrivals_that_do_not_fit_are_refused(change: dict, message: str) -> None:
    experts = make_store(SMALL.store_shape, SMALL.dtype)
    store, arrivals = split(experts, (2, 4), 1.6, SMALL.width)
    plan = (jnp.asarray(part, jnp.int32) for part in (EXPERT_IDS, SLOT_IDS, COUNT))
    with pytest.raises(ValueError, match=f"fetch: .*{message}"):
        fetch_api.fetch(store, experts, *plan, dataclasses.replace(arrivals, **change))


def test_what_cannot_be_prefetched_is_refused() -> None:
    store, one = make_store(SMALL.store_shape, SMALL.dtype), jnp.zeros(1, jnp.int32)
    for shape in (0,), (1, 1):
        with pytest.raises(ValueError, match=r"prefetch: expert_ids \((0,|1, 1)\) and .* lists of at least one"):
            api.prefetch(store, jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.int32))
    with pytest.raises(ValueError, match=r"num_rows \(\) must be .* one number of rows for each expert"):
        api.prefetch(store, one, jnp.asarray(0))
    with pytest.raises(NotImplementedError, match=r"prefetch: mosaic_gpu cannot run here.*reference"):
        api.prefetch(store, one, one, implementation="mosaic_gpu")
