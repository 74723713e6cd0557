"""What routing says of a model: how evenly experts are used, how soon again, and how that differs by prompt.

Plain numpy, for measurements after the fact. `ids` are the expert ids [T, L, A] of one sequence: T tokens, L MoE
layers, the A experts of a token, each in [0, E) and distinct. An activation is one token going to one expert.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

LAGS = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # tokens


@dataclasses.dataclass(frozen=True)
class RoutingSummary:
    """Figures of the routing of prompts of `num_tokens` each; a mean over prompts where there is no prompt axis.

    `use` [L, E], `reuse` [L] by lag in tokens, `shuffled_reuse` [L], `hit_rate` [L, E+1] by slots. `counts` and
    `shuffled_counts`, of the same tokens dealt to prompts at random, are [prompts, L, E].
    """

    num_tokens: int
    num_active: int
    use: np.ndarray
    reuse: dict[int, np.ndarray]
    shuffled_reuse: np.ndarray
    hit_rate: np.ndarray
    counts: np.ndarray
    shuffled_counts: np.ndarray

    @property
    def num_experts(self) -> int:
        return self.use.shape[1]


def summarize(sequences: Sequence[np.ndarray], num_experts: int) -> RoutingSummary:
    """All figures of the routing of prompts of one length. Raises ValueError for other lengths or no routing."""
    shapes = {ids.shape for ids in sequences}
    if len(shapes) != 1:
        raise ValueError(f"prompts of shapes {sorted(shapes)}; expected one and the same [T, L, A]; cut them to it")
    [(num_tokens, _, num_active)] = shapes
    lags = [lag for lag in LAGS if lag < num_tokens]
    counts = prompt_counts(sequences, num_experts)
    return RoutingSummary(
        num_tokens=num_tokens,
        num_active=num_active,
        use=counts.sum(axis=0) / (len(sequences) * num_tokens * num_active),
        reuse={lag: np.mean([reuse(ids, lag) for ids in sequences], axis=0) for lag in lags},
        shuffled_reuse=np.mean([shuffled_reuse(ids, num_experts) for ids in sequences], axis=0),
        hit_rate=lru_hit_rate(np.sum([reuse_distances(ids, num_experts) for ids in sequences], axis=0)),
        counts=counts,
        shuffled_counts=prompt_counts(shuffled_prompts(sequences), num_experts),
    )


def activation_counts(ids: np.ndarray, num_experts: int) -> np.ndarray:
    """How many tokens went to each expert, [L, E]; over a whole request this is MoE-Infinity's EAM (arXiv 2401.14361).

    Raises ValueError for ids that are no routing of this many experts.
    """
    _require_routing(ids, num_experts)
    num_layers = ids.shape[1]
    cells = np.arange(num_layers)[None, :, None] * num_experts + ids
    return np.bincount(cells.reshape(-1), minlength=num_layers * num_experts).reshape(num_layers, num_experts)


def expert_use(ids: np.ndarray, num_experts: int) -> np.ndarray:
    """Each expert's share of its layer's activations, [L, E]; rows sum to 1. Raises as `activation_counts`."""
    return activation_counts(ids, num_experts) / (ids.shape[0] * ids.shape[2])


def effective_experts(use: np.ndarray) -> np.ndarray:
    """exp(-sum(use * log(use))) over the last axis: E if all are used alike, A if always the same A are."""
    logs = np.log(use, out=np.zeros_like(use, dtype=float), where=use > 0)
    return np.exp(-np.sum(use * logs, axis=-1))


def num_dead(use: np.ndarray, threshold: float) -> np.ndarray:
    """How many experts have a share below `threshold`, over the last axis; a fraction of 1/E is a good threshold."""
    return np.sum(use < threshold, axis=-1)


def reuse(ids: np.ndarray, lag: int = 1) -> np.ndarray:
    """mean over t of |S_t & S_(t-lag)| / A, [L], where S_t are the experts of token t.

    Uniform routing gives A/E. At lag 1 it is ReMoE's expert overlap ratio. Raises ValueError unless 1 <= lag < T.
    """
    if not 1 <= lag < ids.shape[0]:
        raise ValueError(f"lag={lag} is outside 1..{ids.shape[0] - 1} for {ids.shape[0]} tokens; give more tokens")
    same = ids[lag:, :, :, None] == ids[:-lag, :, None, :]  # [T-lag, L, A, A]
    return np.sum(same, axis=(0, 2, 3)) / (same.shape[0] * same.shape[2])


def shuffled_reuse(ids: np.ndarray, num_experts: int) -> np.ndarray:
    """What `reuse` would be, on average, were the tokens in random order, [L]: what comes of popular experts alone.

    That is the mean of |S_t & S_u| / A over all t != u, (sum_e count_e^2 - T A) / (T (T-1) A). Raises ValueError for
    fewer than two tokens, and as `activation_counts`.
    """
    num_tokens, _, num_active = ids.shape
    if num_tokens < 2:
        raise ValueError(f"{num_tokens} token(s); reuse is between two of them or more")
    overlaps = np.sum(activation_counts(ids, num_experts) ** 2, axis=-1)
    return (overlaps - num_tokens * num_active) / (num_tokens * (num_tokens - 1) * num_active)


def reuse_distances(ids: np.ndarray, num_experts: int) -> np.ndarray:
    """Histogram [L, E+1] of LRU stack distances: bin d counts activations of an expert with d others used since.

    A token is one event: its experts are looked up in what the token before left. Of one token's experts, the first in
    the row (the router's favourite) counts as used last. Bin E counts the first use of an expert. Raises as
    `activation_counts`.
    """
    _require_routing(ids, num_experts)
    _, num_layers, num_active = ids.shape
    layers = np.arange(num_layers)[:, None]
    last_used = np.full((num_layers, num_experts), -1)
    histogram = np.zeros((num_layers, num_experts + 1), np.int64)
    for token, rows in enumerate(ids):
        mine = np.take_along_axis(last_used, rows, axis=1)  # [L, A]
        since = np.sum(last_used[:, None, :] > mine[:, :, None], axis=-1)
        np.add.at(histogram, (layers, np.where(mine < 0, num_experts, since)), 1)
        last_used[layers, rows] = (token + 1) * num_active - np.arange(num_active)
    return histogram


def lru_hit_rate(histogram: np.ndarray) -> np.ndarray:
    """Share of activations that an LRU of c slots for a layer hits, [..., E+1], at index c; it starts empty.

    From `reuse_distances`, or a sum of them: sum_(d<c) histogram[d] / sum_d histogram[d]. From c = A on this is exactly
    that LRU, with a token as one event. Fewer slots cannot hold one token's experts.
    """
    hits = np.cumsum(histogram[..., :-1], axis=-1)
    return np.insert(hits, 0, 0, axis=-1) / np.sum(histogram, axis=-1, keepdims=True)


def concentration(counts: np.ndarray) -> np.ndarray:
    """Share of activations that the n most used experts take, [..., E+1], at index n: from 0 to 1, concave."""
    most_used_first = -np.sort(-counts, axis=-1)
    shares = np.cumsum(most_used_first, axis=-1) / np.sum(counts, axis=-1, keepdims=True)
    return np.insert(shares, 0, 0.0, axis=-1)


def top_share(counts: np.ndarray, fraction: float) -> np.ndarray:
    """Share of activations that the most used `fraction` of experts takes, over the last axis, of [..., E] counts.

    A number of experts that is not whole is interpolated. Raises ValueError for a fraction outside 0..1.
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction={fraction} is outside 0..1; expected a share of the experts")
    shares = concentration(counts)
    size = fraction * counts.shape[-1]
    whole = min(int(size), counts.shape[-1] - 1)
    return shares[..., whole] + (size - whole) * (shares[..., whole + 1] - shares[..., whole])


def prompt_counts(sequences: Sequence[np.ndarray], num_experts: int) -> np.ndarray:
    """`activation_counts` of each prompt, [prompts, L, E]. Raises as it does."""
    return np.stack([activation_counts(ids, num_experts) for ids in sequences])


def similarity(counts: np.ndarray) -> np.ndarray:
    """Cosine of each two prompts' activation counts, mean over layers: [prompts, prompts] from [prompts, L, E]."""
    unit = counts / np.linalg.norm(counts, axis=-1, keepdims=True)
    return np.einsum("ple,qle->pql", unit, unit).mean(axis=-1)


def shuffled_prompts(sequences: Sequence[np.ndarray], seed: int = 0) -> list[np.ndarray]:
    """The same tokens, dealt at random to prompts of the same lengths: what skew comes of short prompts alone."""
    pooled = np.random.default_rng(seed).permutation(np.concatenate(sequences))
    return np.split(pooled, np.cumsum([len(ids) for ids in sequences])[:-1])


def _require_routing(ids: np.ndarray, num_experts: int) -> None:
    if ids.ndim != 3 or not ids.size or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"expert ids {ids.dtype}{list(ids.shape)}; expected integers [T, L, A], none of them 0")
    if ids.min() < 0 or ids.max() >= num_experts:
        raise ValueError(
            f"expert ids are in {ids.min()}..{ids.max()}, but there are {num_experts} experts: expected "
            f"0..{num_experts - 1}; leave out rows that are no token"
        )
    if (np.diff(np.sort(ids, axis=-1), axis=-1) == 0).any():
        raise ValueError("a token names the same expert twice in a layer; expected distinct experts")
