"""Calibration of the predictors: recall, estimators, the choice between methods, and the tool, on tiny models."""

import dataclasses
import itertools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe import checkpoint
from jmoe.convert import convert_hf
from jmoe.experts import activation, prefetch
from jmoe.experts.prefetch_file import read_calibration
from jmoe.synthetic import write_synthetic
from jmoe.training import prefetch_recall
from jmoe.training.prefetch import (
    EstimatorTraining,
    Observation,
    default_vectors,
    divergence,
    join,
    observe,
    start_estimators,
    train_estimators,
)
from jmoe.training.prefetch_calibration import Split, calibrate, held_out_recall
from tests.models import SMALL, on_device, prompts, weights
from tools import calibrate_prefetch

CONFIG = dataclasses.replace(SMALL, mlp_only_layers=())
TRAINING = EstimatorTraining(width=16, num_steps=60, batch_size=64, learning_rate=3e-3)


@pytest.fixture(scope="module")
def sequences() -> list[Observation]:
    model = on_device(weights(CONFIG))
    tokens = np.array([prompts(48, config=CONFIG, seed=seed)[0] for seed in range(8)], np.int32)
    return [jax.device_get(observe(CONFIG, model.params, model.store.layers, row[None])) for row in tokens]


# Recall.


def test_recall_of_an_oracle_is_one_and_of_its_opposite_zero(sequences: list[Observation]) -> None:
    for seen in sequences[:2]:
        for logits, ids in zip(seen.logits, seen.expert_ids, strict=True):
            assert prefetch_recall.recall(logits, ids, 2) == prefetch_recall.recall(logits, ids, 4) == 1
            assert prefetch_recall.recall(-logits, ids, 2) == 0
            assert prefetch_recall.recall(logits, ids, 1) == 0.5


def test_recall_counts_what_was_found() -> None:
    scores = jnp.array([[4.0, 3, 2, 1], [1, 2, 3, 4]])
    ids = jnp.array([[0, 3], [0, 3]])
    assert prefetch_recall.recall(scores, ids, 2) == 0.5
    assert prefetch_recall.recall(scores, ids, 3) == 0.5
    assert prefetch_recall.recall(scores, ids, 4) == 1


def test_previous_experts_in_plain_python(sequences: list[Observation]) -> None:
    measured = sequences[5:7]
    found = np.zeros(3)
    for seen in measured:
        for layer, ids in enumerate(seen.expert_ids.tolist()):
            found[layer] += sum(len(set(now) & set(before)) for before, now in itertools.pairwise(ids))
    made = prefetch_recall.of_the_past(sequences[:2], measured, 2)
    np.testing.assert_allclose(made["previous"], found / (2 * 47 * 2))
    assert ((made["activation"] > 0) & (made["activation"] < 1)).all()


def test_activation_repeats_a_request_that_it_knows(sequences: list[Observation]) -> None:
    """Layers of 2 experts always: after a step the collection and the request say so."""
    seen = sequences[0]
    ids = np.broadcast_to(np.array([[[1, 6]], [[0, 2]], [[4, 5]]]), seen.expert_ids.shape)
    made = prefetch_recall.of_the_past([], [dataclasses.replace(seen, expert_ids=ids)], 2)
    np.testing.assert_array_equal([made["previous"], made["activation"]], np.ones((2, 3)))


def test_before_attention_the_router_knows_all_if_attention_adds_nothing() -> None:
    model, row = on_device(weights(CONFIG)), np.array(prompts(48, config=CONFIG), np.int32)
    silent = {path: jnp.zeros_like(leaf) if "o_proj" in path else leaf for path, leaf in model.params.items()}
    seen, oracle = (observe(CONFIG, params, model.store.layers, row) for params in (model.params, silent))
    np.testing.assert_array_equal(prefetch_recall.of_after_experts([oracle], 2), np.ones(3))
    assert (prefetch_recall.of_after_experts([seen], 2) < 1).all()


@pytest.mark.parametrize("num_slots", [2, 5])
def test_guesses_of_missing_experts_in_plain_python(sequences: list[Observation], num_slots: int) -> None:
    predictor = prefetch.make_predictor(CONFIG, weights(CONFIG).params)
    made = prefetch_recall.of_missing(predictor, sequences[5:], sequences[:2], num_slots)
    expected_use = from_past(sequences[5:], sequences[:2])
    for layer in range(3):
        slots, rights, missing, tokens = (
            list(range(num_slots))[::-1],
            np.zeros(2, int),
            0,
            0,
        )  # the last used is the last
        for seen, past in zip(sequences[:2], expected_use, strict=True):
            for n, ids in enumerate(seen.expert_ids[layer].tolist()):
                for which, scores in enumerate((seen.early_logits[layer][n], past[n][layer])):
                    guess = next(expert for expert in np.argsort(-scores, kind="stable") if expert not in slots)
                    rights[which] += n > 0 and guess in ids
                missing += n > 0 and bool(set(ids) - set(slots))
                tokens += n > 0
                slots = ([slot for slot in slots if slot not in ids] + ids)[-num_slots:]
        assert made["missing"][layer] == missing / tokens
        assert [made[name][layer] for name in ("after_experts", "activation")] == (rights / tokens).tolist()
    assert np.isnan(made["router"][0])
    np.testing.assert_array_equal(made["hybrid"], made["router"])  # the plain router everywhere


