"""Reading config.json in both spellings, refusing what is not supported, and the table of tensor names."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jmoe.config import ModelConfig, RopeConfig
from jmoe.model import families

ROOT = Path(__file__).parents[1]
RELEASED: dict[str, Any] = {  # what Qwen3-30B-A3B carries, key for key
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "decoder_sparse_step": 1,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def read(**changes: Any) -> ModelConfig:
    return families.read_hf_config(RELEASED | changes, "config.json")


def newer(hf: dict[str, Any]) -> dict[str, Any]:
    """The same configuration, spelt as transformers 5 does."""
    old = {"num_experts", "rope_theta", "rope_scaling", "torch_dtype"}
    rope = {"rope_type": "default", "rope_theta": hf["rope_theta"]} | (hf["rope_scaling"] or {})
    renamed = {"num_local_experts": hf["num_experts"], "rope_parameters": rope, "dtype": hf["torch_dtype"]}
    return {key: value for key, value in hf.items() if key not in old} | renamed


def test_released_config_is_the_preset():
    assert read() == ModelConfig.from_toml(ROOT / "configs/models/qwen3-30b-a3b.toml")


@pytest.mark.parametrize(
    "scaling",
    [
        None,
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "dynamic", "factor": 2},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768, "truncate": False},
    ],
)
def test_both_spellings_mean_the_same(scaling: dict[str, Any] | None):
    hf = RELEASED | {"rope_scaling": scaling}
    assert families.read_hf_config(newer(hf), "new") == families.read_hf_config(hf, "old")


@pytest.mark.parametrize("spelling", ["transformers-4", "transformers-5"])
@pytest.mark.parametrize("rope_type", ["default", "linear", "dynamic", "yarn"])
def test_to_hf_config_is_read_back(spelling: families.Spelling, rope_type: str):
    rope = RopeConfig(rope_type=rope_type, theta=5e5, factor=None if rope_type == "default" else 3.0)
    if rope_type == "yarn":
        rope = dataclasses.replace(rope, original_max_position_embeddings=99, mscale=2.0, beta_fast=8.0, truncate=False)
    config = dataclasses.replace(read(), rope=rope, sliding_window=77, mlp_only_layers=(1, 5), dtype="float16")
    written = json.loads(json.dumps(families.to_hf_config(config, spelling)))
    assert families.read_hf_config(written, "written") == config
    assert ("num_experts" in written) == (spelling == "transformers-4")


def test_released_spelling_is_the_default():
    assert families.to_hf_config(read()).items() <= RELEASED.items()


def test_missing_keys_mean_what_they_mean_in_transformers():
    config = families.read_hf_config({"model_type": "qwen3_moe"}, "bare")
    assert (config.hidden_size, config.num_experts, config.num_experts_per_tok) == (2048, 128, 8)
    assert config.head_dim == 2048 // 32
    assert config.norm_topk_prob is False
    assert config.rope == RopeConfig(rope_type="default", theta=10000.0)
    assert config.dtype == "float32"
    assert config.sliding_window is None


def test_sliding_window_counts_only_if_used():
    assert read(sliding_window=4096).sliding_window is None
    assert read(sliding_window=64, use_sliding_window=True).sliding_window == 64
    assert read(sliding_window=None, use_sliding_window=True).sliding_window is None
    without = {key: value for key, value in RELEASED.items() if key != "sliding_window"}
    assert families.read_hf_config(without | {"use_sliding_window": True}, "x").sliding_window == 4096


def test_yarn_defaults():
    rope = read(rope_scaling={"type": "yarn", "factor": 4.0, "beta_fast": None, "beta_slow": 0}).rope
    assert rope == RopeConfig(rope_type="yarn", theta=1e6, factor=4.0, original_max_position_embeddings=40960)
    rope = read(rope_scaling={"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 10240}).rope
    assert rope.factor == 4.0


def test_harmless_keys_are_accepted():
    same = read(layer_types=["full_attention"] * 48, quantization_config=None, something_new=None, pad_token_id=3)
    assert same == read()
    assert read(partial_rotary_factor=1.0, torch_dtype="float16").dtype == "float16"
    assert families.read_hf_config(RELEASED, "x", dtype="float32").dtype == "float32"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_act": "gelu"}, "hidden_act='gelu' (only 'silu' is supported)"),
        ({"quantization_config": {"bits": 4}}, "quantization_config={'bits': 4} (unknown to jmoe"),
        ({"shared_expert_intermediate_size": 512}, "shared_expert_intermediate_size=512"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 (only 1.0 is supported)"),
        ({"something_new": 0}, "something_new=0 (unknown to jmoe"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "rope_scaling.rope_type='longrope'"),
        ({"rope_scaling": {"type": "llama3", "factor": 2.0}}, "supported: default, linear, dynamic, yarn"),
        ({"rope_scaling": {"rope_type": "linear", "type": "yarn", "factor": 2.0}}, "rope_scaling.rope_type='linear'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "needs a factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "2"}}, "rope_scaling.factor='2' (expected a number)"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0, "beta_fast": 8}}, "rope_scaling.beta_fast=8"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "truncate": None}}, "rope_scaling.truncate=None"),
        ({"rope_scaling": {"rope_type": "yarn", "original_max_position_embeddings": -1}}, "original_max_position_emb"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "contradicts rope_scaling.rope"),
        ({"rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": {"rope_theta": 1e6}}, "leave one of"),
        ({"rope_scaling": ["yarn"]}, "expected a table of options"),
        ({"layer_types": ["sliding_attention"] * 48}, "'full_attention' in every layer"),
        ({"layer_types": ["full_attention"]}, "layer_types="),
        ({"num_local_experts": 64}, "num_experts=128 (contradicts num_local_experts=64"),
        ({"vocab_size": "151936"}, "vocab_size='151936' (expected a whole number)"),
        ({"norm_topk_prob": 1}, "norm_topk_prob=1 (expected true or false)"),
        ({"mlp_only_layers": [0.5]}, "mlp_only_layers=[0.5] (expected a list of whole numbers)"),
        ({"num_experts_per_tok": 129}, "config.json: num_experts_per_tok=129 must not exceed"),
        ({"torch_dtype": "float64"}, "dtype='float64'"),
        ({"architectures": ["Qwen3MoeForSequenceClassification"]}, "expected 'Qwen3MoeForCausalLM'"),
        ({"model_type": "llama"}, "model_type='llama' is not supported; jmoe runs qwen3_moe"),
        ({"model_type": None}, "model_type=None is not supported"),
    ],
)
def test_unsupported_options_are_refused_by_name(changes: dict[str, Any], words: str):
    with pytest.raises(ValueError, match=re.escape(words)):
        read(**changes)


def test_all_unsupported_options_are_listed_at_once():
    with pytest.raises(ValueError, match=r"3 option\(s\)") as caught:
        read(hidden_act="relu", n_shared_experts=1, rope_scaling={"rope_type": "longrope"})
    assert all(word in str(caught.value) for word in ("relu", "n_shared_experts=1", "longrope"))


def odd_config(**changes: Any) -> ModelConfig:
    """A small model of which no two dimensions are the same."""
    sizes = dict(vocab_size=41, hidden_size=20, intermediate_size=28, moe_intermediate_size=12, num_hidden_layers=3)
    heads = dict(num_attention_heads=6, num_key_value_heads=3, head_dim=8, num_experts=5, num_experts_per_tok=2)
    return ModelConfig(**(sizes | heads | dict(mlp_only_layers=(1,), attention_bias=True, dtype="float32") | changes))


@pytest.mark.parametrize("layout", ["per_expert", "fused"])
def test_pieces_fill_their_leaf_exactly_and_come_back(layout: families.Layout):
    values = np.random.default_rng(0)
    for leaf in families.all_leaves(odd_config(), layout):
        tensors = {piece.name: values.standard_normal(piece.shape, np.float32) for piece in leaf.pieces}
        array = np.full(leaf.shape, np.nan, np.float32)
        for piece in leaf.pieces:
            assert np.isnan(array[piece.index]).all(), f"{piece.name} overlaps another"
            piece.put(array, tensors[piece.name])
        assert not np.isnan(array).any(), f"{leaf.path} is not filled"
        for piece in leaf.pieces:
            np.testing.assert_array_equal(piece.take(array), tensors[piece.name])


def test_expert_block_is_gate_up_and_transposed_down():
    leaf = families.expert_leaf(odd_config(), 2)
    pieces = {piece.name: piece for piece in leaf.pieces}
    prefix = "model.layers.2.mlp.experts.3."
    down = np.arange(20 * 12, dtype=np.float32).reshape(20, 12)
    array = np.zeros(leaf.shape, np.float32)
    pieces[prefix + "down_proj.weight"].put(array, down)
    pieces[prefix + "up_proj.weight"].put(array, np.full((12, 20), 7, np.float32))
    np.testing.assert_array_equal(array[3, 2], down.T)
    assert (array[3, 1] == 7).all()
    assert not array[3, 0].any()
    assert leaf.shape == (5, 3, 12, 20)
    assert leaf.expert_layer == 2


def test_trunk_shapes():
    shapes = families.trunk_shapes(odd_config())
    assert shapes["layers/0/attention/qkv_proj/kernel"] == ((6 + 2 * 3) * 8, 20)
    assert shapes["layers/0/attention/qkv_proj/bias"] == ((6 + 2 * 3) * 8,)
    assert shapes["layers/0/attention/o_proj/kernel"] == (20, 6 * 8)
    assert shapes["layers/2/router/kernel"] == (5, 20)
    assert shapes["layers/1/mlp/gate_up_proj/kernel"] == (2 * 28, 20)
    assert shapes["layers/1/mlp/down_proj/kernel"] == (20, 28)
    assert shapes["lm_head/kernel"] == (41, 20)
    assert "layers/1/router/kernel" not in shapes
    assert "layers/0/mlp/down_proj/kernel" not in shapes
    assert "lm_head/kernel" not in families.trunk_shapes(odd_config(tie_word_embeddings=True))
    assert not [path for path in families.trunk_shapes(odd_config(attention_bias=False)) if path.endswith("bias")]


def test_no_tensor_is_named_twice():
    names = [piece.name for leaf in families.all_leaves(odd_config()) for piece in leaf.pieces]
    assert len(names) == len(set(names))
