"""Text to token ids and back: the tokenizer and chat template of a checkpoint, and text that arrives token by token.

`tokenizer.json` is read by the `tokenizers` library and chat templates are rendered by jinja2. That is what
transformers.AutoTokenizer does inside for such checkpoints, without the seconds that importing transformers takes; the
tests compare the two. No code of a checkpoint is run: templates are rendered in jinja2's immutable sandbox.
"""

import bisect
import dataclasses
import datetime
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox
import tokenizers

TOKENIZER_FILE = "tokenizer.json"
_REPLACEMENT = "\ufffd"  # stands for bytes that are no UTF-8, or not yet
_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

Message = Mapping[str, Any]  # {"role": "user", "content": "…"}


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """The tokenizer of a checkpoint. `eos_ids` end a sequence; `named_tokens` are what templates call bos_token, …"""

    inner: tokenizers.Tokenizer
    eos_ids: tuple[int, ...]
    chat_template: str | None = None
    named_tokens: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, special tokens that it spells out included."""
        return self.inner.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids; bytes that are no UTF-8 become U+FFFD."""
        return self.inner.decode([int(token_id) for token_id in ids], skip_special_tokens=skip_special_tokens)

    def apply_chat_template(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> list[int]:
        """Token ids of a conversation, ready for the assistant's answer.

        Raises ValueError if the checkpoint has no chat template or its template refuses these messages, RuntimeError
        if the template itself is broken.
        """
        return self.encode(self.render_chat(messages, add_generation_prompt), add_special_tokens=False)

    def render_chat(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The text of a conversation, as the chat template writes it. Raises as `apply_chat_template` does."""
        if self.chat_template is None:
            raise ValueError("this checkpoint has no chat template; give a plain prompt (on the terminal: no --chat)")
        try:
            template = _environment().from_string(self.chat_template)
            return template.render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self.named_tokens,
            )
        except _RefusedError as error:
            raise ValueError(f"the chat template refuses this conversation: {error}") from error
        except (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise RuntimeError(f"the checkpoint's chat template cannot be rendered: {error}. Correct it.") from error


class _RefusedError(jinja2.TemplateError):
    """A template called raise_exception."""


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %} … {% endgeneration %}` marks the assistant's words for training; here it is its content."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own interface)

    def parse(self, parser: Any) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> jinja2.Environment:
    """What Hugging Face chat templates are written for: trimmed blocks, loop controls, three functions of their own."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


def _to_json(value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    # jinja2's own filter escapes what HTML needs escaped, which is not what models were trained on
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> None:
    raise _RefusedError(message)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a checkpoint directory. Raises RuntimeError if its files are missing, damaged or at odds."""
    path = Path(path)
    file = path / TOKENIZER_FILE
    if not file.is_file():
        raise RuntimeError(
            f"{path}: no tokenizer.json, so text cannot be turned into token ids. Download the model's tokenizer files "
            "into it; for a model that has older ones only, transformers' AutoTokenizer writes tokenizer.json "
            "(save_pretrained)."
        )
    try:
        inner = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises Exception itself
        raise RuntimeError(f"{file}: not a usable tokenizer ({error}). Download it again.") from error
    inner.no_truncation()
    inner.no_padding()
    config = _read_object(path / "tokenizer_config.json")
    _check_added_tokens(path, inner, config)
    named = _named_tokens(config)
    return Tokenizer(inner, _eos_ids(path, inner, named), _chat_template(path, config), named)


def _read_object(file: Path) -> dict[str, Any]:
    """A JSON object; empty if the file is not there."""
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RuntimeError(f"{file}: not valid JSON ({error}). Download it again.") from error
    if not isinstance(value, dict):
        raise RuntimeError(f"{file}: holds a {type(value).__name__}, expected an object. Download it again.")
    return value


def _text_of(token: Any) -> str | None:
    """A token is written as its text, or as an object that holds it."""
    return token.get("content") if isinstance(token, Mapping) else token


def _check_added_tokens(path: Path, inner: tokenizers.Tokenizer, config: Mapping[str, Any]) -> None:
    listed = {int(token_id): _text_of(token) for token_id, token in config.get("added_tokens_decoder", {}).items()}
    wrong = [f"{token_id}: {text!r}" for token_id, text in listed.items() if inner.id_to_token(token_id) != text]
    if wrong:
        raise RuntimeError(
            f"{path}: tokenizer_config.json lists tokens that tokenizer.json does not have at that id "
            f"({', '.join(wrong[:5])}). Download both files again, of one version of the model."
        )


def _named_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    texts = {name: _text_of(config.get(name)) for name in _NAMED_TOKENS}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _eos_ids(path: Path, inner: tokenizers.Tokenizer, named_tokens: Mapping[str, str]) -> tuple[int, ...]:
    """End-of-sequence ids: of generation_config.json, else config.json, else the tokenizer's eos_token."""
    for name in ("generation_config.json", "config.json"):
        found = _read_object(path / name).get("eos_token_id")
        if found is not None:
            return tuple(found) if isinstance(found, list) else (found,)
    token_id = inner.token_to_id(named_tokens.get("eos_token", ""))
    return () if token_id is None else (token_id,)


def _chat_template(path: Path, config: Mapping[str, Any]) -> str | None:
    """The template, of the places where releases have put it; of several named ones, the one called "default"."""
    if (path / "chat_template.jinja").is_file():
        return (path / "chat_template.jinja").read_text(encoding="utf-8")
    template = config.get("chat_template") or _read_object(path / "chat_template.json").get("chat_template")
    if isinstance(template, list):
        return {entry["name"]: entry["template"] for entry in template}.get("default")
    return template


class TextStream:
    """Turns the token ids of one sequence into text that may be shown at once.

    What `push` returns never ends in half a character and never holds what might be the beginning of a `stop` string.
    As soon as a stop string is complete, `stopped` is true, the text is what stood before it, and `num_tokens` of the
    pushed tokens belong to that text. Until then `num_tokens` counts all of them.
    """

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...] = ()) -> None:
        self.stopped = False
        self.num_tokens = 0
        self._tokenizer = tokenizer
        self._stop = stop
        # Only a window of ids is decoded: from the last but one id that ended a whole character.
        self._window: list[int] = []
        self._num_clean = 0  # ids of the window up to its last whole character
        self._num_seen = 0  # characters of the window's text that were taken
        self._held = ""  # taken, but not returned, since a stop string might begin in it
        self._num_shown = 0  # characters returned
        self._lengths = [0]  # characters taken after each number of tokens

    def push(self, token_ids: Iterable[int]) -> str:
        """Takes the next ids; returns the new text that may be shown."""
        shown = ""
        for token_id in token_ids:
            if self.stopped:
                break
            self._window.append(int(token_id))
            self.num_tokens += 1
            new = self._new_text()
            self._lengths.append(self._lengths[-1] + len(new))
            shown += self._show(new, last=False)
        return shown

    def flush(self) -> str:
        """The rest of the text, at the end of the sequence."""
        if self.stopped:
            return ""
        new = self._tokenizer.decode(self._window)[self._num_seen :]
        self._num_seen += len(new)
        self._lengths[-1] += len(new)
        return self._show(new, last=True)

    def _new_text(self) -> str:
        """The characters that the last id completed."""
        text = self._tokenizer.decode(self._window)
        whole = text.rstrip(_REPLACEMENT)  # it may be a character whose other bytes are still to come
        new = whole[self._num_seen :]
        self._num_seen = max(self._num_seen, len(whole))
        if new and whole == text:
            # The ids before stay in the window: a decoder may treat the first token of a text differently.
            self._window = self._window[self._num_clean :]
            self._num_clean = len(self._window)
            self._num_seen = len(self._tokenizer.decode(self._window))
        return new

    def _show(self, new: str, *, last: bool) -> str:
        """Adds new text; returns what is certain to stand before any stop string."""
        self._held += new
        num_ready = self._first_stop()
        if num_ready is not None:
            self.stopped = True
            self.num_tokens = bisect.bisect_left(self._lengths, self._num_shown + num_ready)
        else:
            num_ready = len(self._held) - (0 if last else self._num_maybe_stop())
        shown, self._held = self._held[:num_ready], self._held[num_ready:]
        self._num_shown += num_ready
        return shown

    def _first_stop(self) -> int | None:
        """Where in the held text the stop string begins that is complete first; None if none is."""
        found = [(at + len(stop), at) for stop in self._stop if (at := self._held.find(stop)) >= 0]
        return min(found)[1] if found else None

    def _num_maybe_stop(self) -> int:
        """Length of the longest end of the held text that a stop string begins with."""
        longest = min(len(self._held), max(map(len, self._stop), default=1) - 1)
        sizes = range(longest, 0, -1)
        return next((n for n in sizes if any(stop.startswith(self._held[-n:]) for stop in self._stop)), 0)
