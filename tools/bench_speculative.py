"""Speculative against plain decoding: acceptance, bytes and time a token, over batch sizes and draft sets.

    python -m tools.bench_speculative                                       # the demo model
    python -m tools.bench_speculative --model path/to/model --shares 0.125 --batch-sizes 1 64 --draft-tokens 4 8

Each row decodes the same requests with drafts and prints what that did beside plain decoding through as many slots:
`acceptance` is accepted over proposed tokens, `tokens/cycle` what a verification yields for a sequence, `asked` how
many experts of a layer a verification asks for, `MB/token` what crosses the link, `speed` tokens/s over plain ones. One
line of JSON comes last. Tokens are the same as plain decoding's, which the tool checks where the dtype is float32.
"""

import argparse
import dataclasses
import itertools
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp

import jmoe
from jmoe import checkpoint, memory, sources
from jmoe.config import DTYPES
from jmoe.decoding.sampling import SamplingParams, batch_sampling, sampling_mode
from jmoe.decoding.speculative import SpeculativeSteps
from jmoe.decoding.step import DecodeState
from jmoe.engine import Engine
from jmoe.experts import draft
from jmoe.experts.draft import DraftConfig, DraftPolicy, Missing, expert_distances
from jmoe.generation import prompt_chunks
from jmoe.stats import read_counts
from tools.bench_decode import PROMPTS
from tools.workload import Lengths, make_workload, read_prompts

COLUMNS = (
    ("batch", "{}"),
    ("share", "{:g}"),
    ("experts", "{}"),
    ("tokens", "{}"),
    ("policy", "{}"),
    ("missing", "{}"),
    ("acceptance", "{:.3f}"),
    ("tokens/cycle", "{:.2f}"),
    ("asked", "{:.1f}"),
    ("MB/token", "{:.3f}"),
    ("plain MB", "{:.3f}"),
    ("ms/token", "{:.3f}"),
    ("speed", "{:.2f}"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0, or 2 after one line on stderr that says what is wrong."""
    options = _parser().parse_args(arguments)
    try:
        rows = [row for share in options.shares for size in options.batch_sizes for row in sweep(options, share, size)]
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps({"device": jax.devices()[0].device_kind, "rows": rows}))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="as python -m jmoe.generate takes it; default: the demo model")
    parser.add_argument("--prompts", type=Path, default=PROMPTS, metavar="FILE")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.25], help="of the experts that have a slot")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--draft-tokens", type=int, nargs="+", default=[4])
    parser.add_argument("--draft-experts", type=int, nargs="+", default=[16], help="kept in each layer")
    parser.add_argument("--policies", nargs="+", choices=get_args(DraftPolicy), default=["hot"])
    parser.add_argument("--missing", nargs="+", choices=get_args(Missing), default=["reroute"])
    parser.add_argument("--prompt-tokens", type=int, default=96)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.6)
    parser.add_argument("--dtype", choices=DTYPES)
    parser.add_argument("--seed", type=int, default=0)
    return parser


def sweep(options: argparse.Namespace, share: float, batch_size: int) -> list[dict[str, Any]]:
    """The rows of one engine, which it prints as they come."""
    bench = Bench.load(options, share, batch_size)
    plain = bench.run(None, 0)
    print("  ".join(name.rjust(12) for name, _ in COLUMNS), flush=True)
    rows = []
    settings = options.draft_experts, options.draft_tokens, options.policies, options.missing
    for num_experts, num_tokens, policy, missing in itertools.product(*settings):
        config = DraftConfig(num_experts, policy, missing)
        drafted = bench.run(config, num_tokens)
        if bench.engine.config.dtype == "float32" and drafted.tokens != plain.tokens:
            raise RuntimeError(f"{config}, {num_tokens} tokens: other tokens than plain decoding. Please report it.")
        row = {"batch": batch_size, "share": share, "experts": num_experts, "tokens": num_tokens, "policy": policy}
        rows.append(row | {"missing": missing} | compare(plain, drafted, num_tokens))
        print("  ".join(form.format(rows[-1][name]).rjust(12) for name, form in COLUMNS), flush=True)
    return rows


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Of one way to decode: the tokens of each sequence, time and traffic, and what drafts came to."""

    tokens: list[list[int]]
    seconds: float
    asked: int
    missed_bytes: int
    num_layers: int
    num_steps: int
    proposed: int = 0
    accepted: int = 0

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.tokens))


def compare(plain: Outcome, drafted: Outcome, num_draft_tokens: int) -> dict[str, float]:
    """Drafts beside plain decoding. A cycle of a sequence proposes `num_draft_tokens`."""
    cycles = drafted.proposed / num_draft_tokens
    return {
        "acceptance": drafted.accepted / drafted.proposed,
        "tokens/cycle": drafted.num_tokens / cycles,
        "asked": drafted.asked / drafted.num_steps / drafted.num_layers,
        "MB/token": drafted.missed_bytes / drafted.num_tokens / 1e6,
        "plain MB": plain.missed_bytes / plain.num_tokens / 1e6,
        "ms/token": 1e3 * drafted.seconds / drafted.num_tokens,
        "speed": (drafted.num_tokens / drafted.seconds) / (plain.num_tokens / plain.seconds),
    }


