"""The kernels that route and admit, on a GPU: what the reference does there, at full size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.admit import api as admission
from kernels_pallas.admit import specs as admissions
from kernels_pallas.route import api as routing
from kernels_pallas.route import specs as routings
from tests.kernels.test_admit import assert_same

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("spec", admissions.SPECS, ids=lambda spec: spec.name)
def test_admit_is_the_reference(spec: admissions.AdmitSpec) -> None:
    jitted = jax.jit(admission.admit, static_argnames="implementation")
    for seed in range(20):
        inputs = jax.tree.map(jnp.asarray, spec.make(seed))
        assert_same(jitted(*inputs, implementation="mosaic_gpu"), jitted(*inputs, implementation="reference"))


@pytest.mark.parametrize("spec", routings.SPECS, ids=lambda spec: spec.name)
def test_route_is_the_reference(spec: routings.RouteSpec) -> None:
    """But where rounding makes a tie of two experts' odds or breaks one: there the weights decide."""
    jitted = jax.jit(routing.route, static_argnames=("num_chosen", "normalize", "implementation"))
    options = {"num_chosen": spec.num_chosen, "normalize": spec.normalize}
    for seed in range(20):
        inputs = tuple(map(jnp.asarray, spec.make(seed)))
        ids, weights = jitted(*inputs, **options, implementation="mosaic_gpu")
        wanted_ids, wanted = jitted(*inputs, **options, implementation="reference")
        np.testing.assert_allclose(weights, wanted, rtol=1e-5, atol=1e-37)
        if not spec.tied and spec.scale < 10:
            np.testing.assert_array_equal(ids, wanted_ids)
