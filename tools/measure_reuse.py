"""How soon experts are used again, before and after tuning: python -m tools.measure_reuse --router tuned.safetensors

Runs the first --tokens tokens of each held-out document, in their order, with every expert on the device, with the
checkpoint's own routers and, if --router names a file, with the tuned ones. Prints a row for each measure:

  overlap        share of a token's experts that the token before had as well (ReMoE's expert overlap ratio)
  LRU n          hit rate of n least-recently-used slots a layer that start empty with each document (unique hit rate)
  POLICY n       hit rate of the engine's policy, whose slots go on from document to document; half of them teach it
  misses n       experts that a token has to fetch, of all layers, with n slots of that policy; MB: their bytes
  load entropy   entropy of the experts' shares of a layer's activations, over log E: 1 where all are used alike
  load variation standard deviation of these shares over their mean
  distinct       experts of a layer that a document uses
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from jmoe import checkpoint, memory, routing_stats, sources
from jmoe.config import RESIDENCY_POLICIES, ModelConfig
from jmoe.experts.policies import DEFAULT_POLICY
from jmoe.router_delta import RouterDelta
from jmoe.tokenizer import load_tokenizer
from jmoe.traces import Trace
from tools.command import exit_code
from tools.measure_routing import load_resident, read_documents, record, slot_counts
from tools.simulate_residency import hit_rates, split, steps_of

BEFORE, AFTER = "before", "after"


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0, or 2 after one line on stderr that says what is wrong."""
    options = _parse(arguments)
    return exit_code(_run, options)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="as python -m jmoe.generate takes it; default: the demo model")
    parser.add_argument("--router", type=Path, metavar="FILE", help="tuned routers of that model: the second column")
    parser.add_argument(
        "--text", type=Path, nargs="+", metavar="FILE", help="documents; default: the standard library's"
    )
    parser.add_argument(
        "--stdlib-root", type=Path, metavar="DIR", help="its held-out files; default: this interpreter's"
    )
    parser.add_argument("--num-documents", type=int, default=24, help="at most; default: 24")
    parser.add_argument("--tokens", type=int, default=1024, help="of each document; shorter ones are left out")
    parser.add_argument("--slots", type=int, nargs="+", metavar="N", help="of a layer; default: A, 2A, E/4 and E/2")
    parser.add_argument(
        "--policy", choices=RESIDENCY_POLICIES, default=DEFAULT_POLICY, help=f"default: {DEFAULT_POLICY}"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write the LRU hit rate by slots there (PNG)")
    options = parser.parse_args(arguments)
    if options.tokens < 2 or options.num_documents < 2:
        parser.error("--tokens and --num-documents have to be 2 or more: what is measured is reuse")
    options.stdlib_held_out = options.text is None  # what `read_documents` asks
    return options


def _run(options: argparse.Namespace) -> None:
    path = sources.resolve(options.model, announce=_say, prepare=memory.configure_backend)
    manifest = checkpoint.read_manifest(path)
    config = manifest.config
    deltas = {} if options.router is None else {AFTER: RouterDelta.read(options.router, manifest)}
    documents = list(read_documents(options, config, load_tokenizer(path)).values())
    trunk, experts = load_resident(path, config)
    report: dict[str, Any] = {
        "model": options.model or "demo",
        "num_documents": len(documents),
        "tokens": options.tokens,
    }
    curves = {}
    for name, delta in {BEFORE: None, **deltas}.items():
        params = trunk if delta is None else jax.device_put(delta.applied_to(trunk), memory.device_sharding())
        sequences = record(config, params, experts, documents)
        report[name] = measures(sequences, config, options.slots, options.policy)
        curves[name] = lru_curve(sequences, config.num_experts).mean(axis=0)
    print(*_table(report), sep="\n")
    if options.json:
        options.json.write_text(json.dumps(report) + "\n", encoding="utf-8")
        print(f"{options.json}: written")
    if options.plot:
        from tools import reuse_plots  # imports matplotlib, an extra

        figure = reuse_plots.hit_rates(curves, config.num_experts_per_tok)
        print(f"{reuse_plots.save(figure, options.plot)}: written")


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def measures(
    sequences: Sequence[np.ndarray], config: ModelConfig, slots: Sequence[int] | None, policy: str
) -> dict[str, float]:
    """All figures, means over layers, of the routing [T, L, A] of documents of one length.

    Raises ValueError for a number of slots that cannot hold a token's experts or is more than there are.
    """
    num_experts, num_active = config.num_experts, config.num_experts_per_tok
    chosen = slots or slot_counts(num_experts, num_active)
    if wrong := [n for n in chosen if not num_active <= n <= num_experts]:
        raise ValueError(f"--slots {wrong}: expected {num_active}..{num_experts}, a token's experts to all of a layer")
    counts = routing_stats.prompt_counts(sequences, num_experts)  # [documents, L, E]
    use = counts.sum(axis=0) / counts.sum(axis=(0, 2))[:, None]
    lru = lru_curve(sequences, num_experts).mean(axis=0)
    kept = {n: policy_hit_rate(sequences, config, n, policy) for n in tqdm(chosen, desc="slots", leave=False, delay=1)}
    misses = {n: (1 - rate) * num_active * len(config.moe_layers) for n, rate in kept.items()}
    return {
        "overlap": float(np.mean([routing_stats.reuse(ids) for ids in sequences])),
        **{f"LRU {n}": float(lru[n]) for n in chosen},
        **{f"{policy} {n}": rate for n, rate in kept.items()},
        **{f"misses {n}": number for n, number in misses.items()},
        **{f"MB {n}": number * config.expert_bytes / 1e6 for n, number in misses.items()},
        "load entropy": float(np.mean(np.log(routing_stats.effective_experts(use)) / np.log(num_experts))),
        "load variation": float(np.mean(use.std(axis=-1) / use.mean(axis=-1))),
        "distinct": float(np.mean((counts > 0).sum(axis=-1))),
    }


def lru_curve(sequences: Sequence[np.ndarray], num_experts: int) -> np.ndarray:
    """Hit rate [L, E+1] by slots, which start empty with each document."""
    # Documents of one length are one sequence of more layers: the LRU of a layer knows nothing of the others.
    ids = np.stack(sequences, axis=1)  # [T, documents, L, A]
    histogram = routing_stats.reuse_distances(ids.reshape(len(ids), -1, ids.shape[-1]), num_experts)
    return routing_stats.lru_hit_rate(histogram.reshape(*ids.shape[1:3], -1).sum(axis=0))


def policy_hit_rate(sequences: Sequence[np.ndarray], config: ModelConfig, slots: int, policy: str) -> float:
    """Of the second half of the documents, each token a step, after the policy has seen the first half."""
    ids = np.concatenate(sequences)
    request = np.repeat(np.arange(len(sequences)), [len(each) for each in sequences])
    position = np.concatenate([np.arange(len(each)) for each in sequences])
    trace = Trace(
        expert_ids=ids,
        combine_weights=np.zeros(ids.shape),
        request=request,
        position=position,
        step=np.arange(len(ids)),
        is_prefill=np.zeros(len(ids), bool),
        num_experts=config.num_experts,
        moe_layers=config.moe_layers,
    )
    lessons, exam = (steps_of(part) for part in split(trace, 0.5))
    return hit_rates([policy], lessons, exam, slots, config.num_experts_per_tok)[policy]["hit_rate"]


def _table(report: dict[str, Any]) -> list[str]:
    """Lines: a row a measure; with tuned routers also what they change, relative to before."""
    columns = [name for name in (BEFORE, AFTER) if name in report]
    lines = ["".join([f"{'':<16}", *(f"{name:>10}" for name in columns), f"{'change':>9}" * (len(columns) - 1)])]
    for name, value in report[BEFORE].items():
        cells = [f"{report[column][name]:>10.4g}" for column in columns]
        change = f"{report[AFTER][name] / value - 1:>+9.1%}" if AFTER in report and value else ""
        lines.append("".join([f"{name:<16}", *cells, change]))
    return lines


if __name__ == "__main__":
    sys.exit(main())
