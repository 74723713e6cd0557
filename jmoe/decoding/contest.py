"""Ways to decode against each other, decided by measurement: plain steps (0), and others that go by a number.

What counts is the pace: tokens that a sequence gets in a second. The best way known so far decodes; now and then
another is tried, in a call of a few steps. What tries may cost is bounded by their design:

- A try's loss is its time less the time that the best needed for as many tokens. A try is made only while the losses
  so far and the one expected of it stay below `SHARE` of the decode time so far; it goes on while it gains. So all
  tries together lose no more than that share, plus what the last one cost beyond what was expected of it: which is paid
  back by waiting, since losses count as measured. Decoding starts with plain steps, and the first try waits for them.
- To change over takes time of its own: XLA records CUDA graphs anew, and the host waits. So a try, or a review, begins
  with a step or cycle that says nothing of its pace, and ends with a call of the best that says nothing of that one's.
  What both lost counts as the try's, and is expected of the next one; of the first, `CHANGE_S`. (A review's does not:
  it is a part of the gain.)
- A number that lost waits until twice the time has been decoded: tries become rare exponentially. A changed hit rate
  ends the waiting, not the accounting.
- A number becomes the best only after a proof (so many verified sequences), and `MARGIN` better than the last; it gives
  way to plain steps as soon as its own recent pace falls below theirs. What it lost by then counts as a try's.
- Paces change: a text that comes to repeat itself finds its experts resident, and plain steps gain most of that. So a
  pace is that of about the last proof, and while another number is the best, plain steps are reviewed: as soon as it is
  the best, then ever more rarely, until they take `REVIEWS` of the time. That costs a part of the gain, and nothing
  against plain steps.

All of this is kept by how many sequences are decoded together, in powers of two, since what is fastest depends on it.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping

from jmoe.stats import DecodeCalls

SHARE = 0.01  # of the decode time, that may be lost by trying
MARGIN = 1.02
HOPELESS = 0.8  # of the best pace: no need of proof
FIRST_REVIEWS, REVIEWS = 1 / 8, 1 / 32  # of the decode time, that plain steps take while another number is the best
CALLS_OF_PROOF = 4  # calls that make a proof, of a try or a review
LEAST_PROOF = 2  # verified sequences of a call that is measured
CHANGE_S = 0.02  # seconds; 5 to 22 ms were seen
OTHER_HITS = 0.1  # hit rates that differ by so much are of different times


@dataclasses.dataclass(frozen=True)
class Choice:
    """What decodes next; `num_steps` is the most cycles or steps of the next call, None leaves it to the caller."""

    number: int
    num_steps: int | None = None


@dataclasses.dataclass(frozen=True)
class Pace:
    """Sums over calls with the same number, older ones faded; `proof` is not."""

    seconds: float
    cycles: float
    tokens: float
    verifications: float
    hits: float
    asked: float
    proof: int

    @classmethod
    def of(cls, call: DecodeCalls) -> "Pace":
        hits, verifications = call.experts.hits, call.num_verifications
        asked = hits + call.experts.misses
        return cls(call.seconds, call.num_steps, call.num_tokens, verifications, hits, asked, verifications)

    def and_then(self, call: DecodeCalls, half_life: int) -> "Pace":
        """What was weighs half as much after so many cycles."""
        new, kept = Pace.of(call), 0.5 ** (call.num_steps / half_life)
        sums = {
            field.name: kept * getattr(self, field.name) + getattr(new, field.name)
            for field in dataclasses.fields(self)
        }
        return Pace(**{**sums, "proof": self.proof + new.proof})

    @property
    def cycle_s(self) -> float:
        return self.seconds / self.cycles

    @property
    def mean_accepted(self) -> float:
        """Tokens that a verification yields."""
        return self.tokens / self.verifications

    def careful_mean_accepted(self, proof: int) -> float:
        """The same, as if the verifications that are missing to a proof had accepted nothing."""
        missing = max(0, proof - self.proof)
        return (self.tokens + missing) / (self.verifications + missing)

    @property
    def rate(self) -> float:
        """Tokens a sequence a second."""
        return self.mean_accepted / self.cycle_s

    @property
    def hit_rate(self) -> float:
        return self.hits / self.asked if self.asked else 1.0


# Seconds of a cycle, and tokens of a sequence, expected of a number by what is known of it and of others.
Expectation = Callable[[Mapping[int, Pace], int], tuple[float, float]]


class Chooser:
    """Chooses among 0 and other numbers, ascending, and remembers what it measured. See the module's text."""

    def __init__(self, numbers: tuple[int, ...], expected: Expectation, proof: int):
        self.numbers, self._expected, self._proof = numbers, expected, proof
        self._contests: dict[int, Contest] = {}

    def contest(self, num_sequences: int) -> "Contest":
        """What is known about so many sequences together."""
        made = Contest(self.numbers, self._expected, self._proof)
        return self._contests.setdefault((num_sequences - 1).bit_length(), made)

    def choose(self, num_sequences: int) -> Choice:
        """For the next call, of so many sequences."""
        return self.contest(num_sequences).choose(num_sequences)

    def record(self, num_sequences: int, number: int, call: DecodeCalls) -> None:
        """Learns from a call by this number that began with so many sequences."""
        if call.num_steps:
            self.contest(num_sequences).record(number, call)


