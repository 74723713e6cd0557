"""The Mosaic GPU kernels of the expert MLP, interpreted on the CPU, and which calls they take."""

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

from kernels_pallas import backends, row_dots
from kernels_pallas.expert_mlp import api, asked, mosaic_gpu, mosaic_gpu_fma, mosaic_gpu_prefill, mosaic_gpu_wgmma
from kernels_pallas.expert_mlp.specs import SPECS, ExpertMlpSpec
from tests.kernels.test_expert_mlp import expected, make_inputs

FMA = ExpertMlpSpec(
    name="fma", num_slots=6, num_hidden=12, width=256, num_rows=1, group_sizes=(1,) * 4, dtype="float32"
)
FMA_ROWS = dataclasses.replace(FMA, name="fma_rows", num_rows=3, width=512, dtype="bfloat16")
WGMMA = dataclasses.replace(FMA, name="wgmma", num_rows=11, num_hidden=64, width=256, dtype="bfloat16")
CASES = (FMA, FMA_ROWS, WGMMA)
TOLERANCE = {"float32": 2e-6, "bfloat16": 6e-3}  # of the largest output; the tensor cores round hidden values


@functools.cache
def interpreted(spec: ExpertMlpSpec):
    """The kernel of a case on few blocks, so that each warpgroup has several items; one compilation a case.

    The interpreter models loads in flight, and sees a tile that is overwritten while it may still be read.
    """
    form = mosaic_gpu_wgmma if spec is WGMMA else mosaic_gpu_fma
    config = form.Config(num_blocks=2, max_warpgroups=2)
    interpret = plgpu.InterpretGPUParams(detect_races=True)
    return functools.partial(form.expert_mlp, config=config, interpret=interpret)


@functools.cache
def inputs(spec: ExpertMlpSpec) -> tuple[jax.Array, jax.Array]:
    return make_inputs(spec)


def weights_of(spec: ExpertMlpSpec, sizes: tuple[int, ...]) -> np.ndarray:
    sizes = tuple(min(size, spec.num_rows) for size in sizes)
    return dataclasses.replace(spec, group_sizes=sizes).groups()[1]


@pytest.mark.parametrize("sizes", [(9, 9, 9, 9), (0, 1, 0, 5), (0, 0, 0, 0)], ids=str)
@pytest.mark.parametrize("spec", CASES, ids=lambda spec: spec.name)
def test_the_kernels_are_the_formula(spec: ExpertMlpSpec, sizes: tuple[int, ...]) -> None:
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


@pytest.mark.parametrize("spec", CASES, ids=lambda spec: spec.name)
def test_neither_the_slots_nor_groups_that_nobody_asks_for_change_a_bit(spec: ExpertMlpSpec) -> None:
    x, slots = inputs(spec)
    weights = weights_of(spec, (3, 7, 0, 0))
    first = interpreted(spec)(x, slots, jnp.asarray([4, 1, 0, 0]), jnp.asarray(weights))
    apart = interpreted(spec)(x, slots, jnp.asarray([3, 4, 5, 1]), jnp.asarray(weights[[2, 0, 3, 1]]))
    np.testing.assert_array_equal(apart, first)
    elsewhere = interpreted(spec)(x, slots[::-1], jnp.asarray([1, 4, 0, 0]), jnp.asarray(weights))
    np.testing.assert_array_equal(elsewhere, first)


def test_groups_that_are_known_to_come_first_are_not_looked_for() -> None:
    x, slots = inputs(WGMMA)
    weights, group_slots = weights_of(WGMMA, (9, 4, 0, 0)), jnp.asarray([4, 0, 2, 2])
    found = interpreted(WGMMA)(x, slots, group_slots, jnp.asarray(weights))
    named = interpreted(WGMMA)(x, slots.at[2].set(jnp.nan), group_slots, jnp.asarray(weights), jnp.asarray(2))
    np.testing.assert_array_equal(named, found)
    assert not gpu_callbacks.get_races().races_found


BY_NAME = {spec.name: spec for spec in SPECS}


@pytest.mark.parametrize("name", ["qwen3_30b_decode", "batch_of_4_float32", "batch_of_32"])
def test_the_kernels_compile_for_cuda_at_true_sizes(name: str) -> None:
    spec = BY_NAME[name]
    shapes = [(spec.x_shape, spec.dtype), (spec.slots_shape, spec.dtype)]
    groups = [((spec.num_groups,), "int32"), ((spec.num_groups, spec.num_rows), "float32")]
    arguments = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes + groups]
    exported = export.export(jax.jit(mosaic_gpu.expert_mlp), platforms=["cuda"])(*arguments)
    assert str(exported.mlir_module()).count("custom_call @mosaic_gpu_v2") == (2 if spec.num_rows > 4 else 1)


