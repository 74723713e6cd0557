"""Residency in plain Python: what `jmoe.experts.residency.admit` must do, written as one would on paper."""

import dataclasses

EMPTY = -1


@dataclasses.dataclass
class Twin:
    """One layer: the expert in each slot (EMPTY if none), and when each slot was last used."""

    owner: list[int]
    last_used: list[int]

    @classmethod
    def filled(cls, num_slots: int) -> "Twin":
        return cls(list(range(num_slots)), [0] * num_slots)

    @classmethod
    def empty(cls, num_slots: int) -> "Twin":
        return cls([EMPTY] * num_slots, [0] * num_slots)

    @property
    def resident(self) -> set[int]:
        return set(self.owner) - {EMPTY}

    def admit(self, needed: set[int], clock: int) -> list[tuple[int, int]]:
        """Least recently used goes first; returns the plan, (expert, slot) by ascending expert."""
        hits = [slot for slot, expert in enumerate(self.owner) if expert in needed]
        misses = sorted(needed - self.resident)
        others = [slot for slot in range(len(self.owner)) if slot not in hits]
        others.sort(key=lambda slot: (self.owner[slot] != EMPTY, self.last_used[slot], slot))
        plan = list(zip(misses, others, strict=False)) if len(needed) <= len(self.owner) else []
        for slot in hits:
            self.last_used[slot] = clock
        for expert, slot in plan:
            self.owner[slot], self.last_used[slot] = expert, clock
        return plan
