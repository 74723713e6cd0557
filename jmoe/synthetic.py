"""Random-weight Hugging Face checkpoints of true shapes: for tests, and to measure speed without a download."""

import hashlib
import itertools
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, get_args

import jax.numpy as jnp
import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from jmoe import checkpoint, hf_files
from jmoe.checkpoint import Progress
from jmoe.config import ModelConfig
from jmoe.model import families
from jmoe.model.tensors import Piece

Regime = Literal["sticky", "flat"]

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_STICKY_STD = 0.02
_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def init_mean(name: str) -> float:
    """Mean of a random parameter: 1 for the scale of a norm, 0 for anything else. Takes the names init_std takes."""
    return 1.0 if "norm" in name else 0.0


def init_std(name: str, shape: Sequence[int], regime: Regime) -> float:
    """Standard deviation of a random parameter; 0 for a norm's scale, which is all ones.

    `sticky` is 0.02 everywhere, as models are initialised: the residual stream keeps the token's embedding, so routing
    changes little from layer to layer and token to token. `flat` is 1/sqrt(fan_in), with embeddings of unit variance:
    every layer has its say and routing is close to uniform.

    `name` is a Hugging Face tensor or a path of the trunk and `shape` is its shape, [..., out, in]. Raises ValueError
    for another regime, and for jmoe's expert array [E, 3, F, D], whose parts have different scales: ask for each
    projection by its Hugging Face name.
    """
    if regime not in get_args(Regime):
        raise ValueError(f"regime={regime!r} is unknown; expected one of {', '.join(get_args(Regime))}")
    if len(shape) > 3:
        raise ValueError(f"{name} {list(shape)}: gate, up and down differ in scale; ask for the [out, in] of each")
    if init_mean(name) == 1.0:
        return 0.0
    if regime == "sticky" or len(shape) == 1:  # a bias has no fan-in
        return _STICKY_STD
    return 1.0 if "embed" in name else 1 / math.sqrt(shape[-1])


def write_synthetic(
    config: ModelConfig,
    destination: str | Path,
    *,
    regime: Regime,
    seed: int,
    max_shard_bytes: int = 5_000_000_000,
    progress: Progress | None = None,
) -> None:
    """Writes a Hugging Face checkpoint of random weights with a byte-level tokenizer; same arguments, same bytes.

    Interrupted at any point, nothing is left at `destination`. Raises ValueError for an unknown regime, a vocabulary
    too small for the tokenizer or a `destination` that is not empty, RuntimeError for a full disk.
    """
    tokenizer = byte_tokenizer(config.vocab_size)
    init_std("", (1, 1), regime)  # refuses an unknown regime before anything is written
    pieces = [piece for leaf in families.all_leaves(config) for piece in leaf.pieces]
    with checkpoint.new_directory(Path(destination), checkpoint.checkpoint_bytes(config)) as scratch:
        tensors = _random_tensors(pieces, config.dtype, regime, seed)
        hf_files.write_shards(scratch, config.dtype, pieces, tensors, max_shard_bytes, progress)
        tokenizer.save(str(scratch / "tokenizer.json"))
        for name, content in _json_files(config, tokenizer).items():
            hf_files.write_json(scratch / name, content)


def _random_tensors(pieces: Sequence[Piece], dtype: str, regime: Regime, seed: int) -> Iterator[np.ndarray]:
    def draw(piece: Piece) -> np.ndarray:
        name_seed = int.from_bytes(hashlib.sha256(piece.name.encode()).digest()[:16])
        generator = np.random.default_rng([seed, name_seed])
        values = generator.standard_normal(piece.shape, np.float32)
        values *= init_std(piece.name, piece.shape, regime)
        values += init_mean(piece.name)
        return values.astype(jnp.dtype(dtype))

    with ThreadPoolExecutor() as pool:  # numpy draws outside of Python's lock
        for batch in itertools.batched(pieces, 32):
            yield from pool.map(draw, batch)


def byte_tokenizer(vocab_size: int) -> Tokenizer:
    """A tokenizer whose ids are the 256 bytes, then SPECIAL_TOKENS. Raises ValueError if they do not fit."""
    num_ids = 256 + len(SPECIAL_TOKENS)
    if vocab_size < num_ids:
        raise ValueError(f"vocab_size={vocab_size} is too small for the byte tokenizer; expected at least {num_ids}")
    alphabet = {_byte_character(value): value for value in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return tokenizer


def _byte_character(value: int) -> str:
    """The printable character by which byte-level BPE (GPT-2) writes a byte: itself, or one from 256 on in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    if value in printable:
        return chr(value)
    return chr(256 + [byte for byte in range(256) if byte not in printable].index(value))


def _json_files(config: ModelConfig, tokenizer: Tokenizer) -> dict[str, dict[str, Any]]:
    endoftext, _, im_end = SPECIAL_TOKENS
    ids = {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}
    token_ids: dict[str, Any] = {"bos_token_id": ids[endoftext], "eos_token_id": ids[im_end]}
    return {
        "config.json": families.to_hf_config(config) | token_ids,
        "generation_config.json": token_ids
        | {"eos_token_id": [ids[im_end], ids[endoftext]], "pad_token_id": ids[endoftext], "do_sample": False},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": im_end,
            "pad_token": endoftext,
            "additional_special_tokens": [SPECIAL_TOKENS[1]],
            "clean_up_tokenization_spaces": False,
            "model_max_length": config.max_position_embeddings,
            "chat_template": _CHAT_TEMPLATE,
        },
    }
