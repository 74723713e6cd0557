"""The promises that jmoe makes whatever the sizes: each is a test. Exact tokens are asserted in float32."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.batch import prompt_chunks
from jmoe.decoding.prefill import Prefill
from jmoe.decoding.resident import forward_resident
from jmoe.decoding.sampling import SamplingParams, batch_sampling
from jmoe.decoding.step import Steps, init_state
from jmoe.experts.residency import init_residency
from jmoe.experts.slots import ExpertSlots
from jmoe.model.kv_cache import init_kv_cache
from tests import models
from tests.models import MAX_SEQ_LEN, SMALL

GREEDY = SamplingParams(max_new_tokens=24)
PROMPTS = models.prompts(21, 5, 33)
CHUNK = 16  # for prompts one by one: else each length has a prefill of its own to compile


@functools.cache
def reference_tokens() -> list[tuple[int, ...]]:
    """Greedy continuations by `forward_resident` alone: whole sequences, no cache, no slots, no engine."""
    weights = models.on_device(models.weights())

    @jax.jit
    def logits(token_ids):
        return forward_resident(SMALL, weights.params, weights.store.layers, token_ids)

    out = []
    for prompt in PROMPTS:
        ids = list(prompt)
        for _ in range(GREEDY.max_new_tokens):
            padded = np.zeros((1, MAX_SEQ_LEN), np.int32)  # causal: what comes after a token changes nothing
            padded[0, : len(ids)] = ids
            ids.append(int(np.asarray(logits(padded))[0, len(ids) - 1].argmax()))
        out.append(tuple(ids[len(prompt) :]))
    return out


def tokens(engine, prompts=PROMPTS, sampling=GREEDY) -> list[tuple[int, ...]]:
    return [completion.token_ids for completion in engine.generate(prompts, sampling).results()]


@pytest.mark.parametrize("expert_slots", range(SMALL.num_experts_per_tok, SMALL.num_experts + 1))
def test_offloaded_equals_resident_for_every_slot_count(expert_slots: int) -> None:
    assert tokens(models.engine(expert_slots=expert_slots, prefill_chunk=CHUNK)) == reference_tokens()


@pytest.mark.parametrize("staging_slots", [1, 2, 3, 4])
def test_offloaded_equals_resident_for_every_number_of_staging_slots(staging_slots: int) -> None:
    assert tokens(models.engine(staging_slots=staging_slots, prefill_chunk=CHUNK)) == reference_tokens()


@pytest.mark.parametrize("batch_size", [2, 3])
@pytest.mark.parametrize("expert_slots", [2, 5, 8])
def test_a_batch_equals_its_members_alone(batch_size: int, expert_slots: int) -> None:
    """Of different lengths; with 2 slots a step needs more experts than there are, and is done in waves."""
    assert tokens(models.engine(batch_size=batch_size, expert_slots=expert_slots)) == reference_tokens()


def test_a_sampled_batch_equals_its_members_alone() -> None:
    """The same randomness for a request whatever is beside it; requests of every kind in one batch."""
    requests = [
        SamplingParams(max_new_tokens=16, temperature=0.9, seed=5),
        SamplingParams(max_new_tokens=24),
        SamplingParams(max_new_tokens=20, temperature=1.3, top_k=20, top_p=0.9, min_p=0.02, seed=6),
    ]
    single, batch = models.engine(prefill_chunk=CHUNK), models.engine(batch_size=3)
    alone = [tokens(single, [prompt], request)[0] for prompt, request in zip(PROMPTS, requests, strict=True)]
    assert tokens(batch, PROMPTS, requests) == alone
    assert alone[1] == reference_tokens()[1]


@pytest.mark.parametrize(("draft", "draft_experts", "expert_slots"), [(1, 1, 2), (4, None, 4), (6, 3, 8)])
def test_greedy_drafts_equal_plain_decoding(draft: int, draft_experts: int | None, expert_slots: int) -> None:
    """However many tokens are drafted with however many experts; tests/test_drafting.py has all the ways to end."""
    made = models.engine(draft=draft, draft_experts=draft_experts, expert_slots=expert_slots, batch_size=3)
    assert tokens(made) == reference_tokens()


def test_sampled_drafts_equal_plain_decoding() -> None:
    """The very tokens, so their distribution too: tests/test_speculative_distribution.py looks at that by itself."""
    requests = [SamplingParams(max_new_tokens=20, temperature=1.2, top_p=0.95, seed=seed) for seed in range(3)]
    plain = tokens(models.engine(batch_size=3), PROMPTS, requests)
    assert tokens(models.engine(batch_size=3, draft=3), PROMPTS, requests) == plain
    assert len({row[:8] for row in plain}) == 3


@pytest.mark.parametrize("prefill_chunk", [1, 7, 16])
def test_prefill_in_chunks_equals_one_prefill(prefill_chunk: int) -> None:
    prompt = PROMPTS[2]
    whole = models.engine(prefill_chunk=64).logits([prompt])
    np.testing.assert_allclose(models.engine(prefill_chunk=prefill_chunk).logits([prompt]), whole, atol=1e-4)


def test_prefill_and_decode_equal_one_prefill() -> None:
    """The log-probabilities of decoded tokens are those of a prefill of the whole text."""
    engine = models.engine()
    [completion] = engine.generate([PROMPTS[0]], GREEDY).results()
    whole = engine.logits([[*PROMPTS[0], *completion.token_ids]])[0]
    logprobs = np.asarray(jax.nn.log_softmax(whole, axis=-1))
    at = np.arange(len(completion.token_ids)) + len(PROMPTS[0]) - 1
    np.testing.assert_allclose(completion.logprobs, logprobs[at, list(completion.token_ids)], atol=1e-4)


def test_offloaded_logits_equal_resident_logits() -> None:
    weights = models.on_device(models.weights())
    ids = models.prompts(20, 20)
    resident = jax.jit(forward_resident, static_argnums=0)(
        SMALL, weights.params, weights.store.layers, jnp.asarray(ids)
    )
    logits = models.engine(batch_size=2).logits(ids)
    assert np.abs(logits).max() > 1
    np.testing.assert_allclose(logits, resident, atol=1e-4)


def test_bfloat16_differs_only_where_it_is_undecided(capsys: pytest.CaptureFixture[str]) -> None:
    """Another choice than the resident model's only where its top two are closer than bfloat16's own noise."""
    half = dataclasses.replace(SMALL, dtype="bfloat16")
    weights = models.on_device(models.weights(half))
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), (weights.params, weights.store.layers))
    ids = jnp.asarray(models.prompts(48, 48, 48, 48))
    resident = np.asarray(forward_resident(half, weights.params, weights.store.layers, ids))
    exact = jax.jit(forward_resident, static_argnums=0)(SMALL, *wide, ids)
    noise = np.abs(resident - np.asarray(exact)).max()
    offloaded = models.engine(half, batch_size=4, expert_slots=3, staging_slots=2).logits(ids)
    differs = resident.argmax(-1) != offloaded.argmax(-1)
    top_two = np.sort(resident, axis=-1)[..., -2:]
    margins = (top_two[..., 1] - top_two[..., 0])[differs]
    with capsys.disabled():
        print(f"\nbfloat16: {differs.sum()} of {differs.size} choices differ, noise {noise:.3f}, margins {margins}")
    assert differs.mean() < 0.05
    assert (margins < noise).all()
    assert noise < np.abs(resident).max() / 4, "the noise must not excuse everything"


def test_slots_hold_what_residency_says() -> None:
    """After decoding, every slot's weights are those of the expert that is said to be in it."""
    engine = models.engine(expert_slots=3, prefill_chunk=CHUNK)
    engine.generate(PROMPTS, GREEDY).results()
    state = engine.new_state(1, np.ones(1))
    layers = state.experts.residency.stacked
    owner, slot_of = np.asarray(layers.owner), np.asarray(layers.slot_of)
    for layer, store in enumerate(engine.weights.store.layers):
        for slot, expert in enumerate(owner[layer]):
            held = np.asarray(state.experts.layers[layer])[slot]
            np.testing.assert_array_equal(held, np.asarray(store)[expert])
            assert slot_of[layer, expert] == slot
        assert (slot_of[layer] >= 0).sum() == len(set(owner[layer].tolist())) == 3


