"""The expert MLP on a GPU, at true sizes, against float32 on the CPU, on fresh random inputs."""

import dataclasses
import functools
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.expert_mlp import mosaic_gpu, mosaic_gpu_fma, mosaic_gpu_prefill, mosaic_gpu_wgmma
from kernels_pallas.expert_mlp.api import choose, expert_mlp
from kernels_pallas.expert_mlp.mosaic_gpu_grouped import Config
from kernels_pallas.expert_mlp.specs import SPECS, ExpertMlpSpec

pytestmark = pytest.mark.gpu

TOLERANCE = {"bfloat16": 1e-2, "float16": 2e-3, "float32": 1e-5}  # of the norm; 16 bit rounds the hidden activations
BY_NAME = {spec.name: spec for spec in SPECS}
FORMS = (mosaic_gpu_fma, mosaic_gpu_wgmma)  # of decode steps
FORM_IDS = ("fma", "wgmma")


def swiglu_sum(x: np.ndarray, slots: np.ndarray, group_slots: np.ndarray, group_weights: np.ndarray) -> np.ndarray:
    """Of the groups that some row asks for, over its rows: the slots of the others may hold anything."""
    y = np.zeros(x.shape, np.float32)
    for slot, weights in zip(group_slots, group_weights, strict=True):
        rows = np.flatnonzero(weights)
        if rows.size:
            gate_weights, up, down = slots[slot].astype(np.float32)
            gate = x[rows] @ gate_weights.T
            y[rows] += weights[rows, None] * ((gate / (1 + np.exp(-gate)) * (x[rows] @ up.T)) @ down)
    return y


def make_inputs(spec: ExpertMlpSpec, seed: int) -> tuple[jax.Array, jax.Array]:
    key = jax.random.fold_in(jax.random.key(len(spec.name)), seed)
    x = jax.random.normal(key, spec.x_shape, spec.dtype)
    slots = jax.random.normal(jax.random.fold_in(key, 1), spec.slots_shape, spec.dtype)
    return x, slots * jnp.asarray(0.02, spec.dtype)


def check(run, spec: ExpertMlpSpec, x, slots, group_slots, group_weights) -> None:
    with jax.default_matmul_precision("highest" if spec.dtype == "float32" else "default"):
        y = np.asarray(jax.jit(run)(x, slots, jnp.asarray(group_slots), jnp.asarray(group_weights)))
    expected = swiglu_sum(np.asarray(x, np.float32), np.asarray(slots), group_slots, group_weights)
    assert np.isfinite(y).all()
    assert np.linalg.norm(y - expected) <= TOLERANCE[spec.dtype] * np.linalg.norm(expected)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_expert_mlp_equals_float32_on_the_cpu(spec: ExpertMlpSpec) -> None:
    check(expert_mlp, spec, *make_inputs(spec, 0), *spec.groups(seed=1))


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_the_kernels_run_where_they_can(spec: ExpertMlpSpec) -> None:
    x, slots = (jax.ShapeDtypeStruct(shape, spec.dtype) for shape in (spec.x_shape, spec.slots_shape))
    few = spec.num_rows <= mosaic_gpu.MAX_ROWS
    cannot = (spec.dtype == "float32" and spec.num_rows > 4) or (spec.width == 2880 and few)
    assert choose(None, x, slots) == ("reference" if cannot else "mosaic_gpu")


@pytest.mark.parametrize("num_rows", [1, 2, 4, 8, 9, 25, 32])
@pytest.mark.parametrize("form", FORMS, ids=FORM_IDS)
def test_both_forms_at_every_number_of_rows(form: ModuleType, num_rows: int) -> None:
    """Slots that nobody asks for are NaN: nothing of them may get into a product."""
    if num_rows > form.MAX_ROWS:
        pytest.skip(f"this form takes at most {form.MAX_ROWS} rows")
    sizes = tuple(max(0, num_rows - n) if n % 3 else n % 2 for n in range(11))
    spec = ExpertMlpSpec(
        name="random", num_slots=12, num_hidden=448, width=1280, num_rows=num_rows, group_sizes=sizes, dtype="bfloat16"
    )
    for seed in range(6):
        x, slots = make_inputs(spec, seed)
        group_slots, group_weights = spec.groups(seed)
        asked = group_slots[group_weights.any(axis=1)]
        unasked = np.setdiff1d(np.arange(spec.num_slots), asked)
        group_slots[~group_weights.any(axis=1)] = unasked[0]
        check(form.expert_mlp, spec, x, slots.at[unasked].set(jnp.nan), group_slots, group_weights)


