"""`decode_attention`: validates, then runs the best implementation here."""

from jaxtyping import Array, Bool, Float, Int

from kernels_pallas import backends
from kernels_pallas.decode_attention import reference


def _mosaic_gpu(*arrays, **options):
    from kernels_pallas.decode_attention import mosaic_gpu  # importing Mosaic takes seconds, and a CPU needs none of it

    return mosaic_gpu.decode_attention(*arrays, **options)


IMPLEMENTATIONS = {"reference": reference.decode_attention, "mosaic_gpu": _mosaic_gpu}


def resolve(implementation: str | None) -> str:
    """The name of the implementation that runs for this request. Raises as `decode_attention` does."""
    return backends.resolve("decode_attention", IMPLEMENTATIONS, implementation)


def choose(implementation: str | None, qkv, keys, num_heads: int) -> str:
    """`resolve`, and for None the reference where the kernels cannot do these shapes."""
    return backends.choose(
        "decode_attention", IMPLEMENTATIONS, implementation, lambda: _mosaic_gpu_problem(qkv, keys, num_heads)
    )


def _mosaic_gpu_problem(qkv, keys, num_heads: int) -> str | None:
    from kernels_pallas.decode_attention import mosaic_gpu

    return mosaic_gpu.problem(qkv, keys, num_heads)


def decode_attention(
    qkv: Float[Array, "B Q"],
    q_scale: Float[Array, " H"],
    k_scale: Float[Array, " H"],
    cos: Float[Array, "B H/2"],
    sin: Float[Array, "B H/2"],
    keys: Float[Array, "B S K H"],
    values: Float[Array, "B S K H"],
    positions: Int[Array, " B"],
    valid: Bool[Array, " B"],
    *,
    num_heads: int,
    sliding_window: int | None = None,
    eps: float,
    implementation: str | None = None,
) -> tuple[Float[Array, "B O"], Float[Array, "B S K H"], Float[Array, "B S K H"]]:
    """Attention of one new token a sequence, and keys and values with it at its position.

    qkv is what the projection gives: N queries, K keys, K values; the output is [B, N * H]. Queries and keys are normed
    (RMS, times their scale) and rotated (float32, each step rounded to the dtype). Key and value of a valid sequence
    are written at its position, in place where the arrays are donated. The query sees the positions up to its own, with
    a sliding window only the last so many; those behind it may hold any number. A sequence that is not valid, or
    whose position is beyond the end, writes nothing, and its row of the output means nothing.

    mosaic_gpu reads no more of keys and values than is seen, in tiles, so that what lies behind may even be NaN. It is
    for 16 bit and Hopper (see `mosaic_gpu.problem`), and has no gradient. For implementation=None other calls go to the
    reference.

    Raises ValueError for shapes that do not fit, NotImplementedError for an implementation that cannot run here or
    cannot do these shapes.
    """
    _require_fitting(qkv, q_scale, k_scale, cos, sin, keys, values, positions, valid, num_heads=num_heads)
    run = IMPLEMENTATIONS[choose(implementation, qkv, keys, num_heads)]
    arrays = (qkv, q_scale, k_scale, cos, sin, keys, values, positions, valid)
    return run(*arrays, num_heads=num_heads, sliding_window=sliding_window, eps=eps)


def _require_fitting(qkv, q_scale, k_scale, cos, sin, keys, values, positions, valid, *, num_heads: int) -> None:
    if keys.ndim != 4 or keys.shape != values.shape or keys.dtype != values.dtype:
        raise ValueError(
            f"decode_attention: keys {keys.dtype}{list(keys.shape)} and values {values.dtype}{list(values.shape)} must "
            "both be [B, S, K, H]"
        )
    batch, _, kv_heads, head_dim = keys.shape
    if num_heads % kv_heads:
        raise ValueError(f"decode_attention: num_heads={num_heads} must be a multiple of the {kv_heads} heads of keys")
    expected = {
        "qkv": (qkv, (batch, (num_heads + 2 * kv_heads) * head_dim)),
        "q_scale": (q_scale, (head_dim,)),
        "k_scale": (k_scale, (head_dim,)),
        "cos": (cos, (batch, head_dim // 2)),
        "sin": (sin, (batch, head_dim // 2)),
        "positions": (positions, (batch,)),
        "valid": (valid, (batch,)),
    }
    for name, (array, shape) in expected.items():
        if array.shape != shape:
            raise ValueError(
                f"decode_attention: {name} {array.shape} must be {shape} for num_heads={num_heads} and keys "
                f"{keys.shape}"
            )
