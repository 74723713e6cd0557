"""Training: its losses by hand, its batches, its held-out minimum, and a run that was killed and goes on."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.model.router import Routing
from jmoe.training.batches import Batches
from jmoe.training.config import TrainingConfig
from jmoe.training.loop import HeldOut, fit
from jmoe.training.losses import load_balancing_loss, router_z_loss
from jmoe.training.step import Trainer, init_params
from tests.models import SMALL

TRAINING = TrainingConfig(
    num_steps=12, batch_size=4, sequence_length=16, warmup_steps=2, eval_every=4, checkpoint_every=4, patience=9
)
START = 96


def documents(num: int = 12, length: int = 40, seed: int = 0) -> list[np.ndarray]:
    """Counting modulo 7, from random starts: easily learned."""
    starts = np.random.default_rng(seed).integers(0, 7, num)
    return [((start + np.arange(length)) % 7).astype(np.uint16) for start in starts]


def batches(training: TrainingConfig = TRAINING) -> Batches:
    return Batches(documents(), START, training.batch_size, training.sequence_length, training.seed)


def held_out(length: int = TRAINING.sequence_length) -> HeldOut:
    return HeldOut.cut(documents(num=5, seed=1), START, 200, length)


def quiet(step, losses, tokens_per_s) -> None:
    pass


def routing(expert_ids, logits) -> Routing:
    ids = jnp.asarray(expert_ids, jnp.int32)
    return Routing(ids, jnp.ones(ids.shape), jnp.asarray(logits, jnp.float32))


def test_load_balancing_is_1_for_even_use_and_e_for_one_expert() -> None:
    even = routing([[0, 1], [2, 3]], np.zeros((2, 4)))
    assert float(load_balancing_loss(even)) == pytest.approx(1.0)
    alone = routing([[2], [2], [2]], [[0, 0, 50, 0]] * 3)
    assert float(load_balancing_loss(alone)) == pytest.approx(4.0)


def test_load_balancing_pulls_probability_from_crowded_experts() -> None:
    def loss(logits):
        return load_balancing_loss(routing([[0, 1], [0, 1], [0, 2]], logits))

    slope = np.asarray(jax.grad(loss)(jnp.zeros((3, 4)))).sum(axis=0)
    assert slope[0] > slope[1] > slope[2] > slope[3]


def test_router_z_loss_is_the_mean_square_of_logsumexp() -> None:
    logits = np.array([[0.0, 0, 0, 0], [1.0, 2, 3, 4]])
    wanted = np.mean(np.log(np.exp(logits).sum(-1)) ** 2)
    assert float(router_z_loss(routing([[0], [1]], logits))) == pytest.approx(wanted, rel=1e-6)


def test_an_epoch_predicts_each_token_at_most_once_and_nearly_all() -> None:
    numbered = [np.arange(100 * n, 100 * n + 90) for n in range(1, 7)]
    made = Batches(numbered, 0, 2, 16, seed=3)
    windows = np.concatenate([made[step] for step in range(made.steps_per_epoch)])
    predicted = windows[:, 1:].ravel()
    predicted = predicted[predicted > 0]  # the start token comes once a document
    assert len(set(predicted.tolist())) == len(predicted)
    assert len(predicted) > 0.85 * sum(map(len, numbered))
    for window in windows:
        steps = np.diff(window)
        assert np.all((steps == 1) | (window[1:] == 0) | (window[:-1] == 0)), "a window is a stretch of the text"


def test_batches_depend_on_seed_and_step_alone() -> None:
    made, again = batches(), batches()
    last = 2 * made.steps_per_epoch - 1
    forward = [made[step] for step in range(last + 1)]
    np.testing.assert_array_equal(again[last], forward[last])
    np.testing.assert_array_equal(again[0], forward[0])
    assert not np.array_equal(made[made.steps_per_epoch], made[0]), "another epoch has another order"
    other = Batches(documents(), START, 4, 16, seed=1)
    assert not np.array_equal(other[0], made[0])


def test_too_little_text_is_refused() -> None:
    with pytest.raises(ValueError, match="41 tokens are too few for a batch of 4 windows of 16"):
        Batches(documents(num=1), START, 4, 16, seed=0)


@pytest.mark.parametrize("length", [16, 40, 64])
def test_held_out_text_counts_each_token_once(length: int) -> None:
    cut = held_out(length)
    targets = cut.windows[:, 1:][cut.scored]
    assert sorted(targets.tolist()) == sorted(np.concatenate(documents(num=5, seed=1)).tolist())


def test_held_out_bits_do_not_hang_on_the_batch_size() -> None:
    params = init_params(SMALL, 0)
    sizes = [Trainer(SMALL, dataclasses.replace(TRAINING, batch_size=size)) for size in (1, 4, 64)]
    bits = [held_out().bits_per_byte(trainer, params) for trainer in sizes]
    assert bits == pytest.approx([bits[0]] * 3, rel=1e-5)
    uniform = math.log2(SMALL.vocab_size)  # a token here is a byte
    assert 0.9 * uniform < bits[0] < 1.2 * uniform


def test_training_learns_and_keeps_its_minimum(tmp_path) -> None:
    training = dataclasses.replace(TRAINING, num_steps=60, eval_every=10, learning_rate=1e-2)
    outcome = fit(Trainer(SMALL, training), batches(training), held_out(), tmp_path, quiet)
    first, *_, last = outcome.evaluations
    assert last.held_out_bits_per_byte < 0.4 * first.held_out_bits_per_byte
    again = held_out().bits_per_byte(Trainer(SMALL, training), outcome.params)
    assert again == pytest.approx(outcome.best.held_out_bits_per_byte, rel=1e-6)
    assert outcome.tokens_per_s > 0


def test_training_stops_after_its_patience(tmp_path) -> None:
    """A learning rate that wrecks the model after its first steps."""
    training = dataclasses.replace(
        TRAINING, num_steps=100, warmup_steps=8, learning_rate=1.0, clip_norm=1e6, weight_decay=0.0, patience=2
    )
    outcome = fit(Trainer(SMALL, training), batches(training), held_out(), tmp_path, quiet)
    steps = [evaluation.step for evaluation in outcome.evaluations]
    assert steps[-1] == outcome.best.step + 2 * training.eval_every < 100
    again = held_out().bits_per_byte(Trainer(SMALL, training), outcome.params)
    assert again == pytest.approx(outcome.best.held_out_bits_per_byte, rel=1e-6)


def test_a_training_that_was_cut_off_goes_on_as_if_it_had_not_been(tmp_path) -> None:
    trainer, seen = Trainer(SMALL, TRAINING), []

    def cut_off(step, losses, tokens_per_s) -> None:
        seen.append(step)
        if step > 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(trainer, batches(), held_out(), tmp_path / "cut", cut_off)
    resumed = fit(trainer, batches(), held_out(), tmp_path / "cut", lambda step, *rest: seen.append(step))
    whole = fit(trainer, batches(), held_out(), tmp_path / "whole", quiet)
    assert seen == [4, 8, 10, 10, 12], "it went on from step 8"
    assert resumed.evaluations == whole.evaluations
    for one, other in zip(jax.tree.leaves(resumed.params), jax.tree.leaves(whole.params), strict=True):
        np.testing.assert_array_equal(one, other)
    over = fit(trainer, batches(), held_out(), tmp_path / "whole", quiet)
    assert over.evaluations == whole.evaluations, "what is over stays as it is"


def test_another_training_in_the_same_directory_is_refused(tmp_path) -> None:
    fit(Trainer(SMALL, TRAINING), batches(), held_out(), tmp_path, quiet)
    other = dataclasses.replace(TRAINING, learning_rate=1.0)
    with pytest.raises(ValueError, match=r"another training \(training.learning_rate: 0.003 there, 1.0 now\)"):
        fit(Trainer(SMALL, other), batches(), held_out(), tmp_path, quiet)


def test_divergence_is_an_error(tmp_path) -> None:
    training = dataclasses.replace(TRAINING, learning_rate=1e30, clip_norm=1e30, warmup_steps=0)
    with pytest.raises(RuntimeError, match="the cross-entropy is nan; training has diverged"):
        fit(Trainer(SMALL, training), batches(training), held_out(), tmp_path, quiet)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_steps": 0}, "num_steps=0 must be a whole number of at least 1"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0 must be a number of at least 0"),
        ({"warmup_steps": 12}, "warmup_steps=12 must be below num_steps=12"),
    ],
)
def test_a_bad_setting_is_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TRAINING, **change)


def test_gradients_reach_every_parameter() -> None:
    tokens = jnp.asarray(batches()[0])
    gradients = jax.jit(jax.grad(Trainer(SMALL, TRAINING).loss, has_aux=True))(init_params(SMALL, 0), tokens)[0]
    still = [
        jax.tree_util.keystr(path) for path, leaf in jax.tree_util.tree_leaves_with_path(gradients) if not leaf.any()
    ]
    assert not still
