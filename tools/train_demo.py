"""Trains the model in the box on Python's standard library: python -m tools.train_demo DESTINATION

A byte-level BPE tokenizer and a fine-grained Qwen3-MoE, up to the minimum of the held-out loss; DESTINATION becomes a
Hugging Face checkpoint with a model card. Checkpoints of the training lie in DESTINATION.training, from which a run
that was killed goes on when it is started again.
"""

import argparse
import dataclasses
import hashlib
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

from jmoe import checkpoint, hf_files
from jmoe.config import ModelConfig
from jmoe.model import families
from jmoe.model.tensors import Leaf
from jmoe.routing_stats import summarize
from jmoe.training.batches import Batches
from jmoe.training.config import TrainingConfig
from jmoe.training.loop import Evaluation, HeldOut, Outcome, fit
from jmoe.training.step import Losses, Params, Trainer
from jmoe.whole_files import new_file
from tools import demo_card
from tools.command import exit_code
from tools.measure_routing import layer_columns, record
from tools.stdlib_corpus import read_files, stdlib_root

ROOT = Path(__file__).parent.parent
START = "<|endoftext|>"  # before each document, and so after each
MAX_SHARD_BYTES = 14_500_000  # and headers: below 15 MB


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0, or 2 after one line on stderr that says what is wrong."""
    return exit_code(_run, _parser().parse_args(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("destination", type=Path, help="directory to make")
    parser.add_argument("--config", type=Path, default=ROOT / "configs/models/demo.toml", help="the architecture")
    parser.add_argument("--training", type=Path, default=ROOT / "configs/training/demo.toml", help="how to train it")
    parser.add_argument("--stdlib-root", type=Path, default=stdlib_root(), help="default: the running interpreter's")
    parser.add_argument("--source-name", help="what the card calls the text; default: this Python's standard library")
    parser.add_argument("--steps", type=int, help="instead of the configuration's num_steps")
    parser.add_argument("--seed", type=int, help="instead of the configuration's seed")
    parser.add_argument(
        "--one-expert",
        action="store_true",
        help="for comparison: one expert a layer, as wide as those that a token uses are together",
    )
    return parser


def _run(options: argparse.Namespace) -> None:
    if options.destination.exists():
        raise ValueError(f"{options.destination}: already there. Remove it or choose another destination.")
    config = ModelConfig.from_toml(options.config)
    config = one_expert(config) if options.one_expert else config
    training = TrainingConfig.from_toml(options.training)
    given = {"num_steps": options.steps, "seed": options.seed}
    training = dataclasses.replace(training, **{name: value for name, value in given.items() if value is not None})
    corpus = Corpus.read(options.stdlib_root, options.source_name)
    work = options.destination.with_name(options.destination.name + ".training")
    tokenizer = _tokenizer(work / "tokenizer.json", corpus, config.vocab_size)
    trainer = Trainer(config, training)
    outcome = _train(trainer, corpus, tokenizer, work)
    facts = summary(trainer, corpus, tokenizer, outcome)
    write_checkpoint(options.destination, config, outcome.params, tokenizer, facts)
    print(json.dumps({name: facts[name] for name in ("best", "tokens_trained_on", "tokens_per_s", *PEAK_SHARES)}))


def one_expert(config: ModelConfig) -> ModelConfig:
    """The dense model that does as much for each token: one expert a layer, as wide as A of them."""
    width = config.num_experts_per_tok * config.moe_intermediate_size
    return dataclasses.replace(config, num_experts=1, num_experts_per_tok=1, moe_intermediate_size=width)


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Text by path: to train on, and held out."""

    name: str
    train: Mapping[str, str]
    held_out: Mapping[str, str]

    @classmethod
    def read(cls, root: Path, name: str | None) -> "Corpus":
        """The standard library at `root`. Raises ValueError if there is none."""
        version = ".".join(map(str, sys.version_info[:3]))
        return cls(
            name or f"the standard library of Python {version}",
            read_files(root, held_out=False),
            read_files(root, held_out=True),
        )

    def facts(self) -> dict[str, Any]:
        return {
            "source": self.name,
            **{f"num_{part}_files": len(getattr(self, part)) for part in ("train", "held_out")},
            **{f"{part}_bytes": num_bytes(getattr(self, part).values()) for part in ("train", "held_out")},
            "train_sha256": hashlib.sha256("\0".join(self.train.values()).encode()).hexdigest(),
        }


