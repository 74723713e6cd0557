"""One MoE layer of which some experts are missing, in microseconds: python -m tools.bench_moe_layer

Of a layer of Qwen3-30B-A3B's shapes, one token that asks for eight experts: the fetch of those that are missing alone,
the arithmetic of all of them alone, one after the other, and both in one pass (kernels_pallas/expert_mlp/read_through).
The last should take no longer than the longer of the first two. Then the one pass again where nothing, half or all of
the first missing expert has come before, and beside it what the link's ceiling in this run, by plain copies, allows for
all that is missing. Weights are random, and every call has other experts and other slots than the one before.

At the end, whether a prefetch costs time: dense products as before a router's choice, the prefetch of half an expert,
and both, of which the second does not wait for the first.
"""

import argparse
import dataclasses
import functools
import importlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np

from jmoe import memory
from kernels_pallas.admit.result import Admitted
from kernels_pallas.expert_mlp import read_through
from kernels_pallas.expert_mlp.api import expert_mlp
from kernels_pallas.fetch import api as fetch_api
from kernels_pallas.prefetch.api import COMPILER_OPTIONS, prefetch
from kernels_pallas.prefetch.arrivals import Arrivals
from tools.bench_expert_mlp import random_slots
from tools.command import exit_code

CALLS = 16  # in the body of a loop, each with a plan of its own
ROUNDS = 8  # of the loop: what starting the program costs is shared by as many
NUM_GROUPS = 8
NUM_PRODUCTS = 16  # of the dense work: about 60 µs on an H200
WIDTH = 13  # of a column
SHARES = {"none_came": 0.0, "half_came": 0.5, "one_came": 1.0}  # of the first missing expert


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0, or 2 after one line on stderr that says what is wrong."""
    return exit_code(_run, _parser().parse_args(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-hidden", type=int, default=768, help="F of an expert")
    parser.add_argument("--width", type=int, default=2048, help="D of an expert")
    parser.add_argument("--num-experts", type=int, default=64, help="in host memory; half as many slots")
    parser.add_argument("--misses", type=int, nargs="+", default=list(range(NUM_GROUPS + 1)), metavar="0…8")
    parser.add_argument("--fetch-configs", nargs="+", default=[], metavar="BLOCKSxSTAGESxKIB", type=_config)
    parser.add_argument("--prefetch-configs", nargs="+", default=[], metavar="BLOCKSxSTAGESxKIB", type=_config)
    parser.add_argument("--repeats", type=int, default=5, help="the median is printed")
    parser.add_argument(
        "--trace", type=Path, metavar="DIR", help="a profiler trace of each part once, with the last of --misses"
    )
    return parser


def _config(text: str) -> tuple[int, int, int]:
    blocks, stages, kib = map(int, text.split("x"))
    return blocks, stages, kib


def _run(options: argparse.Namespace) -> None:
    """Raises ValueError for misses that are no count of the groups."""
    if not all(0 <= misses <= NUM_GROUPS for misses in options.misses):
        raise ValueError(f"--misses {options.misses} must be 0 to {NUM_GROUPS}, the experts that a token asks for")
    shape = (options.num_experts, 3, options.num_hidden, options.width)
    x, slots = (jax.ShapeDtypeStruct(size, "bfloat16") for size in ((1, options.width), shape))
    if not read_through.can(None, x, slots):
        raise RuntimeError(f"no kernel fetches and multiplies experts {shape[1:]} on this {jax.default_backend()}")
    store = _pinned(shape)
    ceiling = memory.measure_link_gbps()
    print(f"device {jax.devices()[0].device_kind}, jax {jax.__version__}, link ceiling {ceiling:.1f} GB/s", flush=True)
    parts, rows = {part.__name__: _timed(part, store, options) for part in PARTS}, []
    after = _timed(one_pass_after, store, options)
    print("misses " + "".join(f"{name.replace('_', ' '):>{WIDTH}}" for name in (*parts, *SHARES, "link", "%")))
    for misses in options.misses:
        plans = _plans(misses, options)
        row = {name: microseconds(plans) for name, microseconds in parts.items()}
        row |= {name: after(_with_arrivals(plans, store, share)) for name, share in SHARES.items()}
        row["link"] = misses * store.nbytes / options.num_experts / ceiling / 1e3
        row["percent_of_longer"] = 100 * row["one_pass"] / max(row["fetch"], row["arithmetic"])
        rows.append({"misses": misses, **row})
        print(f"{misses:<7}" + "".join(f"{value:>{WIDTH}.1f}" for value in row.values()), flush=True)
    if options.trace:
        _trace(store, options)
    beside = _beside(store, options, prefetch)
    print(_line("prefetch beside products", beside), flush=True)
    for config in options.prefetch_configs:
        bring = functools.partial(_kernel("prefetch").prefetch, config=_chosen(config))
        print(_line(f"prefetch, {_words(config)}", _beside(store, options, bring)), flush=True)
    for config in options.fetch_configs:
        print(_rate_of_config(store, config, options, ceiling), flush=True)
    print(json.dumps({"link_ceiling_gbps": ceiling, "rows": rows, "beside": beside}))


def _pinned(shape: tuple[int, ...]) -> jax.Array:
    """Random experts in host memory, an eighth at a time."""
    key, part = jax.random.key(0), -(-shape[0] // 8)
    parts = [
        np.asarray(random_slots(jax.random.fold_in(key, n), (part, *shape[1:]), "bfloat16"))
        for n in range(-(-shape[0] // part))
    ]
    return jax.device_put(np.concatenate(parts)[: shape[0]], memory.host_sharding())


def _plans(misses: int, options: argparse.Namespace) -> list[Admitted]:
    """One for each call, of distinct experts and slots; the residency is of no matter here."""
    plans, none = [], np.zeros(0, np.int32)
    for seed in range(CALLS):
        rng = np.random.default_rng(seed)
        experts = np.sort(rng.permutation(options.num_experts)[:NUM_GROUPS]).astype(np.int32)
        slots = rng.permutation(options.num_experts // 2)[:NUM_GROUPS].astype(np.int32)
        comes = np.zeros(NUM_GROUPS, np.int32)
        comes[rng.permutation(NUM_GROUPS)[:misses]] = 1
        first = np.argsort(-comes, kind="stable")  # the plan's entries come first
        plan = {
            "group_experts": experts,
            "group_slots": slots,
            "group_weights": rng.uniform(0.05, 0.2, (NUM_GROUPS, 1)).astype(np.float32),
            "group_fetched": comes,
            "slot_of": none,
            "owner": none,
            "plan_experts": experts[first],
            "plan_slots": slots[first],
            "count": np.int32(misses),
            "num_used": np.int32(NUM_GROUPS),
            "num_hits": np.int32(NUM_GROUPS - misses),
        }
        plans.append(Admitted(**{name: jnp.asarray(value) for name, value in plan.items()}))
    return plans


def fetch(x, store, slots, plan: Admitted):
    return x, fetch_api.fetch(store, slots, plan.plan_experts, plan.plan_slots, plan.count)


def arithmetic(x, store, slots, plan: Admitted):
    return expert_mlp(x, slots, plan.group_slots, plan.group_weights).astype(x.dtype), slots


def two_steps(x, store, slots, plan: Admitted):
    x, slots = fetch(x, store, slots, plan)
    return arithmetic(x, store, slots, plan)


def one_pass(x, store, slots, plan: Admitted):
    y, slots = read_through.expert_mlp(x, store, slots, plan)
    return y.astype(x.dtype), slots


def one_pass_after(x, store, slots, plan: tuple[Admitted, Arrivals]):
    y, slots = read_through.expert_mlp(x, store, slots, *plan)
    return y.astype(x.dtype), slots


PARTS = (fetch, arithmetic, two_steps, one_pass)


def _with_arrivals(plans: list[Admitted], store: jax.Array, share: float) -> list[tuple[Admitted, Arrivals]]:
    """Beside each plan the expert of its first entry, of which a share has come."""
    come = [jax.jit(prefetch)(store, plan.plan_experts[:1], jnp.asarray([3 * store.shape[2]])) for plan in plans]
    rows = jnp.asarray([round(share * 3 * store.shape[2])], jnp.int32)
    return [(plan, dataclasses.replace(expert, num_rows=rows)) for plan, expert in zip(plans, come, strict=True)]


def _beside(store: jax.Array, options: argparse.Namespace, prefetch: Callable) -> dict[str, float]:
    """Microseconds of dense products, of a prefetch of half an expert, and of both."""
    keys = jax.random.split(jax.random.key(2), NUM_PRODUCTS)
    dense = [random_slots(key, (options.width, options.width), store.dtype.name) for key in keys]

    def part(x, store, slots, plan: Admitted, *, multiplies: bool, prefetches: bool):
        y, late = x, jnp.zeros_like(x)
        if prefetches:
            known_now = (x[0, :1] > jnp.inf).astype(jnp.int32)  # as a guess, which no call can make before it has x
            come = prefetch(store, plan.plan_experts[:1] + known_now, jnp.asarray([3 * store.shape[2] // 2]))
            late = come.weights[0, 0, :1] * jnp.asarray(1e-30, x.dtype)
        for weights in dense if multiplies else ():
            y = jnp.tanh(y @ weights)
        return y + late, slots

    kinds = {"dense_products": (True, False), "prefetch": (False, True), "both": (True, True)}
    plans, times = _plans(1, options), {}
    for name, (multiplies, prefetches) in kinds.items():
        chosen = functools.partial(part, multiplies=multiplies, prefetches=prefetches)
        times[name] = _timed(chosen, store, options, COMPILER_OPTIONS)(plans)
    return times


def _timed(part: Callable, store: jax.Array, options: argparse.Namespace, compiler_options=None) -> Callable:
    """Microseconds of one call, by plans of calls, each of which goes on with what the one before it made."""

    @functools.partial(jax.jit, donate_argnums=2, compiler_options=compiler_options)
    def run(x, store, slots, plans):
        def calls(_, state):
            x, slots = state
            for plan in plans:
                y, slots = part(x, store, slots, plan)
                x = x + y * jnp.asarray(1e-3, x.dtype)
            return x, slots

        return jax.lax.fori_loop(0, ROUNDS, calls, (x, slots))

    def microseconds(plans: list) -> float:
        x, slots = _inputs(store, options)
        x, slots = jax.block_until_ready(run(x, store, slots, plans))
        times = []
        for _ in range(options.repeats):
            start = time.perf_counter()
            x, slots = jax.block_until_ready(run(x, store, slots, plans))
            times.append(time.perf_counter() - start)
        return 1e6 * statistics.median(times) / (CALLS * ROUNDS)

    return microseconds


def _inputs(store: jax.Array, options: argparse.Namespace) -> tuple[jax.Array, jax.Array]:
    """A row, and random experts in half as many slots as the store has experts."""
    shape = (options.num_experts // 2, *store.shape[1:])
    return jnp.ones((1, options.width), store.dtype), random_slots(jax.random.key(1), shape, store.dtype.name)


def _trace(store: jax.Array, options: argparse.Namespace) -> None:
    """Each part under the profiler, in the order of the columns; before, it is compiled for what it is given."""
    parts, plan = [jax.jit(part, donate_argnums=2) for part in PARTS], _plans(options.misses[-1], options)[0]
    x, slots = _inputs(store, options)
    for part in (*parts, *parts):  # the first of them got slots that no part has made
        _, slots = jax.block_until_ready(part(x, store, slots, plan))
    with jax.profiler.trace(str(options.trace)):
        for part in parts:
            _, slots = jax.block_until_ready(part(x, store, slots, plan))
    print(f"profiler trace of {options.misses[-1]} misses written to {options.trace}", flush=True)


def _rate_of_config(store: jax.Array, config: tuple[int, int, int], options: argparse.Namespace, ceiling: float) -> str:
    """GB/s of the fetch kernel with so many blocks, stages and KiB a tile, for plans of one to eight."""

    def fetch(x, store, slots, plan: Admitted):
        entries = plan.plan_experts, plan.plan_slots, plan.count
        return x, _kernel("fetch").fetch(store, slots, *entries, config=_chosen(config))

    microseconds, found = _timed(fetch, store, options), []
    for misses in (1, 2, 4, 8):
        gbps = misses * store.nbytes / options.num_experts / microseconds(_plans(misses, options)) / 1e3
        found.append(f"{misses}: {gbps:.1f} GB/s ({100 * gbps / ceiling:.0f} %)")
    return f"fetch, {_words(config)}: {', '.join(found)}"


def _kernel(operation: str) -> ModuleType:
    """The operation's kernel; importing Mosaic takes seconds."""
    return importlib.import_module(f"kernels_pallas.{operation}.mosaic_gpu")


def _chosen(config: tuple[int, int, int]):
    from kernels_pallas.tile_ring import Config

    blocks, stages, kib = config
    return Config(num_blocks=blocks, num_stages=stages, tile_bytes=kib * 1024)


def _words(config: tuple[int, int, int]) -> str:
    blocks, stages, kib = config
    return f"{blocks} blocks x {stages} stages x {kib} KiB"


def _line(what: str, times: dict[str, float]) -> str:
    return f"{what}, us: " + ", ".join(f"{name.replace('_', ' ')} {us:.1f}" for name, us in times.items())


if __name__ == "__main__":
    sys.exit(main())
