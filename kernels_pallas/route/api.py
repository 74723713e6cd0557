"""`route`: validates, then runs the best implementation here."""

from jaxtyping import Array, Bool, Float, Int

from kernels_pallas import backends
from kernels_pallas.route import reference


def _mosaic_gpu(logits, valid, **options):
    from kernels_pallas.route import mosaic_gpu  # importing Mosaic takes seconds, and a CPU needs none of it

    return mosaic_gpu.route(logits, valid, **options)


IMPLEMENTATIONS = {"reference": reference.route, "mosaic_gpu": _mosaic_gpu}


def resolve(implementation: str | None) -> str:
    """The name of the implementation that runs for this request. Raises as `route` does."""
    return backends.resolve("route", IMPLEMENTATIONS, implementation)


def choose(implementation: str | None, logits) -> str:
    """`resolve`, and for None the reference where the kernel cannot do these shapes. Raises as `route` does."""
    return backends.choose("route", IMPLEMENTATIONS, implementation, lambda: _mosaic_gpu_problem(logits))


def _mosaic_gpu_problem(logits) -> str | None:
    from kernels_pallas.route import mosaic_gpu

    return mosaic_gpu.problem(logits)


def route(
    logits: Float[Array, "T E"],
    valid: Bool[Array, " T"],
    *,
    num_chosen: int,
    normalize: bool,
    implementation: str | None = None,
) -> tuple[Int[Array, "T A"], Float[Array, "T A"]]:
    """The `num_chosen` = A experts of each row with the largest softmax(logits), and that as their weights.

    Of equals the one with the smaller number is chosen; the chosen ones come in ascending order. `normalize` makes the
    weights of a row sum to 1. A row that is not valid asks for expert E with weight 0; what is chosen never weighs 0,
    but the smallest normal number at least, so that weights tell who is asked for. Logits are float32.

    mosaic_gpu has no gradient. For implementation=None calls that it cannot do go to the reference.

    Raises ValueError for shapes that do not fit, NotImplementedError for an implementation that cannot run here or
    cannot do these shapes.
    """
    if logits.ndim != 2 or valid.shape != logits.shape[:1]:
        raise ValueError(f"route: logits {logits.shape} must be [T, E], and valid {valid.shape} [T]")
    if not 1 <= num_chosen <= logits.shape[1]:
        raise ValueError(f"route: num_chosen={num_chosen} must be 1 to the number of experts, {logits.shape[1]}")
    run = IMPLEMENTATIONS[choose(implementation, logits)]
    return run(logits, valid, num_chosen=num_chosen, normalize=normalize)
