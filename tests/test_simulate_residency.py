"""The simulator: that it counts as the engine does, and as its twin in plain Python; the optimum; the tool."""

import dataclasses
import functools
import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from jmoe import SamplingParams
from jmoe.engine import Engine
from jmoe.experts.policies import POLICIES
from jmoe.experts.residency import init_residency
from jmoe.traces import Trace
from tests import models
from tests.twin import TWINS, Twin, replay
from tools import simulate_residency as simulator

PNG = b"\x89PNG\r\n\x1a\n"
SMALL = dataclasses.replace(models.SMALL, num_hidden_layers=2, mlp_only_layers=())
NUM_LAYERS = len(SMALL.moe_layers)


def generate(engine: Engine) -> tuple[list[tuple[int, ...]], Trace, np.ndarray]:
    """The tokens and the routing of four requests in batches of two, and the engine's decode counters [3, L]."""
    prompts = models.prompts(5, 9, 3, 12, config=SMALL)
    requests = [SamplingParams(max_new_tokens=count) for count in (12, 7, 9, 14)]
    generation = engine.generate(prompts, requests)
    tokens = [completion.token_ids for completion in generation.results()]
    state = engine.new_state(1, [1])
    counters = state.experts.residency.decode
    engine.give_back(state)
    return tokens, generation.trace, np.asarray([counters.hits, counters.fetched, counters.streamed])


@functools.cache
def expected_tokens() -> list[tuple[int, ...]]:
    """With every expert resident, so that there is nothing to decide."""
    return generate(models.engine(SMALL, expert_slots=SMALL.num_experts, batch_size=2, record_routing=True))[0]


@pytest.mark.parametrize("name", POLICIES)
def test_the_simulator_counts_what_the_engine_counted(name: str) -> None:
    """Two tokens of two experts each need up to four, and there are three slots: some steps do not fit."""
    engine = models.engine(SMALL, expert_slots=3, batch_size=2, record_routing=True, residency_policy=name)
    tokens, trace, expected = generate(engine)
    assert tokens == expected_tokens()
    used, ends = simulator.steps_of(trace)
    start = init_residency(NUM_LAYERS, SMALL.num_experts, 3, name)
    after = simulator.replay(start, used, ends, policy=name, max_needed=4)
    counters = after.decode
    np.testing.assert_array_equal([counters.hits, counters.fetched, counters.streamed], expected)
    assert expected[0].min() > 0
    assert expected[1].min() > 0
    assert int(after.clock) == len(used) == 11 + 13  # the first token of each request is prefill's
    assert np.flatnonzero(ends).tolist() == [10, 23]


@pytest.mark.parametrize("name", POLICIES)
def test_the_simulator_counts_what_the_twin_counts(name: str) -> None:
    rng, shape, slots = np.random.default_rng(0), (2, 8), 3
    odds = rng.uniform(0.05, 0.5, (3, *shape))
    requests = [rng.binomial(2, odds[n], (12, *shape)) for n in range(3)]
    used, ends = np.concatenate(requests).astype(np.int32), np.arange(36) % 12 == 11
    after = simulator.replay(init_residency(*shape, slots, name), used, ends, policy=name, max_needed=8).decode
    twins = [Twin.filled(slots) for _ in range(2)]
    counts = replay(TWINS[name](*shape), twins, [request.tolist() for request in requests])
    np.testing.assert_array_equal([after.hits, after.fetched, after.streamed], np.transpose(counts))


def test_a_trace_as_steps() -> None:
    """Requests 4 and 7 together, then 2 alone; prefill is left out."""
    request, step = [4, 7, 4, 7, 4, 2, 2, 2], [0, 0, 1, 1, 2, 3, 4, 5]
    is_prefill = [True, True, False, False, False, True, False, False]
    ids = np.array([[0, 1], [0, 1], [2, 3], [3, 1], [0, 2], [0, 1], [1, 3], [2, 0]])[:, None]
    trace = Trace(
        ids, np.zeros(ids.shape), np.array(request), np.zeros(8), np.array(step), np.array(is_prefill), 4, (0,)
    )
    used, ends = simulator.steps_of(trace)
    assert used[:, 0].tolist() == [[0, 1, 1, 2], [1, 0, 1, 0], [0, 1, 0, 1], [1, 0, 1, 0]]
    assert ends.tolist() == [False, True, False, True]


# The optimum.


