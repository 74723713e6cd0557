"""The benchmark of one MoE layer: it needs a GPU and says so; its plans are what it says they are."""

import argparse

import numpy as np
import pytest

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
