"""The expert MLP: its reference against a loop in float64, and what its api refuses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.expert_mlp import api, reference
from kernels_pallas.expert_mlp.specs import SPECS, ExpertMlpSpec

SCALED = [spec.scaled(32) for spec in SPECS]
NAMES = [spec.name for spec in SPECS]
SMALL = ExpertMlpSpec(
    name="small", num_slots=6, num_hidden=16, width=24, num_rows=5, group_sizes=(5, 0, 1, 3), dtype="float32"
)
EXACT = 2e-6  # of the largest output: float32 sums of a few hundred products
ROUNDED = 1e-2  # … with the inputs and the hidden values in bfloat16: 2**-9 each


def make_inputs(spec: ExpertMlpSpec, seed: int = 0) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(seed)
    x, slots = rng.normal(size=spec.x_shape), rng.normal(size=spec.slots_shape) / np.sqrt(spec.width)
    return jnp.asarray(x, spec.dtype), jnp.asarray(slots, spec.dtype)


def expected(x, slots, group_slots, group_weights) -> np.ndarray:
    """Row by row in float64, over the groups that ask for it."""
    x, slots = np.asarray(x, np.float64), np.asarray(slots, np.float64)
    y = np.zeros(x.shape)
    for slot, weights in zip(group_slots, np.asarray(group_weights, np.float64), strict=True):
        gate, up, down = slots[slot]
        for row in np.flatnonzero(weights):
            before = gate @ x[row]
            y[row] += weights[row] * ((before / (1 + np.exp(-before)) * (up @ x[row])) @ down)
    return y


def check(x, slots, group_slots, group_weights, tolerance: float) -> None:
    wanted = expected(x, slots, group_slots, group_weights)
    got = jax.jit(api.expert_mlp)(x, slots, jnp.asarray(group_slots), jnp.asarray(group_weights))
    assert got.shape == x.shape
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, wanted, rtol=0, atol=tolerance * max(1.0, np.abs(wanted).max()))


@pytest.mark.parametrize("spec", SCALED, ids=NAMES)
def test_the_reference_is_the_formula_in_float32(spec: ExpertMlpSpec) -> None:
    exact = dataclasses.replace(spec, dtype="float32")
    check(*make_inputs(exact), *exact.groups(), EXACT)


@pytest.mark.parametrize("spec", [SCALED[0], SCALED[4], SCALED[9]], ids=[NAMES[0], NAMES[4], NAMES[9]])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_reference_is_close_in_half_precision(spec: ExpertMlpSpec, dtype: str) -> None:
    half = dataclasses.replace(spec, dtype=dtype)
    check(*make_inputs(half), *half.groups(), ROUNDED)


@pytest.mark.parametrize("spec", [SCALED[0], SCALED[4], SCALED[7], SCALED[9]], ids=lambda spec: spec.name)
def test_the_dense_form_is_the_reference_and_so_is_its_gradient(spec: ExpertMlpSpec) -> None:
    exact = dataclasses.replace(spec, dtype="float32")
    group_slots, group_weights = map(jnp.asarray, exact.groups())
    direction = jnp.asarray(np.random.default_rng(1).normal(size=exact.x_shape), jnp.float32)

    def along(x, slots, weights, implementation: str):
        return jnp.vdot(direction, api.expert_mlp(x, slots, group_slots, weights, implementation=implementation))

    def gradients(implementation: str):
        values = jax.value_and_grad(along, argnums=(0, 1, 2))(*make_inputs(exact), group_weights, implementation)
        return jax.tree.leaves(values)

    for got, wanted in zip(gradients("dense"), gradients("reference"), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5 * max(1.0, np.abs(wanted).max()))


@pytest.mark.parametrize("num_rows", [1, 5])
def test_nothing_asked_is_zero(num_rows: int) -> None:
    spec = dataclasses.replace(SMALL, num_rows=num_rows, group_sizes=(0, 0))
    x, slots = make_inputs(spec)
    assert not np.asarray(api.expert_mlp(x, slots, *map(jnp.asarray, spec.groups()))).any()


@pytest.mark.parametrize("num_rows", [1, 5])
def test_a_group_that_nobody_asks_for_changes_no_bit(num_rows: int) -> None:
    """Its slot holds large numbers: what is read of it, if anything, is multiplied with 0."""
    x, slots = make_inputs(dataclasses.replace(SMALL, num_rows=num_rows))
    weights = np.random.default_rng(1).uniform(size=(3, num_rows)).astype(np.float32)
    weights[1] = 0
    without = api.expert_mlp(x, slots, jnp.asarray([2, 4]), jnp.asarray(weights[[0, 2]]))
    slots = slots.at[3].set(1e3)
    with_it = api.expert_mlp(x, slots, jnp.asarray([2, 3, 4]), jnp.asarray(weights))
    np.testing.assert_array_equal(with_it, without)


@pytest.mark.parametrize("num_rows", [1, 5])
def test_where_the_weights_lie_changes_no_bit(num_rows: int) -> None:
    x, slots = make_inputs(dataclasses.replace(SMALL, num_rows=num_rows))
    weights = jnp.asarray(np.random.default_rng(1).uniform(size=(3, num_rows)), jnp.float32)
    order = np.array([3, 5, 0, 2, 4, 1])
    here = api.expert_mlp(x, slots, jnp.asarray([4, 1, 3]), weights)
    there = api.expert_mlp(
        x, slots[order], jnp.asarray([int(np.flatnonzero(order == n)[0]) for n in (4, 1, 3)]), weights
    )
    np.testing.assert_array_equal(here, there)


def test_one_row_and_many_rows_agree() -> None:
    """A batch of one takes another form of the reference; both must be the same function."""
    x, slots = make_inputs(SMALL)
    group_slots, group_weights = map(jnp.asarray, SMALL.groups())
    together = reference.expert_mlp(x, slots, group_slots, group_weights)
    alone = [reference.expert_mlp(x[n : n + 1], slots, group_slots, group_weights[:, n : n + 1]) for n in range(5)]
    np.testing.assert_allclose(np.concatenate(alone), together, atol=EXACT * np.abs(together).max())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"slots": jnp.zeros((6, 3, 16, 32))}, r"slots \(6, 3, 16, 32\) must be \[R, 3, F, D\] with D=24, the width"),
        ({"slots": jnp.zeros((6, 2, 16, 24))}, r"slots \(6, 2, 16, 24\) must be \[R, 3, F, D\]"),
        ({"slots": jnp.zeros((3, 16, 24))}, r"slots \(3, 16, 24\) must be \[R, 3, F, D\]"),
        ({"group_weights": jnp.zeros((5, 4))}, r"group_weights \(5, 4\) must be \[G, T\] = \(4, 5\)"),
        ({"max_groups_per_row": 0}, r"max_groups_per_row=0 must be at least 1, or None"),
        ({"group_slots": jnp.zeros(3, jnp.int32)}, r"group_weights \(4, 5\) must be \[G, T\] = \(3, 5\)"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict, message: str) -> None:
    x, slots = make_inputs(SMALL)
    group_slots, group_weights = map(jnp.asarray, SMALL.groups())
    arguments = {"x": x, "slots": slots, "group_slots": group_slots, "group_weights": group_weights}
    with pytest.raises(ValueError, match=message):
        api.expert_mlp(**{**arguments, **changes})


def test_the_choice_of_an_implementation() -> None:
    assert api.resolve(None) == api.resolve("reference") == "reference"
    with pytest.raises(ValueError, match="expert_mlp: unknown implementation 'fastest'; expected one of reference"):
        api.resolve("fastest")
    x, slots = make_inputs(SMALL)
    with pytest.raises(ValueError, match="unknown implementation 'fastest'"):
        api.expert_mlp(x, slots, *map(jnp.asarray, SMALL.groups()), implementation="fastest")


def test_the_named_shapes_are_what_they_say() -> None:
    for spec in SPECS:
        group_slots, group_weights = spec.groups()
        assert ((group_weights > 0).sum(axis=1) == spec.group_sizes).all(), spec.name
        asked = group_slots[np.array(spec.group_sizes) > 0]
        assert len(set(asked.tolist())) == len(asked), spec.name
        assert group_slots.max(initial=0) < spec.num_slots, spec.name
