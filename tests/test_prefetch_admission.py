"""A fixed amount comes early only while the guesses are right."""

import pytest

from jmoe.config import RuntimeConfig
from jmoe.decoding.contest import Choice
from jmoe.prefetch_stats import PrefetchStats
from jmoe.prefetching import LOOK, WORTH, Prefetching
from tests.models import SMALL

ROWS = 3 * SMALL.moe_intermediate_size // 2
AMOUNT, ONE_ROW = Choice(ROWS), Choice(1)


def prefetching() -> Prefetching:
    return Prefetching(SMALL, RuntimeConfig(prefetch="lookahead", prefetch_experts=0.5))


def came(useful_share: float) -> PrefetchStats:
    useful = round(1000 * useful_share)
    return PrefetchStats(useful_bytes=useful, wasted_bytes=1000 - useful)


def test_it_looks_before_anything_comes() -> None:
    made = prefetching()
    assert made.choose(1) == Choice(1, LOOK)
    made.see(came(1.0), LOOK - 3)
    assert made.choose(1) == Choice(1, 3)
    made.see(came(1.0), 3)
    assert made.choose(1) == AMOUNT


@pytest.mark.parametrize(("share", "expected"), [(0.0, ONE_ROW), (WORTH - 0.01, ONE_ROW), (WORTH, AMOUNT), (1, AMOUNT)])
def test_what_was_seen_decides(share: float, expected: Choice) -> None:
    made = prefetching()
    made.see(came(share), LOOK)
    assert made.choose(1) == expected


def test_it_follows_guesses_that_get_worse_and_better() -> None:
    made = prefetching()
    made.see(came(0.9), LOOK)
    for share, expected in ((0.0, AMOUNT), (0.0, ONE_ROW), (0.0, ONE_ROW), (1.0, AMOUNT)):
        made.see(came(share), LOOK * 2 // 3)
        assert made.choose(1) == expected


def test_steps_that_guess_nothing_tell_nothing() -> None:
    made = prefetching()
    made.see(PrefetchStats(), LOOK)
    assert made.choose(1) == ONE_ROW  # nothing is known
    made.see(came(0.8), 1)
    made.see(PrefetchStats(), 100 * LOOK)
    assert made.choose(1) == AMOUNT


def test_an_amount_that_is_chosen_by_time_is_left_to_that() -> None:
    made = Prefetching(SMALL, RuntimeConfig(prefetch="auto"))
    made.see(came(0.0), LOOK)
    assert made.choose(1) == Choice(0)
