"""The kernel benchmark runs, and its last line is JSON that other programs can read."""

import dataclasses
import functools
import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.expert_mlp import reference
from tools import bench_decisions, bench_expert_mlp, bench_fetch, bench_kernels

FAST = ["--scale", "64", "--iterations", "1", "--repeats", "1"]


@pytest.fixture(autouse=True)
def _quick_link(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring the link takes longer than everything else here: it is said to do 2 GB/s."""
    monkeypatch.setattr(bench_kernels.memory, "measure_link_gbps", lambda: 2.0)
    monkeypatch.setattr(bench_kernels, "CALLS", 2)


def test_each_spec_has_a_row_with_its_bound(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_kernels.main([*FAST, "--specs", "one_group", "single"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    rows = {(row["op"], row["spec"], row["implementation"]): row for row in json.loads(last)["rows"]}
    assert list(rows) == [("expert_mlp", "one_group", "reference"), ("fetch", "single", "reference")]
    mlp, fetch = rows.values()
    assert math.isfinite(mlp["us"]), "of so little work it may be below 0: what the loop takes is subtracted"
    assert mlp["bound_us"] > 0
    assert 0 <= mlp["error"] < 1e-2
    num_bytes = 3 * (768 // 64 // 8 * 8) * (2048 // 64) * 2
    assert fetch["bound_us"] == pytest.approx(num_bytes / 2e3)
    assert fetch["gbps"] == pytest.approx(num_bytes / fetch["us"] / 1e3)
    assert fetch["percent"] == pytest.approx(100 * fetch["bound_us"] / fetch["us"])
    assert sum(line.startswith(("one_group", "single")) for line in lines) == 2


def test_a_prefill_has_the_arithmetic_of_a_plain_product_beside_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_kernels.main([*FAST, "--ops", "expert_mlp", "--specs", "prefill_empty_groups"]) == 0
    product, kernel = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    num_operations = 2 * (64 + 1 + 63) * 3 * (768 // 64 // 8 * 8) * (2048 // 64)
    assert (product["implementation"], kernel["implementation"]) == ("plain product", "reference")
    for row in (product, kernel):
        assert row["tflops"] == pytest.approx(num_operations / row["us"] / 1e6)


def test_a_spec_that_fails_is_named_and_the_others_go_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = bench_kernels.bench_fetch.measure

    def measured(spec, *options):
        yield from measure(spec, *options)
        if spec.name == "single":
            raise RuntimeError("the machine is tired")

    monkeypatch.setattr(bench_kernels.bench_fetch, "measure", measured)
    assert bench_kernels.main([*FAST, "--ops", "fetch", "--specs", "single", "plan_of_one"]) == 2
    printed = capsys.readouterr()
    assert [row["spec"] for row in json.loads(printed.out.splitlines()[-1])["rows"]] == ["single", "plan_of_one"]
    said, error = printed.err.splitlines()
    assert said == "single: failed: the machine is tired"
    assert error == "error: of 1 specs not everything could be timed: single; see above"


@pytest.mark.parametrize("checked_rows", [1024, 12])
def test_a_wrong_row_is_seen_among_those_that_are_checked(checked_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_expert_mlp, "CHECKED_ROWS", checked_rows)
    spec = dataclasses.replace(bench_kernels.SPECS["expert_mlp"]["uneven"].scaled(64), dtype="float32")
    case = bench_expert_mlp.Case(spec, 1, 1, lambda run, arguments: 0.0)

    y = np.asarray(reference.expert_mlp(case.x, case.slots, *case.groups))

    def but(row: int, value: float):
        return lambda *arrays: jnp.asarray(y).at[row].set(value)

    rows, _ = case._wanted
    assert len(set(rows)) == min(checked_rows, spec.num_rows)
    assert case.error(lambda *arrays: jnp.asarray(y)) < 1e-5
    assert case.error(but(int(rows[-1]), 99.0)) > 1
    assert case.error(but(1, np.nan)) == case.error(but(66, np.inf)) == np.inf


def test_attention_has_rows_with_the_bytes_that_it_sees(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_kernels.main([*FAST, "--ops", "decode_attention", "--specs", "not_valid"]) == 0
    (row,) = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    num_bytes = 2 * (300 // 64 + 1 + 1023 // 64 + 1) * 4 * 128 * 2
    assert row["gbps"] == pytest.approx(num_bytes / row["us"] / 1e3)
    assert (row["op"], row["implementation"]) == ("decode_attention", "reference")
    assert 0 <= row["error"] < 2e-2


@pytest.mark.parametrize("name", ["qwen3_30b_512", "window"])
def test_attention_of_a_chunk_has_the_arithmetic_of_what_it_sees(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_kernels.main([*FAST, "--ops", "chunk_attention", "--specs", name]) == 0
    product, kernel = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    seen = {"qwen3_30b_512": 8 * 9 // 2, "window": (1 + 7 * 2) + 3 * 8 * 2}[name]  # the second of `window` starts at 1
    assert (product["implementation"], kernel["implementation"]) == ("plain product", "reference")
    for row in (product, kernel):
        assert row["tflops"] == pytest.approx(4 * seen * 32 * 128 / row["us"] / 1e6)
    assert 0 <= kernel["error"] < 2e-2


def test_projections_have_rows_with_the_bytes_of_their_matrix(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_kernels.main([*FAST, "--ops", "norm_linear", "--specs", "two_rows_qkv", "qwen3_30b_o"]) == 0
    qkv, o = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert qkv["gbps"] == pytest.approx(256 * (5120 // 64) * 2 / qkv["us"] / 1e3)
    assert o["gbps"] == pytest.approx(256 * (2048 // 64) * 2 / o["us"] / 1e3)
    for row, spec in ((qkv, "two_rows_qkv"), (o, "qwen3_30b_o")):
        assert (row["op"], row["spec"], row["implementation"]) == ("norm_linear", spec, "reference")
        assert 0 <= row["error"] < 2e-2


def test_decisions_have_rows_with_all_that_they_read_and_write(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_kernels.main([*FAST, "--ops", "route", "admit", "--specs", "deepseek_v2_lite", "all_resident"]) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert [(row["op"], row["spec"]) for row in rows] == [
        ("route", "deepseek_v2_lite"), ("admit", "deepseek_v2_lite"), ("admit", "all_resident")
    ]  # fmt: skip
    chosen, groups = 6, 6
    admitted = 2 * chosen + 3 * 64 + 27 + 4 * groups + 64 + 27 + 2 * groups + 3
    resident = 2 * 8 + 2 * 128 + 128 + 4 * 8 + 128 + 128 + 3
    for row, num_bytes in zip(rows, (4 * (64 + 2 * chosen) + 1, 4 * admitted, 4 * resident), strict=True):
        assert row["gbps"] * row["us"] == pytest.approx(num_bytes / 1e3)
        assert row["error"] == 0


def test_a_wrong_choice_is_seen() -> None:
    case = bench_decisions.RouteCase(bench_kernels.SPECS["route"]["mixtral"], 1, 1, lambda run, arguments: 0.0)
    right = functools.partial(bench_decisions.routing.route, num_chosen=2, normalize=True)

    def wrong(logits, valid, ids: int, weights: float):
        expert_ids, found = right(logits, valid)
        return expert_ids + ids, found * weights

    assert case.error(right, right) == 0
    assert case.error(functools.partial(wrong, ids=1, weights=1.0), right) == math.inf
    assert case.error(functools.partial(wrong, ids=0, weights=1.5), right) == pytest.approx(0.5)


def test_an_unknown_spec_is_an_error_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_kernels.main(["--ops", "fetch", "--specs", "qwen3_31b"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: no spec of fetch is named qwen3_31b; there are qwen3_30b, empty")
    assert error.count("\n") == 1


def test_a_fetch_that_is_not_bit_equal_is_an_error() -> None:
    store, slots = np.arange(12, dtype=np.uint16).reshape(3, 4), np.zeros((2, 4), np.uint16)
    slots[1] = store[2]
    plan = (np.array([2, 0]), np.array([1, 0]), np.array(1))
    bench_fetch.require_fetched(slots, store, plan)
    with pytest.raises(RuntimeError, match="slot 0 does not hold the bits of expert 0"):
        bench_fetch.require_fetched(slots + slots[::-1], store + 1, (np.array([0]), np.array([0]), np.array(1)))
