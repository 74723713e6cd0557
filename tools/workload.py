"""What benchmarks ask a model: requests of drawn lengths, from prompts of real text or of random token ids.

A seed decides everything. What order prompts come in, how long they are and how many tokens are asked for are drawn
independently of each other: changing one leaves the others alone, and a longer workload begins with the shorter one.
"""

import dataclasses
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from jmoe.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A text, and what it is from."""

    source: str
    text: str


@dataclasses.dataclass(frozen=True)
class Request:
    """Token ids to continue, by how many tokens, and what they are from."""

    prompt_ids: tuple[int, ...]
    max_new_tokens: int
    source: str


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Numbers of tokens, lognormal: median * exp(sigma * normal), rounded, then clipped to smallest … largest.

    With `sigma` 0 all are the median. Raises ValueError unless 1 <= smallest <= median <= largest and sigma >= 0.
    """

    median: float
    sigma: float
    smallest: int
    largest: int

    def __post_init__(self) -> None:
        if not 1 <= self.smallest <= self.median <= self.largest:
            raise ValueError(f"{self}: expected 1 <= smallest <= median <= largest")
        if not 0 <= self.sigma < math.inf:
            raise ValueError(f"{self}: sigma must be a finite number of at least 0 (0: all of the same length)")

    @classmethod
    def constant(cls, length: int) -> "Lengths":
        """Always this one. Raises ValueError if it is less than 1."""
        return cls(length, 0.0, length, length)

    def draw(self, rng: np.random.Generator, count: int) -> list[int]:
        """The next `count` lengths."""
        exponents = np.minimum(self.sigma * rng.standard_normal(count), math.log(self.largest))  # exp stays finite
        return np.clip(np.rint(self.median * np.exp(exponents)), self.smallest, self.largest).astype(int).tolist()


def read_prompts(path: str | Path) -> list[Prompt]:
    """Prompts of a file of JSON lines, {"source": "…", "text": "…"}; other keys and empty lines are passed over.

    Raises ValueError, with the number of the line, for a file that is missing, empty or not that.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file; expected JSON lines with source and text") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error}). Write it again as UTF-8.") from error
    prompts = [_prompt(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise ValueError(f"{path}: no prompts; expected JSON lines with source and text")
    return prompts


def _prompt(line: str, where: str) -> Prompt:
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not valid JSON ({error}). Correct the line.") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{where}: holds a {type(fields).__name__}, expected an object with source and text")
    for key in ("source", "text"):
        if not isinstance(fields.get(key), str) or not fields[key]:
            found = f"{key} is {fields[key]!r}" if key in fields else f"no {key}"
            raise ValueError(f"{where}: {found}; expected a text that is not empty")
    return Prompt(fields["source"], fields["text"])


def make_workload(
    prompts: Sequence[Prompt],
    tokenizer: Tokenizer,
    *,
    num_requests: int,
    prompt_tokens: Lengths,
    new_tokens: Lengths,
    seed: int,
) -> list[Request]:
    """Requests that begin as the prompts do; each prompt is used once before any is used again.

    A request has the first n tokens of its prompt, n drawn from `prompt_tokens`; of a prompt with fewer it has all, so
    what counts is the length of `prompt_ids`. Raises ValueError without prompts or requests.
    """
    if not prompts:
        raise ValueError("no prompts to make requests of; give at least one")
    order, drawn = _draw(num_requests, prompt_tokens, new_tokens, seed)
    chosen = list(itertools.islice(_shuffled(order, len(prompts)), num_requests))
    encoded = {at: tuple(tokenizer.encode(prompts[at].text)) for at in set(chosen)}
    return [
        Request(encoded[at][:most], num_new, prompts[at].source)
        for at, (most, num_new) in zip(chosen, drawn, strict=True)
    ]


def random_workload(
    vocab_size: int, *, num_requests: int, prompt_tokens: Lengths, new_tokens: Lengths, seed: int
) -> list[Request]:
    """Requests of uniformly random token ids: for random weights, to which no text means anything.

    Raises ValueError without requests or for an empty vocabulary.
    """
    if vocab_size < 1:
        raise ValueError(f"vocab_size={vocab_size} must be at least 1")
    _, drawn = _draw(num_requests, prompt_tokens, new_tokens, seed)
    ends = list(itertools.accumulate(length for length, _ in drawn))
    ids = np.random.default_rng(seed).integers(0, vocab_size, ends[-1]).tolist()
    return [
        Request(tuple(ids[end - length : end]), num_new, "random")
        for end, (length, num_new) in zip(ends, drawn, strict=True)
    ]


def _draw(
    num_requests: int, prompt_tokens: Lengths, new_tokens: Lengths, seed: int
) -> tuple[np.random.Generator, list[tuple[int, int]]]:
    """What is left for the order of prompts, and the tokens of each request: of its prompt, and new."""
    if num_requests < 1:
        raise ValueError(f"num_requests={num_requests} must be at least 1")
    order, of_prompts, of_new = np.random.default_rng(seed).spawn(3)
    lengths = prompt_tokens.draw(of_prompts, num_requests), new_tokens.draw(of_new, num_requests)
    return order, list(zip(*lengths, strict=True))


def _shuffled(rng: np.random.Generator, count: int) -> Iterator[int]:
    """0 … count - 1 in a random order, then in another, without end."""
    while True:
        yield from rng.permutation(count).tolist()
