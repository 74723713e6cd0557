"""One pool of slots for all layers, or a share for each layer? Hit rates on the same routing, and the cost of `admit`.

    python -m tools.compare_slot_pools --config configs/models/qwen3-30b-a3b.toml --layers 12 --regime flat

Records which experts the routers ask for while every expert is on the device, then replays that against an LRU over
all slots and against one LRU a layer, which a step that needs more than it has leaves alone (the engine's own policies:
tools/simulate_residency.py).
Times the real `admit` at both sizes. Prints a table, and one line of JSON last.
"""

import argparse
import collections
import dataclasses
import json
import sys
import time
from collections.abc import Iterable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jmoe import memory
from jmoe.config import ModelConfig
from jmoe.experts.layer import Observed, ResidentExperts
from jmoe.experts.residency import admit, init_residency
from jmoe.model.decoder import build_decoder
from jmoe.model.kv_cache import init_kv_cache
from tools.random_weights import random_weights

TIMED_STEPS = 200


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="configs/models/*.toml")
    parser.add_argument("--layers", type=int, help="number of decoder layers, if not the configuration's")
    parser.add_argument("--regime", choices=("sticky", "flat"), default="flat")
    parser.add_argument("--tokens", type=int, default=128, help="decode steps to record")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.125, 0.25, 0.5])
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def record(
    config: ModelConfig, regime: Literal["sticky", "flat"], batch_size: int, num_tokens: int, seed: int
) -> np.ndarray:
    """Expert ids [steps, L, B, A] of sampled text (temperature 1) from random starts."""

    weights = random_weights(config, regime, seed)
    layers = tuple(jax.device_put(layer, memory.device_sharding()) for layer in weights.store.layers)

    def step(params, layers, cache, token_ids, key):
        experts, nothing = Observed(ResidentExperts(layers)), (None, ())
        decoder = build_decoder(config, params)
        valid = jnp.ones(token_ids.shape, bool)
        hidden, cache, (_, routings) = decoder(token_ids, valid, cache.lengths + 1, cache, experts, nothing)
        tokens = jax.random.categorical(key, decoder.unembed(hidden[:, 0]))
        return cache, tokens[:, None].astype(jnp.int32), jnp.stack([routing.expert_ids for routing in routings])

    jitted, key = jax.jit(step, donate_argnums=2), jax.random.key(seed)
    cache = init_kv_cache(config, batch_size, num_tokens)
    tokens = jax.random.randint(key, (batch_size, 1), 0, config.vocab_size)
    ids = []
    for n in range(num_tokens):
        cache, tokens, routed = jitted(weights.params, layers, cache, tokens, jax.random.fold_in(key, n))
        ids.append(np.asarray(routed))
    return np.stack(ids)


class LRU:
    """Least recently used experts, as many as it starts with; the least recent is the first."""

    def __init__(self, experts: Iterable):
        self.experts = collections.OrderedDict.fromkeys(experts)
        self.capacity = len(self.experts)

    def step(self, needed: list) -> int:
        """Hits among `needed`, which are resident afterwards as far as there is room."""
        hits = sum(expert in self.experts for expert in needed)
        for expert in needed:
            self.experts[expert] = None
            self.experts.move_to_end(expert)
        while len(self.experts) > self.capacity:
            self.experts.popitem(last=False)
        return hits


def hit_rates(trace: np.ndarray, slots_per_layer: int) -> tuple[float, float]:
    """(one pool for all, a share for each layer)."""
    layers, slots = range(trace.shape[1]), range(slots_per_layer)
    pool, shares = LRU((layer, expert) for layer in layers for expert in slots), [LRU(slots) for _ in layers]
    asked = pool_hits = share_hits = 0
    for step in trace:
        for layer, ids in enumerate(step):
            needed = sorted(set(ids.reshape(-1).tolist()))
            asked += len(needed)
            pool_hits += pool.step([(layer, expert) for expert in needed])
            share = shares[layer]
            fits = len(needed) <= slots_per_layer
            share_hits += share.step(needed) if fits else sum(expert in share.experts for expert in needed)
    return pool_hits / asked, share_hits / asked


def admit_us(num_experts: int, num_slots: int, num_needed: int) -> float:
    """Microseconds of one `admit`, in a loop on the device."""

    ids = jax.random.randint(jax.random.key(0), (TIMED_STEPS, num_needed), 0, num_experts)

    def body(n, state):
        needed = jnp.any(ids[n][:, None] == jnp.arange(num_experts)[None], axis=0)
        layer, last_used = state
        last_used = jnp.where(needed, n, last_used)
        layer, plan = admit(layer, needed, last_used, num_needed)
        used = 0 * (plan.count + jnp.sum(plan.expert_ids) + jnp.sum(plan.slot_ids))  # keeps the plan alive
        return layer, last_used + used

    loop = jax.jit(lambda layer: jax.lax.fori_loop(0, TIMED_STEPS, body, layer))
    start_layer = init_residency(1, num_experts, num_slots).layers[0], jnp.full((num_experts,), -1, jnp.int32)
    jax.block_until_ready(loop(start_layer))
    times = []
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready(loop(start_layer))
        times.append(time.perf_counter() - start)
    return 1e6 * float(np.median(times)) / TIMED_STEPS


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    config = ModelConfig.from_toml(args.config)
    if args.layers:
        config = dataclasses.replace(config, num_hidden_layers=args.layers)
    memory.configure_backend(config)
    num_layers, rows = len(config.moe_layers), []
    for batch_size in args.batch_sizes:
        trace = record(config, args.regime, batch_size, args.tokens, args.seed)
        for share in args.shares:
            slots = max(config.num_experts_per_tok, round(share * config.num_experts))
            pool, per_layer = hit_rates(trace, slots)
            needed = min(slots, batch_size * config.num_experts_per_tok)
            pool_us = admit_us(num_layers * config.num_experts, num_layers * slots, needed)
            layer_us = admit_us(config.num_experts, slots, needed)
            rows.append(
                {
                    "batch_size": batch_size,
                    "share": share,
                    "slots_per_layer": slots,
                    "hit_rate_one_pool": pool,
                    "hit_rate_per_layer": per_layer,
                    "admit_us_one_pool": pool_us,
                    "admit_us_per_layer": layer_us,
                }
            )
            print("  ".join(f"{name} {value:.4g}" for name, value in rows[-1].items()), flush=True)
    print(json.dumps({"config": args.config, "layers": num_layers, "regime": args.regime, "rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
