"""What `tools.bench_kernels` times for the expert MLP: each call reads other slots, or more than L2 holds."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import backends, tuning
from kernels_pallas.expert_mlp import api, reference
from kernels_pallas.expert_mlp.specs import ExpertMlpSpec

MANY_ROWS = 32  # of x, above which arithmetic may take longer than reading weights
UNROLLED_OF_MANY_ROWS = 4  # at most: they are long
MOST_OPERATIONS = 4e13  # of a program that is timed: some 60 ms of a GPU
CHECKED_ROWS = 1024  # of x, at most


def num_bytes(spec: ExpertMlpSpec) -> int:
    """Bytes of the weights of the groups asked for, what a call has to read."""
    return sum(size > 0 for size in spec.group_sizes) * math.prod(spec.slots_shape[1:]) * jnp.dtype(spec.dtype).itemsize


def num_operations(spec: ExpertMlpSpec) -> int:
    """Multiplications and additions of the rows with the weights of their groups."""
    return 2 * sum(spec.group_sizes) * math.prod(spec.slots_shape[1:])


class Case:
    """Random inputs of a spec, and programs of many calls; `seconds` says how long a program takes with arguments.

    About `calls` calls are timed, `unrolled` of them in the body of a loop; fewer if they are long.
    """

    def __init__(
        self, spec: ExpertMlpSpec, calls: int, unrolled: int, seconds: Callable[[Callable, tuple], float]
    ) -> None:
        key = jax.random.key(0)
        self.spec, self.calls, self.unrolled, self.seconds = spec, calls, unrolled, seconds
        self.x = jax.random.normal(key, spec.x_shape, spec.dtype)
        self.slots = random_slots(jax.random.fold_in(key, 1), spec.slots_shape, spec.dtype)
        self.groups = tuple(map(jnp.asarray, spec.groups()))
        self._times_of_nothing: dict[tuple[int, int], float] = {}

    def timer(self, function: Callable, num_operations: int) -> Callable[[], float]:
        """Takes the microseconds of a call of so many operations, less the loop around it, as often as it is asked."""
        turns = self._turns(num_operations)
        program, arguments = self._program(function, *turns), (self.x, self.slots, *self.groups)
        return lambda: 1e6 * self.seconds(program, arguments) / math.prod(turns) - self._empty_us(turns)

    def error(self, function: Callable) -> float:
        """The largest among some of the rows, all if they are few, of their largest value; not finite if `y` is not."""
        rows, wanted = self._wanted
        got = jax.jit(function)(self.x, self.slots, *self.groups)
        largest = jnp.max(jnp.abs(got[rows] - wanted)) / jnp.max(jnp.abs(wanted))
        return float(jnp.where(jnp.all(jnp.isfinite(got)), largest, jnp.inf))

    @functools.cached_property
    def product_us(self) -> float:
        """Microseconds of a matrix product with as much arithmetic as the rows of all groups need."""
        spec = self.spec
        sizes = sum(spec.group_sizes), spec.width, 3 * spec.num_hidden
        return product_us(sizes, spec.dtype, self._turns(num_operations(spec)), self.seconds)

    def _turns(self, num_operations: int) -> tuple[int, int]:
        """Rounds of a loop, and calls in its body."""
        most = UNROLLED_OF_MANY_ROWS if self.spec.num_rows > MANY_ROWS else self.unrolled
        calls = max(1, min(self.calls, int(MOST_OPERATIONS / max(1, num_operations))))
        return max(1, calls // min(most, calls)), min(most, calls)

    def _program(self, function: Callable, rounds: int, unrolled: int) -> Callable:
        """A program of so many calls, each with the weights of other slots, each after the one before."""
        spec = self.spec

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

    def _empty_us(self, turns: tuple[int, int]) -> float:
        """Of a call that does nothing."""
        if turns not in self._times_of_nothing:
            program = self._program(lambda x, *_: x.astype(jnp.float32), *turns)
            seconds = self.seconds(program, (self.x, self.slots, *self.groups))
            self._times_of_nothing[turns] = 1e6 * seconds / math.prod(turns)
        return self._times_of_nothing[turns]

    @functools.cached_property
    def _wanted(self) -> tuple[np.ndarray, jax.Array]:
        """Rows to look at, and what they should be: the reference in float32 at highest precision."""
        group_slots, group_weights = self.groups
        rows = np.random.default_rng(0).permutation(self.spec.num_rows)[:CHECKED_ROWS]
        with jax.default_matmul_precision("highest"):
            return rows, _in_float32(self.x[rows], self.slots, group_slots, group_weights[:, rows])


def product_us(
    sizes: tuple[int, int, int], dtype: str, turns: tuple[int, int], seconds: Callable[[Callable, tuple], float]
) -> float:
    """Microseconds of a matrix product [n, k] @ [k, m] of `sizes` (n, k, m).

    `turns` are rounds of a loop and products in its body; `seconds` says how long a program takes with arguments.
    """
    rows, width, columns = sizes
    shapes = (rows, width), (width, columns)
    left, right = (jax.random.normal(jax.random.key(n), shape, dtype) for n, shape in enumerate(shapes))
    rounds, unrolled = turns

    @jax.jit
    def run(left, right):
        def body(_, right):
            for _ in range(unrolled):
                y = jax.lax.optimization_barrier(left @ right)
                right += (1e-6 * y[:1]).astype(right.dtype)  # so that the next product waits for all of this one
            return right

        return jax.lax.fori_loop(0, rounds, body, right)

    return 1e6 * seconds(run, (left, right)) / (rounds * unrolled)


@jax.jit
def _in_float32(x, slots, group_slots, group_weights):
    """The reference, a group at a time. Slots are an argument: XLA takes minutes over a constant of a gigabyte."""

    def add(y, group):
        slot, weights = group
        expert = jax.lax.dynamic_index_in_dim(slots, slot).astype(jnp.float32)
        return y + reference.expert_mlp(x, expert, jnp.zeros(1, jnp.int32), weights[None]), None

    x = x.astype(jnp.float32)
    return jax.lax.scan(add, jnp.zeros(x.shape, jnp.float32), (group_slots, group_weights))[0]


def measure(
    spec: ExpertMlpSpec, calls: int, unrolled: int, seconds: Callable[[Callable, tuple], float]
) -> Iterator[tuple[str, float, float, float]]:
    """Name, microseconds of a call, its error (of the largest value), and how long its arithmetic takes at least.

    Of each implementation; before them for many rows a plain matrix product of as much arithmetic.
    """
    case, least_us = Case(spec, calls, unrolled, seconds), 0.0
    if spec.num_rows > MANY_ROWS:
        least_us = case.product_us
        yield "plain product", least_us, 0.0, least_us
    for name, function in _kernels(spec, case.x, case.slots):
        error = case.error(function)
        yield name, case.timer(function, num_operations(spec))(), error, least_us
    of_all_rows = 2 * spec.num_rows * spec.num_groups * math.prod(spec.slots_shape[1:])
    plain = functools.partial(api.expert_mlp, implementation="reference")
    error = case.error(plain)
    yield "reference", case.timer(plain, of_all_rows)(), error, least_us


def random_slots(key: jax.Array, shape: tuple[int, ...], dtype: str) -> jax.Array:
    """One slot after another: random bits for all at once would take several times their memory."""
    std = jnp.asarray(1 / math.sqrt(shape[-1]), dtype)

    def one(key: jax.Array) -> jax.Array:
        return jax.random.normal(key, shape[1:], dtype) * std

    return jax.jit(lambda key: jax.lax.map(one, jax.random.split(key, shape[0])))(key)


def _kernels(spec: ExpertMlpSpec, x, slots) -> list[tuple[str, Callable]]:
    """Each form of the kernels that can do it, that for prefill with each height of its tiles."""
    found: list[tuple[str, Callable]] = []
    if backends.mosaic_gpu_problem() is None:
        from kernels_pallas.expert_mlp import mosaic_gpu, mosaic_gpu_fma, mosaic_gpu_prefill, mosaic_gpu_wgmma

        preferred = mosaic_gpu.form(x, slots)
        for name, form in (("fma", mosaic_gpu_fma), ("wgmma", mosaic_gpu_wgmma)):
            if form.problem(x, slots) is None:
                found.append((f"{name}{' (chosen)' if form is preferred else ''}", form.expert_mlp))
        if spec.num_rows > MANY_ROWS and preferred is mosaic_gpu_prefill:
            found += _prefill_heights(spec, x, slots, mosaic_gpu_prefill)
    return found


def _prefill_heights(spec: ExpertMlpSpec, x, slots, form: ModuleType) -> list[tuple[str, Callable]]:
    sizes = spec.num_groups, spec.max_groups_per_row
    chosen = tuning.configured(form.key(x, slots, *sizes), form.config_of(spec.num_rows, *sizes))
    found = []
    for config in (dataclasses.replace(chosen, num_warpgroups=number) for number in (1, 2)):
        name = f"{config.tile_rows} rows{' (chosen)' if config == chosen else ''}"
        options = {"config": config, "max_groups_per_row": spec.max_groups_per_row}
        found.append((name, functools.partial(form.expert_mlp, **options)))
    return found
