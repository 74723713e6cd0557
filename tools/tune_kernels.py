"""Finds faster configurations of kernels for named shapes on this GPU: python -m tools.tune_kernels --write

For each spec, times the kernel's own choice and a few other configurations as `tools.bench_kernels` does, each after
its result was compared with the reference, and prints them, the fastest first, beside the same bound. With --write,
what is at least 2 % faster than the kernel's own choice, in two timings, goes into kernels_pallas/tuning.toml, where
the kernels find it; what is not is taken out of it. Entries of other GPUs and shapes stay. A configuration that cannot
be compiled, or is wrong, and a spec that fails, are named, and the others go on.
"""

import argparse
import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from jmoe.whole_files import new_file
from kernels_pallas import backends, tuning
from tools.bench_kernels import chosen_specs, link_gbps, median_seconds, memory_gbps
from tools.command import exit_code
from tools.tunable_kernels import Timed, Tunable, tunable

LEAST_GAIN = 0.02  # of the time: what is less may be noise
DEFAULTS = {
    "expert_mlp": [
        "batch_of_32_over_64",
        "prefill_512",
        "prefill_8192",
        "qwen3_30b_decode",
        "two_rows",
        "batch_of_8",
        "prefill_4096",
    ],
    "decode_attention": ["qwen3_30b", "b8", "b32", "long"],
    "norm_linear": ["summed_qkv", "qwen3_30b_o", "qwen3_30b_router"],
    "fetch": ["qwen3_30b"],
}


@dataclasses.dataclass(frozen=True)
class Trial:
    """A configuration, and the microseconds of a call with it; `timer` takes them again."""

    config: Any
    us: float
    timer: Callable[[], float]


@dataclasses.dataclass(frozen=True)
class Result:
    """All trials of a spec, the fastest first; `winner` is one of them, or None where the kernel's own choice stays."""

    trials: list[Trial]
    own: Trial
    winner: Trial | None


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0, or 2 after one line on stderr that says what is wrong."""
    return exit_code(_run, _parser().parse_args(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", nargs="+", choices=tuple(DEFAULTS), default=list(DEFAULTS))
    parser.add_argument("--specs", nargs="+", help="names in kernels_pallas/*/specs.py (default: a few of each op)")
    parser.add_argument("--seconds", type=float, default=30, help="of a spec, after which nothing more is tried")
    parser.add_argument("--repeats", type=int, default=5, help="of each timing; the median counts")
    parser.add_argument(
        "--write", nargs="?", type=Path, const=tuning.TABLE, metavar="FILE", help="default: kernels_pallas/tuning.toml"
    )
    return parser


def _run(options: argparse.Namespace) -> None:
    """Raises NotImplementedError without a GPU, ValueError for specs that are unknown or share a place in the table."""
    chosen = chosen_specs(options.ops, options.specs, DEFAULTS)
    if problem := backends.mosaic_gpu_problem():
        raise NotImplementedError(f"tuning times kernels on a GPU, and here {problem}; run it where there is one")
    _require_distinct([spec for specs in chosen.values() for spec in specs])
    print(f"device {tuning.device_kind()}, jax {jax.__version__}", flush=True)
    found, failed = [], []
    for op, specs in chosen.items():
        gbps = (link_gbps if op == "fetch" else memory_gbps)() if specs else 0.0
        for spec in specs:
            try:
                found.append(_tune(spec, gbps, options))
            except Exception as error:  # whatever a compiler may raise: the other specs go on
                failed.append(f"{op} {spec.name}")
                print(f"{op} {spec.name}: failed: {_first_line(error)}", flush=True)
    print(json.dumps({"device": tuning.device_kind(), "jax": jax.__version__, "specs": found}))
    if failed:
        raise RuntimeError(f"{len(failed)} specs could not be tuned: {', '.join(failed)}; see above")


def _require_distinct(specs: list) -> None:
    """Raises ValueError for two specs of one key: the second would undo what the first has written."""
    keys: dict[tuning.Key, str] = {}
    for spec in specs:
        try:
            key = tunable(spec).key
        except NotImplementedError:
            continue  # said when its turn comes
        if key in keys:
            raise ValueError(f"specs {keys[key]} and {spec.name} have one place in the table, {key}; name one of them")
        keys[key] = spec.name


def _tune(spec, gbps: float, options: argparse.Namespace) -> dict[str, Any]:
    """What is said of a spec in the last line; prints its table, and writes what is faster."""
    kernel, gpu = tunable(spec), tuning.device_kind()
    in_use = _in_table(kernel, gpu)
    if in_use is not None:  # first: it is not to be lost because the time was up
        kernel = dataclasses.replace(kernel, candidates=[in_use, *kernel.candidates])
    print(f"\n{kernel.key.kernel} {spec.name}: {kernel.key.dtype}, {_sizes(kernel.key.shape)}", flush=True)
    case = kernel.case(lambda run, arguments: median_seconds(run, arguments, options.repeats))
    result, bound_us = tune(kernel, case, options.seconds), case.bound_us(gbps)
    print("\n".join(_table(result, bound_us, in_use)), flush=True)
    if options.write:
        write(options.write, kernel.key, gpu, result)
    best = result.winner or result.own
    times = {"us": best.us, "heuristic_us": result.own.us, "bound_us": bound_us}
    return {"kernel": kernel.key.kernel, "spec": spec.name, "config": dataclasses.asdict(best.config), **times}


def _in_table(kernel: Tunable, gpu: str) -> Any:
    """The configuration that the checked-in table has, or None: also for one that the kernel cannot have."""
    for entry in tuning.read(tuning.TABLE):
        if (entry.gpu, entry.key) == (gpu, kernel.key):
            with contextlib.suppress(RuntimeError):
                return entry.made(type(kernel.heuristic))
    return None


def tune(kernel: Tunable, case: Timed, seconds: float, clock: Callable[[], float] = time.monotonic) -> Result:
    """Tries the kernel's own choice and a candidate, then others until the time is up; says what was left out, and why.

    Raises what the kernel's own choice raises, and RuntimeError if that is wrong.
    """
    until = clock() + seconds
    own = _trial(kernel, case, kernel.heuristic)
    trials = [own]
    for config in _distinct(kernel):
        is_late = len(trials) > 1 and clock() > until
        problem = kernel.problem(config) or (f"the {seconds:g} s are over" if is_late else None)
        if problem is None:
            try:
                trials.append(_trial(kernel, case, config))
            except Exception as error:  # whatever a compiler may raise
                problem = _first_line(error)
        if problem is not None:
            print(f"  left out: {_words(config)}: {problem}", flush=True)
    trials.sort(key=lambda trial: trial.us)
    return Result(trials, own, _winner(own, trials[0]))


def _distinct(kernel: Tunable) -> Iterator[Any]:
    """The candidates that make another program than the kernel's own choice and than those before them."""
    programs = {kernel.program(kernel.heuristic)}
    for config in kernel.candidates:
        program = kernel.program(config)
        if program not in programs:
            programs.add(program)
            yield config


