"""Tuned routers in a file: a safetensors file of the routers' kernels alone, for one checkpoint and no other.

Tensors have the names and the layout of the Hugging Face checkpoint, as converters know them. The header's metadata
has one entry, `jmoe`: JSON with the format, its version, the checkpoint's fingerprint, how the routers were tuned and
what that changed.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as serialize

from jmoe.checkpoint import Manifest, some_of
from jmoe.config import ModelConfig
from jmoe.model import families
from jmoe.model.tensors import Leaf
from jmoe.whole_files import new_file

FORMAT, VERSION = "jmoe routers", 1


@dataclasses.dataclass(frozen=True, eq=False)
class RouterDelta:
    """Kernels [E, D] by flat path, the fingerprint of the checkpoint they belong to, and facts for people (JSON)."""

    routers: Mapping[str, np.ndarray]
    base_fingerprint: str
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """Of the checkpoint with these routers: what is learned of one routing is not that of another."""
        digest = hashlib.sha256(self.base_fingerprint.encode())
        for path in sorted(self.routers):
            digest.update(path.encode() + np.ascontiguousarray(self.routers[path]).tobytes())
        return digest.hexdigest()

    def save(self, file: str | Path, config: ModelConfig) -> None:
        """Writes the file, whole or not at all; one that is there is replaced. Raises ValueError for other tensors."""
        file, leaves = Path(file), router_leaves(config)
        _check(f"{file}", self.routers, {leaf.path: leaf.shape for leaf in leaves}, ValueError)
        tensors = {leaf.pieces[0].name: leaf.pieces[0].take(self.routers[leaf.path]) for leaf in leaves}
        header = {"format": FORMAT, "version": VERSION, "fingerprint": self.base_fingerprint, "facts": dict(self.facts)}
        with new_file(file) as scratch:
            scratch.write_bytes(serialize(tensors, metadata={"jmoe": json.dumps(header)}))

    @classmethod
    def read(cls, file: str | Path, manifest: Manifest) -> Self:
        """What `save` wrote for this checkpoint.

        Raises ValueError where no routers are and for those of another checkpoint, RuntimeError for a file that is
        damaged or does not have exactly the tensors of the checkpoint's routers.
        """
        file = Path(file)
        tensors, header = _read(file)
        if header["fingerprint"] != manifest.fingerprint:
            raise ValueError(
                f"{file}: routers of the checkpoint {header['fingerprint'][:16]}…, but this one is "
                f"{manifest.fingerprint[:16]}…; give the model that they were tuned for, or tune this one"
            )
        leaves = router_leaves(manifest.config)
        _check(f"{file}", tensors, {leaf.pieces[0].name: leaf.shape for leaf in leaves}, RuntimeError)
        routers = {leaf.path: tensors[leaf.pieces[0].name] for leaf in leaves}
        return cls(routers, header["fingerprint"], header["facts"])

    def applied_to(self, trunk: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The trunk's arrays by flat path with these routers, in the trunk's dtype."""
        return {**trunk, **{path: kernel.astype(trunk[path].dtype) for path, kernel in self.routers.items()}}


def router_leaves(config: ModelConfig) -> list[Leaf]:
    """The routers among the model's arrays, in the order of the layers; each is one Hugging Face tensor."""
    layers = (families.layer_leaves(config, layer) for layer in config.moe_layers)
    return [leaf for leaves in layers for leaf in leaves if leaf.path.endswith("/router/kernel")]


def _read(file: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Tensors by name, and the header of `save`."""
    if not file.is_file():
        raise ValueError(f"{file}: no such file; expected tuned routers, as python -m jmoe.tune_router writes them")
    try:
        with safe_open(file, framework="np") as opened:
            metadata = (opened.metadata() or {}).get("jmoe")
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (it is not a dict)
    except SafetensorError as error:
        raise RuntimeError(f"{file}: not a whole safetensors file ({error}). Tune again, or copy it again.") from error
    header = _header(metadata)
    if header is None:
        raise ValueError(f"{file}: a safetensors file, but not of tuned routers; give what jmoe.tune_router wrote")
    if header.get("version") != VERSION:
        raise RuntimeError(
            f"{file}: format version {header.get('version')}, but this jmoe reads version {VERSION}. Update jmoe."
        )
    if not isinstance(header.get("fingerprint"), str) or not isinstance(header.get("facts"), dict):
        raise RuntimeError(f"{file}: damaged, its header names no checkpoint. Tune again.")
    return tensors, header


def _header(metadata: str | None) -> dict[str, Any] | None:
    try:
        header = json.loads(metadata or "")
    except ValueError:
        return None
    return header if isinstance(header, dict) and header.get("format") == FORMAT else None


def _check(
    what: str, tensors: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]], kind: type[Exception]
) -> None:
    """Raises `kind` unless these are exactly the tensors, of these shapes, of numbers that are finite."""
    wrong = [f"{name} is missing" for name in shapes if name not in tensors]
    wrong += [f"{name} is no router of the model" for name in sorted(set(tensors) - set(shapes))]
    for name in sorted(set(shapes) & set(tensors)):
        if tensors[name].shape != shapes[name]:
            wrong.append(f"{name} has shape {list(tensors[name].shape)}, expected {list(shapes[name])}")
        elif not np.isfinite(tensors[name].astype(np.float32)).all():
            wrong.append(f"{name} holds numbers that are not finite")
    if wrong:
        raise kind(f"{what}: not the routers of the model: {some_of(wrong)}. Tune again.")
