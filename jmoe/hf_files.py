"""The files of a Hugging Face checkpoint: config.json and its like, and safetensors in one file or in shards."""

import contextlib
import dataclasses
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from jmoe.checkpoint import Progress, some_of
from jmoe.model.tensors import Piece

DTYPE_CODES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}  # safetensors' names
_COPIED_FILES = tuple(
    "config.json generation_config.json tokenizer.json tokenizer_config.json tokenizer.model vocab.json vocab.txt "
    "merges.txt special_tokens_map.json added_tokens.json chat_template.jinja chat_template.json LICENSE".split()
)
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_AGAIN = "Download it again."


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """What a header says of a tensor: shape, safetensors' dtype code, and the shard that holds it."""

    shape: tuple[int, ...]
    dtype_code: str
    shard: Path

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor; it has to be of one of the dtypes of DTYPE_CODES."""
        return math.prod(self.shape) * jnp.dtype(DTYPE_CODES[self.dtype_code]).itemsize


@dataclasses.dataclass(frozen=True)
class Shards:
    """The tensors of a Hugging Face checkpoint by name, as its headers say, and what is wrong with them already."""

    tensors: Mapping[str, TensorInfo]
    problems: tuple[str, ...]


def copy_files(source: Path, destination: Path) -> None:
    """Copies what a checkpoint has beside its weights: configuration, tokenizer, chat template, licence."""
    for name in _COPIED_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, destination / name)


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object. Raises ValueError, naming the file, if there is none or it cannot be parsed."""
    if not file.is_file():
        raise ValueError(f"{file}: no such file; expected a Hugging Face checkpoint (config.json and *.safetensors)")
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: not valid JSON ({error}). {_AGAIN}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file}: holds a {type(value).__name__}, expected an object. {_AGAIN}")
    return value


def write_json(file: Path, value: Mapping[str, Any]) -> None:
    """Writes a JSON object as Hugging Face does: indented by two."""
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def read_shards(source: Path) -> Shards:
    """Reads the headers of all shards. Raises ValueError if one is missing or damaged, or if there are none."""
    weight_map = _weight_map(source)
    names = [_SINGLE] if weight_map is None else sorted(set(weight_map.values()))
    missing = [name for name in names if not (source / name).is_file()]
    if missing:
        raise ValueError(f"{source}: {_INDEX} names {some_of(missing)}, which is not there. {_AGAIN}")
    tensors: dict[str, TensorInfo] = {}
    problems = []
    for name in names:
        for tensor, info in _read_header(source / name).items():
            if tensor in tensors:
                problems.append(f"{tensor} is in two shards, {tensors[tensor].shard.name} and {name}")
            elif weight_map is not None and weight_map.get(tensor, name) != name:
                problems.append(f"{tensor} is in {name}, but the index says {weight_map[tensor]}")
            tensors[tensor] = info
    for tensor, name in (weight_map or {}).items():
        if tensor not in tensors:
            problems.append(f"{tensor} is in the index, but not in {name}")
    return Shards(tensors, tuple(problems))


def _weight_map(source: Path) -> Mapping[str, str] | None:
    """Shard names by tensor name, from the index; None if there is just one file."""
    has_index, has_single = (source / _INDEX).is_file(), (source / _SINGLE).is_file()
    if has_index and has_single:
        raise ValueError(f"{source}: both {_INDEX} and {_SINGLE} are there. Remove the one that does not belong.")
    if has_single:
        return None
    if not has_index:
        raise ValueError(f"{source}: {_why_no_weights(source)}")
    weight_map = read_json(source / _INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(_is_file_name(name) for name in weight_map.values()):
        raise ValueError(f"{source / _INDEX}: weight_map has to name safetensors files beside it. {_AGAIN}")
    return weight_map


def _why_no_weights(source: Path) -> str:
    shards = sorted(file.name for file in source.glob("*.safetensors"))
    if shards:
        return f"{some_of(shards, 3)} but no {_INDEX}. {_AGAIN}"
    pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in source.glob(pattern))
    if pickles:
        return (
            f"only {some_of(pickles, 3)}; jmoe reads safetensors alone, since unpickling can run any code. "
            "Download the model's safetensors files."
        )
    return f"neither {_SINGLE} nor {_INDEX} is there. {_AGAIN}"


