"""The choice of how many tokens to draft, against made-up costs: what it finds, and what finding it may cost."""

import dataclasses
import math
import random
import statistics

import pytest

from jmoe.decoding.contest import CALLS_OF_PROOF, CHANGE_S, LEAST_PROOF, REVIEWS, SHARE, Choice, Chooser
from jmoe.decoding.draft_choice import PROOF, acceptance_of, draft_chooser
from jmoe.stats import DecodeCalls, ExpertCounts

CHUNK = 6  # cycles of a call; 32 plain steps


@dataclasses.dataclass
class World:
    """A machine on which a plain step takes a second, the rest of its times, and the probability `accepts`."""

    token_s: float  # of a drafted token
    verify_s: float  # that each drafted token adds to a verification
    accepts: float
    batch: int = 1
    noise: float = 0.05
    hit_rate: float = 0.5
    seed: int = 0
    switch_s: float = 0.0  # that a call takes longer which goes by another number than the one before
    scale: float = 1.0  # of all times but the last

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.seconds, self.tokens, self.steps, self.last = 0.0, 0, dict[int, int](), 0

    def decode(self, chooser: Chooser, num_tokens: int) -> "World":
        """So many tokens for each sequence."""
        end = self.tokens + num_tokens * self.batch
        while self.tokens < end:
            choice = chooser.choose(self.batch)
            most = CHUNK if choice.number else 32
            call = self.call(choice.number, min(choice.num_steps or most, most))
            chooser.record(self.batch, choice.number, call)
        return self

    def call(self, number: int, count: int) -> DecodeCalls:
        before = self.seconds, self.tokens
        self.seconds += self.switch_s * (number != self.last)
        self.last = number
        for _ in range(count):
            self.seconds += self.cycle_s(number) * (1 + self.random.gauss(0, self.noise))
            self.tokens += sum(self._accepted(number) for _ in range(self.batch))
        self.steps[number] = self.steps.get(number, 0) + count
        hits = round(100 * self.hit_rate)
        return DecodeCalls(
            num_draft_tokens=number,
            num_steps=count,
            seconds=self.seconds - before[0],
            num_tokens=self.tokens - before[1],
            num_verifications=count * self.batch,
            experts=ExpertCounts(hits=hits, fetched=100 - hits, streamed=0),
        )

    def cycle_s(self, number: int) -> float:
        return self.scale * (1 + number * (self.token_s + self.verify_s))

    def _accepted(self, number: int) -> int:
        return 1 + next((n for n in range(number) if self.random.random() >= self.accepts), number)

    @property
    def plain_s(self) -> float:
        """What plain steps take for the same tokens."""
        return self.scale * self.tokens / self.batch

    def best_s(self, numbers: tuple[int, ...]) -> float:
        """What the best of the numbers takes for the same tokens."""
        pace = (self.cycle_s(n) / sum(self.accepts**k for k in range(n + 1)) for n in numbers)
        return min(pace) * self.tokens / self.batch


