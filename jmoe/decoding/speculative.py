"""Speculative decoding with the model as its own draft, in one jitted step (SpecMoE, arXiv 2604.10152).

A cycle drafts γ tokens with resident experts only, then verifies all of them in one pass of the whole model, which
fetches each expert it needs once. Draft and verification sample with the same noise, that of the token's position (see
`jmoe.decoding.sampling`): a draft is accepted where both came to the same token, and what is emitted is always the
verification's. So the tokens, greedy or sampled, are those that plain decoding gives.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jmoe.decoding.compiled import StepJit
from jmoe.decoding.sampling import NO_TOKEN, Mode, Sampling, sample
from jmoe.decoding.step import DecodeState, Steps
from jmoe.experts import draft
from jmoe.experts.draft import DraftConfig, DraftExperts, DraftSet
from jmoe.experts.residency import Counters
from jmoe.experts.slots import ExpertSlots
from jmoe.experts.store import ExpertStore
from jmoe.model.kv_cache import KVCache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Verified:
    """What cycles emitted: sequence b's tokens are the first `num_tokens[b]` of its row, NO_TOKEN the others.

    `num_verifications` counts the sequences of each cycle that were not done; `proposed` and `accepted` drafted tokens.
    `done` and `counters` are as in `jmoe.decoding.emitted.Emitted`.
    """

    token_ids: Int[Array, "B n"]
    logprobs: Float[Array, "B n"]
    num_tokens: Int[Array, " B"]
    num_cycles: Int[Array, ""]
    num_verifications: Int[Array, ""]
    proposed: Int[Array, ""]
    accepted: Int[Array, ""]
    done: Bool[Array, " B"] | None = None
    counters: Counters | None = None


def _verifies_in_waves(cycles: "SpeculativeSteps", params, store: ExpertStore, state: DecodeState, *_: Any) -> bool:
    return cycles.steps.in_waves(state.last_tokens.size * (cycles.max_draft_tokens + 1))


@dataclasses.dataclass(frozen=True)
class SpeculativeSteps:
    """The speculative step of a model: static and quickly hashed, as `Steps`, which has the plain ones.

    `max_draft_tokens` is the largest γ; each call says which it takes, and none compiles anew.
    """

    steps: Steps
    draft: DraftConfig
    max_draft_tokens: int

    @property
    def profiled(self) -> bool:
        return self.steps.profiled

    def __post_init__(self) -> None:
        if self.max_draft_tokens < 1:
            raise ValueError(f"draft tokens={self.max_draft_tokens} must be at least 1; 0 is plain decoding")
        if self.steps.config.rope.rope_type == "dynamic":
            raise ValueError(
                "speculative decoding does not go with rope_type 'dynamic', whose rotation changes with every token; "
                "decode without drafts"
            )

    @StepJit
    def start(self, experts: ExpertSlots, distances: Float[Array, "L E E"] | None = None) -> DraftSet:
        """The draft set before the first verification, or where plain steps came between."""
        return draft.start(self.draft, experts, distances, self.steps.policy)

    @functools.partial(
        StepJit,
        static_argnames=("capacity", "mode"),
        donate_argnames=("state", "draft_set"),
        overlaps=_verifies_in_waves,
    )
    def decode(
        self,
        params,
        store: ExpertStore,
        state: DecodeState,
        draft_set: DraftSet,
        distances: Float[Array, "L E E"] | None,
        sampling: Sampling,
        num_draft_tokens: Int[Array, ""],
        num_cycles: Int[Array, ""],
        *,
        capacity: int,
        mode: Mode,
    ) -> tuple[DecodeState, DraftSet, Verified]:
        """Up to `num_cycles` <= `capacity` (static) cycles for every sequence; stops when all are done."""
        batch, most = state.last_tokens.shape[0], capacity * (self.max_draft_tokens + 1)
        zero = jnp.zeros((), jnp.int32)
        verified = Verified(
            token_ids=jnp.full((batch, most), NO_TOKEN, jnp.int32),
            logprobs=jnp.zeros((batch, most), jnp.float32),
            num_tokens=jnp.zeros((batch,), jnp.int32),
            num_cycles=zero,
            num_verifications=zero,
            proposed=zero,
            accepted=zero,
        )

        def unfinished(loop) -> Bool[Array, ""]:
            state, _, verified = loop
            return (verified.num_cycles < jnp.minimum(num_cycles, capacity)) & ~jnp.all(state.done)

        def cycle(loop):
            state, draft_set, verified = loop
            return self._cycle(params, store, state, draft_set, verified, distances, sampling, num_draft_tokens, mode)

        state, draft_set, verified = jax.lax.while_loop(unfinished, cycle, (state, draft_set, verified))
        at_end = dataclasses.replace(verified, done=state.done, counters=state.experts.residency.decode)
        return state, draft_set, at_end

    def _cycle(
        self,
        params,
        store: ExpertStore,
        state: DecodeState,
        draft_set: DraftSet,
        verified: Verified,
        distances,
        sampling: Sampling,
        num_draft_tokens: Int[Array, ""],
        mode: Mode,
    ) -> tuple[DecodeState, DraftSet, Verified]:
        with jax.named_scope("draft"):
            drafted, cache = self._draft(params, state, draft_set, sampling, num_draft_tokens, mode)
        with jax.named_scope("verify"):
            state, tokens, logprobs, routings = self._verify(params, store, state, cache, drafted, sampling, mode)
        num_agreeing = jnp.sum(jnp.cumprod(drafted == tokens[:, :-1], axis=1), axis=1) * ~state.done
        num_emitted, state = _advance(state, tokens, logprobs, num_agreeing + 1, sampling)
        counts = self._counts(routings, num_emitted)
        draft_set = draft.refresh(self.draft, draft_set, counts, state.experts, distances)
        verified = dataclasses.replace(
            _append(verified, tokens, logprobs, num_emitted),
            num_cycles=verified.num_cycles + 1,
            num_verifications=verified.num_verifications + jnp.sum(num_emitted > 0),
            proposed=verified.proposed + jnp.sum(drafted != NO_TOKEN),
            accepted=verified.accepted + jnp.sum(jnp.minimum(num_agreeing, num_emitted)),
        )
        return state, draft_set, verified

    def _draft(
        self, params, state: DecodeState, draft_set: DraftSet, sampling: Sampling, num_draft_tokens, mode: Mode
    ) -> tuple[Int[Array, "B g"], KVCache]:
        """γ tokens a sequence, then NO_TOKEN; and the cache, whose new entries are the draft's and not to be kept.

        One less than a sequence may still produce: of its last token nothing has to be drafted. So no position is
        written that plain decoding would not write too, and the KV cache needs no more room.
        """
        steps = self.steps
        decoder = steps.decoder(params)
        experts = DraftExperts(state.experts, draft_set, self.draft.missing == "reroute", steps.implementation)

        def step(n, carry):
            cache, tokens, drafted = carry
            valid = ~state.done & (n + 1 < state.budget)
            hidden, cache, _ = decoder(tokens[:, None], valid[:, None], cache.lengths + 1, cache, experts, None)
            logits = decoder.unembed(hidden[:, 0])
            tokens, _ = sample(logits, sampling, cache.lengths, mode)
            shown = jnp.where(valid, tokens, NO_TOKEN)[:, None]
            return cache, tokens, jax.lax.dynamic_update_slice(drafted, shown, (0, n))

        nothing = jnp.full((state.done.shape[0], self.max_draft_tokens), NO_TOKEN, jnp.int32)
        cache, _, drafted = jax.lax.fori_loop(0, num_draft_tokens, step, (state.cache, state.last_tokens, nothing))
        return drafted, cache

    def _verify(self, params, store, state: DecodeState, cache: KVCache, drafted, sampling: Sampling, mode: Mode):
        """The model's own tokens [B, γ+1] after each of the last token and the drafted ones, in one pass.

        Its keys and values overwrite the draft's. A sequence is verified no further than its draft and its budget go.
        """
        steps, width = self.steps, self.max_draft_tokens + 1
        lengths = state.cache.lengths
        state = dataclasses.replace(state, cache=KVCache(cache.keys, cache.values, lengths))
        ahead = jnp.arange(width)[None, :]
        token_ids = jnp.concatenate([state.last_tokens[:, None], drafted], axis=1)
        valid = ~state.done[:, None] & (token_ids != NO_TOKEN) & (ahead < state.budget[:, None])
        decoder = steps.decoder(params)
        hidden, state, routings, _ = steps.forward(
            decoder, store, state, jnp.maximum(token_ids, 0), valid, lengths + 1, admits=True
        )
        logits = decoder.unembed(hidden)  # [B, γ+1, V]
        positions = lengths[:, None] + 1 + ahead
        rows = jax.tree.map(lambda leaf: jnp.repeat(leaf, width, axis=0), sampling)
        with jax.named_scope("sample"):
            tokens, logprobs = sample(logits.reshape(-1, logits.shape[-1]), rows, positions.reshape(-1), mode)
        state = dataclasses.replace(state, cache=KVCache(state.cache.keys, state.cache.values, lengths))
        return state, tokens.reshape(-1, width), logprobs.reshape(-1, width), routings

    def _counts(self, routings, num_emitted: Int[Array, " B"]) -> Float[Array, "L E"]:
        """How often each expert was chosen for a token that stays."""
        width, num_experts = self.max_draft_tokens + 1, self.steps.config.num_experts
        stays = (jnp.arange(width)[None, :] < num_emitted[:, None]).reshape(-1)  # [B*(γ+1)]
        ids = jnp.stack([routing.expert_ids for routing in routings])  # [L, B*(γ+1), A]
        chosen = ids[..., None] == jnp.arange(num_experts).reshape(1, 1, 1, -1)
        return jnp.sum(chosen & stays[None, :, None, None], axis=(1, 2)).astype(jnp.float32)


def _advance(
    state: DecodeState, tokens: Int[Array, "B w"], logprobs, num_agreed: Int[Array, " B"], sampling: Sampling
) -> tuple[Int[Array, " B"], DecodeState]:
    """Takes the agreed tokens of each sequence, up to an end of sequence and its budget: (how many, state)."""
    ahead = jnp.arange(tokens.shape[1])[None, :]
    is_eos = jnp.any(tokens[:, :, None] == sampling.eos_ids[:, None, :], axis=2)
    first_eos = jnp.min(jnp.where(is_eos, ahead, tokens.shape[1]), axis=1)
    num_emitted = jnp.minimum(jnp.minimum(num_agreed, state.budget), first_eos + 1)
    num_emitted = jnp.where(state.done, 0, num_emitted)
    last = jnp.maximum(num_emitted - 1, 0)[:, None]
    budget, produced = state.budget - num_emitted, num_emitted > 0
    cache = dataclasses.replace(state.cache, lengths=state.cache.lengths + num_emitted)
    advanced = dataclasses.replace(
        state,
        cache=cache,
        last_tokens=jnp.where(produced, jnp.take_along_axis(tokens, last, axis=1)[:, 0], state.last_tokens),
        last_logprobs=jnp.where(produced, jnp.take_along_axis(logprobs, last, axis=1)[:, 0], state.last_logprobs),
        budget=budget,
        done=state.done | (produced & ((first_eos < num_emitted) | (budget <= 0))),
    )
    return num_emitted, advanced


def _append(verified: Verified, tokens, logprobs, num_emitted) -> Verified:
    """Puts each sequence's new tokens behind those it has."""
    ahead = jnp.arange(tokens.shape[1])[None, :]
    at = jnp.where(ahead < num_emitted[:, None], verified.num_tokens[:, None] + ahead, verified.token_ids.shape[1])
    rows = jnp.arange(tokens.shape[0])[:, None]
    return dataclasses.replace(
        verified,
        token_ids=verified.token_ids.at[rows, at].set(tokens, mode="drop"),
        logprobs=verified.logprobs.at[rows, at].set(logprobs, mode="drop"),
        num_tokens=verified.num_tokens + num_emitted,
    )
