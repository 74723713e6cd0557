"""The jitted step of decoding, up to n tokens a call: from token ids to token ids, all of it one program."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jmoe.config import ModelConfig
from jmoe.decoding.compiled import StepJit
from jmoe.decoding.emitted import Emitted, Routed, emit, nothing_emitted
from jmoe.decoding.sampling import Mode, Sampling, sample, token_logprobs
from jmoe.experts.execute_guess import ExecutedGuess, GuessedRouting
from jmoe.experts.layer import Observed, OffloadedExperts, ResidentExperts
from jmoe.experts.look_ahead import Foresight, Prefetch, Prefetched, no_rows
from jmoe.experts.policies import DEFAULT_POLICY
from jmoe.experts.prefetch import PastRequests
from jmoe.experts.slots import ExpertSlots, SlotLayout
from jmoe.experts.store import ExpertStore
from jmoe.model.decoder import Decoder, build_decoder
from jmoe.model.kv_cache import KVCache, init_kv_cache
from jmoe.model.router import Routing


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """All that changes from step to step; donated to each.

    `last_tokens` are sampled but not yet in the KV cache. `budget` counts the tokens a sequence may still produce.
    """

    cache: KVCache
    experts: ExpertSlots
    last_tokens: Int[Array, " B"]
    last_logprobs: Float[Array, " B"]
    budget: Int[Array, " B"]
    done: Bool[Array, " B"]


def init_state(
    config: ModelConfig,
    batch_size: int,
    max_seq_len: int,
    budget: Sequence[int] | np.ndarray,
    experts: ExpertSlots,
    cache: KVCache | None = None,
) -> DecodeState:
    """A batch that has seen nothing; sequence b may produce budget[b] tokens. `cache` is an empty one, if there is one.

    Everything is committed to its device, as a step's outputs are: else the second call would compile anew.
    """
    state = DecodeState(
        cache=cache or init_kv_cache(config, batch_size, max_seq_len),
        experts=experts,
        last_tokens=jnp.zeros((batch_size,), jnp.int32),
        last_logprobs=jnp.zeros((batch_size,), jnp.float32),
        budget=jnp.asarray(np.asarray(budget, np.int32)),
        done=jnp.zeros((batch_size,), bool),
    )
    return jax.device_put(state, jax.devices()[0])


def _decodes_in_waves(steps: "Steps", params, store: ExpertStore, state: DecodeState, *_: Any) -> bool:
    return steps.in_waves(state.last_tokens.size)


@dataclasses.dataclass(frozen=True)
class Steps:
    """The steps of one model. Everything here is static and quickly hashed, so that it may be `self` under jit.

    `params` of a step are the trunk's parameters by flat path, see `jmoe.model.families.trunk_shapes`.
    """

    config: ModelConfig
    layout: SlotLayout
    implementation: str | None = None
    resident: bool = False  # the reference: the store is on the device, and the slots are not used
    record: bool = False  # whether prefill and decode also return what was routed
    policy: str = DEFAULT_POLICY  # of residency, a name of `jmoe.experts.policies.POLICIES`
    profiled: bool = False  # whether a profiler is to see every kernel, see `StepJit`

    def in_waves(self, num_rows: int) -> bool:
        """Whether steps that admit, of so many tokens, may need more experts of a layer than it has slots."""
        return not self.resident and self.layout.overflows(num_rows * self.config.num_experts_per_tok)

    def decoder(self, params) -> Decoder:
        """The model with these parameters."""
        return build_decoder(self.config, params, self.implementation)

    def experts(
        self, store: ExpertStore, slots: ExpertSlots, *, admits: bool, prefetch: Prefetch | None = None
    ) -> ResidentExperts | OffloadedExperts:
        """What the layers of a step multiply with."""
        if self.resident:
            return ResidentExperts(store.layers, slots, self.implementation)
        return OffloadedExperts(store, slots, self.layout, admits, self.implementation, self.policy, prefetch)

    def forward(
        self,
        decoder: Decoder,
        store,
        state: DecodeState,
        token_ids,
        valid,
        rope_lengths,
        *,
        admits: bool,
        prefetch: Prefetch | None = None,
        executed: ExecutedGuess | None = None,
    ) -> tuple[Float[Array, "B T D"], DecodeState, tuple[Routing, ...], Prefetched | None]:
        """Hidden states, the state after, and what the step's layers computed (their routing, or what was guessed with
        `executed`) and had early.
        """
        experts = self.experts(store, state.experts, admits=admits, prefetch=prefetch)
        moe, start = Observed(experts), (experts.start(), ())
        inputs = token_ids, valid, rope_lengths, state.cache
        if executed is None:
            hidden, cache, (carry, routings) = decoder(*inputs, moe, start)
        else:
            guessed = GuessedRouting(moe, executed)
            hidden, cache, ((carry, routings), _) = decoder(*inputs, guessed, guessed.start(start))
        state = dataclasses.replace(state, cache=cache, experts=experts.finish(carry))
        return hidden, state, routings, experts.prefetched(carry)

    @StepJit
    def unembed(self, params, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Logits of hidden states."""
        return self.decoder(params).unembed(hidden)

    @StepJit
    def token_logprobs(self, params, hidden: Float[Array, "B T D"], targets: Int[Array, "B T"]) -> Float[Array, "B T"]:
        """Natural log-probability of each target after its hidden state, float32: log_softmax(logits)[targets]."""
        return token_logprobs(self.decoder(params).unembed(hidden), targets)

    @functools.partial(
        StepJit, static_argnames=("capacity", "mode"), donate_argnames=("state",), overlaps=_decodes_in_waves
    )
    def decode(
        self,
        params,
        store: ExpertStore,
        state: DecodeState,
        sampling: Sampling,
        num_steps: Int[Array, ""],
        executed: ExecutedGuess | None = None,
        *,
        capacity: int,
        mode: Mode,
    ) -> tuple[DecodeState, Emitted]:
        """Up to `num_steps` <= `capacity` (static) tokens for every sequence; stops when all are done.

        With `executed` they are other tokens: some layers compute guessed experts.
        """
        return self._decode(params, store, state, sampling, num_steps, None, executed, capacity, mode)

    @functools.partial(
        StepJit,
        static_argnames=("prefetch_experts", "capacity", "mode"),
        donate_argnames=("state",),
        overlaps=lambda *_: True,
    )
    def decode_prefetching(
        self,
        params,
        store: ExpertStore,
        state: DecodeState,
        sampling: Sampling,
        num_steps: Int[Array, ""],
        predictor: Foresight,
        prefetch_rows: Int[Array, ""],
        *,
        prefetch_experts: int,
        capacity: int,
        mode: Mode,
    ) -> tuple[DecodeState, Emitted]:
        """As `decode`, with the same tokens; for each layer that the predictor knows of so many rows of D values, of so
        many experts at most, come before its router has asked. An `ExecutedGuess` that looks ahead is executed too.
        """
        num_choices = state.last_tokens.size * self.config.num_experts_per_tok
        prefetch = Prefetch(prefetch_experts, prefetch_rows, predictor, num_choices)
        ahead = predictor.ahead if isinstance(predictor, PastRequests) else predictor
        executed = ahead if isinstance(ahead, ExecutedGuess) else None
        return self._decode(params, store, state, sampling, num_steps, prefetch, executed, capacity, mode)

    def _decode(
        self,
        params,
        store,
        state: DecodeState,
        sampling: Sampling,
        num_steps,
        prefetch: Prefetch | None,
        executed: ExecutedGuess | None,
        capacity: int,
        mode: Mode,
    ) -> tuple[DecodeState, Emitted]:
        batch = state.last_tokens.shape[0]
        emitted = dataclasses.replace(
            nothing_emitted(batch, capacity),
            routed=self._room_for_routing(capacity, batch) if self.record else None,
            prefetched=None if prefetch is None or self.resident else no_rows(self.layout.num_layers),
        )

        def unfinished(loop: tuple[DecodeState, Emitted]) -> Bool[Array, ""]:
            state, emitted = loop
            return (emitted.num_steps < jnp.minimum(num_steps, capacity)) & ~jnp.all(state.done)

        def step(loop: tuple[DecodeState, Emitted]) -> tuple[DecodeState, Emitted]:
            state, emitted = loop
            was_done = state.done
            state, routings, counts = self._decode_step(params, store, state, sampling, prefetch, executed, mode)
            return state, emit(emitted, state.last_tokens, state.last_logprobs, was_done, routings, counts)

        state, emitted = jax.lax.while_loop(unfinished, step, (state, emitted))
        return state, dataclasses.replace(emitted, done=state.done, counters=state.experts.residency.decode)

    def _room_for_routing(self, num_steps: int, batch_size: int) -> Routed:
        shape = num_steps, self.layout.num_layers, batch_size, 1, self.config.num_experts_per_tok
        return Routed(jnp.full(shape, self.config.num_experts, jnp.uint16), jnp.zeros(shape, jnp.float16))

    def _decode_step(self, params, store, state: DecodeState, sampling: Sampling, prefetch, executed, mode: Mode):
        decoder, active = self.decoder(params), ~state.done
        token_ids, rope_lengths = state.last_tokens[:, None], state.cache.lengths + 1
        valid = active[:, None]
        hidden, state, routings, counts = self.forward(
            decoder, store, state, token_ids, valid, rope_lengths, admits=True, prefetch=prefetch, executed=executed
        )
        logits = decoder.unembed(hidden[:, 0])
        with jax.named_scope("sample"):
            tokens, logprobs = sample(logits, sampling, state.cache.lengths, mode)
        return self.advance(state, active, tokens, logprobs, sampling), routings, counts

    @staticmethod
    def advance(state: DecodeState, produced: Bool[Array, " B"], tokens, logprobs, sampling: Sampling) -> DecodeState:
        """Takes the new tokens of the sequences that produced one; an end of sequence or of the budget ends those."""
        budget = state.budget - produced
        ended = jnp.any(tokens[:, None] == sampling.eos_ids, axis=1) | (budget <= 0)
        return dataclasses.replace(
            state,
            last_tokens=jnp.where(produced, tokens, state.last_tokens),
            last_logprobs=jnp.where(produced, logprobs, state.last_logprobs),
            budget=budget,
            done=state.done | (produced & ended),
        )