def _trial(kernel: Tunable, case: Timed, config: Any) -> Trial:
    """Raises RuntimeError if the result is wrong."""
    function = kernel.function(config)
    error = case.error(function)
    if not error <= kernel.max_error:  # nor is NaN right
        raise RuntimeError(f"its error of {error:.1e} of the largest value is more than {kernel.max_error:.0e}")
    timer = case.timer(function)
    trial = Trial(config, timer(), timer)
    print(f"  {trial.us:10.2f} us: {_words(config)}", flush=True)
    return trial


def _winner(own: Trial, best: Trial) -> Trial | None:
    """`best` if it is faster than the kernel's own choice by enough, and is so again."""
    if best is own or best.us > (1 - LEAST_GAIN) * own.us:
        return None
    again_us, own_again_us = best.timer(), own.timer()
    slower_us, faster_us = max(best.us, again_us), min(own.us, own_again_us)
    print(f"  again: {own_again_us:.2f} us as the kernel chooses, {again_us:.2f} us: {_words(best.config)}", flush=True)
    return best if slower_us <= (1 - LEAST_GAIN) * faster_us else None


def _table(result: Result, bound_us: float, in_use: Any) -> list[str]:
    """Lines, the fastest configuration first."""
    lines = [f"{'us':>12}{'% of bound':>12}  configuration"]
    for trial in result.trials:
        notes = [
            ("the kernel's own choice", trial is result.own),
            (f"at least {100 * LEAST_GAIN:g} % faster", trial is result.winner),
            ("in use so far", trial.config == in_use),
        ]
        said = "; ".join(note for note, holds in notes if holds)
        percent = 100 * bound_us / trial.us
        lines.append(f"{trial.us:>12.2f}{percent:>12.1f}  {_words(trial.config)}{said and f' ({said})'}")
    return lines


def write(path: Path, key: tuning.Key, gpu: str, result: Result) -> None:
    """Puts the winner into the table at `path`, or takes out what is there for this key and GPU if there is none.

    The table is the checked-in one if there is none at `path` yet. It appears under its name as a whole.
    """
    entries = tuning.read(path if path.exists() else tuning.TABLE)
    kept = [entry for entry in entries if (entry.gpu, entry.key) != (gpu, key)]
    if result.winner:
        config = dataclasses.asdict(result.winner.config)
        kept.append(tuning.Entry(key, gpu, config, result.winner.us, result.own.us))
    with new_file(path) as scratch:
        scratch.write_text(tuning.text(kept), encoding="utf-8")


def _words(config: Any) -> str:
    return _sizes(dataclasses.asdict(config).items())


def _sizes(pairs: Iterable[tuple[str, int]]) -> str:
    return " ".join(f"{name}={size}" for name, size in pairs)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


if __name__ == "__main__":
    sys.exit(main())
