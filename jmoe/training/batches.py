"""Batches of windows of a text, the same for the same seed and step, whatever was drawn before."""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)  # one is equal to itself alone: its epoch is remembered
class Batches:
    """Windows [batch_size, sequence_length + 1] over documents that are shuffled and joined anew for each epoch.

    Each document follows a `start_id`. Neighbouring windows share one token, so that every token is predicted once an
    epoch, but for those before a random offset and after the last whole batch.
    """

    documents: Sequence[np.ndarray]
    start_id: int
    batch_size: int
    sequence_length: int
    seed: int

    def __post_init__(self) -> None:
        if self.steps_per_epoch < 1:
            raise ValueError(
                f"{self.num_tokens} tokens are too few for a batch of {self.batch_size} windows of "
                f"{self.sequence_length}; give more text, or lower batch_size or sequence_length"
            )

    @property
    def num_tokens(self) -> int:
        """Tokens of an epoch, start tokens included."""
        return sum(len(document) + 1 for document in self.documents)

    @property
    def steps_per_epoch(self) -> int:
        return (self.num_tokens - self.sequence_length) // self.sequence_length // self.batch_size

    def __getitem__(self, step: int) -> np.ndarray:
        epoch, index = divmod(step, self.steps_per_epoch)
        tokens, starts = _epoch(self, epoch)
        mine = starts[index * self.batch_size : (index + 1) * self.batch_size]
        return np.stack([tokens[start : start + self.sequence_length + 1] for start in mine]).astype(np.int32)


@functools.lru_cache(maxsize=1)
def _epoch(batches: Batches, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """All tokens of an epoch in its order, and where its windows start, in their order."""
    rng = np.random.default_rng([batches.seed, epoch])
    start = np.array([batches.start_id], batches.documents[0].dtype)
    order = rng.permutation(len(batches.documents))
    tokens = np.concatenate([part for n in order for part in (start, batches.documents[n])])
    length = batches.sequence_length
    offset = int(rng.integers(length))
    starts = np.arange(offset, len(tokens) - length, length)
    return tokens, rng.permutation(starts)
