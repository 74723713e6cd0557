"""How alike the experts of each layer are: measured once for a checkpoint, and kept in a file beside it.

An npz without pickles: `header`, a string of JSON (format, version, fingerprint of the checkpoint), and `distances`
[L, E, E]. See `jmoe.experts.draft.nearest_kept` for its use.
"""

import json
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jmoe import memory
from jmoe.experts.draft import expert_distances
from jmoe.experts.store import ExpertStore
from jmoe.whole_files import new_file

FORMAT, VERSION = "jmoe expert affinity", 1
FILE = "affinity.npz"


def load_or_measure(
    store: ExpertStore, files: Sequence[Path], fingerprint: str, announce: Callable[[str], None]
) -> Float[Array, "L E E"]:
    """The distances of the checkpoint's experts, from the first of `files` that is there, else measured and kept.

    They are kept in the first of `files` that can be written; if none can, that is announced. Raises RuntimeError for
    a file that is damaged or of another checkpoint.
    """
    num_layers, num_experts = len(store.layers), store.layers[0].shape[0]
    for file in files:
        if file.is_file():
            distances = load(file, fingerprint, (num_layers, num_experts, num_experts))
            return jax.device_put(distances, memory.device_sharding())
    announce(f"measuring how alike the {num_experts} experts of {num_layers} layers are, once for this checkpoint")
    distances = measure(store)
    _keep(files, fingerprint, np.asarray(distances), announce)
    return distances


def measure(store: ExpertStore) -> Float[Array, "L E E"]:
    """`expert_distances` of each layer, of which one at a time is on the device."""
    sharding, distances = memory.device_sharding(), jax.jit(expert_distances)
    rows = []
    for layer in store.layers:
        rows.append(np.asarray(distances(jax.device_put(layer, sharding))))  # waits: the next layer takes its place
    return jax.device_put(jnp.asarray(np.stack(rows)), sharding)


def _keep(files: Sequence[Path], fingerprint: str, distances: np.ndarray, announce: Callable[[str], None]) -> None:
    for file in files:
        try:
            return save(file, fingerprint, distances)
        except OSError as error:
            announce(f"how alike the experts are is not kept in {file}: {error}")
    return None


def save(file: Path, fingerprint: str, distances: np.ndarray) -> None:
    """Writes the distances; whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with new_file(file) as scratch, scratch.open("wb") as out:
        np.savez(out, allow_pickle=False, header=json.dumps(_header(fingerprint)), distances=distances)


def load(file: Path, fingerprint: str, shape: tuple[int, int, int]) -> np.ndarray:
    """The distances in the file. Raises RuntimeError for one that is damaged or of another checkpoint."""
    again = "Delete it; jmoe measures it again."
    try:
        with file.open("rb") as raw, np.load(raw, allow_pickle=False) as content:
            header, distances = json.loads(str(content["header"])), content["distances"]
    except (zipfile.BadZipFile, ValueError, TypeError, KeyError, EOFError, OSError) as error:
        raise RuntimeError(f"{file}: damaged, it cannot be read ({type(error).__name__}: {error}). {again}") from error
    if header != (expected := _header(fingerprint)):
        raise RuntimeError(f"{file}: it says {header}, but expected is {expected}. {again}")
    if distances.shape != shape or distances.dtype != np.float32:
        found = f"{distances.dtype} {list(distances.shape)}"
        raise RuntimeError(f"{file}: distances are {found}, expected float32 {list(shape)}. {again}")
    return distances


def _header(fingerprint: str) -> dict[str, str | int]:
    return {"format": FORMAT, "version": VERSION, "fingerprint": fingerprint}