def from_past(taught: list[Observation], measured: list[Observation]) -> list[list[np.ndarray]]:
    """What past requests let expect, [L, E], before each token of the measured sequences."""
    state, found = activation.start(3, CONFIG.num_experts), []
    for seen in [*taught, *measured]:
        found.append([])
        for used in prefetch_recall.used_experts(seen):
            found[-1].append(np.asarray(state.expected))
            state = activation.update(state, used, jnp.zeros((), jnp.int32))
        state = activation.finish(state)
    return found[len(taught) :]


def test_nothing_to_measure(sequences: list[Observation]) -> None:
    with pytest.raises(ValueError, match="nothing to measure in 0 sequences"):
        prefetch_recall.num_choices([])


def test_a_dearer_method_has_to_bring_more() -> None:
    nan = np.nan
    measured = {
        ("router", 1): np.array([nan, 0.5, 0.5, 0.5, 0.5]),
        ("default_vectors", 1): np.array([nan, 0.505, 0.6, 0.6, 0.4]),
        ("estimator", 1): np.array([nan, nan, 0.605, 0.7, 0.52]),
        ("router", 2): np.array([nan, nan, 0.5, 0.5, 0.5]),
        ("default_vectors", 2): np.array([nan, nan, 0.5, 0.6, 0.4]),
    }
    assert prefetch_recall.choose(measured, 5) == (
        ("router", "default_vectors", "estimator", "estimator"),
        ("router", "default_vectors", "router"),
    )


# Estimators.


def test_training_estimators_lowers_the_divergence_on_other_tokens(sequences: list[Observation]) -> None:
    params, taught, other = weights(CONFIG).params, join(sequences[:6]), join(sequences[6:])
    predictor = prefetch.make_predictor(CONFIG, params, default_vectors=default_vectors(taught))

    def batch(seen: Observation):
        q = [prefetch.quasi_hidden(predictor, n, seen.residuals[n], seen.routing(n)) for n in (0, 1)]
        return np.stack(q), np.stack(predictor.routers[1:]), seen.logits[1:]

    trained = train_estimators(TRAINING, *batch(taught))
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *trained)
    q, routers, logits = batch(other)
    untrained = divergence(start_estimators(TRAINING, 2, CONFIG.hidden_size), q, routers, logits)
    true, guessed = (np.asarray(jax.nn.log_softmax(x)) for x in (logits, q @ np.swapaxes(routers, 1, 2)))
    np.testing.assert_allclose(untrained, (np.exp(true) * (true - guessed)).sum(-1).mean(-1), rtol=1e-4)
    after = np.asarray(divergence(stacked, q, routers, logits))
    assert (after < np.asarray(untrained)).all()
    assert after.sum() < 0.9 * float(untrained.sum())
    again = train_estimators(TRAINING, *batch(taught))
    jax.tree.map(np.testing.assert_array_equal, trained, again)


def test_training_that_diverges_is_refused() -> None:
    training = dataclasses.replace(TRAINING, num_steps=2)
    nothing = np.full((1, 8, 4), np.nan, np.float32)
    with pytest.raises(RuntimeError, match="diverged; lower learning_rate"):
        train_estimators(training, nothing, np.ones((1, 3, 4), np.float32), np.ones((1, 8, 3), np.float32))


@pytest.mark.parametrize("wrong", [{"width": 0}, {"num_steps": 0}, {"batch_size": 0}, {"learning_rate": 0.0}])
def test_settings_out_of_range(wrong: dict) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}=0"):
        EstimatorTraining(**wrong)


# The whole.


def test_who_teaches_decides_and_is_measured(sequences: list[Observation]) -> None:
    split = Split.of(sequences)
    parts = [
        [next(n for n, seen in enumerate(sequences) if seen is mine) for mine in part] for part in vars(split).values()
    ]
    assert parts == [[0, 2, 4], [6], [1, 3, 5, 7]]
    assert [len(part) for part in vars(Split.of(sequences[:3])).values()] == [1, 1, 1]
    with pytest.raises(ValueError, match="2 sequences; expected 3 or more"):
        Split.of(sequences[:2])


