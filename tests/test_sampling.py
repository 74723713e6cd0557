"""Sampling: the transforms against plain numpy, the draws against their distribution, and what decides a draw."""

import dataclasses
import functools
import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jmoe.decoding.sampling import (
    NO_TOKEN,
    SamplingParams,
    batch_sampling,
    sample,
    sampling_mode,
    token_logprobs,
    truncate,
)

V = 13
NUM_DRAWS = 512  # at a time
LOGITS = np.array([2.0, -1.0, 0.5, 1.8, -3.0, 0.0, 1.1, -0.4, 2.3, -2.0, 0.9, 1.4, -0.1], np.float32)


def kept(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    """The distribution that is drawn from, float64: temperature, then top_k, then top_p, then min_p, one by one."""
    p = np.exp(logits.astype(np.float64) / params.temperature)
    order = np.argsort(-p)
    if params.top_k:
        p[order[params.top_k :]] = 0
    p /= p.sum()
    before = 0.0
    for token in order:
        share, p[token] = p[token], p[token] if before < params.top_p else 0
        before += share
    p[p < params.min_p * p.max()] = 0
    return p / p.sum()


def draw(params: SamplingParams, positions=(0,), mode=None, logits: np.ndarray = LOGITS) -> np.ndarray:
    """NUM_DRAWS tokens at each position, their seeds from params.seed on. [positions, NUM_DRAWS]"""
    requests = [dataclasses.replace(params, seed=params.seed + n) for n in range(NUM_DRAWS)]
    sampling, mode = batch_sampling(requests, ()), mode or sampling_mode(requests)
    rows = jnp.tile(jnp.asarray(logits)[None], (NUM_DRAWS, 1))
    at = (jnp.full((NUM_DRAWS,), position, jnp.int32) for position in positions)
    return np.array([sample(rows, sampling, position, mode)[0] for position in at])


def chi_square(tokens: np.ndarray, p: np.ndarray) -> float:
    """How unlike `p` the draws are: about 1 for draws from it, above 1 with a probability of 1e-4 (Wilson-Hilferty)."""
    counts, possible = np.bincount(tokens.ravel(), minlength=len(p)), p > 0
    wanted = tokens.size * p[possible]
    statistic = ((counts[possible] - wanted) ** 2 / wanted).sum()
    freedom = max(1, possible.sum() - 1)
    return statistic / (freedom * (1 - 2 / (9 * freedom) + 3.719 * math.sqrt(2 / (9 * freedom))) ** 3)


REQUESTS = {
    "plain": SamplingParams(temperature=1.0),
    "hot": SamplingParams(temperature=1.7),
    "cold": SamplingParams(temperature=0.5),
    "top_k": SamplingParams(temperature=1.0, top_k=4),
    "top_p": SamplingParams(temperature=1.0, top_p=0.7),
    "min_p": SamplingParams(temperature=1.0, min_p=0.25),
    "all": SamplingParams(temperature=1.4, top_k=8, top_p=0.85, min_p=0.2),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_draws_follow_the_distribution(name: str) -> None:
    params = REQUESTS[name]
    p = kept(LOGITS, params)
    tokens = draw(params, range(8))
    assert p[tokens].min() > 0, "a token that was left out"
    assert chi_square(tokens, p) < 1
    wrong = kept(LOGITS, dataclasses.replace(params, temperature=params.temperature * 1.25, top_k=0, top_p=1, min_p=0))
    assert chi_square(tokens, wrong) > 1, "the test cannot tell"


@settings(deadline=None, max_examples=80)
@given(
    logits=st.lists(st.integers(-600, 600), min_size=V, max_size=V, unique=True),
    temperature=st.floats(0.25, 3),
    top_k=st.integers(0, V + 2),
    top_p=st.floats(0.05, 1),
    min_p=st.floats(0, 1),
)
def test_truncation_is_that_of_plain_numpy(logits, temperature, top_k, top_p, min_p) -> None:
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    scaled = np.array(logits, np.float32) / 100
    p = kept(scaled, params)
    warm = jnp.asarray(scaled / np.float32(temperature))[None]
    got = np.isfinite(np.asarray(truncate(warm, batch_sampling([params], ())))[0])
    if (got != (p > 0)).any():  # only where float32 cannot tell: a token on the very edge
        edge = kept(scaled, dataclasses.replace(params, top_p=min(1.0, top_p + 1e-5), min_p=max(0.0, min_p - 1e-5)))
        inner = kept(scaled, dataclasses.replace(params, top_p=top_p - 1e-5, min_p=min(1.0, min_p + 1e-5)))
        np.testing.assert_array_less(inner > 0, got + 1)
        np.testing.assert_array_less(got, (edge > 0) + 1)
    assert got.any()


@pytest.mark.parametrize(
    ("params", "survivors"),
    [
        (SamplingParams(temperature=1, top_k=2), [0, 1]),
        (SamplingParams(temperature=1, top_k=9), [0, 1, 2, 3]),
        (SamplingParams(temperature=1, top_p=0.39), [0]),
        (SamplingParams(temperature=1, top_p=0.41), [0, 1]),
        (SamplingParams(temperature=1, top_p=0.71), [0, 1, 2]),
        (SamplingParams(temperature=1, min_p=0.74), [0, 1]),
        (SamplingParams(temperature=1, min_p=0.76), [0]),
        (SamplingParams(temperature=1, min_p=1.0), [0]),
        (SamplingParams(temperature=1, top_k=3, top_p=0.75), [0, 1]),  # of what top_k left: 4/9, 3/9, 2/9
        (SamplingParams(temperature=1, top_k=3, top_p=0.78), [0, 1, 2]),
    ],
)
def test_truncation_by_hand(params: SamplingParams, survivors: list[int]) -> None:
    logits = jnp.log(jnp.asarray([[0.4, 0.3, 0.2, 0.1]]))
    left = truncate(logits, batch_sampling([params], ()))
    assert np.flatnonzero(np.isfinite(np.asarray(left)[0])).tolist() == survivors
    np.testing.assert_array_equal(left[0, : len(survivors)], logits[0, : len(survivors)])


def test_tokens_that_tie_with_the_last_kept_one_stay() -> None:
    left = truncate(jnp.asarray([[1.0, 3.0, 1.0, 0.0]]), batch_sampling([SamplingParams(temperature=1, top_k=2)], ()))
    assert np.isfinite(np.asarray(left)[0]).tolist() == [True, True, True, False]


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_a_mode_never_changes_a_draw(temperature: float) -> None:
    """Nothing truncated: "truncated", as beside a request that does truncate, draws what "full" draws."""
    params = SamplingParams(temperature=temperature)
    np.testing.assert_array_equal(draw(params, range(2), "full"), draw(params, range(2), "truncated"))


@pytest.mark.parametrize("mode", ["greedy", "full", "truncated"])
def test_greedy_takes_the_largest_in_every_mode(mode) -> None:
    assert set(draw(SamplingParams(), range(2), mode).ravel().tolist()) == {int(LOGITS.argmax())}


def test_a_draw_hangs_on_seed_and_position_alone() -> None:
    params = REQUESTS["plain"]
    first, again, other_position = draw(params, [3]), draw(params, [3]), draw(params, [4])
    np.testing.assert_array_equal(first, again)
    assert 0 < (first != other_position).mean() < 1
    shifted = draw(dataclasses.replace(params, seed=5), [3])
    np.testing.assert_array_equal(first[:, 5:], shifted[:, :-5])  # the place in the batch does not count
    for n in (0, 17):
        alone = sample(*one(dataclasses.replace(params, seed=n), 3), "full")[0]
        assert int(alone[0]) == first[0, n]


def one(params: SamplingParams, position: int):
    return jnp.asarray(LOGITS)[None], batch_sampling([params], ()), jnp.asarray([position], jnp.int32)


def test_the_largest_seed_is_taken() -> None:
    assert 0 <= int(sample(*one(SamplingParams(temperature=1.0, seed=2**32 - 1), 0), "full")[0][0]) < V


@pytest.mark.parametrize("name", [*REQUESTS, "greedy"])
def test_the_log_probability_is_that_of_the_untransformed_logits(name: str) -> None:
    params = REQUESTS.get(name, SamplingParams())
    tokens, logprobs = sample(*one(params, 1), sampling_mode([params]))
    p = np.exp(LOGITS.astype(np.float64))
    np.testing.assert_allclose(logprobs[0], np.log(p / p.sum())[int(tokens[0])], rtol=1e-5)


def test_the_mode_is_the_least_that_serves_all() -> None:
    greedy, full, truncated = SamplingParams(), SamplingParams(temperature=1.0), REQUESTS["top_k"]
    assert sampling_mode([greedy, SamplingParams(top_k=3, top_p=0.5)]) == "greedy"
    assert sampling_mode([greedy, full]) == "full"
    assert sampling_mode([full, greedy, truncated]) == "truncated"


def test_a_batch_as_arrays() -> None:
    requests = [SamplingParams(temperature=0.5, top_k=3, seed=7), SamplingParams(ignore_eos=True, min_p=0.5)]
    sampling = batch_sampling(requests, (4, 9))
    assert np.asarray(sampling.eos_ids).tolist() == [[4, 9], [NO_TOKEN, NO_TOKEN]]
    assert np.asarray(sampling.top_k).tolist() == [3, 0]
    assert np.asarray(sampling.min_p).tolist() == [0, 0.5]
    assert sampling.seed.dtype == jnp.uint32
    assert np.asarray(batch_sampling(requests, ()).eos_ids).tolist() == [[NO_TOKEN]] * 2


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ({"temperature": -0.1}, "temperature=-0.1 must be a number of at least 0"),
        ({"temperature": math.nan}, "temperature=nan must be a number"),
        ({"temperature": math.inf}, "temperature=inf must be a number"),
        ({"top_k": -1}, "top_k=-1 must be at least 0"),
        ({"top_p": 0.0}, "top_p=0.0 must be above 0 and at most 1"),
        ({"top_p": 1.01}, "top_p=1.01 must be above 0 and at most 1"),
        ({"min_p": -0.5}, "min_p=-0.5 must be from 0 to 1"),
        ({"min_p": 1.5}, "min_p=1.5 must be from 0 to 1"),
        ({"seed": -1}, "seed=-1 must be from 0"),
        ({"seed": 2**32}, "seed=4294967296 must be from 0"),
        ({"stop": ("a", "")}, "stop=('a', '') must be non-empty strings"),
    ],
)
def test_parameters_that_make_no_sense_are_refused(option: dict, message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the message is compared below)
        SamplingParams(**option)
    assert message in str(caught.value)


def test_one_stop_string_need_not_be_a_tuple() -> None:
    stop = functools.partial(SamplingParams, stop="end")().stop  # a string, as a caller without types writes it
    assert stop == ("end",)


def test_token_logprobs_are_the_log_of_softmax() -> None:
    logits = np.random.default_rng(0).normal(size=(2, 3, 5)).astype(np.float32) * 3
    tokens = np.array([[0, 4, 2], [1, 1, 3]])
    odds = np.exp(logits.astype(np.float64))
    wanted = np.log(np.take_along_axis(odds / odds.sum(-1, keepdims=True), tokens[..., None], -1)[..., 0])
    np.testing.assert_allclose(token_logprobs(jnp.asarray(logits), jnp.asarray(tokens)), wanted, rtol=1e-5)
