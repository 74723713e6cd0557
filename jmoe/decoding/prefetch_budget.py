"""How much of an amount that was asked for is prefetched: as much as comes in time, and only if that saves something.

What a prefetch saves is measured in bytes of the link, since that is what it is about. A useful byte that came early
need not come later. Against these stand wasted bytes, and that guessing takes time in every layer, whether anything
comes or not: with experts of a few hundred KB, or where nearly all have slots, more than it saves.
"""

import math

from jmoe.decoding.contest import Choice
from jmoe.prefetch_stats import PrefetchStats

GUESS_BYTES = 320_000  # that the link of an H200 brings in the 6 us that a layer loses by guessing
WASTE = 0.6  # what a wasted byte costs, of what a useful one saves
ROOM = 1.25  # of what came in time comes next: so a little is late, by which is seen how much comes in time
LOOK = 8  # steps that look how good the guesses are, before anything else comes early
HALF_LIFE = 32  # steps, after which what was seen weighs half as much
LOOK_AGAIN = 4096  # plain steps; a look, with the changes to it and back, costs about as much as 20 steps
PARTS = 32  # of an expert, in which amounts are counted


class Budget:
    """Chooses how many rows of D values come early in each layer that is guessed, `most_rows` at most; 0: plain steps.

    The first `LOOK` steps bring one row of each guess, by which it is seen what more would save. If that is too little
    steps are plain ones, and after `LOOK_AGAIN` of these there is another look. Where a clock tells what is late, what
    comes in time is found by halves at most down, and by `ROOM` up; else it is `most_rows`.
    """

    def __init__(self, most_rows: int, rows_of_expert: int, row_bytes: int, num_guesses: int):
        """`num_guesses` is of a step: the layers that something may come for."""
        self.most_rows, self._num_guesses = most_rows, num_guesses
        self._row_bytes, self._part = row_bytes, max(1, rows_of_expert // PARTS)
        self._begin()

    def _begin(self) -> None:
        self._num_looks, self._num_plain = 0, 0  # steps
        self._rows = self.most_rows  # that come in time, as far as is known
        self._saving: float | None = None  # bytes, for each that guesses were to bring

    def choose(self) -> Choice:
        """For the next call."""
        if self._num_looks < LOOK:
            return Choice(1, LOOK - self._num_looks)
        saved_bytes = (self._saving or 0.0) * self._rows * self._row_bytes  # of a layer
        return Choice(self._rows if saved_bytes >= GUESS_BYTES else 0)

    def see(self, came: PrefetchStats, num_steps: int, num_rows: int) -> None:
        """What a call of so many steps brought early, which were to bring so many rows of each guess."""
        if not num_rows:
            self._num_plain += num_steps
            if self._num_plain >= LOOK_AGAIN:
                self._begin()
            return
        if not num_steps:
            return
        self._num_looks += num_steps
        asked_bytes = num_steps * self._num_guesses * num_rows * self._row_bytes
        saving = (came.useful_bytes - WASTE * came.wasted_bytes) / asked_bytes
        kept = 0.0 if self._saving is None else 0.5 ** (num_steps / HALF_LIFE)
        self._saving = kept * (self._saving or 0.0) + (1 - kept) * saving
        if came.late_bytes is not None and came.useful_bytes and num_rows == self._rows:
            self._rows = self._in_time(num_rows * (1 - came.late_bytes / came.useful_bytes))

    def _in_time(self, num_rows: float) -> int:
        """With some room, in whole parts; half as many as now at least, for one call says little."""
        wanted = max(ROOM * num_rows, self._rows / 2)
        return min(self.most_rows, math.ceil(wanted / self._part) * self._part)