@dataclasses.dataclass
class Settling(World):
    """A text that comes to repeat itself: plain steps take `first` seconds at first and one in the end."""

    first: float = 10.0
    tokens_to_settle: float = 100.0

    def step_s(self, token: float) -> float:
        return 1 + (self.first - 1) * math.exp(-token / self.tokens_to_settle)

    def cycle_s(self, number: int) -> float:
        step_s = self.step_s(self.tokens / self.batch)
        self.hit_rate = 1 - step_s / 25
        return step_s + number * (self.token_s + self.verify_s)

    @property
    def plain_s(self) -> float:
        return sum(self.step_s(token) for token in range(self.tokens // self.batch))


def test_the_numbers_end_with_the_most() -> None:
    assert [draft_chooser(most).numbers for most in (1, 2, 4, 6)] == [(0, 1), (0, 1, 2), (0, 1, 2, 4), (0, 1, 2, 4, 6)]
    with pytest.raises(ValueError, match="draft tokens=0 must be at least 1"):
        draft_chooser(0)


@pytest.mark.parametrize("batch", [1, 8, 64])
@pytest.mark.parametrize("num_tokens", [128, 512, 4096])
@pytest.mark.parametrize(("token_s", "verify_s", "accepts"), [(0.6, 0.4, 0.3), (1.0, 1.0, 0.0), (0.3, 0.2, 0.4)])
def test_where_drafts_lose_it_costs_a_percent(batch, num_tokens, token_s, verify_s, accepts) -> None:
    for seed in range(3):
        world = World(token_s, verify_s, accepts, batch, seed=seed).decode(chooser := draft_chooser(4), num_tokens)
        lost = chooser.contest(batch).lost_s
        last = (1 + LEAST_PROOF) * (token_s + verify_s) * 4 * 1.3  # one try that cost more than was expected
        assert lost <= SHARE * world.seconds + last
        assert world.seconds <= (1 + SHARE) * world.plain_s + last + 0.01 * world.plain_s  # noise of the sum
        assert world.steps[0] >= 0.6 * num_tokens


@pytest.mark.parametrize(("num_tokens", "most"), [(256, 1.024), (512, 1.012), (4096, 1.012)])
@pytest.mark.parametrize("batch", [1, 8, 64])
@pytest.mark.parametrize(("token_s", "verify_s", "accepts"), [(0.6, 0.4, 0.3), (1.0, 1.0, 0.0), (0.3, 0.2, 0.4)])
def test_how_much_longer_losing_drafts_make_it(batch, num_tokens, most, token_s, verify_s, accepts) -> None:
    """Where nothing is noise."""
    for seed in range(4):
        world = World(token_s, verify_s, accepts, batch, noise=0.0, seed=seed).decode(draft_chooser(4), num_tokens)
        assert world.seconds <= most * world.plain_s


@pytest.mark.parametrize("plain_s", [9.7e-3, 5e-3])
def test_times_like_those_of_a_gpu(plain_s: float) -> None:
    """A plain step of some ms, and 10 ms to change over; as many tokens as plain steps decode in six seconds."""
    gains, losses = [], []
    for seed in range(12):
        times = {"scale": plain_s, "switch_s": 0.01, "seed": seed}
        for accepts, ratios in ((0.85, gains), (0.2, losses)):
            world = World(0.3, 0.3, accepts, **times).decode(draft_chooser(4), round(6 / plain_s))
            ratios.append(world.seconds / world.plain_s)
    assert statistics.mean(gains) < 0.98
    assert max(losses) < 1.015


@pytest.mark.parametrize("switch_s", [3.0, 20.0])
@pytest.mark.parametrize("num_tokens", [1024, 4096])
def test_what_it_takes_to_change_over_is_a_part_of_what_a_try_loses(num_tokens: int, switch_s: float) -> None:
    for seed in range(3):
        world = World(0.6, 0.4, 0.3, switch_s=switch_s, seed=seed).decode(chooser := draft_chooser(4), num_tokens)
        first = 2 * switch_s + (1 + LEAST_PROOF) * 4 * 1.3  # what nobody could know
        assert world.seconds <= (1 + SHARE) * world.plain_s + first + 0.01 * world.plain_s
        assert chooser.contest(1).lost_s >= 2 * switch_s * 0.7
        assert chooser.contest(1).best == 0


@pytest.mark.parametrize(("switch_s", "most"), [(1.0, 1.15), (3.0, 1.3), (10.0, 1.6)])
def test_drafts_that_gain_are_found_whatever_it_takes_to_change_over(switch_s: float, most: float) -> None:
    """A try of a few cycles takes longer than plain steps for that alone."""
    times = []
    for seed in range(8):
        world = World(0.1, 0.1, 0.85, switch_s=switch_s, seed=seed).decode(chooser := draft_chooser(4), 8192)
        assert chooser.contest(1).best > 0
        times.append(world.seconds / world.best_s(chooser.numbers))
    assert statistics.mean(times) < most  # plain steps take 2.06 times as long as the best


def test_changing_over_says_nothing_of_a_pace() -> None:
    chooser, world = draft_chooser(1), World(1.0, 0.0, 0.5, noise=0.0, switch_s=8.0)
    contest = chooser.contest(1)
    for number, count in ((0, 32), (1, 1), (1, 4), (0, 32)):
        chooser.record(1, number, world.call(number, count))
    assert (contest._paces[0].cycle_s, contest._paces[1].cycle_s) == (1, 2)
    assert 8 + 8 <= contest.lost_s <= 8 + 8 + 5  # there, drafting in vain, and back
    assert contest._change_s == pytest.approx(16, abs=1)
    lost_s = contest.lost_s
    chooser.record(1, 0, world.call(0, 32))
    assert contest.lost_s == lost_s


@pytest.mark.parametrize("batch", [1, 8, 64])
@pytest.mark.parametrize(("token_s", "verify_s", "accepts"), [(0.05, 0.02, 0.5), (0.02, 0.0, 0.9), (0.3, 0.05, 0.7)])
def test_where_drafts_gain_it_finds_them(batch, token_s, verify_s, accepts) -> None:
    world = World(token_s, verify_s, accepts, batch).decode(chooser := draft_chooser(4), 4096)
    assert world.seconds < 0.98 * world.plain_s
    assert world.seconds < 1.15 * world.best_s(chooser.numbers)


def test_what_it_learned_is_there_for_the_next_generation() -> None:
    chooser = draft_chooser(4)
    World(0.02, 0.0, 0.9).decode(chooser, 2048)
    again = World(0.02, 0.0, 0.9, seed=1).decode(chooser, 256)
    assert again.seconds < 1.15 * again.best_s(chooser.numbers)
    assert again.steps.get(0, 0) < 40


def test_each_number_of_sequences_is_its_own_contest() -> None:
    chooser = draft_chooser(4)
    World(0.02, 0.0, 0.9, batch=1).decode(chooser, 2048)
    World(0.8, 0.8, 0.1, batch=64).decode(chooser, 512)
    assert chooser.contest(1).best > 0
    assert chooser.contest(64).best == 0
    assert chooser.contest(48) is chooser.contest(64)
    assert chooser.contest(2) is not chooser.contest(1)
    assert chooser.choose(5) == Choice(0), "of which nothing is known: plain steps"


def test_the_first_try_waits_until_it_can_be_paid() -> None:
    chooser, world = draft_chooser(4), World(0.5, 0.5, 0.0, noise=0.0)
    while (choice := chooser.choose(1)).number == 0:
        chooser.record(1, 0, world.call(0, 1))
    expected = (LEAST_PROOF * 0.5 + CHANGE_S) / SHARE  # a drafted token is expected to cost half a step
    assert world.steps[0] == pytest.approx(expected, abs=1)
    assert choice == Choice(1, 1)
    chooser.record(1, 1, world.call(1, 1))
    assert chooser.choose(1) == Choice(1, LEAST_PROOF)
    chooser.record(1, 1, world.call(1, LEAST_PROOF))
    assert chooser.contest(1).lost_s == pytest.approx(1 + LEAST_PROOF)
    for _ in range(95):  # what it cost more than expected is paid back by waiting
        assert chooser.choose(1) == Choice(0)
        chooser.record(1, 0, world.call(0, 1))


def test_what_lost_waits_twice_as_long_each_time() -> None:
    world = World(0.6, 0.6, 0.1, noise=0.0)
    chooser, tries = draft_chooser(1), []
    for _ in range(20_000):
        choice = chooser.choose(1)
        if choice.number:
            tries.append(world.seconds)
        chooser.record(1, choice.number, world.call(choice.number, 1))
    begins = [later for before, later in zip([0.0, *tries], tries, strict=False) if later > 1.5 * before]
    assert 3 <= len(begins) <= 12
    assert world.steps[1] < 0.006 * 20_000


def test_another_hit_rate_is_another_time() -> None:
    """Drafts that lost while experts were few win when they are many: long before the waiting would have ended."""
    chooser = draft_chooser(4)
    World(0.9, 0.5, 0.1, hit_rate=0.2).decode(chooser, 3000)
    assert chooser.contest(1).best == 0
    later = World(0.05, 0.02, 0.6, hit_rate=0.8, seed=1).decode(chooser, 1500)
    assert chooser.contest(1).best > 0
    assert later.seconds < 0.85 * later.plain_s


def test_a_best_that_fell_behind_gives_way_to_plain_steps() -> None:
    chooser = draft_chooser(2)
    World(0.05, 0.02, 0.6).decode(chooser, 2000)
    assert chooser.contest(1).best > 0
    worse = World(0.9, 0.6, 0.2, seed=1).decode(chooser, 2000)
    assert chooser.contest(1).best == 0
    assert worse.seconds < 1.05 * worse.plain_s


@pytest.mark.parametrize(("first", "tokens_to_settle"), [(10.0, 100.0), (10.0, 300.0), (4.0, 150.0), (4.0, 30.0)])
@pytest.mark.parametrize("accepts", [0.5, 1.0])
def test_what_drafts_gained_while_steps_were_long_does_not_outlast_that(accepts, first, tokens_to_settle) -> None:
    for seed in range(5):
        settling = {"first": first, "tokens_to_settle": tokens_to_settle, "seed": seed}
        world = Settling(1.3, 0.2, accepts, **settling).decode(chooser := draft_chooser(8), 900)
        assert world.seconds < 1.02 * world.plain_s
        late = Settling(1.3, 0.2, accepts, first=1.0, seed=seed).decode(chooser, 400)
        assert chooser.contest(1).best == 0
        until_reviewed = PROOF / CALLS_OF_PROOF / REVIEWS  # plain steps
        assert late.seconds < 1.02 * late.plain_s + 0.5 * until_reviewed


def test_plain_steps_are_measured_again_while_another_is_the_best() -> None:
    """At once, then ever more rarely: in the end they take `REVIEWS` of the time."""
    chooser = draft_chooser(1)
    World(0.02, 0.0, 0.9).decode(chooser, 20_000)
    assert chooser.contest(1).best == 1
    world = World(0.02, 0.0, 0.9, seed=1).decode(chooser, 20_000)
    assert world.steps[0] == pytest.approx(REVIEWS * world.seconds, rel=0.2)


def test_luck_is_no_proof() -> None:
    """A few verified sequences that accepted everything make nothing the best."""
    chooser, world = draft_chooser(1), World(0.02, 0.02, 1.0, noise=0.0)
    chooser.record(1, 0, world.call(0, 200))
    assert chooser.choose(1) == Choice(1, 1), "to change over"
    chooser.record(1, 1, world.call(1, 1))
    proved = 0
    while chooser.contest(1).best == 0:
        choice = chooser.choose(1)
        assert choice.number == 1, "what gains so far is tried on"
        chooser.record(1, 1, world.call(1, 1))
        proved += 1
    assert proved == PROOF


@pytest.mark.parametrize(("accepts", "number"), [(0.0, 2), (0.3, 1), (0.5, 4), (0.95, 3)])
def test_acceptance_is_what_yields_so_many_tokens(accepts: float, number: int) -> None:
    assert acceptance_of(sum(accepts**n for n in range(number + 1)), number) == pytest.approx(accepts, abs=1e-6)
