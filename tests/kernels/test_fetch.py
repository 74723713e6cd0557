"""The fetch: its reference, its Mosaic GPU kernel interpreted on the CPU, and what its api refuses."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import export
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks  # the races found have no public name
from jax.experimental.pallas import mosaic_gpu as plgpu

from jmoe import memory
from kernels_pallas import backends
from kernels_pallas.fetch import api, mosaic_gpu, reference
from kernels_pallas.fetch.specs import SPECS, FetchSpec
from kernels_pallas.tile_ring import TMA_ALIGNMENT, TMA_MAX_BOX, Config, tiling

SMALL = FetchSpec(name="small", num_experts=6, num_hidden=8, width=24, num_slots=5, plan_size=5, count=3)
SCALED = [spec.scaled(64) for spec in SPECS]
NAMES = [spec.name for spec in SPECS]


def make_store(spec: FetchSpec, seed: int = 0) -> jax.Array:
    """Every element tells its expert and place, so that nothing can be mixed up unseen."""
    values = np.random.default_rng(seed).normal(size=spec.store_shape)
    return jnp.asarray(values, spec.dtype)


def expected(store, slots, expert_ids, slot_ids, count: int) -> np.ndarray:
    out = np.array(slots)
    for entry in range(count):
        out[slot_ids[entry]] = np.asarray(store)[expert_ids[entry]]
    return out


def assert_same_bits(got, wanted: np.ndarray) -> None:
    """NaNs too, which numpy compares in no other way in bfloat16."""
    np.testing.assert_array_equal(np.asarray(got).view(np.uint8), wanted.view(np.uint8))


@functools.cache
def interpreted(config: Config, detect_races: bool = False):
    """The kernel, on device arrays."""
    interpret = plgpu.InterpretGPUParams(detect_races=detect_races)
    return jax.jit(functools.partial(mosaic_gpu.fetch, config=config, interpret=interpret))


def check(fetch, spec: FetchSpec, *, poison: bool = True) -> None:
    """Against numpy, bit for bit. All slots, and all experts that the plan does not name, are NaN before."""
    expert_ids, slot_ids, count = spec.plan()
    store = make_store(spec)
    unnamed = np.ones(spec.num_experts, bool)
    unnamed[expert_ids[: spec.count]] = False
    store = jnp.where(unnamed[:, None, None, None] & poison, jnp.asarray(np.nan, store.dtype), store)
    slots = jnp.full(spec.slots_shape, np.nan, spec.dtype)
    before = expected(store, slots, expert_ids, slot_ids, spec.count)
    got = np.asarray(fetch(store, slots, *map(jnp.asarray, (expert_ids, slot_ids, count))))
    assert got.dtype == before.dtype
    assert_same_bits(got, before)
    untouched = np.isnan(got.astype(np.float32)).all(axis=(1, 2, 3))
    assert untouched.sum() == spec.num_slots - spec.count


@pytest.mark.parametrize("spec", SCALED, ids=NAMES)
def test_the_reference_copies_what_the_plan_says(spec: FetchSpec) -> None:
    check(reference.fetch, spec)


@pytest.mark.parametrize("spec", SCALED, ids=NAMES)
def test_the_kernel_copies_what_the_plan_says(spec: FetchSpec) -> None:
    check(interpreted(Config(num_blocks=2)), spec)


@pytest.mark.parametrize(
    "config",
    [
        Config(num_blocks=1, num_stages=2, tile_bytes=64),
        Config(num_blocks=1, num_stages=3, tile_bytes=128),
        Config(num_blocks=3, num_stages=2, tile_bytes=384),
        Config(num_blocks=5, num_stages=4, tile_bytes=2**20),  # more blocks than tiles
    ],
    ids=str,
)
def test_every_configuration_copies_the_same(config: Config) -> None:
    """One compilation each: the count is read on the device."""
    spec = SMALL
    expert_ids, slot_ids = np.array([5, 0, 3, 1, 4], np.int32), np.array([1, 4, 0, 3, 2], np.int32)
    store, slots = make_store(spec), jnp.full(spec.slots_shape, np.nan, spec.dtype)
    for count in (0, 1, 5):
        got = interpreted(config)(store, slots, expert_ids, slot_ids, jnp.asarray(count, jnp.int32))
        assert_same_bits(got, expected(store, slots, expert_ids, slot_ids, count))


@pytest.mark.parametrize("wrong", [{"num_stages": 1}, {"num_stages": 0}, {"num_blocks": 0}])
def test_a_configuration_that_would_wait_for_ever_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="=".join(map(str, *wrong.items()))):
        Config(**wrong)


@pytest.mark.parametrize("num_stages", [2, 3, 4])
def test_no_stage_is_overwritten_while_it_is_read(num_stages: int) -> None:
    """The interpreter models loads and stores in flight, and sees two that nothing orders."""
    check(interpreted(Config(num_blocks=2, num_stages=num_stages, tile_bytes=64), detect_races=True), SMALL)
    assert not gpu_callbacks.get_races().races_found


def test_what_it_waits_for_is_not_read() -> None:
    waited_for = jnp.full((3, 5), jnp.nan)
    for fetch in (interpreted(Config(num_blocks=2, tile_bytes=64)), jax.jit(api.fetch)):
        check(functools.partial(fetch, after=waited_for), SMALL)


def test_one_expert_may_go_to_several_slots() -> None:
    store, slots = make_store(SMALL), jnp.zeros(SMALL.slots_shape, SMALL.dtype)
    ids, at, count = jnp.asarray([2, 2]), jnp.asarray([4, 0]), jnp.asarray(2)
    for fetch in (reference.fetch, interpreted(Config(num_blocks=2))):
        np.testing.assert_array_equal(
            fetch(store, slots, ids, at, count)[jnp.asarray([4, 0])], store[jnp.asarray([2, 2])]
        )


@given(
    num_elements=st.integers(1, 4096).map(lambda n: 8 * n) | st.sampled_from([3 * 768 * 2048, 3 * 1408 * 2048]),
    itemsize=st.sampled_from([2, 4]),
    tile_bytes=st.integers(16, 2**17),
)
def test_tiles_cut_an_expert_evenly(num_elements: int, itemsize: int, tile_bytes: int) -> None:
    tile = tiling(num_elements, itemsize, tile_bytes)
    assert tile.num_tiles * tile.rows * tile.columns == num_elements
    assert max(tile.rows, tile.columns) <= TMA_MAX_BOX
    assert tile.columns * itemsize % TMA_ALIGNMENT == 0
    assert tile.rows == 1 or tile.rows * tile.columns * itemsize <= tile_bytes


@given(elements=st.integers(1, 10**5), itemsize=st.sampled_from([2, 4]))
def test_sizes_that_tma_cannot_copy_are_refused(elements: int, itemsize: int) -> None:
    if elements * itemsize % TMA_ALIGNMENT == 0:
        assert tiling(elements, itemsize, 2**15).columns * itemsize % TMA_ALIGNMENT == 0
    else:
        with pytest.raises(NotImplementedError, match=f"{elements} elements of {itemsize} bytes.*'reference'"):
            tiling(elements, itemsize, 2**15)


@pytest.mark.parametrize("spec", SPECS, ids=NAMES)
def test_real_experts_are_cut_into_large_tiles(spec: FetchSpec) -> None:
    """Tiles of a few hundred bytes would leave the link idle, whatever the number of stages."""
    tile = tiling(math.prod(spec.expert_shape), jnp.dtype(spec.dtype).itemsize, Config().tile_bytes)
    assert tile.rows * tile.columns * jnp.dtype(spec.dtype).itemsize >= Config().tile_bytes // 4
    assert tile.columns >= 128


@pytest.mark.parametrize("spec", SPECS, ids=NAMES)
def test_the_kernel_compiles_for_cuda_at_its_true_size(spec: FetchSpec) -> None:
    shapes = [(spec.store_shape, spec.dtype), (spec.slots_shape, spec.dtype)]
    plan = [((spec.plan_size,), "int32"), ((spec.plan_size,), "int32"), ((), "int32")]
    arguments = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes + plan]
    exported = export.export(jax.jit(mosaic_gpu.fetch), platforms=["cuda"])(*arguments)
    assert "mosaic_gpu" in exported.mlir_module()


@pytest.mark.parametrize("donate", [False, True])
def test_the_store_may_lie_in_host_memory(donate: bool) -> None:
    spec = SMALL
    expert_ids, slot_ids, count = spec.plan()
    store = jax.device_put(make_store(spec), memory.host_sharding())
    empty = np.zeros(spec.slots_shape, spec.dtype)
    slots = jax.device_put(empty, memory.device_sharding())
    fetch = jax.jit(api.fetch, donate_argnums=1 if donate else (), static_argnames="implementation")
    out = fetch(store, slots, expert_ids, slot_ids, count, implementation="reference")
    assert out.sharding.memory_kind == "device"
    assert slots.is_deleted() == donate
    assert_same_bits(out, expected(store, empty, expert_ids, slot_ids, spec.count))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"slots": jnp.zeros((5, 3, 8, 16), jnp.bfloat16)}, r"bfloat16\[5, 3, 8, 16\] must hold experts of one shape"),
        ({"slots": jnp.zeros((5, 3, 8, 24), jnp.float32)}, r"slots float32\[5, 3, 8, 24\] must hold .* and dtype"),
        ({"expert_ids": jnp.zeros(4, jnp.int32)}, r"expert_ids \(4,\) and slot_ids \(5,\) must be equally long"),
        ({"expert_ids": jnp.zeros((5, 1), jnp.int32)}, r"expert_ids \(5, 1\)"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict, message: str) -> None:
    expert_ids, slot_ids, count = map(jnp.asarray, SMALL.plan())
    arguments = {"store": make_store(SMALL), "slots": jnp.zeros(SMALL.slots_shape, SMALL.dtype)}
    arguments |= {"expert_ids": expert_ids, "slot_ids": slot_ids, "count": count}
    with pytest.raises(ValueError, match=message):
        api.fetch(**{**arguments, **changes})


def test_the_choice_of_an_implementation() -> None:
    assert api.resolve(None) == api.resolve("reference") == "reference"
    with pytest.raises(ValueError, match="fetch: unknown implementation 'triton'; expected one of reference, mosaic"):
        api.resolve("triton")
    with pytest.raises(
        NotImplementedError, match=r"mosaic_gpu cannot run here: the default device is a cpu.*reference"
    ):
        api.resolve("mosaic_gpu")


class _Device:
    """A device of JAX, as far as the choice looks at it."""

    def __init__(self, platform: str, capability: str | None = None):
        self.platform = platform
        if capability:
            self.compute_capability = capability


@pytest.mark.parametrize(
    ("device", "problem"),
    [
        (_Device("gpu", "9.0"), None),
        (_Device("gpu", "10.3"), None),
        (_Device("gpu", "8.9"), "compute capability 8.9 is below 9.0 (Hopper)"),
        (_Device("gpu"), "compute capability 0.0 is below 9.0 (Hopper)"),
        (_Device("cpu"), "the default device is a cpu, not a GPU"),
    ],
)
def test_a_device_without_tma_gets_the_reference(device, problem, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends.jax, "devices", lambda: [device])
    assert backends.mosaic_gpu_problem() == problem
    implementations = {"reference": None, "mosaic_gpu": None}
    assert backends.resolve("op", implementations, None) == ("reference" if problem else "mosaic_gpu")
    assert backends.resolve("op", {"reference": None}, None) == "reference"
    if problem:
        with pytest.raises(NotImplementedError, match="op: mosaic_gpu cannot run here"):
            backends.resolve("op", implementations, "mosaic_gpu")
