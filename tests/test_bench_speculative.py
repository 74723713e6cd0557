"""tools/bench_speculative.py end to end on a tiny model, and the arithmetic of its rows."""

import dataclasses
import json
from pathlib import Path

import pytest

from jmoe.synthetic import write_synthetic
from tests.models import SMALL
from tools import bench_speculative
from tools.bench_speculative import Outcome, compare


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("speculative") / "hf"
    write_synthetic(dataclasses.replace(SMALL, vocab_size=260), path, regime="flat", seed=2)
    return path


def test_rows_compare_drafts_with_plain_decoding(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("JMOE_CACHE", str(tmp_path))
    options = "--batch-sizes 2 --shares 0.5 --draft-experts 3 --draft-tokens 2 --prompt-tokens 12 --new-tokens 10"
    policies = "--missing reroute substitute --temperature 1"
    assert bench_speculative.main(["--model", str(model), *options.split(), *policies.split()]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = json.loads(lines[-1])["rows"]
    assert [row["missing"] for row in rows] == ["reroute", "substitute"]
    assert len(lines) == 1 + len(rows) + 1
    for row in rows:
        assert 0 <= row["acceptance"] <= 1
        assert 1 <= row["tokens/cycle"] <= 3
        assert 2 <= row["asked"] <= SMALL.num_experts
        assert row["MB/token"] >= 0


def test_the_columns_are_ratios() -> None:
    plain = Outcome([[1] * 6, [2] * 6], seconds=1.2, asked=0, missed_bytes=24_000_000, num_layers=2, num_steps=6)
    drafted = Outcome(
        plain.tokens, 0.6, asked=80, missed_bytes=12_000_000, num_layers=2, num_steps=4, proposed=16, accepted=6
    )
    row = compare(plain, drafted, num_draft_tokens=2)
    assert row == pytest.approx(
        {
            "acceptance": 6 / 16,
            "tokens/cycle": 12 / 8,
            "asked": 10.0,
            "MB/token": 1.0,
            "plain MB": 2.0,
            "ms/token": 50.0,
            "speed": 2.0,
        }
    )


def test_a_bad_setting_is_one_line(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("JMOE_CACHE", str(tmp_path))
    small = "--batch-sizes 1 --shares 0.5 --prompt-tokens 8 --new-tokens 4 --draft-experts 0"
    assert bench_speculative.main(["--model", str(model), *small.split()]) == 2
    assert "draft experts=0 must be at least 1" in capsys.readouterr().err
