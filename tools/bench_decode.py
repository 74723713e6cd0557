"""Decode at several resident shares: ms a token, hit rate, bytes, and percent of the link roofline at that hit rate.

    python -m tools.bench_decode --config configs/models/qwen3-30b-a3b.toml --layers 12 --random-weights flat
    python -m tools.bench_decode --model path/to/checkpoint --shares 0.25 1 --batch-sizes 1 8 32
    python -m tools.bench_decode --model path/to/checkpoint --shares 0 0.5
    python -m tools.bench_decode --model path/to/checkpoint --prefetch lookahead --prefetch-experts 0 0.25 0.5 1
    python -m tools.bench_decode --model path/to/checkpoint --prefetch both --prefetch-experts 0.5
    python -m tools.bench_decode --model path/to/checkpoint --prefetch oracle --prefetch-experts 0 1 2 4

Prints a card first, a table, and one line of JSON last. The last row, "reference", is the same model with every expert
on the device and no slots at all. --shares 0 is on demand: as many slots as a token has experts, and nothing in them
is kept from step to step (`tools/on_demand.py`). A checkpoint continues real text, random weights random token ids,
which they route as their scales make them (see `jmoe.synthetic`): so a figure of theirs means something only beside its
hit rate.

`link_gbps` and `percent_of_roofline` go by the bytes that crossed the link and the link's ceiling in this run;
`hbm_gbps` and `percent_of_hbm` by the weights that a step has to read from device memory (the trunk's without the
embedding table, and every expert asked for), and a pass over device memory in this run.

`prompt_mb` is what crossed the link for the prompts of a batch, while their first token took `ttft_s`.

`peak_bytes` is a dash where a row before it took more: rows of several batch sizes have it only as far as they grow.

`prefetch` is how many experts of a layer came early, `early_mb` what of them a token used (of its `mb_per_token`, which
crossed the link), and `wasted_mb` what it did not; `useful` is the share of the two that was. `late_mb` is the part of
`early_mb` that was still on its way when its layer's demand was known, and so was waited for; a dash where no clock
says so, as on a CPU. With --prefetch-experts 0 nothing comes early, with more as much as comes in time, up to that,
while it saves more than guessing costs (`jmoe/decoding/prefetch_budget.py`): the first run of a row finds out. That run
counts for `first_ms_per_step` alone, the mean of its steps, as a process has that generates once. With --all-guesses
all of the amount comes in every step, whatever it saves: with a small one that is what guesses cost by themselves. What
--prefetch activation and both know of past requests is learned from the runs of each row.

--prefetch oracle shows what bringing experts early can do, were every guess right: the same prompts are run once
before, with the same seeds, and what each step asked for is brought where it is missing. Its `useful` is 1, or in
bfloat16 a little less: two programs may decide a near-tie otherwise, and then the timed steps are not those recorded.
"""

import argparse
import dataclasses
import functools
import gc
import itertools
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jmoe import checkpoint, memory, sources
from jmoe.config import ModelConfig, RuntimeConfig
from jmoe.decoding.contest import Choice
from jmoe.decoding.sampling import SamplingParams
from jmoe.experts.policies import DEFAULT_POLICY, POLICIES
from jmoe.loading import load_calibration, load_weights
from jmoe.prefetch_stats import PrefetchStats
from jmoe.prefetching import Prefetching
from jmoe.tokenizer import load_tokenizer
from tools.bench_kernels import memory_gbps
from tools.command import exit_code
from tools.decode_table import print_row, timing
from tools.on_demand import start_engine
from tools.oracle import Oracle
from tools.random_weights import random_weights
from tools.reference_decode import reference_row
from tools.workload import Lengths, Request, make_workload, random_workload, read_prompts

