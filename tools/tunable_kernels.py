"""What `tools.tune_kernels` can tune: of each kernel its own choice, other configurations worth a try, and its case."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas import tile_ring, tuning
from kernels_pallas.decode_attention import mosaic_gpu as attention
from kernels_pallas.decode_attention.mosaic_gpu_parts import shared_bytes as attention_bytes
from kernels_pallas.decode_attention.shape import Shape
from kernels_pallas.decode_attention.specs import DecodeAttentionSpec
from kernels_pallas.expert_mlp import mosaic_gpu, mosaic_gpu_fma, mosaic_gpu_prefill, mosaic_gpu_wgmma
from kernels_pallas.expert_mlp.specs import ExpertMlpSpec
from kernels_pallas.fetch import mosaic_gpu as fetching
from kernels_pallas.fetch.specs import FetchSpec
from kernels_pallas.multiprocessors import COPYING, COUNT
from kernels_pallas.norm_linear import mosaic_gpu as norm_linear
from kernels_pallas.norm_linear.specs import NormLinearSpec
from tools import bench_attention, bench_expert_mlp, bench_fetch, bench_norm_linear

SHARED_BYTES = 224 * 1024  # of a block; 227 KiB less what Mosaic takes for barriers
CALLS, UNROLLED = 320, 16  # that are timed in one program, and in the body of its loop
FETCHES = 16  # of one program
MAX_ERROR = {"bfloat16": 2e-2, "float16": 1e-2, "float32": 1e-4}  # of the largest value
FETCH_CONFIGS = (
    (8, 6, 16), (16, 6, 16), (16, 6, 32), (4, 6, 32), (8, 3, 64), (8, 12, 16), (32, 6, 16), (16, 12, 8), (2, 6, 32),
)  # blocks, stages, KiB of a tile  # fmt: skip
NORM_LINEAR_CONFIGS = (
    (1, 4, 8, 8), (1, 4, 4, 16), (1, 3, 8, 16), (1, 2, 8, 16), (1, 8, 4, 8), (1, 4, 16, 4), (2, 4, 3, 8), (2, 2, 3, 16),
    (2, 4, 6, 4), (2, 1, 6, 16),
)  # blocks a multiprocessor, warpgroups, stages, KiB of a tile  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Timed:
    """The inputs of a spec: a function's error, what takes the microseconds of a call of it, and what bounds those."""

    error: Callable[[Callable], float]
    timer: Callable[[Callable], Callable[[], float]]
    bound_us: Callable[[float], float]  # of GB/s


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tunable:
    """A kernel for a spec: `heuristic` is its own choice, `candidates` are others.

    problem: why a configuration does not fit, or None. program: equal for configurations that make the same one.
    function: the kernel with a configuration. case: its inputs, where `seconds` says how long a program takes.
    """

    key: tuning.Key
    heuristic: Any
    candidates: list[Any]
    max_error: float
    problem: Callable[[Any], str | None]
    program: Callable[[Any], Hashable]
    function: Callable[[Any], Callable]
    case: Callable[[Callable[[Callable, tuple], float]], Timed]


def tunable(spec: FetchSpec | ExpertMlpSpec | DecodeAttentionSpec | NormLinearSpec) -> Tunable:
    """Raises NotImplementedError for a spec that no kernel can do."""
    if isinstance(spec, FetchSpec):
        return _fetch(spec)
    if isinstance(spec, NormLinearSpec):
        return _norm_linear(spec)
    return _expert_mlp(spec) if isinstance(spec, ExpertMlpSpec) else _decode_attention(spec)


def multiprocessors() -> int:
    return getattr(jax.devices()[0], "core_count", COUNT)


def beside_a_copy() -> int:
    """The multiprocessors of a kernel that may run beside a prefetch: alone it may be faster with all."""
    return multiprocessors() - COPYING


def _too_large(num_bytes: int) -> str | None:
    return f"{num_bytes} bytes of shared memory are more than {SHARED_BYTES}" if num_bytes > SHARED_BYTES else None


