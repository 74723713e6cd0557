"""Residency in plain Python: what `jmoe.experts.residency.admit` and the policies must do, as one would on paper."""

import dataclasses
import math

EMPTY = -1


@dataclasses.dataclass
class Twin:
    """One layer: the expert in each slot (EMPTY if none)."""

    owner: list[int]

    @classmethod
    def filled(cls, num_slots: int) -> "Twin":
        return cls(list(range(num_slots)))

    @classmethod
    def empty(cls, num_slots: int) -> "Twin":
        return cls([EMPTY] * num_slots)

    @property
    def resident(self) -> set[int]:
        return set(self.owner) - {EMPTY}

    def admit(self, needed: set[int], value: list[int]) -> list[tuple[int, int]]:
        """The least valuable goes first; returns the plan, (expert, slot), the most valuable first."""
        missing = sorted(needed - self.resident, key=lambda expert: (-value[expert], expert))
        others = [slot for slot, expert in enumerate(self.owner) if expert not in needed]
        others.sort(key=lambda slot: (self.owner[slot] != EMPTY, value[self.owner[slot]], slot))
        plan = list(zip(missing, others, strict=False))
        if len(needed) > len(self.owner):
            plan = [(expert, slot) for expert, slot in plan if self._is_worth(value[expert], slot, value)]
        for expert, slot in plan:
            self.owner[slot] = expert
        return plan

    def _is_worth(self, new_value: int, slot: int, value: list[int]) -> bool:
        return self.owner[slot] == EMPTY or new_value > value[self.owner[slot]]


class TwinPolicy:
    """What a policy remembers of L layers of E experts. `used` is the tokens of each expert in a step."""

    def __init__(self, num_layers: int, num_experts: int):
        self.num_layers, self.num_experts = num_layers, num_experts

    def value(self, layer: int, used: list[int], clock: int) -> list[int]:
        raise NotImplementedError

    def update(self, used: list[list[int]], clock: int) -> None:
        raise NotImplementedError

    def finish(self) -> None:
        """The batch of requests is done."""


class History(TwinPolicy):
    """The policies that can be said of the times of all uses, kept as a list for each expert."""

    def __init__(self, num_layers: int, num_experts: int):
        super().__init__(num_layers, num_experts)
        self.uses: list[list[list[int]]] = [[[] for _ in range(num_experts)] for _ in range(num_layers)]
        self.frequency = [[0] * num_experts for _ in range(num_layers)]

    def value(self, layer: int, used: list[int], clock: int) -> list[int]:
        values = []
        for expert, tokens in enumerate(used):
            uses = self.uses[layer][expert] + [clock] * (tokens > 0)
            values.append(self.score(uses, _decayed(self.frequency[layer][expert], tokens), clock))
        return values

    def update(self, used: list[list[int]], clock: int) -> None:
        for layer, row in enumerate(used):
            for expert, tokens in enumerate(row):
                self.uses[layer][expert] += [clock] * (tokens > 0)
                self.frequency[layer][expert] = _decayed(self.frequency[layer][expert], tokens)

    def score(self, uses: list[int], frequency: int, clock: int) -> int:
        raise NotImplementedError


def _decayed(frequency: int, tokens: int) -> int:
    return frequency - frequency // 32 + 4096 * tokens


class TwinLRU(History):
    def score(self, uses: list[int], frequency: int, clock: int) -> int:
        return uses[-1] if uses else -1


class TwinLRU2(History):
    def score(self, uses: list[int], frequency: int, clock: int) -> int:
        return uses[-2] if len(uses) > 1 else (uses[-1] if uses else -1) - 2**30


class TwinLFU(History):
    def score(self, uses: list[int], frequency: int, clock: int) -> int:
        return frequency


class TwinLFRU(History):
    def score(self, uses: list[int], frequency: int, clock: int) -> int:
        return frequency // (clock - (uses[-1] if uses else -1) + 1)


