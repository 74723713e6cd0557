"""tools/bench_speculative.py end to end on a tiny model, and the arithmetic of its rows."""

import dataclasses
import json
from pathlib import Path

import pytest

from jmoe.config import ModelConfig
from jmoe.stats import DecodeCalls, DraftStats, ExpertCounts, GenerationStats
from jmoe.synthetic import write_synthetic
from tests.models import SMALL
from tools import bench_speculative
from tools.bench_speculative import ways
from tools.speculative_rows import Way, row_of

TINY = Path(__file__).parents[1] / "configs" / "models" / "tiny.toml"
SIZES = "--prompt-tokens 8 --new-tokens 10 --warm-tokens 3".split()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JMOE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("speculative") / "hf"
    config = dataclasses.replace(SMALL, vocab_size=260, num_hidden_layers=2, mlp_only_layers=())
    write_synthetic(config, path, regime="flat", seed=2)
    return path


def test_every_way_has_a_row(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = "--batch-sizes 2 --shares 0.5 --draft-tokens 2 --ways on-demand hottest plain drafts auto"
    files = ["--json", str(tmp_path / "rows.jsonl"), "--plot", str(tmp_path / "plot.png")]
    trace = ["--profile", str(tmp_path / "trace")]
    assert bench_speculative.main(["--model", str(model), *SIZES, *options.split(), *files, *trace]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = json.loads(lines[-1])["rows"]
    assert [row["way"] for row in rows] == ["on-demand", "hottest", "plain", "drafts", "auto"]
    assert [row["slots"] for row in rows] == [2, 2, 4, 4, 4]
    assert [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()] == rows
    assert (tmp_path / "plot.png").stat().st_size > 1000
    assert list((tmp_path / "trace").rglob("*.xplane.pb"))
    assert all(row["num_tokens"] == 2 * 9 and row["tokens"] == rows[0]["tokens"] for row in rows), "in float32"
    assert rows[0]["hit rate"] == 0 < rows[1]["hit rate"], "in as many slots"
    drafts = rows[3]
    assert drafts["steps_by_draft_tokens"].keys() == {"2"}
    assert 0 <= drafts["acceptance"] <= 1 <= drafts["tokens/step"] <= 3
    assert rows[0]["speed"] is None
    assert drafts["speed"] == pytest.approx(drafts["tokens/s"] / rows[0]["tokens/s"])


def test_a_large_batch_of_random_weights_is_measured_and_what_cannot_be_is_skipped(capsys) -> None:
    """64 sequences and drafts of four; more experts than slots cannot draft."""
    options = "--layers 1 --batch-sizes 64 --ways drafts --draft-tokens 4 --shares 0.25 --draft-experts 2 9"
    small = "--prompt-tokens 5 --new-tokens 7 --warm-tokens 2 --temperature 1".split()
    assert bench_speculative.main(["--config", str(TINY), *options.split(), *small]) == 0
    lines = capsys.readouterr().out.splitlines()
    measured, skipped = json.loads(lines[-1])["rows"]
    assert (measured["batch"], measured["γ"], measured["N"], measured["num_tokens"]) == (64, 4, 2, 64 * 6)
    assert "draft_experts=9 are more than the 4 slots" in skipped["skipped"]
    assert lines[-2].startswith("skipped: drafts, batch 64, 4 slots: draft_experts=9")


def test_batches_are_decoded_one_after_another(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = "--batch-sizes 2 --shares 0.5 --draft-tokens 2 --ways plain auto --batches".split()
    tokens = []
    for batches in ("1", "3"):
        assert bench_speculative.main(["--model", str(model), *SIZES, *options, batches]) == 0
        plain, auto = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
        assert auto["tokens"] == plain["tokens"]
        assert auto["num_tokens"] == plain["num_tokens"] == int(batches) * 2 * 9
        tokens.append(plain["tokens"])
    one, three = tokens
    assert three[:2] == one
    assert len({tuple(ids) for ids in three}) == 6, "of other prompts"


def test_the_order_of_the_rows() -> None:
    parse = bench_speculative._parser().parse_args
    config = ModelConfig.from_toml(TINY)
    argv = "--batch-sizes 1 64 --shares 0.5 --draft-tokens 2 4 --draft-experts 3 --ways on-demand drafts"
    assert list(ways(parse(argv.split()), config)) == [
        way
        for batch in (1, 64)
        for way in (Way("on-demand", batch, 4), Way("drafts", batch, 8, 2, 3), Way("drafts", batch, 8, 4, 3))
    ]


def test_the_columns_are_ratios() -> None:
    calls = DecodeCalls(
        num_draft_tokens=2,
        num_steps=4,
        seconds=0.6,
        num_tokens=12,
        num_verifications=8,
        proposed=16,
        accepted=6,
        experts=ExpertCounts(hits=60, fetched=15, streamed=5),
    )
    stats = GenerationStats(
        num_prompt_tokens=8,
        num_generated_tokens=14,
        num_decode_tokens=12,
        decode_calls=((4, 0.6),),
        compile_s=1.5,
        ttft_s=0.1,
        prefill=ExpertCounts(hits=0, fetched=0, streamed=0),
        decode=calls.experts,
        expert_bytes=600_000,
        link_ceiling_gbps=None,
        peak_device_bytes=None,
        drafts=DraftStats(calls=(calls,), num_layers=2, expert_bytes=600_000),
    )
    row = row_of(Way("drafts", 2, 4, 2, 3), stats, num_layers=2)
    wanted = {
        "tokens/s": 20.0,
        "ms/step": 150.0,
        "acceptance": 6 / 16,
        "tokens/step": 12 / 8,
        "experts": 10.0,
        "hit rate": 0.75,
        "MB/token": 1.0,
    }
    assert {name: row[name] for name in wanted} == pytest.approx(wanted)
    assert (row["γ"], row["N"], row["policy"]) == (2, 3, "hot, reroute")
    plain = row_of(Way("plain", 3, 4), dataclasses.replace(stats, drafts=None), num_layers=2)
    assert (plain["γ"], plain["acceptance"], plain["tokens/step"]) == (None, None, 1.0)


def test_a_bad_setting_is_one_line(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_speculative.main(["--model", str(model), *SIZES, "--ways", "drafts", "--draft-experts", "-1"]) == 2
    assert "draft_experts=-1 must be at least 1" in capsys.readouterr().err
    assert bench_speculative.main(["--model", str(model), *SIZES, "--batches", "0"]) == 2
    assert "--batches 0 must be at least 1" in capsys.readouterr().err