@settings(deadline=None, max_examples=8)
@given(st.lists(st.booleans(), min_size=1, max_size=9), st.randoms())
def test_groups_asked_for_come_first(is_asked: list[bool], random) -> None:
    slots = np.array(random.sample(range(50), len(is_asked)), np.int32)
    weights = np.outer(is_asked, [0.0, -0.5]).astype(np.float32)
    first_slots, first_weights, count = asked.asked_first(jnp.asarray(slots), jnp.asarray(weights))
    wanted = np.flatnonzero(is_asked)
    assert count == len(wanted)
    np.testing.assert_array_equal(first_slots[:count], slots[wanted])
    np.testing.assert_array_equal(first_weights[:count], weights[wanted])


def shaped(num_rows: int, num_hidden: int, width: int, dtype: str = "bfloat16", slots_dtype: str | None = None):
    slots = jax.ShapeDtypeStruct((4, 3, num_hidden, width), slots_dtype or dtype)
    return jax.ShapeDtypeStruct((num_rows, width), dtype), slots


@pytest.mark.parametrize(
    ("call", "form"),
    [
        (shaped(1, 768, 2048), mosaic_gpu_fma),
        (shaped(2, 768, 2048), mosaic_gpu_fma),
        (shaped(3, 768, 2048), mosaic_gpu_wgmma),
        (shaped(32, 768, 2048, "float16"), mosaic_gpu_wgmma),
        (shaped(1, 768, 2176), mosaic_gpu_wgmma),  # not a multiple of 256
        (shaped(4, 92, 2048), mosaic_gpu_fma),  # not a multiple of 64
        (shaped(4, 768, 2048, "float32"), mosaic_gpu_fma),
        (shaped(1, 2048, 7168), mosaic_gpu_fma),
        (shaped(8, 2048, 7168), mosaic_gpu_wgmma),
        (shaped(33, 768, 2048), mosaic_gpu_prefill),
        (shaped(8192, 2880, 2880, "float16"), mosaic_gpu_prefill),
    ],
)
def test_the_form_that_does_it(call, form) -> None:
    assert mosaic_gpu.problem(*call) is None
    assert mosaic_gpu.form(*call) is form


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (shaped(33, 768, 2048, "float32"), "x float32 and slots float32 must be one of bfloat16, float16, the same"),
        (shaped(33, 768, 2080), "D=2080 and F=768 must be multiples of 64"),
        (shaped(33, 768, 8256), "D=8256 and F=768 must be .*, and D at most 8192"),
        (shaped(5, 768, 2048, "float32"), "5 rows of x are not 1 to 4; .*float32"),
        (shaped(1, 2880, 2880), "D=2880 must be a multiple of 256"),
        (shaped(1, 766, 2048), "F=766 of 4; .* F=766 of 64"),
        (shaped(1, 768, 2048, "bfloat16", "float32"), "x bfloat16 and slots float32 must be .* the same for both"),
        (shaped(32, 768, 7168), "32 rows of D=7168 do not fit into shared memory"),
    ],
)
def test_what_the_kernels_cannot_do_goes_to_the_reference(call, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "mosaic_gpu_problem", lambda: None)
    assert api.choose(None, *call) == "reference"
    assert api.choose(None, *shaped(1, 768, 2048)) == "mosaic_gpu"
    arguments = (jnp.zeros(call[0].shape, call[0].dtype), jnp.zeros((1, *call[1].shape[1:]), call[1].dtype))
    with pytest.raises(NotImplementedError, match=f"mosaic_gpu cannot do this: .*{reason}.*'reference'"):
        api.expert_mlp(
            *arguments, jnp.zeros(1, jnp.int32), jnp.ones((1, call[0].shape[0])), implementation="mosaic_gpu"
        )


def test_other_devices_with_tma_have_no_wgmma(monkeypatch: pytest.MonkeyPatch) -> None:
    class Blackwell:
        compute_capability = "10.0"

    monkeypatch.setattr(mosaic_gpu.jax, "devices", lambda: [Blackwell()])
    assert mosaic_gpu.form(*shaped(4, 768, 2048)) is mosaic_gpu_fma
    for num_rows in (8, 33):
        assert "compute capability 10.0 is not 9" in str(mosaic_gpu.problem(*shaped(num_rows, 768, 2048)))


@given(
    num_rows=st.integers(1, 4),
    width=st.integers(1, 32).map(lambda n: 256 * n),
    itemsize=st.sampled_from([2, 4]),
)
def test_warpgroups_fit_into_a_multiprocessor(num_rows: int, width: int, itemsize: int) -> None:
    shape = mosaic_gpu_fma.Shape(num_rows, 64, width, itemsize)
    number = shape.num_warpgroups(4)
    assert shape.num_tiles % row_dots.unroll(num_rows, shape.num_tiles) == 0
    if number:
        assert shape.shared_bytes(number) <= 227 * 1024
        assert shape.registers * number * 128 <= 65536
    else:
        assert shape.shared_bytes(1) > mosaic_gpu_fma.SHARED_BYTES or shape.registers > 255


@pytest.mark.parametrize("form", [mosaic_gpu_fma, mosaic_gpu_wgmma])
@pytest.mark.parametrize("wrong", [{"num_blocks": 0}, {"max_warpgroups": 0}])
def test_a_configuration_without_workers_is_refused(form, wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="=".join(map(str, *wrong.items()))):
        form.Config(**wrong)
