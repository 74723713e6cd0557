"""Drafts through the engine: the tokens of plain decoding wherever sequences end, and what is counted and refused."""

import dataclasses
import functools

import numpy as np
import pytest

from jmoe.config import RopeConfig, RuntimeConfig
from jmoe.decoding.sampling import SamplingParams
from jmoe.decoding.speculative import SpeculativeSteps
from jmoe.decoding.step import Steps
from jmoe.drafting import drafting_line
from jmoe.engine import Engine
from jmoe.generation import Generation
from jmoe.synthetic import byte_tokenizer
from jmoe.tokenizer import Tokenizer
from tests import models
from tests.models import MAX_SEQ_LEN, SMALL

TWO = dataclasses.replace(SMALL, vocab_size=259, num_hidden_layers=2, mlp_only_layers=())  # bytes and no more
BYTES = Tokenizer(byte_tokenizer(TWO.vocab_size), eos_ids=())
PROMPTS = models.prompts(9, 4, 13, config=TWO)
A = TWO.num_experts_per_tok


@functools.cache
def engine(**runtime) -> Engine:
    options = {"batch_size": 3, "expert_slots": 4, "staging_slots": 3, "prefill_chunk": 16, "decode_chunk": 12}
    config = RuntimeConfig(**{"max_seq_len": MAX_SEQ_LEN, "measure_link": False, **options, **runtime})
    return Engine.start(TWO, config, lambda: models.weights(TWO), tokenizer=BYTES)


def requests(**options) -> list[SamplingParams]:
    """Greedy, sampled and truncated beside each other, ending at different times, one of them after a single token."""
    shared = {"ignore_eos": True, **options}
    return [
        SamplingParams(max_new_tokens=25, **shared),
        SamplingParams(max_new_tokens=1, temperature=0.9, seed=1, **shared),
        SamplingParams(max_new_tokens=14, temperature=1.3, top_k=40, top_p=0.95, min_p=0.01, seed=2, **shared),
    ]


def run(made: Engine, prompts, params, *, live: bool = False) -> Generation:
    generation = made.generate(prompts, params)
    if live:
        list(generation)
    generation.results()
    return generation


def same(left: Generation, right: Generation) -> None:
    """Tokens, text and reasons exactly; log-probabilities but for the order of sums."""
    pairs = list(zip(left.completions, right.completions, strict=True))
    assert [dataclasses.replace(one, logprobs=()) for one, _ in pairs] == [
        dataclasses.replace(other, logprobs=()) for _, other in pairs
    ]
    for one, other in pairs:
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)


# The same tokens


@pytest.mark.parametrize(("draft", "experts"), [(3, None), (5, 2)])
def test_drafts_change_nothing_but_the_speed(draft: int, experts: int | None) -> None:
    drafted = run(engine(draft=draft, draft_experts=experts), PROMPTS, requests())
    same(drafted, run(engine(), PROMPTS, requests()))
    assert [len(completion.token_ids) for completion in drafted.completions] == [25, 1, 14]


@pytest.mark.parametrize("slots", [2, 8])
def test_with_fewer_slots_than_a_verification_asks_for(slots: int) -> None:
    """Waves through staging, and none; the same text as with four slots."""
    drafted = run(engine(draft=3, expert_slots=slots), PROMPTS, requests())
    same(drafted, run(engine(), PROMPTS, requests()))
    assert drafted.stats.drafts is not None
    assert drafted.stats.drafts.union_size > 2
    assert (drafted.stats.decode.streamed > 0) == (slots == 2)


