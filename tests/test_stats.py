"""What a generation's figures mean, by hand."""

import dataclasses
import json

import jax.numpy as jnp
import pytest

from jmoe.experts.look_ahead import Prefetched
from jmoe.experts.residency import Counters, init_residency
from jmoe.prefetch_stats import PrefetchStats
from jmoe.stats import DecodeCalls, DraftStats, ExpertCounts, GenerationStats, read_counts
from tests.models import SMALL


def counts(hits: int = 0, fetched: int = 0, streamed: int = 0) -> ExpertCounts:
    return ExpertCounts(hits=hits, fetched=fetched, streamed=streamed)


def stats(**changes) -> GenerationStats:
    """20 tokens in 10 steps (a batch of two) and half a second; 60 experts of 5 MB came over the link."""
    values = {
        "num_prompt_tokens": 30,
        "num_generated_tokens": 22,
        "num_decode_tokens": 20,
        "decode_calls": ((4, 0.2), (6, 0.3)),
        "compile_s": 0.0,
        "ttft_s": 0.25,
        "prefill": counts(hits=7, streamed=9),
        "decode": counts(hits=140, fetched=50, streamed=10),
        "expert_bytes": 5_000_000,
        "link_ceiling_gbps": 2.4,
        "peak_device_bytes": None,
    }
    return GenerationStats(**{**values, **changes})


NOTHING = stats(num_decode_tokens=0, num_generated_tokens=2, decode_calls=(), decode=counts())


def test_what_is_derived() -> None:
    made = stats()
    assert made.num_decode_steps == 10
    assert made.decode_s == pytest.approx(0.5)
    assert made.tokens_per_s == pytest.approx(40)
    assert made.ms_per_step == pytest.approx(50)
    assert made.hit_rate == 0.7
    assert made.bytes_per_token == pytest.approx(60 * 5e6 / 20)
    assert made.fetched_gbps == pytest.approx(0.6)
    assert made.percent_of_ceiling == pytest.approx(25)


def test_one_token_needs_no_decode() -> None:
    """Nothing is divided by 0, and what was never asked for was never missed."""
    assert (NOTHING.tokens_per_s, NOTHING.ms_per_step, NOTHING.bytes_per_token, NOTHING.fetched_gbps) == (0, 0, 0, 0)
    assert NOTHING.hit_rate == 1
    assert NOTHING.percent_of_ceiling == 0
    assert any("generated 2 tokens" in line for line in NOTHING.lines())


def test_lines_say_it_all() -> None:
    text = "\n".join(stats().lines())
    assert "prompt 30 tokens, time to first token 0.250 s; 7 experts used in place, 9 streamed" in text
    assert "generated 22 tokens, 40.0 tokens/s (50.00 ms a step)" in text
    assert "experts 200 asked for, hit rate 70.0%, 50 fetched, 10 streamed" in text
    assert "fetched 15.00 MB a token, 0.60 GB/s, 25 % of the link ceiling (2.4 GB/s)" in text
    assert "compiled" not in text
    assert "compiled, or loaded, in 3.5 s" in stats(compile_s=3.5).lines()[0]


def test_a_link_that_was_not_measured_is_not_compared_with() -> None:
    made = stats(link_ceiling_gbps=None)
    assert made.percent_of_ceiling is None
    assert "ceiling" not in "\n".join(made.lines())


@pytest.mark.parametrize("made", [stats(), NOTHING, stats(link_ceiling_gbps=None)])
def test_stats_as_json(made: GenerationStats) -> None:
    values = json.loads(json.dumps(made.to_dict()))
    assert values["decode"] == {
        "hits": made.decode.hits,
        "fetched": made.decode.fetched,
        "streamed": made.decode.streamed,
    }
    for name in ("tokens_per_s", "ms_per_step", "hit_rate", "bytes_per_token", "fetched_gbps", "percent_of_ceiling"):
        assert values[name] == getattr(made, name)


