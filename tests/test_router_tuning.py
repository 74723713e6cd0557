"""Router tuning: what is trained and what is not, experts that stream, the gate, and a run that was killed."""

import dataclasses
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe import memory
from jmoe.decoding.resident import forward_routed
from jmoe.training import frozen as frozen_module
from jmoe.training import tuning_loop
from jmoe.training.batches import Batches
from jmoe.training.config import RouterTuningConfig
from jmoe.training.frozen import Frozen, Placement, forward, piece_size, router_paths
from jmoe.training.loop import HeldOut
from jmoe.training.router_tuning import Knobs, Terms, Tuner
from jmoe.training.tuning_loop import score_held_out, steps_per_call, tokens_of, tune
from tests.models import SMALL, on_device, weights

ROOT = Path(__file__).parent.parent
TUNING = RouterTuningConfig(
    num_steps=12,
    batch_size=2,
    sequence_length=24,
    warmup_steps=0,
    ramp_steps=2,
    window=8,
    lags=(1, 4),
    reuse=3.0,
    trust=0.0,
    learning_rate=3e-2,
    eval_every=4,
    checkpoint_every=4,
    most_worse=10.0,
)
TOKENS = np.random.default_rng(0).integers(0, 96, (2, 25)).astype(np.int32)
LAYERS = "layers/0/router/kernel", "layers/2/router/kernel"


@pytest.fixture(scope="module")
def resident() -> Frozen:
    return Frozen(weights(SMALL).params, on_device(weights(SMALL)).store.layers)


@pytest.fixture(scope="module")
def offloaded() -> Frozen:
    return Frozen(weights(SMALL).params, weights(SMALL).store.layers)


def documents(num: int, seed: int) -> list[np.ndarray]:
    starts = np.random.default_rng(seed).integers(0, 7, num)
    return [((start + np.arange(40)) % 7).astype(np.uint16) for start in starts]


def batches(tuning: RouterTuningConfig = TUNING) -> Batches:
    return Batches(documents(12, 0), 96, tuning.batch_size, tuning.sequence_length, tuning.seed)


HELD_OUT = HeldOut.cut(documents(5, 1), 96, 200, TUNING.sequence_length)


def quiet(step: int, terms: dict[str, float], tokens_per_s: float) -> None:
    pass


def gradients(frozen: Frozen, placement: Placement, remat: bool = False) -> tuple[dict, Terms]:
    tuner = Tuner(SMALL, dataclasses.replace(TUNING, remat=remat), placement)
    state, knobs = (
        tuner.start(frozen),
        Knobs.of(dataclasses.replace(TUNING, trust=1.0, smoothness=1.0, lagged=1.0, window_entropy=1.0)),
    )

    @jax.jit
    def run(routers, frozen):
        return jax.grad(tuner.loss, has_aux=True)(routers, frozen, TOKENS, knobs, jnp.float32(1))

    return run(state.routers, frozen)


def test_the_forward_pass_is_the_models(resident: Frozen) -> None:
    logits, routed = jax.jit(lambda frozen: forward(SMALL, frozen, frozen.routers(SMALL), TOKENS))(resident)
    reference = jax.jit(lambda frozen: forward_routed(SMALL, frozen.trunk, frozen.experts, TOKENS))
    expected, routings = reference(resident)
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    for n, routing in enumerate(routings):
        np.testing.assert_array_equal(routed.expert_ids[n].reshape(-1, 2), routing.expert_ids)
        log_p = jax.nn.log_softmax(routing.logits)
        np.testing.assert_allclose(routed.log_p[n].reshape(log_p.shape), log_p, atol=1e-5)
    np.testing.assert_array_equal(routed.log_p, routed.log_reference)


def test_the_reference_is_the_frozen_routers_answer_to_what_is_read_now(resident: Frozen) -> None:
    routers = {path: 2 * kernel for path, kernel in resident.routers(SMALL).items()}
    run = jax.jit(lambda routers, frozen: forward(SMALL, frozen, routers, TOKENS))
    _, routed = run(routers, resident)
    expected = jax.nn.log_softmax(routed.log_reference[0] * 2)  # twice the kernel: twice the logits
    np.testing.assert_allclose(routed.log_p[0], expected, atol=1e-4)
    _, plain = run(resident.routers(SMALL), resident)
    assert np.abs(routed.log_reference[1] - plain.log_reference[1]).max() > 1e-3, "the rows below have changed"


@pytest.fixture(scope="module")
def expected(resident: Frozen) -> tuple[dict, Terms]:
    """Gradients and terms with every expert on the device, and nothing computed twice."""
    return gradients(resident, Placement())


