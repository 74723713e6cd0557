"""jmoe's checkpoint directory: jmoe.json, one Orbax checkpoint of the trunk and one of each MoE layer's experts.

    jmoe.json            format, version, ModelConfig, fingerprint of the source; written last
    trunk/               Orbax: the trunk's parameters (paths as in `jmoe.model.families.trunk_shapes`)
    experts/00003/       Orbax: the experts of decoder layer 3, [E, 3, F, D]
    config.json, …       the source's own files, so that the directory needs nothing else

Arrays are restored straight into the sharding, and so the kind of memory, that is asked for, a layer at a time. They
are stored without compression (weights hardly shrink, and unpacking is slower than the disk) in chunks that are
read in parallel.
"""

import contextlib
import dataclasses
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from jmoe.config import DTYPE_BYTES, ModelConfig
from jmoe.model.families import trunk_shapes

Progress = Callable[[str, int, int], None]  # told (phase, bytes done, bytes in all)

FORMAT_VERSION = 1
MANIFEST = "jmoe.json"
_CHUNK_BYTES = 64 << 20


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What jmoe.json says: the model, and the SHA-256 of the tensors it was converted from."""

    config: ModelConfig
    fingerprint: str


def is_checkpoint(path: str | Path) -> bool:
    """Whether a whole jmoe checkpoint lies at `path`."""
    return (Path(path) / MANIFEST).is_file()


def read_config(path: str | Path) -> ModelConfig:
    """The model of a jmoe checkpoint. Raises what `read_manifest` raises."""
    return read_manifest(path).config


def read_manifest(path: str | Path) -> Manifest:
    """What jmoe.json says. Raises ValueError where no jmoe checkpoint is, RuntimeError for one that cannot be used."""
    path = Path(path)
    if not is_checkpoint(path):
        raise ValueError(f"{path}: {_what_is_there(path)}")
    file = path / MANIFEST
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        version, fingerprint = manifest["version"], manifest["fingerprint"]
        if version != FORMAT_VERSION:
            raise RuntimeError(
                f"{file}: format version {version}, but this jmoe reads version {FORMAT_VERSION}. "
                "Update jmoe, or convert the model again with this one."
            )
        return Manifest(ModelConfig.from_dict(manifest["config"], str(file)), fingerprint)
    except (ValueError, KeyError, TypeError) as error:
        raise RuntimeError(f"{file}: damaged ({type(error).__name__}: {error}). Convert the model again.") from error


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Writes jmoe.json, which makes the directory a checkpoint: call it last."""
    content = {"format": "jmoe", "version": FORMAT_VERSION, "fingerprint": manifest.fingerprint}
    text = json.dumps(content | {"config": manifest.config.to_dict()}, indent=2)
    (path / MANIFEST).write_text(text + "\n", encoding="utf-8")


def _what_is_there(path: Path) -> str:
    convert = f"Convert it: python tools/convert_hf.py {path} DESTINATION"
    if not path.exists():
        if incomplete_path(path).exists():
            return f"not there, but {incomplete_path(path)} is: its conversion was interrupted. Run it again."
        return f"no such directory; expected a jmoe checkpoint (with {MANIFEST})"
    if path.suffix == ".incomplete":
        return "a conversion that was interrupted. Run it again."
    if (path / "config.json").is_file():
        return f"a Hugging Face checkpoint, not a jmoe one (no {MANIFEST}). {convert}"
    return f"not a jmoe checkpoint: it has no {MANIFEST}"


def incomplete_path(destination: Path) -> Path:
    """Where a directory is written before it is whole."""
    return destination.with_name(destination.name + ".incomplete")


@contextlib.contextmanager
def new_directory(destination: Path, needed_bytes: int = 0) -> Iterator[Path]:
    """A directory to write into, which becomes `destination` when the block ends, and vanishes when it fails.

    What an earlier, killed run left is removed. Raises ValueError if `destination` holds anything, RuntimeError if
    less than `needed_bytes` are free.
    """
    destination = Path(os.path.abspath(destination))
    if destination.exists() and not (destination.is_dir() and not any(destination.iterdir())):
        raise ValueError(f"{destination}: already there and not empty. Remove it or choose another destination.")
    scratch = incomplete_path(destination)
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        free_bytes = shutil.disk_usage(scratch).free
        if free_bytes < needed_bytes:
            raise RuntimeError(
                f"{destination}: {needed_bytes} bytes are needed and {free_bytes} are free. "
                "Make room or choose another disk."
            )
        yield scratch
        os.replace(scratch, destination)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def save_trunk(path: Path, flat: Mapping[str, np.ndarray]) -> None:
    """Writes the trunk: arrays by flat path ("layers/0/router/kernel")."""
    _save(path / "trunk", flat)


def save_experts(path: Path, layer: int, array: np.ndarray) -> None:
    """Writes the experts of one layer, [E, 3, F, D]."""
    _save(_experts_path(path, layer), {"experts": array})