# A prefetch: of the 300 MB of missing experts 60 came early, and 40 that nobody asked for

AHEAD = PrefetchStats(useful_bytes=60_000_000, wasted_bytes=40_000_000, late_bytes=10_000_000, steps={0.0: 2, 0.5: 8})


def test_what_came_in_vain_crossed_the_link_too() -> None:
    """What was of use did so once."""
    made = stats(prefetch=AHEAD)
    assert made.link_bytes == 340_000_000
    assert made.bytes_per_token == pytest.approx(17e6)
    assert made.fetched_gbps == pytest.approx(0.68)
    assert (AHEAD.prefetched_bytes, AHEAD.useful_share) == (100_000_000, 0.6)
    assert (PrefetchStats() + AHEAD + AHEAD).useful_bytes == 120_000_000
    assert (AHEAD + PrefetchStats(steps={0.25: 1, 0.5: 3})).steps == {0.0: 2, 0.25: 1, 0.5: 11}
    assert PrefetchStats().useful_share == 0


def test_what_was_late_is_not_known_of_a_sum_if_not_of_its_parts() -> None:
    untimed = dataclasses.replace(AHEAD, late_bytes=None)
    assert (PrefetchStats() + AHEAD + AHEAD).late_bytes == 20_000_000
    assert [(one + other).late_bytes for one, other in ((AHEAD, untimed), (untimed, AHEAD), (untimed, untimed))] == (
        [None] * 3
    )


def test_a_prefetch_in_words_and_as_json() -> None:
    made = stats(prefetch=AHEAD)
    lines = made.lines()
    expected = "of that prefetched 5.00 MB a token: 3.00 useful, of which 0.50 late, 2.00 wasted (60.0% useful); "
    assert expected + "2 plain steps, 8 steps of 0.5 experts a layer" in lines
    assert "3.00 useful, 2.00 wasted" in dataclasses.replace(AHEAD, late_bytes=None).lines(20)[0]
    assert lines[lines.index(AHEAD.lines(20)[0]) - 1].startswith("fetched 17.00 MB a token, 0.68 GB/s")
    values = json.loads(json.dumps(made.to_dict()))
    assert values["link_bytes"] == 340_000_000
    assert values["prefetch"] == {
        "useful_bytes": 60_000_000,
        "wasted_bytes": 40_000_000,
        "late_bytes": 10_000_000,
        "prefetched_bytes": 100_000_000,
        "useful_share": 0.6,
        "steps": {"0.0": 2, "0.5": 8},
    }
    assert stats().to_dict()["prefetch"] is None
    assert not any("prefetch" in line for line in stats().lines())


def test_prefetched_rows_are_summed_over_layers_as_bytes() -> None:
    most = 2**31 - 1
    counts = Prefetched(*(jnp.asarray(rows) for rows in ([most, most], [1, 2], [most, 4], [0, 0])))
    made = PrefetchStats.of_call(counts, 7, 24, SMALL)  # half an expert; rows of 32 float32
    sizes = {"useful_bytes": 2 * most * 128, "wasted_bytes": 3 * 128, "late_bytes": (most + 4) * 128}
    assert made == PrefetchStats(**sizes, steps={0.5: 7})
    untimed = dataclasses.replace(counts, late=jnp.zeros(2, jnp.int32), untimed=jnp.asarray([0, 1]))
    assert PrefetchStats.of_call(untimed, 7, 24, SMALL) == dataclasses.replace(made, late_bytes=None)
    assert PrefetchStats.of_call(None, 7, 0, SMALL) == PrefetchStats(steps={0.0: 7})


def test_counts_are_subtracted_one_by_one() -> None:
    assert counts(9, 7, 5) - counts(1, 2, 3) == counts(8, 5, 2)
    assert (counts(9, 7, 5).misses, counts(3, 1, 0).hit_rate) == (12, 0.75)


