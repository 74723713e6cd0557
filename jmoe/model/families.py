"""What is special about each model family, in one row of `FAMILIES`: its config.json and the names of its tensors.

A further family (Mixtral, OLMoE, …) is a further row, not a branch: read the row of Qwen3-MoE as the example.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from jmoe.config import ModelConfig
from jmoe.model import tensors
from jmoe.model.hf_config import ConfigKey, Spelling, fields_of, keys_of
from jmoe.model.tensors import ExpertLayouts, ExpertRule, Leaf, TrunkRule

Layout = Literal["per_expert", "fused"]


@dataclasses.dataclass(frozen=True)
class Family:
    """One model family: how its config.json is read and which tensors it has.

    `fixed` are options of which one value is supported; `ignored` are keys that do not change inference. Any other key
    that holds something is refused by name. `experts` has one entry for each way in which experts are stored.
    """

    model_type: str
    architecture: str
    keys: tuple[ConfigKey, ...]
    fixed: Mapping[str, Any]
    ignored: frozenset[str]
    trunk: tuple[TrunkRule, ...]
    experts: ExpertLayouts


def family_named(model_type: object, source: str = "configuration") -> Family:
    """The row of a `model_type`. Raises ValueError, with those that are supported, for any other."""
    for family in FAMILIES:
        if family.model_type == model_type:
            return family
    supported = ", ".join(f"{family.model_type} ({family.architecture})" for family in FAMILIES)
    raise ValueError(f"{source}: model_type={model_type!r} is not supported; jmoe runs {supported}")


def read_hf_config(hf: Mapping[str, Any], source: str, dtype: str | None = None) -> ModelConfig:
    """ModelConfig of a parsed config.json, in the spelling of transformers 4 or 5; `dtype` overrides the stored one.

    Missing keys mean what they mean in transformers. Raises ValueError for an unknown family, and one that lists every
    option that is unsupported, contradictory or of the wrong type. `source` says in messages where `hf` comes from.
    """
    family = family_named(hf.get("model_type"), source)
    architectures = hf.get("architectures") or [family.architecture]
    if family.architecture not in architectures:
        raise ValueError(f"{source}: architectures={architectures} is not supported; expected {family.architecture!r}")
    fields, refused = fields_of(hf, family.keys, family.fixed, family.ignored)
    if refused:
        raise ValueError(f"{source}: {len(refused)} option(s) that jmoe does not support: {'; '.join(refused)}")
    try:
        return ModelConfig(**(fields | {"model_type": family.model_type, "dtype": dtype or fields["dtype"]}))
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def to_hf_config(config: ModelConfig, spelling: Spelling = "transformers-4") -> dict[str, Any]:
    """The config.json of a model, which `read_hf_config` reads back. Released ones have transformers 4's spelling."""
    family = family_named(config.model_type)
    head = {"architectures": [family.architecture], "model_type": family.model_type}
    return head | dict(family.fixed) | keys_of(config, family.keys, spelling)


def layer_leaves(config: ModelConfig, layer: int | None) -> list[Leaf]:
    """The trunk's leaves of one decoder layer; with None those outside of the decoder layers."""
    return tensors.trunk_leaves(family_named(config.model_type).trunk, config, layer)


def expert_leaf(config: ModelConfig, layer: int, layout: Layout = "per_expert") -> Leaf:
    """The experts of one MoE layer, [E, 3, F, D], and the tensors that make them up in this layout."""
    return tensors.expert_leaf(family_named(config.model_type).experts[layout], config, layer)


def all_leaves(config: ModelConfig, layout: Layout = "per_expert") -> list[Leaf]:
    """Every leaf of the model, in the order of converting and exporting: the decoder layers, then the rest."""
    leaves = []
    for layer in range(config.num_hidden_layers):
        leaves += layer_leaves(config, layer)
        if layer in config.moe_layers:
            leaves.append(expert_leaf(config, layer, layout))
    return leaves + layer_leaves(config, None)


def trunk_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the trunk's leaves by flat path."""
    layers = [None, *range(config.num_hidden_layers)]
    return {leaf.path: leaf.shape for layer in layers for leaf in layer_leaves(config, layer)}


