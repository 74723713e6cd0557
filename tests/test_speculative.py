"""Speculative decoding: the tokens of plain decoding, whatever the draft, and a cache that shows no trace of it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.batch import prompt_chunks
from jmoe.config import RopeConfig
from jmoe.decoding.sampling import NO_TOKEN, SamplingParams, batch_sampling, sampling_mode
from jmoe.decoding.speculative import SpeculativeSteps, Verified
from jmoe.decoding.step import DecodeState
from jmoe.engine import Engine
from jmoe.experts import draft
from jmoe.experts.draft import DraftConfig, expert_distances, hottest, nearest_kept, rerouted, substituted
from jmoe.experts.residency import NONE
from jmoe.model.router import Routing
from tests import models
from tests.models import SMALL

NEW = 24
LENGTHS = 5, 17, 9
# What differs is compiled anew, so tests share these where they can.
TWO, MOST = DraftConfig(2), 3


@functools.cache
def engine(expert_slots: int = 4) -> Engine:
    return models.engine(expert_slots=expert_slots, batch_size=3, prefill_chunk=8)


@functools.cache
def distances() -> jax.Array:
    return jnp.stack([expert_distances(jnp.asarray(np.asarray(layer))) for layer in models.weights().store.layers])


def requests(kind: str, count: int, **changes) -> list[SamplingParams]:
    options = {
        "greedy": {},
        "full": {"temperature": 1.3},
        "truncated": {"temperature": 1.5, "top_k": 40, "top_p": 0.95},
    }
    return [
        SamplingParams(**{"max_new_tokens": NEW, "ignore_eos": True, "seed": n} | options[kind] | changes)
        for n in range(count)
    ]


@dataclasses.dataclass
class Run:
    """A batch after its prompts."""

    engine: Engine
    state: DecodeState
    sampling: object
    mode: str

    @classmethod
    def begin(cls, made: Engine, prompts, params, eos=(), budgets=None) -> "Run":
        sampling, mode = batch_sampling(params, eos), sampling_mode(params)
        state = made.new_state(len(prompts), budgets or [p.max_new_tokens for p in params])
        for chunk in prompt_chunks(prompts, made.plan.prefill_chunk):
            state, _ = made.prefill.chunk(made.weights.params, made.weights.store, state, chunk, sampling, mode=mode)
        return cls(made, state, sampling, mode)

    def plain(self, num_steps: int = NEW) -> list[list[int]]:
        weights, count = self.engine.weights, jnp.asarray(num_steps, jnp.int32)
        self.state, emitted = self.engine.steps.decode(
            weights.params, weights.store, self.state, self.sampling, count, capacity=NEW, mode=self.mode
        )
        return [row[row != NO_TOKEN].tolist() for row in np.asarray(emitted.token_ids)]

    def drafted(
        self, config: DraftConfig, most: int, num_cycles: int = NEW, num_draft_tokens: int | None = None
    ) -> tuple[list[list[int]], Verified]:
        """Cycles that draft so many tokens; as many as there may be, unless told otherwise."""
        steps = SpeculativeSteps(self.engine.steps, config, most)
        weights, count = self.engine.weights, jnp.asarray(num_cycles, jnp.int32)
        self.state, _, verified = steps.decode(
            weights.params,
            weights.store,
            self.state,
            draft.start(config, self.state.experts, distances()),
            distances(),
            self.sampling,
            jnp.asarray(most if num_draft_tokens is None else num_draft_tokens, jnp.int32),
            count,
            capacity=NEW,
            mode=self.mode,
        )
        ends = np.asarray(verified.num_tokens)
        return [row[:n].tolist() for row, n in zip(np.asarray(verified.token_ids), ends, strict=True)], verified

    def close(self) -> None:
        self.engine.give_back(self.state)


def plainly(made: Engine, kind: str, *, eos=(), budgets=None, **changes) -> list[list[int]]:
    """Tokens by plain decoding."""
    run = Run.begin(made, models.prompts(*LENGTHS), requests(kind, 3, **changes), eos, budgets)
    tokens = run.plain()
    run.close()
    return tokens


def by_drafts(
    made: Engine, config: DraftConfig, most: int, kind: str, *, eos=(), budgets=None, **changes
) -> tuple[list[list[int]], Verified]:
    """Tokens by drafts, and what the drafts counted."""
    run = Run.begin(made, models.prompts(*LENGTHS), requests(kind, 3, **changes), eos, budgets)
    drafted = run.drafted(config, most)
    run.close()
    return drafted


@pytest.mark.parametrize(
    ("kind", "num_draft_tokens", "num_experts"), [("greedy", 1, 1), ("full", 3, 2), ("truncated", 5, 4)]
)
def test_the_tokens_are_those_of_plain_decoding(kind: str, num_draft_tokens: int, num_experts: int) -> None:
    plain = plainly(engine(), kind)
    drafted, verified = by_drafts(engine(), DraftConfig(num_experts), num_draft_tokens, kind)
    assert drafted == plain
    assert all(len(row) == NEW - 1 for row in plain), "the prompt's own token came before"
    cycles, rows = int(verified.num_cycles), 3
    assert int(verified.accepted) <= int(verified.proposed) <= cycles * num_draft_tokens * rows
    assert cycles <= NEW


@pytest.mark.parametrize(
    ("policy", "missing"),
    [
        ("hot", "substitute"),
        ("hot_temporal", "reroute"),
        ("hot_global", "drop"),
        ("random", "drop"),
        ("resident", "reroute"),
    ],
)
def test_no_draft_set_changes_a_token(policy, missing) -> None:
    drafted, _ = by_drafts(engine(), DraftConfig(2, policy=policy, missing=missing), MOST, "full")
    assert drafted == plainly(engine(), "full")


@pytest.mark.parametrize("expert_slots", [2, 5])
def test_slots_change_no_token(expert_slots: int) -> None:
    """With two, every verification needs more than there are and goes in waves; the same text as with four."""
    drafted, _ = by_drafts(engine(expert_slots), TWO, MOST, "greedy")
    assert drafted == plainly(engine(), "greedy")


def test_with_all_experts_every_draft_is_accepted() -> None:
    _, verified = by_drafts(engine(8), DraftConfig(8, policy="resident"), MOST, "full")
    cycles = int(verified.num_cycles)
    assert int(verified.accepted) >= 3 * (NEW - 1 - cycles)
    assert cycles == -(-(NEW - 1) // (MOST + 1))


def test_sequences_end_each_in_its_own_time() -> None:
    drafted, _ = by_drafts(engine(), TWO, MOST, "full", budgets=[3, NEW, 11])
    assert drafted == plainly(engine(), "full", budgets=[3, NEW, 11])
    assert [len(row) for row in drafted] == [2, NEW - 1, 10]


def test_an_end_of_sequence_inside_a_draft_ends_it() -> None:
    free = plainly(engine(8), "full", eos=(0, 0, 0))
    eos = tuple(row[2 + n] for n, row in enumerate(free))  # different places of different sequences
    drafted, _ = by_drafts(engine(8), DraftConfig(8), 4, "full", eos=eos, ignore_eos=False)
    assert drafted == plainly(engine(8), "full", eos=eos, ignore_eos=False)
    assert all(row[-1] in eos for row in drafted)
    assert len({len(row) for row in drafted}) > 1


def test_nothing_of_a_draft_stays_behind() -> None:
    """After a few cycles, plain decoding goes on as if there had been none; so do another's cycles.

    The keys and values that stay are those of plain decoding, and so are the last log-probabilities.
    """
    prompts, params = models.prompts(*LENGTHS), requests("full", 3)
    plain = Run.begin(engine(), prompts, params)
    whole, clean = plain.plain(), jax.device_get(plain.state.cache)  # the next generation has it
    plain.close()
    mixed = Run.begin(engine(), prompts, params)
    first, _ = mixed.drafted(TWO, MOST, num_cycles=2)
    grown = [length + len(row) for length, row in zip(LENGTHS, first, strict=True)]
    np.testing.assert_array_equal(mixed.state.cache.lengths, grown)
    second = mixed.plain(4)
    third, _ = mixed.drafted(DraftConfig(2, policy="random", missing="drop"), MOST)
    mixed.close()
    assert [a + b + c for a, b, c in zip(first, second, third, strict=True)] == whole
    kept = mixed.state.cache
    np.testing.assert_array_equal(kept.lengths, clean.lengths)
    for row, length in enumerate(np.asarray(clean.lengths)):
        for got, wanted in zip((*kept.keys, *kept.values), (*clean.keys, *clean.values), strict=True):
            np.testing.assert_allclose(got[row, :length], wanted[row, :length], atol=1e-5)
    np.testing.assert_allclose(mixed.state.last_logprobs, plain.state.last_logprobs, atol=1e-5)


def test_a_batch_is_as_each_alone() -> None:
    prompts, params = models.prompts(*LENGTHS), requests("full", 3)
    rows, _ = by_drafts(engine(), TWO, MOST, "full")
    for n in range(3):
        alone = Run.begin(engine(), prompts[n : n + 1], params[n : n + 1])
        assert alone.drafted(TWO, MOST)[0] == [rows[n]]
        alone.close()


def test_how_many_are_drafted_can_change_from_call_to_call() -> None:
    whole = plainly(engine(), "full")
    run = Run.begin(engine(), models.prompts(*LENGTHS), requests("full", 3))
    pieces, proposed = [], []
    for num_draft_tokens in (0, 3, 1, 2, 0, 3, 3, 3):
        rows, verified = run.drafted(TWO, MOST, num_cycles=2, num_draft_tokens=num_draft_tokens)
        pieces.append(rows)
        proposed.append(int(verified.proposed))
    run.plain(NEW)
    run.close()
    joined = [[token for rows in pieces for token in rows[n]] for n in range(3)]
    assert [row[: len(part)] for row, part in zip(whole, joined, strict=True)] == joined
    assert proposed[:5] == [0, 18, 6, 12, 0], "cycles x sequences x tokens"


def test_it_compiles_once_for_a_shape() -> None:
    run = Run.begin(engine(), models.prompts(5), requests("full", 1))
    run.drafted(TWO, MOST, num_cycles=1)
    size = SpeculativeSteps.decode._cache_size()
    run.drafted(TWO, MOST, num_cycles=3)
    run.close()
    other = Run.begin(engine(), models.prompts(9, seed=3), requests("full", 1, seed=5))
    other.drafted(TWO, MOST)
    other.close()
    assert SpeculativeSteps.decode._cache_size() == size


# The draft set


def test_the_hottest_are_kept_and_ties_go_to_the_first() -> None:
    heat = jnp.asarray([[1.0, 5, 3, 5], [0, 0, 0, 0]])
    assert hottest(heat, 2).tolist() == [[False, True, False, True], [True, True, False, False]]


def test_a_stand_in_is_the_nearest_kept_expert() -> None:
    far = jnp.asarray([[[0.0, 1, 2], [1, 0, 3], [2, 3, 0]]])
    assert nearest_kept(jnp.asarray([[False, True, True]]), far).tolist() == [[1, 1, 2]]
    assert nearest_kept(jnp.asarray([[True, False, False]]), far).tolist() == [[0, 0, 0]]


@pytest.mark.parametrize("policy", ["hot", "random", "resident"])
def test_only_residents_are_kept(policy) -> None:
    slots = engine(3)._slots
    residents = np.asarray(draft.resident_experts(slots))
    config = DraftConfig(2, policy=policy)
    heat = jnp.where(residents, 0.0, 9.0)  # the hottest have no slot
    found = draft.refresh(config, draft.start(config, slots), heat, slots)
    kept = np.asarray(found.stand_in) != NONE
    assert not (kept & ~residents).any()
    assert (kept.sum(axis=1) == (3 if policy == "resident" else 2)).all()


ROUTED = Routing(
    jnp.asarray([[0, 1], [2, 0], [1, 3], [4, 4]]),  # the last is no token
    jnp.asarray([[0.2, 0.6], [0.5, 0.3], [0.4, 0.4], [0, 0]]),
    jnp.log(jnp.asarray([[0.2, 0.6, 0.1, 0.1], [0.3, 0.1, 0.5, 0.1], [0.1, 0.4, 0.1, 0.4], [0.25] * 4])),
)


def test_what_is_dropped_leaves_its_weight_to_the_others() -> None:
    kept = substituted(ROUTED, jnp.asarray([0, NONE, 2, NONE]))
    assert kept.expert_ids.tolist() == [[0, 4], [2, 0], [4, 4], [4, 4]]
    np.testing.assert_allclose(kept.combine_weights, [[0.8, 0], [0.5, 0.3], [0, 0], [0, 0]], atol=1e-6)


def test_a_stand_in_takes_the_weight_of_what_it_stands_for() -> None:
    kept = substituted(ROUTED, jnp.asarray([0, 0, 2, 2]))
    assert kept.expert_ids.tolist() == [[0, 0], [2, 0], [0, 2], [4, 4]]
    np.testing.assert_allclose(kept.combine_weights, ROUTED.combine_weights, atol=1e-6)


def test_rerouting_takes_the_routers_next_best() -> None:
    kept = rerouted(ROUTED, jnp.asarray([0, NONE, 2, NONE]))
    assert kept.expert_ids.tolist() == [[0, 2], [2, 0], [0, 2], [4, 4]]
    np.testing.assert_allclose(
        kept.combine_weights, [[0.8 * 2 / 3, 0.8 / 3], [0.5, 0.3], [0.4, 0.4], [0, 0]], atol=1e-6
    )
    alone = rerouted(ROUTED, jnp.asarray([NONE, NONE, NONE, 3]))
    assert alone.expert_ids.tolist() == [[3, 4], [3, 4], [3, 4], [4, 4]], "fewer are kept than a token has"
    np.testing.assert_allclose(alone.combine_weights, [[0.8, 0], [0.8, 0], [0.8, 0], [0, 0]], atol=1e-6)


def test_heat_fades_as_the_policy_says() -> None:
    slots = engine(8)._slots
    counts = [jnp.zeros((2, 8)).at[:, n].set(4.0) for n in (3, 5)]
    all_wanted = {"hot": [3.6, 4.0], "hot_temporal": [0.0, 4.0], "hot_global": [4.0, 4.0], "frozen": [4.0, 0.0]}
    for policy, wanted in all_wanted.items():
        config = DraftConfig(1, policy=policy)  # type: ignore[arg-type]
        found = draft.start(config, slots)
        for each in counts:
            found = draft.refresh(config, found, each, slots)
        np.testing.assert_allclose(found.heat[0, [3, 5]], wanted)
        assert found.stand_in[0].tolist().index(int(np.argmax(found.heat[0]))) == (3, 5)[int(np.argmax(wanted))]


def test_substitution_needs_distances() -> None:
    with pytest.raises(ValueError, match='missing="substitute" needs the distances'):
        draft.start(DraftConfig(1, missing="substitute"), engine(8)._slots)


def test_distances_are_those_of_the_weights() -> None:
    layer = np.random.default_rng(0).normal(size=(5, 3, 4, 6)).astype(np.float32)
    flat = layer.reshape(5, -1)
    wanted = np.linalg.norm(flat[:, None] - flat[None], axis=-1)
    got = np.asarray(expert_distances(jnp.asarray(layer)))
    np.testing.assert_allclose(got / got.mean(), wanted / wanted.mean(), atol=2e-3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DraftConfig(0), "draft experts=0 must be at least 1"),
        (lambda: DraftConfig(1, policy="best"), "policy='best' is unknown; expected one of hot, hot_temporal"),  # type: ignore[arg-type]
        (lambda: SpeculativeSteps(engine().steps, DraftConfig(1), 0), "draft tokens=0 must be at least 1"),
    ],
)
def test_bad_settings_are_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_dynamic_rope_is_refused() -> None:
    config = dataclasses.replace(SMALL, rope=RopeConfig(rope_type="dynamic", factor=2.0))
    with pytest.raises(ValueError, match="does not go with rope_type 'dynamic'"):
        SpeculativeSteps(dataclasses.replace(engine().steps, config=config), DraftConfig(1), 2)
