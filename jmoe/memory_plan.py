"""The memory plan: what goes where, in bytes, before anything is loaded."""

import dataclasses

import jax

from jmoe.config import DTYPE_BYTES, ModelConfig, RuntimeConfig
from jmoe.experts.experience import num_bytes
from jmoe.experts.policies import DEFAULT_POLICY
from jmoe.experts.slots import SlotLayout
from jmoe.memory import HOST_LIMIT_VARIABLE, format_bytes, pinned_pool_bytes
from jmoe.model.kv_cache import kv_bytes, kv_shape
from kernels_pallas.chunk_attention import api as chunk_attention_api

DEFAULT_MAX_SEQ_LEN = 4096
STAGING_BYTES = 128 * 2**20  # two waves, each long enough to hide what is multiplied, its own start and its end
LEAST_PREFILL_CHUNK = 512  # tokens of a sequence
MOST_PREFILL_ROWS = 4096  # tokens of a batch
PREFILL_SHARE = 1 / 32  # of the device, that longer chunks may take


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """What goes where, bytes. Made before anything is loaded."""

    layout: SlotLayout
    batch_size: int
    max_seq_len: int
    prefill_chunk: int
    trunk_bytes: int
    slots_bytes: int
    staging_bytes: int
    kv_bytes: int
    workspace_bytes: int
    prefetch_bytes: int
    predictor_bytes: int
    store_bytes: int
    pinned_bytes: int
    device_limit_bytes: int
    host_limit_bytes: int

    @property
    def device_bytes(self) -> int:
        temporary = self.workspace_bytes + self.prefetch_bytes
        slots = self.slots_bytes + self.staging_bytes
        return self.trunk_bytes + self.predictor_bytes + slots + self.kv_bytes + temporary

    def lines(self) -> list[str]:
        """The plan for people."""
        layout = self.layout
        share = layout.slots_per_layer / layout.num_experts
        rows = [
            ("trunk", self.trunk_bytes, ""),
            (
                "expert slots",
                self.slots_bytes,
                f"{layout.slots_per_layer} of {layout.num_experts} a layer ({share:.1%})",
            ),
            ("staging slots", self.staging_bytes, f"2 x {layout.num_staging}, for all layers"),
            ("KV cache", self.kv_bytes, f"{self.batch_size} x {self.max_seq_len} positions"),
            ("workspace", self.workspace_bytes, f"prefill {self.prefill_chunk} tokens at a time"),
            *([("prefetch", self.prefetch_bytes, "")] if self.prefetch_bytes else []),
            *([("predictor", self.predictor_bytes, "")] if self.predictor_bytes else []),
            ("device", self.device_bytes, f"of {format_bytes(self.device_limit_bytes)}"),
            (
                "host (pinned)",
                self.pinned_bytes,
                f"of {format_bytes(self.host_limit_bytes)}; experts {format_bytes(self.store_bytes)}",
            ),
        ]
        return [f"  {name:<14}{format_bytes(size):>11}  {note}".rstrip() for name, size, note in rows]

    def to_dict(self) -> dict[str, int]:
        values = dataclasses.asdict(self)
        return {**values.pop("layout"), **values, "device_bytes": self.device_bytes}


