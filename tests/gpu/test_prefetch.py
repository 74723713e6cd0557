"""The prefetch on a GPU: the bits it was asked for, and beside other work the same results as without it."""

import dataclasses
import functools
import itertools
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe import memory
from jmoe.experts.look_ahead import count
from kernels_pallas.admit import api
from kernels_pallas.admit import reference as admission
from kernels_pallas.admit.specs import SPECS as ADMIT_SPECS
from kernels_pallas.expert_mlp import read_through
from kernels_pallas.expert_mlp.api import expert_mlp
from kernels_pallas.fetch.api import fetch
from kernels_pallas.prefetch.api import COMPILER_OPTIONS, now, prefetch, resolve
from kernels_pallas.prefetch.arrivals import share_out
from kernels_pallas.prefetch.specs import SPECS, PrefetchSpec
from tests import models
from tests.gpu.test_engine import CONFIG, GREEDY, OPTIONS, PROMPTS
from tests.gpu.test_fetch import bits, random_bits
from tests.kernels.test_prefetch import rows_of

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("brings_all_guesses")]

MOST = 12  # experts of a test
SHAPE = (3, 768, 2048)
PLAN = dataclasses.replace(next(spec for spec in ADMIT_SPECS if spec.name == "qwen3_30b"), num_experts=16, num_slots=10)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_the_first_rows_come_and_nothing_else_is_promised(spec: PrefetchSpec) -> None:
    assert resolve(None) == "mosaic_gpu"
    spec = dataclasses.replace(spec, num_experts=min(spec.num_experts, MOST))
    store = random_bits(spec.store_shape, spec.dtype, 0)
    jitted, on_host = jax.jit(prefetch), jax.device_put(store, memory.host_sharding())
    for seed in range(3):
        expert_ids, num_rows = spec.make(seed)
        come = jitted(on_host, jnp.asarray(expert_ids), jnp.asarray(num_rows))
        np.testing.assert_array_equal(come.expert_ids, expert_ids)
        np.testing.assert_array_equal(come.num_rows, num_rows)
        for entry, rows in enumerate(num_rows):
            if rows:
                wanted = rows_of(bits(store))[expert_ids[entry], :rows]
                np.testing.assert_array_equal(rows_of(bits(come.weights))[entry, :rows], wanted)


def in_one_pass(x, store, slots, plan, come):
    return read_through.expert_mlp(x, store, slots, plan, come)


def in_two_steps(x, store, slots, plan, come):
    slots = fetch(store, slots, plan.plan_experts, plan.plan_slots, plan.count, come)
    return expert_mlp(x, slots, plan.group_slots, plan.group_weights), slots


DEMANDS = [in_one_pass, in_two_steps]


def program(demand):
    """Four times: guess from x, prefetch while a chain of products runs, then what `demand` does."""

    @functools.partial(jax.jit, donate_argnums=2, compiler_options=COMPILER_OPTIONS)
    def run(x, store, slots, plans, guesses, num_rows, chain):
        for plan, guess in zip(plans, guesses, strict=True):
            rows = share_out(num_rows, guess.size, 3 * store.shape[2])
            come = prefetch(store, guess, jnp.where(x[0, 0] > jnp.inf, 0, rows), x)  # known when x is
            for weights in chain:
                x = jnp.tanh(x @ weights)
            y, slots = demand(x, store, slots, plan, come)
            x = x + y.astype(x.dtype)
        return x, slots

    return run


def experts_and_plans(seed: int, num_plans: int):
    """Sixteen experts, plans that admit some of them, and two guesses for each: right ones where that many are."""
    rng = np.random.default_rng(seed)
    inputs = [PLAN.make(10 * seed + layer) for layer in range(num_plans)]
    plans = [admission.admit(*map(jnp.asarray, one)) for one in inputs]
    fetched = [np.asarray(plan.plan_experts)[: int(plan.count)] for plan in plans]
    guesses = [np.append(ids, np.setdiff1d(rng.permutation(PLAN.num_experts), ids))[:2] for ids in fetched]
    return plans, [jnp.asarray(rng.permutation(guess), jnp.int32) for guess in guesses]


def random_experts(num_experts: int, seed: int) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=(num_experts, *SHAPE)) / 50).astype(jnp.bfloat16)


@pytest.mark.parametrize("demand", DEMANDS)
def test_a_prefetch_beside_other_work_changes_nothing(demand) -> None:
    """Against the same program with no row to bring, and the slots against the plans."""
    rng, experts, first = np.random.default_rng(0), random_experts(PLAN.num_experts, 1), random_experts(10, 2)
    chain = [jnp.asarray(rng.normal(size=(SHAPE[2], SHAPE[2])) / 45, jnp.bfloat16) for _ in range(6)]
    store, run = jax.device_put(experts, memory.host_sharding()), program(demand)
    for seed in range(20):
        plans, guesses = experts_and_plans(seed, 4)
        x = jnp.asarray(rng.normal(size=(1, SHAPE[2])), jnp.bfloat16)
        wanted, _ = run(x, store, jnp.asarray(first), plans, guesses, jnp.asarray(0), chain)
        num_rows = jnp.asarray(rng.integers(1, 5000))
        y, slots = run(x, store, jnp.asarray(first), plans, guesses, num_rows, chain)
        np.testing.assert_array_equal(bits(y), bits(wanted))
        wanted_slots = first.copy()
        for plan in plans:
            count = int(plan.count)
            wanted_slots[np.asarray(plan.plan_slots)[:count]] = experts[np.asarray(plan.plan_experts)[:count]]
        np.testing.assert_array_equal(bits(slots), bits(wanted_slots))


