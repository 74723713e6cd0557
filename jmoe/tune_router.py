"""Tunes a model's routers for fewer fetches: python -m jmoe.tune_router --text DIRECTORY tuned.safetensors

Everything but the routers is frozen. They learn to send consecutive tokens to the same experts, and to predict the text
as well as before: tuning stops once held-out text takes more than 1 % more bits (--set most_worse=0.01), and what is
kept are the routers of the most reuse before that. The result is a file of the routers alone, for this checkpoint:
python -m jmoe.generate --router tuned.safetensors. Checkpoints of the tuning lie in DESTINATION.tuning, from which a
run that was killed goes on when it is started again. docs/router_tuning.md has the method.
"""

import argparse
import ast
import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from jmoe import checkpoint, memory, sources
from jmoe.arguments import parse_size, version_of
from jmoe.config import DTYPES, ModelConfig
from jmoe.router_delta import RouterDelta
from jmoe.tokenizer import Tokenizer, load_tokenizer
from jmoe.training.config import RouterTuningConfig
from jmoe.training.frozen import Frozen, Placement, load_frozen
from jmoe.training.router_tuning import Tuner, TuningState, finished
from jmoe.training.texts import Texts, prepare
from jmoe.training.tuning_loop import TuningEvaluation, TuningOutcome, tune

RESIDENT_SHARE = 0.6  # of the free device memory, for weights; the rest is for activations


@dataclasses.dataclass(frozen=True)
class Subject:
    """The model that is tuned. `dtype` is what its checkpoint stores, `config.dtype` what is computed with."""

    name: str
    config: ModelConfig
    frozen: Frozen
    placement: Placement
    tokenizer: Tokenizer
    fingerprint: str
    dtype: str


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0, or 2 after one line on stderr that says what is wrong."""
    parser = make_parser(__doc__ or "")
    parser.add_argument("--text", type=Path, nargs="+", required=True, metavar="PATH", help="files and directories")
    parser.add_argument("--held-out", type=Path, nargs="+", default=[], metavar="PATH", help="default: some of --text")
    return answer(parser, arguments, lambda options: Texts.read(options.text, options.held_out), load_subject)


def answer(
    parser: argparse.ArgumentParser,
    arguments: Sequence[str] | None,
    read_texts: Callable[[argparse.Namespace], Texts],
    load: Callable[[argparse.Namespace], Subject],
) -> int:
    """`main` of a program that has its own options for texts or models: the exit code."""
    options = parser.parse_args(arguments)
    try:
        _run(options, read_texts, load)
    except (ValueError, RuntimeError, OSError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0


def make_parser(description: str) -> argparse.ArgumentParser:
    """The options that do not say where text comes from."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("destination", type=Path, help="file to make, .safetensors")
    parser.add_argument("--model", help="as python -m jmoe.generate takes it; default: the demo model")
    parser.add_argument("--tuning", type=Path, metavar="FILE", help="TOML such as configs/training/router_tuning.toml")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="instead of what --tuning says")
    parser.add_argument("--held-out-bytes", type=parse_size, metavar="SIZE", help="score about so much of it alone")
    parser.add_argument("--experts", choices=("resident", "offloaded"), help="where they lie; default: what fits")
    parser.add_argument("--dtype", choices=DTYPES, help="to compute with; default: the checkpoint's")
    return parser


def tuning_of(options: argparse.Namespace) -> RouterTuningConfig:
    """The settings of --tuning with those of --set. Raises ValueError for one that is not there or out of range."""
    tuning = RouterTuningConfig.from_toml(options.tuning) if options.tuning else RouterTuningConfig()
    known = {field.name for field in dataclasses.fields(RouterTuningConfig)}
    changes: dict[str, Any] = {}
    for text in options.set:
        name, _, value = text.partition("=")
        if name not in known:
            raise ValueError(f"--set {text}: expected NAME=VALUE with a name of {', '.join(sorted(known))}")
        try:
            changes[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError) as error:
            raise ValueError(f"--set {text}: {value!r} is no number") from error
    return dataclasses.replace(tuning, **changes)


def load_subject(options: argparse.Namespace) -> Subject:
    """The model of --model, its experts where --experts says or where they fit."""
    path = sources.resolve(options.model, announce=say, prepare=memory.configure_backend)
    manifest = checkpoint.read_manifest(path)
    config = dataclasses.replace(manifest.config, dtype=options.dtype or manifest.config.dtype)
    placement = placement_for(config, options.experts)
    with tqdm(unit="B", unit_scale=True, unit_divisor=1024, leave=False, disable=None) as bar:

        def report(phase: str, done_bytes: int, total_bytes: int) -> None:
            bar.total = total_bytes
            bar.set_description(phase, refresh=False)
            bar.update(done_bytes - bar.n)

        frozen = load_frozen(path, config, placement, report)
    name, tokenizer = options.model or "demo", load_tokenizer(path)
    return Subject(name, config, frozen, placement, tokenizer, manifest.fingerprint, manifest.config.dtype)


