"""Times the kernels on the device beside their bounds measured in the same run: python -m tools.bench_kernels.

expert_mlp is bound by reading the weights of the groups asked for: the bound is their bytes at the bandwidth of a pass
over a gigabyte of device memory (read and written), and for a prefill also by arithmetic: a plain matrix product of
as much of it, if that takes longer; both say their TFLOP/s. chunk_attention likewise, by what its queries see.
decode_attention is bound by reading the keys and values that it sees, norm_linear by its matrix. route and admit read
and write next to nothing: what their time is made of is latency. fetch is bound by the link: plain copies from pinned
host memory. All weights are random, and each call reads other slots, or another KV cache or matrix, than the one
before, so that no cache of the GPU can serve them; only chunk_attention, which needs many reads of the same keys, has
one KV cache. A time is that of one call among many in one program, each needing the result of the one before, less the
loop around them. A spec that fails is named, and the others go on.
"""

import argparse
import dataclasses
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jmoe import memory
from kernels_pallas.admit import specs as admit_specs
from kernels_pallas.chunk_attention import specs as chunk_attention_specs
from kernels_pallas.decode_attention import specs as decode_attention_specs
from kernels_pallas.expert_mlp import specs as expert_mlp_specs
from kernels_pallas.fetch import specs as fetch_specs
from kernels_pallas.norm_linear import specs as norm_linear_specs
from kernels_pallas.route import specs as route_specs
from tools import (
    bench_attention,
    bench_chunk_attention,
    bench_decisions,
    bench_expert_mlp,
    bench_fetch,
    bench_norm_linear,
)
from tools.command import exit_code

