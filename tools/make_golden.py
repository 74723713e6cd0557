"""Writes tests/golden/<case>/: tiny random Qwen3-MoE checkpoints with Hugging Face's logits and greedy tokens.

This is the only tool that needs PyTorch, and it imports nothing of jmoe: what it writes is what jmoe is held to. Make
an environment of its own for it, apart from the project's:

    python3.11 -m venv golden-env && golden-env/bin/pip install torch==2.13.0 transformers safetensors numpy
    golden-env/bin/python tools/make_golden.py              # every case
    golden-env/bin/python tools/make_golden.py yarn sliding # some of them

`--demo` writes tests/golden/demo.npz, the readings of the trained model in jmoe/demo. The cases are in
tests/golden/cases.toml. Each takes the first seed whose greedy choices and routing are clear of
rounding (see `Reading.flaw`), and then shows that its options matter: without them the logits must differ. The same
versions write the same bytes.
"""

# pyright: reportMissingImports=false
import argparse
import dataclasses
import json
import shutil
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

NUM_NEW_TOKENS = 64
NUM_SEEDS = 400
MIN_MARGIN = 0.01  # of the two best logits, at every greedy step
MIN_ROUTER_GAP = 5e-5  # between the probabilities of the last expert chosen and the first one not chosen
MIN_DISTINCT = 16  # different tokens among the NUM_NEW_TOKENS of one prompt
MIN_EFFECT = 0.1  # largest change of a logit when an option is taken away
DEMO_PROMPTS = ("def fibonacci(n):", "class Stack:\n    def push(self, item):\n")
NUM_DEMO_POSITIONS = 4  # the last of a prompt: 4096 logits each


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One checkpoint to make; tests/golden/cases.toml says what the fields mean."""

    name: str
    config: Mapping[str, Any]
    without: Mapping[str, Mapping[str, Any]]
    num_prompt_tokens: int = 32
    version: int = 5
    legacy: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    omit: Sequence[str] = ()
    shard_size: str = "1GB"

    def hf_config(self, changes: Mapping[str, Any] | None = None) -> Qwen3MoeConfig:
        values = overlay(self.config, changes or {})
        return Qwen3MoeConfig(**{key: value for key, value in values.items() if key not in self.omit})


def overlay(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with `changes` laid over them, tables within tables too."""
    merged = dict(values)
    for key, change in changes.items():
        merged[key] = overlay(merged.get(key, {}), change) if isinstance(change, Mapping) else change
    return merged


def read_cases(path: Path) -> list[Case]:
    tables = tomllib.loads(path.read_text(encoding="utf-8"))
    small = tables.pop("small")
    return [Case(name=name, **(table | {"config": overlay(small, table["config"])})) for name, table in tables.items()]


def randomize(model: torch.nn.Module, seed: int) -> None:
    """Draws every weight anew. Scales keep each layer's share of the sum alike and the logits of order 10."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if "norm" in name:
            values = 1.0 + 0.3 * noise  # also of q and k: attention has to look somewhere
            values = 1.6 * values if "q_norm" in name else values
        elif name.endswith("bias"):
            values = 0.3 * noise
        else:
            values = gain(name) * noise / weight.shape[-1] ** 0.5
        weight.data.copy_(values)


def gain(name: str) -> float:
    """Growth of the root mean square from a weight's input to its output."""
    if "embed_tokens" in name or "lm_head" in name:
        return 4.0  # of a tied pair the first is drawn, so both have to be alike
    if "mlp.gate.weight" in name or "o_proj" in name:
        return 2.0
    return 3.0 if "down_proj" in name else 1.2


def fresh_model(config: Qwen3MoeConfig, seed: int) -> Qwen3MoeForCausalLM:
    """A new model each time, because dynamic rotary embeddings keep the longest length seen so far."""
    model = Qwen3MoeForCausalLM._from_config(
        config, attn_implementation="eager", experts_implementation="eager", dtype=torch.float32
    )
    randomize(model, seed)
    return model.eval()


@dataclasses.dataclass(frozen=True)
class Reading:
    """What Hugging Face's model says. Margins and gaps are of logits and of router probabilities."""

    token_ids: np.ndarray  # [B, T]
    logits: np.ndarray  # [B, T, V]
    generated: np.ndarray  # [B, 64]
    margins: np.ndarray  # [B, 64]
    router_gap: float

    def flaw(self) -> str | None:
        """Why rounding, or dullness, would make this a poor test; None for a good one."""
        distinct = min(len(np.unique(row)) for row in self.generated)
        largest = float(np.abs(self.logits).max())
        if self.margins.min() < MIN_MARGIN:
            return f"greedy margin {self.margins.min():.5f}"
        if self.router_gap < MIN_ROUTER_GAP:
            return f"router gap {self.router_gap:.1e}"
        if distinct < MIN_DISTINCT:
            return f"only {distinct} different tokens"
        return None if 5.0 <= largest <= 30.0 else f"largest logit {largest:.1f}"


