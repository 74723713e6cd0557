"""jmoe runs Mixture-of-Experts language models whose experts do not fit on the GPU."""

from jmoe.config import ModelConfig, RuntimeConfig
from jmoe.decoding.sampling import SamplingParams
from jmoe.engine import Engine, load
from jmoe.generation import Completion, Delta, Generation
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
