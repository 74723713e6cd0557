"""The memory plan as integer arithmetic, what it refuses, and where arrays lie."""

import dataclasses
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jmoe import memory, memory_plan
from jmoe.config import DTYPE_BYTES, ModelConfig, RuntimeConfig
from jmoe.memory import GIB
from jmoe.memory_plan import MemoryPlan, plan_memory
from jmoe.model.kv_cache import init_kv_cache, kv_bytes
from kernels_pallas import backends
from tests import models
from tests.models import SMALL

MODELS = Path(__file__).parents[1] / "configs" / "models"
LARGE = ModelConfig.from_toml(MODELS / "qwen3-30b-a3b.toml")
TRUNK = 3 * GIB
XLA_SETTINGS = ("XLA_PYTHON_CLIENT_PREALLOCATE", "XLA_PYTHON_CLIENT_MEM_FRACTION", memory.HOST_LIMIT_VARIABLE)


def plan(
    config: ModelConfig = LARGE,
    *,
    device: int | None = 80 * GIB,
    host: int = 200 * GIB,
    calibration_bytes: int = 0,
    **runtime,
) -> MemoryPlan:
    return plan_memory(
        config,
        RuntimeConfig(**runtime),
        trunk_bytes=TRUNK,
        device_limit_bytes=device,
        host_limit_bytes=host,
        calibration_bytes=calibration_bytes,
    )


def slot_bytes(config: ModelConfig) -> int:
    """One slot in every layer."""
    return len(config.moe_layers) * config.expert_bytes


# What a plan says


@given(
    device_gib=st.integers(10, 140),
    staging=st.none() | st.integers(1, 200),
    batch_size=st.integers(1, 8),
    max_seq_len=st.none() | st.integers(16, 40000),
    prefill_chunk=st.sampled_from([1, 64, 512]),
)
def test_parts_add_up_and_automatic_slots_are_the_most_that_fit(
    device_gib, staging, batch_size, max_seq_len, prefill_chunk
) -> None:
    sizes = dict(batch_size=batch_size, max_seq_len=max_seq_len, prefill_chunk=prefill_chunk, staging_slots=staging)
    try:
        made = plan(device=device_gib * GIB, **sizes)
    except ValueError:
        needed = plan(device=500 * GIB, expert_slots=LARGE.num_experts_per_tok, **sizes).device_bytes
        assert needed > device_gib * GIB, "the fewest slots would have fitted"
        return
    parts = (made.trunk_bytes, made.slots_bytes, made.staging_bytes, made.kv_bytes, made.workspace_bytes)
    assert made.device_bytes == sum(parts) <= made.device_limit_bytes == device_gib * GIB
    assert made.slots_bytes == made.layout.slots_per_layer * slot_bytes(LARGE)
    assert made.staging_bytes == 2 * made.layout.num_staging * LARGE.expert_bytes
    more_would_fit = made.device_bytes + slot_bytes(LARGE) <= made.device_limit_bytes
    assert made.layout.slots_per_layer == LARGE.num_experts or not more_would_fit


def test_a_plan_by_hand() -> None:
    made = plan(SMALL, expert_slots=5, staging_slots=3, batch_size=2, max_seq_len=64, prefill_chunk=16)
    expert_bytes = 3 * 16 * 32 * 4
    assert (made.trunk_bytes, made.store_bytes) == (TRUNK, 2 * 8 * expert_bytes)
    assert (made.slots_bytes, made.staging_bytes) == (2 * 5 * expert_bytes, 2 * 3 * expert_bytes)
    assert (
        made.kv_bytes == 2 * 3 * 2 * 64 * 2 * 8 * 4
    )  # keys and values, layers, batch, positions, heads, width, float32
    assert dataclasses.astuple(made.layout) == (2, 8, 5, 3)