PROMPTS = Path(__file__).parent.parent / "configs" / "prompts" / "python.jsonl"
PREFETCHES = ("off", "lookahead", "activation", "both", "oracle")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", help="converted checkpoint, Hugging Face directory or hub id")
    source.add_argument("--config", help="configs/models/*.toml, with --random-weights")
    parser.add_argument("--random-weights", choices=("sticky", "flat"), default="flat")
    parser.add_argument("--layers", type=int, help="number of decoder layers, if not the configuration's")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.125, 0.25, 0.5, 1.0], help="0: on demand")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1], metavar="N", help="rows of each, ascending")
    parser.add_argument("--prompts", type=Path, help=f"with --model: JSON lines (default: {PROMPTS.name} of configs)")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--max-seq-len", type=int, default=1024)
    parser.add_argument("--prefill-chunk", type=int, metavar="N", help="default: the engine's")
    parser.add_argument("--decode-chunk", type=int, default=8)
    parser.add_argument("--staging-slots", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-reference", action="store_true", help="leave out the row with no slots")
    parser.add_argument("--residency-policy", choices=POLICIES, help="default: the engine's")
    parser.add_argument("--prefetch", choices=PREFETCHES, default="off", help="default: off")
    parser.add_argument(
        "--prefetch-experts", type=float, nargs="+", metavar="X", help="most of each layer: a row each; default: 1"
    )
    parser.add_argument("--all-guesses", action="store_true", help="bring all of X in every step, whatever it saves")
    parser.add_argument("--no-kernels", action="store_true", help="plain JAX instead of the kernels")
    args = parser.parse_args(argv)
    if args.config and args.prompts:
        parser.error("argument --prompts: not allowed with --config, whose prompts are random token ids")
    if args.prefetch_experts and args.prefetch == "off":
        parser.error(
            "argument --prefetch-experts: is what --prefetch lookahead, activation, both or oracle brings; "
            "add one of them"
        )
    if args.all_guesses and args.prefetch == "off":
        parser.error("argument --all-guesses: there are none; add --prefetch lookahead, activation, both or oracle")
    if args.new_tokens < args.decode_chunk + 2:
        parser.error(
            f"argument --new-tokens: of {args.new_tokens} prefill makes one, and the first call, of "
            f"{args.decode_chunk} (--decode-chunk), is not timed; give {args.decode_chunk + 2} at least"
        )
    if args.prefetch == "oracle" and len(args.batch_sizes) > 1:
        parser.error("argument --prefetch: oracle knows what one of --batch-sizes asks for; give one")
    args.prompts = args.prompts or PROMPTS
    args.prefetch_experts = args.prefetch_experts or [0.0 if args.prefetch == "off" else 1.0]
    return args


def read_model(path: Path | None, args: argparse.Namespace) -> ModelConfig:
    """The configuration of the checkpoint at `path`, else of --config; with as many layers as asked for."""
    config = checkpoint.read_config(path) if path else ModelConfig.from_toml(args.config)
    return dataclasses.replace(config, num_hidden_layers=args.layers) if args.layers else config


def requests_for(path: Path | None, config: ModelConfig, args: argparse.Namespace) -> list[Request]:
    """A batch for each run, the largest of --batch-sizes, of --prompt-tokens tokens each.

    Raises ValueError, with the prompts that are too short.
    """
    sizes: dict[str, Any] = {
        "num_requests": (1 + args.repeats) * max(args.batch_sizes),
        "prompt_tokens": Lengths.constant(args.prompt_tokens),
        "new_tokens": Lengths.constant(args.new_tokens),
        "seed": args.seed,
    }
    if path is None:
        return random_workload(config.vocab_size, **sizes)
    requests = make_workload(read_prompts(args.prompts), load_tokenizer(path), **sizes)
    lengths = {request.source: len(request.prompt_ids) for request in requests}
    short = [f"{source} has {length}" for source, length in lengths.items() if length < args.prompt_tokens]
    if short:
        raise ValueError(
            f"{args.prompts}: prompts of fewer than --prompt-tokens {args.prompt_tokens} tokens: "
            f"{checkpoint.some_of(short, 5)}. Ask for fewer tokens, or give longer --prompts."
        )
    return requests


def card(config: ModelConfig, args: argparse.Namespace, ceiling: float, hbm_gbps: float) -> dict:
    """What can be known before decoding."""

    routed = len(config.moe_layers) * config.num_experts_per_tok * config.expert_bytes
    return {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "model": args.model or args.config,
        "weights": "checkpoint" if args.model else f"random ({args.random_weights}, seed {args.seed})",
        "prompts": f"{args.prompts.name if args.model else 'random token ids'} (seed {args.seed})",
        "layers": config.num_hidden_layers,
        "experts": f"{config.num_experts} x {config.expert_bytes / 1e6:.2f} MB, {config.num_experts_per_tok} a token",
        "store_gb": round(config.store_bytes / 1e9, 2),
        "routed_mb_per_token": round(routed / 1e6, 1),
        "link_ceiling_gbps": round(ceiling, 2),
        "hbm_ceiling_gbps": round(hbm_gbps, 1),
        "roofline_tokens_per_s_without_hits": round(ceiling * 1e9 / routed, 1),
        "prompt_tokens": args.prompt_tokens,
        "new_tokens": args.new_tokens,
        "temperature": args.temperature,
        "residency_policy": args.residency_policy or DEFAULT_POLICY,
        "prefetch": args.prefetch,
        "all_guesses": args.all_guesses,
    }


class AllGuesses(Prefetching):
    """Whose steps all bring the whole amount."""

    def choose(self, num_sequences: int) -> Choice:
        return Choice(self.most_rows)


class Bench:
    def __init__(self, args: argparse.Namespace):
        path = sources.resolve(args.model, prepare=memory.configure_backend) if args.model else None
        self.args, self.config = args, read_model(path, args)
        requests = requests_for(path, self.config, args)
        prompts = [request.prompt_ids for request in requests]
        self.prompts = np.array(prompts).reshape(1 + args.repeats, -1, args.prompt_tokens)
        memory.configure_backend(self.config)
        self.ceiling, self.hbm_gbps = memory.measure_link_gbps(), memory_gbps()
        self.weights = self._weights(path)
        say = functools.partial(print, flush=True)
        looks_ahead = args.prefetch in ("lookahead", "both")
        self.calibration = load_calibration(path, self.config, say) if path and looks_ahead else None
        self.oracle = self._record(*args.batch_sizes) if args.prefetch == "oracle" else None
        gc.collect()  # the slots of that engine
        self.peak = memory.peak_device_bytes() or 0

    def _record(self, batch_size: int) -> Oracle:
        """Of all runs to come: what is asked for does not depend on what has a slot."""
        runtime = dataclasses.replace(self.runtime(batch_size, self.config.num_experts_per_tok), record_routing=True)
        engine = start_engine(self.config, runtime, self.weights)
        traces = []
        for repeat, prompts in enumerate(self.prompts):
            generation = engine.generate(prompts[:batch_size].tolist(), self.sampling(batch_size, repeat))
            generation.results()
            traces.append(generation.trace)
        made = Oracle.of(traces)
        print(f"oracle: {len(made.needed)} decode steps recorded", flush=True)
        return made

    def _weights(self, path: Path | None):
        start = time.perf_counter()
        args = self.args
        if path:
            weights = load_weights(path, self.config)
        else:
            weights = random_weights(self.config, args.random_weights, args.seed)
        took = time.perf_counter() - start
        print(f"weights: {weights.store.nbytes / 1e9:.1f} GB of experts pinned in {took:.1f} s", flush=True)
        return weights

    def runtime(self, batch_size: int, expert_slots: int, prefetch_experts: float = 0.0) -> RuntimeConfig:
        args = self.args
        kind = "lookahead" if args.prefetch == "oracle" else args.prefetch
        return RuntimeConfig(
            expert_slots=expert_slots,
            staging_slots=args.staging_slots,
            batch_size=batch_size,
            max_seq_len=args.max_seq_len,
            prefill_chunk=args.prefill_chunk,
            decode_chunk=args.decode_chunk,
            residency_policy=args.residency_policy,
            implementation="reference" if args.no_kernels else None,
            measure_link=False,
            prefetch=kind if prefetch_experts else "off",
            prefetch_experts=prefetch_experts or 1.0,
        )

    def sampling(self, batch_size: int, repeat: int) -> list[SamplingParams]:
        args = self.args
        return [
            SamplingParams(
                max_new_tokens=args.new_tokens, temperature=args.temperature, seed=1000 * repeat + n, ignore_eos=True
            )
            for n in range(batch_size)
        ]

    def share(self, batch_size: int, share: float, prefetch_experts: float) -> dict:
        """Through the slots, with this share of each layer's experts in them; of each layer so many come early."""

        slots = max(self.config.num_experts_per_tok, round(share * self.config.num_experts))
        runtime = self.runtime(batch_size, slots, prefetch_experts)
        knows = {"calibration": self.calibration, "predictor": self.oracle}
        engine = start_engine(self.config, runtime, self.weights, keeps=share > 0, **knows)
        if engine.prefetching and self.args.all_guesses:
            engine.prefetching = AllGuesses(self.config, runtime)
        runs, first_run_s, first_ms = [], 0.0, 0.0
        for repeat, prompts in enumerate(self.prompts):
            start = time.perf_counter()
            generation = engine.generate(prompts[:batch_size].tolist(), self.sampling(batch_size, repeat))
            generation.results()
            if repeat == 0:
                first_run_s, first_ms = time.perf_counter() - start, generation.stats.ms_per_step
            else:
                runs.append(generation.stats)
        hits = sum(run.decode.hits for run in runs)
        misses = sum(run.decode.misses for run in runs)
        tokens = sum(run.num_decode_tokens for run in runs)
        row = timing([call for run in runs for call in run.decode_calls[1:]], batch_size)
        mean_ms = 1e3 * sum(run.decode_s for run in runs) / sum(run.num_decode_steps for run in runs)
        link_bytes = sum(run.link_bytes for run in runs)
        early = sum((run.prefetch for run in runs if run.prefetch), PrefetchStats()) if prefetch_experts else None
        steps = sum(run.num_decode_steps for run in runs)
        prompt_bytes = sum(run.prefill.misses * run.expert_bytes for run in runs) / len(runs)
        roof_ms = link_bytes / steps / self.ceiling / 1e6
        hbm_gbps = self.read_bytes((hits + misses) / steps) / mean_ms / 1e6
        return {
            "batch": batch_size,
            "share": share,
            "prefetch": prefetch_experts or None,
            "slots": slots,
            "ttft_s": statistics.median(run.ttft_s for run in runs),
            "prompt_mb": prompt_bytes / 1e6,
            **row,
            "mean_ms_per_step": mean_ms,
            "first_ms_per_step": first_ms,
            "hit_rate": hits / (hits + misses),
            "mb_per_token": link_bytes / tokens / 1e6,
            "early_mb": early.useful_bytes / tokens / 1e6 if early else None,
            "late_mb": None if early is None or early.late_bytes is None else early.late_bytes / tokens / 1e6,
            "wasted_mb": early.wasted_bytes / tokens / 1e6 if early else None,
            "useful": early.useful_share if early else None,
            "link_gbps": link_bytes / steps / mean_ms / 1e6,
            "percent_of_roofline": 100 * roof_ms / mean_ms,
            "hbm_gbps": hbm_gbps,
            "percent_of_hbm": 100 * hbm_gbps / self.hbm_gbps,
            "peak_bytes": self._peak(),
            "planned_bytes": engine.plan.device_bytes,
            "first_run_s": first_run_s,
        }

    def _peak(self) -> int | None:
        """The most device memory that was in use, if the last row took more than all before it: else nobody knows."""
        before, self.peak = self.peak, memory.peak_device_bytes() or 0
        return self.peak if self.peak > before else None

    def read_bytes(self, num_experts: float) -> float:
        """Of weights, that a step of so many experts reads from device memory."""
        params, tied = self.weights.params, self.config.tie_word_embeddings
        trunk = sum(leaf.nbytes for path, leaf in params.items() if tied or path != "embed/embedding")
        return trunk + num_experts * self.config.expert_bytes

    def reference(self, batch_size: int) -> dict:
        """The same steps with every expert on the device: nothing to admit, nothing to fetch."""
        requests = [self.sampling(batch_size, repeat) for repeat in range(len(self.prompts))]
        runtime = self.runtime(batch_size, self.config.num_experts_per_tok)
        row = reference_row(self.weights, self.config, runtime, self.prompts[:, :batch_size], requests)
        return {"batch": batch_size, **row}


def main(argv: list[str] | None = None) -> int:
    """The exit code: 0, or 2 after one line on stderr that says what is wrong with the model or the prompts."""
    return exit_code(_run, parse(argv))


def _run(args: argparse.Namespace) -> None:
    bench = Bench(args)
    facts = card(bench.config, args, bench.ceiling, bench.hbm_gbps)
    for name, value in facts.items():
        print(f"{name:<36}{value}", flush=True)
    print_row(None)
    rows = []
    for ways in itertools.product(sorted(args.batch_sizes), sorted(args.shares), args.prefetch_experts):
        rows.append(bench.share(*ways))
        print_row(rows[-1])
        gc.collect()
    for batch_size in [] if args.no_reference else sorted(args.batch_sizes):
        rows.append(bench.reference(batch_size))
        print_row(rows[-1])
    print(json.dumps({"card": facts, "rows": rows}))


if __name__ == "__main__":
    sys.exit(main())
