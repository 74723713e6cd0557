"""How the jitted steps are compiled and called."""

import dataclasses
import itertools
import types
from collections.abc import Callable, Hashable
from typing import Any

import jax

from kernels_pallas.prefetch import api as prefetch_api

COMPILER_OPTIONS = {
    # XLA would time variants of a fusion on buffers of its own, which no memory plan knows of: at the head, a copy of
    # it. It makes none of these steps faster (docs/benchmarks.md).
    "xla_gpu_experimental_enable_fusion_autotuner": False,
}
# XLA's own list, and loops: a whole call becomes one CUDA graph, no turn of which waits for the host.
_LOOPS_IN_GRAPHS = {
    "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,CONDITIONAL,WHILE",
}
_NO_GRAPHS = {"xla_gpu_enable_command_buffer": ""}


class StepJit:
    """jax.jit of a method of steps, which are its static `self`; to be used as a decorator.

    `overlaps`, of the same positional arguments, says whether a call has copies that are to run beside its arithmetic.
    `repeats` is false for what is called once after the other with other layers' arrays: XLA would record a CUDA graph
    anew to launch it once. So it is a graph only where copies overlap.

    Where the steps' `profiled` is true the host launches each turn of a loop: of what a CUDA graph repeats a profiler
    sees one turn only.
    """

    def __init__(
        self,
        fun: Callable,
        overlaps: Callable[..., bool] = lambda *args: False,
        repeats: bool = True,
        **jit_options: Any,
    ):
        jit_options["static_argnames"] = ("self", *jit_options.get("static_argnames", ()))
        self._overlaps = overlaps
        self._programs: dict[tuple[bool, bool], Any] = {}
        self._distinct: dict[str, Any] = {}  # by the compiler's options
        for profiled, overlapping in itertools.product((False, True), repeat=2):
            options = _options(profiled, overlapping, repeats)
            program = self._distinct.setdefault(str(options), jax.jit(fun, compiler_options=options, **jit_options))
            self._programs[profiled, overlapping] = program

    def __get__(self, steps: Any, owner: type) -> Any:
        return self if steps is None else types.MethodType(self, steps)

    def __call__(self, steps: Any, *args: Any, **options: Any) -> Any:
        return self._program(steps, *args)(steps, *args, **options)

    def trace(self, steps: Any, *args: Any, **options: Any) -> jax.stages.Traced:
        return self._program(steps, *args).trace(steps, *args, **options)

    def lower(self, steps: Any, *args: Any, **options: Any) -> jax.stages.Lowered:
        return self._program(steps, *args).lower(steps, *args, **options)

    def _program(self, steps: Any, *args: Any) -> Any:
        return self._programs[steps.profiled, self._overlaps(steps, *args)]

    def _cache_size(self) -> int:
        """How many programs were compiled, as `jax.jit` says it."""
        return sum(program._cache_size() for program in self._distinct.values())


@dataclasses.dataclass(frozen=True)
class Call:
    """steps.name(*args, **static). `shape` stands for what may differ in the shapes of arguments of these steps."""

    steps: Any
    name: str
    shape: Hashable
    args: tuple
    static: dict[str, Any]

    @property
    def key(self) -> Hashable:
        return self.steps, self.name, self.shape, tuple(sorted(self.static.items()))

    def run(self) -> Any:
        """What the step returns."""
        return getattr(self.steps, self.name)(*self.args, **self.static)

    def lower(self) -> jax.stages.Lowered:
        return getattr(self.steps, self.name).__func__.lower(self.steps, *self.args, **self.static)


def _options(profiled: bool, overlapping: bool, repeats: bool) -> dict[str, Any]:
    if not (repeats or overlapping):
        return {**COMPILER_OPTIONS, **_NO_GRAPHS}
    return {
        **COMPILER_OPTIONS,
        **({} if profiled else _LOOPS_IN_GRAPHS),
        **(prefetch_api.COMPILER_OPTIONS if overlapping else {}),
    }