@dataclasses.dataclass(frozen=True)
class Bench:
    """An engine and its requests; each run takes the slots as the one before left them."""

    engine: Engine
    prompts: list[list[int]]
    params: list[SamplingParams]

    @classmethod
    def load(cls, options: argparse.Namespace, share: float, batch_size: int) -> "Bench":
        longest = options.prompt_tokens + options.new_tokens + 1
        runtime = jmoe.RuntimeConfig(
            expert_slots=_slots(options, share), batch_size=batch_size, max_seq_len=longest, dtype=options.dtype
        )
        engine = jmoe.load(options.model, dataclasses.replace(runtime, measure_link=False))
        if engine.tokenizer is None:
            raise ValueError(f"{options.model} has no tokenizer, and prompts are text; choose a model that has one")
        constant = Lengths.constant
        requests = make_workload(
            read_prompts(options.prompts),
            engine.tokenizer,
            num_requests=batch_size,
            prompt_tokens=constant(options.prompt_tokens),
            new_tokens=constant(options.new_tokens),
            seed=options.seed,
        )
        shared = {"max_new_tokens": options.new_tokens, "temperature": options.temperature, "ignore_eos": True}
        params = [SamplingParams(seed=options.seed + n, **shared) for n in range(batch_size)]
        return cls(engine, [list(request.prompt_ids) for request in requests], params)

    def run(self, config: DraftConfig | None, num_draft_tokens: int) -> Outcome:
        """Decodes twice, since the first compiles, and reports the second."""
        self._decode(config, num_draft_tokens)
        return self._decode(config, num_draft_tokens)

    def _decode(self, config: DraftConfig | None, num_draft_tokens: int) -> Outcome:
        engine, weights = self.engine, self.engine.weights
        sampling, mode = batch_sampling(self.params, ()), sampling_mode(self.params)
        state = engine.new_state(len(self.prompts), [params.max_new_tokens for params in self.params])
        for chunk in prompt_chunks(self.prompts, engine.plan.prefill_chunk):
            state, _ = engine.steps.prefill(weights.params, weights.store, state, chunk, sampling, mode=mode)
        before = jax.block_until_ready(read_counts(state.experts.residency))[1]
        start, most = time.perf_counter(), self.params[0].max_new_tokens
        if config is None:
            state, tokens, drafts = self._plain(state, sampling, mode, most)
        else:
            state, tokens, drafts = self._drafted(state, sampling, mode, most, config, num_draft_tokens)
        seconds = time.perf_counter() - start
        counts = read_counts(state.experts.residency)[1] - before
        engine.give_back(state)
        num_layers = engine.plan.layout.num_layers
        missed_bytes = counts.misses * engine.config.expert_bytes
        return Outcome(tokens, seconds, counts.hits + counts.misses, missed_bytes, num_layers, **drafts)

    def _plain(self, state: DecodeState, sampling, mode, most: int):
        weights, count = self.engine.weights, jnp.asarray(most, jnp.int32)
        state, emitted = self.engine.steps.decode(
            weights.params, weights.store, state, sampling, count, capacity=most, mode=mode
        )
        emitted = jax.device_get(emitted)
        rows = [row[row >= 0].tolist() for row in emitted.token_ids]
        return state, rows, {"num_steps": int(emitted.num_steps)}

    def _drafted(self, state: DecodeState, sampling, mode, most: int, config: DraftConfig, num_draft_tokens: int):
        weights, steps = self.engine.weights, SpeculativeSteps(self.engine.steps, config, num_draft_tokens)
        distances = self._distances() if config.missing == "substitute" else None
        draft_set = draft.start(config, state.experts, distances)
        counts = (jnp.asarray(number, jnp.int32) for number in (num_draft_tokens, most))
        state, _, verified = steps.decode(
            weights.params,
            weights.store,
            state,
            draft_set,
            distances,
            sampling,
            *counts,
            capacity=most,
            mode=mode,
        )
        verified = jax.device_get(verified)
        rows = [row[:n].tolist() for row, n in zip(verified.token_ids, verified.num_tokens, strict=True)]
        drafts = {"proposed": int(verified.proposed), "accepted": int(verified.accepted)}
        return state, rows, {"num_steps": int(verified.num_cycles), **drafts}

    def _distances(self) -> jax.Array:
        """[L, E, E]; of one layer's experts at a time on the device."""
        measure, sharding = jax.jit(expert_distances), memory.device_sharding()
        return jnp.stack([measure(jax.device_put(layer, sharding)) for layer in self.engine.weights.store.layers])


def _slots(options: argparse.Namespace, share: float) -> int:
    config = checkpoint.read_config(sources.resolve(options.model))
    return max(config.num_experts_per_tok, round(share * config.num_experts))


if __name__ == "__main__":
    sys.exit(main())
