"""How well a model predicts text: bits per byte, over windows of documents that are read one after another."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from jmoe.engine import Engine
from jmoe.experts.execute_guess import ExecutedGuess
from jmoe.tokenizer import Tokenizer

# What stands between documents in training, where the tokenizer names no bos_token. A chat model has other ends too.
DOCUMENT_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
    """What predicting texts cost: `nats` is -ln of their probability, `num_bytes` their length in UTF-8."""

    num_documents: int
    num_tokens: int
    num_bytes: int
    nats: float

    @property
    def bits_per_byte(self) -> float:
        """The same measure for every tokenizer. nan of no bytes."""
        return self.nats / math.log(2) / self.num_bytes if self.num_bytes else math.nan

    @property
    def bits_per_token(self) -> float:
        return self.nats / math.log(2) / self.num_tokens if self.num_tokens else math.nan

    @property
    def perplexity(self) -> float:
        """exp(nats a token); inf where no float holds it."""
        with np.errstate(over="ignore"):
            return float(np.exp(np.float64(self.nats) / self.num_tokens)) if self.num_tokens else math.nan

    def __add__(self, other: "Score") -> "Score":
        return Score(
            num_documents=self.num_documents + other.num_documents,
            num_tokens=self.num_tokens + other.num_tokens,
            num_bytes=self.num_bytes + other.num_bytes,
            nats=self.nats + other.nats,
        )

    def to_dict(self) -> dict[str, Any]:
        derived = ("bits_per_byte", "bits_per_token", "perplexity")
        return {**dataclasses.asdict(self), **{name: getattr(self, name) for name in derived}}


@dataclasses.dataclass(frozen=True)
class _Window:
    """Part of a document. The first `num_context` predictions were scored before; `num_bytes` is its share."""

    token_ids: list[int]
    num_context: int
    num_bytes: int
    ends_document: bool


def require_windows(length: int, stride: int) -> None:
    """Raises ValueError unless 1 <= stride <= length, both in tokens."""
    if not 1 <= stride <= length:
        raise ValueError(
            f"window={length} with stride={stride}; expected 1 <= stride <= window, since a larger stride leaves "
            "tokens out; change one of them"
        )


def cut_windows(token_ids: Sequence[int], length: int, stride: int) -> list[tuple[list[int], int]]:
    """A document, start token first, as (window, number of its leading predictions that are not scored).

    A window holds at most `length` tokens to read and the one that the last of them predicts, and begins `stride`
    tokens after the one before. Every token but the document's first is scored once; in windows after the first, the
    tokens that were scored before are context. A document of one token is one window, with nothing to predict.

    Raises ValueError for no token, or unless 1 <= stride <= length.
    """
    if not token_ids:
        raise ValueError("a document without a token; expected at least its start token")
    require_windows(length, stride)
    starts = range(0, max(1, len(token_ids) - 1 - length + stride), stride)
    return [(list(token_ids[at : at + length + 1]), length - stride if at else 0) for at in starts]


def document_start(engine: Engine) -> int:
    """The token id that stands before a document: see `start_token`. Raises as that, and without a tokenizer."""
    return start_token(_tokenizer(engine), engine.eos_ids)


def start_token(tokenizer: Tokenizer, eos_ids: Sequence[int]) -> int:
    """The token id that stands before a document: bos_token, else what ends one, else the only end of sequence.

    Raises ValueError if there is none of these.
    """
    bos = tokenizer.inner.token_to_id(tokenizer.named_tokens.get("bos_token", ""))
    if bos is not None:
        return bos
    ends = {tokenizer.inner.id_to_token(token_id): token_id for token_id in eos_ids}
    named = [ends[text] for text in DOCUMENT_ENDS if text in ends]
    if not named and len(ends) != 1:
        raise ValueError(
            f"no token to begin documents with: the tokenizer has no bos_token, and its ends of sequence are "
            f"{sorted(eos_ids)}, expected one or {', '.join(DOCUMENT_ENDS)} among them; give start_id"
        )
    return [*named, *ends.values()][0]


def evaluate(
    engine: Engine,
    texts: Iterable[str],
    *,
    window: int | None = None,
    stride: int | None = None,
    start_id: int | None = None,
    executed: ExecutedGuess | None = None,
    progress: Callable[[Score], None] | None = None,
) -> Score:
    """Scores every token of the texts, each text a document of its own after the token `start_id`.

    `window` is the most tokens that are read at a time (default: max_seq_len - 1), and `stride` how many the next
    window begins later (default: `window`); a smaller stride gives tokens more context and takes longer. `start_id` is
    by default `document_start(engine)`, and never scored. Texts are taken one after another, a batch of the plan's size
    at a time; `progress` gets the score so far after each. With `executed` it is the score of decoding with these
    guesses (`jmoe.executing`), not the model's.

    Raises ValueError for no text, a window or stride out of range, and an engine without tokenizer; RuntimeError for
    a model whose probabilities are not numbers.
    """
    if isinstance(texts, str):
        raise ValueError("texts is one string; expected several, such as a list of it")
    largest, tokenizer = engine.plan.max_seq_len - 1, _tokenizer(engine)
    length = largest if window is None else window
    stride = length if stride is None else stride
    require_windows(length, stride)
    if length > largest:
        raise ValueError(
            f"window={length} and the token that it predicts last do not fit in max_seq_len={largest + 1}; choose at "
            f"most {largest}, or raise the runtime configuration's max_seq_len"
        )
    start_id = document_start(engine) if start_id is None else start_id
    total = Score(num_documents=0, num_tokens=0, num_bytes=0, nats=0.0)
    windows = (part for text in texts for part in _windows(tokenizer, text, start_id, length, stride))
    for batch in itertools.batched(windows, engine.plan.batch_size):
        total += _score(engine, batch, start_id, executed)
        if progress:
            progress(total)
    if not total.num_tokens:
        raise ValueError(f"{total.num_documents} texts without a token to score; give at least one that is not empty")
    return total


def _tokenizer(engine: Engine) -> Tokenizer:
    if engine.tokenizer is None:
        raise ValueError("this engine has no tokenizer, which texts need; add tokenizer.json to the model's directory")
    return engine.tokenizer


def _windows(tokenizer: Tokenizer, text: str, start_id: int, length: int, stride: int) -> Iterator[_Window]:
    """The windows of one document. Its bytes are shared out by tokens scored, so that they add up."""
    token_ids = [start_id, *tokenizer.encode(text, add_special_tokens=False)]
    left_tokens, left_bytes = len(token_ids) - 1, len(text.encode("utf-8"))
    for ids, num_context in cut_windows(token_ids, length, stride):
        num_scored = len(ids) - 1 - num_context
        num_bytes = left_bytes * num_scored // left_tokens if num_scored < left_tokens else left_bytes
        left_tokens, left_bytes = left_tokens - num_scored, left_bytes - num_bytes
        yield _Window(ids, num_context, num_bytes, ends_document=not left_tokens)


def _score(engine: Engine, batch: Sequence[_Window], start_id: int, executed: ExecutedGuess | None) -> Score:
    """The batch is filled up with windows that predict nothing: another batch size would be compiled anew."""
    missing = engine.plan.batch_size - len(batch)
    sequences = [*(window.token_ids for window in batch), *([[start_id]] * missing)]
    logprobs = engine.score(sequences, executed)
    scored = [row[window.num_context :] for row, window in zip(logprobs, batch, strict=False)]
    nats = -sum(float(row.sum(dtype=np.float64)) for row in scored)
    if not math.isfinite(nats):
        raise RuntimeError(
            f"the model's log-probabilities are not finite ({nats} nats in {len(batch)} windows): its weights are "
            f"damaged, or overflow in dtype={engine.config.dtype}; convert it again, or use another dtype"
        )
    return Score(
        num_documents=sum(window.ends_document for window in batch),
        num_tokens=sum(map(len, scored)),
        num_bytes=sum(window.num_bytes for window in batch),
        nats=nats,
    )
