"""What was calibrated to predict a checkpoint's experts, in a file beside it: `prefetch.safetensors`.

Tensors, float32: `default_vectors` [L, E, D], and where layer l has an estimator of layer l+n, `estimators/<n>/<l>/up`,
`…/bias` and `…/down`. Metadata: format, version, the checkpoint's fingerprint, and as JSON `methods` and `recall`.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as serialize

from jmoe.config import DTYPE_BYTES, ModelConfig
from jmoe.experts.prefetch import Estimator, Estimators, Methods, Predictor, make_predictor, placed, places
from jmoe.whole_files import new_file

FILE_NAME = "prefetch.safetensors"
FORMAT, VERSION = "jmoe prefetch", "1"
_AGAIN = "Delete it, and calibrate again: python -m tools.calibrate_prefetch."
_PARTS = tuple(field.name for field in dataclasses.fields(Estimator))


@dataclasses.dataclass(frozen=True, eq=False)
class Calibration:
    """What predicts the experts of one checkpoint. Arrays are numpy's, float32.

    `methods` is the choice for each layer (see `jmoe.experts.prefetch.Predictor`), and `recall` how much of the true
    experts of layer l+n that choice found on held-out text with as many guesses, in the same places.
    """

    fingerprint: str
    default_vectors: np.ndarray  # [L, E, D]
    estimators: Estimators
    methods: Methods
    recall: tuple[tuple[float, ...], ...]

    def predictor(
        self, config: ModelConfig, params: Mapping[str, Array], implementation: str | None = "reference"
    ) -> Predictor:
        """Of the model with these trunk parameters. Raises ValueError for a calibration that does not fit together."""
        return make_predictor(
            config,
            params,
            methods=self.methods,
            default_vectors=self.default_vectors,
            estimators=self.estimators,
            implementation=implementation,
        )

    def device_bytes(self, config: ModelConfig) -> int:
        """Device memory of what `predictor` has of its own, beside the trunk's arrays."""
        arrays = self.default_vectors, *jax.tree.leaves(self.estimators)
        return sum(array.size for array in arrays) * DTYPE_BYTES[config.dtype]

    def save(self, path: Path) -> None:
        """Writes the file, whole or not at all; one that is there is replaced."""
        tensors = {"default_vectors": np.ascontiguousarray(self.default_vectors, np.float32)}
        for n, layer in places(len(self.default_vectors)):
            estimator = self.estimators[n - 1][layer]
            for part in _PARTS if estimator else ():
                tensors[f"{_name(n, layer)}/{part}"] = np.ascontiguousarray(getattr(estimator, part), np.float32)
        lists = {"methods": json.dumps(self.methods), "recall": json.dumps(self.recall)}
        metadata = {"format": FORMAT, "version": VERSION, "fingerprint": self.fingerprint, **lists}
        with new_file(path) as scratch:
            scratch.write_bytes(serialize(tensors, metadata))  # save_file would make it the owner's alone


def file_beside(checkpoint: Path) -> Path:
    """Where a converted checkpoint's calibration lies."""
    return checkpoint / FILE_NAME


def read_calibration(path: Path, config: ModelConfig, fingerprint: str) -> Calibration:
    """What `Calibration.save` wrote for the checkpoint of this fingerprint (`jmoe.checkpoint.read_manifest`).

    Raises ValueError where no file is, RuntimeError for one that is damaged, of another checkpoint or another version.
    """
    if not path.is_file():
        raise ValueError(
            f"{path}: no such file; expected a calibration. "
            f"Make one: python -m tools.calibrate_prefetch --output {path}"
        )
    metadata, tensors = _contents(path)
    _require_header(path, metadata, fingerprint)
    _require_shapes(path, tensors, config)
    try:
        methods, recall = (tuple(map(tuple, json.loads(metadata[name]))) for name in ("methods", "recall"))
    except (KeyError, TypeError, ValueError) as error:
        raise RuntimeError(f"{path}: damaged ({type(error).__name__}: {error}). {_AGAIN}") from error
    estimators = _estimators(tensors, len(config.moe_layers))
    return Calibration(fingerprint, tensors["default_vectors"], estimators, methods, recall)


def _contents(path: Path) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    try:
        with safe_open(path, framework="np") as file:
            return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise RuntimeError(f"{path}: damaged, it cannot be read ({error}). {_AGAIN}") from error


def _require_header(path: Path, metadata: Mapping[str, str], fingerprint: str) -> None:
    expected = {"format": FORMAT, "version": VERSION, "fingerprint": fingerprint}
    found = {name: metadata.get(name) for name in expected}
    if found != expected:
        raise RuntimeError(f"{path}: it says {found}, but expected is {expected}. {_AGAIN}")


def _name(n: int, layer: int) -> str:
    return f"estimators/{n}/{layer}"


def _estimators(tensors: Mapping[str, Any], num_layers: int) -> Estimators:
    there = [(n, layer) for n, layer in places(num_layers) if f"{_name(n, layer)}/bias" in tensors]
    made = {at: Estimator(**{part: tensors[f"{_name(*at)}/{part}"] for part in _PARTS}) for at in there}
    return placed(made, num_layers)


def _require_shapes(path: Path, tensors: Mapping[str, np.ndarray], config: ModelConfig) -> None:
    """Raises RuntimeError unless the tensors, and no others, are those of such a model."""
    width, num_layers = config.hidden_size, len(config.moe_layers)
    expected = {"default_vectors": (num_layers, config.num_experts, width)}
    for name in (_name(n, layer) for n, layer in places(num_layers)):
        if f"{name}/bias" in tensors:
            hidden = tensors[f"{name}/bias"].size
            expected |= {f"{name}/up": (hidden, width), f"{name}/bias": (hidden,), f"{name}/down": (width, hidden)}
    found = {name: tensor.shape for name, tensor in tensors.items()}
    if wrong := [name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)]:
        shapes = ", ".join(f"{name} {found.get(name)}, expected {expected.get(name)}" for name in sorted(wrong))
        raise RuntimeError(f"{path}: not what the model needs: {shapes}. {_AGAIN}")