@pytest.mark.parametrize("live", [True, False])
def test_an_end_of_sequence_inside_a_draft_ends_it(live: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, made = engine(), engine(draft=3, expert_slots=8)
    free = run(plain, PROMPTS, requests()).completions
    ends = [free[0].token_ids[7], free[2].token_ids[4]]
    for each in (plain, made):
        monkeypatch.setattr(each, "generation_defaults", {"eos_token_id": ends})
    params = requests(ignore_eos=False)
    drafted = run(made, PROMPTS, params, live=live)
    same(drafted, run(plain, PROMPTS, params))
    assert [completion.finish_reason for completion in drafted.completions][::2] == ["eos", "eos"]
    assert drafted.stats.drafts is not None
    assert drafted.stats.drafts.cycles.mean_accepted > 2, "with every expert resident, ends fall inside drafts"


@pytest.mark.parametrize("live", [True, False])
def test_a_stop_string_inside_a_draft_ends_the_text_before_it(live: bool) -> None:
    free = run(engine(), PROMPTS, requests()).completions
    text = free[0].text
    stop = next(text[n] for n in range(4, len(text)) if text[n] not in text[:n] and text[n] != "\ufffd")
    params = [dataclasses.replace(requests()[0], stop=(stop,)), *requests()[1:]]
    drafted = run(engine(draft=3, expert_slots=8), PROMPTS, params, live=live)
    same(drafted, run(engine(), PROMPTS, params))
    assert drafted.completions[0].text == text[: text.index(stop)]
    assert drafted.completions[0].finish_reason == "stop"
    assert drafted.completions[2].token_ids == free[2].token_ids, "the others go on"


@pytest.mark.parametrize("length", [MAX_SEQ_LEN - 1, MAX_SEQ_LEN - 2, MAX_SEQ_LEN - 4])
def test_the_kv_cache_ends_inside_a_draft(length: int) -> None:
    """MAX_SEQ_LEN is a multiple of eight: no position of the cache is spare."""
    prompts = models.prompts(length, 50, 45, config=TWO)
    params = [dataclasses.replace(request, max_new_tokens=50) for request in requests()]
    drafted = run(engine(draft=5, draft_experts=2), prompts, params)
    same(drafted, run(engine(), prompts, params))
    lengths = [len(completion.token_ids) for completion in drafted.completions]
    assert lengths == [MAX_SEQ_LEN - length, MAX_SEQ_LEN - 50, MAX_SEQ_LEN - 45]


def test_streaming_is_live() -> None:
    """Text comes in several pieces while it is watched, each token once."""
    generation = engine(draft=3).generate(PROMPTS, requests())
    deltas = [delta for delta in generation if delta.index == 0]
    assert len(deltas) > 3
    assert tuple(token for delta in deltas for token in delta.token_ids) == generation.completions[0].token_ids


def test_the_decode_set_survives_verifications_in_waves() -> None:
    """More experts than slots: every slot still holds the weights of the expert that is said to be in it."""
    made = engine(draft=3, expert_slots=2)
    run(made, PROMPTS, requests())
    state = made.new_state(1, [1])
    layers = state.experts.residency.stacked
    owner, slot_of = np.asarray(layers.owner), np.asarray(layers.slot_of)
    for layer, store in enumerate(made.weights.store.layers):
        assert len(set(owner[layer].tolist())) == 2
        for slot, expert in enumerate(owner[layer]):
            np.testing.assert_array_equal(np.asarray(state.experts.layers[layer])[slot], np.asarray(store)[expert])
            assert slot_of[layer, expert] == slot
    made.give_back(state)


# What is compiled and counted


def test_it_compiles_once_for_a_shape() -> None:
    made = Engine.start(TWO, engine(draft=3).runtime, lambda: models.weights(TWO))
    before = Steps.decode._cache_size()
    run(made, PROMPTS, requests())
    cycles, starts = SpeculativeSteps.decode._cache_size(), SpeculativeSteps.start._cache_size()
    run(made, PROMPTS[::-1], requests(stop=()), live=True)
    assert (SpeculativeSteps.decode._cache_size(), SpeculativeSteps.start._cache_size()) == (cycles, starts)
    assert Steps.decode._cache_size() == before, "a fixed number needs no plain steps"


def test_the_figures_add_up() -> None:
    generation = run(engine(draft=3), PROMPTS, requests())
    stats = generation.stats
    assert stats.drafts is not None
    cycles = stats.drafts.cycles
    assert stats.drafts.steps_by_draft_tokens == {3: cycles.num_steps} == {3: stats.num_decode_steps}
    assert stats.drafts.plain.num_steps == 0
    assert cycles.num_tokens == stats.num_decode_tokens == 24 + 0 + 13
    assert cycles.num_tokens == cycles.accepted + cycles.num_verifications, "and one for each verification"
    assert cycles.proposed <= 3 * cycles.num_verifications
    assert cycles.experts == stats.decode
    assert cycles.seconds == pytest.approx(stats.decode_s)
    assert A <= stats.drafts.union_size <= TWO.num_experts
    assert stats.drafts.bytes_per_token(cycles) == pytest.approx(stats.bytes_per_token)


def test_without_drafts_there_are_no_figures_of_them() -> None:
    assert run(engine(), PROMPTS, requests()).stats.drafts is None


def test_auto_begins_with_plain_steps_and_keeps_what_it_learns() -> None:
    made = engine(draft="auto", draft_tokens=3)
    generation = run(made, PROMPTS, requests())
    same(generation, run(engine(), PROMPTS, requests()))
    assert generation.stats.drafts is not None
    assert generation.stats.drafts.steps_by_draft_tokens[0] > 0
    before = made.drafting
    run(made, PROMPTS, requests())
    assert made.drafting is before


def test_auto_tries_drafts_and_changes_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain steps and cycles by turns, whatever the clock says: the draft set starts anew after each change."""
    made = engine(draft="auto", draft_tokens=3)
    assert made.drafting is not None
    turns = iter([0, 2, 1, 3, 0, 3, 1, 0, 2] * 9)
    choice = type(made.drafting.choose(1))
    monkeypatch.setattr(made.drafting, "choose", lambda count: choice(next(turns), 1))
    monkeypatch.setattr(made.drafting, "record", lambda count, call: None)
    generation = run(made, PROMPTS, requests())
    same(generation, run(engine(), PROMPTS, requests()))
    assert generation.stats.drafts is not None
    assert set(generation.stats.drafts.steps_by_draft_tokens) == {0, 1, 2, 3}
    text = "\n".join(generation.stats.lines())
    assert "plain steps" in text
    assert "cycles of 3" in text


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_call_that_drafts_fewer_at_a_time_has_more_cycles(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """No call may make more than decode_chunk=12 tokens of a sequence, and none makes room for fewer."""
    made = engine(draft="auto", draft_tokens=3, expert_slots=7)
    assert made.drafting is not None
    choice, tried = type(made.drafting.choose(1)), []
    monkeypatch.setattr(made.drafting, "choose", lambda count: choice(number))
    monkeypatch.setattr(made.drafting, "record", lambda count, call: tried.append(call))
    generation = run(made, PROMPTS[:1], requests()[:1])
    same(generation, run(engine(), PROMPTS[:1], requests()[:1]))
    assert [call.num_steps for call in tried[:-1]] == [12 // (number + 1)] * (len(tried) - 1)
    assert len(tried) > 1


@pytest.mark.parametrize("options", [{}, {"draft_experts": 8}])
def test_auto_drafts_nothing_where_the_whole_model_would_draft(options: dict[str, int]) -> None:
    made = engine(draft="auto", expert_slots=8, **options)
    assert made.drafting is None
    same(run(made, PROMPTS, requests()), run(engine(), PROMPTS, requests()))
    assert drafting_line(None, made.runtime, made.plan.layout).startswith(
        "no drafts, chosen automatically: every expert"
    )
    assert engine(draft="auto", expert_slots=8, draft_experts=7).drafting is not None
    assert engine(draft=2, expert_slots=8).drafting is not None, "asked for"


# What is refused


def test_more_experts_than_slots_cannot_draft() -> None:
    with pytest.raises(ValueError, match="draft_experts=5 are more than the 4 slots of a layer"):
        engine(draft=2, draft_experts=5)


def test_a_rotation_that_changes_with_every_token_is_refused_before_weights_are_made() -> None:
    config = dataclasses.replace(TWO, rope=RopeConfig(rope_type="dynamic", factor=2.0))

    def never():
        raise AssertionError("weights were made")

    runtime = dataclasses.replace(engine().runtime, draft="auto")
    with pytest.raises(ValueError, match="speculative decoding does not go with rope_type 'dynamic'"):
        Engine.start(config, runtime, never)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draft": 0}, 'draft=0 must be "off", "auto", or how many'),
        ({"draft": True}, "draft=True must be"),
        ({"draft": "on"}, "draft='on' must be"),
        ({"draft": 2, "draft_experts": 0}, "draft_experts=0 must be at least 1"),
        ({"draft_tokens": 0}, "draft_tokens=0 must be at least 1"),
        ({"draft_policy": "best"}, "draft_policy='best' is not one of hot, hot_temporal"),
        ({"draft_missing": "guess"}, "draft_missing='guess' is not one of reroute"),
        ({"draft": 2, "record_routing": True}, "record_routing=True does not go with draft=2"),
    ],
)
def test_settings_that_cannot_be_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RuntimeConfig(**options)


def test_the_plan_counts_the_logits_of_a_verification() -> None:
    more = engine(draft=5, draft_experts=2).plan.workspace_bytes - engine().plan.workspace_bytes
    assert more == 3 * 5 * TWO.vocab_size * 4 * 6
    assert engine(draft=5, draft_experts=2).plan.kv_bytes == engine().plan.kv_bytes, "no more positions are written"