@pytest.mark.parametrize(("amount", "num_experts"), [(0.25, 1), (1.0, 1), (1.5, 2)])
def test_a_prefetch_is_planned_for_twice(amount: float, num_experts: int) -> None:
    """What came for a layer is in use while the next one's comes; it leaves fewer slots, and no room is left over."""
    plain, ahead = plan(device=40 * GIB), plan(device=40 * GIB, prefetch="lookahead", prefetch_experts=amount)
    assert plain.prefetch_bytes == 0
    assert ahead.prefetch_bytes == 2 * num_experts * LARGE.expert_bytes
    assert ahead.device_bytes == plan_parts(ahead) <= ahead.device_limit_bytes < ahead.device_bytes + slot_bytes(LARGE)
    assert "prefetch" in "\n".join(ahead.lines())
    assert "prefetch" not in "\n".join(plain.lines())
    assert ahead.to_dict()["prefetch_bytes"] == ahead.prefetch_bytes


def plan_parts(made: MemoryPlan) -> int:
    parts = made.trunk_bytes, made.slots_bytes, made.staging_bytes, made.kv_bytes, made.workspace_bytes
    return sum(parts) + made.prefetch_bytes + made.predictor_bytes


COLLECTION = (128 + 3) * len(LARGE.moe_layers) * LARGE.num_experts * 4


@pytest.mark.parametrize(
    ("runtime", "expected"),
    [
        ({}, 0),
        ({"prefetch": "lookahead"}, 5000),
        ({"prefetch": "off"}, 0),
        ({"prefetch": "activation"}, COLLECTION),
        ({"prefetch": "both"}, 5000 + COLLECTION),
        ({"prefetch": "both", "residency_policy": "activation"}, 5000),  # which has it in any case
        ({"execute_guess": 0.8}, 5000),
        ({"execute_guess": 0.8, "prefetch": "lookahead"}, 5000),
        ({"execute_guess": 0.8, "prefetch": "both"}, 5000 + COLLECTION),
    ],
)
def test_what_guesses_are_made_from_is_planned_for(runtime: dict, expected: int) -> None:
    made = plan(device=40 * GIB, calibration_bytes=5000, **runtime)
    assert made.predictor_bytes == made.to_dict()["predictor_bytes"] == expected
    assert made.device_bytes == plan_parts(made)
    assert any("predictor" in line for line in made.lines()) is (expected > 0)


def test_where_all_experts_fit_only_guesses_that_are_executed_are_planned_for() -> None:
    for gate, expected in ((None, 0), (0.8, 5000)):
        made = plan(device=500 * GIB, calibration_bytes=5000, prefetch="both", execute_guess=gate)
        assert made.predictor_bytes == expected


def test_where_all_experts_fit_no_memory_is_planned_for_a_prefetch() -> None:
    made = plan(device=500 * GIB, prefetch="lookahead")
    assert made.layout.all_resident
    assert made.prefetch_bytes == 0


def test_what_a_prefetch_needs_may_be_too_much() -> None:
    fewest = plan(expert_slots=LARGE.num_experts_per_tok, prefetch="lookahead")
    assert plan(device=fewest.device_bytes, prefetch="lookahead").layout == fewest.layout
    with pytest.raises(ValueError, match=r"not enough device memory: .*, prefetch 18\.00 MiB"):
        plan(device=fewest.device_bytes - 1, prefetch="lookahead")


def test_exactly_enough_is_enough() -> None:
    fewest = plan(expert_slots=LARGE.num_experts_per_tok)
    assert plan(device=fewest.device_bytes).layout == fewest.layout
    with pytest.raises(ValueError, match="not enough device memory"):
        plan(device=fewest.device_bytes - 1)