def placement_for(config: ModelConfig, wanted: str | None) -> Placement:
    """Where the experts go; chosen, and said, if `wanted` is None: on the device if all weights leave room there."""
    if wanted is not None:
        return Placement(offloaded=wanted == "offloaded")
    needed, available = checkpoint.checkpoint_bytes(config), memory.device_available_bytes()
    if available is None:
        return Placement()
    offloaded = needed > RESIDENT_SHARE * available
    place = "in pinned host memory" if offloaded else "on the device"
    say(
        f"experts {place}: all weights take {memory.format_bytes(needed)}, and {memory.format_bytes(available)} of the "
        f"device are free, of which weights may take {RESIDENT_SHARE:.0%}"
    )
    return Placement(offloaded=offloaded)


def say(line: str) -> None:
    tqdm.write(line, file=sys.stderr)


def _run(
    options: argparse.Namespace,
    read_texts: Callable[[argparse.Namespace], Texts],
    load: Callable[[argparse.Namespace], Subject],
) -> None:
    if not options.destination.absolute().parent.is_dir():
        raise ValueError(f"{options.destination}: no directory {options.destination.parent}; make it first")
    tuning, texts = tuning_of(options), read_texts(options)
    subject = load(options)
    batches, held_out = prepare(texts, subject.tokenizer, tuning, options.held_out_bytes)
    say(
        f"{batches.num_tokens} tokens to train on, {tuning.num_steps} steps of {tuning.tokens_per_step}; "
        f"{int(held_out.scored.sum())} tokens ({held_out.num_bytes} bytes) held out"
    )
    tuner = Tuner(subject.config, tuning, subject.placement)
    work = options.destination.with_name(options.destination.name + ".tuning")
    with tqdm(total=tuning.num_steps, unit="step", mininterval=1, disable=None) as bar:

        def report(step: int, terms: dict[str, float], tokens_per_s: float) -> None:
            bar.update(step - bar.n)
            shown = "  ".join(f"{name} {value:.3f}" for name, value in terms.items())
            bar.set_postfix_str(f"{shown}  {tokens_per_s:.3g} tokens/s", refresh=False)

        outcome = tune(tuner, subject.frozen, batches, held_out, work, subject.fingerprint, report, _tell)
    peak = memory.peak_device_bytes()
    used = "" if peak is None else f"; at most {memory.format_bytes(peak)} of device memory were in use"
    say(f"{outcome.tokens_per_s:.4g} tokens/s{used}")
    _write(options.destination, subject, tuning, outcome)


def _tell(evaluation: TuningEvaluation) -> None:
    line = (
        f"step {evaluation.step}: held-out bits per byte {evaluation.bits_per_byte:.4f}, reuse {evaluation.reuse:.4f}"
    )
    terms = "  ".join(f"{name} {value:.4f}" for name, value in evaluation.terms.items())
    tqdm.write(line + (f"; last step {terms}" if terms else ""), file=sys.stdout)


def _write(destination: Path, subject: Subject, tuning: RouterTuningConfig, outcome: TuningOutcome) -> None:
    """The routers, in the checkpoint's dtype; and what tuning changed, for people. Raises RuntimeError if nothing."""
    before, best = outcome.before, outcome.best
    if best.step == 0:
        tried = "; ".join(
            f"step {e.step}: {e.bits_per_byte:.4f} bits, reuse {e.reuse:.4f}" for e in outcome.evaluations
        )
        raise RuntimeError(
            f"no routers within the gate (at most {tuning.most_worse:.1%} more bits) have more reuse than before: "
            f"{tried}. Lower the terms' weights or the learning rate, or evaluate more often (eval_every)"
        )
    config = dataclasses.replace(subject.config, dtype=subject.dtype)
    state = TuningState(jax.numpy.int32(best.step), outcome.routers, ())
    facts = {
        "model": subject.name,
        "tuning": dataclasses.asdict(tuning),
        "before": dataclasses.asdict(before),
        "after": dataclasses.asdict(best),
        "ended_by_gate": outcome.ended_by_gate,
        "device": jax.devices()[0].device_kind,
        "versions": {name: version_of(name) for name in ("jmoe", "jax")},
    }
    delta = RouterDelta(finished(Tuner(config, tuning), state), subject.fingerprint, facts)
    delta.save(destination, config)
    print(
        f"{destination}: written; step {best.step}, reuse {before.reuse:.4f} -> {best.reuse:.4f} "
        f"({best.reuse / before.reuse - 1:+.1%}), held-out bits per byte {before.bits_per_byte:.4f} -> "
        f"{best.bits_per_byte:.4f} ({best.bits_per_byte / before.bits_per_byte - 1:+.2%})"
        + (", stopped by the gate" if outcome.ended_by_gate else "")
    )


if __name__ == "__main__":
    sys.exit(main())
