"""A fixed amount comes early only while the guesses are right."""

import pytest

from jmoe.config import RuntimeConfig
from jmoe.decoding.contest import Choice
from jmoe.decoding.sampling import SamplingParams
from jmoe.generation import Generation
from jmoe.prefetch_stats import PrefetchStats
from jmoe.prefetching import HALF_LIFE, LOOK, LOOK_AGAIN, WORTH, Prefetching
from tests import models
from tests.models import SMALL

ROWS = 3 * SMALL.moe_intermediate_size // 2
AMOUNT, PLAIN = Choice(ROWS), Choice(0)


def prefetching() -> Prefetching:
    return Prefetching(SMALL, RuntimeConfig(prefetch="lookahead", prefetch_experts=0.5))


def came(useful_share: float) -> PrefetchStats:
    useful = round(1000 * useful_share)
    return PrefetchStats(useful_bytes=useful, wasted_bytes=1000 - useful)


def test_it_looks_before_anything_comes() -> None:
    made = prefetching()
    assert made.choose(1) == Choice(1, LOOK)
    made.see(came(1.0), LOOK - 3, 1)
    assert made.choose(1) == Choice(1, 3)
    made.see(came(1.0), 3, 1)
    assert made.choose(1) == AMOUNT


@pytest.mark.parametrize(("share", "expected"), [(0.0, PLAIN), (WORTH - 0.01, PLAIN), (WORTH, AMOUNT), (1, AMOUNT)])
def test_what_was_seen_decides(share: float, expected: Choice) -> None:
    made = prefetching()
    made.see(came(share), LOOK, 1)
    assert made.choose(1) == expected


def test_it_ends_when_guesses_get_worse_and_looks_again_much_later() -> None:
    made = prefetching()
    made.see(came(0.9), LOOK, 1)
    for expected in (AMOUNT, PLAIN):
        made.see(came(0.0), HALF_LIFE * 2 // 3, ROWS)
        assert made.choose(1) == expected
    made.see(PrefetchStats(), LOOK_AGAIN - 1, 0)
    assert made.choose(1) == PLAIN
    made.see(PrefetchStats(), 1, 0)
    assert made.choose(1) == Choice(1, LOOK)
    made.see(came(1.0), LOOK, 1)
    assert made.choose(1) == AMOUNT


def test_steps_that_guess_nothing_tell_nothing() -> None:
    made = prefetching()
    made.see(came(0.8), LOOK, 1)
    made.see(PrefetchStats(), 100 * LOOK, ROWS)
    assert made.choose(1) == AMOUNT


def test_where_nothing_is_ever_missing_steps_are_plain() -> None:
    made = prefetching()
    made.see(PrefetchStats(), LOOK, 1)
    assert made.choose(1) == PLAIN


def test_an_amount_that_is_chosen_by_time_is_left_to_that() -> None:
    made = Prefetching(SMALL, RuntimeConfig(prefetch="auto"))
    made.see(came(0.0), LOOK, 1)
    assert made.choose(1) == Choice(0)


def ran(**runtime) -> Generation:
    made = models.engine(SMALL, prefill_chunk=16, decode_chunk=6, expert_slots=SMALL.num_experts_per_tok, **runtime)
    generation = made.generate(models.prompts(9), [SamplingParams(max_new_tokens=25, temperature=2.0)])
    generation.results()
    return generation


@pytest.mark.parametrize(("worth", "then"), [(0.0, 0.5), (1.1, 0.0)], ids=["right", "wrong"])
def test_an_engine_looks_and_then_brings_all_or_nothing(worth: float, then: float, monkeypatch) -> None:
    """The tokens, hits and misses are those without a prefetch."""
    monkeypatch.setattr("jmoe.prefetching.WORTH", worth)
    plain, ahead = ran(), ran(prefetch="lookahead", prefetch_experts=0.5)
    assert [each.token_ids for each in ahead.completions] == [each.token_ids for each in plain.completions]
    assert ahead.stats.decode == plain.stats.decode
    came = ahead.stats.prefetch
    assert came is not None
    assert came.steps == {round(1 / (2 * ROWS), 4): LOOK, then: 24 - LOOK}
    assert came.prefetched_bytes > 0
