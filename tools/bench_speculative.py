"""Speculative decoding beside other ways to decode: tokens a second, acceptance, experts and bytes, by batch size.

    python -m tools.bench_speculative                                       # the demo model
    python -m tools.bench_speculative --config configs/models/qwen3-30b-a3b.toml --layers 12 --random-weights flat \
        --batch-sizes 1 64 --shares 0.25 --draft-tokens 4 --draft-experts 16 --json rows.jsonl --plot speed.png

Ways to decode, each with an engine of its own through the same weights:

- on-demand: nothing is kept from step to step (`tools/on_demand.py`), and so all that a step asks for is fetched
- hottest: slots for a tenth of the experts, those used most often (lfu)
- plain: no drafts, slots for each of --shares
- drafts: as plain, with each of --draft-tokens, --draft-experts, --policies and --missing
- auto: as plain, the engine choosing among 0 … --draft-tokens

Each row is printed as soon as it is measured, and what does not fit says why. `tokens/step` is what a step (a cycle,
with drafts) yields for a sequence, `experts` how many of a layer it asks for, `MB/token` what crosses the link. A row
continues prompts that the run before, which is not counted, has not seen, for --new-tokens tokens or --seconds, and
after them others, of --batches batches. Where the dtype is float32, drafted tokens are compared with plain ones.
"""

import argparse
import dataclasses
import gc
import importlib.util
import itertools
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import jax

from jmoe import checkpoint, memory, sources
from jmoe.config import DTYPES, DraftPolicy, Missing, ModelConfig, RuntimeConfig
from jmoe.decoding.sampling import SamplingParams
from jmoe.engine import Engine, Weights
from jmoe.generation import Generation
from jmoe.loading import load_weights
from jmoe.tokenizer import load_tokenizer
from tools.bench_decode import PROMPTS
from tools.command import exit_code
from tools.on_demand import start_engine
from tools.random_weights import random_weights
from tools.speculative_rows import Way, heading, line_of, require_same, row_of, speed_of
from tools.workload import Lengths, Request, make_workload, random_workload, read_prompts