def test_lengths_are_chosen_and_chunks_are_no_longer_than_they() -> None:
    assert plan().max_seq_len == memory_plan.DEFAULT_MAX_SEQ_LEN
    assert plan(dataclasses.replace(LARGE, max_position_embeddings=1000)).max_seq_len == 1000
    short = plan(max_seq_len=100, prefill_chunk=512)
    assert (short.max_seq_len, short.prefill_chunk) == (100, 100)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({"max_seq_len": 16384}, memory_plan.MOST_PREFILL_ROWS),
        ({"max_seq_len": 16384, "batch_size": 3}, 1024),
        ({"max_seq_len": 1024, "batch_size": 64}, memory_plan.LEAST_PREFILL_CHUNK),
        ({"max_seq_len": 2048, "device_memory_bytes": 12 * memory.GIB}, 1024),
        ({"max_seq_len": 700}, 700),
        ({"max_seq_len": 16384, "prefill_chunk": 128}, 128),
    ],
    ids=str,
)
def test_chunks_are_as_long_as_there_is_cheap_room_for(sizes: dict, expected: int) -> None:
    made = plan(expert_slots=LARGE.num_experts_per_tok, **sizes)
    assert made.prefill_chunk == expected


def test_staging_slots() -> None:
    automatic = plan().layout.num_staging
    assert automatic == memory_plan.STAGING_BYTES // (2 * LARGE.expert_bytes) == 7
    assert plan(staging_slots=1).layout.num_staging == 1
    assert plan(staging_slots=10**6).layout.num_staging == LARGE.num_experts // 2  # the others come in the next wave
    assert plan(SMALL).layout.num_staging == SMALL.num_experts // 2  # small experts: all in two waves
    wide = dataclasses.replace(LARGE, moe_intermediate_size=2**16)
    assert plan(wide, host=10**4 * GIB, device=10**4 * GIB).layout.num_staging == 1


def test_all_resident_is_known() -> None:
    assert plan(SMALL).layout.all_resident
    assert not plan(SMALL, expert_slots=7).layout.all_resident


def test_limits_that_the_user_sets_hold() -> None:
    assert (
        plan(device_memory_bytes=20 * GIB).device_bytes
        <= 20 * GIB
        == plan(device_memory_bytes=20 * GIB).device_limit_bytes
    )
    assert plan(device_memory_bytes=200 * GIB).device_limit_bytes == 80 * GIB  # no more than there is
    assert plan(host_memory_bytes=100 * GIB).host_limit_bytes == 100 * GIB


def test_where_the_device_shares_the_hosts_memory() -> None:
    """CPU: the store is not pinned in pools, and what it takes is not there for slots."""
    made = plan(SMALL, device=None, host=8 * GIB)
    assert made.pinned_bytes == made.store_bytes == SMALL.store_bytes
    assert made.device_limit_bytes == 8 * GIB - SMALL.store_bytes


@pytest.mark.parametrize("file", sorted(MODELS.glob("*.toml")), ids=lambda file: file.stem)
def test_pinned_memory_holds_the_experts_and_little_else(file: Path) -> None:
    config = ModelConfig.from_toml(file)
    pinned = memory.pinned_pool_bytes(config)
    assert config.store_bytes < pinned < 2 * config.store_bytes + GIB


def test_lines_name_every_part() -> None:
    text = "\n".join(plan(expert_slots=32, staging_slots=5, batch_size=2, max_seq_len=777).lines())
    assert "32 of 128 a layer (25.0%)" in text
    assert "2 x 777 positions" in text
    assert "of 80.00 GiB" in text
    assert f"of 200.00 GiB; experts {memory.format_bytes(LARGE.store_bytes)}" in text
    for name in ("trunk", "expert slots", "staging slots", "KV cache", "workspace", "device", "host (pinned)"):
        assert f"  {name}" in text


def test_a_plan_as_plain_values() -> None:
    made = plan(expert_slots=32)
    values = made.to_dict()
    assert values["slots_per_layer"] == 32
    assert values["device_bytes"] == made.device_bytes
    assert all(isinstance(value, int) for value in values.values())


# What cannot be


@pytest.mark.parametrize("wanted", [1, LARGE.num_experts_per_tok - 1, LARGE.num_experts + 1])
def test_slots_outside_the_range_are_refused(wanted: int) -> None:
    with pytest.raises(
        ValueError, match=rf"expert_slots={wanted} is outside 8\.\.128: .*choose a number in that range"
    ):
        plan(expert_slots=wanted)


