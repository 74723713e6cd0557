"""`fetch`: validates, then runs the best implementation here."""

from jaxtyping import Array, Float, Int

from kernels_pallas import backends
from kernels_pallas.fetch import reference
from kernels_pallas.prefetch import arrivals as prefetched
from kernels_pallas.prefetch.arrivals import Arrivals


def _mosaic_gpu(store, slots, expert_ids, slot_ids, count, arrivals, after):
    from kernels_pallas.fetch import mosaic_gpu  # importing Mosaic takes seconds, and a CPU needs none of it

    return mosaic_gpu.fetch(store, slots, expert_ids, slot_ids, count, arrivals, after)


IMPLEMENTATIONS = {"reference": reference.fetch, "mosaic_gpu": _mosaic_gpu}


def resolve(implementation: str | None) -> str:
    """The name of the implementation that runs for this request. Raises as `fetch` does."""
    return backends.resolve("fetch", IMPLEMENTATIONS, implementation)


def fetch(
    store: Float[Array, "E 3 F D"],
    slots: Float[Array, "R 3 F D"],
    expert_ids: Int[Array, " P"],
    slot_ids: Int[Array, " P"],
    count: Int[Array, ""],
    arrivals: Arrivals | None = None,
    after: Array | None = None,
    *,
    implementation: str | None = None,
) -> Float[Array, "R 3 F D"]:
    """`slots` with `slots[slot_ids[i]] = store[expert_ids[i]]` for i < count; in place where `slots` is donated.

    `store` is in host memory (`pinned_host`), everything else on the device; no host synchronisation is needed for
    the mosaic_gpu implementation. The slot ids of one plan are distinct; entries at and beyond `count` are not read.

    Rows that are among `arrivals` are taken from there, not from the store; of experts that the plan does not name,
    arrivals are of no matter.

    It begins when `after` is computed, if that is given: an array whose values are of no matter. On a GPU, in a program
    with `prefetch.api.COMPILER_OPTIONS`, the copy runs beside what has to do with neither slots nor `after`.

    Raises ValueError for shapes or dtypes that do not fit, NotImplementedError for an implementation that cannot run
    here.
    """
    if store.shape[1:] != slots.shape[1:] or store.dtype != slots.dtype:
        raise ValueError(
            f"fetch: store {store.dtype}{list(store.shape)} and slots {slots.dtype}{list(slots.shape)} must hold "
            "experts of one shape and dtype"
        )
    if expert_ids.ndim != 1 or expert_ids.shape != slot_ids.shape:
        raise ValueError(
            f"fetch: expert_ids {expert_ids.shape} and slot_ids {slot_ids.shape} must be equally long lists"
        )
    if why := arrivals and prefetched.problem(arrivals, slots):
        raise ValueError(f"fetch: {why}")
    return IMPLEMENTATIONS[resolve(implementation)](store, slots, expert_ids, slot_ids, count, arrivals, after)