_QWEN3_MOE = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    keys=(
        ConfigKey("vocab_size", int, 151936),
        ConfigKey("hidden_size", int, 2048),
        ConfigKey("intermediate_size", int, 6144),
        ConfigKey("moe_intermediate_size", int, 768),
        ConfigKey("num_hidden_layers", int, 24),
        ConfigKey("num_attention_heads", int, 32),
        ConfigKey("num_key_value_heads", int, 4),
        ConfigKey("head_dim", int, None),
        ConfigKey("num_experts", int, 128, transformers_5="num_local_experts"),
        ConfigKey("num_experts_per_tok", int, 8),
        ConfigKey("norm_topk_prob", bool, False),
        ConfigKey("decoder_sparse_step", int, 1),
        ConfigKey("mlp_only_layers", list, None),
        ConfigKey("attention_bias", bool, False),
        ConfigKey("tie_word_embeddings", bool, False),
        ConfigKey("rms_norm_eps", float, 1e-6),
        ConfigKey("max_position_embeddings", int, 32768),
        ConfigKey("sliding_window", int, 4096, nullable=True),
        ConfigKey("torch_dtype", str, None, transformers_5="dtype"),
    ),
    fixed={"hidden_act": "silu"},
    ignored=frozenset(
        "architectures model_type transformers_version _name_or_path _attn_implementation _attn_implementation_autoset "
        "_experts_implementation attn_implementation experts_implementation auto_map torchscript "
        "attention_dropout initializer_range use_cache output_router_logits router_aux_loss_coef max_window_layers "
        "bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id id2label label2id problem_type "
        "num_labels return_dict output_hidden_states output_attentions chunk_size_feed_forward "
        "finetuning_task task_specific_params tokenizer_class base_model_tp_plan base_model_pp_plan".split()
    ),
    trunk=(
        TrunkRule("embed/embedding", (("model.embed_tokens.weight", "V"),), "D", "model"),
        TrunkRule("norm/scale", (("model.norm.weight", "D"),), None, "model"),
        TrunkRule("lm_head/kernel", (("lm_head.weight", "V"),), "D", "model", unless="tie_word_embeddings"),
        TrunkRule(
            "layers/{layer}/input_norm/scale", (("model.layers.{layer}.input_layernorm.weight", "D"),), None, "layer"
        ),
        TrunkRule(
            "layers/{layer}/attention/qkv_proj/kernel",
            (
                ("model.layers.{layer}.self_attn.q_proj.weight", "NH"),
                ("model.layers.{layer}.self_attn.k_proj.weight", "KH"),
                ("model.layers.{layer}.self_attn.v_proj.weight", "KH"),
            ),
            "D",
            "layer",
        ),
        TrunkRule(
            "layers/{layer}/attention/qkv_proj/bias",
            (
                ("model.layers.{layer}.self_attn.q_proj.bias", "NH"),
                ("model.layers.{layer}.self_attn.k_proj.bias", "KH"),
                ("model.layers.{layer}.self_attn.v_proj.bias", "KH"),
            ),
            None,
            "layer",
            when="attention_bias",
        ),
        TrunkRule(
            "layers/{layer}/attention/o_proj/kernel",
            (("model.layers.{layer}.self_attn.o_proj.weight", "D"),),
            "NH",
            "layer",
        ),
        TrunkRule(
            "layers/{layer}/attention/o_proj/bias",
            (("model.layers.{layer}.self_attn.o_proj.bias", "D"),),
            None,
            "layer",
            when="attention_bias",
        ),
        TrunkRule(
            "layers/{layer}/attention/q_norm/scale",
            (("model.layers.{layer}.self_attn.q_norm.weight", "H"),),
            None,
            "layer",
        ),
        TrunkRule(
            "layers/{layer}/attention/k_norm/scale",
            (("model.layers.{layer}.self_attn.k_norm.weight", "H"),),
            None,
            "layer",
        ),
        TrunkRule(
            "layers/{layer}/post_attention_norm/scale",
            (("model.layers.{layer}.post_attention_layernorm.weight", "D"),),
            None,
            "layer",
        ),
        TrunkRule("layers/{layer}/router/kernel", (("model.layers.{layer}.mlp.gate.weight", "E"),), "D", "moe_layer"),
        TrunkRule(
            "layers/{layer}/mlp/gate_up_proj/kernel",
            (("model.layers.{layer}.mlp.gate_proj.weight", "I"), ("model.layers.{layer}.mlp.up_proj.weight", "I")),
            "D",
            "dense_layer",
        ),
        TrunkRule(
            "layers/{layer}/mlp/down_proj/kernel",
            (("model.layers.{layer}.mlp.down_proj.weight", "D"),),
            "I",
            "dense_layer",
        ),
    ),
    experts={
        "per_expert": (
            ExpertRule("model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight", 0),
            ExpertRule("model.layers.{layer}.mlp.experts.{expert}.up_proj.weight", 1),
            ExpertRule("model.layers.{layer}.mlp.experts.{expert}.down_proj.weight", 2, transposed=True),
        ),
        "fused": (
            ExpertRule("model.layers.{layer}.mlp.experts.gate_up_proj", 0, num_parts=2),
            ExpertRule("model.layers.{layer}.mlp.experts.down_proj", 2, transposed=True),
        ),
    },
)

FAMILIES = (_QWEN3_MOE,)
