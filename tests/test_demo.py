"""The model in the box: its files, that it runs with few slots as with all, and that it is the trained one it says."""

import ast
import json
from pathlib import Path

import numpy as np
import pytest

import jmoe
from jmoe import sources
from jmoe.config import ModelConfig
from jmoe.engine import Engine
from jmoe.evaluation import evaluate
from jmoe.training.config import TrainingConfig
from tools import demo_card
from tools.stdlib_corpus import read_files, stdlib_root

ROOT = Path(__file__).parent.parent
PROMPT = "def fibonacci(n):"


def load(slots: int, **runtime) -> Engine:
    return jmoe.load(None, jmoe.RuntimeConfig(expert_slots=slots, dtype="float32", measure_link=False, **runtime))


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JMOE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def facts() -> dict:
    return json.loads((sources.DEMO / "training.json").read_text(encoding="utf-8"))


def test_the_files_are_small_enough_to_come_along() -> None:
    sizes = {file.name: file.stat().st_size for file in sources.DEMO.iterdir()}
    assert sum(sizes.values()) <= 32e6
    assert max(sizes.values()) <= 15e6
    needed = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "README.md"}
    assert needed <= set(sizes)


def test_it_is_what_the_presets_make(facts: dict) -> None:
    assert ModelConfig.from_dict(facts["model"], "training.json") == ModelConfig.from_toml(
        ROOT / "configs/models/demo.toml"
    )
    assert TrainingConfig(**facts["training"]) == TrainingConfig.from_toml(ROOT / "configs/training/demo.toml")
    assert (sources.DEMO / "README.md").read_text(encoding="utf-8") == demo_card.card(facts)


def test_every_layer_uses_at_least_half_of_its_experts(facts: dict) -> None:
    for row in facts["routing"]["layers"]:
        assert row["effective_experts"] >= facts["model"]["num_experts"] / 2


def test_it_predicts_python_it_has_not_seen() -> None:
    """A few kilobytes of it, much of them prose; the card's figure is of all. Chance is 12 bits a token."""
    text = read_files(stdlib_root(), held_out=True)["heapq.py"][:6000]
    score = evaluate(load(64), [text])
    assert score.bits_per_byte < 2
    assert score.bits_per_token < 12 / 2


def test_few_slots_give_the_same_text() -> None:
    sampling = jmoe.SamplingParams(max_new_tokens=40, temperature=0.8, top_p=0.95, seed=3)
    few, everything = (load(slots, max_seq_len=128).generate([PROMPT], sampling).results()[0] for slots in (8, 64))
    np.testing.assert_array_equal(few.token_ids, everything.token_ids)


def test_what_it_writes_is_made_of_python_words() -> None:
    sampling = jmoe.SamplingParams(max_new_tokens=60, temperature=0.3, top_p=0.95, seed=0)
    text = load(64, max_seq_len=128).generate([PROMPT], sampling).results()[0].text
    assert any(word in text for word in ("return", "self", "def ", "if ")), text
    assert "\n    " in text
    body = (PROMPT + text).split("\n\n")[0]
    ast.parse(body)


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    """What Hugging Face's tokenizer and model make of two prompts (tools/make_golden.py --demo)."""
    with np.load(ROOT / "tests/golden/demo.npz") as file:
        return dict(file)


@pytest.mark.parametrize("n", [0, 1])
def test_tokens_logits_and_greedy_text_are_those_of_hugging_face(golden: dict[str, np.ndarray], n: int) -> None:
    engine = load(24, max_seq_len=128)
    assert engine.tokenizer is not None
    token_ids = engine.tokenizer.encode(str(golden["prompts"][n]))
    assert token_ids == golden[f"token_ids_{n}"].tolist()
    logits = golden[f"logits_{n}"]
    assert np.abs(engine.logits([token_ids])[0, -len(logits) :] - logits).max() <= 1e-3
    generated = golden[f"generated_{n}"].tolist()
    sampling = jmoe.SamplingParams(max_new_tokens=len(generated), temperature=0.0)
    assert list(engine.generate([token_ids], sampling).results()[0].token_ids) == generated
