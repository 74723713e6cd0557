"""Where bytes go: the only file that names memory kinds, and the plan that shares out memory before it is taken."""

import dataclasses
import math
import os
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import xla_bridge
from jax.sharding import SingleDeviceSharding

from jmoe.config import DTYPE_BYTES, ModelConfig, RuntimeConfig
from jmoe.experts.experience import num_bytes
from jmoe.experts.policies import DEFAULT_POLICY
from jmoe.experts.slots import SlotLayout
from jmoe.model.attention import query_block
from jmoe.model.kv_cache import kv_bytes

GIB = 2**30
DEFAULT_MAX_SEQ_LEN = 4096
STAGING_BYTES = 128 * 2**20  # enough for one wave to hide the start and the end of its fetch
SLOW_COPY_S = 0.02  # no link: a CPU's own memory
PINNED_SLACK_BYTES = 256 * 2**20  # what the link test and XLA's own small copies take
HOST_LIMIT_VARIABLE = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"  # in GiB, whatever its name says
XLA_DEFAULT_HOST_LIMIT_BYTES = 64 * GIB
LEAST_PREFILL_CHUNK = 512  # tokens of a sequence
MOST_PREFILL_ROWS = 4096  # tokens of a batch
PREFILL_SHARE = 1 / 32  # of the device, that longer chunks may take


def device_sharding() -> SingleDeviceSharding:
    return SingleDeviceSharding(jax.devices()[0], memory_kind="device")


def host_sharding() -> SingleDeviceSharding:
    """Page-locked host memory, which the device can read."""
    return SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")


def to_device(array: jax.Array) -> jax.Array:
    """Inside a jitted function: a copy in device memory of what may lie in host memory."""
    return jax.device_put(array, jax.memory.Space.Device)


def enable_compilation_cache(directory: Path) -> None:
    """Keeps compiled programs in `directory` from run to run, unless JAX was already told where to keep them."""
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(directory))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def pinned_pool_bytes(config: ModelConfig) -> int:
    """Host memory that XLA's pinned allocator takes for the experts, bytes.

    It takes memory in regions: two of the smallest power of two that holds a layer, then each twice the one before.
    A region holds whole layers. With the limit at this number, the last one is no larger than it has to be. One more
    region serves the copies of the trunk to the device, which XLA takes through pinned memory.
    """
    embedding_bytes = config.vocab_size * config.hidden_size * DTYPE_BYTES[config.dtype]
    layer_bytes = config.num_experts * config.expert_bytes
    region = _region_bytes(layer_bytes)
    left, total, is_first = len(config.moe_layers), 0, True
    while left:
        taken = min(left, region // layer_bytes)
        total += region if taken < left else taken * layer_bytes
        left -= taken
        region, is_first = (region if is_first else 2 * region), False
    return total + _region_bytes(embedding_bytes) + PINNED_SLACK_BYTES


def _region_bytes(size: int) -> int:
    """The smallest power of two that holds `size` bytes."""
    return 1 << (size - 1).bit_length()


def configure_backend(config: ModelConfig) -> None:
    """Sets what XLA reads from the environment when it starts; whatever the user has set stays.

    XLA caps pinned host memory at 64 GiB unless told otherwise, keeps a quarter of the GPU to itself, and takes all of
    its share at once. Once a backend is up this changes nothing, so that the plan sees the limits that are in force.
    """
    if xla_bridge.backends_are_initialized():  # has no public name
        return
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    os.environ.setdefault(HOST_LIMIT_VARIABLE, str(math.ceil(pinned_pool_bytes(config) / GIB)))


def pinned_limit_bytes() -> int | None:
    """The cap on pinned host memory in force, bytes; None where there is none (CPU)."""
    if jax.default_backend() != "gpu":
        return None
    value = os.environ.get(HOST_LIMIT_VARIABLE)
    return int(value) * GIB if value else XLA_DEFAULT_HOST_LIMIT_BYTES


def host_available_bytes(group: Path = Path("/sys/fs/cgroup")) -> int:
    """Host memory that may still be taken: what the system calls available, or what is left of the control group."""
    available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        available = int(fields["MemAvailable"].split()[0]) * 1024
    if (group / "memory.current").exists() and (limit := (group / "memory.max").read_text().strip()) != "max":
        used = int((group / "memory.current").read_text())
        cached = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())["inactive_file"]
        available = min(available, int(limit) - used + int(cached))  # file pages go when memory is asked for
    return available


