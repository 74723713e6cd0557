"""As much comes early as comes in time, and only while that saves more than guessing takes."""

import itertools

import pytest

from jmoe.config import ModelConfig, RuntimeConfig
from jmoe.decoding import prefetch_budget
from jmoe.decoding.contest import Choice
from jmoe.decoding.prefetch_budget import (
    GUESS_BYTES,
    HALF_LIFE,
    LOOK,
    LOOK_AGAIN,
    PARTS,
    ROOM,
    SETTLED,
    TRY,
    WASTE,
    Budget,
)
from jmoe.decoding.sampling import SamplingParams
from jmoe.engine import Engine
from jmoe.generation import Generation
from jmoe.prefetch_stats import PrefetchStats
from jmoe.prefetching import Prefetching, prefetching_line, settled
from kernels_pallas.prefetch import api
from tests import models
from tests.models import SMALL
from tests.test_config import CONFIGS

ROWS_OF_EXPERT, ROW_BYTES, NUM_GUESSES = 2304, 4096, 11  # of Qwen3-30B-A3B, 12 layers of it
MOST = ROWS_OF_EXPERT  # a whole expert
QUARTER = Choice(MOST // 4, TRY)
LOOK_AT, PLAIN = Choice(1, TRY), Choice(0)
WORTH = WASTE / (1 + WASTE)  # the useful share of large experts where all layers bring something, but for guessing


def budget(most_rows: int = MOST, row_bytes: int = ROW_BYTES) -> Budget:
    return Budget(most_rows, ROWS_OF_EXPERT, row_bytes, NUM_GUESSES)


def came(
    useful_share: float, num_steps: int, num_rows: int, *, late_share: float | None = None, row_bytes: int = ROW_BYTES
) -> PrefetchStats:
    """Of steps in which all layers brought something."""
    size = num_steps * NUM_GUESSES * num_rows * row_bytes
    useful = round(size * useful_share)
    late = None if late_share is None else round(useful * late_share)
    return PrefetchStats(useful_bytes=useful, wasted_bytes=size - useful, late_bytes=late)


def looked(useful_share: float, **sizes) -> Budget:
    made = begun(**sizes)
    made.see(came(useful_share, TRY, 1, **sizes), TRY, 1)
    return made


def begun(**sizes) -> Budget:
    """That was asked for a first call, of plain steps, and knows of it."""
    made = budget(**sizes)
    assert made.choose() == Choice(0, TRY)
    made.see(PrefetchStats(), TRY, 0)
    return made


def test_it_looks_before_anything_comes() -> None:
    """And begins the look beside the first call, without knowing how that ends."""
    made = budget()
    assert [made.choose(), made.choose()] == [Choice(0, TRY), LOOK_AT]
    made.see(PrefetchStats(), TRY, 0)
    assert made.choose() == LOOK_AT
    made.see(came(1.0, TRY - 3, 1), TRY - 3, 1)
    assert made.choose() == LOOK_AT
    made.see(came(1.0, 3, 1), 3, 1)
    assert made.choose() == QUARTER


@pytest.mark.parametrize(
    ("share", "expected"), [(0.0, PLAIN), (WORTH, PLAIN), (WORTH + 0.05, QUARTER), (1.0, QUARTER)], ids=str
)
def test_what_was_seen_decides(share: float, expected: Choice) -> None:
    assert looked(share).choose() == expected


@pytest.mark.parametrize(("row_bytes", "expected"), [(64, PLAIN), (ROW_BYTES, QUARTER)])
def test_small_experts_are_not_worth_a_guess(row_bytes: int, expected: Choice) -> None:
    """Though all of them are of use: guessing takes as long as `GUESS_BYTES` take over the link."""
    assert (MOST * row_bytes < GUESS_BYTES) == (expected == PLAIN)
    assert looked(1.0, row_bytes=row_bytes).choose() == expected


def test_where_next_to_nothing_is_missing_steps_are_plain() -> None:
    made = begun()
    made.see(came(1.0, TRY // 4, 1), TRY, 1)  # a quarter of the guesses brought anything
    assert made.choose() == QUARTER
    made = begun()
    made.see(PrefetchStats(), TRY, 1)
    assert made.choose() == PLAIN


def test_where_next_to_nothing_comes_in_time_steps_are_plain() -> None:
    """As much of use would pay, were there time for it."""
    made = looked(0.6)
    for rows in (QUARTER.number, QUARTER.number // 2):
        assert made.choose() == Choice(rows, TRY)
        made.see(came(0.6, TRY, rows, late_share=0.9), TRY, rows)
    assert made.choose() == PLAIN


def plain_steps_until_a_look(made: Budget) -> int:
    for count in range(LOOK_AGAIN + 1):
        if made.choose() != PLAIN:
            return count
        made.see(PrefetchStats(), 1, 0)
    raise AssertionError("no look")


def test_it_ends_when_guesses_get_worse() -> None:
    made, rows = looked(1.0), QUARTER.number
    for expected in (QUARTER, PLAIN):
        made.see(came(0.0, HALF_LIFE, rows), HALF_LIFE, rows)
        assert made.choose() == expected


@pytest.mark.parametrize(("num_more", "expected"), [(0, 1024), (3 * LOOK, 256), (7 * LOOK, 128), (15 * LOOK, 64)])
def test_it_looks_again_the_sooner_the_longer_guesses_had_paid(num_more: int, expected: int) -> None:
    made, rows = begun(), QUARTER.number
    made.see(came(1.0 if num_more else 0.0, LOOK, 1), LOOK, 1)
    num_bad = min(num_more, 3 * HALF_LIFE)
    for share, num_steps in ((1.0, num_more - num_bad), (0.0, num_bad)):
        made.see(came(share, num_steps, rows), num_steps, rows)
    assert plain_steps_until_a_look(made) == expected - TRY, "the plain steps before the look before count"
    assert made.choose() == LOOK_AT


def test_after_guesses_that_paid_a_look_in_vain_is_not_soon_followed_by_another() -> None:
    made, rows = looked(1.0), QUARTER.number
    made.see(came(1.0, 1000, rows), 1000, rows)
    made.see(came(0.0, 5 * HALF_LIFE, rows), 5 * HALF_LIFE, rows)
    assert plain_steps_until_a_look(made) <= TRY
    made.see(PrefetchStats(), TRY, 0)
    made.see(came(0.0, LOOK, 1), LOOK, 1)
    assert plain_steps_until_a_look(made) == LOOK_AGAIN - TRY


def test_calls_are_short_until_it_has_settled() -> None:
    made, rows = looked(1.0), QUARTER.number
    made.see(came(1.0, SETTLED - TRY - 1, rows), SETTLED - TRY - 1, rows)
    assert made.choose().num_steps == TRY
    made.see(came(1.0, 1, rows), 1, rows)
    assert made.choose() == Choice(MOST)


def test_a_call_of_no_step_tells_nothing() -> None:
    made = looked(1.0)
    made.see(PrefetchStats(), 0, QUARTER.number)
    assert made.choose() == QUARTER


def run(made: Budget, in_time: float, num_calls: int) -> list[int]:
    """The rows that come where so many come in time."""
    chosen = []
    for _ in range(num_calls):
        chosen.append(made.choose().number)
        late_share = max(0.0, 1 - in_time / chosen[-1])
        made.see(came(0.9, TRY, chosen[-1], late_share=late_share), TRY, chosen[-1])
    return chosen


@pytest.mark.parametrize("share", [0.11, 0.23, 0.57, 0.77])
def test_it_brings_what_comes_in_time_and_a_little_more(share: float) -> None:
    in_time, made = share * MOST, looked(0.9)
    chosen = run(made, in_time, 8)
    assert chosen[0] == QUARTER.number
    assert all(before / 2 <= after <= 2 * before for before, after in itertools.pairwise(chosen))
    part = ROWS_OF_EXPERT // PARTS
    assert all(in_time < rows <= ROOM * in_time + part for rows in chosen[4:])
    assert all(rows % part == 0 for rows in chosen)


def test_it_finds_more_time_when_there_is_more() -> None:
    made = looked(0.9)
    assert run(made, 0.06 * MOST, 8)[-1] < 0.1 * MOST
    assert run(made, 0.7 * MOST, 8)[-1] > 0.7 * MOST
    assert run(made, 2.0 * MOST, 8)[-1] == MOST


def test_what_an_older_amount_brought_does_not_count_twice() -> None:
    """The next call is on its way before this one's are counted."""
    made, rows = looked(0.9), QUARTER.number
    for _ in range(2):
        made.see(came(0.9, TRY, rows, late_share=0.9), TRY, rows)
    assert made.choose() == Choice(rows // 2, TRY)


def test_without_a_clock_the_whole_amount_comes() -> None:
    made = looked(0.9)
    made.see(came(0.9, TRY, QUARTER.number), TRY, QUARTER.number)
    assert made.choose() == Choice(MOST, TRY)


def test_what_pays_is_known_by_how_many_decode_together() -> None:
    """In powers of two: 3 are as 4, and nothing is known of 2."""
    made = Prefetching(SMALL, RuntimeConfig(prefetch="lookahead"))
    made.learn(4, 0, TRY, PrefetchStats())
    made.learn(4, 1, TRY, PrefetchStats(wasted_bytes=1000))
    assert made.choose(3) == PLAIN
    assert made.choose(2) == made.choose(1) == made.choose(5) == Choice(0, TRY)


@pytest.mark.parametrize(
    ("kernels", "runtime", "expected"),
    [
        ("mosaic_gpu", {}, "lookahead"),
        ("mosaic_gpu", {"prefetch_experts": 0.03}, "off"),
        ("mosaic_gpu", {"draft": "auto"}, "off"),
        ("mosaic_gpu", {"prefetch": "off"}, "off"),
        ("reference", {}, "off"),
        ("reference", {"prefetch": "both"}, "both"),
    ],
)
def test_it_is_automatic_where_kernels_run(kernels: str, runtime: dict, expected: str, monkeypatch) -> None:
    """With experts of 9.4 MB, of which 0.03 come while something is guessed."""
    monkeypatch.setattr(api, "resolve", lambda implementation: kernels)
    assert settled(ModelConfig.from_toml(CONFIGS / "qwen3-30b-a3b.toml"), RuntimeConfig(**runtime)).prefetch == expected


def test_of_itself_it_brings_nothing_that_comes_while_it_is_guessed(monkeypatch) -> None:
    """The budget would refuse it at any saving, after a second step was compiled for it."""
    monkeypatch.setattr(api, "resolve", lambda implementation: "mosaic_gpu")
    runtime = settled(SMALL, RuntimeConfig(prefetch_experts=2))
    assert runtime.prefetch == "off"
    assert prefetching_line(SMALL, runtime, models.engine(expert_slots=4).plan) == (
        "prefetch: none, chosen automatically: 12.00 KiB, the most for a layer, come in less time than a guess takes"
    )


@pytest.mark.parametrize(
    ("runtime", "said"),
    [
        ({}, ["prefetch: none, chosen automatically: without kernels nothing comes beside other work"]),
        ({"draft": 2}, ["prefetch: none, chosen automatically: tokens are drafted"]),
        ({"prefetch": "off"}, []),
    ],
    ids=str,
)
def test_an_engine_without_kernels_prefetches_nothing_of_itself_and_says_so(runtime: dict, said: list[str]) -> None:
    lines: list[str] = []
    options = RuntimeConfig(**{"expert_slots": 4, "max_seq_len": 64, "measure_link": False, **runtime})
    made = Engine.start(SMALL, options, lambda: models.weights(SMALL), announce=lines.append)
    assert (made.runtime.prefetch, made.prefetching, made.plan.prefetch_bytes) == ("off", None, 0)
    assert [line for line in lines if line.startswith("prefetch")] == said


NEW = 55  # tokens, of which prefill makes one


def ran(**runtime) -> Generation:
    made = models.engine(SMALL, prefill_chunk=16, decode_chunk=32, expert_slots=SMALL.num_experts_per_tok, **runtime)
    generation = made.generate(models.prompts(9), [SamplingParams(max_new_tokens=NEW, temperature=2.0)])
    generation.results()
    return generation


def test_where_each_call_waits_for_the_one_before_calls_are_as_long_as_any() -> None:
    """So the first look is all of the second call."""
    came = ran(profiled=True, prefetch="lookahead", prefetch_experts=0.5).stats.prefetch
    assert came is not None
    assert [*came.steps.values()] == [32, NEW - 1 - 32]


@pytest.mark.parametrize(
    ("guess_bytes", "steps"),
    [(1, [TRY, 2 * TRY, 2 * TRY, NEW - 1 - 5 * TRY]), (10**9, [NEW - 1 - 2 * TRY, 2 * TRY, 0, 0])],
    ids=["cheap", "dear"],
)
def test_an_engine_looks_and_then_brings_more_or_nothing(guess_bytes: int, steps: list[int], monkeypatch) -> None:
    """A call of plain steps; then two each, since what is learned of one decides after the next: looks, an eighth, a
    half.

    The tokens, hits and misses are those without a prefetch.
    """
    monkeypatch.setattr(prefetch_budget, "GUESS_BYTES", guess_bytes)
    monkeypatch.setattr(prefetch_budget, "WASTE", 0.0)
    plain, ahead = ran(), ran(prefetch="lookahead", prefetch_experts=0.5)
    assert [each.token_ids for each in ahead.completions] == [each.token_ids for each in plain.completions]
    assert ahead.stats.decode == plain.stats.decode
    came = ahead.stats.prefetch
    assert came is not None
    row = round(1 / (3 * SMALL.moe_intermediate_size), 4)
    assert came.steps == {amount: count for amount, count in zip((0, row, 0.125, 0.5), steps, strict=True) if count}
    assert came.prefetched_bytes > 0
