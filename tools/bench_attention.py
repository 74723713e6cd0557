"""What `tools.bench_kernels` times for decode attention: calls over more KV caches than the GPU's own caches hold."""

import functools
import math
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

from kernels_pallas import backends
from kernels_pallas.decode_attention import api, reference
from kernels_pallas.decode_attention.specs import DecodeAttentionSpec

COLD_BYTES = 2**27  # read between two readings of one KV cache: more than the 50 MB of an H200's L2


def num_bytes(spec: DecodeAttentionSpec) -> int:
    """Bytes of keys and values that are seen, what a call has to read."""
    return 2 * int(spec.num_seen.sum()) * spec.num_kv_heads * spec.head_dim * jnp.dtype(spec.dtype).itemsize


def num_caches(spec: DecodeAttentionSpec, most: int) -> int:
    """KV caches that are taken in turn."""
    return min(most, -(-COLD_BYTES // num_bytes(spec)))


class Case:
    """The inputs of a spec, with several random KV caches.

    `calls` are timed, at least; `seconds` says how long a program with its arguments takes.
    """

    def __init__(
        self, spec: DecodeAttentionSpec, calls: int, most_caches: int, seconds: Callable[[Callable, tuple], float]
    ) -> None:
        key = jax.random.key(0)
        self.spec, self.seconds, head_dim = spec, seconds, spec.head_dim
        self.options = {"num_heads": spec.num_heads, "sliding_window": spec.sliding_window, "eps": 1e-6}
        self.qkv = jax.random.normal(key, spec.qkv_shape, spec.dtype)
        scale, angles = jnp.ones(head_dim, spec.dtype), jax.random.uniform(key, (spec.batch, head_dim // 2))
        self.fixed = scale, scale, jnp.cos(angles), jnp.sin(angles)
        self.places = jnp.asarray(spec.positions), jnp.asarray(spec.valid)
        draw = jax.jit(lambda n: jax.random.normal(jax.random.fold_in(key, n), spec.cache_shape, spec.dtype))
        self.cached = [(draw(2 * n + 1), draw(2 * n + 2)) for n in range(num_caches(spec, most_caches))]
        self.iterations = math.ceil(calls / len(self.cached))

    def timer(self, function: Callable) -> Callable[[], float]:
        """Takes the microseconds of a call, less the loop around it, as often as it is asked."""
        program = self._program(function)

        def microseconds() -> float:
            took = self.seconds(program, (self.qkv, self.cached)) - self._empty_seconds
            return 1e6 * took / (self.iterations * len(self.cached))

        return microseconds

    def error(self, function: Callable) -> float:
        """Of the largest output, beside float32 at highest precision."""
        got = jax.jit(functools.partial(self._call, function))(self.qkv, self.cached[0])[0]
        valid = self.places[1][:, None]
        error = jnp.max(jnp.where(valid, jnp.abs(got - self._wanted), 0))
        return float(error / jnp.max(jnp.where(valid, jnp.abs(self._wanted), 0)))

    @functools.cached_property
    def _wanted(self) -> jax.Array:
        wide = [x.astype(jnp.float32) for x in (self.qkv, *self.fixed, *self.cached[0])]
        with jax.default_matmul_precision("highest"):
            plain = functools.partial(reference.decode_attention, **self.options)
            return jax.jit(plain)(*wide, *self.places)[0]

    @functools.cached_property
    def _empty_seconds(self) -> float:
        """Of a program without calls."""
        return self.seconds(self._program(None), (self.qkv, self.cached))

    def _call(self, function: Callable, qkv, cached):
        return function(qkv, *self.fixed, *cached, *self.places, **self.options)

    def _program(self, function: Callable | None) -> Callable:
        """A program of rounds of the caches, each call after the one before; without calls for None."""
        spec, iterations = self.spec, self.iterations

        @jax.jit
        def run(qkv, caches):
            def body(_, state):
                out, caches = state
                after = []
                for cached in caches:
                    changed = jax.lax.optimization_barrier((qkv + 1e-6 * out[:, :1]).astype(qkv.dtype))
                    if function is None:
                        out = changed[:, : out.shape[1]]
                    else:
                        out, *cached = self._call(function, changed, cached)
                    after.append(tuple(cached))
                return out, after

            zero = jnp.zeros((spec.batch, spec.num_heads * spec.head_dim), qkv.dtype)
            return jax.lax.fori_loop(0, iterations, body, (zero, caches))[0]

        return run


def measure(
    spec: DecodeAttentionSpec, calls: int, most_caches: int, seconds: Callable[[Callable, tuple], float]
) -> Iterator[tuple[str, float, float]]:
    """Of each implementation that can do it: its name, microseconds a call, and its error."""
    case = Case(spec, calls, most_caches, seconds)
    kernels = backends.mosaic_gpu_problem() is None and api.choose(None, case.qkv, case.cached[0][0], spec.num_heads)
    for name in ("mosaic_gpu", "reference") if kernels == "mosaic_gpu" else ("reference",):
        function = functools.partial(api.decode_attention, implementation=name)
        error = case.error(function)
        yield name, case.timer(function)(), error
