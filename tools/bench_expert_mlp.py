"""What `tools.bench_kernels` times for the expert MLP: each call reads other slots, or more than L2 holds."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from types import ModuleType

import jax
import jax.numpy as jnp

from kernels_pallas import backends
from kernels_pallas.expert_mlp import api, reference
from kernels_pallas.expert_mlp.specs import ExpertMlpSpec

MANY_ROWS = 32  # of x, above which arithmetic may take longer than reading weights
CALLS_OF_MANY_ROWS, UNROLLED_OF_MANY_ROWS = 32, 4  # at most: they are long


def num_bytes(spec: ExpertMlpSpec) -> int:
    """Bytes of the weights of the groups asked for, what a call has to read."""
    return sum(size > 0 for size in spec.group_sizes) * math.prod(spec.slots_shape[1:]) * jnp.dtype(spec.dtype).itemsize


def measure(
    spec: ExpertMlpSpec, calls: int, unrolled: int, seconds: Callable[[Callable, tuple], float]
) -> Iterator[tuple[str, float, float, float]]:
    """Name, microseconds of a call, its error (of the largest value), and how long its arithmetic takes at least.

    Of each implementation, over so many calls, `unrolled` of them in the body of a loop; before them for many rows a
    plain matrix product of as much arithmetic.
    """
    if spec.num_rows > MANY_ROWS:
        calls, unrolled = min(calls, CALLS_OF_MANY_ROWS), min(unrolled, UNROLLED_OF_MANY_ROWS)
    rounds = max(1, calls // unrolled)
    key = jax.random.key(0)
    x = jax.random.normal(key, spec.x_shape, spec.dtype)
    slots = random_slots(jax.random.fold_in(key, 1), spec.slots_shape, spec.dtype)
    groups = tuple(map(jnp.asarray, spec.groups()))
    wanted = _in_float32(x, slots, *groups)

    def microseconds(run: Callable, *arguments: jax.Array) -> float:
        return 1e6 * seconds(run, arguments) / (rounds * unrolled)

    least_us = 0.0
    if spec.num_rows > MANY_ROWS:
        least_us = microseconds(*_product(spec, rounds, unrolled))
        yield "plain product", least_us, 0.0, least_us
    empty_us = microseconds(_calls(lambda x, *_: x.astype(jnp.float32), spec, rounds, unrolled), x, slots, *groups)
    for name, function in _implementations(spec, x, slots):
        got = jax.jit(function)(x, slots, *groups)
        us = microseconds(_calls(function, spec, rounds, unrolled), x, slots, *groups) - empty_us
        yield name, us, float(jnp.max(jnp.abs(got - wanted)) / jnp.max(jnp.abs(wanted))), least_us


def random_slots(key: jax.Array, shape: tuple[int, ...], dtype: str) -> jax.Array:
    """One slot after another: random bits for all at once would take several times their memory."""
    std = jnp.asarray(1 / math.sqrt(shape[-1]), dtype)

    def one(key: jax.Array) -> jax.Array:
        return jax.random.normal(key, shape[1:], dtype) * std

    return jax.jit(lambda key: jax.lax.map(one, jax.random.split(key, shape[0])))(key)


def _implementations(spec: ExpertMlpSpec, x, slots) -> list[tuple[str, Callable]]:
    """Each form of the kernels that can do it, that for prefill with each height of its tiles, and the reference."""
    found: list[tuple[str, Callable]] = []
    if backends.mosaic_gpu_problem() is None:
        from kernels_pallas.expert_mlp import mosaic_gpu, mosaic_gpu_fma, mosaic_gpu_prefill, mosaic_gpu_wgmma

        preferred = mosaic_gpu.form(x, slots)
        for name, form in (("fma", mosaic_gpu_fma), ("wgmma", mosaic_gpu_wgmma)):
            if form.problem(x, slots) is None:
                found.append((f"{name}{' (chosen)' if form is preferred else ''}", form.expert_mlp))
        if spec.num_rows > MANY_ROWS and preferred is mosaic_gpu_prefill:
            found += _prefill_heights(spec, mosaic_gpu_prefill)
    return [*found, ("reference", functools.partial(api.expert_mlp, implementation="reference"))]


def _prefill_heights(spec: ExpertMlpSpec, form: ModuleType) -> list[tuple[str, Callable]]:
    chosen = form.config_of(spec.num_rows, spec.num_groups, spec.max_groups_per_row)
    found = []
    for config in (dataclasses.replace(chosen, num_warpgroups=number) for number in (1, 2)):
        name = f"{config.tile_rows} rows{' (chosen)' if config == chosen else ''}"
        options = {"config": config, "max_groups_per_row": spec.max_groups_per_row}
        found.append((name, functools.partial(form.expert_mlp, **options)))
    return found


def _calls(function: Callable, spec: ExpertMlpSpec, rounds: int, unrolled: int) -> Callable:
    """A program of so many calls, each with the weights of other slots, each after the one before."""

    @jax.jit
    def run(x, slots, group_slots, group_weights):
        def body(_, y):
            for n in range(unrolled):
                at = (group_slots + n * spec.num_groups) % spec.num_slots
                # The barrier: what depends on the groups alone is done anew for each call, as it is in a model.
                barred = jax.lax.optimization_barrier(((x + 1e-6 * y).astype(x.dtype), at, group_weights))
                changed, at, weights = barred
                y = function(changed, slots, at, weights)
            return y

        return jax.lax.fori_loop(0, rounds, body, jnp.zeros(x.shape, jnp.float32))

    return run


def _product(spec: ExpertMlpSpec, rounds: int, unrolled: int) -> tuple[Callable, jax.Array, jax.Array]:
    """A program of so many matrix products with as much arithmetic as the rows of all groups need, and its inputs."""
    shapes = (sum(spec.group_sizes), spec.width), (spec.width, 3 * spec.num_hidden)
    left, right = (jax.random.normal(jax.random.key(n), shape, spec.dtype) for n, shape in enumerate(shapes))

    @jax.jit
    def run(left, right):
        def body(_, right):
            for _ in range(unrolled):
                y = jax.lax.optimization_barrier(left @ right)
                right += (1e-6 * y[:1]).astype(right.dtype)  # so that the next product waits for all of this one
            return right

        return jax.lax.fori_loop(0, rounds, body, right)

    return run, left, right


def _in_float32(x, slots, group_slots, group_weights) -> jax.Array:
    """The reference in float32 at highest precision, a group at a time."""

    @jax.jit
    def one(slot, weights):
        expert = slots[slot][None].astype(jnp.float32)
        return reference.expert_mlp(x.astype(jnp.float32), expert, jnp.zeros(1, jnp.int32), weights[None])

    with jax.default_matmul_precision("highest"):
        return functools.reduce(jnp.add, [one(*group) for group in zip(group_slots, group_weights, strict=True)])