def test_counts_are_summed_over_layers() -> None:
    """As Python integers, which do not overflow where 32 bits would."""
    most = 2**31 - 1
    layers = Counters(jnp.asarray([most, most]), jnp.asarray([3, 4]), jnp.asarray([0, 1]))
    assert ExpertCounts.read(layers) == counts(2 * most, 7, 1)
    assert read_counts(init_residency(2, 4, 2)) == (counts(), counts())


# Drafts: 8 plain steps, and 10 cycles of 4 and 2 of 2, each of two sequences

PLAIN = DecodeCalls(
    num_draft_tokens=0, num_steps=8, seconds=0.4, num_tokens=16, num_verifications=16, experts=counts(90, 60, 4)
)
TWO = DecodeCalls(
    num_draft_tokens=2,
    num_steps=2,
    seconds=0.1,
    num_tokens=8,
    num_verifications=4,
    proposed=8,
    accepted=4,
    experts=counts(20, 8, 0),
)
FOUR = DecodeCalls(
    num_draft_tokens=4,
    num_steps=10,
    seconds=0.7,
    num_tokens=48,
    num_verifications=20,
    proposed=72,
    accepted=28,
    experts=counts(160, 40, 12),
)
DRAFTS = DraftStats(calls=(PLAIN, TWO, FOUR), num_layers=5, expert_bytes=5_000_000)


def test_what_is_derived_of_drafts() -> None:
    cycles = DRAFTS.cycles
    assert (DRAFTS.plain.num_steps, cycles.num_steps, cycles.num_tokens, cycles.proposed) == (8, 12, 56, 80)
    assert cycles.acceptance_rate == 32 / 80
    assert cycles.mean_accepted == 56 / 24
    assert cycles.tokens_per_s == pytest.approx(56 / 0.8)
    assert DRAFTS.union_size == 240 / 12 / 5
    assert DRAFTS.bytes_per_token(cycles) == 60 * 5e6 / 56
    assert DRAFTS.bytes_per_token(DRAFTS.plain) == 64 * 5e6 / 16
    assert DRAFTS.steps_by_draft_tokens == {0: 8, 2: 2, 4: 10}


def test_drafts_in_words() -> None:
    text = "\n".join(stats(drafts=DRAFTS).lines())
    assert "drafts: 8 plain steps, 2 cycles of 2, 10 cycles of 4; 32 of 80 tokens accepted (40.0%), 2.33 tokens" in text
    assert "a verification asks for 4.0 experts a layer; cycles fetched 5.36 MB a token, 70.0 tokens/s" in text
    assert "(plain steps 20.00 MB, 40.0 tokens/s)" in text
    alone = "\n".join(dataclasses.replace(DRAFTS, calls=(FOUR,)).lines())
    assert "plain" not in alone
    assert dataclasses.replace(DRAFTS, calls=(PLAIN,)).lines() == ["drafts: 8 plain steps"]


def test_drafts_as_json() -> None:
    values = json.loads(json.dumps(stats(drafts=DRAFTS).to_dict()))["drafts"]
    assert values["steps_by_draft_tokens"] == {"0": 8, "2": 2, "4": 10}
    assert values["mean_accepted"] == 56 / 24
    assert values["plain_bytes_per_token"] == 64 * 5e6 / 16
    assert [calls["num_draft_tokens"] for calls in values["calls"]] == [0, 2, 4]
    never = dataclasses.replace(DRAFTS, calls=(PLAIN,)).to_dict()
    assert never["acceptance_rate"] is never["union_size"] is never["bytes_per_token"] is None
    assert stats().to_dict()["drafts"] is None


def test_calls_of_different_numbers_are_summed_as_cycles() -> None:
    assert (TWO + TWO).num_draft_tokens == 2
    assert (TWO + FOUR).num_draft_tokens == 0
    assert (TWO + FOUR).experts == counts(180, 48, 12)