@pytest.mark.parametrize("piece", [2])
def test_offloaded_experts_give_the_gradients_of_resident_ones(
    expected: tuple[dict, Terms], offloaded: Frozen, piece: int
) -> None:
    assert offloaded.experts[0].sharding.memory_kind == "pinned_host"
    made, terms = gradients(offloaded, Placement(offloaded=True, piece=piece))
    assert set(made) == set(LAYERS)
    for path, gradient in expected[0].items():
        assert np.abs(gradient).max() > 1e-3
        np.testing.assert_allclose(made[path], gradient, atol=2e-7)
    for one, other in zip(jax.tree.leaves(expected[1]), jax.tree.leaves(terms), strict=True):
        assert float(one) == pytest.approx(float(other), rel=1e-5)


def test_remat_changes_no_gradient(expected: tuple[dict, Terms], resident: Frozen) -> None:
    for one, other in zip(
        jax.tree.leaves(expected), jax.tree.leaves(gradients(resident, Placement(), remat=True)), strict=True
    ):
        np.testing.assert_allclose(one, other, atol=2e-7)


def test_experts_are_copied_in_pieces_and_never_as_a_layer(offloaded: Frozen) -> None:
    """Temporaries of one layer's experts would show: here experts are nearly all there is."""
    config = dataclasses.replace(SMALL, num_hidden_layers=2, moe_intermediate_size=512, num_experts=16)
    wide = Frozen(weights(config).params, weights(config).store.layers)
    layer_bytes = memory.array_bytes(wide.experts[0])
    tuning = dataclasses.replace(TUNING, batch_size=1)

    def temporaries(piece: int) -> int:
        tuner = Tuner(config, tuning, Placement(offloaded=True, piece=piece))
        tokens = tokens_of(batches(tuning), 0, 1, 1)
        lowered = Tuner.steps.lower(tuner, wide, Knobs.of(tuning), tuner.start(wide), tokens)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert temporaries(1) < layer_bytes / 2
    assert temporaries(16) > layer_bytes, "a piece of all experts would show"


def test_piece_size_divides_the_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frozen_module, "PIECE_BYTES", 1000)
    assert piece_size(12, 100) == 6
    assert piece_size(12, 1) == 12
    assert piece_size(12, 5000) == 1


def test_only_the_routers_change(resident: Frozen) -> None:
    tuner = Tuner(SMALL, TUNING)
    state, terms = tuner.steps(resident, Knobs.of(TUNING), tuner.start(resident), tokens_of(batches(), 0, 2, 1))
    assert set(state.routers) == set(router_paths(SMALL)) == set(LAYERS)
    assert int(state.step) == 2
    assert terms.overlap.shape == (2,)
    for path, kernel in resident.routers(SMALL).items():
        assert np.abs(state.routers[path] - kernel).max() > 1e-3


