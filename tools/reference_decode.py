"""Decode with every expert on the device and no slots: what the rows of `tools.bench_decode` are compared with."""

import statistics
import time
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Int

from jmoe import memory
from jmoe.batch import prompt_chunks
from jmoe.config import ModelConfig, RuntimeConfig
from jmoe.decoding.prefill import Prefill
from jmoe.decoding.sampling import Mode, Sampling, SamplingParams, batch_sampling, sampling_mode
from jmoe.decoding.step import DecodeState, Steps, init_state
from jmoe.engine import Weights, plan_for
from jmoe.experts.residency import init_residency
from jmoe.experts.slots import ExpertSlots
from jmoe.experts.store import ExpertStore
from tools.decode_table import timing


def reference_row(
    weights: Weights,
    config: ModelConfig,
    runtime: RuntimeConfig,
    prompts: Int[np.ndarray, "n B T"],
    requests: Sequence[Sequence[SamplingParams]],
) -> dict:
    """A row of the table, of n runs. The first one, which compiles, does not count."""
    plan = plan_for(config, runtime, trunk_bytes=0)
    steps = Steps(config, plan.layout, runtime.implementation, resident=True)
    on_device = [jax.device_put(layer, memory.device_sharding()) for layer in weights.store.layers]
    store = ExpertStore(tuple(jax.block_until_ready(on_device)))
    calls, ttft = [], []
    for batch, params in zip(prompts, requests, strict=True):
        sampling, mode = batch_sampling(params, ()), sampling_mode(params)
        residency = init_residency(len(config.moe_layers), config.num_experts, 1)
        no_slots = ExpertSlots((), (), residency)
        budget = [each.max_new_tokens for each in params]
        state = init_state(config, len(batch), plan.max_seq_len, budget, no_slots)
        start = time.perf_counter()
        prefill = Prefill(steps)
        for chunk in prompt_chunks(batch.tolist(), plan.prefill_chunk):
            state, _ = prefill.chunk(weights.params, store, state, chunk, sampling, mode=mode)
        np.asarray(state.last_tokens)
        ttft.append(time.perf_counter() - start)
        timed = _calls(steps, weights, store, state, sampling, mode, runtime.decode_chunk, max(budget) - 1)
        calls.append(timed[1:])
    row = timing([call for run in calls[1:] for call in run], prompts.shape[1])
    return {"share": "reference", "ttft_s": statistics.median(ttft[1:]), **row}


def _calls(
    steps: Steps,
    weights: Weights,
    store: ExpertStore,
    state: DecodeState,
    sampling: Sampling,
    mode: Mode,
    size: int,
    num_steps: int,
) -> list[tuple[int, float]]:
    """(steps, seconds) of calls of `size` steps; as in the engine, the next is asked for before a result is read."""
    calls, waiting, last = [], None, time.perf_counter()
    for left in range(num_steps, -size, -size):
        asked = waiting
        if left > 0:
            state, waiting = steps.decode(
                weights.params, store, state, sampling, np.int32(size), capacity=size, mode=mode
            )
        if asked is not None:
            num_done, now = int(jax.device_get(asked).num_steps), time.perf_counter()
            calls.append((num_done, now - last))
            last = now
    return calls
