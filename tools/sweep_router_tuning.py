"""Searches the weights of router tuning's loss: python -m tools.sweep_router_tuning --out sweep.jsonl --plot sweep.png

Tunes the model's routers once for each row of --rows (TOML: a [[row]] with a name and what it changes of --tuning:
weights and the learning rate), and --random draws more rows around that file's [random] ranges. All share one compiled
step, the same batches and the same held-out text. Prints a row as soon as it is done, after the last step, whether the
gate would have let it through or not:

  reuse   share of a token's experts that the token before had as well, of the held-out text; change relative to before
  LRU A   hit rate of as many least-recently-used slots as a token has experts, which start empty with each window
  bits    held-out bits per byte; change relative to before
"""

import argparse
import dataclasses
import importlib.util
import json
import math
import sys
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jmoe.arguments import parse_size
from jmoe.config import DTYPES
from jmoe.routing_stats import lru_hit_rate, reuse_distances
from jmoe.training.config import RouterTuningConfig
from jmoe.training.frozen import Frozen
from jmoe.training.loop import HeldOut
from jmoe.training.router_tuning import Knobs, Terms, Tuner
from jmoe.training.texts import prepare
from jmoe.training.tuning_loop import tokens_of
from jmoe.tune_router import load_subject, say, tuning_of
from tools.command import exit_code
from tools.tune_router import read_stdlib

ROWS = Path(__file__).parent.parent / "configs" / "training" / "router_sweep.toml"
KNOBS = {field.name for field in dataclasses.fields(Knobs)}
LRU_WINDOWS = 32  # of the held-out text, for the hit rate: it is counted on the host


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0, or 2 after one line on stderr that says what is wrong."""
    return exit_code(_run, _parser().parse_args(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, default=ROWS, help=f"default: {ROWS.name} of configs/training")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these rows of the file alone")
    parser.add_argument("--random", type=int, default=0, metavar="N", help="so many rows more, drawn at random")
    parser.add_argument("--model", help="as python -m jmoe.generate takes it; default: the demo model")
    parser.add_argument("--tuning", type=Path, metavar="FILE", help="what rows change; default: the tuner's defaults")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="instead of what --tuning says")
    parser.add_argument("--stdlib-root", type=Path, metavar="DIR", help="default: the running interpreter's library")
    parser.add_argument("--held-out-bytes", type=parse_size, default=630_000, metavar="SIZE", help="default: 630KB")
    parser.add_argument("--experts", choices=("resident", "offloaded"), help="where they lie; default: what fits")
    parser.add_argument("--dtype", choices=DTYPES, help="to compute with; default: the checkpoint's")
    parser.add_argument("--seed", type=int, default=0, help="of --random")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write a line of JSON there for each row")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write the frontier there (PNG)")
    return parser


def _run(options: argparse.Namespace) -> None:
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        raise RuntimeError("--plot needs matplotlib, which is not installed; uv sync --extra plots, or leave it out")
    tuning = tuning_of(options)
    wanted = list(read_rows(options.rows, options.only, options.random, options.seed))
    tunings = {name: dataclasses.replace(tuning, **changes) for name, changes in wanted}
    texts, subject = read_stdlib(options), load_subject(options)
    batches, held_out = prepare(texts, subject.tokenizer, tuning, options.held_out_bytes)
    tuner = Tuner(subject.config, tuning, subject.placement)
    tokens = jax.device_put(tokens_of(batches, 0, tuning.num_steps, tuning.gradient_accumulation))
    say(
        f"{len(tunings)} rows of {tuning.num_steps} steps of {tuning.tokens_per_step} tokens; "
        f"{held_out.num_bytes} bytes held out"
    )
    before = judge(tuner, subject.frozen, subject.frozen.routers(subject.config), held_out)
    print(*_heading(before, subject.config.num_experts_per_tok), sep="\n", flush=True)
    rows = []
    for row in sweep(tuner, subject.frozen, tokens, held_out, tunings, before):
        rows.append(row)
        print(_line(row, tuning.most_worse), flush=True)
        if options.out:
            options.out.write_text("".join(json.dumps(each) + "\n" for each in rows), encoding="utf-8")
    if options.plot:
        from tools import reuse_plots  # imports matplotlib, an extra

        print(f"{reuse_plots.save(reuse_plots.frontier(rows, tuning.most_worse), options.plot)}: written")


def read_rows(
    file: Path, only: Sequence[str] | None, num_random: int, seed: int
) -> Iterator[tuple[str, dict[str, float]]]:
    """(name, what it changes) of the file's rows and of random ones. Raises ValueError for what is malformed."""
    if not file.is_file():
        raise ValueError(f"{file}: no such file; expected TOML with a [[row]] for each setting")
    content = tomllib.loads(file.read_text(encoding="utf-8"))
    rows = {str(row.get("name")): {name: row[name] for name in row if name != "name"} for row in content.get("row", [])}
    ranges: dict[str, list[float]] = content.get("random", {})
    for name, values in (*rows.items(), ("random", ranges)):
        if unknown := sorted(set(values) - KNOBS):
            raise ValueError(
                f"{file}: {name} changes {', '.join(unknown)}; a row may change {', '.join(sorted(KNOBS))}"
            )
    if absent := sorted(set(only or ()) - set(rows)):
        raise ValueError(f"{file}: no rows {', '.join(absent)}; it has {', '.join(rows)}")
    if not rows and not num_random:
        raise ValueError(f"{file}: no [[row]]; give some, or --random")
    yield from ((name, values) for name, values in rows.items() if not only or name in only)
    rng = np.random.default_rng(seed)
    for n in range(num_random):
        drawn = {name: float(np.exp(rng.uniform(*np.log(bounds)))) for name, bounds in ranges.items()}
        yield f"random {n}", drawn


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Of the held-out text: bits a byte, reuse, and the LRU hit rate with slots for one token's experts a layer."""

    bits_per_byte: float
    reuse: float
    lru: float