@pytest.mark.parametrize(
    ("num_rows", "num_hidden", "width", "bounded"),
    [(33, 448, 1280, False), (65, 128, 576, True), (200, 768, 2048, False), (517, 448, 1280, True)],
)
@pytest.mark.parametrize("num_warpgroups", [1, 2])
def test_the_prefill_form_at_many_numbers_of_rows(
    num_warpgroups: int, num_rows: int, num_hidden: int, width: int, bounded: bool
) -> None:
    """Tiles of 128, 192 and 256 columns. Slots that nobody asks for are NaN: nothing of them may get into a sum."""
    sizes = tuple(max(0, num_rows - 31 * n) if n % 3 else n % 2 for n in range(11))
    spec = ExpertMlpSpec(
        name="many",
        num_slots=12,
        num_hidden=num_hidden,
        width=width,
        num_rows=num_rows,
        group_sizes=sizes,
        dtype="bfloat16",
    )
    bound = spec.max_groups_per_row if bounded else None
    run = functools.partial(
        mosaic_gpu_prefill.expert_mlp, config=Config(num_warpgroups=num_warpgroups), max_groups_per_row=bound
    )
    for seed in range(3):
        x, slots = make_inputs(spec, seed)
        group_slots, group_weights = spec.groups(seed)
        unasked = np.setdiff1d(np.arange(spec.num_slots), group_slots[group_weights.any(axis=1)])
        group_slots[~group_weights.any(axis=1)] = unasked[0]
        check(run, spec, x, slots.at[unasked].set(jnp.nan), group_slots, group_weights)


def test_a_row_of_a_prefill_is_the_same_alone_and_in_any_tiles() -> None:
    spec = BY_NAME["prefill_512"]
    x, slots = make_inputs(spec, 5)
    group_slots, group_weights = map(jnp.asarray, spec.groups(seed=5))
    together = np.asarray(mosaic_gpu_prefill.expert_mlp(x, slots, group_slots, group_weights))
    for config in (Config(num_warpgroups=1), Config(num_warpgroups=2), Config(num_blocks=7)):
        run = functools.partial(mosaic_gpu_prefill.expert_mlp, config=config, max_groups_per_row=8)
        np.testing.assert_array_equal(run(x, slots, group_slots, group_weights), together)
    part = mosaic_gpu_prefill.expert_mlp(x[100:140], slots, group_slots, group_weights[:, 100:140])
    np.testing.assert_array_equal(part, together[100:140])


@pytest.mark.parametrize(
    "name", ["qwen3_30b_decode", "two_rows", "batch_of_4", "batch_of_32", "batch_of_4_float32", "prefill_512"]
)
def test_the_same_groups_give_the_same_bits(name: str) -> None:
    """Again and again, wherever their weights lie, and beside groups that nobody asks for."""
    spec = BY_NAME[name]
    x, slots = make_inputs(spec, 3)
    group_slots, group_weights = map(jnp.asarray, spec.groups(seed=3))
    run = jax.jit(expert_mlp)
    first = np.asarray(run(x, slots, group_slots, group_weights))
    for _ in range(20):
        np.testing.assert_array_equal(run(x, slots, group_slots, group_weights), first)
    order = np.random.default_rng(0).permutation(spec.num_slots)
    elsewhere = jnp.asarray(np.argsort(order), jnp.int32)[group_slots]
    np.testing.assert_array_equal(run(x, slots[order], elsewhere, group_weights), first)
    at = np.arange(0, 2 * spec.num_groups, 2)
    wide_slots = jnp.zeros(2 * spec.num_groups, jnp.int32).at[at].set(group_slots)
    wide_weights = jnp.zeros((2 * spec.num_groups, spec.num_rows), jnp.float32).at[at].set(group_weights)
    np.testing.assert_array_equal(run(x, slots, wide_slots, wide_weights), first)


@pytest.mark.parametrize("form", [*FORMS, mosaic_gpu_prefill], ids=(*FORM_IDS, "prefill"))
def test_many_calls_in_one_program(form: ModuleType) -> None:
    """As a decode does: each call waits for the one before, and none leaves anything behind in shared memory."""
    spec = dataclasses.replace(BY_NAME["two_rows"], num_slots=24, num_hidden=192, width=512)
    x, slots = make_inputs(spec, 0)
    calls = [tuple(map(jnp.asarray, spec.groups(seed))) for seed in range(24)]

    @jax.jit
    def together(x, slots):
        outs = []
        for group_slots, group_weights in calls:
            outs.append(form.expert_mlp(x, slots, group_slots, group_weights))
            x = jnp.where(outs[-1][0, 0] > 1e30, 0, x)  # the next call needs this one, and x stays what it is
        return outs

    alone, outs = jax.jit(form.expert_mlp), together(x, slots)
    for out, (group_slots, group_weights) in zip(outs, calls, strict=True):
        np.testing.assert_array_equal(out, alone(x, slots, group_slots, group_weights))