CALLS = 16  # in the body of the timed loop: its own overhead is shared by as many
DEFAULTS = {
    "expert_mlp": [
        "qwen3_30b_decode",
        "two_rows",
        "batch_of_4",
        "batch_of_8",
        "batch_of_32",
        "batch_of_32_over_64",
        "qwen3_235b_decode",
        "prefill_512",
        "prefill_4096",
        "prefill_8192",
    ],
    "decode_attention": ["qwen3_30b", "b8", "b32", "long"],
    "chunk_attention": ["qwen3_30b_512", "qwen3_30b_4096", "later_chunk", "first_of_long", "b8_uneven"],
    "norm_linear": ["qwen3_30b_qkv", "summed_qkv", "qwen3_30b_o", "qwen3_30b_router", "four_rows_qkv"],
    "route": ["qwen3_30b", "b32", "deepseek_v2_lite"],
    "admit": ["qwen3_30b", "all_resident", "b8"],
    "fetch": ["empty", "single", "two", "qwen3_30b", "full", "plan_of_64"],
}
UNSCALED = ("route", "admit")  # have no experts that could be narrow
SPECS = {
    "expert_mlp": {spec.name: spec for spec in expert_mlp_specs.SPECS},
    "decode_attention": {spec.name: spec for spec in decode_attention_specs.SPECS},
    "chunk_attention": {spec.name: spec for spec in chunk_attention_specs.SPECS},
    "norm_linear": {spec.name: spec for spec in norm_linear_specs.SPECS},
    "route": {spec.name: spec for spec in route_specs.SPECS},
    "admit": {spec.name: spec for spec in admit_specs.SPECS},
    "fetch": {spec.name: spec for spec in fetch_specs.SPECS},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One implementation on one spec: microseconds a call, beside the bound, and the error (of the largest value).

    `tflops` is the arithmetic that is asked for, in 10¹² operations a second; 0 where that is not the point.
    """

    op: str
    spec: str
    implementation: str
    us: float
    bound_us: float
    gbps: float
    tflops: float
    error: float

    @classmethod
    def of(
        cls,
        op: str,
        spec: str,
        implementation: str,
        us: float,
        num_bytes: int,
        bound_gbps: float,
        error: float,
        least_us: float = 0.0,
        num_operations: int = 0,
    ) -> "Row":
        """Of a call that has to move `num_bytes`, and takes `least_us` for another reason."""
        bound_us, gbps = max(least_us, num_bytes / bound_gbps / 1e3), num_bytes / us / 1e3
        rates = {"bound_us": bound_us, "gbps": gbps, "tflops": num_operations / us / 1e6}
        return cls(op=op, spec=spec, implementation=implementation, us=us, error=error, **rates)

    @property
    def percent(self) -> float:
        return 100 * self.bound_us / self.us


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0, or 2 after one line on stderr that says what is wrong."""
    return exit_code(_run, _parse(arguments))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", nargs="+", choices=tuple(SPECS), default=list(SPECS))
    parser.add_argument("--specs", nargs="+", help="names in kernels_pallas/*/specs.py (default: a few of each op)")
    parser.add_argument("--scale", type=int, default=1, help="experts this many times as narrow, for a CPU")
    parser.add_argument("--iterations", type=int, default=20, help=f"of {CALLS} calls each")
    parser.add_argument("--repeats", type=int, default=5, help="the median is printed")
    return parser.parse_args(arguments)


def _run(options: argparse.Namespace) -> None:
    """Raises ValueError for names of no spec, and in the end RuntimeError if some spec failed."""
    chosen = chosen_specs(options.ops, options.specs, DEFAULTS)
    device = jax.devices()[0].device_kind
    print(f"device {device}, jax {jax.__version__}", flush=True)
    rows: list[Row] = []
    failed: list[str] = []
    for op, bandwidth, bench in (
        ("expert_mlp", memory_gbps, _bench_expert_mlp),
        ("decode_attention", memory_gbps, _bench_decode_attention),
        ("chunk_attention", memory_gbps, _bench_chunk_attention),
        ("norm_linear", memory_gbps, _bench_norm_linear),
        ("route", memory_gbps, functools.partial(_bench_decision, "route")),
        ("admit", memory_gbps, functools.partial(_bench_decision, "admit")),
        ("fetch", link_gbps, _bench_fetch),
    ):
        if chosen.get(op):
            gbps = bandwidth()
            print(f"{op}: bound by {gbps:.1f} GB/s\n{_line(None)}", flush=True)
            for spec in chosen[op]:
                spec = spec.scaled(options.scale) if options.scale > 1 and op not in UNSCALED else spec
                try:
                    for row in bench(spec, gbps, options):
                        print(_line(row), flush=True)
                        rows.append(row)
                except Exception as error:  # whatever a compiler may raise: the other specs go on
                    failed.append(spec.name)
                    print(f"{spec.name}: failed: {error}", file=sys.stderr, flush=True)
    described = [{**dataclasses.asdict(row), "percent": row.percent} for row in rows]
    print(json.dumps({"device": device, "jax": jax.__version__, "rows": described}))
    if failed:
        raise RuntimeError(f"of {len(failed)} specs not everything could be timed: {', '.join(failed)}; see above")


def chosen_specs(ops: Sequence[str], names: Sequence[str] | None, defaults: dict[str, list[str]]) -> dict[str, list]:
    """Of each operation the specs of these names, or its defaults for None. Raises ValueError for other names."""
    known = [name for op in ops for name in SPECS[op]]
    if unknown := [name for name in names or () if name not in known]:
        raise ValueError(f"no spec of {' or '.join(ops)} is named {' or '.join(unknown)}; there are {', '.join(known)}")
    wanted = {op: defaults[op] if names is None else names for op in ops}
    return {op: [SPECS[op][name] for name in wanted[op] if name in SPECS[op]] for op in ops}


def _line(row: Row | None) -> str:
    """The heading for None."""
    if row is None:
        names = f"{'spec':<26}{'implementation':<17}{'us':>10}{'bound us':>10}"
        return f"{names}{'% of bound':>12}{'GB/s':>8}{'TFLOP/s':>9}{'max error':>11}"
    return (
        f"{row.spec:<26}{row.implementation:<17}{row.us:>10.2f}{row.bound_us:>10.2f}{row.percent:>12.1f}"
        f"{row.gbps:>8.0f}{row.tflops:>9.1f}{row.error:>11.1e}"
    )


def memory_gbps() -> float:
    """Bytes read and written in a second by a pass over device memory, in GB."""
    num_bytes = 2**30 if jax.default_backend() == "gpu" else 2**24
    words = jnp.arange(num_bytes // 4, dtype=jnp.uint32)

    @functools.partial(jax.jit, donate_argnums=0)
    def passes(words):
        return jax.lax.fori_loop(0, 10, lambda n, words: words ^ (n.astype(jnp.uint32) + jnp.uint32(1)), words)

    words = jax.block_until_ready(passes(words))
    times = []
    for _ in range(5):
        start = time.perf_counter()
        words = jax.block_until_ready(passes(words))
        times.append(time.perf_counter() - start)
    return 10 * 2 * num_bytes / statistics.median(times) / 1e9


def link_gbps() -> float:
    return memory.measure_link_gbps()


def median_seconds(run: Callable[..., Any], arguments: tuple, repeats: int) -> float:
    """The median of a few runs after one that compiles."""
    jax.block_until_ready(run(*arguments))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run(*arguments))
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _bench_expert_mlp(spec: expert_mlp_specs.ExpertMlpSpec, gbps: float, options: argparse.Namespace) -> Iterator[Row]:
    work = bench_expert_mlp.num_bytes(spec), bench_expert_mlp.num_operations(spec)
    calls = options.iterations * CALLS, CALLS
    for name, us, error, least_us in bench_expert_mlp.measure(spec, *calls, _seconds(options)):
        yield Row.of("expert_mlp", spec.name, name, us, work[0], gbps, error, least_us, work[1])


def _bench_decode_attention(
    spec: decode_attention_specs.DecodeAttentionSpec, gbps: float, options: argparse.Namespace
) -> Iterator[Row]:
    num_bytes, calls = bench_attention.num_bytes(spec), options.iterations * CALLS
    for name, us, error in bench_attention.measure(spec, calls, 4 * CALLS, _seconds(options)):
        yield Row.of("decode_attention", spec.name, name, us, num_bytes, gbps, error)


def _bench_chunk_attention(
    spec: chunk_attention_specs.ChunkAttentionSpec, gbps: float, options: argparse.Namespace
) -> Iterator[Row]:
    work = bench_chunk_attention.num_bytes(spec), bench_chunk_attention.num_operations(spec)
    for name, us, error, least_us in bench_chunk_attention.measure(spec, options.iterations * CALLS, _seconds(options)):
        yield Row.of("chunk_attention", spec.name, name, us, work[0], gbps, error, least_us, work[1])


def _bench_norm_linear(
    spec: norm_linear_specs.NormLinearSpec, gbps: float, options: argparse.Namespace
) -> Iterator[Row]:
    for name, us, error in bench_norm_linear.measure(spec, options.iterations * CALLS, _seconds(options)):
        yield Row.of("norm_linear", spec.name, name, us, spec.kernel_bytes, gbps, error)


def _bench_decision(
    op: str, spec: route_specs.RouteSpec | admit_specs.AdmitSpec, gbps: float, options: argparse.Namespace
) -> Iterator[Row]:
    calls = options.iterations * CALLS, CALLS
    for name, us, error, num_bytes in bench_decisions.measure(spec, *calls, _seconds(options)):
        yield Row.of(op, spec.name, name, us, num_bytes, gbps, error)


def _bench_fetch(spec: fetch_specs.FetchSpec, gbps: float, options: argparse.Namespace) -> Iterator[Row]:
    for name, us, error in bench_fetch.measure(spec, options.iterations, CALLS, _seconds(options)):
        yield Row.of("fetch", spec.name, name, us, spec.fetched_bytes, gbps, error)


def _seconds(options: argparse.Namespace) -> Callable[[Callable, tuple], float]:
    return lambda run, arguments: median_seconds(run, arguments, options.repeats)


if __name__ == "__main__":
    sys.exit(main())