def test_prefill_leaves_the_decode_set_alone() -> None:
    engine = models.engine(expert_slots=3, prefill_chunk=CHUNK)
    engine.generate(PROMPTS, GREEDY).results()
    before = engine.new_state(1, np.ones(1))
    owner = np.asarray(before.experts.residency.stacked.owner)
    engine.give_back(before)
    engine.logits([PROMPTS[2]])
    after = engine.new_state(1, np.ones(1))
    np.testing.assert_array_equal(owner, np.asarray(after.experts.residency.stacked.owner))


def test_a_rolled_back_kv_equals_one_never_written() -> None:
    """Shorter lengths, and what lies beyond them does not matter: a rejected draft leaves no trace."""
    weights = models.on_device(models.weights())
    steps = Steps(SMALL, models.engine().plan.layout, resident=True)
    sampling = batch_sampling([SamplingParams()], ())

    def state():
        slots = ExpertSlots((), (), init_residency(2, SMALL.num_experts, 1))
        return init_state(SMALL, 1, MAX_SEQ_LEN, [8], slots)

    def feed(state, ids):
        for chunk in prompt_chunks([ids], 64):
            hidden, state = Prefill(steps).hidden(weights.params, weights.store, state, chunk)
        return np.asarray(steps.unembed(weights.params, hidden))[0, : len(ids)], state

    first, rejected, second = PROMPTS[1], models.prompts(9, seed=3)[0], models.prompts(7, seed=4)[0]
    _, clean = feed(state(), first)
    expected, clean = feed(clean, second)
    _, rolled = feed(state(), first)
    _, rolled = feed(rolled, rejected)
    lengths = jnp.asarray([len(first)], jnp.int32)
    rolled = dataclasses.replace(rolled, cache=dataclasses.replace(rolled.cache, lengths=lengths))
    got, rolled = feed(rolled, second)
    np.testing.assert_array_equal(got, expected)
    one, _ = steps.decode(weights.params, weights.store, clean, sampling, jnp.asarray(4), capacity=4, mode="greedy")
    two, _ = steps.decode(weights.params, weights.store, rolled, sampling, jnp.asarray(4), capacity=4, mode="greedy")
    np.testing.assert_array_equal(one.last_tokens, two.last_tokens)
    np.testing.assert_array_equal(one.last_logprobs, two.last_logprobs)
    assert [init_kv_cache(SMALL, 1, length).capacity for length in (1, 8, 9)] == [8, 8, 16]


def test_decode_compiles_once_per_shape() -> None:
    """Other prompts, seeds, temperatures, lengths and chunk lengths compile nothing; another batch size does, once:
    of prefill a layer with experts, and one without.
    """
    engine = models.engine(batch_size=2, decode_chunk=5, expert_slots=7, staging_slots=1)  # as no other test here has
    decode, prefill = Steps.decode, Prefill.prefill_layers

    def compiled() -> tuple[int, int]:
        return decode._cache_size(), prefill._cache_size()

    def run(count: int, seed: int, temperature: float) -> None:
        batch = models.prompts(*[9 + seed] * count, seed=seed)
        generation = engine.generate(batch, SamplingParams(max_new_tokens=7 + seed, temperature=temperature, seed=seed))
        generation.results() if seed % 2 else list(generation)

    start = compiled()
    run(2, 0, 0.7)
    assert compiled() == (start[0] + 1, start[1] + 2)
    for seed in range(1, 5):
        run(2, seed, 0.5 + seed / 10)
    assert compiled() == (start[0] + 1, start[1] + 2)
    for seed in range(2):
        run(1, seed, 1.0)
    assert compiled() == (start[0] + 2, start[1] + 4)