def _fetch(spec: FetchSpec) -> Tunable:
    dtype, num_elements = jnp.dtype(spec.dtype), spec.expert_shape[0] * spec.num_hidden * spec.width

    def tile(config: tile_ring.Config) -> tile_ring.Tiling:
        return tile_ring.tiling(num_elements, dtype.itemsize, config.tile_bytes)

    def case(seconds: Callable[[Callable, tuple], float]) -> Timed:
        made = bench_fetch.Case(spec, 1, FETCHES, seconds)
        return Timed(made.error, made.timer, lambda gbps: spec.fetched_bytes / gbps / 1e3)

    return Tunable(
        key=fetching.key(jax.ShapeDtypeStruct(spec.store_shape, dtype)),
        heuristic=tile_ring.Config(),
        candidates=[
            tile_ring.Config(num_blocks=blocks, num_stages=stages, tile_bytes=1024 * kib)
            for blocks, stages, kib in FETCH_CONFIGS
        ],
        max_error=0.0,
        problem=lambda config: _too_large(tile_ring.shared_bytes(tile(config), config, dtype.itemsize)),
        program=lambda config: (config.num_blocks, config.num_stages, tile(config)),
        function=lambda config: functools.partial(fetching.fetch, config=config),
        case=case,
    )


def _expert_mlp(spec: ExpertMlpSpec) -> Tunable:
    """The form that does it."""
    x, slots = (jax.ShapeDtypeStruct(shape, spec.dtype) for shape in (spec.x_shape, spec.slots_shape))
    form = mosaic_gpu.form(x, slots)
    if form is None:
        raise NotImplementedError(f"expert_mlp: mosaic_gpu cannot do this: {mosaic_gpu.problem(x, slots)}")

    def case(seconds: Callable[[Callable, tuple], float]) -> Timed:
        here = bench_expert_mlp.Case(spec, CALLS, UNROLLED, seconds)

        def bound_us(gbps: float) -> float:
            product_us = here.product_us if spec.num_rows > bench_expert_mlp.MANY_ROWS else 0.0
            return max(product_us, bench_expert_mlp.num_bytes(spec) / gbps / 1e3)

        operations = bench_expert_mlp.num_operations(spec)
        return Timed(here.error, lambda function: here.timer(function, operations), bound_us)

    made = {mosaic_gpu_fma: _fma, mosaic_gpu_wgmma: _wgmma, mosaic_gpu_prefill: _prefill}[form]
    return made(spec, x, slots, {"max_error": MAX_ERROR[spec.dtype], "case": case})


def _fma(spec: ExpertMlpSpec, x, slots, common: dict[str, Any]) -> Tunable:
    shape, number = mosaic_gpu_fma.shape_of(x, slots), multiprocessors()
    sizes = (1, 4), (1, 3), (1, 2), (2, 2), (1, 1), (2, 1), (3, 1), (4, 1)  # blocks a multiprocessor, warpgroups
    return Tunable(
        key=mosaic_gpu_fma.key(x, slots),
        heuristic=mosaic_gpu_fma.Config(),
        candidates=[mosaic_gpu_fma.Config(num_blocks=n * number, max_warpgroups=most) for n, most in sizes],
        problem=lambda config: None,  # it takes as many warpgroups as there is room for
        program=lambda config: (config.num_blocks, shape.num_warpgroups(config.max_warpgroups)),
        function=lambda config: functools.partial(mosaic_gpu_fma.expert_mlp, config=config),
        **common,
    )


def _wgmma(spec: ExpertMlpSpec, x, slots, common: dict[str, Any]) -> Tunable:
    number = beside_a_copy()
    sizes = itertools.product((1, 2), (1, 2, 3))  # blocks a multiprocessor, warpgroups
    return Tunable(
        key=mosaic_gpu_wgmma.key(x, slots),
        heuristic=mosaic_gpu_wgmma.Config(),
        candidates=[mosaic_gpu_wgmma.Config(num_blocks=n * number, max_warpgroups=most) for n, most in sizes],
        problem=lambda config: _too_large(mosaic_gpu_wgmma.down_bytes(spec.num_rows, config.max_warpgroups)),
        program=lambda config: config,
        function=lambda config: functools.partial(mosaic_gpu_wgmma.expert_mlp, config=config),
        **common,
    )


