"""The routing kernel, interpreted on the CPU, does what the reference does; and what callers may not ask."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks  # the races found have no public name
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.route import api, mosaic_gpu, reference
from kernels_pallas.route.specs import SPECS, RouteSpec

SMALL = (
    *(spec for spec in SPECS if spec.name in ("tied", "steep", "mixtral", "deepseek_v2_lite", "one_of_12")),
    RouteSpec(name="many_of_256", num_experts=256, num_chosen=100, num_rows=2, tied=True, masked=True),
    RouteSpec(name="tied_160", num_experts=160, num_chosen=6, tied=True),
    RouteSpec(name="all_equal", num_experts=60, num_chosen=33, scale=0.0),
)


@pytest.mark.parametrize("spec", SMALL, ids=lambda spec: spec.name)
def test_the_kernel_is_the_reference(spec: RouteSpec) -> None:
    options = {"num_chosen": spec.num_chosen, "normalize": spec.normalize}
    interpret = plgpu.InterpretGPUParams(detect_races=True, uninitialized_memory="nan")
    kernel = functools.partial(mosaic_gpu.route, interpret=interpret, **options)
    for seed in range(2):
        logits, valid = map(jnp.asarray, spec.make(seed))
        expert_ids, weights = kernel(logits, valid)
        wanted_ids, wanted_weights = reference.route(logits, valid, **options)
        np.testing.assert_array_equal(expert_ids, wanted_ids)
        np.testing.assert_allclose(weights, wanted_weights, rtol=2e-6)
    assert not gpu_callbacks.get_races().races_found


@pytest.mark.parametrize("name", ["qwen3_30b", "mixtral", "deepseek_v2_lite", "experts_256", "one_of_12"])
def test_the_kernel_compiles_for_cuda(name: str) -> None:
    spec = next(spec for spec in SPECS if spec.name == name)
    run = functools.partial(mosaic_gpu.route, num_chosen=spec.num_chosen, normalize=spec.normalize)
    exported = export.export(jax.jit(run), platforms=["cuda"])(*spec.make())
    assert str(exported.mlir_module()).count("custom_call @mosaic_gpu_v2") == 1


def test_what_is_chosen_weighs_something() -> None:
    logits = jnp.asarray([[0.0, -200.0, -300.0, -400.0]])
    _, weights = reference.route(logits, jnp.ones(1, bool), num_chosen=3, normalize=True)
    assert (np.asarray(weights) > 0).all()
    assert float(weights[0, 0]) == 1


def test_the_reference_is_the_formula() -> None:
    logits, valid = RouteSpec(name="", num_experts=12, num_chosen=3, num_rows=4, masked=True).make()
    expert_ids, weights = reference.route(logits, jnp.asarray(valid), num_chosen=3, normalize=False)
    odds = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    wanted = np.sort(np.argsort(-odds, axis=1)[:, :3], axis=1)
    np.testing.assert_array_equal(expert_ids, np.where(valid[:, None], wanted, 12))
    np.testing.assert_allclose(
        weights, np.where(valid[:, None], np.take_along_axis(odds, wanted, axis=1), 0), rtol=1e-5
    )


def test_calls_that_do_not_fit_are_refused() -> None:
    logits, valid = SPECS[0].make()
    with pytest.raises(ValueError, match=r"valid \(2,\)"):
        api.route(logits, np.ones(2, bool), num_chosen=8, normalize=True)
    with pytest.raises(ValueError, match="num_chosen=129"):
        api.route(logits, valid, num_chosen=129, normalize=True)
    with pytest.raises(NotImplementedError, match="implementation='reference'"):
        api.route(logits, valid, num_chosen=8, normalize=True, implementation="mosaic_gpu")


@pytest.mark.parametrize(
    ("shape", "dtype", "reason"),
    [((1, 512), "float32", "512"), ((1, 6), "float32", "6 experts"), ((2000, 64), "float32", "2000 rows"),
     ((1, 64), "bfloat16", "bfloat16")],
)  # fmt: skip
def test_what_the_kernel_cannot_do_has_a_reason(shape: tuple[int, int], dtype: str, reason: str) -> None:
    logits = jnp.zeros(shape, dtype)
    assert reason in str(mosaic_gpu.problem(logits))
    with pytest.raises(NotImplementedError, match=reason):
        mosaic_gpu.route(logits, jnp.ones(shape[0], bool), num_chosen=1, normalize=True)
