"""How often a draft is accepted when draft and model draw with the same noise, and how often by the rejection rule.

    python -m tools.compare_couplings                                 # the demo model
    python -m tools.compare_couplings --model path/to/model --draft-experts 8 16 --temperature 0.6 --top-p 0.95

Continues prompts by the model's own samples, and at each position asks draft and model for their probabilities p and q
of the next token, everything before it being accepted. From these, in closed form:

    rejection rule       Σ_i min(p_i, q_i)                           no way to draw accepts more
    shared Gumbel noise  Σ_i 1 / Σ_j max(p_j / p_i, q_j / q_i)

One row for each number of draft experts and place in the draft; one line of JSON comes last.
"""

import argparse
import dataclasses
import functools
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import jmoe
from jmoe import checkpoint, sources
from jmoe.batch import prompt_chunks
from jmoe.config import DTYPES
from jmoe.decoding.sampling import Sampling, SamplingParams, batch_sampling, truncate
from jmoe.decoding.speculative import SpeculativeSteps
from jmoe.decoding.step import DecodeState
from jmoe.engine import Engine
from jmoe.experts import draft
from jmoe.experts.draft import DraftConfig, DraftExperts, DraftSet
from jmoe.experts.groups import tokens_of_experts
from jmoe.model.kv_cache import KVCache
from tools.bench_decode import PROMPTS
from tools.command import exit_code
from tools.workload import Lengths, make_workload, read_prompts

COLUMNS = ("experts", "place", "positions", "rejection", "shared", "share")


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0, or 2 after one line on stderr that says what is wrong."""
    return exit_code(_run, _parser().parse_args(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="as python -m jmoe.generate takes it; default: the demo model")
    parser.add_argument("--prompts", type=Path, default=PROMPTS, metavar="FILE")
    parser.add_argument("--num-prompts", type=int, default=16, metavar="N")
    parser.add_argument("--prompt-tokens", type=int, default=96, metavar="N")
    parser.add_argument("--new-tokens", type=int, default=41, metavar="N", help="of each prompt")
    parser.add_argument("--draft-tokens", type=int, default=4, metavar="N")
    parser.add_argument("--draft-experts", type=int, nargs="+", default=[8, 16, 32], metavar="N", help="of each layer")
    parser.add_argument("--expert-slots", type=int, metavar="N", help="of each layer; default: all experts")
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--min-p", type=float, default=0.0)
    parser.add_argument("--dtype", choices=DTYPES)
    parser.add_argument("--seed", type=int, default=0)
    return parser


def rejection_acceptance(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Σ_i min(p_i, q_i) over the last axis: the rejection rule's acceptance (arXiv 2211.17192)."""
    return np.minimum(p, q).sum(axis=-1)


