"""tools/train_demo.py at toy size: what it writes, that a kill does no harm, and what it refuses."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import jmoe
from jmoe.hf_files import read_shards
from tests.models import SMALL
from tools import train_demo
from tools.stdlib_corpus import read_files, stdlib_root

ROOT = Path(__file__).parent.parent
FILES = ("heapq.py", "bisect.py", "json/decoder.py", "abc.py", "glob.py", "fnmatch.py", "keyword.py", "types.py")
VOCAB_SIZE = 300


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options for a toy model on a few files."""
    directory = tmp_path_factory.mktemp("toy")
    for name in FILES:
        (directory / "lib" / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / "lib" / name).write_text((stdlib_root() / name).read_text(encoding="utf-8"), encoding="utf-8")
    sizes = "hidden_size intermediate_size moe_intermediate_size num_hidden_layers num_attention_heads".split()
    sizes += "num_key_value_heads head_dim num_experts num_experts_per_tok".split()
    lines = [f"{name} = {getattr(SMALL, name)}" for name in sizes]
    lines += [f"vocab_size = {VOCAB_SIZE}", 'dtype = "float32"', "norm_topk_prob = true"]
    (directory / "model.toml").write_text("\n".join(lines) + "\ntie_word_embeddings = true\n")
    lines = ["num_steps = 12", "batch_size = 2", "sequence_length = 32", "warmup_steps = 2", "eval_every = 3"]
    (directory / "training.toml").write_text("\n".join([*lines, "checkpoint_every = 3", "patience = 9"]) + "\n")
    names = {"--config": "model.toml", "--training": "training.toml", "--stdlib-root": "lib"}
    return [text for option, name in names.items() for text in (option, str(directory / name))]


@pytest.fixture(scope="module")
def trained(inputs: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    destination = tmp_path_factory.mktemp("trained") / "model"
    assert train_demo.main([str(destination), *inputs]) == 0
    return destination


def test_the_held_out_files_are_not_trained_on(inputs: list[str]) -> None:
    root = Path(inputs[-1])
    train, held_out = (read_files(root, held_out=held) for held in (False, True))
    assert sorted(held_out) == ["bisect.py", "heapq.py", "json/decoder.py"]
    assert sorted(train) == ["abc.py", "fnmatch.py", "glob.py", "keyword.py", "types.py"]


def test_what_is_written_can_be_loaded_and_used(trained: Path) -> None:
    engine = jmoe.load(trained, jmoe.RuntimeConfig(expert_slots=4, max_seq_len=64, measure_link=False))
    text = "def f(x):\n    return x\n"
    assert engine.tokenizer is not None
    assert engine.tokenizer.decode(engine.tokenizer.encode(text)) == text
    assert engine.eos_ids == (engine.tokenizer.inner.token_to_id("<|endoftext|>"),)
    assert engine.generate([text], jmoe.SamplingParams(max_new_tokens=4)).results()[0].token_ids


def test_the_card_and_the_facts_say_what_was_done(trained: Path) -> None:
    facts = json.loads((trained / "training.json").read_text())
    card = (trained / "README.md").read_text()
    assert facts["data"]["num_train_files"] == 5
    assert [evaluation["step"] for evaluation in facts["evaluations"]] == [3, 6, 9, 12]
    best = min(facts["evaluations"], key=lambda evaluation: evaluation["held_out_bits_per_byte"])
    assert facts["best"] == best
    assert f"**{best['held_out_bits_per_byte']:.3f} bits a byte**" in card
    assert facts["data"]["train_sha256"] in card
    assert len(facts["routing"]["layers"]) == SMALL.num_hidden_layers  # mlp_only_layers is left out: all are sparse
    assert card.count("\n| ") == 1 + SMALL.num_hidden_layers, "a heading and a row a layer"


def test_a_killed_run_goes_on_to_the_same_model(inputs: list[str], trained: Path, tmp_path: Path) -> None:
    destination = tmp_path / "model"
    command = [sys.executable, "-m", "tools.train_demo", str(destination), *inputs]
    same = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # as the tests run: same bits
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, cwd=ROOT, env=same, **silent)
    checkpoints = tmp_path / "model.training" / "checkpoints"
    deadline = time.monotonic() + 120
    while not (checkpoints.is_dir() and any(entry.name.isdigit() for entry in checkpoints.iterdir())):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not destination.exists(), "killed while it trained"
    assert train_demo.main([str(destination), *inputs]) == 0
    for file in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (destination / file).read_bytes() == (trained / file).read_bytes()


def test_one_expert_does_as_much_for_a_token(inputs: list[str], tmp_path: Path) -> None:
    assert train_demo.main([str(tmp_path / "dense"), "--one-expert", "--steps", "3", *inputs]) == 0
    facts = json.loads((tmp_path / "dense" / "training.json").read_text())
    assert facts["model"]["moe_intermediate_size"] == SMALL.num_experts_per_tok * SMALL.moe_intermediate_size
    assert facts["num_parameters"] == facts["num_active_parameters"]
    shapes = {name: info.shape for name, info in read_shards(tmp_path / "dense").tensors.items()}
    assert shapes["model.layers.0.mlp.gate.weight"] == (1, SMALL.hidden_size)


def test_flops_count_what_a_token_meets() -> None:
    training = train_demo.TrainingConfig(num_steps=1, warmup_steps=0, sequence_length=10)
    few, all_of_them = (train_demo.flops_per_token(SMALL, training, all_experts=every) for every in (False, True))
    expert = int(np.prod(SMALL.expert_shape))
    assert all_of_them - few == 6 * len(SMALL.moe_layers) * expert * (SMALL.num_experts - SMALL.num_experts_per_tok)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--stdlib-root", "nowhere"], "nowhere: no Python file of the standard library; expected its root"),
        (["--steps", "1"], "warmup_steps=2 must be below num_steps=1"),
        (["--training", "nothing.toml"], "nothing.toml: no such file"),
    ],
)
def test_bad_input_is_one_line(inputs: list[str], tmp_path: Path, capsys, changes: list[str], message: str) -> None:
    assert train_demo.main([str(tmp_path / "model"), *inputs, *changes]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_destination_that_is_there_is_refused(inputs: list[str], trained: Path, capsys) -> None:
    assert train_demo.main([str(trained), *inputs]) == 2
    assert "already there" in capsys.readouterr().err


def test_too_little_text_for_the_vocabulary_is_refused(inputs: list[str], tmp_path: Path, capsys) -> None:
    text = Path(inputs[1]).read_text().replace(f"vocab_size = {VOCAB_SIZE}", "vocab_size = 60000")
    (tmp_path / "large.toml").write_text(text)
    assert train_demo.main([str(tmp_path / "model"), *inputs, "--config", str(tmp_path / "large.toml")]) == 2
    assert "not vocab_size=60000; give more text or lower vocab_size" in capsys.readouterr().err
