"""How much to prefetch: plain steps against steps that bring more or fewer rows early (`jmoe.decoding.contest`).

What is expected of an amount that was never tried is that it costs `EXPECTED_LOSS` of a plain step; once another amount
was tried, what the nearest one costs. Steps differ by what they happen to miss, and amounts by little: so a proof takes
more of them than drafts need.
"""

from collections.abc import Mapping

from jmoe.decoding.contest import Chooser, Pace

AMOUNTS = (0.25, 0.5, 1.0)  # experts a layer
PROOF = 48  # sequences in steps of this amount
EXPECTED_LOSS = 0.05


def prefetch_chooser(rows_of_expert: int) -> Chooser:
    """Among no rows, and those of a quarter of an expert, half of one, and one. Each step yields a token."""
    return Chooser((0, *sorted({max(1, round(amount * rows_of_expert)) for amount in AMOUNTS})), expected_step, PROOF)


def expected_step(paces: Mapping[int, Pace], num_rows: int) -> tuple[float, float]:
    """Seconds of a step, and a token of a sequence."""
    if pace := paces.get(num_rows):
        return pace.cycle_s, 1.0
    tried = [rows for rows in paces if rows]
    if not tried:
        return (1 + EXPECTED_LOSS) * paces[0].cycle_s, 1.0
    return paces[min(tried, key=lambda rows: abs(rows - num_rows))].cycle_s, 1.0
