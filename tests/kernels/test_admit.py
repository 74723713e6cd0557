"""The admission kernel, interpreted on the CPU, does what the reference does; and what callers may not ask."""

import functools

import jax
import numpy as np
import pytest
from jax import export
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks  # the races found have no public name
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.admit import api, mosaic_gpu, reference
from kernels_pallas.admit.result import NONE, Admitted
from kernels_pallas.admit.specs import SPECS, AdmitSpec

SMALL = tuple(
    spec
    for spec in SPECS
    if spec.name in ("empty_slots", "all_resident", "mixtral", "gpt_oss_20b", "llama4_scout", "deepseek_v2_lite", "odd")
)


plain = jax.jit(reference.admit)


def assert_same(got: Admitted, wanted: Admitted) -> None:
    """But for the slot of an expert that has none, which may be any."""
    lies = np.asarray(wanted.group_experts) != NONE
    lies &= np.asarray(wanted.slot_of)[np.maximum(wanted.group_experts, 0)] != NONE
    np.testing.assert_array_equal(np.asarray(got.group_slots)[lies], np.asarray(wanted.group_slots)[lies])
    exact = "group_experts group_weights group_fetched slot_of owner plan_experts plan_slots count num_used num_hits"
    for name in exact.split():
        np.testing.assert_array_equal(getattr(got, name), getattr(wanted, name), err_msg=name)


@pytest.mark.parametrize("spec", SMALL, ids=lambda spec: spec.name)
def test_the_kernel_is_the_reference(spec: AdmitSpec) -> None:
    kernel = functools.partial(mosaic_gpu.admit, interpret=plgpu.InterpretGPUParams(detect_races=True))
    for seed in range(2):
        inputs = jax.tree.map(jax.numpy.asarray, spec.make(seed))
        got, wanted = kernel(*inputs), plain(*inputs)
        assert_same(got, wanted)
        assert got.known_at is wanted.known_at is None, "neither an interpreted kernel nor plain JAX has a clock"
    assert not gpu_callbacks.get_races().races_found


@pytest.mark.parametrize(
    "name", ["qwen3_30b", "all_resident", "b8", "mixtral", "gpt_oss_20b", "llama4_scout", "experts_256", "odd"]
)
def test_the_kernel_compiles_for_cuda(name: str) -> None:
    inputs = next(spec for spec in SPECS if spec.name == name).make()
    exported = export.export(jax.jit(mosaic_gpu.admit), platforms=["cuda"])(*inputs)
    assert str(exported.mlir_module()).count("custom_call @mosaic_gpu_v2") == 1
    assert (exported.out_avals[-1].shape, exported.out_avals[-1].dtype) == ((), jax.numpy.int32), "when it was known"


def test_any_expert_that_lies_somewhere_has_its_slot() -> None:
    """Every slot that a group reads is in range, and a group's expert is what the residency says lies there."""
    for spec in SPECS:
        admitted = plain(*spec.make(7))
        group, slots = np.asarray(admitted.group_experts), np.asarray(admitted.group_slots)
        assert ((slots >= 0) & (slots < spec.num_slots)).all()
        lies = (group != NONE) & (np.asarray(admitted.slot_of)[group] != NONE)
        np.testing.assert_array_equal(np.asarray(admitted.owner)[slots[lies]], group[lies])


def test_shapes_that_do_not_fit_are_refused() -> None:
    ids, weights, used, value, slot_of, owner = SPECS[0].make()
    with pytest.raises(ValueError, match=r"used \(3,\)"):
        api.admit(ids, weights, used[:3], value, slot_of, owner)
    with pytest.raises(ValueError, match="combine_weights"):
        api.admit(ids, weights[:, :2], used, value, slot_of, owner)
    with pytest.raises(NotImplementedError, match="implementation='reference'"):
        api.admit(ids, weights, used, value, slot_of, owner, implementation="mosaic_gpu")


def test_what_the_kernel_cannot_do_has_a_reason() -> None:
    ids, weights, used, value, slot_of, owner = AdmitSpec(name="", num_experts=512, num_slots=8, num_chosen=8).make()
    assert "512" in str(mosaic_gpu.problem(ids, slot_of))
    with pytest.raises(NotImplementedError, match="512 experts"):
        mosaic_gpu.admit(ids, weights, used, value, slot_of, owner)
