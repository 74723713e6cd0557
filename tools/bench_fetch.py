"""What `tools.bench_kernels` times for the fetch: plans of other experts and slots, one after the other."""

import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from jmoe import memory
from kernels_pallas import backends
from kernels_pallas.fetch import api
from kernels_pallas.fetch.specs import FetchSpec


class Case:
    """Random experts in pinned host memory, a plan for each call, and slots that go from one program to the next.

    A program is `rounds` turns of a loop over `calls` plans; `seconds` says how long it takes with its arguments.
    """

    def __init__(self, spec: FetchSpec, rounds: int, calls: int, seconds: Callable[[Callable, tuple], float]) -> None:
        unsigned = np.uint16 if jnp.dtype(spec.dtype).itemsize == 2 else np.uint32
        self.bits = np.random.default_rng(0).integers(0, np.iinfo(unsigned).max, spec.store_shape, unsigned)
        self.store = jax.device_put(self.bits.view(spec.dtype), memory.host_sharding())
        self.spec, self.seconds, self.rounds = spec, seconds, rounds
        self.plans = [spec.plan(seed) for seed in range(calls)]
        self.slots = jnp.zeros(spec.slots_shape, spec.dtype)

    def timer(self, function: Callable) -> Callable[[], float]:
        """Takes the microseconds of a call, as often as it is asked."""
        program = functools.partial(self._run, self._program(function, self.plans, self.rounds))
        return lambda: 1e6 * self.seconds(program, ()) / (self.rounds * len(self.plans))

    def error(self, function: Callable) -> float:
        """0. Raises RuntimeError unless slots hold the very experts of a plan."""
        plan, self.slots = self.plans[-1], jnp.zeros(self.spec.slots_shape, self.spec.dtype)
        self._run(self._program(function, [plan], 1))
        require_fetched(np.asarray(self.slots).view(self.bits.dtype), self.bits, plan)
        return 0.0

    def _run(self, program: Callable) -> jax.Array:
        self.slots = program(self.store, self.slots)
        return self.slots

    def _program(self, function: Callable, plans: list, rounds: int) -> Callable:
        """A program of one fetch a plan and round, each into the slots that the one before has written."""

        @functools.partial(jax.jit, donate_argnums=1)
        def run(store, slots, plans):
            def turn(_, slots):
                for plan in plans:
                    slots = function(store, slots, *plan)
                return slots

            return jax.lax.fori_loop(0, rounds, turn, slots)

        on_device = jax.device_put([tuple(map(jnp.asarray, plan)) for plan in plans])  # no constants of the program
        return lambda store, slots: run(store, slots, on_device)


def measure(
    spec: FetchSpec, rounds: int, calls: int, seconds: Callable[[Callable, tuple], float]
) -> Iterator[tuple[str, float, float]]:
    """Of each implementation that can run here: its name, microseconds a call, and its error, which is 0."""
    case = Case(spec, rounds, calls, seconds)
    for name in api.IMPLEMENTATIONS if backends.mosaic_gpu_problem() is None else ("reference",):
        function = functools.partial(api.fetch, implementation=name)
        error = case.error(function)
        yield name, case.timer(function)(), error


def require_fetched(slots: np.ndarray, store: np.ndarray, plan: tuple) -> None:
    """Raises RuntimeError unless the slots of the plan hold the very experts that it names."""
    expert_ids, slot_ids, count = plan
    for expert, slot in zip(expert_ids[:count], slot_ids[:count], strict=True):
        if not np.array_equal(slots[slot], store[expert]):
            raise RuntimeError(
                f"fetch: slot {slot} does not hold the bits of expert {expert}: the kernel is wrong here"
            )
