"""Prefetching changes when weights come, never what is computed; and its counters are what they say."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jmoe
from jmoe import checkpoint, convert, memory, synthetic
from jmoe.config import Prefetching, RuntimeConfig
from jmoe.decoding.contest import Choice
from jmoe.decoding.sampling import SamplingParams, batch_sampling, sampling_mode
from jmoe.engine import Engine, Weights
from jmoe.experts import layer as experts_layer
from jmoe.experts.layer import OffloadedExperts, ResidentExperts
from jmoe.experts.look_ahead import Prefetch, count, guess, pays
from jmoe.experts.prefetch import PastRequests, everywhere, make_predictor, predict, predicted_logits
from jmoe.experts.prefetch_file import Calibration, file_beside
from jmoe.experts.residency import NONE
from jmoe.experts.slots import ExpertSlots, SlotLayout, init_slots
from jmoe.experts.store import ExpertStore
from jmoe.generation import Generation
from jmoe.model.router import Routing
from jmoe.prefetch_stats import PrefetchStats
from jmoe.prefetching import prefetching_line
from kernels_pallas.admit.result import Admitted
from kernels_pallas.expert_mlp.api import expert_mlp
from kernels_pallas.fetch.api import fetch
from kernels_pallas.prefetch import api
from kernels_pallas.prefetch.arrivals import Arrivals
from kernels_pallas.route.api import route
from tests import models
from tests.models import SMALL

pytestmark = pytest.mark.usefixtures("brings_all_guesses")

E, A, ROWS = SMALL.num_experts, SMALL.num_experts_per_tok, 3 * SMALL.moe_intermediate_size
NUM_LAYERS, ROW_BYTES = len(SMALL.moe_layers), SMALL.expert_bytes // ROWS
PROMPTS = models.prompts(9, 4, 13)
PREDICTOR = make_predictor(SMALL, models.weights().params)
PREDICTORS = {"lookahead": PREDICTOR, "activation": PastRequests(), "both": PastRequests(PREDICTOR)}
AMOUNTS = (0.02, 0.5, 1.0, 1.7)  # a row, half an expert, one, one and most of a second
ALONE = [SamplingParams(max_new_tokens=24, temperature=2.0)]
TOGETHER = [*ALONE, SamplingParams(max_new_tokens=9), SamplingParams(max_new_tokens=17, temperature=0.8, seed=2)]


@functools.cache
def engine(**runtime) -> Engine:
    return models.engine(SMALL, **{"prefill_chunk": 16, "decode_chunk": 12, "expert_slots": A, **runtime})


@functools.cache
def ran(num_sequences: int = 1, **runtime) -> Generation:
    """The fewest slots that there may be, unless it says more."""
    requests = TOGETHER if num_sequences > 1 else ALONE
    generation = engine(**runtime).generate(PROMPTS[:num_sequences], requests)
    generation.results()
    return generation


def tokens(generation: Generation) -> list[tuple[int, ...]]:
    return [completion.token_ids for completion in generation.completions]


def came(generation: Generation) -> PrefetchStats:
    assert generation.stats.prefetch is not None
    return generation.stats.prefetch


# The promises


@pytest.mark.parametrize(
    ("kind", "num_sequences", "amount", "policy"),
    [
        *(("lookahead", 1, amount, None) for amount in AMOUNTS),
        *((kind, 1, 0.5, policy) for kind in ("activation", "both") for policy in (None, "activation")),
        *(("lookahead", 3, amount, None) for amount in (0.5, 1.7)),
        *((kind, 3, 1.7, None) for kind in ("activation", "both")),
    ],
)
def test_prefetching_changes_no_token_and_no_residency(
    kind: str, num_sequences: int, amount: float, policy: str | None
) -> None:
    """The same experts hit and missed; part of those missed came early, and none of it is counted twice."""
    sizes = {"batch_size": num_sequences, "expert_slots": num_sequences * A, "residency_policy": policy}
    plain = ran(num_sequences, **sizes).stats
    ahead = ran(num_sequences, prefetch=kind, prefetch_experts=amount, **sizes)
    assert tokens(ahead) == tokens(ran(num_sequences, **sizes))
    stats, brought = ahead.stats, came(ahead)
    assert stats.decode == plain.decode
    assert 0 < brought.useful_bytes < plain.link_bytes
    assert brought.useful_bytes + brought.wasted_bytes == brought.prefetched_bytes
    assert brought.late_bytes is None, "a CPU has no clock"
    over_the_link = brought.prefetched_bytes + (stats.decode.fetched * SMALL.expert_bytes - brought.useful_bytes)
    assert stats.link_bytes == over_the_link


@pytest.mark.parametrize("amount", AMOUNTS)
def test_no_more_rows_come_than_asked_for(amount: float) -> None:
    made = ran(prefetch="lookahead", prefetch_experts=amount)
    num_rows = max(1, round(amount * ROWS))
    assert 0 < came(made).prefetched_bytes <= made.stats.num_decode_steps * (NUM_LAYERS - 1) * num_rows * ROW_BYTES


def test_a_batch_that_may_need_more_experts_than_there_are_slots_prefetches_nothing() -> None:
    """Of the same engine, a smaller one does."""
    sizes = {"batch_size": 3, "expert_slots": A}
    together, alone = (ran(number, prefetch="lookahead", **sizes) for number in (3, 1))
    assert tokens(together)[0] == tokens(alone)[0] == tokens(ran())[0]
    assert together.stats.prefetch is None
    assert came(alone).prefetched_bytes > 0


def test_nothing_is_prefetched_where_everything_is_resident() -> None:
    assert engine(expert_slots=E, prefetch="lookahead").prefetching is None
    assert engine(expert_slots=E, prefetch="both").prefetching is None


def adding_nothing(weights: Weights) -> Weights:
    """Neither attention nor experts add anything to the residual stream."""
    params = {path: jnp.zeros_like(leaf) if "o_proj" in path else leaf for path, leaf in weights.params.items()}
    assert any("o_proj" in path for path in params)
    layers = tuple(
        jax.device_put(np.zeros(layer.shape, layer.dtype), memory.host_sharding()) for layer in weights.store.layers
    )
    return Weights(params, ExpertStore(layers))


def test_where_a_layer_adds_nothing_the_guess_is_the_routing() -> None:
    """So the best guess is asked for wherever any expert is missing, and is wasted where none is."""
    made = engine(prefetch="lookahead", prefetch_experts=1.0)
    oracle = Engine.start(SMALL, made.runtime, lambda: adding_nothing(models.weights()))
    generation = oracle.generate(PROMPTS[:1], ALONE)
    generation.results()
    useful, wasted = (
        size / SMALL.expert_bytes for size in (came(generation).useful_bytes, came(generation).wasted_bytes)
    )
    fetched, steps = generation.stats.decode.fetched, generation.stats.num_decode_steps
    assert useful + wasted == steps * (NUM_LAYERS - 1)
    assert (fetched / A - steps) / A <= useful <= fetched
    assert came(generation).useful_share > came(ran(prefetch="lookahead", prefetch_experts=1.0)).useful_share


def random_calibration(fingerprint: str) -> Calibration:
    rng, places = np.random.default_rng(5), everywhere(None, NUM_LAYERS)
    vectors = rng.normal(size=(NUM_LAYERS, E, SMALL.hidden_size)).astype(np.float32)
    return Calibration(
        fingerprint, vectors, places, everywhere("default_vectors", NUM_LAYERS), everywhere(0.5, NUM_LAYERS)
    )


def test_it_guesses_with_the_calibration_beside_the_checkpoint(tmp_path, monkeypatch) -> None:
    """Through `jmoe.load`; and other guesses change no token."""
    monkeypatch.setenv("JMOE_CACHE", str(tmp_path / "cache"))
    synthetic.write_synthetic(dataclasses.replace(SMALL, vocab_size=260), tmp_path / "hf", regime="flat", seed=3)
    convert.convert_hf(tmp_path / "hf", tmp_path / "model")
    said: list[str] = []

    def ran_from_disk(kind: Prefetching = "lookahead") -> Generation:
        options = RuntimeConfig(expert_slots=A, max_seq_len=64, measure_link=False, prefetch=kind)
        generation = jmoe.load(tmp_path / "model", options, announce=said.append).generate(PROMPTS[:1], ALONE)
        generation.results()
        return generation

    plain = ran_from_disk()
    assert "prefetch guesses with the next layer's router: no calibration of these weights" in said
    file = file_beside(tmp_path / "model")
    random_calibration(checkpoint.read_manifest(tmp_path / "model").fingerprint).save(file)
    calibrated = ran_from_disk()
    assert f"prefetch guesses with {file}" in said
    assert tokens(calibrated) == tokens(plain)
    assert came(calibrated).prefetched_bytes == came(plain).prefetched_bytes
    assert came(calibrated).useful_bytes != came(plain).useful_bytes
    for other in ("activation", "both"):
        said.clear()
        assert tokens(ran_from_disk(other)) == tokens(plain)
        assert (f"prefetch guesses with {file}" in said) is (other == "both")
    assert any(text.startswith("policy activation: with what it learned before (") for text in said)


# One layer after the other, against plain Python


def layout(num_slots: int) -> SlotLayout:
    return SlotLayout(num_layers=NUM_LAYERS, num_experts=E, slots_per_layer=num_slots, num_staging=2)


@functools.cache
def step(num_experts: int, kind: str):
    store, predictor = models.weights().store, PREDICTORS[kind]

    @jax.jit
    def run(slots: ExpertSlots, xs, routings, residuals, num_rows):
        prefetch = Prefetch(num_experts, num_rows, predictor, num_choices=3 * A)
        experts = OffloadedExperts(store, slots, layout(6), admits=True, policy="lru", prefetch=prefetch)
        carry, ys = experts.start(), []
        for n in range(NUM_LAYERS):
            carry = experts.look_ahead(n, residuals[n], routings[n], carry)
            y, carry = experts(n, xs[n], routings[n], carry)
            ys.append(y)
        return ys, experts.finish(carry), experts.prefetched(carry)

    return run


@functools.cache
def resident():
    layers = models.on_device(models.weights()).store.layers

    @jax.jit
    def run(xs, routings):
        return [ResidentExperts(layers)(n, xs[n], routings[n], None)[0] for n in range(NUM_LAYERS)]

    return run


def rows_by_hand(odds: np.ndarray, slot_of: np.ndarray, needed: set[int], num_experts: int, left: int) -> list[int]:
    """[useful, wasted] rows of a layer, which three rows ask."""
    found, asked = [0, 0], np.argsort(-odds, kind="stable")[: 3 * A]
    missing = [expert for expert in asked if slot_of[expert] == NONE and odds[expert] > 0]
    for expert in missing[:num_experts]:
        found[expert not in needed] += min(ROWS, left)
        left -= min(ROWS, left)
    return found


@pytest.mark.parametrize(
    ("kind", "num_experts", "num_rows", "is_oracle"),
    [
        *(
            ("lookahead", *amount, is_oracle)
            for is_oracle in (False, True)
            for amount in [(1, 0), (1, 7), (1, ROWS), (2, ROWS + 11), (2, 5 * ROWS)]
        ),
        ("activation", 1, ROWS, False),
        ("both", 2, ROWS + 11, False),
        ("both", 1, 7, True),
    ],
)
def test_counts_and_results_are_those_of_plain_python(
    kind: str, num_experts: int, num_rows: int, is_oracle: bool
) -> None:
    """Of three rows, two of them tokens; or one, which every router routes as the layer before it guesses."""
    rng, valid = np.random.default_rng(num_rows), jnp.asarray([True, False, not is_oracle])
    slots, seen = init_slots(models.weights().store, layout(6), policy="lru", watched=["activation"]), set()
    for _ in range(12):
        xs, residuals = jnp.asarray(rng.normal(size=(2, NUM_LAYERS, 3, SMALL.hidden_size)), jnp.float32)
        logits = list(jnp.asarray(3 * rng.normal(size=(NUM_LAYERS, 3, E)), jnp.float32))
        routings = [routed(logits[0], valid)]
        for n in range(NUM_LAYERS - 1):
            guessed = predicted_logits(PREDICTOR, n, residuals[n], routings[n])
            routings.append(routed(guessed if is_oracle else logits[n + 1], valid))
        before = np.asarray(slots.residency.stacked.slot_of)
        expected_use = np.asarray(slots.residency.tracked["activation"].expected)
        ys, slots, counted = step(num_experts, kind)(slots, xs, routings, residuals, jnp.asarray(num_rows, jnp.int32))
        for y, expected in zip(ys, resident()(xs, routings), strict=True):
            np.testing.assert_allclose(y, expected, atol=2e-6 * max(1, np.abs(expected).max()))
        for n, routing in enumerate(routings):
            if kind == "activation" or (kind == "both" and n == 0):
                odds = expected_use[n]
            else:
                odds = np.asarray(predict(PREDICTOR, n - 1, residuals[n - 1], routings[n - 1])) if n else np.zeros(E)
            needed = set(np.asarray(routing.expert_ids).ravel().tolist()) - {E}
            expected = rows_by_hand(odds, before[n], needed, num_experts, num_rows)
            assert [int(counted.useful[n]), int(counted.wasted[n])] == expected
            assert [int(counted.untimed[n]), int(counted.late[n])] == [expected[0], 0], "there is no clock"
            seen.add((expected[0] > 0, expected[1] > 0))
            if is_oracle and n and num_rows and any(before[n][expert] == NONE for expert in needed):
                assert expected[0] > 0, "a missing expert of the routing is the best guess"
    assert len(seen) > (num_rows > 0), "now useful, now wasted"


def routed(logits, valid) -> Routing:
    return Routing(*route(logits, valid, num_chosen=A, normalize=True), logits)


def random_step():
    """What a step of three tokens begins with, and its layers get: slots, xs, routings, residuals."""
    rng = np.random.default_rng(0)
    xs, residuals = jnp.asarray(rng.normal(size=(2, NUM_LAYERS, 3, SMALL.hidden_size)), jnp.float32)
    logits = jnp.asarray(3 * rng.normal(size=(NUM_LAYERS, 3, E)), jnp.float32)
    slots = init_slots(models.weights().store, layout(6), policy="lru", watched=["activation"])
    return slots, xs, [routed(each, jnp.ones(3, bool)) for each in logits], residuals


@pytest.mark.parametrize(
    ("kind", "policy"),
    [("lookahead", "reuse"), ("activation", "reuse"), ("both", "reuse"), ("activation", "activation")],
)
def test_the_first_layer_is_guessed_from_past_requests(kind: str, policy: str) -> None:
    """Once there is a step to go by, whichever policy decides; and by looking ahead never."""
    made = engine(prefetch=kind, prefetch_experts=1.0, residency_policy=policy)
    inputs, sampling = (made.weights.params, made.weights.store), batch_sampling(ALONE, ())
    state, came = made.new_state(1, [24]), []
    for num_steps in (1, 23):
        state, emitted = made.steps.decode_prefetching(
            *inputs,
            state,
            sampling,
            np.int32(num_steps),
            made.predictor,
            np.int32(ROWS),
            prefetch_experts=1,
            capacity=24,
            mode=sampling_mode(ALONE),
        )
        came.append(np.asarray(emitted.prefetched.useful + emitted.prefetched.wasted))
    made.give_back(state)
    assert came[0][0] == 0
    assert (came[1][0] > 0) == (kind != "lookahead")
    assert came[1][1] > 0


def test_what_is_learned_for_a_prefetch_is_what_the_policy_would_learn(tmp_path) -> None:
    """Kept in the same file, beside that of the policy which decides."""

    def collection(name: str, **runtime) -> np.ndarray:
        options = RuntimeConfig(expert_slots=A, max_seq_len=64, measure_link=False, **runtime)
        details = {"fingerprint": "abc", "experience_dir": tmp_path / name}
        made = Engine.start(SMALL, options, models.weights, **details)
        made.generate(PROMPTS[:1], ALONE).results()
        state = made.new_state(1, [1])
        learned = np.array(state.experts.residency.tracked["activation"].collection)
        made.give_back(state)
        return learned

    decides = collection("policy", residency_policy="activation")
    watched = collection("watched", prefetch="both")
    assert np.any(decides)
    np.testing.assert_array_equal(watched, decides)
    assert {file.name for file in (tmp_path / "watched").iterdir()} == {"abc-activation.npz", "abc-reuse.npz"}
    assert {file.name for file in (tmp_path / "policy").iterdir()} == {"abc-activation.npz"}
    again = collection("watched", prefetch="activation")
    np.testing.assert_array_equal(again[:, 0], decides[:, 0])
    assert np.any(again[:, 1]), "and a second request beside the one that was read"


def line(**runtime) -> str:
    made = engine(**{"prefetch": "lookahead", **runtime})
    return prefetching_line(SMALL, made.runtime, made.plan)


def test_what_the_engine_says() -> None:
    assert line() == "prefetch of up to 1 experts a layer, at most 6.00 KiB a step, while attention runs"
    assert "at most 12.00 KiB a step" in line(prefetch_experts=2)
    assert "up to 1 experts a layer, guessed from past requests, at most 12.00 KiB a step" in line(
        prefetch="activation"
    )
    first = "guessed in the layer before and, for the first, from past requests, at most 12.00 KiB a step"
    assert first in line(prefetch="both")
    assert line(batch_size=3).endswith(
        "; not for 3 sequences together, which may ask for 6 experts of a layer of 2 slots"
    )
    assert line(expert_slots=E).startswith("prefetch: none is needed, every expert is resident")


# Its parts


@pytest.mark.parametrize(
    ("num_slots", "num_choices", "expected"),
    [(4, 4, True), (4, 5, False), (2, 2, True), (7, 100, False), (E, 2, False), (E, 100, False)],
)
def test_where_it_pays(num_slots: int, num_choices: int, expected: bool) -> None:
    assert pays(layout(num_slots), num_choices) is expected


@pytest.mark.parametrize(
    ("resident", "num_asked", "num_experts", "expected"),
    [
        ([], 2, 1, [0]),
        ([], 5, 3, [0, 2, 3]),  # of equals the first
        ([0, 2], 3, 1, [3]),
        ([0, 2], 2, 1, []),  # expert 3 would be asked for third
        ([0, 2], 5, 3, [3, 4]),  # what is impossible is no guess
        ([0, 2, 3, 4], 5, 2, []),
    ],
)
def test_guesses_are_those_asked_for_that_are_not_resident(resident, num_asked, num_experts, expected) -> None:
    odds = jnp.asarray([0.8, 0.0, 0.5, 0.5, 0.2])
    slot_of = jnp.asarray([expert if expert in resident else NONE for expert in range(5)])
    rows_of_expert, num_rows = 6, 9

    @jax.jit
    def made_of(odds, slot_of, num_rows):
        return guess(odds, slot_of, Prefetch(num_experts, num_rows, PastRequests(), num_asked), rows_of_expert)

    made, nobody = made_of(odds, slot_of, num_rows), num_experts - len(expected)
    assert made.expert_ids.tolist() == expected + [NONE] * nobody
    assert made.num_rows.tolist() == [6, 3, 0][: len(expected)] + [0] * nobody


def test_counts_by_hand() -> None:
    """Layer 1: 10 rows of expert 1, needed, and 3 of 2, not. Layer 2: 5 of 3, not, and nobody. Layer 0: 7 and 2."""

    def arrivals(expert_ids, num_rows) -> Arrivals:
        return Arrivals(jnp.asarray(expert_ids), jnp.asarray(num_rows), jnp.zeros((2, 3, 1, 1)))

    needed = jnp.asarray([[0, 1, 1, 1], [1, 1, 0, 1], [1, 0, 1, 0]], bool)
    come = [arrivals([1, 2], [10, 3]), arrivals([3, NONE], [5, 0])]
    for first, rows in (([], 0), ([arrivals([3, 0], [7, 2])], 7)):
        made = count([*first, *come], needed)
        assert np.asarray(made.useful).tolist() == [rows, 10, 0]
        assert np.asarray(made.wasted).tolist() == [2 if first else 0, 3, 5]
        assert np.asarray(made.untimed).tolist() == np.asarray(made.useful).tolist()
        assert not np.any(made.late)


def late_by_hand(arrivals: Arrivals, needed: np.ndarray, known_at: int) -> int:
    """Row after row: whether the part with its last value came after, on a clock of 32 bits."""
    _, _, num_hidden, width = arrivals.weights.shape
    came_at = np.asarray(arrivals.came_at)
    part_size, late = 3 * num_hidden * width // came_at.shape[1], 0
    for expert, num_rows, times in zip(arrivals.expert_ids.tolist(), arrivals.num_rows.tolist(), came_at, strict=True):
        for row in range(num_rows):
            since = (int(times[((row + 1) * width - 1) // part_size]) - known_at) % 2**32
            late += bool(needed[expert]) and 0 < since < 2**31
    return late


@pytest.mark.parametrize("num_parts", [1, 4, 15, 30, 180])
@pytest.mark.parametrize("around", [0, 2**31 - 1, -(2**31)])
def test_late_rows_are_those_of_plain_python(num_parts: int, around: int) -> None:
    """Of 15 rows of 12 values: in one part, over the ends of parts, in several. Where the clock wraps around too."""
    rng, late, useful = np.random.default_rng(num_parts), [], []
    for _ in range(20):
        known_at = (around + rng.integers(-300, 300, 2)).astype(np.int64)
        came_at = known_at[:, None, None] + rng.integers(-500, 500, (2, 3, num_parts)) * rng.integers(0, 2, (2, 3, 1))
        come = []
        for layer in range(2):
            named, rows = rng.random(3) < 0.8, rng.integers(0, 16, 3)
            times = np.where(np.arange(num_parts) * 15 < rows[:, None] * num_parts, came_at[layer], 1 << 30)
            integers = np.where(named, rng.permutation(6)[:3], NONE), np.where(named, rows, 0), wrapped(times)
            ids, rows, times = (jnp.asarray(part, jnp.int32) for part in integers)
            come.append(Arrivals(ids, rows, jnp.zeros((3, 3, 5, 12)), times))
        needed = rng.random((3, 6)) < 0.6
        made = jax.jit(count)(come, jnp.asarray(needed), list(jnp.asarray(wrapped(known_at))))
        expected = [late_by_hand(*each) for each in zip(come, needed[1:], known_at.tolist(), strict=True)]
        assert np.asarray(made.late).tolist() == [0, *expected]
        assert not np.any(made.untimed)
        late += expected
        useful += np.asarray(made.useful).tolist()
    assert 0 < sum(late) < sum(useful)


def wrapped(times: np.ndarray) -> np.ndarray:
    """The low 32 bits."""
    return times.astype(np.uint32).view(np.int32)


@pytest.mark.parametrize("tells", ["now", "admit"])
def test_a_step_asks_each_layers_arrivals_when_its_own_demand_was_known(tells: str, monkeypatch) -> None:
    """With a clock that says when each layer was admitted; all that comes for the last layer is late by 1 ns.

    What admits tells the time itself, and is asked first; else a kernel does.
    """
    ticks, comes = itertools.count(), itertools.count(1)

    def bring(*args, **options) -> Arrivals:
        came, layer = api.prefetch(*args, **options), next(comes)
        late_by = layer == NUM_LAYERS - 1
        return dataclasses.replace(came, came_at=jnp.full((*came.num_rows.shape, 4), 100 * (layer - 1) + late_by))

    monkeypatch.setattr(experts_layer, "bring", bring)

    def now(after) -> jax.Array:
        return jnp.int32(100 * next(ticks)) + 0 * after

    def admit(*args, **options) -> Admitted:
        admitted = experts_admit(*args, **options)
        is_first = next(admissions) == 0  # for which nothing comes
        return dataclasses.replace(admitted, known_at=jnp.int32(-1) if is_first else now(admitted.count))

    experts_admit, admissions = experts_layer.admit, itertools.count()
    if tells == "admit":
        monkeypatch.setattr(experts_layer, "admit", admit)
    else:
        monkeypatch.setattr(experts_layer, "now", now)
    counted = step.__wrapped__(2, "lookahead")(*random_step(), jnp.asarray(2 * ROWS, jnp.int32))[2]
    assert (next(ticks), next(comes)) == (NUM_LAYERS - 1, NUM_LAYERS), "one of each a layer, but for the first"
    assert counted.useful[-1] > 0
    assert np.asarray(counted.late).tolist() == [*[0] * (NUM_LAYERS - 1), int(counted.useful[-1])]
    assert not np.any(counted.untimed)


def test_a_layers_experts_begin_after_what_is_computed_beside_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where they are multiplied with as they come: after its residency, and the guess of the next layer if there is."""
    waited_for = []

    def multiply_what_comes(x, store, slots, admitted, arrivals, after):
        waited_for.append([each.shape for each in after])
        slots = fetch(store, slots, admitted.plan_experts, admitted.plan_slots, admitted.count, arrivals)
        return expert_mlp(x, slots, admitted.group_slots, admitted.group_weights), slots

    monkeypatch.setattr(experts_layer.read_through, "can", lambda *shapes: True)
    monkeypatch.setattr(experts_layer.read_through, "expert_mlp", multiply_what_comes)
    slots, xs, routings, residuals = random_step()
    ys, _, _ = step.__wrapped__(2, "lookahead")(slots, xs, routings, residuals, jnp.asarray(ROWS, jnp.int32))
    of_this, of_next = [(E,), (6,)], [(2,), (2,)]
    assert waited_for == [of_this + of_next] * (NUM_LAYERS - 1) + [of_this]
    for y, wanted in zip(ys, resident()(xs, routings), strict=True):
        np.testing.assert_array_equal(y, wanted)


