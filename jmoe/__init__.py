"""jmoe runs Mixture-of-Experts language models whose experts do not fit on the GPU."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jmoe.completions import Completion, Delta
    from jmoe.config import ModelConfig, RuntimeConfig
    from jmoe.decoding.sampling import SamplingParams
    from jmoe.engine import Engine
    from jmoe.generation import Generation
    from jmoe.loading import load
    from jmoe.stats import GenerationStats

__all__ = [
    "Completion",
    "Delta",
    "Engine",
    "Generation",
    "GenerationStats",
    "ModelConfig",
    "RuntimeConfig",
    "SamplingParams",
    "load",
]

_HOMES = {
    "ModelConfig": "config",
    "RuntimeConfig": "config",
    "SamplingParams": "decoding.sampling",
    "Engine": "engine",
    "load": "loading",
    "Completion": "completions",
    "Delta": "completions",
    "Generation": "generation",
    "GenerationStats": "stats",
}


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used: jax takes seconds, and --help needs none of it."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
