"""Times the kernels on the device beside their bounds measured in the same run: python -m tools.bench_kernels.

expert_mlp is bound by reading the weights of the groups asked for: the bound is their bytes at the bandwidth of a pass
over a gigabyte of device memory (read and written), and for a prefill also by arithmetic: a plain matrix product of as
much of it, if that takes longer. decode_attention likewise by the keys and values
that it sees. fetch is bound by the link: plain copies from pinned host memory. All weights are random, and each call
reads other slots, or another KV cache, than the one before, so that no cache of the GPU can serve them. A time is
that of one call among many in one program, each needing the result of the one before, less the loop around them.
"""

import argparse
import dataclasses
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jmoe import memory
from kernels_pallas import backends
from kernels_pallas.decode_attention import specs as decode_attention_specs
from kernels_pallas.expert_mlp import specs as expert_mlp_specs
from kernels_pallas.fetch import api as fetch_api
from kernels_pallas.fetch import specs as fetch_specs
from tools import bench_attention, bench_expert_mlp

CALLS = 16  # in the body of the timed loop: its own overhead is shared by as many
DEFAULTS = {
    "expert_mlp": [
        "qwen3_30b_decode",
        "two_rows",
        "batch_of_4",
        "batch_of_8",
        "batch_of_32",
        "qwen3_235b_decode",
        "prefill_512",
        "prefill_8192",
    ],
    "decode_attention": ["qwen3_30b", "b8", "b32", "long"],
    "fetch": ["qwen3_30b", "single", "full"],
}
SPECS = {
    "expert_mlp": {spec.name: spec for spec in expert_mlp_specs.SPECS},
    "decode_attention": {spec.name: spec for spec in decode_attention_specs.SPECS},
    "fetch": {spec.name: spec for spec in fetch_specs.SPECS},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One implementation on one spec: microseconds a call, beside the bound, and the error (of the largest value)."""

    op: str
    spec: str
    implementation: str
    us: float
    bound_us: float
    gbps: float
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
    ) -> "Row":
        """Of a call that has to move `num_bytes`, and takes `least_us` for another reason."""
        bound_us, gbps = max(least_us, num_bytes / bound_gbps / 1e3), num_bytes / us / 1e3
        return cls(op=op, spec=spec, implementation=implementation, us=us, bound_us=bound_us, gbps=gbps, error=error)

    @property
    def percent(self) -> float:
        return 100 * self.bound_us / self.us


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0, or 2 after one line on stderr that says what is wrong."""
    options = _parse(arguments)
    try:
        rows = _run(options)
    except (ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    device = jax.devices()[0].device_kind
    described = [{**dataclasses.asdict(row), "percent": row.percent} for row in rows]
    print(json.dumps({"device": device, "jax": jax.__version__, "rows": described}))
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", nargs="+", choices=tuple(SPECS), default=list(SPECS))
    parser.add_argument("--specs", nargs="+", help="names in kernels_pallas/*/specs.py (default: a few of each op)")
    parser.add_argument("--scale", type=int, default=1, help="experts this many times as narrow, for a CPU")
    parser.add_argument("--iterations", type=int, default=20, help=f"of {CALLS} calls each")
    parser.add_argument("--repeats", type=int, default=5, help="the median is printed")
    return parser.parse_args(arguments)


def _run(options: argparse.Namespace) -> list[Row]:
    chosen = {op: _chosen(op, options) for op in options.ops}
    if not any(chosen.values()):
        known = ", ".join(name for op in options.ops for name in SPECS[op])
        raise ValueError(
            f"no spec of {' or '.join(options.ops)} is named {' or '.join(options.specs)}; there are {known}"
        )
    print(f"device {jax.devices()[0].device_kind}, jax {jax.__version__}", flush=True)
    rows: list[Row] = []
    for op, bandwidth, bench in (
        ("expert_mlp", memory_gbps, _bench_expert_mlp),
        ("decode_attention", memory_gbps, _bench_decode_attention),
        ("fetch", _link_gbps, _bench_fetch),
    ):
        if chosen.get(op):
            gbps = bandwidth()
            print(f"{op}: bound by {gbps:.1f} GB/s\n{_line(None)}", flush=True)
            for spec in chosen[op]:
                for row in bench(spec, gbps, options):
                    print(_line(row), flush=True)
                    rows.append(row)
    return rows


def _chosen(op: str, options: argparse.Namespace) -> list:
    names = DEFAULTS[op] if options.specs is None else [name for name in options.specs if name in SPECS[op]]
    specs = [SPECS[op][name] for name in names]
    return [spec.scaled(options.scale) for spec in specs] if options.scale > 1 else specs


def _line(row: Row | None) -> str:
    """The heading for None."""
    if row is None:
        names = f"{'spec':<26}{'implementation':<17}{'us':>10}{'bound us':>10}"
        return f"{names}{'% of bound':>12}{'GB/s':>8}{'max error':>11}"
    return (
        f"{row.spec:<26}{row.implementation:<17}{row.us:>10.2f}{row.bound_us:>10.2f}{row.percent:>12.1f}"
        f"{row.gbps:>8.0f}{row.error:>11.1e}"
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


def _link_gbps() -> float:
    return memory.measure_link_gbps()


def _seconds(run: Callable[..., Any], arguments: tuple, repeats: int) -> float:
    """The median of a few runs after one that compiles."""
    jax.block_until_ready(run(*arguments))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run(*arguments))
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _bench_expert_mlp(spec: expert_mlp_specs.ExpertMlpSpec, gbps: float, options: argparse.Namespace):
    num_bytes = bench_expert_mlp.num_bytes(spec)

    def seconds(run: Callable, arguments: tuple) -> float:
        return _seconds(run, arguments, options.repeats)

    for name, us, error, least_us in bench_expert_mlp.measure(spec, options.iterations * CALLS, CALLS, seconds):
        yield Row.of("expert_mlp", spec.name, name, us, num_bytes, gbps, error, least_us)


def _bench_decode_attention(spec: decode_attention_specs.DecodeAttentionSpec, gbps: float, options: argparse.Namespace):
    num_bytes = bench_attention.num_bytes(spec)

    def seconds(run: Callable, arguments: tuple) -> float:
        return _seconds(run, arguments, options.repeats)

    for name, us, error in bench_attention.measure(spec, options.iterations * CALLS, 4 * CALLS, seconds):
        yield Row.of("decode_attention", spec.name, name, us, num_bytes, gbps, error)


def _bench_fetch(spec: fetch_specs.FetchSpec, gbps: float, options: argparse.Namespace):
    unsigned = np.uint16 if jnp.dtype(spec.dtype).itemsize == 2 else np.uint32
    bits = np.random.default_rng(0).integers(0, np.iinfo(unsigned).max, spec.store_shape, unsigned)
    store = jax.device_put(bits.view(spec.dtype), memory.host_sharding())
    plans = [spec.plan(seed) for seed in range(CALLS)]
    for name in fetch_api.IMPLEMENTATIONS if backends.mosaic_gpu_problem() is None else ("reference",):
        run = _fetches(name, plans)
        slots = jax.block_until_ready(run(store, jnp.zeros(spec.slots_shape, spec.dtype)))
        times = []
        for _ in range(options.repeats):
            start = time.perf_counter()
            slots = jax.block_until_ready(run(store, slots))
            times.append(time.perf_counter() - start)
        _require_fetched(np.asarray(slots).view(unsigned), bits, plans[-1])
        us = 1e6 * statistics.median(times) / CALLS
        yield Row.of("fetch", spec.name, name, us, spec.fetched_bytes, gbps, 0.0)


def _fetches(implementation: str, plans: list) -> Callable:
    """A program of one fetch a plan, each into the slots that the one before has written."""
    fetch = jax.jit(functools.partial(fetch_api.fetch, implementation=implementation))

    @functools.partial(jax.jit, donate_argnums=1)
    def run(store, slots):
        for plan in plans:
            slots = fetch(store, slots, *map(jnp.asarray, plan))
        return slots

    return run


def _require_fetched(slots: np.ndarray, store: np.ndarray, plan: tuple) -> None:
    """Raises RuntimeError unless the slots of the plan hold the very experts that it names."""
    expert_ids, slot_ids, count = plan
    for expert, slot in zip(expert_ids[:count], slot_ids[:count], strict=True):
        if not np.array_equal(slots[slot], store[expert]):
            raise RuntimeError(
                f"fetch: slot {slot} does not hold the bits of expert {expert}: the kernel is wrong here"
            )


if __name__ == "__main__":
    sys.exit(main())
