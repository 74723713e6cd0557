"""From what the user names to an engine: resolve, plan, and restore each array straight into its kind of memory."""

import dataclasses
from pathlib import Path
from typing import Any

import jax

from jmoe import checkpoint, memory, sources
from jmoe.config import ModelConfig, RuntimeConfig
from jmoe.engine import Announce, Engine, Progress, Weights
from jmoe.experts import affinity
from jmoe.experts.prefetch_file import Calibration, file_beside, read_calibration
from jmoe.experts.store import ExpertStore
from jmoe.hf_files import read_json
from jmoe.prefetching import settled
from jmoe.programs import Programs
from jmoe.router_delta import RouterDelta
from jmoe.tokenizer import TOKENIZER_FILE, Tokenizer, load_tokenizer


def load(
    model: str | Path | None = None,
    runtime: RuntimeConfig = RuntimeConfig(),
    *,
    router: str | Path | None = None,
    progress: Progress | None = None,
    announce: Announce | None = None,
) -> Engine:
    """An engine for a converted directory, a Hugging Face directory or a hub id; None is the demo model.

    `router` is a file of tuned routers (`jmoe.router_delta`) of this checkpoint, used instead of its own.

    Raises ValueError for a path, an option or a plan that cannot work, RuntimeError for a checkpoint or a machine that
    does not.
    """

    def as_run(config: ModelConfig) -> ModelConfig:
        return dataclasses.replace(config, dtype=runtime.dtype or config.dtype)

    path = sources.resolve(
        model, progress=progress, announce=announce, prepare=lambda config: memory.configure_backend(as_run(config))
    )
    manifest = checkpoint.read_manifest(path)
    delta = None if router is None else RouterDelta.read(router, manifest)
    fingerprint = manifest.fingerprint if delta is None else delta.fingerprint
    config = as_run(manifest.config)
    memory.enable_compilation_cache(sources.cache_dir() / "compiled")
    # A calibration is of the checkpoint's own routers.
    calibration = None if delta else _calibration(path, config, settled(config, runtime), announce)
    if delta and runtime.execute_guess is not None:
        raise ValueError(
            f"--execute-guess {runtime.execute_guess:g} does not go with --router {router}: calibrated are the "
            "checkpoint's own routers alone; leave out one of them"
        )
    return Engine.start(
        config,
        runtime,
        lambda: load_weights(path, config, progress, delta),
        announce=announce,
        fingerprint=fingerprint,
        experience_dir=sources.cache_dir() / "residency",
        affinity_files=_affinity_files(None if delta else path, fingerprint),
        calibration=calibration,
        programs=kept_programs(announce),
        tokenizer=_tokenizer(path, announce),
        generation_defaults=_generation_defaults(path),
    )


def kept_programs(announce: Announce | None = None) -> Programs:
    """Kept in the cache, on a GPU. On a CPU compiling is quick, and XLA cannot run all that it loads there."""
    if jax.default_backend() != "gpu":
        return Programs()
    return Programs(sources.cache_dir() / "programs", announce or (lambda line: None))


def _affinity_files(path: Path | None, fingerprint: str) -> tuple[Path, ...]:
    """In the cache, and before that beside the checkpoint, unless (None) it runs with routers that are not its own."""
    beside = () if path is None else (path / affinity.FILE,)
    return *beside, sources.cache_dir() / "affinity" / f"{fingerprint[:16]}.npz"


def _calibration(
    path: Path, config: ModelConfig, runtime: RuntimeConfig, announce: Announce | None
) -> Calibration | None:
    if runtime.looks_ahead:
        return load_calibration(path, config, announce)
    return None if runtime.execute_guess is None else load_calibration(path, config)


def load_calibration(path: Path, config: ModelConfig, announce: Announce | None = None) -> Calibration | None:
    """What a prefetch guesses with, if it lies beside the converted checkpoint. Raises as `read_calibration`."""
    file = file_beside(path)
    found = read_calibration(file, config, checkpoint.read_manifest(path).fingerprint) if file.is_file() else None
    if announce:
        guesses = "the next layer's router: no calibration of these weights" if found is None else file
        announce(f"prefetch guesses with {guesses}")
    return found


def _tokenizer(path: Path, announce: Announce | None) -> Tokenizer | None:
    if (path / TOKENIZER_FILE).is_file():
        return load_tokenizer(path)
    if announce:
        announce(f"{path} has no {TOKENIZER_FILE}: prompts must be token ids")
    return None


def _generation_defaults(path: Path) -> dict[str, Any]:
    file = path / "generation_config.json"
    return read_json(file) if file.is_file() else {}


def load_weights(
    path: Path, config: ModelConfig, progress: Progress | None = None, delta: RouterDelta | None = None
) -> Weights:
    """Restores the trunk to the device, with the tuned routers, and the experts, layer by layer, to pinned memory."""
    report = progress or (lambda phase, done, total: None)
    params = checkpoint.load_trunk(path, config, memory.device_sharding())
    params = params if delta is None else jax.device_put(delta.applied_to(params), memory.device_sharding())
    layers = []
    for layer in config.moe_layers:
        layers.append(checkpoint.load_experts(path, config, layer, memory.host_sharding()))
        jax.block_until_ready(layers[-1])
        report("loading experts", len(layers) * layers[0].nbytes, config.store_bytes)
    return Weights(params, ExpertStore(tuple(layers)))
