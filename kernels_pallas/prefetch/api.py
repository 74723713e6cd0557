"""`prefetch`: validates, then runs the best implementation here."""

from jaxtyping import Array, Float, Int

from kernels_pallas import backends
from kernels_pallas.prefetch import reference
from kernels_pallas.prefetch.arrivals import Arrivals

# Of the outermost jax.jit of a program whose prefetches are to run beside other work; a backend that is no GPU ignores
# them.
COMPILER_OPTIONS = {"xla_gpu_command_buffer_scheduling_mode": "CONCURRENT"}


def _mosaic_gpu(store, expert_ids, num_rows, after):
    from kernels_pallas.prefetch import mosaic_gpu  # importing Mosaic takes seconds, and a CPU needs none of it

    return mosaic_gpu.prefetch(store, expert_ids, num_rows, after)


IMPLEMENTATIONS = {"reference": reference.prefetch, "mosaic_gpu": _mosaic_gpu}


def resolve(implementation: str | None) -> str:
    """The name of the implementation that runs for this request. Raises as `prefetch` does."""
    return backends.resolve("prefetch", IMPLEMENTATIONS, implementation)


def now(after: Array) -> Int[Array, ""]:
    """The time once `after` is computed, an array whose values are of no matter: ns, of the clock of `came_at`.

    int32, and wraps around: of two times only the difference means something, in int32. In a program with
    `COMPILER_OPTIONS` it waits for nothing else. Only where arrivals have a clock. Times after the same array may be
    one.
    """
    from kernels_pallas import clock

    return clock.now(after)


def prefetch(
    store: Float[Array, "E 3 F D"],
    expert_ids: Int[Array, " P"],
    num_rows: Int[Array, " P"],
    after: Array | None = None,
    *,
    implementation: str | None = None,
) -> Arrivals:
    """The first `num_rows` rows of D values (of 3F) of each expert, whole but for the last: see `arrivals.share_out`.

    `store` is in host memory, everything else on the device. Experts of which a row comes are distinct; others are not
    read. On a GPU the copy runs beside whatever does not need it, in a program with `COMPILER_OPTIONS`, as soon as
    `after` is computed, if that is given: an array whose values are of no matter. There each tile's arrival is timed.

    Raises ValueError for a list of no expert or one without a number of rows for each, NotImplementedError for an
    implementation that cannot run here.
    """
    if expert_ids.ndim != 1 or not expert_ids.size or expert_ids.shape != num_rows.shape:
        raise ValueError(
            f"prefetch: expert_ids {expert_ids.shape} and num_rows {num_rows.shape} must be lists of at least one, one "
            "number of rows for each expert"
        )
    return IMPLEMENTATIONS[resolve(implementation)](store, expert_ids, num_rows, after)
