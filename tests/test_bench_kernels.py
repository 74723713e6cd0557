"""The kernel benchmark runs, and its last line is JSON that other programs can read."""

import json
import math

import numpy as np
import pytest

from tools import bench_kernels

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


def test_attention_has_rows_with_the_bytes_that_it_sees(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_kernels.main([*FAST, "--ops", "decode_attention", "--specs", "not_valid"]) == 0
    (row,) = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    num_bytes = 2 * (300 // 64 + 1 + 1023 // 64 + 1) * 4 * 128 * 2
    assert row["gbps"] == pytest.approx(num_bytes / row["us"] / 1e3)
    assert (row["op"], row["implementation"]) == ("decode_attention", "reference")
    assert 0 <= row["error"] < 2e-2


def test_an_unknown_spec_is_an_error_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_kernels.main(["--ops", "fetch", "--specs", "qwen3_31b"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: no spec of fetch is named qwen3_31b; there are qwen3_30b, empty")
    assert error.count("\n") == 1


def test_a_fetch_that_is_not_bit_equal_is_an_error() -> None:
    store, slots = np.arange(12, dtype=np.uint16).reshape(3, 4), np.zeros((2, 4), np.uint16)
    slots[1] = store[2]
    plan = (np.array([2, 0]), np.array([1, 0]), np.array(1))
    bench_kernels._require_fetched(slots, store, plan)
    with pytest.raises(RuntimeError, match="slot 0 does not hold the bits of expert 0"):
        bench_kernels._require_fetched(slots + slots[::-1], store + 1, (np.array([0]), np.array([0]), np.array(1)))