@pytest.mark.parametrize("demand", DEMANDS)
def test_what_has_come_makes_the_bits_of_what_is_fetched(demand) -> None:
    """Against the kernels that know of no arrivals; the store that is read beside the arrivals lacks their rows."""
    experts, first = random_experts(PLAN.num_experts, 1), random_experts(10, 2)
    store, jitted = jax.device_put(experts, memory.host_sharding()), jax.jit(demand)
    for seed, num_rows in enumerate((0, 1, 100, 1152, 2304, 3000, 10000)):
        (plan,), (guess,) = experts_and_plans(seed, 1)
        come = jax.jit(prefetch)(store, guess, share_out(jnp.asarray(num_rows), 2, 3 * SHAPE[1]))
        left = experts.copy()
        for expert, rows in zip(np.asarray(come.expert_ids), np.asarray(come.num_rows), strict=True):
            rows_of(left)[expert, : rows // 64 * 64] = np.nan  # whole tiles of either kernel
        x = jnp.asarray(np.random.default_rng(seed).normal(size=(1, SHAPE[2])), jnp.bfloat16)
        y, slots = jitted(x, jax.device_put(left, memory.host_sharding()), jnp.asarray(first), plan, come)
        wanted, wanted_slots = jitted(x, store, jnp.asarray(first), plan, None)
        np.testing.assert_array_equal(bits(y), bits(wanted))
        np.testing.assert_array_equal(bits(slots), bits(wanted_slots))


# When it comes


def ns_between(first, then) -> int:
    """On a clock of 32 bits."""
    return (int(then) - int(first)) % 2**32


def test_the_clock_counts_ns() -> None:
    first = now(jnp.asarray(0)).block_until_ready()
    times = [first]
    for _ in range(10):
        times.append(now(times[-1]))
    assert all(0 < ns_between(*two) < 1e9 for two in itertools.pairwise(times))
    start = time.perf_counter()
    before, known = now(first).block_until_ready(), time.perf_counter()
    time.sleep(0.2)
    slept = time.perf_counter() - known
    after = now(first).block_until_ready()
    took = time.perf_counter() - start  # other programs on the device may come before either reading, or after
    assert 0.99e9 * slept < ns_between(before, after) < 1.01e9 * took


def test_an_admission_says_when_it_was_made() -> None:
    admit = jax.jit(api.admit)
    for seed in range(10):
        inputs = [jnp.asarray(each) for each in PLAN.make(seed)]
        before = now(inputs[0]).block_until_ready()
        known_at = admit(*inputs).known_at.block_until_ready()
        after = now(known_at)
        if seed:  # once they are compiled, which takes longer than the clock counts
            assert 0 < ns_between(before, known_at) < ns_between(before, after) < 1e9


@functools.partial(jax.jit, compiler_options=COMPILER_OPTIONS)
def timed(store, expert_ids, num_rows):
    before = now(expert_ids)
    come = prefetch(store, expert_ids, num_rows, before)
    return before, come, now(come.weights)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_the_tiles_that_come_are_timed_and_no_others(spec: PrefetchSpec) -> None:
    """What the times of others are is anything, but not each time one of this copy. After all that is late, or none."""
    spec = dataclasses.replace(spec, num_experts=min(spec.num_experts, MOST))
    store = jax.device_put(random_bits(spec.store_shape, spec.dtype, 0), memory.host_sharding())
    needed, always = jnp.ones((1, spec.num_experts), bool), True
    for seed in range(4):
        before, come, after = timed(store, *map(jnp.asarray, spec.make(seed)))
        assert come.came_at is not None
        since = np.asarray(come.came_at).reshape(-1).view(np.uint32) - np.asarray(before).view(np.uint32)
        always &= since <= ns_between(before, after)
        for known_at, share in ((before, 1), (after, 0)):
            made = count([come], needed, [known_at])
            assert int(made.late[0]) == share * int(made.useful[0])
        assert int(made.useful[0]) == int(jnp.sum(come.num_rows))
    num_parts = come.came_at.shape[1]
    elements = int(jnp.sum(come.num_rows)) * spec.width
    tile_size = 3 * spec.num_hidden * spec.width // num_parts
    np.testing.assert_array_equal(always, np.arange(always.size) < -(-elements // tile_size))


@pytest.mark.parametrize(
    "runtime",
    [
        {"expert_slots": 5, "prefetch": "lookahead", "prefetch_experts": 1.6},
        {"expert_slots": 5, "prefetch": "both"},
        {"expert_slots": 12, "batch_size": 3, "prefetch": "lookahead"},
    ],
    ids=str,
)
def test_what_was_late_is_a_part_of_what_was_useful(runtime: dict) -> None:
    generation = models.engine(CONFIG, **{**OPTIONS, **runtime}).generate(PROMPTS, GREEDY)
    generation.results()
    came = generation.stats.prefetch
    assert came is not None
    assert came.late_bytes is not None
    assert 0 <= came.late_bytes <= came.useful_bytes
    assert came.useful_bytes > 0


def test_it_is_automatic_here() -> None:
    """Of two experts a layer, since one comes in less time than a guess takes."""
    two, one = (models.engine(CONFIG, expert_slots=5, prefetch_experts=most, **OPTIONS) for most in (2, 1))
    assert two.runtime.prefetch == "lookahead"
    assert two.prefetching is not None
    assert one.runtime.prefetch == "off"


def test_without_kernels_nobody_knows_what_was_late() -> None:
    runtime = {"expert_slots": 5, "prefetch": "lookahead", "prefetch_experts": 1.6, "implementation": "reference"}
    generation = models.engine(CONFIG, **{**OPTIONS, **runtime}).generate(PROMPTS, GREEDY)
    generation.results()
    assert generation.stats.prefetch is not None
    assert generation.stats.prefetch.late_bytes is None
