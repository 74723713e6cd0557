"""How many experts a residency policy would have found in their slots: replays traces, without the model.

    python -m tools.simulate_residency trace.npz --plot docs/residency.png

Plays the decoded tokens of recorded requests (tools.record_trace) at each batch size against each policy, for each
share of experts with a slot. All experts that a step needs of a layer are one event, and the code that decides is the
engine's own. The first --teach of the requests are only what policies learn from; the others are measured, with slots
that start afresh. A row for each policy; those that learn also have one for what they do `untaught`.

The last row is the optimum, for which no policy that cannot see the future can be blamed (Belady, by layer): a step
keeps what will be needed soonest, of what it has and what it needs. A step that needs more than the slots keeps as many
of those as it likes.

"of the gap" is the way from LRU to the optimum that a policy makes.
"""

import argparse
import dataclasses
import functools
import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from jmoe.experts.experience import carry_over
from jmoe.experts.policies import POLICIES
from jmoe.experts.residency import NONE, Counters, LayerResidency, Residency, admit, init_residency
from jmoe.traces import Trace
from tools.command import exit_code

OPTIMUM, UNTAUGHT = "optimum", "untaught"


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0, or 2 after one line on stderr that says what is wrong."""
    options = _parse(arguments)
    return exit_code(_run, options)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", type=Path, nargs="+", metavar="TRACE", help="files that tools.record_trace wrote")
    parser.add_argument("--policies", nargs="+", choices=list(POLICIES), default=list(POLICIES), metavar="NAME")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32], metavar="N")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.125, 0.25, 0.5], metavar="X")
    parser.add_argument("--teach", type=float, default=0.5, metavar="X", help="share of the requests; default: 0.5")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write a plot there (PNG)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    options = parser.parse_args(arguments)
    if not 0 <= options.teach < 1:
        parser.error(f"--teach {options.teach} is outside 0..1; at least one request has to be measured")
    if not all(0 < share <= 1 for share in options.shares):
        parser.error(f"--shares {options.shares}: each has to be above 0 and at most 1")
    return options


def _run(options: argparse.Namespace) -> None:
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        raise RuntimeError("--plot needs matplotlib, which is not installed; uv sync --extra plots, or leave it out")
    trace = Trace.concatenate([Trace.read(path) for path in options.traces])
    taught, measured = split(trace, options.teach)
    num_measured = len(measured.requests)
    print(f"{num_measured} requests are measured, {len(trace.requests) - num_measured} teach", file=sys.stderr)
    rows = []
    for batch_size in options.batch_sizes:
        lessons, exam = (steps_of(part.rebatched(batch_size)) for part in (taught, measured))
        for share in tqdm(options.shares, desc=f"batch {batch_size}", leave=False, delay=1):
            slots = max(trace.expert_ids.shape[2], round(share * trace.num_experts))
            max_needed = min(batch_size * trace.expert_ids.shape[2], trace.num_experts)
            rates = hit_rates(options.policies, lessons, exam, slots, max_needed)
            rows += [{"batch_size": batch_size, "slots": slots, "policy": name, **rate} for name, rate in rates.items()]
    print(*table(rows, trace.num_experts), sep="\n")
    if options.json:
        report = {"traces": [str(path) for path in options.traces], "num_experts": trace.num_experts, "rows": rows}
        options.json.write_text(json.dumps(report) + "\n", encoding="utf-8")
        print(f"{options.json}: written")
    if options.plot:
        from tools import routing_plots  # imports matplotlib, an extra

        drawn = [row for row in rows if not row["policy"].endswith(UNTAUGHT)]
        figure = routing_plots.hit_rate_by_share(drawn, trace.num_experts)
        print(f"{routing_plots.save(figure, options.plot)}: written")


# Traces as steps.


def split(trace: Trace, teach: float) -> tuple[Trace, Trace]:
    """(what teaches, what is measured): every request is one or the other, and both are spread over the trace."""
    requests = trace.requests
    if len(requests) < 1:
        raise ValueError("the traces have no requests; record some")
    at = np.arange(len(requests))
    teaches = np.floor((at + 1) * teach) > np.floor(at * teach)
    return trace.only(requests[teaches].tolist()), trace.only(requests[~teaches].tolist())


Steps = tuple[np.ndarray, np.ndarray]  # used [S, L, E] int32; whether a batch of requests ends with the step, [S]


def steps_of(trace: Trace) -> Steps:
    """How many tokens each decode step sent to each expert, and which steps are the last of their requests."""
    rows = ~trace.is_prefill
    steps, at = np.unique(trace.step[rows], return_inverse=True)
    num_layers = len(trace.moe_layers)
    used = np.zeros((len(steps), num_layers, trace.num_experts), np.int32)
    np.add.at(used, (at[:, None, None], np.arange(num_layers)[:, None], trace.expert_ids[rows]), 1)
    return used, _ends(trace.request[rows], at, len(steps))


def _ends(requests: np.ndarray, at: np.ndarray, num_steps: int) -> np.ndarray:
    """Whether no request of a step goes on in the next: [S]."""
    goes_on = np.zeros(num_steps, bool)
    order = np.lexsort((at, requests))
    same = requests[order][1:] == requests[order][:-1]
    for first, then in zip(at[order][:-1][same], at[order][1:][same], strict=True):
        goes_on[first:then] = True
    return ~goes_on


# Replay.


@functools.partial(jax.jit, static_argnames=("policy", "max_needed"))
def replay(start: Residency, used: jax.Array, ends: jax.Array, *, policy: str, max_needed: int) -> Residency:
    """The residency after these steps, with what was hit, fetched and streamed in its `decode` counters."""
    outlook, finish = POLICIES[policy].outlook, POLICIES[policy].finish
    value = jax.vmap(POLICIES[policy].value, in_axes=(0, 0, None))

    def step(carry, event: tuple[jax.Array, jax.Array]):
        (layers, before), (used, is_end) = carry, event
        values = value(outlook(before.tracked[policy]), used, before.clock)
        num_hits = jnp.sum((used > 0) & (layers.slot_of != NONE), axis=1, dtype=jnp.int32)
        layers, plan = jax.vmap(functools.partial(admit, max_needed=max_needed))(layers, used > 0, values)
        tracked = POLICIES[policy].update(before.tracked[policy], used, before.clock)
        if finish is not None:
            tracked = jax.lax.cond(is_end, finish, lambda state: state, tracked)
        num_streamed = jnp.sum(used > 0, axis=1, dtype=jnp.int32) - num_hits - plan.count
        counters = jax.tree.map(jnp.add, before.decode, Counters(num_hits, plan.count, num_streamed))
        return (layers, Residency((), {policy: tracked}, before.clock + 1, counters, before.prefill)), None

    first = start.stacked, dataclasses.replace(start, layers=())
    (layers, after), _ = jax.lax.scan(step, first, (used, ends))
    return dataclasses.replace(after, layers=tuple(map(LayerResidency, layers.slot_of, layers.owner)))


def hit_rates(
    policies: Sequence[str], lessons: Steps, exam: Steps, slots: int, max_needed: int
) -> dict[str, dict[str, float]]:
    """`hit_rate` and `of_the_gap` by policy, the optimum the last."""
    _, num_layers, num_experts = exam[0].shape
    rates = {}
    for policy in dict.fromkeys(["lru", *policies]):
        play = functools.partial(replay, policy=policy, max_needed=max_needed)
        fresh = init_residency(num_layers, num_experts, slots, policy)
        if POLICIES[policy].learned and len(lessons[0]):
            rates[f"{policy} {UNTAUGHT}"] = _hit_rate(play(fresh, *exam).decode)
            taught = play(fresh, *lessons).tracked[policy]
            fresh = dataclasses.replace(fresh, tracked={policy: carry_over(policy, taught, fresh.tracked[policy])})
        rates[policy] = _hit_rate(play(fresh, *exam).decode)
    rates[OPTIMUM] = optimum(exam[0], slots)
    gap = rates[OPTIMUM] - rates["lru"]
    return {
        name: {"hit_rate": rate, "of_the_gap": (rate - rates["lru"]) / gap if gap > 0 else 0.0}
        for name, rate in rates.items()
        if name != "lru" or "lru" in policies
    }


def _hit_rate(counters: Counters) -> float:
    hits, fetched, streamed = (int(np.sum(count)) for count in jax.tree.leaves(counters))
    return hits / max(1, hits + fetched + streamed)


def optimum(used: np.ndarray, slots: int) -> float:
    """Hit rate of the policy that knows the future; slots start with the first experts, as the engine's do."""
    needed = used > 0
    next_use = next_uses(needed)
    resident = np.zeros(needed.shape[1:], bool)
    resident[:, :slots] = True
    num_hits = 0
    for now, then in zip(needed, next_use, strict=True):
        num_hits += int(np.sum(now & resident))
        must_stay = now & (now.sum(axis=1, keepdims=True) <= slots)
        order = np.where(must_stay, -1, np.where(now | resident, then, len(needed) + 1))
        kept = np.argsort(order, axis=1, kind="stable")[:, :slots]
        resident = np.zeros_like(resident)
        np.put_along_axis(resident, kept, True, axis=1)
    return num_hits / max(1, int(needed.sum()))


