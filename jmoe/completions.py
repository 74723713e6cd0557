"""What a generation hands back, and one prompt's tokens and text on the way there."""

import dataclasses
from collections.abc import Sequence

from jmoe.tokenizer import TextStream


@dataclasses.dataclass(frozen=True)
class Delta:
    """New tokens of prompt `index`, and the text that may be shown now (some may be held back)."""

    index: int
    text: str
    token_ids: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Completion:
    """What became of one prompt. `finish_reason` is "eos", "stop" (a stop string), "length", or "unfinished".

    `token_ids` end with the end of sequence if that came; `text` has neither it nor the stop string.
    """

    index: int
    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    finish_reason: str


class PromptInProgress:
    """One prompt's tokens and text so far."""

    def __init__(self, index: int, prompt: Sequence[int], stream: TextStream | None):
        self.index, self.prompt, self.stream = index, prompt, stream
        self.budget = 0  # tokens that it may produce; known when its batch starts
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []
        self.text = ""

    @property
    def stopped(self) -> bool:
        return self.stream is not None and self.stream.stopped

    def push(self, token_ids: Sequence[int], logprobs: Sequence[float]) -> Delta:
        self.token_ids += token_ids
        self.logprobs += logprobs
        text = self.stream.push(list(token_ids)) if self.stream else ""
        self.text += text
        return Delta(self.index, text, tuple(token_ids))

    def flush(self) -> Delta:
        text = self.stream.flush() if self.stream else ""
        self.text += text
        return Delta(self.index, text, ())

    def completion(self, eos_ids: Sequence[int]) -> Completion:
        ended = bool(self.token_ids) and self.token_ids[-1] in eos_ids
        full = bool(self.token_ids) and len(self.token_ids) == self.budget
        reason = "stop" if self.stopped else "eos" if ended else "length" if full else "unfinished"
        keep = self.stream.num_tokens if self.stopped and self.stream else len(self.token_ids)
        return Completion(
            self.index, tuple(self.prompt), tuple(self.token_ids[:keep]), tuple(self.logprobs[:keep]), self.text, reason
        )
