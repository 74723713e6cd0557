"""What `tools.bench_kernels` times for attention of a chunk: bound by arithmetic, that of what each query sees."""

import functools
import math
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import backends
from kernels_pallas.chunk_attention import api, cudnn, reference
from kernels_pallas.chunk_attention.specs import ChunkAttentionSpec
from tools.bench_expert_mlp import product_us

UNROLLED = 4  # calls in the body of a loop: they are long
MOST_OPERATIONS = 4e13  # of a program that is timed: some 60 ms of a GPU


def num_operations(spec: ChunkAttentionSpec) -> int:
    """Multiplications and additions of the queries with the keys, and of the weights with the values, that are seen."""
    return 4 * spec.num_seen * spec.num_heads * spec.head_dim


def num_bytes(spec: ChunkAttentionSpec) -> int:
    """Bytes of queries and output, and of the keys and values that some query of their sequence sees."""
    starts = np.array(spec.starts)
    ends = np.minimum(starts + spec.num_queries, spec.num_positions)
    seen = ends - np.maximum(0, starts + 1 - (spec.sliding_window or spec.num_positions))
    of_cache = int(seen.sum()) * spec.num_kv_heads * spec.head_dim
    return 2 * (math.prod(spec.queries_shape) + of_cache) * jnp.dtype(spec.dtype).itemsize


class Case:
    """Random inputs of a spec, and programs of many calls; `seconds` says how long a program takes with arguments."""

    def __init__(self, spec: ChunkAttentionSpec, calls: int, seconds: Callable[[Callable, tuple], float]) -> None:
        shapes = spec.queries_shape, spec.cache_shape, spec.cache_shape
        self.spec, self.seconds = spec, seconds
        self.queries, *self.cached = (
            jax.random.normal(jax.random.key(n), shape, spec.dtype) for n, shape in enumerate(shapes)
        )
        self.positions = jnp.asarray(spec.positions)
        of_all = 4 * math.prod(spec.queries_shape) * spec.num_positions  # what a plain implementation does
        self.turns = max(1, min(calls, int(MOST_OPERATIONS / of_all)) // UNROLLED), UNROLLED

    def us(self, function: Callable) -> float:
        """Microseconds of a call, less the loop around it."""
        return self._us(function) - self._empty_us

    def error(self, function: Callable) -> float:
        """The largest of all tokens, of the largest value, beside the reference in float32 at highest precision."""
        got = jax.jit(self._call(function))(self.queries, *self.cached)
        valid = jnp.asarray(self.spec.valid)[:, :, None, None]
        errors, wanted = (jnp.where(valid, jnp.abs(x), 0) for x in (got - self._wanted, self._wanted))
        return float(jnp.max(errors) / jnp.max(wanted))

    @functools.cached_property
    def product_us(self) -> float:
        """Microseconds of a matrix product with as much arithmetic as the queries need."""
        spec = self.spec
        rows, width = spec.batch * spec.num_queries, spec.num_heads * spec.head_dim
        columns = 128 * max(1, round(2 * spec.num_seen / rows / 128))
        took = product_us((rows, width, columns), spec.dtype, self.turns, self.seconds)
        return took * num_operations(spec) / (2 * rows * width * columns)

    @functools.cached_property
    def _wanted(self) -> jax.Array:
        wide = (x.astype(jnp.float32) for x in (self.queries, *self.cached))
        with jax.default_matmul_precision("highest"):
            return jax.jit(self._call(reference.chunk_attention))(*wide)

    @functools.cached_property
    def _empty_us(self) -> float:
        """Of a call that does nothing."""
        return self._us(lambda queries, *_, **__: queries)

    def _us(self, function: Callable) -> float:
        return 1e6 * self.seconds(self._program(function), (self.queries, *self.cached)) / math.prod(self.turns)

    def _call(self, function: Callable) -> Callable:
        window = self.spec.sliding_window
        return lambda queries, keys, values: function(queries, keys, values, self.positions, sliding_window=window)

    def _program(self, function: Callable) -> Callable:
        """A program of calls, each after the one before."""
        (rounds, unrolled), call = self.turns, self._call(function)

        @jax.jit
        def run(queries, keys, values):
            def body(_, queries):
                for _ in range(unrolled):
                    out = call(queries, keys, values)
                    queries = jax.lax.optimization_barrier((queries + 1e-6 * out).astype(queries.dtype))
                return queries

            return jax.lax.fori_loop(0, rounds, body, queries)

        return run


def measure(
    spec: ChunkAttentionSpec, calls: int, seconds: Callable[[Callable, tuple], float]
) -> Iterator[tuple[str, float, float, float]]:
    """Name, microseconds of a call, its error (of the largest value), and how long its arithmetic takes at least.

    Of each implementation that can do it; before them a plain matrix product of as much arithmetic.
    """
    case = Case(spec, calls, seconds)
    least_us = case.product_us
    yield "plain product", least_us, 0.0, least_us
    can = backends.cudnn_problem() is None and cudnn.problem(case.queries, case.cached[0]) is None
    for name in ("cudnn", "reference") if can else ("reference",):
        function = functools.partial(api.chunk_attention, implementation=name)
        error = case.error(function)
        yield name, case.us(function), error, least_us