def num_bytes(texts) -> int:
    return sum(len(text.encode()) for text in texts)


def _tokenizer(file: Path, corpus: Corpus, vocab_size: int) -> Tokenizer:
    """Byte-level BPE of the training text; one that an earlier run of this training made is taken again."""
    if file.is_file():
        return Tokenizer.from_file(str(file))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(START, special=True, normalized=False)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus.train.values(), trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(
            f"the text gives a vocabulary of {tokenizer.get_vocab_size()}, not vocab_size={vocab_size}; "
            "give more text or lower vocab_size"
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    with new_file(file) as scratch:
        tokenizer.save(str(scratch))
    return tokenizer


def _train(trainer: Trainer, corpus: Corpus, tokenizer: Tokenizer, work: Path) -> Outcome:
    training = trainer.training
    start_id = tokenizer.token_to_id(START)
    assert start_id is not None  # it was trained with this one
    train, held_out = (_encode(tokenizer, texts) for texts in (corpus.train, corpus.held_out))
    batches = Batches(train, start_id, training.batch_size, training.sequence_length, training.seed)
    scored = HeldOut.cut(held_out, start_id, num_bytes(corpus.held_out.values()), training.sequence_length)
    print(
        f"{batches.num_tokens} tokens to train on, {batches.steps_per_epoch} steps an epoch; "
        f"{int(scored.scored.sum())} tokens ({scored.num_bytes} bytes) held out",
        flush=True,
    )
    with tqdm(total=training.num_steps, unit="step", mininterval=1) as bar:

        def report(step: int, losses: Losses, tokens_per_s: float) -> None:
            bar.update(step - bar.n)
            bar.set_postfix_str(f"loss {float(losses.cross_entropy):.3f}, {tokens_per_s:.3g} tokens/s", refresh=False)

        def tell(evaluation: Evaluation) -> None:
            values = dataclasses.asdict(evaluation).items()
            tqdm.write("  ".join(f"{name} {value:.4g}" for name, value in values), file=sys.stdout)

        return fit(trainer, batches, scored, work, report, tell)


def _encode(tokenizer: Tokenizer, texts: Mapping[str, str]) -> list[np.ndarray]:
    encodings = tokenizer.encode_batch_fast(list(texts.values()), add_special_tokens=False)
    return [
        np.array(encoding.ids, np.uint16 if tokenizer.get_vocab_size() < 2**16 else np.int32) for encoding in encodings
    ]


def summary(trainer: Trainer, corpus: Corpus, tokenizer: Tokenizer, outcome: Outcome) -> dict[str, Any]:
    """What the card and docs/benchmarks.md say of a training."""
    config, training = trainer.config, trainer.training
    speed = outcome.tokens_per_s if math.isfinite(outcome.tokens_per_s) else None
    peak = PEAK_FLOPS.get(jax.devices()[0].device_kind)
    flops = [flops_per_token(config, training, all_experts=every) for every in (False, True)]
    return {
        "data": corpus.facts() | {"train_tokens": sum(map(len, _encode(tokenizer, corpus.train)))},
        "model": config.to_dict(),
        "num_parameters": num_parameters(config, config.num_experts),
        "num_active_parameters": num_parameters(config, config.num_experts_per_tok),
        "training": dataclasses.asdict(training),
        "best": dataclasses.asdict(outcome.best),
        "evaluations": [dataclasses.asdict(evaluation) for evaluation in outcome.evaluations],
        "tokens_trained_on": outcome.best.step * training.tokens_per_step,
        "routing": routing_facts(trainer, outcome.params, _encode(tokenizer, corpus.held_out)),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "tokens_per_s": speed,
        **dict(zip(PEAK_SHARES, (peak and speed and speed * each / peak for each in flops), strict=True)),
    }


def routing_facts(trainer: Trainer, params: Params, documents: Sequence[np.ndarray]) -> dict[str, Any]:
    """How evenly and how steadily the experts of each layer are used, on the beginnings of documents; a window each."""
    config, length = trainer.config, trainer.training.sequence_length
    chosen = [ids[:length].tolist() for ids in documents if len(ids) >= length][:NUM_ROUTED_DOCUMENTS]
    low = jax.tree.map(lambda leaf: leaf.astype(config.dtype), params)
    summary = summarize(record(config, low["trunk"], low["experts"], chosen), config.num_experts)
    columns = layer_columns(summary)
    names = ("effective_experts", "min_use", "max_use", "reuse")
    layers = [
        {"layer": layer} | {name: float(columns[name][n]) for name in names}
        for n, layer in enumerate(config.moe_layers)
    ]
    return {"num_documents": len(chosen), "num_tokens": length, "layers": layers}


PEAK_FLOPS = {"NVIDIA H200": 989e12, "NVIDIA H100 80GB HBM3": 989e12}  # dense bf16, of the data sheets
PEAK_SHARES = ("share_of_bf16_peak", "share_of_bf16_peak_with_unused_experts")
NUM_ROUTED_DOCUMENTS = 24


def num_parameters(config: ModelConfig, num_experts: int) -> int:
    """Of the trunk, and of that many experts in each layer."""
    trunk = sum(math.prod(shape) for shape in families.trunk_shapes(config).values())
    return trunk + len(config.moe_layers) * num_experts * math.prod(config.expert_shape)


def flops_per_token(config: ModelConfig, training: TrainingConfig, *, all_experts: bool = False) -> float:
    """Forward and backward: 6 a weight that a token meets, and causal attention over half a window on average.

    Training multiplies every token with all experts, most of them by 0: `all_experts` counts that too.
    """
    heads = config.num_attention_heads * config.head_dim
    experts = config.num_experts if all_experts else config.num_experts_per_tok
    return 6 * num_parameters(config, experts) + 6 * config.num_hidden_layers * heads * training.sequence_length


def write_checkpoint(
    destination: Path, config: ModelConfig, params: Params, tokenizer: Tokenizer, facts: Mapping[str, Any]
) -> None:
    """The Hugging Face checkpoint, whole or not at all."""
    leaves = families.all_leaves(config)
    pieces = [piece for leaf in leaves for piece in leaf.pieces]

    def array(leaf: Leaf) -> np.ndarray:
        if leaf.expert_layer is None:
            value = params["trunk"][leaf.path]
        else:
            value = params["experts"][config.moe_layers.index(leaf.expert_layer)]
        return np.asarray(value.astype(config.dtype))

    with checkpoint.new_directory(destination, checkpoint.checkpoint_bytes(config)) as scratch:
        tensors = (piece.take(taken) for leaf in leaves for taken in [array(leaf)] for piece in leaf.pieces)
        hf_files.write_shards(scratch, config.dtype, pieces, tensors, MAX_SHARD_BYTES)
        tokenizer.save(str(scratch / "tokenizer.json"))
        for name, content in _json_files(config, tokenizer).items():
            hf_files.write_json(scratch / name, content)
        hf_files.write_json(scratch / "training.json", facts)
        (scratch / "README.md").write_text(demo_card.card(facts), encoding="utf-8")


def _json_files(config: ModelConfig, tokenizer: Tokenizer) -> dict[str, dict[str, Any]]:
    ids = dict.fromkeys(("bos_token_id", "eos_token_id"), tokenizer.token_to_id(START))
    sampling = {"do_sample": True, "temperature": 0.6, "top_p": 0.95}
    return {
        "config.json": families.to_hf_config(config) | ids,
        "generation_config.json": ids | {"pad_token_id": ids["eos_token_id"]} | sampling,
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **dict.fromkeys(("bos_token", "eos_token", "pad_token"), START),
            "clean_up_tokenization_spaces": False,
            "model_max_length": config.max_position_embeddings,
        },
    }


if __name__ == "__main__":
    sys.exit(main())