WAYS = ("on-demand", "hottest", "plain", "drafts", "auto")
HOTTEST_SHARE = 0.1


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0, or 2 after one line on stderr that says what is wrong."""
    return exit_code(_run, _parser().parse_args(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--model", help="as python -m jmoe.generate takes it; default: the demo model")
    source.add_argument("--config", type=Path, metavar="FILE", help="configs/models/*.toml, with --random-weights")
    parser.add_argument("--random-weights", choices=("sticky", "flat"), default="flat")
    parser.add_argument("--layers", type=int, metavar="N", help="decoder layers, if not the configuration's")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS[:4])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8], metavar="N", help="1 … 256")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.25], metavar="X", help="of experts with a slot")
    parser.add_argument("--draft-tokens", type=int, nargs="+", default=[4], metavar="N")
    parser.add_argument("--draft-experts", type=int, nargs="+", metavar="N", help="of each layer; default: all slots")
    parser.add_argument("--policies", nargs="+", choices=get_args(DraftPolicy), default=["hot"])
    parser.add_argument("--missing", nargs="+", choices=get_args(Missing), default=["reroute"])
    parser.add_argument("--prompts", type=Path, default=PROMPTS, metavar="FILE", help="of a checkpoint's workload")
    parser.add_argument("--prompt-tokens", type=int, default=96, metavar="N")
    parser.add_argument("--new-tokens", type=int, default=64, metavar="N", help="of each prompt, at most")
    parser.add_argument("--batches", type=int, default=1, metavar="N", help="that a row decodes, one after another")
    parser.add_argument("--warm-tokens", type=int, default=16, metavar="N", help="of the run before, not counted")
    parser.add_argument("--seconds", type=float, default=20.0, metavar="X", help="of decoding, the most for a row")
    parser.add_argument("--decode-chunk", type=int, default=32, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.0, help="0, the default, is greedy")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--dtype", choices=DTYPES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="add each row to it at once, a line of JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="tokens/s by batch size, drawn after each row")
    parser.add_argument(
        "--profile",
        type=Path,
        metavar="DIR",
        help="a profiler trace of a call of drafts' last row; rows are slower for it",
    )
    return parser


def _run(options: argparse.Namespace) -> None:
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        raise RuntimeError("--plot needs matplotlib, which is not installed; uv sync --extra plots, or leave it out")
    if options.batches < 1:
        raise ValueError(f"--batches {options.batches} must be at least 1")
    bench = Bench.load(options)
    print(heading(), flush=True)
    rows: list[dict[str, Any]] = []
    for way in ways(options, bench.config):
        try:
            row = bench.measure(way, rows)
        except (ValueError, RuntimeError) as error:
            if not _does_not_fit(error):
                raise
            row = {**dataclasses.asdict(way), "skipped": " ".join(str(error).split())[:300]}
        rows.append(row)
        _show(row, rows, options)
        gc.collect()  # the slots, before the next engine takes its own
    print(json.dumps({"device": jax.devices()[0].device_kind, "rows": rows}))


def _does_not_fit(error: Exception) -> bool:
    return any(part in str(error) for part in ("not enough device memory", "are more than the", "RESOURCE_EXHAUSTED"))


def _show(row: dict[str, Any], rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    if "skipped" in row:
        print(f"skipped: {row['name']}, batch {row['batch']}, {row['slots']} slots: {row['skipped']}", flush=True)
    else:
        print(line_of(row), flush=True)
    if options.json:
        with options.json.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    if options.plot:
        from tools import speculative_plots  # imports matplotlib, an extra

        speculative_plots.speed_by_batch([row for row in rows if "skipped" not in row], options.plot)


def ways(options: argparse.Namespace, config: ModelConfig) -> Iterator[Way]:
    """What to measure, in the order of the rows: batch by batch, the slowest way of each first."""

    def slots(share: float) -> int:
        return max(config.num_experts_per_tok, round(share * config.num_experts))

    drafts = options.draft_tokens, options.draft_experts or [None], options.policies, options.missing
    for batch in options.batch_sizes:
        if "on-demand" in options.ways:
            yield Way("on-demand", batch, config.num_experts_per_tok)
        if "hottest" in options.ways:
            yield Way("hottest", batch, slots(HOTTEST_SHARE))
        for share in options.shares:
            if "plain" in options.ways:
                yield Way("plain", batch, slots(share))
            if "drafts" in options.ways:
                yield from (Way("drafts", batch, slots(share), *each) for each in itertools.product(*drafts))
            if "auto" in options.ways:
                yield Way("auto", batch, slots(share), "auto")


@dataclasses.dataclass(frozen=True)
class Bench:
    """A model's weights, and the requests of the largest batch: the run that is not counted, and the one that is."""

    options: argparse.Namespace
    config: ModelConfig
    weights: Weights
    requests: list[Request]

    @classmethod
    def load(cls, options: argparse.Namespace) -> "Bench":
        path = None if options.config else sources.resolve(options.model, prepare=memory.configure_backend)
        config = checkpoint.read_config(path) if path else ModelConfig.from_toml(options.config)
        changes = {"num_hidden_layers": options.layers, "dtype": options.dtype}
        config = dataclasses.replace(config, **{name: value for name, value in changes.items() if value is not None})
        memory.configure_backend(config)
        memory.enable_compilation_cache(sources.cache_dir() / "compiled")
        sizes: dict[str, Any] = {
            "num_requests": (1 + options.batches) * max(options.batch_sizes),
            "prompt_tokens": Lengths.constant(options.prompt_tokens),
            "new_tokens": Lengths.constant(options.new_tokens),
            "seed": options.seed,
        }
        if path is None:
            requests = random_workload(config.vocab_size, **sizes)
        else:
            requests = make_workload(read_prompts(options.prompts), load_tokenizer(path), **sizes)
        start = time.perf_counter()
        if path is None:
            weights = random_weights(config, options.random_weights, options.seed)
        else:
            weights = load_weights(path, config)
        took = time.perf_counter() - start
        print(f"weights: {weights.store.nbytes / 1e9:.2f} GB of experts in {took:.1f} s", flush=True)
        return cls(options, config, weights, requests)

    def measure(self, way: Way, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """A row. Raises what `Engine.start` does, and RuntimeError where tokens are not those of `rows`."""
        options, most = self.options, self.options.new_tokens
        engine = start_engine(self.config, self._runtime(way), self.weights, keeps=way.name != "on-demand")
        warming = self._generate(engine, range(way.batch), min(options.warm_tokens, most))
        warming.results()
        measured = self._generate(engine, range(way.batch, (1 + options.batches) * way.batch), most)
        _run_for(measured, options.seconds)
        row = row_of(way, measured.stats, engine.plan.layout.num_layers)
        row["compile s"] = warming.stats.compile_s
        tokens = [completion.token_ids for completion in measured.completions]
        row["speed"] = speed_of(row, rows)
        if self.config.dtype == "float32":
            row["tokens"] = tokens
            require_same(row, rows)
        if options.profile and way.name == "drafts":
            profile(self._generate(engine, range(way.batch), most), way.batch, options.profile)
        return row

    def _runtime(self, way: Way) -> RuntimeConfig:
        options = self.options
        return RuntimeConfig(
            expert_slots=way.slots,
            batch_size=way.batch,
            max_seq_len=options.prompt_tokens + options.new_tokens,
            prefill_chunk=max(1, min(512, 16384 // way.batch)),
            decode_chunk=options.decode_chunk,
            residency_policy="lfu" if way.name == "hottest" else None,
            draft=way.draft,
            prefetch="off",
            draft_experts=way.experts,
            draft_tokens=max(options.draft_tokens),
            draft_policy=way.policy,
            draft_missing=way.missing,
            measure_link=False,
            profiled=options.profile is not None,
        )

    def _generate(self, engine: Engine, which: range, most: int) -> Generation:
        options = self.options
        params = [
            SamplingParams(
                max_new_tokens=most,
                temperature=options.temperature,
                top_p=options.top_p,
                seed=options.seed + n,
                ignore_eos=True,
            )
            for n in range(len(which))
        ]
        return engine.generate([list(self.requests[n].prompt_ids) for n in which], params)


def _run_for(generation: Generation, seconds: float) -> None:
    """Runs it to the end, or until decoding took so long."""
    for _ in generation:
        if generation.stats.decode_s > seconds:
            break
    generation.close()


def profile(generation: Generation, batch_size: int, directory: Path) -> None:
    """A trace of one call of the jitted cycles: each hands out tokens of every sequence, after prefill and a first."""
    deltas = iter(generation)
    for _ in itertools.islice(deltas, 2 * batch_size):
        pass
    with jax.profiler.trace(str(directory)):
        for _ in itertools.islice(deltas, batch_size):
            pass
    generation.close()
    print(f"profiler trace written to {directory}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
