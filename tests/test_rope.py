"""Rotary embedding: frequencies against float64, and what a rotation keeps."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jmoe.config import ModelConfig, RopeConfig
from jmoe.model.rope import inverse_frequencies, rope_angles
from kernels_pallas.decode_attention.reference import rotate
from tests.models import SMALL

H = 16
CLOSE = 3e-6  # relative: a power in float32


def model(max_position_embeddings: int = 4096, head_dim: int = H, **rope) -> ModelConfig:
    rope_config = RopeConfig(**rope)
    return dataclasses.replace(
        SMALL, head_dim=head_dim, max_position_embeddings=max_position_embeddings, rope=rope_config
    )


def plain(theta: float, head_dim: int = H) -> np.ndarray:
    return np.array([theta ** (-2 * pair / head_dim) for pair in range(head_dim // 2)])


def angles_of(config: ModelConfig, position: int, length: int = 1) -> tuple[np.ndarray, np.ndarray]:
    cos, sin = rope_angles(config, jnp.asarray([[position]]), jnp.asarray([length], jnp.int32))
    return np.asarray(cos)[0, 0], np.asarray(sin)[0, 0]


@pytest.mark.parametrize("theta", [10000.0, 1e6, 5e6])
def test_default_frequencies(theta: float) -> None:
    inverse, factor = inverse_frequencies(model(theta=theta))
    np.testing.assert_allclose(inverse, plain(theta), rtol=CLOSE)
    assert factor == 1
    assert inverse[0] == 1


def test_linear_frequencies() -> None:
    inverse, factor = inverse_frequencies(model(rope_type="linear", factor=8.0))
    np.testing.assert_allclose(inverse, plain(10000) / 8, rtol=CLOSE)
    assert factor == 1


def yarn(config: ModelConfig) -> np.ndarray:
    """By wavelength: a pair that turns beta_fast times or more in the original length is left as it is, one that turns
    beta_slow times or less is stretched, and between them the share goes straight from the one to the other."""
    rope, dim = config.rope, config.head_dim
    original = rope.original_max_position_embeddings or config.max_position_embeddings
    factor = rope.factor or config.max_position_embeddings / original
    first = dim / 2 * math.log(original / (2 * math.pi * rope.beta_fast), rope.theta)
    last = dim / 2 * math.log(original / (2 * math.pi * rope.beta_slow), rope.theta)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    last += 0.001 * (first == last)
    inverse = plain(rope.theta, dim)
    for pair in range(dim // 2):
        share = min(max((pair - first) / (last - first), 0), 1)
        inverse[pair] *= 1 - share + share / factor
    return inverse


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}


@pytest.mark.parametrize(
    ("options", "attention_factor"),
    [
        (YARN, 0.1 * math.log(4) + 1),
        (YARN | {"truncate": False}, 0.1 * math.log(4) + 1),
        (YARN | {"theta": 1e6, "beta_fast": 20.0, "beta_slow": 2.0}, 0.1 * math.log(4) + 1),
        (YARN | {"attention_factor": 1.5}, 1.5),
        (YARN | {"mscale": 2.0, "mscale_all_dim": 0.5}, (0.2 * math.log(4) + 1) / (0.05 * math.log(4) + 1)),
        (YARN | {"factor": None}, 0.1 * math.log(4096 / 1024) + 1),
        (YARN | {"factor": 1.0}, 1.0),
    ],
    ids=["plain", "untruncated", "betas", "attention_factor", "mscale", "no_factor", "factor_1"],
)
def test_yarn_frequencies(options: dict, attention_factor: float) -> None:
    config = model(head_dim=64, **options)
    inverse, factor = inverse_frequencies(config)
    np.testing.assert_allclose(inverse, yarn(config), rtol=CLOSE)
    assert factor == pytest.approx(attention_factor)


def test_yarn_leaves_fast_pairs_and_stretches_slow_ones() -> None:
    inverse, _ = inverse_frequencies(model(head_dim=64, **YARN))
    np.testing.assert_allclose(inverse[:4], plain(10000, 64)[:4], rtol=CLOSE)
    np.testing.assert_allclose(inverse[-4:], plain(10000, 64)[-4:] / 4, rtol=CLOSE)


def test_the_attention_factor_is_on_both_cos_and_sin() -> None:
    cos, sin = angles_of(model(head_dim=64, **YARN), 5)
    np.testing.assert_allclose(cos**2 + sin**2, (0.1 * math.log(4) + 1) ** 2, rtol=1e-5)


@pytest.mark.parametrize("length", [1, 100, 128, 129, 200, 500])
def test_dynamic_frequencies_grow_with_the_sequence(length: int) -> None:
    config = model(max_position_embeddings=128, rope_type="dynamic", factor=3.0)
    growth = 3 * max(length, 128) / 128 - 2
    inverse = plain(10000 * growth ** (H / (H - 2)))
    for position in (0, 1, 7):
        cos, sin = angles_of(config, position, length)
        np.testing.assert_allclose(cos, np.cos(position * inverse), atol=1e-5)
        np.testing.assert_allclose(sin, np.sin(position * inverse), atol=1e-5)


def test_dynamic_is_the_default_up_to_the_trained_length() -> None:
    dynamic = model(max_position_embeddings=128, rope_type="dynamic", factor=3.0)
    np.testing.assert_allclose(angles_of(dynamic, 9, 128), angles_of(model(), 9), atol=1e-6)
    assert np.abs(np.subtract(angles_of(dynamic, 9, 129), angles_of(model(), 9))).max() > 1e-4


@pytest.mark.parametrize("rope", [{}, {"rope_type": "linear", "factor": 2.0}, YARN], ids=["default", "linear", "yarn"])
def test_only_dynamic_reads_the_length(rope: dict) -> None:
    np.testing.assert_array_equal(angles_of(model(**rope), 9, 1), angles_of(model(**rope), 9, 10**5))


POSITIONS = st.integers(0, 2000)


def rotated(x: np.ndarray, position: int) -> np.ndarray:
    cos, sin = rope_angles(model(), jnp.asarray([[position]]), jnp.asarray([1], jnp.int32))
    return np.asarray(rotate(jnp.asarray(x, jnp.float32).reshape(1, 1, 1, H), cos, sin)).ravel()


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32 - 1), POSITIONS, POSITIONS, st.integers(0, 500))
def test_a_rotation_keeps_norms_and_sees_distances_alone(seed: int, first: int, second: int, shift: int) -> None:
    query, key = np.random.default_rng(seed).normal(size=(2, H))
    turned, other = rotated(query, first), rotated(key, second)
    assert np.linalg.norm(turned) == pytest.approx(np.linalg.norm(query), rel=1e-5)
    pairs, before = turned.reshape(2, -1), query.reshape(2, -1)  # pair i is (x[i], x[i + H/2])
    np.testing.assert_allclose(np.hypot(*pairs), np.hypot(*before), rtol=1e-4)
    further = rotated(query, first + shift) @ rotated(key, second + shift)
    assert further == pytest.approx(turned @ other, abs=1e-2)  # angles of 2000 in float32: 1e-4 each


def test_a_rotation_by_hand() -> None:
    x = np.arange(1.0, H + 1)
    angle = 3 * plain(10000)
    first, second = x[: H // 2], x[H // 2 :]
    expected = [first * np.cos(angle) - second * np.sin(angle), second * np.cos(angle) + first * np.sin(angle)]
    np.testing.assert_allclose(rotated(x, 3), np.concatenate(expected), rtol=1e-5)
    np.testing.assert_array_equal(rotated(x, 0), x)


def test_a_rotation_keeps_the_dtype() -> None:
    cos, sin = rope_angles(model(), jnp.asarray([[1, 2]]), jnp.asarray([2], jnp.int32))
    assert cos.dtype == sin.dtype == jnp.float32
    assert rotate(jnp.ones((1, 2, 3, H), jnp.bfloat16), cos, sin).dtype == jnp.bfloat16
