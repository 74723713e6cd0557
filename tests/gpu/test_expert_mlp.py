"""The expert MLP on a GPU against float32 on the CPU, on fresh random inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.expert_mlp.api import expert_mlp

pytestmark = pytest.mark.gpu


def swiglu_sum(x, slots, group_slots, group_weights) -> np.ndarray:
    y = np.zeros(x.shape, np.float32)
    for slot, weights in zip(group_slots, group_weights, strict=True):
        gate, up, down = slots[slot]
        gate = x @ gate.T
        y += weights[:, None] * ((gate / (1 + np.exp(-gate)) * (x @ up.T)) @ down)
    return y


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("num_rows", "num_groups"), [(1, 8), (1, 1), (3, 5), (64, 16)])
def test_expert_mlp_equals_float32_on_the_cpu(num_rows: int, num_groups: int, dtype: str) -> None:
    num_slots, width, hidden = 20, 768, 2048
    for seed in range(3):
        rng = np.random.default_rng(seed)
        x = jnp.asarray(rng.standard_normal((num_rows, hidden), np.float32), dtype)
        slots = jnp.asarray(rng.standard_normal((num_slots, 3, width, hidden), np.float32) * 0.02, dtype)
        group_slots = rng.permutation(num_slots)[:num_groups].astype(np.int32)
        weights = rng.random((num_groups, num_rows), np.float32) * (rng.random((num_groups, num_rows)) < 0.6)
        weights[0] = 0  # a group that nobody asks for
        with jax.default_matmul_precision("highest" if dtype == "float32" else "default"):
            y = jax.jit(expert_mlp)(x, slots, jnp.asarray(group_slots), jnp.asarray(weights, jnp.float32))
        expected = swiglu_sum(np.asarray(x, np.float32), np.asarray(slots, np.float32), group_slots, weights)
        error = np.linalg.norm(np.asarray(y) - expected) / max(np.linalg.norm(expected), 1e-6)
        assert error < (1e-2 if dtype == "bfloat16" else 1e-5)