def _is_file_name(name: object) -> bool:
    return isinstance(name, str) and name == os.path.basename(name) and name.endswith(".safetensors")


def _read_header(file: Path) -> dict[str, TensorInfo]:
    try:
        with safe_open(file, framework="np") as opened:
            views = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (it is not a dict)
            return {name: TensorInfo(tuple(view.get_shape()), view.get_dtype(), file) for name, view in views.items()}
    except SafetensorError as error:
        actual, expected = file.stat().st_size, _expected_bytes(file)
        sizes = f"{actual} bytes" + (f", its header asks for {expected}" if expected not in (None, actual) else "")
        raise ValueError(f"{file}: not a whole safetensors file ({sizes}: {error}). {_AGAIN}") from error


def _expected_bytes(file: Path) -> int | None:
    """The size that the header of a safetensors file asks for, or None if even that cannot be read."""
    with file.open("rb") as stream:
        header_bytes = int.from_bytes(stream.read(8), "little")
        if 8 + header_bytes > file.stat().st_size:
            return 8 + header_bytes
        try:
            header = json.loads(stream.read(header_bytes))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
            return 8 + header_bytes + max(ends, default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            return None


class ShardReader(contextlib.ExitStack):
    """Reads tensors by name, from several threads if need be, keeping the shards open (they are memory-mapped)."""

    def __init__(self, tensors: Mapping[str, TensorInfo]) -> None:
        super().__init__()
        self._tensors = tensors
        shards = {info.shard for info in tensors.values()}
        self._open = {shard: self.enter_context(safe_open(shard, framework="np")) for shard in shards}

    def read(self, name: str) -> np.ndarray:
        return self._open[self._tensors[name].shard].get_tensor(name)


def write_shards(
    directory: Path,
    dtype: str,
    pieces: Sequence[Piece],
    tensors: Iterator[np.ndarray],
    max_shard_bytes: int,
    progress: Progress | None = None,
) -> None:
    """Streams tensors, given in the order of `pieces`, into safetensors shards; with an index if there are several.

    A shard is larger than `max_shard_bytes` only if a single tensor is. Raises ValueError if that is not positive.
    """
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes={max_shard_bytes} must be at least 1")
    groups = _grouped(pieces, jnp.dtype(dtype).itemsize, max_shard_bytes)
    names = [f"model-{n:05d}-of-{len(groups):05d}.safetensors" for n in range(1, len(groups) + 1)]
    shards = dict(zip(names if len(groups) > 1 else [_SINGLE], groups, strict=True))
    total_bytes = sum(math.prod(piece.shape) for piece in pieces) * jnp.dtype(dtype).itemsize
    done_bytes = 0
    for name, group in shards.items():
        with (directory / name).open("wb") as file:
            file.write(_header(group, dtype))
            for piece in group:
                done_bytes += file.write(_contents(next(tensors), piece, dtype))
                if progress is not None:
                    progress(name, done_bytes, total_bytes)
    if len(groups) > 1:
        weight_map = {piece.name: name for name, group in shards.items() for piece in group}
        index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(directory / _INDEX, index)


def _grouped(pieces: Sequence[Piece], itemsize: int, max_shard_bytes: int) -> list[list[Piece]]:
    groups: list[list[Piece]] = [[]]
    filled_bytes = 0
    for piece in pieces:
        num_bytes = math.prod(piece.shape) * itemsize
        if groups[-1] and filled_bytes + num_bytes > max_shard_bytes:
            groups.append([])
            filled_bytes = 0
        groups[-1].append(piece)
        filled_bytes += num_bytes
    return groups


def _header(pieces: Sequence[Piece], dtype: str) -> bytes:
    """A safetensors header: its length in 8 bytes, then JSON padded to a multiple of 8 so that tensors are aligned."""
    code = next(code for code, name in DTYPE_CODES.items() if name == dtype)
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for piece in pieces:
        stop = start + math.prod(piece.shape) * jnp.dtype(dtype).itemsize
        entries[piece.name] = {"dtype": code, "shape": piece.shape, "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _contents(tensor: np.ndarray, piece: Piece, dtype: str) -> memoryview:
    if tensor.shape != piece.shape or tensor.dtype != jnp.dtype(dtype):
        raise RuntimeError(f"{piece.name}: got {tensor.dtype}{tensor.shape}, expected {dtype}{piece.shape}")
    return np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data
