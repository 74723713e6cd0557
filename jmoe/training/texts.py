"""Texts to train on and to hold out: files and directories as documents, and documents as token ids."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from jmoe.evaluation import start_token
from jmoe.tokenizer import Tokenizer
from jmoe.training.batches import Batches
from jmoe.training.config import RouterTuningConfig
from jmoe.training.loop import HeldOut

HELD_OUT_EVERY = 20  # documents, where none are held out on purpose


@dataclasses.dataclass(frozen=True)
class Texts:
    """Documents by name: to train on, and held out."""

    train: Mapping[str, str]
    held_out: Mapping[str, str]

    @classmethod
    def read(cls, train: Iterable[Path], held_out: Iterable[Path]) -> "Texts":
        """Of files and directories; without a held-out one, every twentieth document of the text is held out.

        Raises ValueError for a path that is not there, a named file that is not UTF-8, and too few documents.
        """
        texts, given = (
            {name: text for path in paths for name, text in _documents(path)} for paths in (train, held_out)
        )
        if given:
            return cls({name: text for name, text in texts.items() if name not in given}, given)
        names = sorted(texts)
        if len(names) < HELD_OUT_EVERY:
            raise ValueError(
                f"{len(names)} documents to train on and none held out; give --held-out, or at least "
                f"{HELD_OUT_EVERY} documents, of which every {HELD_OUT_EVERY}th is held out"
            )
        kept_back = set(names[HELD_OUT_EVERY // 2 :: HELD_OUT_EVERY])
        return cls(*({name: texts[name] for name in names if (name in kept_back) == held} for held in (False, True)))

    def held_out_at_most(self, num_bytes: int | None) -> dict[str, str]:
        """Whole held-out documents, in an order without a pattern, until they have so many bytes; at least one."""
        if num_bytes is None:
            return dict(self.held_out)
        names = sorted(self.held_out)
        chosen: dict[str, str] = {}
        for n in np.random.default_rng(0).permutation(len(names)):
            size = sum(len(text.encode()) for text in chosen.values())
            if size < num_bytes:
                chosen[names[n]] = self.held_out[names[n]]
        return chosen


def _documents(path: Path) -> Iterable[tuple[str, str]]:
    """A file, or all the UTF-8 files below a directory, by path."""
    if not path.exists():
        raise ValueError(f"{path}: no such file or directory; expected text to train on or to hold out")
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if not file.is_file():
            continue
        try:
            text = file.read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            if not path.is_dir():
                raise ValueError(f"{file}: not UTF-8 text ({error}); convert it, or leave it out") from error
            continue
        if text.strip():
            yield str(file.resolve()), text


def encode(tokenizer: Tokenizer, texts: Iterable[str]) -> list[np.ndarray]:
    """Token ids of each text, as the narrowest integers that hold the vocabulary."""
    dtype = np.uint16 if tokenizer.inner.get_vocab_size() < 2**16 else np.int32
    encodings = tokenizer.inner.encode_batch_fast(list(texts), add_special_tokens=False)
    return [np.array(encoding.ids, dtype) for encoding in encodings]


def prepare(
    texts: Texts, tokenizer: Tokenizer, tuning: RouterTuningConfig, held_out_bytes: int | None = None
) -> tuple[Batches, HeldOut]:
    """Batches to train on and held-out windows. Raises ValueError for too little text."""
    start_id, length = start_token(tokenizer, tokenizer.eos_ids), tuning.sequence_length
    kept_back: Sequence[str] = list(texts.held_out_at_most(held_out_bytes).values())
    if not kept_back or not texts.train:
        raise ValueError(f"{len(texts.train)} documents to train on and {len(kept_back)} held out; give text of both")
    batches = Batches(encode(tokenizer, texts.train.values()), start_id, tuning.batch_size, length, tuning.seed)
    num_bytes = sum(len(text.encode()) for text in kept_back)
    return batches, HeldOut.cut(encode(tokenizer, kept_back), start_id, num_bytes, length)
