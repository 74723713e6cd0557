"""The benchmark of one MoE layer: it needs a GPU and says so; its plans are what it says they are."""

import argparse
from pathlib import Path

import jax
import numpy as np
import pytest

from jmoe import memory
from kernels_pallas.prefetch.api import prefetch
from tools import bench_moe_layer


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_moe_layer.main(["--num-hidden", "16", "--width", "256", "--num-experts", "24"]) == 2
    assert "no kernel fetches and multiplies experts (3, 16, 256) on this cpu" in capsys.readouterr().err


def test_misses_beyond_the_groups_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_moe_layer.main(["--misses", "9"]) == 2
    assert "must be 0 to 8" in capsys.readouterr().err


@pytest.mark.parametrize("misses", [0, 3, 8])
def test_a_plan_brings_the_groups_that_are_missing(misses: int) -> None:
    for plan in bench_moe_layer._plans(misses, argparse.Namespace(num_experts=24)):
        comes = np.asarray(plan.group_fetched) == 1
        count = int(plan.count)
        assert count == comes.sum() == misses
        assert set(np.asarray(plan.plan_experts)[:count].tolist()) == set(
            np.asarray(plan.group_experts)[comes].tolist()
        )
        wanted = dict(zip(np.asarray(plan.group_experts).tolist(), np.asarray(plan.group_slots).tolist(), strict=True))
        entries = zip(np.asarray(plan.plan_experts).tolist(), np.asarray(plan.plan_slots).tolist(), strict=True)
        assert all(wanted[expert] == slot for expert, slot in entries)
        assert len(set(np.asarray(plan.group_slots).tolist())) == bench_moe_layer.NUM_GROUPS


def tiny() -> tuple[argparse.Namespace, jax.Array]:
    options = argparse.Namespace(num_experts=16, num_hidden=8, width=32, repeats=1)
    store = np.asarray(bench_moe_layer.random_slots(jax.random.key(0), (16, 3, 8, 32), "bfloat16"))
    return options, jax.device_put(store, memory.host_sharding())


@pytest.mark.parametrize(("share", "num_rows"), [(0.0, 0), (0.5, 12), (1.0, 24)])
def test_the_first_missing_expert_has_come_by_a_share(share: float, num_rows: int) -> None:
    options, store = tiny()
    for plan, come in bench_moe_layer._with_arrivals(bench_moe_layer._plans(3, options), store, share):
        assert come.expert_ids.tolist() == plan.plan_experts[:1].tolist()
        assert come.num_rows.tolist() == [num_rows]
        np.testing.assert_array_equal(come.weights[0], np.asarray(store)[int(plan.plan_experts[0])])


def test_a_trace_has_each_part(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bench_moe_layer, "PARTS", (bench_moe_layer.fetch, bench_moe_layer.two_steps))
    options, store = tiny()
    options.misses, options.trace = [0, 2], tmp_path / "trace"
    bench_moe_layer._trace(store, options)
    (file,) = options.trace.rglob("*.xplane.pb")
    lines = [line for plane in jax.profiler.ProfileData.from_file(str(file)).planes for line in plane.lines]
    names = {event.name for line in lines for event in line.events}
    for part in ("PjitFunction(fetch)", "PjitFunction(two_steps)"):
        assert any(part in name for name in names)
    assert not any("simplification" in name for name in names), "nothing is compiled meanwhile"


def test_a_prefetch_is_timed_with_and_without_other_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_moe_layer, "CALLS", 2)
    options, store = tiny()
    times = bench_moe_layer._beside(store, options, prefetch)
    assert list(times) == ["dense_products", "prefetch", "both"]
    assert min(times.values()) > 0