class RouterGaps:
    """Collects the smallest gap between chosen and rejected experts while a model runs."""

    def __init__(self, model: Qwen3MoeForCausalLM) -> None:
        self.smallest = float("inf")
        self.num_chosen = model.config.num_experts_per_tok
        for layer in model.model.layers:
            if hasattr(layer.mlp, "experts"):
                layer.mlp.gate.register_forward_hook(self.note)

    def note(self, module: torch.nn.Module, inputs: tuple[Any, ...], outputs: tuple[torch.Tensor, ...]) -> None:
        ranked = outputs[0].softmax(-1).sort(dim=-1, descending=True).values
        if self.num_chosen < ranked.shape[-1]:
            gap = ranked[:, self.num_chosen - 1] - ranked[:, self.num_chosen]
            self.smallest = min(self.smallest, float(gap.min()))


def forward_logits(config: Qwen3MoeConfig, seed: int, token_ids: np.ndarray) -> tuple[np.ndarray, float]:
    """Logits [B, T, V] of whole prompts, and the smallest router gap."""
    model = fresh_model(config, seed)
    gaps = RouterGaps(model)
    with torch.no_grad():
        logits = model(torch.from_numpy(token_ids).long(), use_cache=False).logits
    return logits.numpy(), gaps.smallest


def greedy(
    config: Qwen3MoeConfig, seed: int, prompt: np.ndarray, *, use_cache: bool = True
) -> tuple[np.ndarray, np.ndarray, float]:
    """64 greedy tokens of one prompt, their margins, and the smallest router gap."""
    model = fresh_model(config, seed)
    model.generation_config.eos_token_id = None
    gaps = RouterGaps(model)
    ids = torch.from_numpy(prompt[None]).long()
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        use_cache=use_cache,
        max_new_tokens=NUM_NEW_TOKENS,
        return_dict_in_generate=True,
        output_logits=True,
    )
    best = torch.cat(out.logits).topk(2, dim=-1).values  # [64, 2]
    return out.sequences[0, len(prompt) :].numpy(), (best[:, 0] - best[:, 1]).numpy(), gaps.smallest


def read(case: Case, seed: int) -> Reading:
    config = case.hf_config()
    size = (2, case.num_prompt_tokens)
    token_ids = np.random.default_rng(seed).integers(0, config.vocab_size, size, dtype=np.int32)
    logits, gap = forward_logits(config, seed, token_ids)
    rows = [greedy(config, seed, prompt) for prompt in token_ids]
    return Reading(
        token_ids=token_ids,
        logits=logits,
        generated=np.stack([row[0] for row in rows]).astype(np.int32),
        margins=np.stack([row[1] for row in rows]),
        router_gap=min(gap, *(row[2] for row in rows)),
    )


def search(case: Case) -> tuple[int, Reading]:
    """The first seed without a flaw, and its reading. Raises RuntimeError when there is none."""
    flaws = []
    for seed in range(NUM_SEEDS):
        reading = read(case, seed)
        flaw = reading.flaw()
        if flaw is None:
            return seed, reading
        flaws.append(flaw)
    raise RuntimeError(f"{case.name}: no good seed among {NUM_SEEDS}; the last flaws were {flaws[-5:]}")


def effects(case: Case, seed: int, reading: Reading) -> Iterator[tuple[str, float]]:
    """Each option and the largest change of a logit without it. Raises RuntimeError when one does not matter."""
    for key, changes in case.without.items():
        changed, _ = forward_logits(case.hf_config(changes), seed, reading.token_ids)
        effect = float(np.abs(changed - reading.logits).max())
        if effect < MIN_EFFECT:
            raise RuntimeError(f"{case.name}: {key} changes the logits by {effect:.4f} only; choose stronger values")
        yield key, effect


def first_difference(case: Case, seed: int, reading: Reading) -> int | None:
    """First step at which the model would choose another token without its KV cache (dynamic embeddings may)."""
    rows = [greedy(case.hf_config(), seed, prompt, use_cache=False)[0] for prompt in reading.token_ids]
    steps = np.flatnonzero((np.stack(rows) != reading.generated).any(axis=0))
    return int(steps[0]) if len(steps) else None


def as_version_4(config: Mapping[str, Any], legacy: Mapping[str, Any]) -> dict[str, Any]:
    """config.json in the spelling of transformers 4, as checkpoints of 2025 have it."""
    old = dict(config)
    scaling = dict(old.pop("rope_parameters"))
    old["rope_theta"] = scaling.pop("rope_theta")
    old["rope_scaling"] = None if scaling["rope_type"] == "default" else scaling
    if scaling["rope_type"] == "linear":
        scaling["type"] = scaling.pop("rope_type")  # the older key of the same meaning
    old["num_experts"] = old.pop("num_local_experts")
    old["torch_dtype"] = old.pop("dtype")
    old["max_window_layers"] = old["num_hidden_layers"]
    old["transformers_version"] = "4.57.1"
    return dict(sorted((old | dict(legacy)).items()))


