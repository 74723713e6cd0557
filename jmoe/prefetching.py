"""Prefetching in the engine: how many rows decode steps bring early."""

from jmoe import memory
from jmoe.config import ModelConfig, RuntimeConfig
from jmoe.experts import look_ahead


def prefetch_rows(config: ModelConfig, runtime: RuntimeConfig, plan: memory.MemoryPlan) -> int:
    """Rows of D values in each layer, as `runtime` asks for, at least one; 0 where no step prefetches."""
    if runtime.prefetch == "off" or plan.layout.all_resident:
        return 0
    rows_of_expert = 3 * config.moe_intermediate_size
    return max(1, round(runtime.prefetch_experts * rows_of_expert))


def pays(config: ModelConfig, plan: memory.MemoryPlan, num_sequences: int) -> bool:
    """Whether decode steps of so many sequences have anything to prefetch for."""
    return look_ahead.pays(plan.layout, num_sequences * config.num_experts_per_tok)


def prefetching_line(config: ModelConfig, runtime: RuntimeConfig, plan: memory.MemoryPlan) -> str:
    """What is prefetched, or why nothing is, for people."""
    layout, rows = plan.layout, prefetch_rows(config, runtime, plan)
    if not rows:
        return "prefetch: none is needed, every expert is resident"
    rows_of_expert = 3 * config.moe_intermediate_size
    size = memory.format_bytes(layout.num_layers * rows * config.expert_bytes // rows_of_expert)
    line = f"prefetch of {rows / rows_of_expert:.3g} experts a layer, at most {size} a step, while attention runs"
    if pays(config, plan, plan.batch_size):
        return line
    most = min(plan.batch_size * config.num_experts_per_tok, layout.num_experts)
    return (
        f"{line}; not for {plan.batch_size} sequences together, which may ask for {most} experts of a layer of "
        f"{layout.slots_per_layer} slots"
    )