def most_hits(needed: list[set[int]], resident: frozenset[int], slots: int) -> int:
    """By trying everything that a layer might keep."""
    if not needed:
        return 0
    now, *rest = needed
    pool = sorted(resident | now)
    kept = [frozenset(chosen) for chosen in itertools.combinations(pool, min(slots, len(pool)))]
    if len(now) <= slots:
        kept = [chosen for chosen in kept if now <= chosen]
    return len(now & resident) + max(most_hits(rest, chosen, slots) for chosen in kept)


@pytest.mark.parametrize("seed", range(12))
def test_no_choice_is_better_than_the_optimum(seed: int) -> None:
    rng = np.random.default_rng(seed)
    used = rng.binomial(1, rng.uniform(0.1, 0.6), (6, 1, 5))
    needed = [set(np.flatnonzero(row[0]).tolist()) for row in used]
    best = most_hits(needed, frozenset(range(2)), 2) / max(1, used.sum())
    assert simulator.optimum(used, 2) == pytest.approx(best)


@pytest.mark.parametrize("name", POLICIES)
def test_no_policy_beats_the_optimum(name: str) -> None:
    rng = np.random.default_rng(5)
    used = rng.binomial(1, rng.uniform(0.05, 0.6, (2, 8)), (60, 2, 8)).astype(np.int32)
    steps = used, np.arange(60) % 20 == 19
    rates = simulator.hit_rates([name], steps, steps, 3, 8)
    assert 0 < rates[name]["hit_rate"] <= rates["optimum"]["hit_rate"] < 1
    assert rates["optimum"]["of_the_gap"] == 1


def test_next_uses() -> None:
    needed = np.array([[1, 0], [0, 0], [1, 1]], bool)[:, None]
    assert simulator.next_uses(needed)[:, 0].tolist() == [[2, 2], [2, 2], [3, 3]]


# The tool.


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve requests of ten tokens, a favourite expert each."""
    rng = np.random.default_rng(0)
    odds = np.ones((12, 8)) + 6 * np.eye(8)[np.arange(12) % 8]
    ids = [rng.choice(8, 2, replace=False, p=odds[row] / odds[row].sum()) for row in np.repeat(np.arange(12), 20)]
    shape = 120, 2, 2
    trace = Trace(
        np.array(ids).reshape(shape),
        np.zeros(shape),
        np.repeat(np.arange(12), 10),
        np.tile(np.arange(10), 12),
        np.arange(120),
        np.tile(np.arange(10) < 2, 12),
        8,
        (0, 1),
    )
    trace.save(path := tmp_path_factory.mktemp("traces") / "trace.npz")
    return path


def test_from_trace_to_table_json_and_plot(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report, plot = tmp_path / "report.json", tmp_path / "plot.png"
    options = ["--policies", "lfu", "reuse", "--batch-sizes", "1", "4", "--shares", "0.5"]
    assert simulator.main([str(file), *options, "--json", str(report), "--plot", str(plot)]) == 0
    printed = capsys.readouterr()
    assert "6 requests are measured, 6 teach" in printed.err
    _, head, *lines = printed.out.splitlines()
    assert head.split() == ["policy", "b=1", "50.0%", "b=4", "50.0%"]
    assert [line[:20].strip() for line in lines[:4]] == ["lfu", "reuse untaught", "reuse", "optimum"]
    rows = json.loads(report.read_text())["rows"]
    assert len(rows) == 4 * 2
    assert {row["slots"] for row in rows} == {4}
    assert all(0 < row["hit_rate"] < 1 for row in rows)
    assert f"{rows[0]['hit_rate']:.4f}" in lines[0]
    assert plot.read_bytes().startswith(PNG)


def test_every_request_teaches_or_is_measured(file: Path) -> None:
    taught, measured = simulator.split(Trace.read(file), 0.25)
    assert taught.requests.tolist() == [3, 7, 11]
    assert measured.requests.tolist() == [0, 1, 2, 4, 5, 6, 8, 9, 10]
    nothing, all_of_them = simulator.split(Trace.read(file), 0.0)
    assert (len(nothing), len(all_of_them)) == (0, 120)


def test_without_lessons_there_is_no_untaught_row(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert simulator.main([str(file), "--teach", "0", "--policies", "reuse", "--batch-sizes", "1"]) == 0
    assert "untaught" not in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--teach", "1"], ["--shares", "0"], ["--policies", "magic"]])
def test_impossible_options_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        simulator.main(["trace.npz", *arguments])
    assert "error: " in capsys.readouterr().err


def test_no_trace_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert simulator.main([str(tmp_path / "absent.npz")]) == 2
    assert capsys.readouterr().err.startswith("error: ")
