"""Where the time of a decode step goes, kernel by kernel: python -m tools.profile_decode --config … --layers 12

Runs decode calls (with --prefill the chunks of a prompt instead, each a step) under jax's profiler and adds up what the
device did: time and kernels a step by the named scope of the code (prefetch, attention, router, admit, fetch, experts,
head, sample), the longest kernels, and how long none ran.
`alone` is the part of a scope's time when no other's kernel ran: of a prefetch what comes late, and is waited for.
`norm_linear` serves attention and router under one name, and is a line of its own: projections.
"""

import argparse
import collections
import contextlib
import dataclasses
import json
import re
import sys
import tempfile
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jmoe import memory
from jmoe.batch import prompt_chunks
from jmoe.config import ModelConfig, RuntimeConfig
from jmoe.decoding.compiled import Call
from jmoe.decoding.prefill import Chunk
from jmoe.decoding.sampling import Mode, Sampling, SamplingParams, batch_sampling, sampling_mode
from jmoe.decoding.step import DecodeState
from jmoe.engine import Engine
from jmoe.generation import Generation
from tools.command import exit_code
from tools.random_weights import random_weights
from tools.workload import Lengths, random_workload

CALLS_TO_SETTLE = 8  # of --steps, after which a prefetch has its amount
SCOPES = ("prefetch", "attention", "mlp", "router", "admit", "fetch", "experts", "head", "sample")
OTHER, PROJECTIONS = "other", "projections"
LANES = (SCOPES[0], PROJECTIONS, *SCOPES[1:], OTHER)  # what a kernel may be of
# A Pallas kernel has the name of its function, and this behind it.
MOSAIC_SUFFIX = "_mosaic_gpu_kernel"
KERNEL_SCOPES = {
    "project": PROJECTIONS,  # of attention and router
    "attend": "attention",
    "add_parts": "attention",
    "route_rows": "router",
    "admit_layer": "admit",
    "tell_time": "admit",
    "copy_rows": "prefetch",
    "copy_plan": "fetch",
    "multiply_groups": "experts",
    "gate_and_up": "experts",
    "down": "experts",
    "place_rows": "experts",
    "multiply_rows": "experts",
    "add_shares": "experts",
}


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One execution on the device: times in nanoseconds."""

    name: str
    scope: str
    start_ns: float
    duration_ns: float


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0, or 2 after one line on stderr that says what is wrong."""
    return exit_code(_run, _parser().parse_args(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="configs/models/*.toml; weights are random")
    parser.add_argument("--layers", type=int, help="number of decoder layers, if not the configuration's")
    parser.add_argument("--share", type=float, default=1.0, help="share of the experts that have a slot")
    parser.add_argument("--prefetch-experts", type=float, metavar="X", help="of each layer; default: no prefetch")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--prefill", action="store_true", help="profile a prompt instead of decode steps")
    parser.add_argument("--steps", type=int, default=32, help="decode steps to profile")
    parser.add_argument("--longest", type=int, default=25, help="how many kernels to name")
    parser.add_argument("--trace", type=Path, metavar="DIR", help="keep the profiler's trace there")
    return parser


def _run(options: argparse.Namespace) -> None:
    config = ModelConfig.from_toml(options.config)
    config = dataclasses.replace(config, num_hidden_layers=options.layers) if options.layers else config
    memory.configure_backend(config)
    runtime = RuntimeConfig(
        expert_slots=max(config.num_experts_per_tok, round(options.share * config.num_experts)),
        batch_size=options.batch_size,
        max_seq_len=options.prompt_tokens + CALLS_TO_SETTLE * options.steps + 2,
        decode_chunk=options.steps,
        measure_link=False,
        profiled=True,
        prefetch="lookahead" if options.prefetch_experts else "off",
        prefetch_experts=options.prefetch_experts or 1.0,
    )
    engine = Engine.start(config, runtime, lambda: random_weights(config, "flat", 0))
    with tempfile.TemporaryDirectory() as scratch:
        directory = options.trace or Path(scratch)
        steps = (profile_prefill if options.prefill else profile)(engine, options, directory)
        names = scopes(compiled_text(engine, prefill=options.prefill))
        report(list(kernels(directory, names)), steps, options.longest)


def generate(engine: Engine, options: argparse.Namespace, num_steps: int) -> Generation:
    """Continues a batch of random prompts."""
    constant = Lengths.constant
    requests = random_workload(
        engine.config.vocab_size,
        num_requests=options.batch_size,
        prompt_tokens=constant(options.prompt_tokens),
        new_tokens=constant(1 + num_steps),
        seed=0,
    )
    sampling = SamplingParams(max_new_tokens=1 + num_steps, temperature=1.0, ignore_eos=True)
    return engine.generate([list(request.prompt_ids) for request in requests], sampling)


def profile_prefill(engine: Engine, options: argparse.Namespace, directory: Path) -> int:
    """Takes in the prompts under the profiler, after a first time; the number of chunks."""
    with contextlib.closing(generate(engine, options, 1)) as first:
        next(iter(first))
    with contextlib.closing(generate(engine, options, 1)) as generation, jax.profiler.trace(str(directory)):
        next(iter(generation))
    return -(-options.prompt_tokens // engine.plan.prefill_chunk)


def profile(engine: Engine, options: argparse.Namespace, directory: Path) -> int:
    """Decodes under the profiler, a prefetch after a first time that finds its amount; how many steps are traced."""
    if engine.prefetching:
        generate(engine, options, CALLS_TO_SETTLE * options.steps).results()
    generation = generate(engine, options, 2 * options.steps)
    deltas, seen = iter(generation), 0
    for delta in deltas:  # the prompt, and the first calls
        seen += delta.index == 0 and len(delta.token_ids)
        if seen > options.steps // 2:
            break
    with jax.profiler.trace(str(directory)):
        steps = sum(len(delta.token_ids) for delta in deltas if delta.index == 0)
    if generation.stats.prefetch:
        print(*generation.stats.prefetch.lines(generation.stats.num_decode_tokens), sep="\n")
    return steps


def compiled_text(engine: Engine, *, prefill: bool) -> str:
    """XLA's program of the step, whose instructions give kernels their names."""
    weights, batch = engine.weights, engine.plan.batch_size
    params = [SamplingParams(temperature=1.0, ignore_eos=True)] * batch
    state = engine.new_state(batch, [1] * batch)
    inputs, sampling = (engine.steps, weights.params, weights.store, state), batch_sampling(params, ())
    mode, one = sampling_mode(params), jnp.asarray(1, jnp.int32)
    static = {"capacity": engine.runtime.decode_chunk, "mode": mode}
    if prefill:
        chunk = next(prompt_chunks([[0] * engine.plan.prefill_chunk] * batch, engine.plan.prefill_chunk))
        return _compiled_prefill(engine, state, chunk, sampling, mode)
    if engine.prefetching:
        ahead, most = (engine.predictor, one), engine.prefetching.num_experts
        lowered = engine.steps.decode_prefetching.lower(*inputs, sampling, one, *ahead, prefetch_experts=most, **static)
    else:
        lowered = engine.steps.decode.lower(*inputs, sampling, one, **static)
    engine.give_back(state)
    return lowered.compile().as_text() or ""


def _compiled_prefill(engine: Engine, state: DecodeState, chunk: Chunk, sampling: Sampling, mode: Mode) -> str:
    """The programs of a chunk, that of the layers last: its names count where two have the same."""
    texts: dict[tuple[bool, Hashable], str] = {}

    def run(call: Call):
        if (kind := (call.name == "prefill_layers", call.key)) not in texts:
            texts[kind] = call.lower().compile().as_text() or ""
        return call.run()

    weights = engine.weights
    state, _ = engine.prefill.chunk(weights.params, weights.store, state, chunk, sampling, mode=mode, run=run)
    engine.give_back(state)
    return "\n".join(texts[kind] for kind in sorted(texts, key=lambda kind: kind[0]))


def scopes(text: str) -> dict[str, str]:
    """The scope of each instruction of a compiled program, by the name that its kernel has."""
    found = {}
    for line in text.splitlines():
        if match := re.match(r'\s*(?:ROOT )?%?([\w.-]+) = .*op_name="([^"]*)"', line):
            found[re.sub(r"[.-]", "_", match[1])] = scope_of(match[2])
    return found


def kernels(directory: Path, scope_by_name: Mapping[str, str]) -> Iterator[Kernel]:
    """What ran on the device, from the newest trace below `directory`. Raises RuntimeError if there is none."""
    files = sorted(directory.rglob("*.xplane.pb"))
    if not files:
        raise RuntimeError(f"{directory}: the profiler left no trace there")
    for plane in jax.profiler.ProfileData.from_file(str(files[-1])).planes:
        if not plane.name.startswith("/device:"):
            continue
        for line in plane.lines:
            if line.name.startswith("Stream"):
                for event in line.events:
                    scope = scope_by_name.get(event.name) or KERNEL_SCOPES.get(_function(event.name), OTHER)
                    yield Kernel(event.name, scope, event.start_ns, event.duration_ns)


def _function(kernel: str) -> str:
    """The function that a Pallas kernel of this name was made from."""
    return kernel.removesuffix(MOSAIC_SUFFIX)


def scope_of(path: str) -> str:
    """The named scope in an operation's path, jit(decode)/while/body/attention/…: the last that is known."""
    named = [part for part in re.split(r"[/ ]", path) if part in SCOPES]
    return named[-1] if named else OTHER


def report(found: Sequence[Kernel], steps: int, longest: int) -> None:
    """Prints a line a scope, the longest kernels, and one line of JSON last."""
    if not found or not steps:
        raise RuntimeError(f"{len(found)} kernels and {steps} steps in the trace; expected some: is there a GPU?")
    rows = totals(((kernel.scope, kernel) for kernel in found), steps)
    span_us = (max(k.start_ns + k.duration_ns for k in found) - min(k.start_ns for k in found)) / steps / 1e3
    busy_us = busy_ns(found) / steps / 1e3
    print(f"{steps} steps, {span_us:.1f} us each, a kernel running in {busy_us:.1f} us of them")
    for row in rows:
        row["alone_us"] = busy_us - busy_ns([kernel for kernel in found if kernel.scope != row["name"]]) / steps / 1e3
    print(f"{'scope':<12}{'us/step':>10}{'alone':>10}{'kernels':>10}{'us each':>10}")
    for row in rows:
        each = f"{row['count']:>10.1f}{row['us'] / row['count']:>10.2f}"
        print(f"{row['name']:<12}{row['us']:>10.1f}{row['alone_us']:>10.1f}{each}")
    for row in totals(((f"{kernel.scope} {kernel.name}", kernel) for kernel in found), steps)[:longest]:
        print(f"  {row['us']:>8.1f} us {row['count']:>6.1f} x {row['us'] / row['count']:>7.2f}  {row['name'][:100]}")
    print(json.dumps({"steps": steps, "span_us": span_us, "busy_us": busy_us, "scopes": rows}))


def busy_ns(found: Sequence[Kernel]) -> float:
    """How long one kernel or several together were running."""
    busy, last = 0.0, 0.0
    for kernel in sorted(found, key=lambda kernel: kernel.start_ns):
        end = kernel.start_ns + kernel.duration_ns
        busy += max(0.0, end - max(kernel.start_ns, last))
        last = max(last, end)
    return busy


def totals(named: Iterable[tuple[str, Kernel]], steps: int) -> list[dict[str, Any]]:
    """Microseconds and executions a step by name, the longest first."""
    times: dict[str, float] = collections.defaultdict(float)
    counts: collections.Counter[str] = collections.Counter()
    for name, kernel in named:
        times[name] += kernel.duration_ns
        counts[name] += 1
    order = sorted(times, key=lambda name: -times[name])
    return [{"name": name, "us": times[name] / steps / 1e3, "count": counts[name] / steps} for name in order]


if __name__ == "__main__":
    sys.exit(main())
