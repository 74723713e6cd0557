"""Device and host memory as this machine has them; the only file that names memory kinds."""

import math
import os
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import xla_bridge
from jax.sharding import SingleDeviceSharding

from jmoe.config import DTYPE_BYTES, ModelConfig

GIB = 2**30
SLOW_COPY_S = 0.02  # no link: a CPU's own memory
PINNED_SLACK_BYTES = 256 * 2**20  # what the link test and XLA's own small copies take
HOST_LIMIT_VARIABLE = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"  # in GiB, whatever its name says
XLA_DEFAULT_HOST_LIMIT_BYTES = 64 * GIB


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


def format_bytes(size: int) -> str:
    for unit, name in ((2**40, "TiB"), (GIB, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if size >= unit:
            return f"{size / unit:.2f} {name}"
    return f"{size} B"


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
