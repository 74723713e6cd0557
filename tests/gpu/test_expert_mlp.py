"""The expert MLP on a GPU, at true sizes, against float32 on the CPU, on fresh random inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.expert_mlp.api import expert_mlp
from kernels_pallas.expert_mlp.specs import SPECS, ExpertMlpSpec

pytestmark = pytest.mark.gpu

TOLERANCE = {"bfloat16": 1e-2, "float32": 1e-5}  # of the norm; bfloat16 rounds the hidden activations


def swiglu_sum(x: np.ndarray, slots: np.ndarray, group_slots: np.ndarray, group_weights: np.ndarray) -> np.ndarray:
    y = np.zeros(x.shape, np.float32)
    for slot, weights in zip(group_slots, group_weights, strict=True):
        gate, up, down = slots[slot].astype(np.float32)
        gate = x @ gate.T
        y += weights[:, None] * ((gate / (1 + np.exp(-gate)) * (x @ up.T)) @ down)
    return y


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_expert_mlp_equals_float32_on_the_cpu(spec: ExpertMlpSpec) -> None:
    key = jax.random.key(len(spec.name))
    x = jax.random.normal(key, spec.x_shape, spec.dtype)
    slots = jax.random.normal(jax.random.fold_in(key, 1), spec.slots_shape, spec.dtype) * jnp.asarray(0.02, spec.dtype)
    group_slots, group_weights = spec.groups(seed=1)
    with jax.default_matmul_precision("highest" if spec.dtype == "float32" else "default"):
        y = np.asarray(jax.jit(expert_mlp)(x, slots, jnp.asarray(group_slots), jnp.asarray(group_weights)))
    expected = swiglu_sum(np.asarray(x, np.float32), np.asarray(slots), group_slots, group_weights)
    assert np.linalg.norm(y - expected) <= TOLERANCE[spec.dtype] * np.linalg.norm(expected)
