"""Records which experts the tokens of a workload go to: python -m tools.record_trace [--model M] DESTINATION.npz

Prompts are the beginnings of texts, sampled from until the model ends or --new-tokens are there. Lengths are all the
same, or drawn lognormally around that median (--prompt-sigma, --new-sigma). The file is a `jmoe.traces.Trace`; how many
slots there are does not change it.
"""

import argparse
import dataclasses
import functools
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from jmoe import memory, sources
from jmoe.config import RuntimeConfig
from jmoe.decoding.sampling import SamplingParams
from jmoe.engine import Engine
from jmoe.loading import load
from jmoe.stats import ExpertCounts
from jmoe.tokenizer import load_tokenizer
from jmoe.traces import Trace
from tools.bench_decode import PROMPTS
from tools.command import exit_code
from tools.workload import Lengths, Request, make_workload, read_prompts

WIDEST = 8  # drawn lengths are clipped to this factor above and below the median


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0, or 2 after one line on stderr that says what is wrong."""
    options = _parser().parse_args(arguments)
    return exit_code(lambda options: print(_run(options)), options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("destination", type=Path, help="file to write; replaced if it is there")
    parser.add_argument("--model", help="as python -m jmoe.generate takes it; default: the demo model")
    parser.add_argument("--prompts", type=Path, default=PROMPTS, help=f"JSON lines; default: {PROMPTS.name} of configs")
    parser.add_argument("--num-requests", type=int, default=40)
    parser.add_argument("--prompt-tokens", type=int, default=128, help="the median, if --prompt-sigma is not 0")
    parser.add_argument("--prompt-sigma", type=float, default=0.0, help="how far the lengths of prompts spread")
    parser.add_argument("--new-tokens", type=int, default=128, help="the median, if --new-sigma is not 0")
    parser.add_argument("--new-sigma", type=float, default=0.0, help="how far the numbers of new tokens spread")
    parser.add_argument("--ignore-eos", action="store_true", help="go on to the last of --new-tokens in any case")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--temperature", type=float, default=0.6, help="0: greedy")
    parser.add_argument("--seed", type=int, default=0, help="of the workload and of sampling")
    parser.add_argument("--expert-slots", type=int, help="of each layer; default: what fits")
    return parser


def _run(options: argparse.Namespace) -> str:
    """Records and saves; a line for people."""
    if not options.destination.absolute().parent.is_dir():
        raise ValueError(f"{options.destination}: no directory {options.destination.parent}; make it first")
    say = functools.partial(tqdm.write, file=sys.stderr)
    path = sources.resolve(options.model, announce=say, prepare=memory.configure_backend)
    prompt_tokens = _lengths(options.prompt_tokens, options.prompt_sigma)
    requests = make_workload(
        read_prompts(options.prompts),
        load_tokenizer(path),
        num_requests=options.num_requests,
        prompt_tokens=prompt_tokens,
        new_tokens=_lengths(options.new_tokens, options.new_sigma),
        seed=options.seed,
    )
    engine = load(path, _runtime(requests, options), announce=say)
    trace, counts = record(engine, requests, options)
    trace = dataclasses.replace(trace, model=options.model or "demo")
    trace.save(options.destination)
    return _summary(trace, counts, engine, options.destination)


def _lengths(median: int, sigma: float) -> Lengths:
    return Lengths(median, sigma, max(1, median // WIDEST), WIDEST * median) if sigma else Lengths.constant(median)


def _runtime(requests: Sequence[Request], options: argparse.Namespace) -> RuntimeConfig:
    return RuntimeConfig(
        expert_slots=options.expert_slots,
        batch_size=options.batch_size,
        max_seq_len=max(len(request.prompt_ids) + request.max_new_tokens for request in requests),
        record_routing=True,
        measure_link=False,
    )


def record(engine: Engine, requests: Sequence[Request], options: argparse.Namespace) -> tuple[Trace, ExpertCounts]:
    """The routing of the requests, a batch after the other, and how many experts decoding hit."""
    traces, counts = [], ExpertCounts(hits=0, fetched=0, streamed=0)
    with tqdm(total=len(requests), desc="requests", leave=False, delay=1) as bar:
        for start in range(0, len(requests), options.batch_size):
            batch = requests[start : start + options.batch_size]
            sampling = [_sampling(number, request, options) for number, request in enumerate(batch, start)]
            generation = engine.generate([request.prompt_ids for request in batch], sampling)
            generation.results()
            traces.append(generation.trace)
            counts = counts + generation.stats.decode
            bar.update(len(batch))
    return Trace.concatenate(traces), counts


def _sampling(number: int, request: Request, options: argparse.Namespace) -> SamplingParams:
    return SamplingParams(
        max_new_tokens=request.max_new_tokens,
        temperature=options.temperature,
        seed=options.seed + number,
        ignore_eos=options.ignore_eos,
    )


def _summary(trace: Trace, counts: ExpertCounts, engine: Engine, file: Path) -> str:
    num_prefill = int(trace.is_prefill.sum())
    slots = f"{engine.plan.layout.slots_per_layer} slots for {engine.config.num_experts} experts"
    return (
        f"{file}: {len(trace.requests)} requests, {len(trace)} tokens ({num_prefill} of prompts, "
        f"{len(trace) - num_prefill} decoded), {file.stat().st_size} bytes; hit rate {counts.hit_rate:.1%} ({slots})"
    )


if __name__ == "__main__":
    sys.exit(main())
