"""Prefill: a chunk of every prompt, a few layers at a time. One jitted program of so many layers, called for all.

A decode step is one program of all layers, since between two layers there is no time for the host. A chunk has so many
tokens that the host is soon ahead of the device; and a program of all layers would take as long to compile as the model
is deep, anew for each length of a chunk. To call a program takes the host a third of a millisecond beyond its kernels,
so it is not of one layer. But where experts stream, it is: then a layer has enough to do, and what copies and
multiplies at the same time is a CUDA graph, which XLA records anew for other layers' arrays before the device begins.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jmoe.decoding.compiled import Call, StepJit
from jmoe.decoding.emitted import Routed, routed_in
from jmoe.decoding.sampling import Mode, Sampling, sample
from jmoe.decoding.step import DecodeState, Steps
from jmoe.experts.execute_guess import ExecutedGuess
from jmoe.experts.layer import Observed, OffloadedExperts, ResidentExperts
from jmoe.experts.residency import Counters, LayerResidency, Residency, init_counters
from jmoe.experts.slots import ExpertSlots
from jmoe.experts.store import ExpertStore
from jmoe.experts.waves import Halves
from jmoe.model.decoder import Decoder, Placed, build_decoder, build_layer, exact, params_of_layers
from jmoe.model.kv_cache import KVCache

MOST_LAYERS = 8  # of a program where all experts are resident
Params = Mapping[str, Array]
KV = tuple[Float[Array, "B S K H"], ...]  # the keys, or the values, an array a layer
Run = Callable[[Call], Any]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chunk:
    """The next tokens of each prompt, [B, T]; the first `num_valid` of a row are tokens.

    `is_last` marks the prompts that end in this chunk, `prompt_lengths` is their whole length.
    """

    token_ids: Int[Array, "B T"]
    num_valid: Int[Array, " B"]
    is_last: Bool[Array, " B"]
    prompt_lengths: Int[Array, " B"]

    @property
    def valid(self) -> Bool[Array, "B T"]:
        return jnp.arange(self.token_ids.shape[1])[None, :] < self.num_valid[:, None]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerInputs:
    """What a layer reads and leaves as it is; one that is no mixture of experts has parameters alone."""

    params: dict[str, Array]
    weights: Float[Array, "E 3 F D"] | None
    slots: Float[Array, "S 3 F D"] | None
    residency: LayerResidency | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Flow:
    """What goes from layers to layers, donated to each: the residual stream x, what is to be added to it, staging."""

    x: Float[Array, "B T D"]
    added: Float[Array, "B T D"]
    staging: Halves


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Passed:
    """A chunk behind the last layer: x and what is to be added to it, where its tokens lie, and of each program that
    had mixtures of experts what they asked for and, if the steps record, routed.
    """

    x: Float[Array, "B T D"]
    added: Float[Array, "B T D"]
    placed: Placed
    counters: list[Counters]
    routed: list[Routed]


@dataclasses.dataclass(frozen=True)
class Prefill:
    """How a model takes in prompts: static and quickly hashed, as `Steps`. Nothing is admitted, see `OffloadedExperts`.

    `run` of `chunk` and `hidden` makes the calls of the jitted parts.
    """

    steps: Steps

    @property
    def profiled(self) -> bool:
        return self.steps.profiled

    def in_waves(self, *_: Any) -> bool:
        return not (self.steps.resident or self.steps.layout.all_resident)

    def chunk(
        self,
        params: Params,
        store: ExpertStore,
        state: DecodeState,
        chunk: Chunk,
        sampling: Sampling,
        *,
        mode: Mode,
        run: Run = Call.run,
    ) -> tuple[DecodeState, Routed | None]:
        """Takes in one chunk of every prompt; a prompt that ends in it gets its first token sampled.

        Also what was routed, if the steps record. `state` is donated.
        """
        ends, state, passed = self._through_layers(params, store, state, chunk, run)
        args = ends, state, passed, chunk.is_last, sampling
        return run(Call(self, "prefill_end", chunk.token_ids.shape, args, {"mode": mode}))

    def hidden(
        self,
        params: Params,
        store: ExpertStore,
        state: DecodeState,
        chunk: Chunk,
        executed: ExecutedGuess | None = None,
        *,
        run: Run = Call.run,
    ) -> tuple[Float[Array, "B T D"], DecodeState]:
        """As `chunk`, but returns the hidden states of the whole chunk and samples nothing.

        With `executed` they are those that decoding the chunk with these guesses would give.
        """
        shape = chunk.token_ids.shape
        if executed is not None:
            of_guess = shape, jax.tree.structure(executed)  # which layers, and how
            return run(Call(self, "prefill_guessed", of_guess, (params, store, state, chunk, executed), {}))
        ends, state, passed = self._through_layers(params, store, state, chunk, run)
        return run(Call(self, "prefill_hidden", shape, (ends, state, passed), {}))

    def _through_layers(
        self, params: Params, store: ExpertStore, state: DecodeState, chunk: Chunk, run: Run
    ) -> tuple[Params, DecodeState, Passed]:
        """The parameters around the layers, the state with all that layers change, and what they leave."""
        of_layers, ends = params_of_layers(params, self.steps.config.num_hidden_layers)
        shape, cache, experts = chunk.token_ids.shape, state.cache, state.experts
        x, added, placed = run(Call(self, "prefill_begin", shape, (ends, cache.lengths, chunk), {}))
        flow, counters, routed = Flow(x, added, experts.staging), [], []
        inputs, keys, values = self._inputs(of_layers, store, experts), (), ()
        for part in _parts(len(inputs), 1 if self.in_waves() else MOST_LAYERS):
            kinds = tuple(each.weights is not None for each in inputs[part])
            args = inputs[part], (cache.keys[part], cache.values[part]), flow, placed
            new, flow, counted, chosen = run(Call(self, "prefill_layers", (shape, kinds), args, {}))
            keys, values = (*keys, *new[0]), (*values, *new[1])
            counters += [] if counted is None else [counted]
            routed += [] if chosen is None else [chosen]
        cache = KVCache(keys, values, cache.lengths)
        state = dataclasses.replace(state, cache=cache, experts=dataclasses.replace(experts, staging=flow.staging))
        return ends, state, Passed(flow.x, flow.added, placed, counters, routed)

    def _inputs(self, of_layers: list[dict[str, Array]], store: ExpertStore, experts: ExpertSlots) -> list[LayerInputs]:
        numbers = {layer: number for number, layer in enumerate(self.steps.config.moe_layers)}

        def inputs(layer: int) -> LayerInputs:
            if layer not in numbers:
                return LayerInputs(of_layers[layer], None, None, None)
            n = numbers[layer]
            slots = experts.layers[n] if experts.layers else None  # the reference has none
            return LayerInputs(of_layers[layer], store.layers[n], slots, experts.residency.layers[n])

        return [inputs(layer) for layer in range(len(of_layers))]

    @functools.partial(StepJit, repeats=False)
    def prefill_begin(
        self, params: Params, lengths: Int[Array, " B"], chunk: Chunk
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B T D"], Placed]:
        """The chunk's embeddings, to which nothing is yet to be added, and where its tokens lie behind `lengths`."""
        with jax.named_scope("prefill"), exact(self.steps.config.dtype):
            placed = Placed.after(lengths, chunk.valid, chunk.prompt_lengths, self.steps.config)
            x = self._ends(params).embed(chunk.token_ids)
            return x, jnp.zeros_like(x), placed

    @functools.partial(StepJit, donate_argnames=("kv", "flow"), overlaps=in_waves, repeats=False)
    def prefill_layers(
        self, inputs: list[LayerInputs], kv: tuple[KV, KV], flow: Flow, placed: Placed
    ) -> tuple[tuple[KV, KV], Flow, Counters | None, Routed | None]:
        """A few layers: their keys and values, what goes to the next ones, what they asked for and routed.

        These are None where all of them are dense layers.
        """
        config, moe_inputs = self.steps.config, [each for each in inputs if each.weights is not None]
        cache, x, added = KVCache(*kv, placed.positions[:, 0]), flow.x, flow.added
        experts = self._experts(moe_inputs, flow.staging)
        moe, number = Observed(experts), 0
        carry: Any = experts.start(), ()
        for n, each in enumerate(inputs):
            is_moe = each.weights is not None
            layer = build_layer(config, is_moe, each.params, self.steps.implementation)
            with jax.named_scope("prefill"), exact(config.dtype):
                x, added, cache, carry = layer(x, added, placed, cache, n, moe, number, carry)
            number += is_moe
        new_kv = cache.keys, cache.values
        if not moe_inputs:
            return new_kv, Flow(x, added, flow.staging), None, None
        carry, routings = carry
        after = experts.finish(carry)
        routed = routed_in(routings, x.shape[0]) if self.steps.record else None
        return new_kv, Flow(x, added, after.staging), after.residency.prefill, routed

    def _experts(self, inputs: list[LayerInputs], staging: Halves) -> ResidentExperts | OffloadedExperts:
        """Those of a model of these layers alone."""
        number, zero = len(inputs), jnp.zeros((), jnp.int32)
        steps = dataclasses.replace(self.steps, layout=dataclasses.replace(self.steps.layout, num_layers=number))
        layers = tuple(each.residency for each in inputs if each.residency is not None)
        residency = Residency(layers, {}, zero, init_counters(number), init_counters(number))
        slots = tuple(each.slots for each in inputs if each.slots is not None)
        weights = tuple(each.weights for each in inputs if each.weights is not None)
        return steps.experts(ExpertStore(weights), ExpertSlots(slots, staging, residency), admits=False)

    @functools.partial(StepJit, static_argnames=("mode",), donate_argnames=("state",), repeats=False)
    def prefill_end(
        self,
        params: Params,
        state: DecodeState,
        passed: Passed,
        is_last: Bool[Array, " B"],
        sampling: Sampling,
        *,
        mode: Mode,
    ) -> tuple[DecodeState, Routed | None]:
        """The tokens of those prompts that end, from what the last layer left."""
        state, ends, routed = _counted(state, passed), self._ends(params), passed.routed
        at = jnp.maximum(jnp.sum(passed.placed.valid, axis=1) - 1, 0)[:, None, None]
        x, added = (jnp.take_along_axis(each, at, axis=1) for each in (passed.x, passed.added))  # [B, 1, D]
        with jax.named_scope("prefill"):
            with exact(self.steps.config.dtype):
                hidden = ends.finish(x, added)
            logits = ends.unembed(hidden[:, 0])
            with jax.named_scope("sample"):
                tokens, logprobs = sample(logits, sampling, state.cache.lengths, mode)
        state = self.steps.advance(state, is_last, tokens, logprobs, sampling)
        return state, jax.tree.map(lambda *layers: jnp.concatenate(layers, axis=1), *routed) if routed else None

    @functools.partial(StepJit, donate_argnames=("state",), repeats=False)
    def prefill_hidden(
        self, params: Params, state: DecodeState, passed: Passed
    ) -> tuple[Float[Array, "B T D"], DecodeState]:
        """The hidden states, from what the last layer left."""
        with exact(self.steps.config.dtype):
            return self._ends(params).finish(passed.x, passed.added), _counted(state, passed)

    @functools.partial(StepJit, donate_argnames=("state",), overlaps=in_waves, repeats=False)
    def prefill_guessed(
        self, params: Params, store: ExpertStore, state: DecodeState, chunk: Chunk, executed: ExecutedGuess
    ) -> tuple[Float[Array, "B T D"], DecodeState]:
        """`hidden` with guesses, which go from layer to layer: all layers in one program."""
        inputs = self.steps.decoder(params), store, state, chunk.token_ids, chunk.valid, chunk.prompt_lengths
        hidden, state, *_ = self.steps.forward(*inputs, admits=False, executed=executed)
        return hidden, state

    def _ends(self, params: Params) -> Decoder:
        """The decoder without its layers."""
        return build_decoder(self.steps.config, params, self.steps.implementation, with_layers=False)


def _parts(num_layers: int, most: int) -> list[slice]:
    """As few parts as can be, of as many layers each as far as that goes: then they share a program."""
    num_parts = -(-num_layers // most)
    size = -(-num_layers // num_parts)
    return [slice(start, min(start + size, num_layers)) for start in range(0, num_layers, size)]


def _counted(state: DecodeState, passed: Passed) -> DecodeState:
    """After a chunk: with its tokens in the KV cache, and what its layers asked for."""
    residency = state.experts.residency
    of_chunk = jax.tree.map(lambda *layers: jnp.concatenate(layers), *passed.counters)
    residency = dataclasses.replace(residency, prefill=jax.tree.map(jnp.add, residency.prefill, of_chunk))
    experts = dataclasses.replace(state.experts, residency=residency)
    return dataclasses.replace(state, cache=state.cache.advanced(passed.placed.valid), experts=experts)
