"""The pass that fetches and multiplies, on a GPU at full size: bits of the two kernels that it stands for."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe import memory
from kernels_pallas.admit import reference as admission
from kernels_pallas.admit.specs import SPECS, AdmitSpec
from kernels_pallas.expert_mlp import read_through
from kernels_pallas.expert_mlp.api import expert_mlp
from kernels_pallas.fetch.api import fetch

pytestmark = pytest.mark.gpu

BASE = next(spec for spec in SPECS if spec.name == "qwen3_30b")
CASES = (
    dataclasses.replace(BASE, name="all_missing", num_experts=16, num_slots=8, share_taken=0.0),
    dataclasses.replace(BASE, name="some", num_experts=16, num_slots=10),
    dataclasses.replace(BASE, name="two_rows", num_experts=32, num_slots=20, num_rows=2),
    dataclasses.replace(BASE, name="no_token", num_experts=16, num_slots=10, num_masked=1),
)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("spec", CASES, ids=lambda spec: spec.name)
def test_the_pass_is_fetch_and_then_expert_mlp(spec: AdmitSpec, dtype: str) -> None:
    rng = np.random.default_rng(0)
    shape = (3, 768, 2048)
    weights = rng.normal(size=(spec.num_experts, *shape)).astype(np.float32) / 50
    store = jax.device_put(weights.astype(jnp.dtype(dtype)), memory.host_sharding())

    def in_one_pass(x, store, slots, plan):
        assert read_through.can(None, x, slots)
        return read_through.expert_mlp(x, store, slots, plan)

    def in_two_steps(x, store, slots, plan):
        slots = fetch(store, slots, plan.plan_experts, plan.plan_slots, plan.count)
        return expert_mlp(x, slots, plan.group_slots, plan.group_weights), slots

    one, two = (jax.jit(run, donate_argnums=2) for run in (in_one_pass, in_two_steps))
    for seed in range(6):
        plan = admission.admit(*map(jnp.asarray, spec.make(seed)))
        x = jnp.asarray(rng.normal(size=(spec.num_rows, shape[2])), dtype)
        before = np.full((spec.num_slots, *shape), np.nan, np.float32)
        owner = np.asarray(spec.make(seed)[5])
        before[owner >= 0] = weights[owner[owner >= 0]]
        y, slots = one(x, store, jnp.asarray(before, dtype), plan)
        wanted, wanted_slots = two(x, store, jnp.asarray(before, dtype), plan)
        np.testing.assert_array_equal(np.asarray(y), np.asarray(wanted))
        assert bool(jnp.all((slots == wanted_slots) | (jnp.isnan(slots) & jnp.isnan(wanted_slots))))
