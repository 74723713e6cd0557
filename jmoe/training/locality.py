"""What makes consecutive tokens choose the same experts: L_Trust and the parts of L_Loc of ReMoE (arXiv 2605.27081).

Each term is a mean over tokens, sequences and layers, of the routers' log-probabilities log_p [L, B, T, E], float32:
log_softmax over all experts, in L layers, of B sequences of T tokens. `valid` [B, T] marks the tokens that count; a
pair of tokens counts if both do. Formulas write p for exp(log_p), H for entropy, A for the experts of a token.

All are means over layers, lags and windows. The weights of the terms are the caller's: none are published.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

LAGS = (1, 2, 4, 8, 16)  # tokens
_EPSILON = 1e-8  # the paper's, inside the logarithm of the reuse term


def trust(
    log_p: Float[Array, "L B T E"], log_reference: Float[Array, "L B T E"], valid: Bool[Array, "B T"]
) -> Float[Array, ""]:
    """mean KL(p ‖ stop_gradient(reference)), nats: how far routing has moved from the frozen router's (L_Trust).

    The reference is the frozen router's answer to what the tuned model's layer reads now.
    """
    reference = jax.lax.stop_gradient(log_reference)
    return _mean(jnp.sum(jnp.exp(log_p) * (log_p - reference), axis=-1), valid)


def reuse(
    log_p: Float[Array, "L B T E"], expert_ids: Int[Array, "L B T A"], valid: Bool[Array, "B T"]
) -> Float[Array, ""]:
    """mean over layers of -log(mean over t of m_t), m_t = 1/A · sum of p_t over the experts of token t-1 (L_Reuse).

    The experts of token t-1 are a fixed set: only p_t has a gradient. m_t is at most 1/A, so the term is at least
    log A.
    """
    before = jax.lax.stop_gradient(expert_ids[:, :, :-1])
    mass = jnp.mean(jnp.exp(jnp.take_along_axis(log_p[:, :, 1:], before, axis=-1)), axis=-1)  # [L, B, T-1]
    pairs = jnp.broadcast_to(valid[:, 1:] & valid[:, :-1], mass.shape)
    per_layer = jnp.sum(jnp.where(pairs, mass, 0.0), axis=(1, 2)) / jnp.maximum(jnp.sum(pairs, axis=(1, 2)), 1)
    return -jnp.mean(jnp.log(per_layer + _EPSILON))


def smoothness(log_p: Float[Array, "L B T E"], valid: Bool[Array, "B T"]) -> Float[Array, ""]:
    """mean over t of SymKL(p_t, p_(t-1)), nats; the gradient moves both (L_Smooth)."""
    return divergence_at(log_p, valid, 1)


def lagged(log_p: Float[Array, "L B T E"], valid: Bool[Array, "B T"], lags: tuple[int, ...] = LAGS) -> Float[Array, ""]:
    """mean over lags d of mean over t of SymKL(p_t, p_(t-d)), nats (L_Lag). Raises ValueError for a lag >= T."""
    return jnp.mean(jnp.stack([divergence_at(log_p, valid, lag) for lag in lags]))


def divergence_at(log_p: Float[Array, "L B T E"], valid: Bool[Array, "B T"], lag: int) -> Float[Array, ""]:
    """mean over t of SymKL(p_t, p_(t-lag)), nats; SymKL(p, q) = (KL(p ‖ q) + KL(q ‖ p)) / 2.

    That is sum((p - q) (log p - log q)) / 2. Raises ValueError unless 1 <= lag < T.
    """
    num_tokens = log_p.shape[2]
    if not 1 <= lag < num_tokens:
        raise ValueError(f"lag {lag} is outside 1..{num_tokens - 1} for sequences of {num_tokens} tokens; take longer")
    now, then = log_p[:, :, lag:], log_p[:, :, :-lag]
    return _mean(
        0.5 * jnp.sum((jnp.exp(now) - jnp.exp(then)) * (now - then), axis=-1), valid[:, lag:] & valid[:, :-lag]
    )


def window_entropy(log_p: Float[Array, "L B T E"], valid: Bool[Array, "B T"], window: int) -> Float[Array, ""]:
    """mean over blocks of `window` tokens of H(mean of p over the block), nats (L_WS).

    Small if few experts serve a block. Tokens after the last whole block are left out, as is a block with a token that
    does not count. Raises ValueError unless 1 <= window <= T.
    """
    layers, batch, num_tokens, num_experts = log_p.shape
    if not 1 <= window <= num_tokens:
        raise ValueError(f"window {window} is outside 1..{num_tokens}, the tokens of a sequence; choose another")
    blocks = num_tokens // window
    shape = batch, blocks, window
    share = jnp.mean(jnp.exp(log_p[:, :, : blocks * window]).reshape(layers, *shape, num_experts), axis=3)
    entropy = -jnp.sum(share * jnp.log(jnp.maximum(share, jnp.finfo(share.dtype).tiny)), axis=-1)  # [L, B, blocks]
    return _mean(entropy, jnp.all(valid[:, : blocks * window].reshape(shape), axis=-1))


def overlap(expert_ids: Int[Array, "L B T A"], valid: Bool[Array, "B T"]) -> Float[Array, ""]:
    """mean |S_t & S_(t-1)| / A of the experts S that tokens go to: what the terms are after; it has no gradient."""
    same = expert_ids[:, :, 1:, :, None] == expert_ids[:, :, :-1, None, :]  # [L, B, T-1, A, A]
    return _mean(jnp.sum(same, axis=(-1, -2)) / expert_ids.shape[-1], valid[:, 1:] & valid[:, :-1])


def _mean(values: Float[Array, "L B N"], counts: Bool[Array, "B N"]) -> Float[Array, ""]:
    """Over layers, and those [B, N] that count; 0 if none does."""
    return jnp.sum(jnp.where(counts[None], values, 0.0)) / jnp.maximum(values.shape[0] * jnp.sum(counts), 1)