@pytest.mark.parametrize("expert_slots", [None, 100])
def test_too_little_device_memory_is_refused(expert_slots: int | None) -> None:
    with pytest.raises(ValueError, match="not enough device memory") as caught:
        plan(device=4 * GIB, expert_slots=expert_slots)
    message, asked = str(caught.value), expert_slots or LARGE.num_experts_per_tok
    assert f"{asked} slots a layer take {memory.format_bytes(asked * slot_bytes(LARGE))}" in message
    for part in ("trunk 3.00 GiB", "staging slots", "KV cache", "workspace", "4.00 GiB may be used"):
        assert part in message
    for option in ("--expert-slots", "--max-seq-len", "--prefill-chunk", "--device-memory"):
        assert option in message


@pytest.mark.parametrize("device", [None, 80 * GIB])
def test_too_little_host_memory_is_refused(device: int | None) -> None:
    with pytest.raises(ValueError, match="not enough host memory") as caught:
        plan(device=device, host=40 * GIB)
    message = str(caught.value)
    for part in (memory.format_bytes(LARGE.store_bytes), "40.00 GiB may be used", "free memory", "--host-memory"):
        assert part in message
    with pytest.raises(ValueError, match=r"10.00 GiB may be used"):
        plan(device=device, host_memory_bytes=10 * GIB)


# The parts


@pytest.mark.parametrize("changes", [{"batch_size": 4}, {"max_seq_len": 8192}, {"prefill_chunk": 2048}])
def test_the_workspace_grows(changes: dict[str, int]) -> None:
    sizes = {"batch_size": 1, "max_seq_len": 2048, "prefill_chunk": 512}
    smaller, larger = (
        memory_plan.workspace_bytes(LARGE, **sizes),
        memory_plan.workspace_bytes(LARGE, **{**sizes, **changes}),
    )
    assert 0 < smaller < larger
    wide = dataclasses.replace(LARGE, vocab_size=2 * LARGE.vocab_size, hidden_size=2 * LARGE.hidden_size)
    assert memory_plan.workspace_bytes(wide, **sizes) > smaller