class Contest:
    """The numbers against each other, for as many sequences together."""

    def __init__(self, numbers: tuple[int, ...], expected: Expectation, proof: int):
        self.numbers, self._expected, self._proof = numbers, expected, proof
        self.best = 0
        self.seconds = 0.0  # decoded so far
        self.lost_s = 0.0  # by trying
        self._paces: dict[int, Pace] = {}
        self._waits_until = dict.fromkeys(numbers, 0.0)  # in decoded seconds
        self._is_over = dict.fromkeys(numbers, True)  # whether the next call of it begins a new try
        self._unreviewed_s = self._unreviewed_tokens = 0.0  # of the best and a sequence, since the last review
        self._review: Pace | None = None  # of plain steps, under way
        self._review_at = 0.0  # in decoded seconds
        self._reviews = FIRST_REVIEWS  # the share of the time
        self._usual_hits = 1.0
        self._last = 0  # the number of the call before
        self._measured: int | None = None  # what the next call is to measure: that before was for changing over
        self._change_s, self._there_s = CHANGE_S, 0.0  # there and back, as last seen; and there, this time

    def choose(self, num_sequences: int) -> Choice:
        if self.best not in self._paces:
            return Choice(self.best)
        if self._measured is not None:
            return Choice(self._measured, self._size(self._measured, num_sequences))
        if self._gains_so_far(self._last):
            return Choice(self._last, self._size(self._last, num_sequences))
        if self.best != 0 and self._review_at <= self.seconds:
            return self._choice(0, num_sequences)
        others = [n for n in self.numbers if n not in (0, self.best) and self._waits_until[n] <= self.seconds]
        for number in sorted(others, key=lambda n: -self._expected_rate(n)):
            if self._is_affordable(number, num_sequences):
                return self._choice(number, num_sequences)
        return Choice(self.best)

    def _gains_so_far(self, number: int) -> bool:
        """Whether a try of it is under way, and was faster than the best: to end it would only be to change over."""
        return not self._is_over[number] and self._paces[number].rate > self._paces[self.best].rate

    def _choice(self, number: int, num_sequences: int) -> Choice:
        """Of a try or review: first one step or cycle, to change over."""
        return Choice(number, 1 if self._changes(number) else self._size(number, num_sequences))

    def _size(self, number: int, num_sequences: int) -> int:
        """Steps or cycles of a call of a try, or a review; a try begins with as few as say anything."""
        is_first = number != 0 and self._is_over[number]
        least = LEAST_PROOF if is_first else max(LEAST_PROOF, self._proof / CALLS_OF_PROOF)
        return math.ceil(least / num_sequences)

    def _changes(self, number: int) -> bool:
        """Whether the next call would run another program: plain steps are one, and all other numbers one together."""
        return (number == 0) != (self._last == 0)

    def record(self, number: int, call: DecodeCalls) -> None:
        self.seconds += call.seconds
        changes, self._last, self._measured = self._changes(number), number, None
        if changes and self.best in self._paces:
            self._record_change(number, call)
        elif number == self.best:
            self._record_best(call)
        elif number == 0:
            self._record_review(call)
        else:
            self._record_try(number, call)
        if abs(self._paces[self.best].hit_rate - self._usual_hits) > OTHER_HITS:
            self._usual_hits = self._paces[self.best].hit_rate
            self._waits_until = dict.fromkeys(self.numbers, 0.0)

    def _record_change(self, number: int, call: DecodeCalls) -> None:
        """The first call of another program than that before: there, or back."""
        if number != self.best:
            self._measured = number
        if self.best != 0:
            return  # a review
        loss_s = max(0.0, _loss_s(call, self._paces[0].rate))
        self.lost_s += loss_s
        if number != 0:
            self._there_s = loss_s
        else:
            self._change_s, self._there_s = self._there_s + loss_s, 0.0

    def _record_best(self, call: DecodeCalls) -> None:
        known = self._paces.get(self.best)
        self._paces[self.best] = pace = known.and_then(call, self._proof) if known else Pace.of(call)
        if known is None:
            self._usual_hits = pace.hit_rate
        if self.best != 0:
            self._unreviewed_s += call.seconds
            self._unreviewed_tokens += _tokens(call)
            if pace.rate < self._paces[0].rate:
                self._dethrone()

    def _record_review(self, call: DecodeCalls) -> None:
        """Plain steps, whose pace may be another by now. It goes on until they are slower, or faster by a proof."""
        self._review = review = self._review.and_then(call, self._proof) if self._review else Pace.of(call)
        self._paces[0] = self._paces[0].and_then(call, self._proof)
        if review.rate <= self._paces[self.best].rate:
            self._unreviewed_s = self._unreviewed_tokens = 0.0
            self._review, self._review_at = None, self.seconds + review.seconds / self._reviews
            self._reviews = max(REVIEWS, self._reviews / 2)
        elif review.proof >= self._proof:
            self._paces[0] = review
            self._dethrone()

    def _record_try(self, number: int, call: DecodeCalls) -> None:
        best = self._paces[self.best]
        self.lost_s += max(0.0, _loss_s(call, best.rate))
        is_new, self._is_over[number] = self._is_over[number], False
        self._paces[number] = pace = Pace.of(call) if is_new else self._paces[number].and_then(call, self._proof)
        is_proven = pace.proof >= self._proof
        if pace.rate > MARGIN * best.rate and is_proven:
            self._give_up(self.best)
            self._crown(number)
        elif is_proven or pace.rate < HOPELESS * best.rate:
            self._give_up(number)

    def _dethrone(self) -> None:
        """Plain steps are the best again. What the other lost since it last was better counts as a try's."""
        self.lost_s += max(0.0, self._unreviewed_s - self._unreviewed_tokens / self._paces[0].rate)
        self._give_up(self.best)
        self._crown(0)

    def _crown(self, number: int) -> None:
        pace = self._paces[number]
        self._unreviewed_s, self._unreviewed_tokens = pace.seconds, pace.seconds * pace.rate
        self.best, self._review_at, self._reviews = number, self.seconds, FIRST_REVIEWS
        self._review = None
        self._usual_hits = self._paces[number].hit_rate

    def _give_up(self, number: int) -> None:
        self._waits_until[number], self._is_over[number] = 2 * self.seconds, True

    def _is_affordable(self, number: int, num_sequences: int) -> bool:
        """Whether what a call of a try may lose is left to be lost: of an unknown number all but a token a cycle."""
        seconds, tokens = self._expected(self._paces, number)
        loss_s = seconds - (tokens if number in self._paces else 1.0) / self._paces[self.best].rate
        change_s = self._change_s if self._changes(number) else 0.0
        left_s = SHARE * self.seconds - self.lost_s - change_s
        return loss_s <= 0 or self._size(number, num_sequences) * loss_s <= left_s

    def _expected_rate(self, number: int) -> float:
        seconds, tokens = self._expected(self._paces, number)
        return tokens / seconds


def _loss_s(call: DecodeCalls, rate: float) -> float:
    """Seconds that the call took more than the same tokens at this pace; below 0 it gained."""
    return call.seconds - _tokens(call) / rate


def _tokens(call: DecodeCalls) -> float:
    """Of a sequence."""
    return call.num_tokens / call.num_verifications * call.num_steps
