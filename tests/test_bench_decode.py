"""The decode benchmark runs, and its last line is JSON that other programs can read."""

import json
from pathlib import Path

import pytest

from jmoe.config import ModelConfig
from tools import bench_decode
from tools.bench_decode import timing

TINY = Path(__file__).parents[1] / "configs" / "models" / "tiny.toml"
SIZES = "--prompt-tokens 5 --new-tokens 11 --repeats 1 --max-seq-len 32 --decode-chunk 2 --layers 2".split()


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs the benchmark; returns its lines. The link is said to do 2 GB/s, which takes no time to measure."""
    monkeypatch.setattr(bench_decode.memory, "measure_link_gbps", lambda: 2.0)

    def run(*argv: str) -> list[str]:
        assert bench_decode.main(["--config", str(TINY), *SIZES, *argv]) == 0
        return capsys.readouterr().out.splitlines()

    return run


def test_the_last_line_is_json_with_a_row_for_each_share(bench) -> None:
    lines = bench("--shares", "1", "0.5")
    report = json.loads(lines[-1])
    rows = {row["share"]: row for row in report["rows"]}
    assert list(rows) == [0.5, 1.0, "reference"]
    assert (rows[0.5]["slots"], rows[1.0]["slots"]) == (8, 16)
    assert all(row["ms_low"] <= row["ms_per_step"] <= row["ms_high"] for row in rows.values())
    assert all(row["tokens_per_s"] > 0 < row["ttft_s"] for row in rows.values())
    assert 0 < rows[0.5]["hit_rate"] < 1 == rows[1.0]["hit_rate"]
    assert rows[0.5]["mb_per_token"] > 0 == rows[1.0]["mb_per_token"]
    assert rows[0.5]["planned_bytes"] < rows[1.0]["planned_bytes"]
    assert "reference" in lines[-2]


def test_the_card_says_what_was_run(bench) -> None:
    lines = bench("--shares", "0.25", "--no-reference")
    card, [row] = json.loads(lines[-1])["card"], json.loads(lines[-1])["rows"]
    config = ModelConfig.from_toml(TINY)
    assert row["slots"] == 4
    assert (card["layers"], card["model"], card["link_ceiling_gbps"]) == (2, str(TINY), 2.0)
    assert card["store_gb"] == round(2 * 16 * config.expert_bytes / 1e9, 2)
    routed = 2 * 4 * config.expert_bytes
    assert card["routed_mb_per_token"] == round(routed / 1e6, 1)
    assert card["roofline_tokens_per_s_without_hits"] == round(2e9 / routed, 1)
    assert any(line.startswith("device") for line in lines)


def test_timing_by_hand() -> None:
    made = timing([(2, 0.008), (1, 0.002), (4, 0.012), (1, 0.009), (1, 0.005)], batch_size=3)
    assert made["ms_per_step"] == pytest.approx(4)  # of 2, 3, 4, 5 and 9
    assert (made["ms_low"], made["ms_high"]) == (pytest.approx(3), pytest.approx(5))
    assert made["tokens_per_s"] == pytest.approx(750)


def test_a_model_or_a_configuration_must_be_given(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench_decode.main([])
    assert "--model --config is required" in capsys.readouterr().err
