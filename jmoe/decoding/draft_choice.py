"""How many tokens to draft at a time: plain steps against cycles that draft more or fewer (`jmoe.decoding.contest`).

What is expected of a number that was never tried: that each drafted token costs half a plain step (it fetches nothing)
and none is accepted; once another number was tried, what that one's drafted tokens cost and its acceptance. While less
than `PROOF` sequences were verified, the others count as if they had accepted nothing.
"""

from collections.abc import Mapping

from jmoe.decoding.contest import Chooser, Pace

PROOF = 16  # sequences verified


def draft_chooser(most: int) -> Chooser:
    """Among 0, 1, 2, 4 … `most` drafted tokens. Raises ValueError for less than one."""
    if most < 1:
        raise ValueError(f"draft tokens={most} must be at least 1; 0 is plain decoding")
    numbers = (0, *(2**n for n in range(most.bit_length()) if 2**n < most), most)
    return Chooser(numbers, expected_cycle, PROOF)


def expected_cycle(paces: Mapping[int, Pace], number: int) -> tuple[float, float]:
    """Seconds of a cycle, and tokens of a sequence, by the module's rules."""
    if pace := paces.get(number):
        return pace.cycle_s, pace.careful_mean_accepted(PROOF)
    step_s = paces[0].cycle_s
    tried = [n for n in paces if n]
    if not tried:
        token_s = step_s / 2 if paces[0].hit_rate < 1 else step_s  # where nothing is fetched, it saves nothing
        return step_s + number * token_s, 1.0
    near = min(tried, key=lambda n: abs(n - number))
    token_s = max(0.0, paces[near].cycle_s - step_s) / near
    acceptance = acceptance_of(paces[near].careful_mean_accepted(PROOF), near)
    return step_s + number * token_s, sum(acceptance**n for n in range(number + 1))


def acceptance_of(mean_accepted: float, num_draft_tokens: int) -> float:
    """The probability of each drafted token, once those before it are accepted, that yields so many tokens."""
    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        is_less = sum(middle**n for n in range(num_draft_tokens + 1)) < mean_accepted
        low, high = (middle, high) if is_less else (low, middle)
    return low