def test_accumulating_a_batch_twice_is_that_batch(resident: Frozen) -> None:
    twice, tokens = dataclasses.replace(TUNING, gradient_accumulation=2), tokens_of(batches(), 0, 2, 1)
    states = [
        Tuner(SMALL, tuning).steps(resident, Knobs.of(tuning), Tuner(SMALL, tuning).start(resident), given)
        for tuning, given in ((TUNING, tokens), (twice, np.repeat(tokens, 2, axis=1)))
    ]
    for one, other in zip(*map(jax.tree.leaves, states), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_knobs_share_one_compiled_step(resident: Frozen) -> None:
    tuner, tokens = Tuner(SMALL, TUNING), tokens_of(batches(), 0, 2, 1)

    def run(reuse: float):
        knobs = Knobs.of(dataclasses.replace(TUNING, reuse=reuse))
        return tuner.steps(resident, knobs, tuner.start(resident), tokens)[0].routers

    first, num_compiled = run(0.0), Tuner.steps._cache_size()
    second = run(5.0)
    assert Tuner.steps._cache_size() == num_compiled
    assert all(np.abs(first[path] - second[path]).max() > 1e-4 for path in LAYERS)


def test_tuning_raises_reuse_and_keeps_the_best(resident: Frozen, tmp_path: Path) -> None:
    told = []
    outcome = tune(Tuner(SMALL, TUNING), resident, batches(), HELD_OUT, tmp_path, "checkpoint", quiet, told.append)
    assert [evaluation.step for evaluation in told] == [0, 4, 8, 12]
    assert tuple(told) == outcome.evaluations
    assert outcome.best.reuse == max(evaluation.reuse for evaluation in told) > 1.2 * outcome.before.reuse
    bits, reuse = score_held_out(Tuner(SMALL, TUNING), resident, outcome.routers, HELD_OUT)
    assert (bits, reuse) == pytest.approx((outcome.best.bits_per_byte, outcome.best.reuse), rel=1e-6)
    assert not outcome.ended_by_gate


@pytest.fixture(scope="module")
def own_text(resident: Frozen) -> HeldOut:
    """What the model itself would write, greedily: other routers can only predict it worse."""
    write = jax.jit(lambda frozen, ids: jnp.argmax(forward(SMALL, frozen, frozen.routers(SMALL), ids)[0], axis=-1))
    ids = np.tile(np.arange(4, dtype=np.int32)[:, None], (1, TUNING.sequence_length))
    for at in range(1, ids.shape[1]):
        ids[:, at] = np.asarray(write(resident, ids))[:, at - 1]
    return HeldOut.cut(list(ids[3:, 1:]), 3, 100, TUNING.sequence_length)


def test_the_gate_ends_tuning_and_keeps_what_was_before(resident: Frozen, own_text: HeldOut, tmp_path: Path) -> None:
    tuning = dataclasses.replace(TUNING, most_worse=0.01)
    outcome = tune(Tuner(SMALL, tuning), resident, batches(), own_text, tmp_path, "checkpoint", quiet)
    assert outcome.ended_by_gate
    assert [evaluation.step for evaluation in outcome.evaluations] == [0, 4]
    assert outcome.best is outcome.before
    for path, kernel in resident.routers(SMALL).items():
        np.testing.assert_array_equal(outcome.routers[path], kernel)


def test_a_tuning_that_was_cut_off_goes_on_as_if_it_had_not_been(resident: Frozen, tmp_path: Path) -> None:
    tuner, seen = Tuner(SMALL, TUNING), []

    def cut_off(step: int, *rest) -> None:
        seen.append(step)
        if step > 8:
            raise KeyboardInterrupt

    arguments = resident, batches(), HELD_OUT
    with pytest.raises(KeyboardInterrupt):
        tune(tuner, *arguments, tmp_path / "cut", "checkpoint", cut_off)
    resumed = tune(tuner, *arguments, tmp_path / "cut", "checkpoint", lambda step, *rest: seen.append(step))
    whole = tune(tuner, *arguments, tmp_path / "whole", "checkpoint", quiet)
    assert steps_per_call(tuner) == 2
    assert seen == [2, 4, 6, 8, 10, 10, 12], "it went on from step 8"
    assert resumed.evaluations == whole.evaluations
    for one, other in zip(jax.tree.leaves(resumed.routers), jax.tree.leaves(whole.routers), strict=True):
        np.testing.assert_array_equal(one, other)


def test_another_tuning_in_the_same_directory_is_refused(resident: Frozen, tmp_path: Path) -> None:
    def interrupt(*_) -> None:
        raise KeyboardInterrupt

    arguments = resident, batches(), HELD_OUT, tmp_path
    with pytest.raises(KeyboardInterrupt):
        tune(Tuner(SMALL, TUNING), *arguments, "checkpoint", interrupt)
    with pytest.raises(ValueError, match=r"another training \(tuning.trust: 0.0 there, 1.0 now\)"):
        tune(Tuner(SMALL, dataclasses.replace(TUNING, trust=1.0)), *arguments, "checkpoint", quiet)
    with pytest.raises(ValueError, match="checkpoint: 'checkpoint' there, 'other' now"):
        tune(Tuner(SMALL, TUNING), *arguments, "other", quiet)


def test_divergence_is_an_error() -> None:
    terms = Terms(**{field.name: jnp.array([1.0, math.nan]) for field in dataclasses.fields(Terms)})
    with pytest.raises(RuntimeError, match=r"step 7: the terms are .*; tuning has diverged"):
        tuning_loop._checked(terms, 7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_steps": 0}, "num_steps=0 must be a whole number of at least 1"),
        ({"reuse": -1.0}, "reuse=-1.0 must be a number of at least 0"),
        ({"warmup_steps": 12}, "warmup_steps=12 must be below num_steps=12"),
        ({"lags": (1, 24)}, r"lags: 24 must be a whole number in 1..23"),
        ({"lags": ()}, "lags is empty"),
        ({"window": 24}, r"window: 24 must be a whole number in 1..23"),
    ],
)
def test_a_bad_setting_is_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TUNING, **change)


def test_the_preset_is_the_default() -> None:
    assert RouterTuningConfig.from_toml(ROOT / "configs/training/router_tuning.toml") == RouterTuningConfig()
