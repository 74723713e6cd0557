"""How a model's routers use its experts: evenly or not, how soon again, and how differently from text to text.

    python -m tools.measure_routing --model path/to/model --stdlib-held-out --plots plots --json routing.json

Runs the first --tokens tokens of each document, one document at a time, with every expert on the device: the model has
to fit there as a whole, or this tool cannot measure it. Prints the skew, and a row for each layer:

  effective  exp(entropy) of the experts' shares of the layer's activations
  min, max   the least and the most used expert's share, as a multiple of a uniform share
  dead       experts with less than 1 % of a uniform share
  reuse      share of a token's experts that the token before had as well; shuffled: were the tokens in random order
  LRU n      hit rate of n least-recently-used slots, which start empty with each document

The last row is what routers that choose uniformly at random would give over many tokens.
"""

import argparse
import functools
import importlib.util
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from jmoe import checkpoint, memory, routing_stats, sources
from jmoe.config import ModelConfig
from jmoe.decoding.compiled import COMPILER_OPTIONS
from jmoe.decoding.resident import forward_routed
from jmoe.routing_stats import RoutingSummary, summarize
from jmoe.tokenizer import Tokenizer, load_tokenizer
from tools import stdlib_corpus
from tools.command import exit_code

TOP_FRACTIONS = (0.10, 0.25)  # of the experts
DEAD_SHARE = 0.01  # of a uniform share; an expert with less is called dead


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0, or 2 after one line on stderr that says what is wrong."""
    options = _parse(arguments)
    return exit_code(_run, options)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="as python -m jmoe.generate takes it; default: the demo model")
    text = parser.add_mutually_exclusive_group(required=True)
    text.add_argument("--text", type=Path, nargs="+", metavar="FILE", help="documents, UTF-8")
    text.add_argument("--stdlib-held-out", action="store_true", help="held-out files of Python's standard library")
    parser.add_argument("--stdlib-root", type=Path, metavar="DIR", help="default: this interpreter's")
    parser.add_argument("--num-documents", type=int, default=24, help="at most; default: 24")
    parser.add_argument("--tokens", type=int, default=1024, help="of each document; shorter ones are left out")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="write plots there (PNG)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    options = parser.parse_args(arguments)
    if options.stdlib_root and not options.stdlib_held_out:
        parser.error("--stdlib-root is where --stdlib-held-out reads; give both, or --text alone")
    if options.tokens < 2 or options.num_documents < 2:
        parser.error("--tokens and --num-documents have to be 2 or more: what is measured is reuse and comparison")
    return options


def _run(options: argparse.Namespace) -> None:
    if options.plots:
        _require_matplotlib()
    path = sources.resolve(options.model, announce=_say, prepare=memory.configure_backend)
    config = checkpoint.read_config(path)
    documents = read_documents(options, config, load_tokenizer(path))
    sequences = record(config, *load_resident(path, config), list(documents.values()))
    summary = summarize(sequences, config.num_experts)
    report = {
        "model": str(path),
        "documents": list(documents),
        "num_tokens": summary.num_tokens,
        "num_experts": summary.num_experts,
        "num_experts_per_tok": summary.num_active,
        **_figures(summary, config.moe_layers),
    }
    rows = [*report["layers"], *({"layer": name} | report[name] for name in ("mean", "uniform"))]
    print(*_table(rows), "", *_skew_lines(report), sep="\n")
    if options.plots:
        _write_plots(summary, config.moe_layers, options.plots)
    if options.json:
        options.json.write_text(json.dumps(report) + "\n", encoding="utf-8")
        print(f"{options.json}: written")


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def _require_matplotlib() -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise RuntimeError("--plots needs matplotlib, which is not installed; uv sync --extra plots, or leave it out")


# Documents, and the routing of each.


def read_documents(options: argparse.Namespace, config: ModelConfig, tokenizer: Tokenizer) -> dict[str, list[int]]:
    """The first tokens of each document that is long enough, by name; evenly spaced among them if they are many."""
    encoded = {name: tokenizer.encode(text) for name, text in _texts(options).items()}
    long = [name for name, ids in encoded.items() if len(ids) >= options.tokens]
    if len(long) < 2:
        raise ValueError(
            f"{len(long)} of {len(encoded)} documents have {options.tokens} tokens or more; expected at least 2, since "
            "documents are compared; lower --tokens, or give longer documents or more of them"
        )
    at = np.linspace(0, len(long) - 1, min(options.num_documents, len(long))).round().astype(int)
    _say(f"{len(encoded)} documents, {len(long)} of them with {options.tokens} tokens or more; measuring {len(at)}")
    chosen = {long[n]: encoded[long[n]][: options.tokens] for n in at}
    largest = max(max(ids) for ids in chosen.values())
    if largest >= config.vocab_size:
        raise RuntimeError(f"the tokenizer gives id {largest}, the model has vocab_size={config.vocab_size}")
    return chosen


def _texts(options: argparse.Namespace) -> dict[str, str]:
    if options.stdlib_held_out:
        return stdlib_corpus.read_files(options.stdlib_root or stdlib_corpus.stdlib_root(), held_out=True)
    texts = {}
    for file in options.text:
        try:
            texts[str(file)] = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{file}: not UTF-8 text ({error})") from error
    return texts


def load_resident(path: Path, config: ModelConfig) -> tuple[dict[str, jax.Array], tuple[jax.Array, ...]]:
    """The trunk by flat path and the experts of each MoE layer, all on the device. Raises ValueError if too large."""
    needed, available = checkpoint.checkpoint_bytes(config), memory.device_available_bytes()
    available = memory.host_available_bytes() if available is None else available
    if needed > available:
        raise ValueError(
            f"{path}: {memory.format_bytes(needed)} of weights, but {memory.format_bytes(available)} of device memory "
            "are free; this tool keeps every expert on the device, so give a smaller model or a larger device"
        )
    sharding = memory.device_sharding()
    layers = tqdm(config.moe_layers, desc="loading experts", unit="layer", leave=False, delay=1)
    experts = tuple(checkpoint.load_experts(path, config, layer, sharding) for layer in layers)
    return checkpoint.load_trunk(path, config, sharding), experts


def record(
    config: ModelConfig,
    params: Mapping[str, jax.Array],
    layers: tuple[jax.Array, ...],
    documents: Sequence[Sequence[int]],
) -> list[np.ndarray]:
    """Expert ids [T, L, A] of each document."""
    progress = tqdm(documents, desc="documents", leave=False, delay=1)
    return [np.asarray(_expert_ids(config, params, layers, np.asarray([ids], np.int32))) for ids in progress]


@functools.partial(jax.jit, static_argnames=("config",), compiler_options=COMPILER_OPTIONS)
def _expert_ids(config: ModelConfig, params, layers, token_ids):
    _, routings = forward_routed(config, params, layers, token_ids)
    return jnp.stack([routing.expert_ids for routing in routings], axis=1)


# Figures.


def slot_counts(num_experts: int, num_active: int) -> list[int]:
    """The numbers of slots that the table shows: A, 2A, E/4 and E/2, those that hold a token's experts."""
    sizes = {num_active, 2 * num_active, num_experts // 4, num_experts // 2}
    return sorted(size for size in sizes if num_active <= size <= num_experts)


def layer_columns(summary: RoutingSummary) -> dict[str, np.ndarray]:
    """Figures of each layer, [L] by name. Use is relative to a uniform share."""
    num_experts = summary.num_experts
    relative = summary.use * num_experts
    return {
        "effective_experts": routing_stats.effective_experts(summary.use),
        "min_use": relative.min(axis=1),
        "max_use": relative.max(axis=1),
        "num_dead": routing_stats.num_dead(summary.use, DEAD_SHARE / num_experts),
        "reuse": summary.reuse[1],
        "shuffled_reuse": summary.shuffled_reuse,
        **{f"hit_rate_{n}": summary.hit_rate[:, n] for n in slot_counts(num_experts, summary.num_active)},
    }


def uniform_row(num_experts: int, num_active: int) -> dict[str, float]:
    """What `layer_columns` would be for routers that choose uniformly at random, over many tokens."""
    share = num_active / num_experts
    row = {"effective_experts": num_experts, "min_use": 1, "max_use": 1, "num_dead": 0}
    hit_rates = {f"hit_rate_{n}": n / num_experts for n in slot_counts(num_experts, num_active)}
    return row | {"reuse": share, "shuffled_reuse": share} | hit_rates


def skew(summary: RoutingSummary) -> dict[str, dict[str, float]]:
    """Shares of the most used experts, and the cosine between prompts: of prompts, of shuffled ones, of the pool."""
    made = {}
    for name, counts in (("prompts", summary.counts), ("shuffled", summary.shuffled_counts)):
        made[name] = _top_shares(counts) | {"similarity": _mean_of_pairs(routing_stats.similarity(counts))}
    return made | {"pooled": _top_shares(summary.counts.sum(axis=0))}


def _top_shares(counts: np.ndarray) -> dict[str, float]:
    return {f"top_{share:.0%}": float(routing_stats.top_share(counts, share).mean()) for share in TOP_FRACTIONS}


def _mean_of_pairs(matrix: np.ndarray) -> float:
    return float(matrix[np.triu_indices(len(matrix), 1)].mean())


def _figures(summary: RoutingSummary, moe_layers: Sequence[int]) -> dict[str, Any]:
    columns = layer_columns(summary)
    return {
        "layers": [
            {"layer": layer} | {name: float(values[n]) for name, values in columns.items()}
            for n, layer in enumerate(moe_layers)
        ],
        "mean": {name: float(values.mean()) for name, values in columns.items()},
        "uniform": uniform_row(summary.num_experts, summary.num_active),
        "skew": skew(summary),
        "reuse_by_lag": {lag: values.round(5).tolist() for lag, values in summary.reuse.items()},
        "hit_rate_by_slots": summary.hit_rate.round(5).tolist(),
        "expert_use": summary.use.round(7).tolist(),
    }


# What people see.


def _table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines, a row each; use is relative to a uniform share, and LRU n is the hit rate at n slots."""
    titles = {"effective_experts": "effective", "num_dead": "dead", "shuffled_reuse": "shuffled"}
    titles |= {name: name.replace("hit_rate_", "LRU ") for name in rows[0] if name.startswith("hit_rate_")}
    titles |= {"min_use": "min use", "max_use": "max use"}
    cells = [[titles.get(name, name) for name in rows[0]]]
    cells += [[_cell(name, value) for name, value in row.items()] for row in rows]
    return ["  ".join(f"{cell:>9}" for cell in line) for line in cells]


def _cell(name: str, value: float | str) -> str:
    if isinstance(value, str):
        return value
    decimals = {"layer": 0, "num_dead": 1 if value % 1 else 0, "effective_experts": 1, "min_use": 2, "max_use": 2}
    return f"{value:.{decimals.get(name, 3)}f}"


def _skew_lines(report: Mapping[str, Any]) -> list[str]:
    uniform = {f"top_{share:.0%}": share for share in TOP_FRACTIONS}
    made = {**report["skew"], "uniform": uniform}
    num_prompts, num_tokens = len(report["documents"]), report["num_tokens"]
    lines = [f"share of activations that the most used experts take ({num_prompts} prompts of {num_tokens} tokens)"]
    labels = {
        "prompts": "single prompts",
        "shuffled": "the same tokens dealt to prompts at random",
        "pooled": "all prompts together",
        "uniform": "uniform routing",
    }
    for name, label in labels.items():
        shares = "  ".join(f"{top.replace('_', ' ')} {made[name][top]:.3f}" for top in uniform)
        lines.append(f"  {label:<44}{shares}")
    alike, shuffled = made["prompts"]["similarity"], made["shuffled"]["similarity"]
    return [*lines, f"cosine of the activations of two prompts: {alike:.3f} (dealt at random {shuffled:.3f})"]


def _write_plots(summary: RoutingSummary, moe_layers: Sequence[int], directory: Path) -> None:
    from tools import routing_plots  # imports matplotlib, an extra

    uniform = summary.num_active / summary.num_experts
    concentrations = {
        "single prompts": routing_stats.concentration(summary.counts).mean(axis=1),
        "dealt at random": routing_stats.concentration(summary.shuffled_counts).mean(axis=1),
        "all prompts together": routing_stats.concentration(summary.counts.sum(axis=0)).mean(axis=0),
    }
    figures = {
        "expert_use": routing_plots.use_map(summary.use, moe_layers),
        "reuse_by_lag": routing_plots.reuse_by_lag(summary.reuse, moe_layers, uniform),
        "lru_hit_rate": routing_plots.hit_rate_by_slots(summary.hit_rate, moe_layers, summary.num_active),
        "skew": routing_plots.skew_curves(concentrations),
    }
    directory.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        print(f"{routing_plots.save(figure, directory / f'{name}.png')}: written")


if __name__ == "__main__":
    sys.exit(main())
