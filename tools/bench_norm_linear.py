"""What `tools.bench_kernels` times for norms and projections: more matrices in turn than the GPU's own caches hold."""

import functools
import math
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

from kernels_pallas import backends
from kernels_pallas.norm_linear import api, reference
from kernels_pallas.norm_linear.specs import NormLinearSpec

COLD_BYTES = 2**27  # read between two readings of one matrix: more than the 50 MB of an H200's L2
MOST_KERNELS = 160  # a program with more calls compiles for too long; of the smallest these are 80 MB
EPS = 1e-6


class Case:
    """The inputs of a spec, with several random matrices.

    `calls` are timed, at least; `seconds` says how long a program with its arguments takes.
    """

    def __init__(self, spec: NormLinearSpec, calls: int, seconds: Callable[[Callable, tuple], float]) -> None:
        key, number = jax.random.key(0), min(calls, MOST_KERNELS, -(-COLD_BYTES // spec.kernel_bytes))
        self.seconds = seconds
        self.x, self.scale, self.residual, self.added = spec.rows(key)
        self.options = {"eps": EPS, "out_dtype": jnp.dtype(spec.out_dtype or spec.dtype)}
        draw = jax.jit(lambda n: spec.kernel(jax.random.fold_in(key, n)))
        self.kernels = [draw(n) for n in range(number)]
        self.iterations = math.ceil(calls / number)

    def timer(self, function: Callable) -> Callable[[], float]:
        """Takes the microseconds of a call, less the loop around it, as often as it is asked."""
        program = self._program(function)

        def microseconds() -> float:
            took = self.seconds(program, (self.x, self.kernels)) - self._empty_seconds
            return 1e6 * took / (self.iterations * len(self.kernels))

        return microseconds

    def error(self, function: Callable) -> float:
        """Of the largest output, beside float32 at highest precision."""
        got = jax.jit(functools.partial(self._call, function))(self.x, self.kernels[0])
        return float(jnp.max(jnp.abs(got - self._wanted)) / jnp.max(jnp.abs(self._wanted)))

    @functools.cached_property
    def _wanted(self) -> jax.Array:
        inputs = self.x, self.scale, self.kernels[0], self.residual, self.added
        wide = jax.tree.map(lambda each: each.astype(jnp.float32), inputs)
        with jax.default_matmul_precision("highest"):
            return reference.norm_linear(*wide, eps=EPS, out_dtype=jnp.dtype("float32"))[0]

    @functools.cached_property
    def _empty_seconds(self) -> float:
        """Of a program without calls."""
        return self.seconds(self._program(None), (self.x, self.kernels))

    def _call(self, function: Callable, x, kernel) -> jax.Array:
        return function(x, self.scale, kernel, self.residual, self.added, **self.options)[0]

    def _program(self, function: Callable | None) -> Callable:
        """A program of rounds of the matrices, each call after the one before; without calls for None."""
        iterations, out_dtype = self.iterations, self.options["out_dtype"]

        @jax.jit
        def run(x, kernels):
            def body(_, y):
                for kernel in kernels:
                    changed = jax.lax.optimization_barrier((x + 1e-6 * y).astype(x.dtype))
                    if function is None:
                        y = changed[:, :1].astype(out_dtype)
                    else:
                        y = jax.lax.optimization_barrier(self._call(function, changed, kernel))[:, :1]
                return y

            return jax.lax.fori_loop(0, iterations, body, jnp.zeros((x.shape[0], 1), out_dtype))

        return run


def measure(
    spec: NormLinearSpec, calls: int, seconds: Callable[[Callable, tuple], float]
) -> Iterator[tuple[str, float, float]]:
    """Of each implementation that can do it: its name, microseconds a call, and its error."""
    case = Case(spec, calls, seconds)
    can = backends.mosaic_gpu_problem() is None and api.choose(None, case.x, case.kernels[0]) == "mosaic_gpu"
    for name in ("mosaic_gpu", "reference") if can else ("reference",):
        function = functools.partial(api.norm_linear, implementation=name)
        error = case.error(function)
        yield name, case.timer(function)(), error