def next_uses(needed: np.ndarray) -> np.ndarray:
    """The step after each in which each expert is needed again, [S, L, E]; S if never."""
    after = np.empty(needed.shape, np.int32)
    soonest = np.full(needed.shape[1:], len(needed), np.int32)
    for step in range(len(needed) - 1, -1, -1):
        after[step] = soonest
        soonest = np.where(needed[step], step, soonest)
    return after


# What people see.


def table(rows: Sequence[dict[str, Any]], num_experts: int) -> list[str]:
    """Lines: a row a policy, hit rate and share of the gap for each batch size and number of slots."""
    columns = list(dict.fromkeys((row["batch_size"], row["slots"]) for row in rows))
    cells = {(row["policy"], row["batch_size"], row["slots"]): row for row in rows}
    head = ["policy", *(f"b={batch} {slots / num_experts:.1%}" for batch, slots in columns)]
    lines = [head]
    for name in dict.fromkeys(row["policy"] for row in rows):
        found = [cells[name, *column] for column in columns]
        lines.append([name, *(f"{row['hit_rate']:.4f} ({row['of_the_gap']:+.0%})" for row in found)])
    note = "hit rate (of the gap from lru to the optimum)"
    return [note, *("  ".join([f"{line[0]:<20}", *(f"{cell:>14}" for cell in line[1:])]).rstrip() for line in lines)]


if __name__ == "__main__":
    sys.exit(main())