class TwinActivation(TwinPolicy):
    """Matrices are lists of rows; the collection is a list of at most `size` of them."""

    def __init__(self, num_layers: int, num_experts: int, size: int = 128):
        super().__init__(num_layers, num_experts)
        self.size = size
        self.collection: list[list[list[float]]] = []
        self.forget()

    def forget(self) -> None:
        self.request, self.recent, self.expected = (
            [[0.0] * self.num_experts for _ in range(self.num_layers)] for _ in range(3)
        )

    def value(self, layer: int, used: list[int], clock: int) -> list[int]:
        return [round(share * 2**20) for share in self.expected[layer]]

    def update(self, used: list[list[int]], clock: int) -> None:
        self.request = [[a + b for a, b in zip(x, y, strict=True)] for x, y in zip(self.request, used, strict=True)]
        self.recent = [[a / 2 + b for a, b in zip(x, y, strict=True)] for x, y in zip(self.recent, used, strict=True)]
        match = self.most_similar(self.recent)
        past = self.collection[match] if match is not None else [[0.0] * self.num_experts] * self.num_layers
        pairs = zip(past, self.request, strict=True)
        self.expected = [[a + b for a, b in zip(_share(x), _share(y), strict=True)] for x, y in pairs]

    def most_similar(self, matrix: list[list[float]]) -> int | None:
        cosines = [_dot(past, matrix) / math.sqrt(_dot(past, past)) for past in self.collection]
        return cosines.index(max(cosines)) if cosines else None

    def finish(self) -> None:
        if any(map(any, self.request)):
            match = self.most_similar(self.request)
            if len(self.collection) < self.size or match is None:
                self.collection.append(self.request)
            else:
                self.collection[match] = self.request
        self.forget()


class TwinReuse(TwinPolicy):
    """As the docstring of `_update_reuse` has it, one weight after another."""

    def __init__(self, num_layers: int, num_experts: int):
        super().__init__(num_layers, num_experts)
        E = num_experts
        self.weights = [[[float(f == E + e) for f in range(2 * E + 1)] for e in range(E)] for _ in range(num_layers)]
        self.frequency = [[0.0] * E for _ in range(num_layers)]
        self.trace = [[0.0] * (2 * E + 1) for _ in range(num_layers)]

    def features(self, layer: int, used: list[int]) -> tuple[list[float], list[float], list[float]]:
        """(use, frequency, both and the bias)"""
        mean, decay = sum(used) / self.num_experts, 0.5 ** (1 / 20)
        use = [tokens - mean for tokens in used]
        frequency = [f * decay + u * (1 - decay) for f, u in zip(self.frequency[layer], use, strict=True)]
        return use, frequency, [*use, *frequency, 0.3]

    def guess(self, layer: int, features: list[float]) -> list[float]:
        return [sum(w * x for w, x in zip(row, features, strict=True)) for row in self.weights[layer]]

    def value(self, layer: int, used: list[int], clock: int) -> list[int]:
        return [round(guess * 2**16) for guess in self.guess(layer, self.features(layer, used)[2])]

    def update(self, used: list[list[int]], clock: int) -> None:
        for layer, row in enumerate(used):
            use, self.frequency[layer], features = self.features(layer, row)
            guess, trace = self.guess(layer, features), self.trace[layer]
            rate = 0.03 / (1 + sum(x * x for x in features))
            for e, weights in enumerate(self.weights[layer]):
                for f, x in enumerate(features):
                    weights[f] += rate * (use[e] * trace[f] - guess[e] * x)
            self.trace[layer] = [0.6 * t + 0.4 * x for t, x in zip(trace, features, strict=True)]


def _dot(x: list[list[float]], y: list[list[float]]) -> float:
    return sum(a * b for row, other in zip(x, y, strict=True) for a, b in zip(row, other, strict=True))


def _share(row: list[float]) -> list[float]:
    return [x / max(sum(row), 1.0) for x in row]


TWINS: dict[str, type[TwinPolicy]] = {
    "lru": TwinLRU,
    "lru2": TwinLRU2,
    "lfu": TwinLFU,
    "lfru": TwinLFRU,
    "activation": TwinActivation,
    "reuse": TwinReuse,
}


def replay(policy: TwinPolicy, layers: list[Twin], requests: list[list[list[list[int]]]]) -> list[tuple[int, int, int]]:
    """(hits, fetched, streamed) of each layer over requests, each a list of steps of `used`, one row a layer."""
    counts = [(0, 0, 0)] * len(layers)
    clock = 0
    for request in requests:
        for used in request:
            for n, (twin, row) in enumerate(zip(layers, used, strict=True)):
                needed = {expert for expert, tokens in enumerate(row) if tokens}
                hits = len(needed & twin.resident)
                fetched = len(twin.admit(needed, policy.value(n, row, clock)))
                more = (hits, fetched, len(needed) - hits - fetched)
                counts[n] = tuple(a + b for a, b in zip(counts[n], more, strict=True))  # type: ignore[assignment]
            policy.update(used, clock)
            clock += 1
        policy.finish()
    return counts