def load_trunk(path: str | Path, config: ModelConfig, sharding: jax.sharding.Sharding | None) -> dict[str, Any]:
    """The trunk's arrays by flat path, in this sharding and in `config.dtype`; without a sharding, numpy arrays.

    Raises RuntimeError if the trunk is missing, damaged or of another shape than `config` says, ValueError if the
    stored dtype cannot be cast to `config.dtype`.
    """
    return _restore(Path(path) / "trunk", trunk_shapes(config), config.dtype, sharding)


def load_experts(path: str | Path, config: ModelConfig, layer: int, sharding: jax.sharding.Sharding | None) -> Any:
    """The experts of one layer [E, 3, F, D] in this sharding and in `config.dtype`; without a sharding, a numpy array.

    While it loads, host memory holds the layer twice, once as read and once in place. Raises ValueError for a layer
    without experts and for a cast that is not supported, RuntimeError if the layer is missing, damaged or of another
    shape than `config` says.
    """
    if layer not in config.moe_layers:
        raise ValueError(
            f"layer {layer} has no experts; the layers that have: {', '.join(map(str, config.moe_layers))}"
        )
    shapes = {"experts": (config.num_experts, *config.expert_shape)}
    return _restore(_experts_path(Path(path), layer), shapes, config.dtype, sharding)["experts"]


def _experts_path(path: Path, layer: int) -> Path:
    return path / "experts" / f"{layer:05d}"


def _save(path: Path, flat: Mapping[str, np.ndarray]) -> None:
    save_args = {name: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES) for name in flat}
    arguments = ocp.args.PyTreeSave(_nested(flat), save_args=_nested(save_args))
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_compression=False)) as checkpointer:
        checkpointer.save(path.absolute(), args=arguments)


def _restore(
    path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str, sharding: jax.sharding.Sharding | None
) -> dict[str, Any]:
    if not path.is_dir():
        raise RuntimeError(f"{path}: missing from the checkpoint. Convert the model again.")
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        with _reading(path):
            metadata = checkpointer.metadata(path.absolute()).item_metadata
            if metadata is None:
                raise OSError("no usable metadata")
        _check_stored(path, _flat(metadata.tree), shapes, dtype)
        restore_args = {name: _restore_args(shape, dtype, sharding) for name, shape in shapes.items()}
        arguments = ocp.args.PyTreeRestore(restore_args=_nested(restore_args))
        with _reading(path):
            return _flat(checkpointer.restore(path.absolute(), args=arguments))


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turns whatever Orbax and TensorStore raise (many kinds, down to Exception itself) into RuntimeError."""
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError):  # the machine's fault, not the file's
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        raise RuntimeError(f"{path}: damaged, it cannot be read ({reason}). Convert the model again.") from error


def _restore_args(shape: tuple[int, ...], dtype: str, sharding: jax.sharding.Sharding | None) -> ocp.RestoreArgs:
    if sharding is None:
        return ocp.RestoreArgs(restore_type=np.ndarray, dtype=jnp.dtype(dtype))
    return ocp.ArrayRestoreArgs(sharding=sharding, global_shape=shape, dtype=jnp.dtype(dtype))


def _check_stored(path: Path, stored: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], dtype: str) -> None:
    wrong = [f"{name} is missing" for name in sorted(set(shapes) - set(stored))]
    wrong += [f"{name} is unknown" for name in sorted(set(stored) - set(shapes))]
    for name in sorted(set(shapes) & set(stored)):
        if tuple(stored[name].shape) != shapes[name]:
            wrong.append(f"{name} has shape {list(stored[name].shape)}, expected {list(shapes[name])}")
    if wrong:
        raise RuntimeError(f"{path}: not what the model needs: {some_of(wrong)}. Convert the model again.")
    dtypes = {str(array.dtype) for array in stored.values()} - {dtype}
    if dtype == "float16" and dtypes:
        raise ValueError(
            f"{path}: stored as {', '.join(sorted(dtypes))}; loading it as float16 could overflow unseen. "
            "Convert the model again with --dtype float16, which checks every value."
        )


def some_of(problems: list[str], limit: int = 20) -> str:
    """The first problems on one line, and how many more there are."""
    more = f"; and {len(problems) - limit} more" if len(problems) > limit else ""
    return "; ".join(problems[:limit]) + more


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for name, value in flat.items():
        *parents, last = name.split("/")
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return nested


def _flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in nested.items():
        flat |= _flat(value, f"{prefix}{name}/") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def checkpoint_bytes(config: ModelConfig) -> int:
    """Bytes of all the weights of a model, trunk and experts."""
    trunk_values = sum(math.prod(shape) for shape in trunk_shapes(config).values())
    return trunk_values * DTYPE_BYTES[config.dtype] + config.store_bytes
