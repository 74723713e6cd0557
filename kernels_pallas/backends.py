"""Which implementation of an operation runs here."""

from collections.abc import Callable, Mapping
from typing import Any

import jax

MOSAIC_COMPUTE_CAPABILITY = 9.0, "Hopper"  # the first with the bulk tensor copy engine (TMA)
CUDNN_COMPUTE_CAPABILITY = 8.0, "Ampere"  # the first that cuDNN's flash attention is for
FASTEST_FIRST = ("mosaic_gpu", "cudnn")  # of what needs a GPU; reference runs everywhere


def mosaic_gpu_problem() -> str | None:
    """Why Pallas Mosaic GPU kernels cannot run on the default device, or None if they can."""
    return _gpu_problem(*MOSAIC_COMPUTE_CAPABILITY)


def cudnn_problem() -> str | None:
    """Why cuDNN's attention cannot run on the default device, or None if it can."""
    if problem := _gpu_problem(*CUDNN_COMPUTE_CAPABILITY):
        return problem
    return "JAX finds no cuDNN" if cudnn_version() is None else None


def cudnn_version() -> int | None:
    """Of the library that JAX found, or None if it found none."""
    from jax._src.cudnn.fused_attention_stablehlo import check_cudnn_version  # has no public name

    try:
        return check_cudnn_version()
    except RuntimeError:
        return None


def _gpu_problem(least: float, architecture: str) -> str | None:
    device = jax.devices()[0]
    if device.platform != "gpu":
        return f"the default device is a {device.platform}, not a GPU"
    capability = float(getattr(device, "compute_capability", 0))
    if capability < least:
        return f"compute capability {capability} is below {least} ({architecture})"
    return None


def resolve(operation: str, implementations: Mapping[str, Any], name: str | None) -> str:
    """`name` if it can run here; for None the best that does.

    Raises ValueError for an unknown name, NotImplementedError if that one cannot run here.
    """
    if name is None:
        can = (each for each in FASTEST_FIRST if each in implementations and _problem_of(each) is None)
        return next(can, "reference")
    if name not in implementations:
        raise ValueError(f"{operation}: unknown implementation {name!r}; expected one of {', '.join(implementations)}")
    if problem := _problem_of(name):
        raise NotImplementedError(f"{operation}: {name} cannot run here: {problem}; use implementation='reference'")
    return name


def _problem_of(name: str) -> str | None:
    """Why an implementation of this name cannot run here; None for those that run everywhere."""
    if name == "mosaic_gpu":
        return mosaic_gpu_problem()
    return cudnn_problem() if name == "cudnn" else None


def choose(
    operation: str, implementations: Mapping[str, Any], name: str | None, problem: Callable[[], str | None]
) -> str:
    """`resolve`, and for None the reference where the best cannot do these shapes, for which `problem` has the reason.

    It is asked only where it matters: for most operations it is a Mosaic kernel's, whose import takes seconds.
    """
    chosen = resolve(operation, implementations, name)
    return "reference" if name is None and chosen != "reference" and problem() else chosen
