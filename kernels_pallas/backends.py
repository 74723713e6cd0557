"""Which implementation of an operation runs here."""

from collections.abc import Callable, Mapping
from typing import Any

import jax

MOSAIC_COMPUTE_CAPABILITY = 9.0  # Hopper: the first with the bulk tensor copy engine (TMA)


def mosaic_gpu_problem() -> str | None:
    """Why Pallas Mosaic GPU kernels cannot run on the default device, or None if they can."""
    device = jax.devices()[0]
    if device.platform != "gpu":
        return f"the default device is a {device.platform}, not a GPU"
    capability = float(getattr(device, "compute_capability", 0))
    if capability < MOSAIC_COMPUTE_CAPABILITY:
        return f"compute capability {capability} is below {MOSAIC_COMPUTE_CAPABILITY} (Hopper)"
    return None


def resolve(operation: str, implementations: Mapping[str, Any], name: str | None) -> str:
    """`name` if it can run here; for None the best that does.

    Raises ValueError for an unknown name, NotImplementedError if that one cannot run here.
    """
    if name is None:
        best = "mosaic_gpu" in implementations and mosaic_gpu_problem() is None
        return "mosaic_gpu" if best else "reference"
    if name not in implementations:
        raise ValueError(f"{operation}: unknown implementation {name!r}; expected one of {', '.join(implementations)}")
    problem = mosaic_gpu_problem() if name == "mosaic_gpu" else None
    if problem:
        raise NotImplementedError(f"{operation}: mosaic_gpu cannot run here: {problem}; use implementation='reference'")
    return name


def choose(
    operation: str, implementations: Mapping[str, Any], name: str | None, problem: Callable[[], str | None]
) -> str:
    """`resolve`, and for None the reference where the best cannot do these shapes, for which `problem` has the reason.

    It is asked only where it matters: for most operations it is a Mosaic kernel's, whose import takes seconds.
    """
    chosen = resolve(operation, implementations, name)
    return "reference" if name is None and chosen != "reference" and problem() else chosen
