"""What an engine says of itself when it starts, for people."""

import jax

from jmoe import memory
from jmoe.config import ModelConfig, RuntimeConfig
from jmoe.experts.experience import num_bytes
from jmoe.memory_plan import MemoryPlan
from jmoe.model.kv_cache import kv_shape
from kernels_pallas import backends
from kernels_pallas.admit import api as admit_api
from kernels_pallas.chunk_attention import api as chunk_attention_api
from kernels_pallas.decode_attention import api as decode_attention_api
from kernels_pallas.expert_mlp import api as expert_mlp_api
from kernels_pallas.fetch import api as fetch_api
from kernels_pallas.norm_linear import api as norm_linear_api
from kernels_pallas.prefetch import api as prefetch_api
from kernels_pallas.route import api as route_api


def device_line(config: ModelConfig, runtime: RuntimeConfig, plan: MemoryPlan) -> str:
    """The device and which implementation of each kernel runs on it, and why if that is not the fastest.

    Those of a decode step, and the attention of a whole chunk of prefill.
    """
    name, batch, heads = runtime.implementation, plan.batch_size, config.num_attention_heads

    def array(*shape: int, dtype: str = config.dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    rows, slots = array(batch, config.hidden_size), array(plan.layout.slots_per_layer, *config.expert_shape)
    qkv = array(batch, (heads + 2 * config.num_key_value_heads) * config.head_dim)
    qkv_kernel = array(qkv.shape[1], config.hidden_size)
    keys = array(*kv_shape(config, batch, plan.max_seq_len))
    queries = array(batch, plan.prefill_chunk, heads, config.head_dim)
    choices, experts = array(batch, config.num_experts_per_tok, dtype="int32"), array(config.num_experts, dtype="int32")
    chosen = {
        "route": route_api.choose(name, array(batch, config.num_experts, dtype="float32")),
        "admit": admit_api.choose(name, choices, experts),
        "fetch": fetch_api.resolve(name),
        "expert_mlp": expert_mlp_api.choose(name, rows, slots),
        "decode_attention": decode_attention_api.choose(name, qkv, keys, heads),
        "chunk_attention": chunk_attention_api.choose(name, queries, keys),
        "norm_linear": norm_linear_api.choose(name, rows, qkv_kernel),
    }
    if runtime.most_prefetched:
        chosen["prefetch"] = prefetch_api.resolve(name)
    problem = backends.mosaic_gpu_problem()
    why = f" ({problem})" if problem and name is None else ""
    names = {each: ", ".join(op for op in chosen if chosen[op] == each) for each in chosen.values()}
    kernels = "; ".join(f"{each} for {operations}" for each, operations in names.items())
    return f"device {jax.devices()[0].device_kind}; kernels: {kernels}{why}"


def policy_line(policy: str, runtime: RuntimeConfig, plan: MemoryPlan) -> str:
    """Which residency policy, and what it takes."""
    layout, chosen = plan.layout, "" if runtime.residency_policy else ", chosen automatically"
    if layout.all_resident:
        return "residency policy: none is needed, every expert is resident"
    size = num_bytes(policy, layout.num_layers, layout.num_experts)
    return f"residency policy {policy} ({memory.format_bytes(size)} of device memory{chosen})"