def test_flash_attention_leaves_room_for_longer_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain attention has scores, of many sequences also in a short chunk, which flash attention is not used for."""
    sizes = {"config": LARGE, "max_seq_len": 8192, "prefill_chunk": 512}
    plain = [memory_plan.workspace_bytes(**sizes, batch_size=batch, implementation="reference") for batch in (1, 64)]
    monkeypatch.setattr(backends, "cudnn_problem", lambda: None)
    one, many = (memory_plan.workspace_bytes(**sizes, batch_size=batch, implementation=None) for batch in (1, 64))
    assert one < plain[0] - 2**28
    assert many == plain[1]


@pytest.mark.parametrize("dtype", DTYPE_BYTES)
def test_the_kv_cache_takes_what_was_planned(dtype: str) -> None:
    config = dataclasses.replace(SMALL, dtype=dtype)
    cache = init_kv_cache(config, 2, 40)
    assert kv_bytes(config, 2, 40) == memory.array_bytes((cache.keys, cache.values))


def test_array_bytes_counts_shapes_too() -> None:
    tree = {"a": jnp.zeros((3, 4), jnp.bfloat16), "b": [jax.ShapeDtypeStruct((5,), jnp.float32)]}
    assert memory.array_bytes(tree) == 3 * 4 * 2 + 5 * 4


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.00 KiB"), (3 * 2**19, "1.50 MiB"), (GIB, "1.00 GiB"), (2**41, "2.00 TiB")],
)
def test_format_bytes(size: int, text: str) -> None:
    assert memory.format_bytes(size) == text


# The machine


def test_an_engine_puts_arrays_where_the_plan_says() -> None:
    engine = models.engine()
    state = engine.new_state(1, np.ones(1, np.int32))
    assert {layer.sharding.memory_kind for layer in engine.weights.store.layers} == {"pinned_host"}
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves((engine.weights.params, state))} == {"device"}
    assert memory.array_bytes(state.experts.layers) == engine.plan.slots_bytes
    assert memory.array_bytes(state.experts.staging) == engine.plan.staging_bytes
    assert engine.weights.store.nbytes == engine.plan.store_bytes
    assert engine.weights.store.expert_bytes == SMALL.expert_bytes
    assert memory.array_bytes((state.cache.keys, state.cache.values)) == engine.plan.kv_bytes
    assert memory.array_bytes(engine.weights.params) == engine.plan.trunk_bytes


def test_the_link_test_measures_something() -> None:
    assert memory.measure_link_gbps(num_bytes=2**16) > 0


def test_this_machine_has_memory() -> None:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < memory.host_available_bytes() <= total
    assert memory.device_available_bytes() is None  # the device is the host
    assert memory.peak_device_bytes() is None
    assert memory.pinned_limit_bytes() is None


def configured(monkeypatch: pytest.MonkeyPatch, *, backend_is_up: bool, **environment: str) -> dict[str, str]:
    """What configure_backend leaves in the environment."""
    for name in XLA_SETTINGS:
        monkeypatch.setenv(name, "")  # so that what it sets is undone
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(memory.xla_bridge, "backends_are_initialized", lambda: backend_is_up)
    memory.configure_backend(LARGE)
    return {name: os.environ[name] for name in XLA_SETTINGS if name in os.environ}


def test_a_control_group_bounds_what_is_available(tmp_path: Path) -> None:
    """Its files (version 2), with what the kernel would give back of cached files."""
    for name, text in (
        ("memory.max", "5000\n"),
        ("memory.current", "4000"),
        ("memory.stat", "anon 1\ninactive_file 700\n"),
    ):
        (tmp_path / name).write_text(text)
    assert memory.host_available_bytes(tmp_path) == 1700
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.host_available_bytes(tmp_path) > 10**6


def test_host_memory_bounds_but_never_raises() -> None:
    assert plan(SMALL, host=GIB, host_memory_bytes=GIB // 2).host_limit_bytes == GIB // 2
    assert plan(SMALL, host=GIB, host_memory_bytes=2 * GIB).host_limit_bytes == GIB


def test_xla_is_told_to_leave_room(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = configured(monkeypatch, backend_is_up=False)
    assert settings["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"
    assert 0.75 < float(settings["XLA_PYTHON_CLIENT_MEM_FRACTION"]) < 1
    limit = int(settings[memory.HOST_LIMIT_VARIABLE]) * GIB
    assert memory.pinned_pool_bytes(LARGE) <= limit <= memory.pinned_pool_bytes(LARGE) + 2 * GIB


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5", memory.HOST_LIMIT_VARIABLE: "7"}
    settings = configured(monkeypatch, backend_is_up=False, **mine)
    assert settings == {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **mine}


def test_a_running_backend_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert configured(monkeypatch, backend_is_up=True) == {}


@pytest.mark.parametrize(("value", "limit"), [(None, memory.XLA_DEFAULT_HOST_LIMIT_BYTES), ("100", 100 * GIB)])
def test_the_cap_on_pinned_memory(value: str | None, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(memory.HOST_LIMIT_VARIABLE, raising=False)
    if value:
        monkeypatch.setenv(memory.HOST_LIMIT_VARIABLE, value)
    monkeypatch.setattr(memory.jax, "default_backend", lambda: "gpu")
    assert memory.pinned_limit_bytes() == limit


@pytest.fixture
def jax_cache():
    """JAX's settings of its compilation cache, put back afterwards."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.mark.parametrize("told", [None, "mine"])
@pytest.mark.usefixtures("jax_cache")
def test_the_compilation_cache_is_kept_where_jax_was_told(told: str | None, tmp_path: Path) -> None:
    jax.config.update("jax_compilation_cache_dir", told)
    memory.enable_compilation_cache(tmp_path)
    assert jax.config.jax_compilation_cache_dir == (told or str(tmp_path))