def test_calibration_trains_where_recall_is_low_and_chooses(sequences: list[Observation]) -> None:
    params, split = weights(CONFIG).params, Split.of(sequences)
    steps = []
    without = calibrate(CONFIG, params, split, "f", TRAINING, estimate_below=0.0, progress=lambda: steps.append(1))
    assert jax.tree.leaves(without.estimators) == steps == []
    made = calibrate(CONFIG, params, split, "f", TRAINING, estimate_below=1.1, progress=lambda: steps.append(1))
    assert len(steps) == 60
    assert [[each is not None for each in row] for row in made.estimators] == [[True, True], [True]]
    np.testing.assert_array_equal(made.default_vectors, default_vectors(join(split.taught)))
    rates = held_out_recall(made.predictor(CONFIG, params), split, 2)
    for n, suffix in ((1, ""), (2, " +2")):
        chosen = [rates[f"{method}{suffix}"][n + at] for at, method in enumerate(made.methods[n - 1])]
        np.testing.assert_allclose(rates[f"hybrid{suffix}"][n:], chosen, atol=0.02)  # compiled differently
        np.testing.assert_array_equal(rates[f"hybrid{suffix}"][n:], made.recall[n - 1])
        assert np.isnan(rates[f"hybrid{suffix}"][:n]).all()
    assert np.isnan(held_out_recall(without.predictor(CONFIG, params), split, 2)["estimator"]).all()


def test_a_model_with_one_layer_of_experts_has_nothing_to_predict() -> None:
    config = dataclasses.replace(CONFIG, mlp_only_layers=(0, 2))
    model = on_device(weights(config))
    tokens = [np.array(prompts(8, config=config, seed=seed), np.int32) for seed in range(3)]
    split = Split.of([jax.device_get(observe(config, model.params, model.store.layers, row)) for row in tokens])
    made = calibrate(config, model.params, split, "f", TRAINING, estimate_below=1.1)
    assert made.methods == made.estimators == made.recall == ((), ())


# The tool.

BYTES = dataclasses.replace(CONFIG, vocab_size=259)  # a byte a token


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    write_synthetic(BYTES, directory / "hf", regime="flat", seed=0)
    convert_hf(directory / "hf", directory / "converted")
    return directory / "converted"


@pytest.fixture
def texts(tmp_path: Path) -> list[str]:
    for name, text in {
        "a": "one two three " * 3,
        "b": "abcdefghij" * 5,
        "c": "xyzzy " * 8,
        "d": "[1, 2, 3]" * 6,
    }.items():
        (tmp_path / name).write_text(text)
    return [str(tmp_path / name) for name in "abcd"]


def test_from_texts_to_a_file_beside_the_checkpoint(
    model: Path, texts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "figures.json"
    arguments = ["--model", model, "--text", *texts, "--tokens", 40, "--num-steps", 3, "--estimate-below", 1.1]
    assert calibrate_prefetch.main([str(argument) for argument in [*arguments, "--json", file]]) == 0
    printed, report = capsys.readouterr().out.splitlines(), json.loads(file.read_text())
    fingerprint = checkpoint.read_manifest(model).fingerprint
    calibration = read_calibration(model / "prefetch.safetensors", BYTES, fingerprint)
    assert calibration.default_vectors.shape == (3, 8, 32)
    assert printed[0] == "40 tokens teach, 40 decide, 80 are measured"
    assert printed[2] == "recall with 2 guesses for 2 experts"
    expected = "layer previous activation router default_vectors estimator hybrid after_experts"
    assert printed[3].split()[:8] == expected.split()
    assert [line.split()[0] for line in printed[4:7]] == ["0", "1", "2"]
    assert printed[4].split()[3:7] == printed[4].split()[8:] == ["-"] * 4
    assert "how often the first guess that is not resident is right, with 4 slots (LRU)" in printed
    assert report["fingerprint"] == fingerprint
    assert report["recall"]["2"]["hybrid"][1:] == pytest.approx(calibration.recall[0], abs=1e-4)
    for name, row in report["recall"]["2"].items():
        pairs = zip(row, report["recall"]["4"][name], report["first_guess_right"][name], strict=True)
        for few, many, first in pairs:
            assert few is many is first is None or 0 <= first / 2 <= few <= many <= 1
    assert list(report["first_missing_right"]) == ["2", "4"]
    for rates in report["first_missing_right"].values():
        assert list(rates) == ["missing", "activation", "router", "hybrid", "after_experts"]
        assert all(
            0 <= right <= missing for right, missing in zip(rates["after_experts"], rates["missing"], strict=True)
        )
    checkpoint.read_config(model)  # which is none the worse for it


def test_what_is_wrong_is_said_before_anything_is_run(
    model: Path, texts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", str(model), "--text", *texts, "--tokens", "40"]
    assert calibrate_prefetch.main([*arguments, "--output", str(tmp_path / "none" / "file")]) == 2
    assert f"no directory {tmp_path / 'none'}; make it first" in capsys.readouterr().err
    assert calibrate_prefetch.main([*arguments, "--width", "0"]) == 2
    assert "width=0 must be at least 1" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        calibrate_prefetch.main([*arguments, "--slot-shares", "1"])
    assert "--slot-shares have to be above 0 and below 1" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        calibrate_prefetch.main([*arguments, "--num-documents", "2"])
