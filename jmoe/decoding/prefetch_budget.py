"""How much of an amount that was asked for is prefetched: as much as comes in time, and only if that saves something.

What a prefetch saves is measured in bytes of the link, since that is what it is about. A useful byte that came early
need not come later. Against these stand wasted bytes, and that guessing takes time in every layer, whether anything
comes or not: with experts of a few hundred KB, or where nearly all have slots, more than it saves.
"""

import math

from jmoe.decoding.contest import Choice
from jmoe.prefetch_stats import PrefetchStats

GUESS_BYTES = 320_000  # that the link of an H200 brings in 6 us: the most that a layer loses by guessing
WASTE = 0.6  # what a wasted byte costs, of what a useful one saves
ROOM = 1.25  # of what came in time comes next: so a little is late, by which is seen how much comes in time
TRY = 4  # the most steps of a call, so that little is lost when what it brought is seen; not for long:
SETTLED = 128  # guessing steps after a look began: from then on calls are as long as any
HALF_LIFE = 16  # steps, after which what was seen weighs half as much
LOOK = 2 * TRY  # steps: before it is known what the first call of a look brought another one is under way
LOOK_AGAIN = 1024  # plain steps after a look in vain, which takes less than the time of a step
PARTS = 32  # of an expert, in which amounts are counted


class Budget:
    """Chooses how many rows of D values come early in each layer that is guessed, `most_rows` at most; 0: plain steps.

    After a few plain steps, beside which the host has time to begin others, a look brings one row of each guess, by
    which it is seen what more would save. If that is enough a quarter of `most_rows` comes, and twice as much while a
    clock says that all of it was in time; what was late tells how much comes in time, and `ROOM` of that is next.
    Without a clock it is `most_rows`. Once it is too little steps are plain ones, and then there is another look: after
    `LOOK_AGAIN` of these if the look itself was in vain, and sooner the longer guesses had paid.
    """

    def __init__(self, most_rows: int, rows_of_expert: int, row_bytes: int, num_guesses: int):
        """`num_guesses` is of a step: the layers that something may come for."""
        self.most_rows, self._num_guesses = most_rows, num_guesses
        self._row_bytes, self._part = row_bytes, max(1, rows_of_expert // PARTS)
        self._begin()

    def _begin(self) -> None:
        self._num_guessing, self._num_plain = 0, 0  # steps
        self._looks_next = False  # once the plain steps before a look were asked for
        self._rows = self._whole_parts(self.most_rows / 4)  # that come next
        self._most_in_time = self.most_rows  # as far as is known
        self._saving: float | None = None  # bytes, for each that guesses were to bring

    def choose(self) -> Choice:
        """For the next call, which is begun: of plain steps before a look at first, and then the look's."""
        if self._num_guessing < TRY:
            num_rows, self._looks_next = int(self._looks_next), True
            return Choice(num_rows, TRY)
        saved_bytes = (self._saving or 0.0) * self._most_in_time * self._row_bytes  # of a layer
        if saved_bytes < GUESS_BYTES:
            return Choice(0)
        return Choice(self._rows, TRY if self._num_guessing < SETTLED else None)

    def see(self, came: PrefetchStats, num_steps: int, num_rows: int) -> None:
        """What a call of so many steps brought early, which were to bring so many rows of each guess."""
        if not num_rows:
            self._num_plain += num_steps
            if self._num_plain * max(1.0, self._num_guessing / LOOK) >= LOOK_AGAIN:
                self._begin()
            return
        if not num_steps:
            return
        self._num_guessing += num_steps
        asked_bytes = num_steps * self._num_guesses * num_rows * self._row_bytes
        saving = (came.useful_bytes - WASTE * came.wasted_bytes) / asked_bytes
        kept = 0.0 if self._saving is None else 0.5 ** (num_steps / HALF_LIFE)
        self._saving = kept * (self._saving or 0.0) + (1 - kept) * saving
        if num_rows == self._rows and came.useful_bytes:
            self._time(1 - came.late_bytes / came.useful_bytes if came.late_bytes is not None else None)

    def _time(self, share: float | None) -> None:
        """So much of `_rows` came in time; None: nobody knows. One call says little, so they change twofold at most."""
        if share is None:
            self._rows = self.most_rows
        elif share == 1.0:
            self._rows, self._most_in_time = self._whole_parts(2 * self._rows), self.most_rows
        else:
            self._rows = self._most_in_time = self._whole_parts(max(ROOM * share, 0.5) * self._rows)

    def _whole_parts(self, num_rows: float) -> int:
        return min(self.most_rows, math.ceil(num_rows / self._part) * self._part)
