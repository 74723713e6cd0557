"""Predictors of the experts of the layers ahead: their formulas, when they are exact, and the file they are kept in."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jmoe.decoding.resident import forward_routed
from jmoe.experts import activation, prefetch
from jmoe.experts.prefetch import Estimator, everywhere, make_predictor, placed, predict, predicted_logits
from jmoe.experts.prefetch_file import Calibration, file_beside, read_calibration
from jmoe.model.router import Routing
from jmoe.training.prefetch import default_vectors, observe
from tests.models import SMALL, on_device, prompts, weights

CONFIG = dataclasses.replace(SMALL, mlp_only_layers=())  # three layers, each a mixture of experts
L, E, A, D = 3, CONFIG.num_experts, CONFIG.num_experts_per_tok, CONFIG.hidden_size


def observed(config=CONFIG, length: int = 12, **changed):
    """A sequence of a model some of whose trunk parameters are changed: (parameters, tokens, what was observed)."""
    model = on_device(weights(config))
    params = {**model.params, **{name.replace("__", "/"): array for name, array in changed.items()}}
    tokens = np.array(prompts(length, config=config), np.int32)
    return params, tokens, observe(config, params, model.store.layers, tokens)


def estimator(rng: np.random.Generator, hidden: int = 5) -> Estimator:
    return Estimator(*(rng.normal(size=shape).astype(np.float32) for shape in ((hidden, D), (hidden,), (D, hidden))))


def calibration(fingerprint: str = "abc") -> Calibration:
    rng = np.random.default_rng(1)
    return Calibration(
        fingerprint=fingerprint,
        default_vectors=rng.normal(size=(L, E, D)).astype(np.float32),
        estimators=placed({(1, 1): estimator(rng), (2, 0): estimator(rng, 4)}, L),
        methods=(("default_vectors", "estimator"), ("estimator",)),
        recall=((0.5, 0.25), (0.125,)),
    )


# What is observed.


@pytest.mark.parametrize("config", [CONFIG, SMALL], ids=["all MoE", "a dense layer between"])
def test_observing_changes_nothing(config) -> None:
    params, tokens, seen = observed(config)
    run = jax.jit(functools.partial(forward_routed, config))
    _, routings = run(params, on_device(weights(config)).store.layers, tokens)
    assert len(routings) == len(config.moe_layers) == len(seen.logits)
    for layer, routing in enumerate(routings):
        np.testing.assert_array_equal(seen.expert_ids[layer], routing.expert_ids)
        np.testing.assert_allclose(seen.logits[layer], routing.logits, atol=1e-6)
    for n, layer in enumerate(config.moe_layers):  # the router sees the norm of the residual, and nothing else
        x = normed(np.asarray(seen.residuals[n]), params[f"layers/{layer}/post_attention_norm/scale"])
        np.testing.assert_allclose(x @ np.asarray(params[f"layers/{layer}/router/kernel"]).T, seen.logits[n], atol=1e-5)


def test_default_vectors_are_mean_outputs_of_the_tokens_that_chose_the_expert() -> None:
    params, _, seen = observed()
    experts, x = np.asarray(weights(CONFIG).store.layers[1]), np.asarray(seen.residuals[1])
    x = normed(x, params["layers/1/post_attention_norm/scale"])
    made, ids = default_vectors(seen), np.asarray(seen.expert_ids[1])
    for e in range(E):
        gate, up = x @ experts[e, 0].T, x @ experts[e, 1].T
        mine = (gate / (1 + np.exp(-gate)) * up @ experts[e, 2])[(ids == e).any(axis=1)]
        assert int(seen.num_chosen[1, e]) == len(mine)
        if len(mine):
            np.testing.assert_allclose(made[1, e], mine.mean(axis=0), atol=1e-6)


def test_an_expert_without_tokens_gets_its_layers_mean() -> None:
    seen = observed()[2]
    sums = np.zeros((1, E, D), np.float32)
    sums[0, 0], sums[0, 3] = 6, 2
    counts = np.zeros((1, E), np.int32)
    counts[0, 0], counts[0, 3] = 3, 1
    made = default_vectors(dataclasses.replace(seen, output_sums=sums, num_chosen=counts))
    assert made[0, :, 0].tolist() == [2] * E
    sums[0, 3] = 10
    made = default_vectors(dataclasses.replace(seen, output_sums=sums, num_chosen=counts))
    assert made[0, :, 0].tolist() == [2, 4, 4, 10, 4, 4, 4, 4]


# Formulas, in numpy.


def normed(x: np.ndarray, scale) -> np.ndarray:
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + CONFIG.rms_norm_eps) * np.asarray(scale)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def without_row(routing: Routing, row: int) -> Routing:
    """The row is no token."""
    ids, gates = routing.expert_ids.at[row].set(E), routing.combine_weights.at[row].set(0.0)
    return dataclasses.replace(routing, expert_ids=ids, combine_weights=gates)


@pytest.mark.parametrize("ahead", [1, 2])
@pytest.mark.parametrize("method", prefetch.METHODS)
def test_predictors_are_their_formulas(method: prefetch.Method, ahead: int) -> None:
    params, _, seen = observed()
    rng, layer = np.random.default_rng(0), L - 1 - ahead
    vectors, corrects = rng.normal(size=(L, E, D)).astype(np.float32), estimator(rng)
    predictor = make_predictor(
        CONFIG,
        params,
        methods=everywhere(method, L),
        default_vectors=vectors,
        estimators=everywhere(corrects, L),
    )
    routing = without_row(seen.routing(layer), 4)
    r, ids, gates = (np.asarray(x) for x in (seen.residuals[layer], routing.expert_ids, routing.combine_weights))
    if method != "router":
        d = np.zeros_like(r)
        for t in range(12):
            for a in range(A):
                d[t] += gates[t, a] * (vectors[layer, ids[t, a]] if ids[t, a] < E else 0)
        r = r + d
    q = normed(r, params[f"layers/{layer + ahead}/post_attention_norm/scale"])
    if method == "estimator":
        up, bias, down = (np.asarray(part) for part in (corrects.up, corrects.bias, corrects.down))
        hidden = q @ up.T + bias
        q = q + hidden / (1 + np.exp(-hidden)) @ down.T
    logits = q @ np.asarray(params[f"layers/{layer + ahead}/router/kernel"]).T
    made = predicted_logits(predictor, layer, seen.residuals[layer], routing, ahead=ahead)
    np.testing.assert_allclose(made, logits, rtol=1e-4, atol=1e-4)
    scores = jax.jit(predict, static_argnames=("layer", "ahead"))(
        predictor, layer=layer, residual=seen.residuals[layer], routing=routing, ahead=ahead
    )
    expected = softmax(logits)[np.arange(12) != 4].sum(axis=0)
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-5)
    assert float(jnp.sum(scores)) == pytest.approx(11, abs=1e-4)


def test_with_attention_that_adds_nothing_and_exact_vectors_the_guess_is_the_truth() -> None:
    """One token: the mean output of an expert is its output for that token, and d is what the layer adds."""
    silent = {"layers__1__attention__o_proj__kernel": jnp.zeros((D, 4 * 8), jnp.float32)}

    def guessed_and_true(method: prefetch.Method, **changed):
        params, _, seen = observed(length=1, **changed)
        predictor = make_predictor(
            CONFIG, params, methods=everywhere(method, L), default_vectors=default_vectors(jax.device_get(seen))
        )
        guess = predict(predictor, 0, seen.residuals[0], seen.routing(0))
        return (
            np.asarray(guess) / np.sum(guess),
            softmax(np.asarray(seen.logits[1]))[0],
            set(np.asarray(seen.expert_ids[1][0])),
        )

    guess, truth, chosen = guessed_and_true("default_vectors", **silent)
    np.testing.assert_allclose(guess, truth, atol=1e-6)
    assert set(np.argsort(guess)[-A:].tolist()) == chosen
    for method, changed in (("router", silent), ("default_vectors", {})):  # either part left out: no longer exact
        guess, truth, _ = guessed_and_true(method, **changed)
        assert np.abs(guess - truth).max() > 1e-3


def test_scores_by_last_use() -> None:
    scores = jnp.zeros(4)
    for used in ([0, 1, 2, 0], [0, 1, 0, 1], [1, 0, 0, 1]):
        scores = prefetch.recency(scores, jnp.array(used))
    assert np.argsort(-np.asarray(scores)).tolist() == [3, 0, 1, 2]


def test_guesses_by_past_requests_are_those_of_the_activation_policy() -> None:
    state = activation.start(2, 4)
    state = activation.update(state, jnp.array([[1, 0, 0, 1], [0, 1, 1, 0]]), jnp.int32(0))
    for layer in (-1, 0):
        np.testing.assert_allclose(
            prefetch.from_activation(state, layer), activation.predict(state, layer)[layer + 1], atol=0
        )
    assert np.asarray(prefetch.from_activation(state, -1) > 0).tolist() == [True, False, False, True]
    with pytest.raises(ValueError, match="layer=1, ahead=1: expected a layer there, of 2"):
        prefetch.from_activation(state, 1)


# What cannot be.


def routing_of_one() -> Routing:
    return Routing(jnp.zeros((1, A), jnp.int32), jnp.ones((1, A)), jnp.zeros((1, E)))


@pytest.mark.parametrize(("layer", "ahead"), [(2, 1), (1, 2), (0, 3), (0, 0), (-1, 1)])
def test_a_layer_that_is_not_there(layer: int, ahead: int) -> None:
    predictor = make_predictor(CONFIG, weights(CONFIG).params)
    with pytest.raises(ValueError, match=f"layer={layer}, ahead={ahead}: expected ahead in 1..2 .* of 3 MoE layers"):
        predict(predictor, layer, jnp.zeros((1, D)), routing_of_one(), ahead=ahead)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"methods": everywhere("router", 4)}, "methods for .3, 2. layers .* expected .2, 1. of each"),
        ({"methods": everywhere("oracle", L)}, "unknown methods .'oracle'.; expected some of router"),
        ({"methods": everywhere("default_vectors", L)}, "need default vectors, and there are none"),
        ({"default_vectors": np.zeros((L, E + 1, D))}, "default vectors .3, 9, 32.; expected .3, 8, 32."),
        (
            {"methods": everywhere("estimator", L), "default_vectors": np.zeros((L, E, D))},
            r"layers 0 \(\+1\), 1 \(\+1\), 0 \(\+2\) lack the estimator",
        ),
    ],
)
def test_a_predictor_that_does_not_fit_together(given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_predictor(CONFIG, weights(CONFIG).params, **given)


# The file.


def test_a_calibration_comes_back_from_its_file(tmp_path: Path) -> None:
    written, path = calibration(), file_beside(tmp_path)
    written.save(path)
    written.save(path)  # one that is there is replaced
    assert [file.name for file in tmp_path.iterdir()] == ["prefetch.safetensors"]
    read = read_calibration(path, CONFIG, "abc")
    assert (read.methods, read.recall) == (written.methods, written.recall)
    assert jax.tree.structure(read.estimators) == jax.tree.structure(written.estimators)
    pair = ((each.default_vectors, each.estimators) for each in (read, written))
    jax.tree.map(np.testing.assert_array_equal, *pair)
    params, seen = observed()[0], observed()[2]
    guesses = [
        predict(each.predictor(CONFIG, params), 1, seen.residuals[1], seen.routing(1)) for each in (read, written)
    ]
    np.testing.assert_array_equal(*guesses)


def test_what_a_calibration_takes_of_the_device_is_what_its_predictor_has_of_its_own() -> None:
    made, params = calibration(), observed()[0]
    predictor = made.predictor(CONFIG, params)
    own = dataclasses.replace(predictor, norms=(), routers=())
    assert made.device_bytes(CONFIG) == sum(leaf.nbytes for leaf in jax.tree.leaves(own)) > 0
    half = dataclasses.replace(CONFIG, dtype="bfloat16")
    assert made.device_bytes(half) == made.device_bytes(CONFIG) // 2


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "prefetch.safetensors"
    calibration().save(path)
    before = path.read_bytes()
    broken = dataclasses.replace(calibration(), recall=object())
    with pytest.raises(TypeError):
        broken.save(path)
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none: no such file; .* tools.calibrate_prefetch --output"):
        read_calibration(tmp_path / "none", CONFIG, "abc")


def test_another_checkpoints_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "prefetch.safetensors"
    calibration("abc").save(path)
    with pytest.raises(
        RuntimeError, match=r"'fingerprint': 'abc'}, but expected is .*'fingerprint': 'xyz'}. Delete it"
    ):
        read_calibration(path, CONFIG, "xyz")


def test_a_model_of_another_shape_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "prefetch.safetensors"
    calibration().save(path)
    with pytest.raises(RuntimeError, match=r"default_vectors \(3, 8, 32\), expected \(2, 8, 32\)"):
        read_calibration(path, SMALL, "abc")


@pytest.mark.parametrize("how", ["cut off", "not safetensors", "a tensor missing", "methods no JSON"])
def test_a_damaged_file_is_refused(tmp_path: Path, how: str) -> None:
    path = tmp_path / "prefetch.safetensors"
    calibration().save(path)
    metadata = {"format": "jmoe prefetch", "version": "1", "fingerprint": "abc", "methods": "[", "recall": "[]"}
    tensors = load_file(path)
    if how == "cut off":
        path.write_bytes(path.read_bytes()[:-9])
    elif how == "not safetensors":
        path.write_bytes(b"PK\x03\x04 and more")
    elif how == "a tensor missing":
        del tensors["estimators/2/0/up"]
        save_file(tensors, path, metadata)
    else:
        save_file(tensors, path, metadata)
    with pytest.raises(RuntimeError, match=r"(damaged|estimators/2/0/up None).*calibrate again"):
        read_calibration(path, CONFIG, "abc")
