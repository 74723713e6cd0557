"""What `tools.bench_kernels` times for kernels that decide and move nothing, routing and admission: calls in a row."""

import abc
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas import backends
from kernels_pallas.admit import api as admission
from kernels_pallas.admit.result import NONE, Admitted
from kernels_pallas.admit.specs import AdmitSpec
from kernels_pallas.route import api as routing
from kernels_pallas.route.specs import RouteSpec

STEPS = 16  # admissions of other experts, before they come round


class Case(abc.ABC):
    """The inputs of a spec. A call needs what the one before gives, and that is all that it waits for.

    `calls` are timed, `unrolled` of them in the body of a loop; `seconds` says how long a program with its arguments
    takes.
    """

    def __init__(self, calls: int, unrolled: int, seconds: Callable[[Callable, tuple], float]) -> None:
        self.iterations, self.unrolled, self.seconds = math.ceil(calls / unrolled), unrolled, seconds

    @property
    @abc.abstractmethod
    def inputs(self) -> tuple:
        """Of a call."""

    @abc.abstractmethod
    def start(self) -> Any:
        """What the first call is told of the one before."""

    @abc.abstractmethod
    def step(self, function: Callable | None, n: int, before: Any) -> Any:
        """What the n-th call of the loop's body tells the next one. Without the call itself for None."""

    def timer(self, function: Callable) -> Callable[[], float]:
        """Takes the microseconds of a call, less the loop around it, as often as it is asked."""
        program = self._program(function)

        def microseconds() -> float:
            took = self.seconds(program, (self.start(),)) - self._empty_seconds
            return 1e6 * took / (self.iterations * self.unrolled)

        return microseconds

    def error(self, function: Callable, reference: Callable) -> float:
        """Of the largest number that is no integer; infinite if an integer differs."""
        errors = [0.0]
        made = (self.decided(jax.jit(each)(*self.inputs)) for each in (function, reference))
        pairs = zip(*map(jax.tree.leaves, made), strict=True)
        for got, wanted in pairs:
            if jnp.issubdtype(wanted.dtype, jnp.integer):
                errors.append(0.0 if bool((got == wanted).all()) else math.inf)
            else:
                errors.append(float(jnp.max(jnp.abs(got - wanted)) / jnp.max(jnp.abs(wanted))))
        return max(errors)

    def decided(self, result: Any) -> Any:
        """Of a result what may not differ."""
        return result

    def num_bytes(self, function: Callable) -> int:
        """What a call reads and writes."""
        arrays = jax.tree.leaves((self.inputs, jax.eval_shape(function, *self.inputs)))
        return sum(array.size * array.dtype.itemsize for array in arrays)

    @functools.cached_property
    def _empty_seconds(self) -> float:
        """Of a program without calls."""
        return self.seconds(self._program(None), (self.start(),))

    def _program(self, function: Callable | None) -> Callable:
        @jax.jit
        def run(start):
            def body(_, before):
                for n in range(self.unrolled):
                    before = self.step(function, n, before)
                return before

            return jax.lax.fori_loop(0, self.iterations, body, start)

        return run


class RouteCase(Case):
    """Logits that change by next to nothing from call to call."""

    def __init__(self, spec: RouteSpec, *how) -> None:
        super().__init__(*how)
        logits, valid = spec.make()
        self.logits, self.valid = jnp.asarray(logits), jnp.asarray(valid)

    @property
    def inputs(self) -> tuple:
        return self.logits, self.valid

    def start(self) -> jax.Array:
        return jnp.zeros((self.logits.shape[0], 1), jnp.float32)

    def step(self, function: Callable | None, n: int, before: jax.Array) -> jax.Array:
        logits = jax.lax.optimization_barrier(self.logits + 1e-6 * before)
        if function is None:
            return logits[:, :1]
        return jax.lax.optimization_barrier(function(logits, self.valid))[1][:, :1]


class AdmitCase(Case):
    """Other experts are used in each step, and each call has the residency that the one before has made."""

    def __init__(self, spec: AdmitSpec, *how) -> None:
        super().__init__(*how)
        made = [spec.make(seed) for seed in range(min(STEPS, self.unrolled))]
        self.residency = jax.tree.map(jnp.asarray, made[0][4:])
        self.steps = jax.tree.map(jnp.asarray, [each[:4] for each in made])

    @property
    def inputs(self) -> tuple:
        return *self.steps[0], *self.residency

    def start(self) -> tuple:
        return self.residency

    def step(self, function: Callable | None, n: int, before: tuple) -> tuple:
        used = self.steps[n % len(self.steps)][2]
        num_used, (slot_of, owner) = used[0], jax.lax.optimization_barrier(before)
        if function is not None:
            made = jax.lax.optimization_barrier(function(*self.steps[n % len(self.steps)], slot_of, owner))
            num_used, slot_of, owner = made.num_used, made.slot_of, made.owner
        return slot_of, owner + jnp.minimum(num_used, 0)  # + 0: so that a call that admits nobody is made, too

    def decided(self, result: Admitted) -> Admitted:
        """Groups whose expert lies nowhere may have any slot."""
        group, slot_of = result.group_experts, result.slot_of
        lies = (group != NONE) & (slot_of[jnp.maximum(group, 0)] != NONE)
        return dataclasses.replace(result, group_slots=jnp.where(lies, result.group_slots, NONE))


def measure(
    spec: RouteSpec | AdmitSpec, calls: int, unrolled: int, seconds: Callable[[Callable, tuple], float]
) -> Iterator[tuple[str, float, float, int]]:
    """Of each implementation that can do it: its name, microseconds a call, its error, and the bytes of a call."""
    if isinstance(spec, RouteSpec):
        case: Case = RouteCase(spec, calls, unrolled, seconds)
        run = functools.partial(routing.route, num_chosen=spec.num_chosen, normalize=spec.normalize)
        chosen = routing.choose(None, case.inputs[0])
    else:
        case, run = AdmitCase(spec, calls, unrolled, seconds), admission.admit
        chosen = admission.choose(None, case.inputs[0], case.inputs[4])
    can = backends.mosaic_gpu_problem() is None and chosen == "mosaic_gpu"
    reference = functools.partial(run, implementation="reference")
    for name in ("mosaic_gpu", "reference") if can else ("reference",):
        function = functools.partial(run, implementation=name)
        error = case.error(function, reference)
        yield name, case.timer(function)(), error, case.num_bytes(reference)
