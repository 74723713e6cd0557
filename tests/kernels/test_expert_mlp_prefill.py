"""The prefill form of the expert MLP, interpreted on the CPU, and the lists of rows that it goes by."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import export
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks  # the races found have no public name
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.expert_mlp import mosaic_gpu, mosaic_gpu_prefill, row_lists
from kernels_pallas.expert_mlp.mosaic_gpu_grouped import SHARED_BYTES, Config, stages
from kernels_pallas.expert_mlp.specs import SPECS, ExpertMlpSpec
from tests.kernels.test_expert_mlp import expected, make_inputs

ONE = ExpertMlpSpec(
    name="one_warpgroup", num_slots=6, num_hidden=128, width=192, num_rows=66, group_sizes=(1,) * 4, dtype="bfloat16"
)
TWO = dataclasses.replace(ONE, name="two_warpgroups", num_rows=130, num_hidden=64, width=64, dtype="float16")
CASES = {ONE: Config(num_blocks=2, num_warpgroups=1), TWO: Config(num_blocks=2, num_warpgroups=2)}
TOLERANCE = {"bfloat16": 1e-2, "float16": 2e-3}  # of the largest output; hidden values and shares of y are rounded


@functools.cache
def interpreted(spec: ExpertMlpSpec, bound: int | None = None):
    """The form on few blocks, so that each has several items; one compilation a case.

    What is not written is NaN here, and the interpreter sees a tile that is overwritten while it may still be read.
    """
    interpret = plgpu.InterpretGPUParams(detect_races=True)
    return functools.partial(
        mosaic_gpu_prefill.expert_mlp, config=CASES[spec], interpret=interpret, max_groups_per_row=bound
    )


@functools.cache
def inputs(spec: ExpertMlpSpec) -> tuple[jax.Array, jax.Array]:
    return make_inputs(spec)


def weights_of(spec: ExpertMlpSpec, sizes: tuple[int, ...]) -> np.ndarray:
    sizes = tuple(min(size, spec.num_rows) for size in sizes)
    return dataclasses.replace(spec, group_sizes=sizes).groups()[1]


@pytest.mark.parametrize("sizes", [(999, 1, 0, 65), (0, 9, 0, 0), (0, 0, 0, 0)], ids=str)
@pytest.mark.parametrize("spec", CASES, ids=lambda spec: spec.name)
def test_the_form_is_the_formula(spec: ExpertMlpSpec, sizes: tuple[int, ...]) -> None:
    """Slots that nobody asks for are NaN, also where a group of weights 0 names one: they must not be read."""
    x, slots = inputs(spec)
    weights, group_slots = weights_of(spec, sizes), np.array([4, 0, 5, 2], np.int32)
    unasked = np.setdiff1d(np.arange(spec.num_slots), group_slots[weights.any(axis=1)])
    group_slots[~weights.any(axis=1)] = unasked[0]
    wanted = expected(x, slots, group_slots, weights)
    got = interpreted(spec)(x, slots.at[unasked].set(jnp.nan), jnp.asarray(group_slots), jnp.asarray(weights))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, wanted, rtol=0, atol=TOLERANCE[spec.dtype] * np.abs(wanted).max())
    assert not gpu_callbacks.get_races().races_found


def test_neither_slots_nor_other_rows_nor_the_callers_word_change_a_bit() -> None:
    x, slots = inputs(ONE)
    weights = weights_of(ONE, (3, 40, 0, 9))
    first = np.asarray(interpreted(ONE)(x, slots, jnp.asarray([4, 1, 0, 5]), jnp.asarray(weights)))
    elsewhere = interpreted(ONE)(x, slots[::-1], jnp.asarray([3, 1, 4, 0]), jnp.asarray(weights[[2, 0, 1, 3]]))
    np.testing.assert_array_equal(elsewhere, first)
    weights[:, 20:] = 0
    fewer = interpreted(ONE, bound=2)(x, slots, jnp.asarray([4, 1, 0, 5]), jnp.asarray(weights))
    np.testing.assert_array_equal(fewer, np.where(np.arange(ONE.num_rows)[:, None] < 20, first, 0))


@settings(deadline=None, max_examples=10)
@given(
    sizes=st.lists(st.integers(0, 37), min_size=5, max_size=5),
    bound=st.sampled_from([1, 3, 5]),
    tile_rows=st.sampled_from([64, 128]),
    seed=st.integers(0, 99),
)
def test_the_lists_are_those_of_plain_python(sizes: list[int], bound: int, tile_rows: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    weights = np.stack([rng.permutation(37) < size for size in sizes]) * rng.uniform(0.1, 1, (5, 37))
    lists = jax.jit(row_lists.row_lists, static_argnums=(1, 2))(jnp.asarray(weights, jnp.float32), bound, tile_rows)
    lists = jax.tree.map(np.asarray, lists)
    kept = (weights != 0) & (np.cumsum(weights != 0, axis=0) <= bound)
    place, tiles = 0, []
    for group, rows in enumerate(map(np.flatnonzero, kept)):
        assert lists.starts[group] == place
        np.testing.assert_array_equal(lists.tokens[place : place + len(rows)], rows)
        assert lists.sizes[group] == -(-len(rows) // 8) * 8
        assert lists.first_tiles[group] == len(tiles)
        tiles += [group] * -(-len(rows) // tile_rows)
        place += lists.sizes[group]
    assert lists.first_tiles[5] == len(tiles)
    np.testing.assert_array_equal(lists.groups[: len(tiles)], tiles)
    assert place + tile_rows - 8 <= len(lists.tokens)
    assert 0 <= lists.groups.min() <= lists.groups.max() < 5
    for row in range(37):
        groups = np.flatnonzero(kept[:, row])
        at, weight = lists.places[row], lists.weights[row]
        assert lists.counts[row] == len(groups)
        np.testing.assert_array_equal(weight[: len(groups)], weights[groups, row].astype(np.float32))
        assert not weight[len(groups) :].any()
        at = at[: len(groups)]
        assert (lists.tokens[at] == row).all()
        assert (lists.starts[groups] <= at).all()
        assert (at < lists.starts[groups] + lists.sizes[groups]).all()


@given(st.integers(1, 9000), st.integers(1, 200), st.integers(1, 20), st.sampled_from([64, 128]), st.randoms())
def test_the_lists_have_room_for_the_worst(rows: int, groups: int, per_row: int, tile_rows: int, random) -> None:
    """Group sizes that leave as much unused as can be, or are drawn."""
    per_row = min(per_row, groups)
    left = rows * per_row
    sizes = []
    for _ in range(groups):
        sizes.append(min(left, rows, random.choice([1, 9, rows, random.randint(0, rows)])))
        left -= sizes[-1]
    filled = [-(-size // 8) * 8 for size in sizes]
    places = row_lists.num_places(rows, groups, per_row, tile_rows)
    assert sum(filled) + tile_rows - 8 <= places
    assert places % 8 == 0
    assert sum(-(-size // tile_rows) for size in filled) <= row_lists.num_tiles(rows, groups, per_row, tile_rows)


BY_NAME = {spec.name: spec for spec in SPECS}


@pytest.mark.parametrize("name", ["prefill_512", "prefill_8192", "gpt_oss_20b_like_prefill"])
def test_the_kernels_compile_for_cuda_at_true_sizes(name: str) -> None:
    spec = BY_NAME[name]
    shapes = [(spec.x_shape, spec.dtype), (spec.slots_shape, spec.dtype)]
    groups = [((spec.num_groups,), "int32"), ((spec.num_groups, spec.num_rows), "float32")]
    arguments = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes + groups]
    call = functools.partial(mosaic_gpu.expert_mlp, max_groups_per_row=spec.max_groups_per_row)
    exported = export.export(jax.jit(call), platforms=["cuda"])(*arguments)
    assert str(exported.mlir_module()).count("custom_call @mosaic_gpu_v2") == 4


def test_the_tiles_that_are_chosen() -> None:
    def warpgroups(num_rows: int, num_groups: int, per_row: int | None) -> int:
        return mosaic_gpu_prefill.config_of(num_rows, num_groups, per_row).num_warpgroups

    assert warpgroups(512, 128, 8) == warpgroups(512, 128, None) == warpgroups(33, 128, 8) == 1
    assert warpgroups(8192, 128, 8) == warpgroups(512, 8, 2) == warpgroups(100, 1, 1) == 2


@given(st.sampled_from([64, 128, 192, 256]), st.sampled_from([1, 2]))
def test_tiles_fit_into_a_multiprocessor(width: int, num_warpgroups: int) -> None:
    number = stages(width, num_warpgroups)
    assert number >= 4
    assert number * (num_warpgroups * 64 + width) * 128 + num_warpgroups * 2 * 64 * 128 <= SHARED_BYTES


def test_the_workspace_is_what_the_buffers_take() -> None:
    """512 rows in 8 of 128 groups: 4096 places, filled up, of 2048 + 768 values of 2 bytes."""
    places = 512 * 8 + 128 * 7 + 56
    assert mosaic_gpu_prefill.workspace_bytes(512, 128, 2048, 768, 8) == places * 2816 * 2 + 16 * 128 * 512


@pytest.mark.parametrize("wrong", [{"num_blocks": 0}, {"num_warpgroups": 0}, {"num_warpgroups": 3}])
def test_a_configuration_that_cannot_be_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="=".join(map(str, *wrong.items()))):
        Config(**wrong)