def judge(tuner: Tuner, frozen: Frozen, routers: Mapping[str, Any], held_out: HeldOut) -> Verdict:
    scored = [tuner.score(frozen, dict(routers), *pair) for pair in held_out.batches(tuner.tuning.batch_size)]
    sums = {name: math.fsum(float(getattr(part, name)) for part in scored) for name in _SUMS}
    whole = held_out.scored.all(axis=1).nonzero()[0][:LRU_WINDOWS]  # windows that no padding fills up
    ids = np.concatenate([np.asarray(part.expert_ids) for part in scored], axis=1)[:, whole]  # [L, windows, T, A]
    lru = float("nan")
    if whole.size:
        sequence = np.moveaxis(ids, 2, 0).reshape(ids.shape[2], -1, ids.shape[3])  # a window's layer as a layer
        histogram = reuse_distances(sequence, tuner.config.num_experts).sum(axis=0)
        lru = float(lru_hit_rate(histogram)[tuner.config.num_experts_per_tok])
    bits = sums["nats"] / math.log(2) / held_out.num_bytes
    return Verdict(bits, sums["num_reused"] / max(1.0, sums["num_followed"]), lru)


_SUMS = ("nats", "num_reused", "num_followed")


def sweep(
    tuner: Tuner,
    frozen: Frozen,
    tokens: jax.Array,
    held_out: HeldOut,
    tunings: Mapping[str, RouterTuningConfig],
    before: Verdict,
) -> Iterator[dict[str, Any]]:
    """A row for each of the tunings, which differ from the tuner's in what `Knobs` holds alone."""
    for name, tuning in tunings.items():
        started = time.perf_counter()
        state, terms = tuner.steps(frozen, Knobs.of(tuning), tuner.start(frozen), tokens)
        made = judge(tuner, frozen, state.routers, held_out)
        yield {
            "name": name,
            **{knob: getattr(tuning, knob) for knob in sorted(KNOBS)},
            "before": dataclasses.asdict(before),
            "after": dataclasses.asdict(made),
            "reuse_change": made.reuse / before.reuse - 1,
            "lru_change": made.lru / before.lru - 1,
            "bits_change": made.bits_per_byte / before.bits_per_byte - 1,
            "terms": {field.name: float(getattr(terms, field.name)[-1]) for field in dataclasses.fields(Terms)},
            "seconds": time.perf_counter() - started,
        }


def _heading(before: Verdict, num_active: int) -> list[str]:
    return [
        f"before: reuse {before.reuse:.4f}, LRU {num_active} {before.lru:.4f}, "
        f"bits per byte {before.bits_per_byte:.4f}",
        f"{'row':<24}{'trust':>7}{'reuse':>7}{'smooth':>7}{'lagged':>7}{'window':>7}{'rate':>8}"
        f"{'reuse':>9}{'':>8}{f'LRU {num_active}':>9}{'':>8}{'bits':>9}{'':>8}  gate",
    ]


def _line(row: Mapping[str, Any], most_worse: float) -> str:
    weights = ("trust", "reuse", "smoothness", "lagged", "window_entropy")
    after = row["after"]
    cells = [f"{row['name']:<24}", *(f"{row[name]:>7.3g}" for name in weights), f"{row['learning_rate']:>8.2g}"]
    cells += [f"{after['reuse']:>9.4f}{row['reuse_change']:>+8.1%}", f"{after['lru']:>9.4f}{row['lru_change']:>+8.1%}"]
    cells += [f"{after['bits_per_byte']:>9.4f}{row['bits_change']:>+8.2%}"]
    return "".join(cells) + ("  yes" if row["bits_change"] <= most_worse else "  no")


if __name__ == "__main__":
    sys.exit(main())