def device_available_bytes() -> int | None:
    """Device memory that may still be taken; None where the device is the host (CPU)."""
    stats = jax.devices()[0].memory_stats()
    if not stats or "bytes_limit" not in stats:
        return None
    return stats["bytes_limit"] - stats["bytes_in_use"]


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
            ("staging slots", self.staging_bytes, f"{layout.num_staging}"),
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


def format_bytes(size: int) -> str:
    for unit, name in ((2**40, "TiB"), (GIB, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if size >= unit:
            return f"{size / unit:.2f} {name}"
    return f"{size} B"


def workspace_bytes(
    config: ModelConfig, batch_size: int, max_seq_len: int, prefill_chunk: int, most_draft_tokens: int = 0
) -> int:
    """Temporaries of the larger of the steps, estimated from the arrays that live at the same time.

    A verification takes in a token more than are drafted, with logits of each.
    """
    item, verified = DTYPE_BYTES[config.dtype], most_draft_tokens + 1
    prefill_chunk = max(prefill_chunk, verified)
    rows = batch_size * prefill_chunk
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    block = query_block((batch_size, prefill_chunk, heads, config.head_dim), max_seq_len)
    scores = batch_size * heads * block * max_seq_len * (4 + 4 + item)  # scores, their softmax, the weights
    qkv = rows * (heads + 2 * kv_heads) * config.head_dim * (item + 4)
    hidden = rows * config.hidden_size * (4 * item + 2 * 4)
    widest = max(config.moe_intermediate_size, config.intermediate_size if config.mlp_only_layers else 0)
    choices = rows * config.num_experts_per_tok
    groups = min(choices, config.num_experts)
    places = choices + 8 * groups + 128 if rows > 32 else 0  # rows gathered by expert, and their hidden values
    experts = rows * widest * 3 * 4 + groups * rows * 16 + places * (config.hidden_size + widest) * item
    logits = batch_size * verified * config.vocab_size * 4 * 6  # sampling sorts values and indices
    return max(scores, experts) + qkv + hidden + logits


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
    staging = runtime.staging_slots or max(2, STAGING_BYTES // config.expert_bytes)
    staging = min(staging, config.num_experts)
    fixed = {
        "trunk": trunk_bytes,
        "staging slots": staging * config.expert_bytes,
        "KV cache": kv_bytes(config, runtime.batch_size, max_seq_len),
        "workspace": workspace_bytes(config, runtime.batch_size, max_seq_len, prefill_chunk, runtime.most_draft_tokens),
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
    size = LEAST_PREFILL_CHUNK
    least = workspace_bytes(config, runtime.batch_size, max_seq_len, size)
    while 2 * size * runtime.batch_size <= MOST_PREFILL_ROWS:
        if workspace_bytes(config, runtime.batch_size, max_seq_len, 2 * size) - least > PREFILL_SHARE * device_limit:
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


def measure_link_gbps(num_bytes: int = 128 * 2**20, num_copies: int = 8, repeats: int = 3) -> float:
    """GB/s of plain pinned-to-device copies issued together: the link ceiling. Takes a fraction of a second.

    Takes `num_bytes` of host and `num_copies` times that of device memory while it runs.
    """
    noise = np.random.default_rng(0).integers(0, 2**32, num_bytes // 4, dtype=np.uint32)
    source = jax.block_until_ready(jax.device_put(noise, host_sharding()))

    def seconds(num_copies: int) -> float:
        start = time.perf_counter()
        jax.block_until_ready([jax.device_put(source, device_sharding()) for _ in range(num_copies)])
        return time.perf_counter() - start

    if seconds(1) > SLOW_COPY_S:
        num_copies = 1
    return num_copies * source.nbytes / min(seconds(num_copies) for _ in range(repeats)) / 1e9


def peak_device_bytes() -> int | None:
    """The most device memory in use so far; None where the device does not count it (CPU)."""
    stats = jax.devices()[0].memory_stats()
    return stats.get("peak_bytes_in_use") if stats else None


def array_bytes(tree) -> int:
    return sum(math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))