def workspace_bytes(
    config: ModelConfig,
    batch_size: int,
    max_seq_len: int,
    prefill_chunk: int,
    most_draft_tokens: int = 0,
    implementation: str | None = "reference",
) -> int:
    """Temporaries of the larger of the steps, estimated from the arrays that live at the same time.

    A verification takes in a token more than are drafted, with logits of each. `implementation` is the decoder's.
    """
    item, verified = DTYPE_BYTES[config.dtype], most_draft_tokens + 1
    prefill_chunk = max(prefill_chunk, verified)
    rows = batch_size * prefill_chunk
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    # The automatic choice may do shorter chunks in a way that takes more memory.
    chunks = {prefill_chunk, min(prefill_chunk, chunk_attention_api.FEW_QUERIES), verified}
    attention = max(_attention_bytes(config, batch_size, max_seq_len, size, implementation) for size in chunks)
    qkv = rows * (heads + 2 * kv_heads) * config.head_dim * (item + 4)
    hidden = rows * config.hidden_size * (4 * item + 2 * 4)
    widest = max(config.moe_intermediate_size, config.intermediate_size if config.mlp_only_layers else 0)
    choices = rows * config.num_experts_per_tok
    groups = min(choices, config.num_experts)
    places = choices + 8 * groups + 128 if rows > 32 else 0  # rows gathered by expert, and their hidden values
    experts = rows * widest * 3 * 4 + groups * rows * 16 + places * (config.hidden_size + widest) * item
    logits = batch_size * verified * config.vocab_size * 4 * 6  # sampling sorts values and indices
    return max(max(attention, experts) + qkv + hidden + logits, _timed_bytes(config, batch_size, verified))


def _timed_bytes(config: ModelConfig, batch_size: int, verified: int) -> int:
    """What XLA takes while it compiles and times ways to multiply with the largest matrix: a third more than that.

    Of one row the head is no matrix product; and where something is verified, that has several.
    """
    head = config.vocab_size * config.hidden_size * DTYPE_BYTES[config.dtype]
    return 4 * head // 3 if batch_size * verified > 1 else 0


def _attention_bytes(
    config: ModelConfig, batch_size: int, max_seq_len: int, num_tokens: int, implementation: str | None
) -> int:
    """Temporaries of one layer's attention of a chunk of so many tokens a sequence."""
    queries = (batch_size, num_tokens, config.num_attention_heads, config.head_dim)
    shapes = queries, kv_shape(config, batch_size, max_seq_len)
    queries, keys = (jax.ShapeDtypeStruct(shape, config.dtype) for shape in shapes)
    return chunk_attention_api.workspace_bytes(implementation, queries, keys, config.sliding_window)


