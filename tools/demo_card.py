"""The model card of a demo model (see tools/train_demo.py): what it is, what it learned from, how good it is."""

from collections.abc import Mapping, Sequence
from typing import Any

_TEXT = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
tags: [mixture-of-experts, code, qwen3_moe]
---

# The demo model of jmoe

A small Mixture-of-Experts language model that was really trained: {millions:.1f} million parameters, of which a token
uses {active_millions:.1f} million. Architecture `qwen3_moe`, {num_hidden_layers} layers of {num_experts} experts,
{num_experts_per_tok} of them for a token. It writes text that looks like Python. It is for showing and measuring how
experts are moved, not for writing programs: what it writes may be wrong in every way.

## Data and licence

{source}, © Python Software Foundation, Python Software Foundation License Version 2:
{num_train_files} files, {train_megabytes:.1f} MB, SHA-256 of the text
`{train_sha256}`.

Held out: {num_held_out_files} files, {held_out_megabytes:.2f} MB (`configs/training/stdlib_held_out.txt`). The weights
are under Apache-2.0, as jmoe is.

## Quality

Held-out text: **{held_out_bits_per_byte:.3f} bits a byte**, in windows of {sequence_length} tokens that begin anew,
at the minimum of the training. Of this or any checkpoint:

    python -m tools.eval_lm --stdlib-held-out --window {sequence_length}

## Training

{tokens:.0f} million tokens ({epochs:.1f} times the text), in batches of {batch_size} windows of {sequence_length}.
AdamW, learning rate {learning_rate} with a cosine, weight decay {weight_decay}, load-balancing loss
{load_balancing_weight}, router z-loss {router_z_weight}, bfloat16 with float32 masters, seed {seed}. `training.json`
has everything, and

    python -m tools.train_demo DESTINATION

does it again{speed}.

## Use of experts

On {num_documents} held-out files, {num_tokens} tokens of each. Effective experts are exp(entropy of use); least and
most used are relative to even use; reuse is the share of a token's experts that the token before used too (routing at
random: {random_reuse:.3f}). docs/demo_model.md of jmoe has more of it, and how to measure it.

{table}
"""


def card(facts: Mapping[str, Any]) -> str:
    """Markdown with the header that the Hugging Face hub reads, from the facts that training left."""
    data, model, training, routing = (facts[part] for part in ("data", "model", "training", "routing"))
    speed = facts["tokens_per_s"]
    values = {
        **model,
        **training,
        **data,
        **facts["best"],
        "num_documents": routing["num_documents"],
        "num_tokens": routing["num_tokens"],
        "source": data["source"][0].upper() + data["source"][1:],
        "train_megabytes": data["train_bytes"] / 1e6,
        "held_out_megabytes": data["held_out_bytes"] / 1e6,
        "millions": facts["num_parameters"] / 1e6,
        "active_millions": facts["num_active_parameters"] / 1e6,
        "tokens": facts["tokens_trained_on"] / 1e6,
        "epochs": facts["tokens_trained_on"] / data["train_tokens"],
        "speed": f" ({speed:,.0f} tokens/s on one {facts['device']})" if speed else "",
        "random_reuse": model["num_experts_per_tok"] / model["num_experts"],
        "table": _table(routing["layers"]),
    }
    return _TEXT.format(**values)


def _table(layers: Sequence[Mapping[str, float]]) -> str:
    form = "| {layer} | {effective_experts:.1f} | {min_use:.2f} | {max_use:.2f} | {reuse:.3f} |"
    lines = ["| layer | effective experts | least used | most used | reuse |", "|---|---|---|---|---|"]
    return "\n".join(lines + [form.format(**row) for row in layers])
