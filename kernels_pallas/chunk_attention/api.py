"""`chunk_attention`: validates, then runs the best implementation here."""

from jaxtyping import Array, Float, Int

from kernels_pallas import backends
from kernels_pallas.chunk_attention import cudnn, reference

FEW_QUERIES = 64  # so many go to one plain softmax, of few kernels; from where on a library is faster was not measured
IMPLEMENTATIONS = {"reference": reference.chunk_attention, "cudnn": cudnn.chunk_attention}
_WORKSPACES = {"reference": reference.workspace_bytes, "cudnn": cudnn.workspace_bytes}


def resolve(implementation: str | None) -> str:
    """The name of the implementation that runs for this request. Raises as `chunk_attention` does."""
    return backends.resolve("chunk_attention", IMPLEMENTATIONS, implementation)


def choose(implementation: str | None, queries, keys) -> str:
    """`resolve`, and for None the reference where cuDNN cannot do these shapes, and for few queries."""
    return backends.choose("chunk_attention", IMPLEMENTATIONS, implementation, lambda: _not_best(queries, keys))


def _not_best(queries, keys) -> str | None:
    num_queries = queries.shape[1]
    return f"{num_queries} queries are few" if num_queries <= FEW_QUERIES else cudnn.problem(queries, keys)


def workspace_bytes(implementation: str | None, queries, keys, sliding_window: int | None = None) -> int:
    """Bytes of temporaries of such a call, estimated from the arrays that live at the same time."""
    return _WORKSPACES[choose(implementation, queries, keys)](queries, keys, sliding_window)


def chunk_attention(
    queries: Float[Array, "B T N H"],
    keys: Float[Array, "B S K H"],
    values: Float[Array, "B S K H"],
    positions: Int[Array, "B T"],
    *,
    sliding_window: int | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T N H"]:
    """softmax(q kᵀ / sqrt(H)) v of a chunk of new tokens, whose keys and values are in the KV cache already.

    The positions of a sequence follow one another, from any start. A query sees the positions up to its own, with a
    sliding window only the last so many. Those behind it may hold any finite number: a weight of 0 times NaN is NaN.
    A query whose position was not written, or is beyond the end, gets a row that means nothing. Scores and softmax are
    float32.

    cudnn is for 16 bit and CUDA GPUs since Ampere (see `cudnn.problem`); use it without gradients. For
    implementation=None other calls go to the reference, and those of up to FEW_QUERIES a sequence.

    Raises ValueError for shapes that do not fit or a sliding_window below 1, NotImplementedError for an implementation
    that cannot run here or cannot do these shapes.
    """
    _require_fitting(queries, keys, values, positions, sliding_window)
    run = IMPLEMENTATIONS[choose(implementation, queries, keys)]
    return run(queries, keys, values, positions, sliding_window=sliding_window)


def _require_fitting(queries, keys, values, positions, sliding_window: int | None) -> None:
    if keys.ndim != 4 or keys.shape != values.shape or keys.dtype != values.dtype:
        raise ValueError(
            f"chunk_attention: keys {keys.dtype}{list(keys.shape)} and values {values.dtype}{list(values.shape)} must "
            "both be [B, S, K, H]"
        )
    batch, _, kv_heads, head_dim = keys.shape
    if queries.ndim != 4 or queries.shape[::3] != (batch, head_dim) or queries.shape[2] % kv_heads:
        raise ValueError(
            f"chunk_attention: queries {queries.shape} must be [B, T, N, H] for keys {keys.shape}, with B={batch}, "
            f"H={head_dim} and N a multiple of {kv_heads}"
        )
    if positions.shape != queries.shape[:2]:
        raise ValueError(
            f"chunk_attention: positions {positions.shape} must be [B, T] = {queries.shape[:2]}, as queries are"
        )
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(f"chunk_attention: sliding_window={sliding_window} must be at least 1, or None")
