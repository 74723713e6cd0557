"""How the jitted steps are compiled."""

import types
from collections.abc import Callable, Mapping
from typing import Any

import jax

COMPILER_OPTIONS = {
    # XLA would time variants of a fusion on buffers of its own, which no memory plan knows of: at the head, a copy of
    # it. It makes none of these steps faster (docs/benchmarks.md).
    "xla_gpu_experimental_enable_fusion_autotuner": False,
}
# XLA's own list, and loops: a whole call becomes one CUDA graph, no turn of which waits for the host.
_LOOPS_IN_GRAPHS = {
    "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,CONDITIONAL,WHILE",
}


class StepJit:
    """jax.jit of a method of steps, which are its static `self`; to be used as a decorator.

    Where the steps' `profiled` is true the host launches each turn of a loop: of what a CUDA graph repeats a profiler
    sees one turn only. From the class the other program is to be had, as `jax.jit` makes it.
    """

    def __init__(self, fun: Callable, compiler_options: Mapping[str, Any] | None = None, **jit_options: Any):
        options = {**COMPILER_OPTIONS, **(compiler_options or {})}
        jit_options["static_argnames"] = ("self", *jit_options.get("static_argnames", ()))
        self._profiled = jax.jit(fun, compiler_options=options, **jit_options)
        self._in_graphs = jax.jit(fun, compiler_options={**options, **_LOOPS_IN_GRAPHS}, **jit_options)

    def __get__(self, steps: Any, owner: type) -> Any:
        if steps is None:
            return self._in_graphs
        return types.MethodType(self._profiled if steps.profiled else self._in_graphs, steps)