def test_amounts_that_change_change_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one generation plain steps and others; which is said."""
    made, amounts = engine(prefetch="lookahead"), iter([0, ROWS, 0, ROWS // 4, ROWS // 2, *[0] * 24])
    assert made.prefetching is not None
    monkeypatch.setattr(made.prefetching, "choose", lambda num_sequences: Choice(next(amounts), 3))
    generation = made.generate(PROMPTS[:1], ALONE)
    generation.results()
    assert tokens(generation) == tokens(ran())
    steps = came(generation).steps
    assert [steps[amount] for amount in (0.25, 0.5, 1.0)] == [3, 3, 3]
    assert steps[0] == generation.stats.num_decode_steps - 9
    assert came(generation).prefetched_bytes == 3 * (NUM_LAYERS - 1) * (ROWS + ROWS // 4 + ROWS // 2) * ROW_BYTES
    chosen = f"{steps[0]} plain steps, 9 steps of 0.25 to 1 experts a layer, 0.583 on average"
    assert any(text.endswith(chosen) for text in generation.stats.lines())


def test_the_guess_is_made_before_attention() -> None:
    """A barrier keeps XLA from making it together with the true router's choice; plain steps have none."""
    made = engine(prefetch="lookahead")
    state, steps, one = made.new_state(1, [1]), made.steps, jnp.asarray(1, jnp.int32)
    inputs = made.weights.params, made.weights.store, state, batch_sampling(ALONE, ()), one
    static = {"capacity": 2, "mode": "greedy"}
    ahead = type(steps).decode_prefetching.lower(steps, *inputs, made.predictor, one, prefetch_experts=1, **static)
    plain = type(steps).decode.lower(steps, *inputs, **static)
    made.give_back(state)
    barriers = [lowered.as_text().count("stablehlo.optimization_barrier") for lowered in (plain, ahead)]
    assert barriers[1] == barriers[0] + 2 * (NUM_LAYERS - 1)


def test_another_amount_compiles_nothing() -> None:
    """Up to the same number of experts: rows are an argument."""
    steps = type(engine().steps)
    ran(prefetch="lookahead", prefetch_experts=0.5)
    before = steps.decode_prefetching._cache_size()
    ran(prefetch="lookahead", prefetch_experts=0.25)
    assert steps.decode_prefetching._cache_size() == before


@pytest.mark.parametrize("kind", ["activation", "both"])
def test_decode_compiles_once(kind: str) -> None:
    steps, sizes = type(engine().steps), {"prefetch": kind, "prefetch_experts": 0.5}
    ran(**sizes)
    before = steps.decode_prefetching._cache_size()
    engine(**sizes).generate(PROMPTS[1:2], ALONE).results()
    assert steps.decode_prefetching._cache_size() == before