def _prefill(spec: ExpertMlpSpec, x, slots, common: dict[str, Any]) -> Tunable:
    number, sizes = multiprocessors(), (spec.num_groups, spec.max_groups_per_row)
    config_type = type(mosaic_gpu_prefill.config_of(spec.num_rows, *sizes))
    call = functools.partial(mosaic_gpu_prefill.expert_mlp, max_groups_per_row=spec.max_groups_per_row)
    return Tunable(
        key=mosaic_gpu_prefill.key(x, slots, *sizes),
        heuristic=mosaic_gpu_prefill.config_of(spec.num_rows, *sizes),
        candidates=[
            config_type(num_blocks=n * number, num_warpgroups=most) for n, most in itertools.product((1, 2), (1, 2))
        ],
        problem=lambda config: None,  # its ring has as many stages as there is room for
        program=lambda config: config,
        function=lambda config: functools.partial(call, config=config),
        **common,
    )


def _decode_attention(spec: DecodeAttentionSpec) -> Tunable:
    dtype, number = jnp.dtype(spec.dtype), beside_a_copy()
    qkv, keys = (jax.ShapeDtypeStruct(shape, dtype) for shape in (spec.qkv_shape, spec.cache_shape))
    if problem := attention.problem(qkv, keys, spec.num_heads):
        raise NotImplementedError(f"decode_attention: mosaic_gpu cannot do this: {problem}")
    sizes = spec.num_positions, spec.num_kv_heads, spec.head_dim
    shape = Shape(spec.batch, spec.num_heads, *sizes, dtype, spec.sliding_window)

    def program(config: attention.Config) -> tuple[int, int]:
        num_splits = shape.num_splits(config.num_blocks)
        return num_splits, shape.num_stages(num_splits, config.max_stages)

    def case(seconds: Callable[[Callable, tuple], float]) -> Timed:
        made = bench_attention.Case(spec, CALLS, 4 * UNROLLED, seconds)
        return Timed(made.error, made.timer, lambda gbps: bench_attention.num_bytes(spec) / gbps / 1e3)

    blocks = 2 * number, 4 * number, number, 8 * number, number // 2, number // 4
    return Tunable(
        key=attention.key(shape),
        heuristic=attention.Config(),
        candidates=[
            attention.Config(num_blocks=each, max_stages=stages)
            for each, stages in itertools.product(blocks, (2, 3, 4, 1))
        ],
        max_error=MAX_ERROR[spec.dtype],
        problem=lambda config: _too_large(attention_bytes(shape, program(config)[1])),
        program=program,
        function=lambda config: functools.partial(attention.decode_attention, config=config),
        case=case,
    )


def _norm_linear(spec: NormLinearSpec) -> Tunable:
    x = jax.ShapeDtypeStruct((spec.num_rows, spec.width), spec.dtype)
    kernel, number = jax.ShapeDtypeStruct(spec.kernel_shape, spec.dtype), beside_a_copy()
    if problem := norm_linear.problem(x, kernel):
        raise NotImplementedError(f"norm_linear: mosaic_gpu cannot do this: {problem}")

    def program(config: norm_linear.Config) -> tuple[int, ...]:
        shape = norm_linear.shape_of(x, kernel, config)
        return shape.num_blocks, shape.num_warpgroups, shape.num_stages, shape.tile_bytes

    def case(seconds: Callable[[Callable, tuple], float]) -> Timed:
        made = bench_norm_linear.Case(spec, CALLS, seconds)
        return Timed(made.error, made.timer, lambda gbps: spec.kernel_bytes / gbps / 1e3)

    return Tunable(
        key=norm_linear.key(x, kernel),
        heuristic=norm_linear.Config(),
        candidates=[
            norm_linear.Config(
                num_blocks=blocks * number, max_warpgroups=most, max_stages=stages, tile_bytes=1024 * kib
            )
            for blocks, most, stages, kib in NORM_LINEAR_CONFIGS
        ],
        max_error=MAX_ERROR[spec.dtype],
        problem=lambda config: norm_linear.problem(x, kernel, config),
        program=program,
        function=lambda config: functools.partial(norm_linear.norm_linear, config=config),
        case=case,
    )