def shared_noise_acceptance(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Σ_i 1 / Σ_j max(p_j / p_i, q_j / q_i) over the last axis: how often both argmax(log p + g) and argmax(log q + g)
    are the same token, g being Gumbel noise.

    With exponential clocks E_j instead of the noise, both choose i if E_i max(p_j / p_i, q_j / q_i) <= E_j for all j.
    The sum over j takes p_j / p_i for those with p_j / q_j >= p_i / q_i and q_j / q_i for the others: sums in order of
    p / q, instead of V² maxima.
    """
    p, q = np.asarray(p, np.float64), np.asarray(q, np.float64)
    order = np.argsort(-np.where(q > 0, p / np.where(q > 0, q, 1), np.inf), axis=-1)
    p, q = (np.take_along_axis(each, order, axis=-1) for each in (p, q))
    above, below = np.cumsum(p, axis=-1), q.sum(axis=-1, keepdims=True) - np.cumsum(q, axis=-1)
    both = (p > 0) & (q > 0)
    sums = above / np.where(both, p, 1) + below / np.where(both, q, 1)
    return np.where(both, 1 / sums, 0).sum(axis=-1)


def _run(options: argparse.Namespace) -> None:
    if options.temperature <= 0:
        raise ValueError(f"--temperature {options.temperature:g}: nothing is drawn; ask for more than 0")
    measure = Measurement.begin(options)
    print("  ".join(name.rjust(10) for name in COLUMNS), flush=True)
    rows = []
    for num_experts in options.draft_experts:
        chances = [(rejection_acceptance(p, q), shared_noise_acceptance(p, q)) for p, q in measure.pairs(num_experts)]
        for place, each in enumerate([*np.moveaxis(np.array(chances), 2, 0), None]):
            values = np.array(chances) if each is None else each
            rejection, shared = (float(values[:, n].mean()) for n in (0, 1))
            cells = num_experts, "all" if each is None else place + 1, values[:, 0].size, rejection, shared
            rows.append(dict(zip(COLUMNS, (*cells, shared / rejection), strict=True)))
            print("  ".join(_shown(value).rjust(10) for value in rows[-1].values()), flush=True)
    print(json.dumps({"device": jax.devices()[0].device_kind, "rows": rows}))


def _shown(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


@dataclasses.dataclass(frozen=True)
class Measurement:
    """Prompts of one length, each with the model's own continuation [B, n]."""

    engine: Engine
    options: argparse.Namespace
    prompts: list[list[int]]
    tokens: np.ndarray
    sampling: Sampling

    @classmethod
    def begin(cls, options: argparse.Namespace) -> "Measurement":
        config = checkpoint.read_config(sources.resolve(options.model))
        runtime = jmoe.RuntimeConfig(
            expert_slots=options.expert_slots or config.num_experts,
            batch_size=options.num_prompts,
            max_seq_len=options.prompt_tokens + options.new_tokens + 1,
            dtype=options.dtype,
            measure_link=False,
        )
        engine = jmoe.load(options.model, runtime)
        if engine.tokenizer is None:
            raise ValueError(f"{options.model} has no tokenizer, and prompts are text; choose a model that has one")
        requests = make_workload(
            read_prompts(options.prompts),
            engine.tokenizer,
            num_requests=options.num_prompts,
            prompt_tokens=Lengths.constant(options.prompt_tokens),
            new_tokens=Lengths.constant(options.new_tokens),
            seed=options.seed,
        )
        prompts = [list(request.prompt_ids) for request in requests]
        names = ("temperature", "top_k", "top_p", "min_p")
        shared = {name: getattr(options, name) for name in names} | {"max_new_tokens": options.new_tokens}
        params = [SamplingParams(seed=options.seed + n, ignore_eos=True, **shared) for n in range(len(prompts))]
        completions = engine.generate(prompts, params).results()
        tokens = np.array([completion.token_ids for completion in completions], np.int32)
        return cls(engine, options, prompts, tokens, batch_sampling(params, ()))

    def pairs(self, num_experts: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Probabilities of draft and model, each [γ, B, V], for one cycle after another."""
        engine, count = self.engine, self.options.draft_tokens
        steps = SpeculativeSteps(engine.steps, DraftConfig(num_experts), count)
        weights = engine.weights
        state = engine.new_state(len(self.prompts), [self.options.new_tokens] * len(self.prompts))
        for chunk in prompt_chunks(self.prompts, engine.plan.prefill_chunk):
            _, state = engine.prefill.hidden(weights.params, weights.store, state, chunk)
        draft_set = steps.start(state.experts)
        width = count + 1
        cycles = range(0, self.tokens.shape[1] - width + 1, width)
        for cycle, start in enumerate(tqdm(cycles, desc=f"{num_experts} experts", leave=False, disable=None)):
            part = jnp.asarray(self.tokens[:, start : start + width])
            state, draft_set, p, q = _cycle(steps, weights.params, weights.store, state, draft_set, part, self.sampling)
            if cycle:  # the first knows nothing but what the slots hold
                yield np.asarray(p), np.asarray(q)
        engine.give_back(state)


@functools.partial(jax.jit, static_argnames=("steps",), donate_argnames=("state", "draft_set"))
def _cycle(steps: SpeculativeSteps, params, store, state: DecodeState, draft_set: DraftSet, tokens, sampling: Sampling):
    """A cycle all of whose drafted tokens are those of the continuation: `tokens` [B, γ+1] with the one before."""
    decoder, lengths = steps.steps.decoder(params), state.cache.lengths
    experts = DraftExperts(state.experts, draft_set, steps.draft.missing == "reroute", steps.steps.implementation)
    valid, cache, drafted = jnp.ones(tokens.shape, bool), state.cache, []
    for n in range(steps.max_draft_tokens):
        hidden, cache, _ = decoder(tokens[:, n : n + 1], valid[:, :1], cache.lengths + 1, cache, experts, None)
        drafted.append(_probabilities(decoder.unembed(hidden[:, 0]), sampling))
    state = dataclasses.replace(state, cache=KVCache(cache.keys, cache.values, lengths))
    hidden, state, routings, _ = steps.steps.forward(decoder, store, state, tokens, valid, lengths + 1, admits=True)
    counts = jnp.stack([tokens_of_experts(routing.expert_ids, draft_set.heat.shape[1]) for routing in routings])
    draft_set = draft.refresh(steps.draft, draft_set, counts.astype(jnp.float32), state.experts)
    wanted = [_probabilities(decoder.unembed(hidden[:, n]), sampling) for n in range(steps.max_draft_tokens)]
    return state, draft_set, jnp.stack(drafted), jnp.stack(wanted)


def _probabilities(logits, sampling: Sampling):
    """What tokens are drawn from, [B, V]."""
    return jax.nn.softmax(truncate(logits / sampling.temperature[:, None], sampling), axis=-1)


if __name__ == "__main__":
    sys.exit(main())
