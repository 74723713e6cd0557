"""ModelConfig and RopeConfig: what they accept, what they refuse and what they derive."""

import dataclasses
import re
from pathlib import Path

import pytest

from jmoe.config import ModelConfig, RopeConfig, RuntimeConfig

CONFIGS = Path(__file__).parents[1] / "configs" / "models"


@pytest.fixture
def tiny() -> ModelConfig:
    return ModelConfig.from_toml(CONFIGS / "tiny.toml")


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.stem)
def test_presets_are_valid_and_survive_a_dict(path: Path):
    config = ModelConfig.from_toml(path)
    assert ModelConfig.from_dict(config.to_dict(), "a test") == config


@pytest.mark.parametrize("path", sorted((CONFIGS.parent / "runtime").glob("*.toml")), ids=lambda path: path.stem)
def test_runtime_examples_are_valid(path: Path):
    assert RuntimeConfig.from_toml(path) != RuntimeConfig(), "an example that sets nothing"


def test_30b_is_as_large_as_the_real_one():
    config = ModelConfig.from_toml(CONFIGS / "qwen3-30b-a3b.toml")
    assert config.expert_bytes == 3 * 768 * 2048 * 2
    assert config.store_bytes == 48 * 128 * config.expert_bytes


def test_235b_is_as_large_as_the_real_one():
    config = ModelConfig.from_toml(CONFIGS / "qwen3-235b-a22b.toml")
    assert config.store_bytes == 94 * 128 * 3 * 1536 * 4096 * 2


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, (0, 1, 2, 3)),
        ({"decoder_sparse_step": 2}, (1, 3)),
        ({"mlp_only_layers": (0, 2)}, (1, 3)),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [1]}, (3,)),
    ],
)
def test_moe_layers(tiny: ModelConfig, changes: dict, expected: tuple[int, ...]):
    assert dataclasses.replace(tiny, **changes).moe_layers == expected


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vocab_size": 0}, "vocab_size=0"),
        ({"hidden_size": 64.0}, "hidden_size=64.0"),
        ({"num_experts_per_tok": 17}, "num_experts_per_tok=17 must not exceed num_experts=16"),
        ({"num_key_value_heads": 3}, "num_attention_heads=4 must be a multiple of num_key_value_heads=3"),
        ({"head_dim": 15}, "head_dim=15 must be even"),
        ({"dtype": "int8"}, "dtype='int8' is not one of float32, bfloat16, float16"),
        ({"sliding_window": 0}, "sliding_window=0 must be at least 1"),
        ({"mlp_only_layers": (4,)}, "mlp_only_layers=[4] are outside 0..3"),
        ({"decoder_sparse_step": 5}, "no layer is a mixture of experts"),
    ],
)
def test_bad_values_are_refused_by_name(tiny: ModelConfig, changes: dict, words: str):
    with pytest.raises(ValueError, match=re.escape(words)):
        dataclasses.replace(tiny, **changes)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"rope_type": "longrope"}, "rope_type='longrope' is not supported"),
        ({"theta": 0.0}, "theta=0.0 must be positive"),
        ({"rope_type": "linear"}, "needs a factor"),
        ({"rope_type": "yarn", "factor": 0.5}, "factor=0.5 must be at least 1"),
    ],
)
def test_bad_rope_is_refused_by_name(values: dict, words: str):
    with pytest.raises(ValueError, match=re.escape(words)):
        RopeConfig(**values)


def test_toml_problems_name_the_file(tmp_path: Path):
    text = (CONFIGS / "tiny.toml").read_text()
    cases = {
        "unknown.toml": ("vocab_sise = 3\n" + text, "unknown key vocab_sise"),
        "missing.toml": (text.replace("vocab_size = 512", ""), "vocab_size"),
        "broken.toml": (text + "=", "not valid TOML"),
        "rope.toml": (text + "beta = 1\n", "unknown key beta"),
    }
    for name, (content, words) in cases.items():
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=words):
            ModelConfig.from_toml(tmp_path / name)
    with pytest.raises(ValueError, match=r"absent\.toml: no such file"):
        ModelConfig.from_toml(tmp_path / "absent.toml")
