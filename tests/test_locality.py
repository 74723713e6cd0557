"""The terms of router tuning's loss: by hand, and that a step along each gradient does what the term is for."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.training import locality

P = jnp.array([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25], [0.25, 0.25, 0.5], [0.25, 0.25, 0.5]])
LOG_P = jnp.log(P)[None, None]  # [1, 1, 4, 3]: one layer, one sequence
ALL = jnp.ones((1, 4), bool)
IDS = jnp.array([[0, 1], [1, 0], [2, 0], [2, 1]])[None, None]
TOKENS, EXPERTS, ACTIVE = 12, 6, 2


def test_trust_is_the_divergence_from_the_reference() -> None:
    reference = jnp.log(jnp.full(LOG_P.shape, 1 / 3))
    expected = math.log(3) - (0.5 * math.log(2) + 0.5 * math.log(4))
    assert float(locality.trust(LOG_P, reference, ALL)) == pytest.approx(expected, rel=1e-5)
    assert float(locality.trust(LOG_P, LOG_P, ALL)) == 0


def test_trust_leaves_the_reference_alone() -> None:
    slope = jax.grad(locality.trust, argnums=1)(LOG_P, jnp.zeros(LOG_P.shape), ALL)
    assert not slope.any()


def test_reuse_is_minus_log_of_the_mass_on_the_experts_before() -> None:
    masses = [(0.25 + 0.5) / 2, (0.25 + 0.25) / 2, (0.5 + 0.25) / 2]
    assert float(locality.reuse(LOG_P, IDS, ALL)) == pytest.approx(-math.log(sum(masses) / 3), rel=1e-5)
    without_last = jnp.array([[True, True, True, False]])
    expected = -math.log(sum(masses[:2]) / 2)
    assert float(locality.reuse(LOG_P, IDS, without_last)) == pytest.approx(expected, rel=1e-5)


def test_reuse_is_a_mean_over_layers() -> None:
    two = jnp.concatenate([LOG_P, LOG_P[:, :, ::-1]]), jnp.concatenate([IDS, IDS[:, :, ::-1]])
    each = [locality.reuse(two[0][n : n + 1], two[1][n : n + 1], ALL) for n in range(2)]
    assert float(locality.reuse(*two, ALL)) == pytest.approx(float(sum(each)) / 2, rel=1e-6)


def test_smoothness_is_the_symmetric_divergence_of_neighbours() -> None:
    moved = 0.5 * (0.25 * math.log(2) + 0.25 * math.log(2))  # one pair of probabilities swapped
    assert float(locality.smoothness(LOG_P, ALL)) == pytest.approx(moved * 2 / 3, rel=1e-5)
    assert float(locality.smoothness(LOG_P, jnp.array([[False, False, True, True]]))) == 0


def test_lags_are_averaged() -> None:
    each = [float(locality.divergence_at(LOG_P, ALL, lag)) for lag in (1, 2, 3)]
    assert each[2] == pytest.approx(0.25 * math.log(2), rel=1e-5)
    assert float(locality.lagged(LOG_P, ALL, (1, 2, 3))) == pytest.approx(sum(each) / 3, rel=1e-6)


def test_window_entropy_is_that_of_the_mean_of_a_block() -> None:
    def entropy(*shares: float) -> float:
        return -sum(share * math.log(share) for share in shares)

    expected = (entropy(0.375, 0.375, 0.25) + entropy(0.25, 0.25, 0.5)) / 2
    assert float(locality.window_entropy(LOG_P, ALL, 2)) == pytest.approx(expected, rel=1e-5)
    first_alone = jnp.array([[True, True, True, False]])
    assert float(locality.window_entropy(LOG_P, first_alone, 2)) == pytest.approx(entropy(0.375, 0.375, 0.25), rel=1e-5)


def test_overlap_counts_shared_experts() -> None:
    assert float(locality.overlap(IDS, ALL)) == pytest.approx((2 + 1 + 1) / (3 * 2))
    assert float(locality.overlap(IDS, jnp.array([[False, True, True, True]]))) == pytest.approx(2 / (2 * 2))


@pytest.mark.parametrize("lag", [0, 4])
def test_a_lag_out_of_range_is_refused(lag: int) -> None:
    with pytest.raises(ValueError, match=f"lag {lag} is outside 1..3"):
        locality.divergence_at(LOG_P, ALL, lag)


@pytest.mark.parametrize("window", [0, 5])
def test_a_window_out_of_range_is_refused(window: int) -> None:
    with pytest.raises(ValueError, match=f"window {window} is outside 1..4"):
        locality.window_entropy(LOG_P, ALL, window)


# What a few steps against a gradient do to the choices. Logits are the parameters: [1, 8, T, E].


def descend(term, size: float, steps: int = 30):
    """Overlap before and after steps of `size` (the gradient scaled to unit length) down `term` of the logits."""
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(1, 8, TOKENS, EXPERTS)), jnp.float32)
    valid = jnp.ones(logits.shape[1:3], bool)

    def chosen(logits):
        return jax.lax.top_k(logits, ACTIVE)[1]

    before = float(locality.overlap(chosen(logits), valid))

    def step(_, logits):
        slope = jax.grad(lambda each: term(jax.nn.log_softmax(each), chosen(each), valid))(logits)
        return logits - size * slope / jnp.linalg.norm(slope)

    logits = jax.lax.fori_loop(0, steps, step, logits)
    return before, float(locality.overlap(chosen(logits), valid)), logits


TERMS = {
    "reuse": locality.reuse,
    "smoothness": lambda log_p, ids, valid: locality.smoothness(log_p, valid),
    "lagged": lambda log_p, ids, valid: locality.lagged(log_p, valid, (1, 2, 4)),
    "window_entropy": lambda log_p, ids, valid: locality.window_entropy(log_p, valid, 4),
}


@pytest.mark.parametrize("name", TERMS)
def test_descending_a_term_raises_the_reuse_of_experts(name: str) -> None:
    before, after, _ = descend(TERMS[name], 0.5)
    assert after > before + 0.05, (before, after)


@pytest.mark.parametrize("name", TERMS)
def test_ascending_a_term_lowers_it(name: str) -> None:
    before, after, _ = descend(lambda *arguments: -TERMS[name](*arguments), 0.5)
    assert after < before, (before, after)


def test_descending_trust_goes_back_to_the_reference() -> None:
    reference = jax.nn.log_softmax(
        jnp.asarray(np.random.default_rng(1).normal(size=(1, 8, TOKENS, EXPERTS)), jnp.float32)
    )

    def trust(log_p, ids, valid):
        return locality.trust(log_p, reference, valid)

    *_, logits = descend(trust, 0.5, steps=100)
    valid = jnp.ones(logits.shape[1:3], bool)
    assert float(locality.trust(jax.nn.log_softmax(logits), reference, valid)) < 1e-2
