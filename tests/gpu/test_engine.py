"""The whole engine on a GPU: the same tokens through any number of slots, kernels or not, and the memory it planned."""

import dataclasses
import functools
import json
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.config import RuntimeConfig
from jmoe.decoding.resident import forward_resident
from jmoe.decoding.sampling import SamplingParams
from jmoe.engine import Engine
from jmoe.synthetic import byte_tokenizer
from jmoe.tokenizer import Tokenizer
from tests import models

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("brings_all_guesses")]

CONFIG = dataclasses.replace(
    models.SMALL,
    vocab_size=1024,
    hidden_size=256,
    moe_intermediate_size=96,
    num_hidden_layers=2,
    mlp_only_layers=(),
    head_dim=64,
    num_experts=16,
    num_experts_per_tok=4,
)
PROMPTS = models.prompts(37, 11, 50, config=CONFIG)
GREEDY = SamplingParams(max_new_tokens=48)
OPTIONS = {"max_seq_len": 128, "prefill_chunk": 32}


def tokens(**runtime) -> list[tuple[int, ...]]:
    engine = models.engine(CONFIG, **{**OPTIONS, **runtime})
    return [completion.token_ids for completion in engine.generate(PROMPTS, GREEDY).results()]


@functools.cache
def expected() -> list[tuple[int, ...]]:
    return tokens(expert_slots=16)


@pytest.mark.parametrize(
    "runtime",
    [
        {"expert_slots": 4},
        {"expert_slots": 5, "staging_slots": 1, "batch_size": 3},  # more groups than slots: waves
        {"expert_slots": 4, "staging_slots": 3, "batch_size": 3},
        {"expert_slots": 4, "staging_slots": 2, "batch_size": 3, "draft": 3},
        {"expert_slots": 9, "implementation": "reference"},
        {"expert_slots": 5, "prefetch": "lookahead", "prefetch_experts": 1.6},  # in one pass with the arithmetic
        {"expert_slots": 12, "batch_size": 3, "prefetch": "lookahead"},  # by a fetch before it
        {"expert_slots": 5, "prefetch": "lookahead"},
        {"expert_slots": 5, "prefetch": "off"},
        {"expert_slots": 5, "prefetch": "activation"},
        {"expert_slots": 5, "prefetch": "both", "prefetch_experts": 1.6},
        {"expert_slots": 5, "draft": 3},
        {"expert_slots": 12, "batch_size": 3, "draft": "auto"},
    ],
    ids=str,
)
def test_tokens_do_not_depend_on_slots_batches_kernels_prefetches_or_drafts(runtime: dict) -> None:
    assert tokens(**runtime) == expected()


def test_one_text_stops_and_the_others_go_on() -> None:
    """In short calls, of which the next one is under way when the stop string is found."""
    config, tokenizer = dataclasses.replace(CONFIG, vocab_size=259), Tokenizer(byte_tokenizer(259), eos_ids=())
    runtime = RuntimeConfig(expert_slots=12, batch_size=3, measure_link=False, **OPTIONS)
    engine = Engine.start(config, runtime, lambda: models.weights(config), tokenizer=tokenizer)
    prompts = models.prompts(37, 11, 50, config=config)
    free = engine.generate(prompts, GREEDY).results()
    stop = tokenizer.decode(free[0].token_ids[8:11])
    stopped, *others = engine.generate(prompts, [dataclasses.replace(GREEDY, stop=(stop,)), GREEDY, GREEDY]).results()
    assert (stopped.finish_reason, stopped.text) == ("stop", free[0].text[: free[0].text.index(stop)])
    assert [completion.token_ids for completion in others] == [completion.token_ids for completion in free[1:]]


def test_slots_are_never_copied() -> None:
    """They would not fit twice: a generation gives back the very buffers that it took."""
    engine = models.engine(CONFIG, **OPTIONS)

    def pointers() -> list[int]:
        state = engine.new_state(1, [1])
        engine.give_back(state)
        return [array.unsafe_buffer_pointer() for array in (*state.experts.layers, *state.experts.staging)]

    before = pointers()
    engine.generate(PROMPTS, GREEDY).results()
    assert pointers() == before


def test_offloaded_logits_equal_resident_logits() -> None:
    weights = models.on_device(models.weights(CONFIG))
    ids = models.prompts(40, 40, config=CONFIG)
    resident = np.asarray(forward_resident(CONFIG, weights.params, weights.store.layers, jnp.asarray(ids)))
    logits = models.engine(CONFIG, batch_size=2, expert_slots=4, **OPTIONS).logits(ids)
    np.testing.assert_allclose(logits, resident, atol=1e-3)


@pytest.mark.parametrize("staging_slots", [1, 2, 8])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_prompt_in_waves_is_read_as_with_every_expert_resident(dtype: str, staging_slots: int) -> None:
    """And the same bits each time, though copies run beside the arithmetic."""
    config = dataclasses.replace(CONFIG, dtype=dtype, moe_intermediate_size=128)  # as the kernels of prefill want it
    options = {"batch_size": 2, "max_seq_len": 128, "prefill_chunk": 96}
    ids = models.prompts(96, 96, config=config)
    resident = models.engine(config, expert_slots=16, **options).logits(ids)
    engine = models.engine(config, expert_slots=4, staging_slots=staging_slots, **options)
    logits = engine.logits(ids)
    if dtype == "float32":
        np.testing.assert_allclose(logits, resident, atol=1e-3)
    else:  # where a router is undecided, waves that add up in another order may decide otherwise
        assert np.median(np.abs(logits - resident)) < 0.02 * np.abs(resident).max()
        assert (logits.argmax(-1) == resident.argmax(-1)).mean() > 0.9
    for _ in range(8):
        np.testing.assert_array_equal(engine.logits(ids), logits)


@pytest.mark.parametrize("prefetch", ["", "--prefetch lookahead --prefetch-experts 2"])
def test_peak_memory_is_within_5_percent_of_the_plan(prefetch: str) -> None:
    command = "-m tools.bench_decode --config configs/models/qwen3-30b-a3b.toml --layers 12 --no-reference"
    options = f"--shares 0.125 --prompt-tokens 512 --new-tokens 17 --repeats 1 {prefetch}"
    out = subprocess.run(
        [sys.executable, *command.split(), *options.split()], capture_output=True, text=True, check=True
    )
    for row in json.loads(out.stdout.splitlines()[-1])["rows"]:
        assert abs(row["peak_bytes"] / row["planned_bytes"] - 1) < 0.05, row
