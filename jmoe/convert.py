"""From a Hugging Face checkpoint (safetensors) to a jmoe one, a decoder layer at a time."""

import dataclasses
import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jmoe import checkpoint, hf_files
from jmoe.checkpoint import Progress
from jmoe.config import DTYPES, ModelConfig
from jmoe.hf_files import DTYPE_CODES, ShardReader, Shards, TensorInfo
from jmoe.model import families
from jmoe.model.tensors import Leaf, Piece


def convert_hf(
    source: str | Path, destination: str | Path, *, dtype: str | None = None, progress: Progress | None = None
) -> bool:
    """Writes the jmoe checkpoint of a Hugging Face one; False if `destination` already is just that and was kept.

    `dtype` casts the weights; without it they have to be of the dtype that config.json names, and stay as they are.
    `progress` is called with (phase, bytes done, bytes in all). Host memory holds the trunk and about two layers of
    experts. Interrupted at any point, nothing is left at `destination`.

    Raises ValueError, before anything is written, for a source that is damaged, incomplete or not supported (it lists
    everything that is wrong) and for a destination that holds something else; RuntimeError for a full disk.
    """
    source, destination = Path(source), Path(destination)
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is not supported; expected one of {', '.join(DTYPES)}")
    hf = hf_files.read_json(source / "config.json")
    shards = hf_files.read_shards(source)
    config = families.read_hf_config(hf, str(source / "config.json"), dtype or _dtype_of(hf, shards))
    leaves = families.all_leaves(config, _layout_of(config, shards.tensors))
    _check(source, shards, leaves, None if dtype else config.dtype)
    report = _Report(progress, sum(info.num_bytes for info in shards.tensors.values()))
    if checkpoint.is_checkpoint(destination):
        _require_same(destination, config, shards.tensors, report)
        return False
    with checkpoint.new_directory(destination, checkpoint.checkpoint_bytes(config)) as scratch:
        digests = _write_leaves(scratch, config, leaves, shards.tensors, report)
        hf_files.copy_files(source, scratch)
        checkpoint.write_manifest(scratch, checkpoint.Manifest(config, _fingerprint(shards.tensors, digests)))
    return True


def _dtype_of(hf: Mapping[str, Any], shards: Shards) -> str | None:
    """The tensors' own dtype for a config.json that names none; None where it does, or where they differ."""
    if hf.get("torch_dtype") or hf.get("dtype"):
        return None
    codes = {info.dtype_code for info in shards.tensors.values()}
    return DTYPE_CODES.get(codes.pop()) if len(codes) == 1 else None


def _layout_of(config: ModelConfig, names: Iterable[str]) -> families.Layout:
    fused = {piece.name for piece in families.expert_leaf(config, config.moe_layers[0], "fused").pieces}
    return "fused" if fused & set(names) else "per_expert"


def _check(source: Path, shards: Shards, leaves: Iterable[Leaf], dtype: str | None) -> None:
    """Raises ValueError listing all that keeps the tensors from filling the leaves exactly, each tensor used once."""
    pieces = {piece.name: piece for leaf in leaves for piece in leaf.pieces}
    problems = list(shards.problems)
    problems += [f"{name} is missing" for name in pieces if name not in shards.tensors]
    for name, info in shards.tensors.items():
        if name not in pieces:
            problems.append(f"{name} {list(info.shape)} is unknown")
        elif info.shape != pieces[name].shape:
            problems.append(f"{name} has shape {list(info.shape)}, expected {list(pieces[name].shape)}")
        elif info.dtype_code not in DTYPE_CODES:
            problems.append(f"{name} is {info.dtype_code}, expected {' or '.join(DTYPE_CODES)}")
        elif dtype not in (None, DTYPE_CODES[info.dtype_code]):
            problems.append(f"{name} is {info.dtype_code}, config.json says {dtype} (give a dtype to cast to)")
    if problems:
        raise ValueError(
            f"{source}: {len(problems)} problem(s) with its tensors: {checkpoint.some_of(problems)}. "
            "Download the model again, or correct its config.json."
        )


@dataclasses.dataclass
class _Report:
    """Counts bytes and tells the caller."""

    progress: Progress | None
    total_bytes: int
    done_bytes: int = 0

    def add(self, phase: str, num_bytes: int) -> None:
        self.done_bytes += num_bytes
        if self.progress is not None:
            self.progress(phase, self.done_bytes, self.total_bytes)


def _require_same(destination: Path, config: ModelConfig, tensors: Mapping[str, TensorInfo], report: _Report) -> None:
    """Raises ValueError unless the checkpoint at `destination` was made of these very tensors, with this config."""
    stored = checkpoint.read_manifest(destination)
    digests = {}
    if stored.config == config:
        with ShardReader(tensors) as reader:
            for name, info in tensors.items():
                digests[name] = _digest(reader.read(name))
                report.add("comparing", info.num_bytes)
    if not digests or stored.fingerprint != _fingerprint(tensors, digests):
        raise ValueError(
            f"{destination}: already a jmoe checkpoint, of another model or dtype. "
            "Remove it or choose another destination."
        )


def _write_leaves(
    scratch: Path, config: ModelConfig, leaves: Sequence[Leaf], tensors: Mapping[str, TensorInfo], report: _Report
) -> dict[str, str]:
    """Saves every leaf, experts as soon as a layer is whole and the trunk at the end. Returns the tensors' digests."""
    trunk: dict[str, np.ndarray] = {}
    digests: dict[str, str] = {}
    with ShardReader(tensors) as reader, ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for leaf in leaves:
            array = np.empty(leaf.shape, jnp.dtype(config.dtype))
            fill = _Filler(reader, array)
            for piece, digest in zip(leaf.pieces, pool.map(fill, leaf.pieces), strict=True):
                digests[piece.name] = digest
                report.add(leaf.path, tensors[piece.name].num_bytes)
            if leaf.expert_layer is None:
                trunk[leaf.path] = array
            else:
                checkpoint.save_experts(scratch, leaf.expert_layer, array)
    checkpoint.save_trunk(scratch, trunk)
    return digests


@dataclasses.dataclass(frozen=True)
class _Filler:
    """Reads one tensor into its place in the leaf and returns its digest; runs in several threads."""

    reader: ShardReader
    leaf: np.ndarray

    def __call__(self, piece: Piece) -> str:
        tensor = self.reader.read(piece.name)
        if tensor.dtype == self.leaf.dtype and tensor.dtype.itemsize == 2:
            piece.put(self.leaf.view(np.uint16), tensor.view(np.uint16))  # numpy moves integers faster than bfloat16
        else:
            with np.errstate(over="ignore"):  # the check below says it better
                piece.put(self.leaf, tensor)
            self._require_in_range(piece, tensor)
        return _digest(tensor)

    def _require_in_range(self, piece: Piece, tensor: np.ndarray) -> None:
        if self.leaf.dtype != np.float16 or np.isfinite(self.leaf[piece.index]).all():
            return
        if np.isfinite(tensor).all():
            raise ValueError(f"{piece.name}: holds values beyond float16's range (65504). Choose bfloat16 or float32.")


def _digest(tensor: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8)).hexdigest()


def _fingerprint(tensors: Mapping[str, TensorInfo], digests: Mapping[str, str]) -> str:
    """SHA-256 of names, shapes, dtypes and contents; how they are spread over shards does not matter."""
    lines = [f"{name} {list(info.shape)} {info.dtype_code} {digests[name]}" for name, info in sorted(tensors.items())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