def save(case: Case, seed: int, reading: Reading, folder: Path) -> None:
    """Writes the checkpoint and golden.npz, and reads the checkpoint back: its logits must be the same to the bit."""
    shutil.rmtree(folder, ignore_errors=True)
    fresh_model(case.hf_config(), seed).save_pretrained(folder, max_shard_size=case.shard_size)
    if case.version == 4:
        path = folder / "config.json"
        config = as_version_4(json.loads(path.read_text()), case.legacy)
        path.write_text(json.dumps(config, indent=2) + "\n")
    np.savez_compressed(
        folder / "golden.npz",
        token_ids=reading.token_ids,
        logits=reading.logits,
        generated=reading.generated,
        margins=reading.margins,
        router_gap=reading.router_gap,
        seed=seed,
        transformers=transformers.__version__,
        torch=torch.__version__,
    )
    check_reload(folder, reading)


def check_reload(folder: Path, reading: Reading) -> None:
    model = Qwen3MoeForCausalLM.from_pretrained(
        folder, attn_implementation="eager", experts_implementation="eager", dtype=torch.float32
    ).eval()
    with torch.no_grad():
        logits = model(torch.from_numpy(reading.token_ids).long(), use_cache=False).logits.numpy()
    if not np.array_equal(logits, reading.logits):
        raise RuntimeError(f"{folder}: reads back differently, by {np.abs(logits - reading.logits).max()}")


def make(case: Case, folder: Path) -> str:
    """Writes one case and returns a line about it."""
    seed, reading = search(case)
    matters = ", ".join(f"{key} {effect:.2f}" for key, effect in effects(case, seed, reading))
    save(case, seed, reading, folder)
    distinct = [len(np.unique(row)) for row in reading.generated]
    size = sum(path.stat().st_size for path in folder.iterdir())
    return (
        f"{case.name:14} seed {seed:3} margin {reading.margins.min():.4f} router gap {reading.router_gap:.1e} "
        f"largest logit {np.abs(reading.logits).max():4.1f} distinct {distinct} {size // 1000} kB; "
        f"without: {matters}; uncached differs from step {first_difference(case, seed, reading)}"
    )


def make_demo(checkpoint: Path, file: Path) -> str:
    """Writes what Hugging Face's tokenizer and model make of two prompts, and returns a line about it."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    model = Qwen3MoeForCausalLM.from_pretrained(checkpoint, attn_implementation="eager", dtype=torch.float32).eval()
    made: dict[str, Any] = {"prompts": np.array(DEMO_PROMPTS)}
    margins = []
    for n, prompt in enumerate(DEMO_PROMPTS):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        with torch.no_grad():
            made[f"logits_{n}"] = model(ids, use_cache=False).logits[0, -NUM_DEMO_POSITIONS:].numpy()
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=NUM_NEW_TOKENS,
                return_dict_in_generate=True,
                output_logits=True,
            )
        best = torch.cat(out.logits).topk(2, dim=-1).values
        margins.append(float((best[:, 0] - best[:, 1]).min()))
        made |= {f"token_ids_{n}": ids[0].numpy(), f"generated_{n}": out.sequences[0, ids.shape[1] :].numpy()}
    if min(margins) < MIN_MARGIN:
        raise RuntimeError(f"greedy margins {margins}; choose prompts whose answers do not hang on rounding")
    np.savez_compressed(file, **made, transformers=transformers.__version__, torch=torch.__version__)
    return f"{file}: margins {[round(margin, 4) for margin in margins]}, {file.stat().st_size // 1000} kB"


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes tests/golden/<case>/ with Hugging Face's own model.")
    parser.add_argument("names", nargs="*", help="cases to write (default: all)")
    parser.add_argument("--out", type=Path, default=Path("tests/golden"), help="folder of cases.toml (%(default)s)")
    parser.add_argument("--demo", type=Path, metavar="DIR", help="write demo.npz for the model there: jmoe/demo")
    args = parser.parse_args()
    cases = read_cases(args.out / "cases.toml")
    unknown = sorted(set(args.names) - {case.name for case in cases})
    if unknown:
        parser.error(f"no case {', '.join(unknown)}; there are {', '.join(case.name for case in cases)}")
    torch.set_num_threads(1)  # the order of sums, and so the bytes, must not depend on the machine
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if args.demo:
        print(make_demo(args.demo, args.out / "demo.npz"))
        return
    for case in cases:
        if not args.names or case.name in args.names:
            print(make(case, args.out / case.name), flush=True)


if __name__ == "__main__":
    main()
