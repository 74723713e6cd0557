"""From a jmoe checkpoint back to a Hugging Face one, with the tensor names and layout of released checkpoints."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from jmoe import checkpoint, hf_files
from jmoe.checkpoint import Progress
from jmoe.config import ModelConfig
from jmoe.model import families
from jmoe.model.tensors import Leaf
from jmoe.router_delta import RouterDelta


def export_hf(
    source: str | Path,
    destination: str | Path,
    *,
    router: str | Path | None = None,
    max_shard_bytes: int = 5_000_000_000,
    progress: Progress | None = None,
) -> None:
    """Writes the Hugging Face checkpoint of a jmoe one, bit for bit the tensors that were converted.

    With `router`, a file of tuned routers (`jmoe.router_delta`), those are written instead of the checkpoint's own.
    `progress` is called with (phase, bytes done, bytes in all). Interrupted at any point, nothing is left at
    `destination`. Raises ValueError if `source` is no jmoe checkpoint, `destination` is not empty, `max_shard_bytes` is
    not positive or `router` is of another checkpoint, RuntimeError if a file is damaged or the disk is full.
    """
    source, destination = Path(source), Path(destination)
    manifest = checkpoint.read_manifest(source)
    config, delta = manifest.config, None if router is None else RouterDelta.read(router, manifest)
    leaves = families.all_leaves(config)
    pieces = [piece for leaf in leaves for piece in leaf.pieces]
    with checkpoint.new_directory(destination, checkpoint.checkpoint_bytes(config)) as scratch:
        tensors = _tensors(source, config, leaves, delta)
        hf_files.write_shards(scratch, config.dtype, pieces, tensors, max_shard_bytes, progress)
        hf_files.copy_files(source, scratch)
        _correct_dtype(scratch / "config.json", config)


def _tensors(
    source: Path, config: ModelConfig, leaves: Iterable[Leaf], delta: RouterDelta | None
) -> Iterator[np.ndarray]:
    """Every tensor in order, holding the trunk and one layer of experts."""
    trunk = checkpoint.load_trunk(source, config, None)
    trunk = trunk if delta is None else delta.applied_to(trunk)
    for leaf in leaves:
        if leaf.expert_layer is None:
            array = trunk.pop(leaf.path)
        else:
            array = checkpoint.load_experts(source, config, leaf.expert_layer, None)
        for piece in leaf.pieces:
            yield piece.take(array)


def _correct_dtype(file: Path, config: ModelConfig) -> None:
    """Keeps the source's config.json but for the dtype, which converting may have changed."""
    hf = hf_files.read_json(file)
    if families.read_hf_config(hf, str(file)).dtype != config.dtype:
        hf["dtype" if "dtype" in hf else "torch_dtype"] = config.dtype
        hf_files.write_json(file, hf)
