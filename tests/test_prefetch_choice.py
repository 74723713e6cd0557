"""The choice of how much to prefetch, against made-up costs: what it finds, and what finding it may cost."""

import random

import pytest

from jmoe.decoding.contest import SHARE, Chooser
from jmoe.decoding.prefetch_choice import PROOF, prefetch_chooser
from jmoe.stats import DecodeCalls, ExpertCounts

ROWS = 2304  # of an expert
AMOUNTS = (0, ROWS // 4, ROWS // 2, ROWS)


class World:
    """A machine on which a plain step takes a second, and one with a prefetch `step_s`, by its rows."""

    def __init__(self, step_s: dict[int, float], noise: float, batch: int = 1, seed: int = 0):
        self.step_s, self.noise, self.batch = {0: 1.0, **step_s}, noise, batch
        self.random = random.Random(seed)
        self.seconds, self.steps = 0.0, dict.fromkeys(AMOUNTS, 0)

    def decode(self, chooser: Chooser, num_steps: int) -> "World":
        end = sum(self.steps.values()) + num_steps
        while (left := end - sum(self.steps.values())) > 0:
            choice = chooser.choose(self.batch)
            count = min(choice.num_steps or 32, 32, left)
            seconds = sum(self.step_s[choice.number] * self.random.gauss(1, self.noise) for _ in range(count))
            self.seconds += seconds
            self.steps[choice.number] += count
            chooser.record(self.batch, choice.number, self.call(count, seconds))
        return self

    def call(self, count: int, seconds: float) -> DecodeCalls:
        return DecodeCalls(
            num_draft_tokens=0,
            num_steps=count,
            seconds=seconds,
            num_tokens=count * self.batch,
            num_verifications=count * self.batch,
            experts=ExpertCounts(hits=50, fetched=50, streamed=0),
        )


def costs(quarter: float, half: float, whole: float) -> dict[int, float]:
    return dict(zip(AMOUNTS[1:], (quarter, half, whole), strict=True))


def test_the_amounts() -> None:
    assert prefetch_chooser(ROWS).numbers == AMOUNTS
    assert prefetch_chooser(3).numbers == (0, 1, 2, 3)
    assert prefetch_chooser(1).numbers == (0, 1)


@pytest.mark.parametrize("noise", [0.0, 0.1, 0.2])
@pytest.mark.parametrize("steps", [costs(1.03, 1.05, 1.15), costs(1.0, 1.0, 1.0), costs(1.3, 1.6, 2.0)])
def test_where_it_loses_it_costs_a_percent(steps: dict[int, float], noise: float) -> None:
    """Beside one try that cost more than was expected of it, and the noise of the sum."""
    for seed in range(5):
        num_steps = 3000
        world = World(steps, noise, seed=seed).decode(prefetch_chooser(ROWS), num_steps)
        last = PROOF * max(0.0, max(steps.values()) - 1.05)
        spread = 3 * noise * num_steps**0.5
        assert world.seconds <= (1 + SHARE) * num_steps + last + spread


@pytest.mark.parametrize("noise", [0.0, 0.1])
@pytest.mark.parametrize("steps", [costs(0.95, 0.9, 1.1), costs(0.97, 0.94, 0.88), costs(0.9, 1.2, 1.3)])
def test_where_it_gains_it_finds_most_of_it(steps: dict[int, float], noise: float) -> None:
    for batch in (1, 8):
        num_steps, best = 8000, min(steps.values())
        world = World(steps, noise, batch=batch).decode(prefetch_chooser(ROWS), num_steps)
        gained = 1 - world.seconds / num_steps
        assert gained > 0.55 * (1 - best)


def test_what_it_learned_is_there_for_the_next_generation() -> None:
    chooser = prefetch_chooser(ROWS)
    World(costs(0.95, 0.85, 1.1), 0.05).decode(chooser, 4000)
    again = World(costs(0.95, 0.85, 1.1), 0.05, seed=1).decode(chooser, 500)
    assert again.steps[0] < 100
    assert again.seconds < 0.9 * 500