def plan_memory(
    config: ModelConfig,
    runtime: RuntimeConfig,
    *,
    trunk_bytes: int,
    device_limit_bytes: int | None,
    host_limit_bytes: int,
    calibration_bytes: int = 0,
) -> MemoryPlan:
    """Shares out memory; integers only, nothing is allocated.

    `calibration_bytes` are those on the device of what guesses are calibrated with, if anything guesses.
    `device_limit_bytes` None means that the device shares the host's memory. Raises ValueError, with the numbers and
    what to change, for a plan that cannot fit on the device or on the host.
    """
    max_seq_len = runtime.max_seq_len or min(DEFAULT_MAX_SEQ_LEN, config.max_position_embeddings)
    host_limit = min(runtime.host_memory_bytes or host_limit_bytes, host_limit_bytes)
    pinned = config.store_bytes if device_limit_bytes is None else pinned_pool_bytes(config)
    _require_host(config, pinned, host_limit)
    if device_limit_bytes is None:
        device_limit_bytes = host_limit_bytes - config.store_bytes
    device_limit = min(runtime.device_memory_bytes or device_limit_bytes, device_limit_bytes)
    prefill_chunk = runtime.prefill_chunk or _prefill_chunk(config, runtime, max_seq_len, device_limit)
    prefill_chunk = min(prefill_chunk, max_seq_len)
    staging = runtime.staging_slots or max(1, STAGING_BYTES // (2 * config.expert_bytes))
    staging = min(staging, -(-config.num_experts // 2))  # the other half comes in the next wave
    fixed = {
        "trunk": trunk_bytes,
        "staging slots": 2 * staging * config.expert_bytes,
        "KV cache": kv_bytes(config, runtime.batch_size, max_seq_len),
        "workspace": workspace_bytes(
            config,
            runtime.batch_size,
            max_seq_len,
            prefill_chunk,
            runtime.most_draft_tokens,
            implementation=runtime.implementation,
        ),
    }
    if runtime.execute_guess is not None:
        fixed["predictor"] = calibration_bytes
    slots = _slots_per_layer(config, runtime, device_limit, fixed)
    if runtime.most_prefetched and slots < config.num_experts:
        fixed["prefetch"] = 2 * runtime.most_prefetched * config.expert_bytes  # of this layer, and of the one before
        fixed["predictor"] = (calibration_bytes if runtime.looks_ahead else 0) + _watched_bytes(config, runtime)
        slots = _slots_per_layer(config, runtime, device_limit, fixed)
    layout = SlotLayout(
        num_layers=len(config.moe_layers), num_experts=config.num_experts, slots_per_layer=slots, num_staging=staging
    )
    return MemoryPlan(
        layout=layout,
        batch_size=runtime.batch_size,
        max_seq_len=max_seq_len,
        prefill_chunk=prefill_chunk,
        trunk_bytes=trunk_bytes,
        slots_bytes=layout.num_layers * slots * config.expert_bytes,
        staging_bytes=fixed["staging slots"],
        kv_bytes=fixed["KV cache"],
        workspace_bytes=fixed["workspace"],
        prefetch_bytes=fixed.get("prefetch", 0),
        predictor_bytes=fixed.get("predictor", 0),
        store_bytes=config.store_bytes,
        pinned_bytes=pinned,
        device_limit_bytes=device_limit,
        host_limit_bytes=host_limit,
    )


def _prefill_chunk(config: ModelConfig, runtime: RuntimeConfig, max_seq_len: int, device_limit: int) -> int:
    """The most tokens of a prompt that there is cheap room for: each chunk streams what is not resident once more."""
    size, batch = LEAST_PREFILL_CHUNK, runtime.batch_size

    def needed(size: int) -> int:
        return workspace_bytes(config, batch, max_seq_len, size, implementation=runtime.implementation)

    while 2 * size * batch <= MOST_PREFILL_ROWS:
        if needed(2 * size) - needed(LEAST_PREFILL_CHUNK) > PREFILL_SHARE * device_limit:
            break
        size *= 2
    return size


def _watched_bytes(config: ModelConfig, runtime: RuntimeConfig) -> int:
    """Of what is remembered of past requests for a prefetch alone, and not for the residency."""
    if not runtime.recalls_requests or (runtime.residency_policy or DEFAULT_POLICY) == "activation":
        return 0
    return num_bytes("activation", len(config.moe_layers), config.num_experts)


def _require_host(config: ModelConfig, pinned: int, limit: int) -> None:
    if pinned > limit:
        raise ValueError(
            f"not enough host memory: the experts take {format_bytes(config.store_bytes)} of pinned host memory "
            f"({format_bytes(pinned)} with the allocator's waste) and {format_bytes(limit)} may be used; "
            f"free memory, raise --host-memory (on a GPU also {HOST_LIMIT_VARIABLE}, if it was set), or use a smaller "
            "model or dtype"
        )


def _slots_per_layer(config: ModelConfig, runtime: RuntimeConfig, limit: int, fixed: dict[str, int]) -> int:
    lowest, highest = config.num_experts_per_tok, config.num_experts
    slot_bytes = len(config.moe_layers) * config.expert_bytes  # one slot in every layer
    left = limit - sum(fixed.values())
    wanted = runtime.expert_slots
    if wanted is not None and not lowest <= wanted <= highest:
        raise ValueError(
            f"expert_slots={wanted} is outside {lowest}..{highest}: a layer needs at least a slot for each of its "
            f"num_experts_per_tok={lowest} experts, and has num_experts={highest}; choose a number in that range"
        )
    needed = (wanted or lowest) * slot_bytes
    if needed > left:
        parts = ", ".join(f"{name} {format_bytes(size)}" for name, size in fixed.items())
        raise ValueError(
            f"not enough device memory: {wanted or lowest} slots a layer take {format_bytes(needed)} and {parts}; "
            f"together {format_bytes(needed + sum(fixed.values()))}, but {format_bytes(limit)} may be used; "
            "lower --expert-slots, --max-seq-len, --prefill-chunk or the number of prompts, or raise --device-memory"
        )
    return wanted or min(highest, left // slot_bytes)
