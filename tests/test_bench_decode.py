"""The decode benchmark runs, and its last line is JSON that other programs can read."""

import dataclasses
import json
import math
import types
from pathlib import Path

import numpy as np
import pytest

from jmoe.config import ModelConfig
from jmoe.convert import convert_hf
from jmoe.decoding.contest import Choice
from jmoe.decoding.prefetch_budget import Budget
from jmoe.model.families import trunk_shapes
from jmoe.synthetic import write_synthetic
from tools import bench_decode
from tools.decode_table import timing

pytestmark = pytest.mark.usefixtures("brings_all_guesses")

TINY = Path(__file__).parents[1] / "configs" / "models" / "tiny.toml"
SIZES = "--prompt-tokens 5 --new-tokens 11 --repeats 1 --max-seq-len 32 --decode-chunk 2 --layers 2".split()


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs the benchmark; returns its lines. Link and memory are said to do 2 and 3 GB/s, which takes no time."""
    monkeypatch.setattr(bench_decode.memory, "measure_link_gbps", lambda: 2.0)
    monkeypatch.setattr(bench_decode, "memory_gbps", lambda: 3.0)

    def run(*argv: str) -> list[str]:
        assert bench_decode.main(["--config", str(TINY), *SIZES, *argv]) == 0
        return capsys.readouterr().out.splitlines()

    return run


def test_the_last_line_is_json_with_a_row_for_each_share(bench) -> None:
    lines = bench("--shares", "1", "0.5", "--layers", "1")
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
    assert card["prompts"] == "random token ids (seed 0)"
    shapes = trunk_shapes(dataclasses.replace(config, num_hidden_layers=2))
    trunk = {path: math.prod(shape) for path, shape in shapes.items()}
    read = 4 * (sum(trunk.values()) - (0 if config.tie_word_embeddings else trunk["embed/embedding"])) + routed
    assert row["hbm_gbps"] * row["mean_ms_per_step"] * 1e6 == pytest.approx(read, rel=1e-6)
    assert (card["hbm_ceiling_gbps"], row["percent_of_hbm"]) == (3.0, pytest.approx(100 * row["hbm_gbps"] / 3))
    assert 0 < 10 * row["first_ms_per_step"] < 1e3 * row["first_run_s"], "which has the compiling, and the prompt"
    assert any(line.startswith("device") for line in lines)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of one layer whose token ids are bytes."""
    path = tmp_path_factory.mktemp("model")
    config = dataclasses.replace(ModelConfig.from_toml(TINY), num_hidden_layers=1)
    write_synthetic(config, path / "hf", regime="flat", seed=0)
    convert_hf(path / "hf", path / "converted")
    return path / "converted"


def prompts_of(monkeypatch: pytest.MonkeyPatch, *argv: str) -> np.ndarray:
    monkeypatch.setattr(bench_decode.memory, "measure_link_gbps", lambda: 2.0)
    monkeypatch.setattr(bench_decode, "memory_gbps", lambda: 3.0)
    sizes = ["--batch-sizes", "2", "--repeats", "2", "--prompt-tokens", "7"]
    return bench_decode.Bench(bench_decode.parse([*argv, *sizes])).prompts


def test_random_weights_get_the_same_random_ids_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = prompts_of(monkeypatch, "--config", str(TINY), "--layers", "1", "--seed", "3")
    np.testing.assert_array_equal(prompts, np.random.default_rng(3).integers(0, 512, (3, 2, 7)))


def test_a_model_gets_the_beginnings_of_files(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"source": text, "text": text * 9}) + "\n" for text in "abcdef"))
    prompts = prompts_of(monkeypatch, "--model", str(model), "--prompts", str(file))
    assert prompts.shape == (3, 2, 7)
    assert sorted(bytes(row) for row in prompts.reshape(6, 7).tolist()) == [
        7 * text for text in map(str.encode, "abcdef")
    ]


def test_a_model_is_measured(model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(bench_decode.memory, "measure_link_gbps", lambda: 2.0)
    monkeypatch.setattr(bench_decode, "memory_gbps", lambda: 3.0)
    argv = ["--model", str(model), "--shares", "0.5", "--no-reference", *SIZES, "--layers", "1", "--new-tokens", "5"]
    assert bench_decode.main(argv) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (report["card"]["weights"], report["card"]["prompts"]) == ("checkpoint", "python.jsonl (seed 0)")
    assert report["rows"][0]["tokens_per_s"] > 0


def test_prompts_that_are_too_short_are_named(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "texts.jsonl"
    file.write_text('{"source": "one.py", "text": "1234"}\n{"source": "two.py", "text": "12345"}\n')
    assert bench_decode.main(["--model", str(model), "--prompts", str(file), *SIZES]) == 2
    assert f"error: {file}: prompts of fewer than --prompt-tokens 5 tokens: one.py has 4." in capsys.readouterr().err


def test_random_prompts_take_no_file(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench_decode.main(["--config", str(TINY), "--prompts", "x.jsonl"])
    assert "--prompts: not allowed with --config" in capsys.readouterr().err


def test_nothing_to_time_is_an_error_before_anything_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench_decode.main(["--config", str(TINY), *SIZES, "--new-tokens", "3"])
    said = capsys.readouterr().err
    assert "--new-tokens: of 3 prefill makes one, and the first call, of 2 (--decode-chunk), is not timed" in said


def test_the_fewest_new_tokens_are_timed(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_decode.memory, "measure_link_gbps", lambda: 2.0)
    monkeypatch.setattr(bench_decode, "memory_gbps", lambda: 3.0)
    argv = ["--model", str(model), "--shares", "0.5", *SIZES, "--layers", "1", "--new-tokens", "4"]
    assert bench_decode.main(argv) == 0


def test_timing_by_hand() -> None:
    made = timing([(2, 0.008), (1, 0.002), (4, 0.012), (1, 0.009), (1, 0.005)], batch_size=3)
    assert made["ms_per_step"] == pytest.approx(4)  # of 2, 3, 4, 5 and 9
    assert (made["ms_low"], made["ms_high"]) == (pytest.approx(3), pytest.approx(5))
    assert made["tokens_per_s"] == pytest.approx(750)


def test_a_model_or_a_configuration_must_be_given(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench_decode.main([])
    assert "--model --config is required" in capsys.readouterr().err


def test_a_row_for_each_amount_that_is_prefetched(bench) -> None:
    amounts = ["--prefetch", "lookahead", "--prefetch-experts", "0", "1"]
    plain, ahead = json.loads(bench("--shares", "0.25", "--no-reference", *amounts)[-1])["rows"]
    assert [plain[name] for name in ("prefetch", "early_mb", "late_mb", "wasted_mb")] == [None] * 4
    assert ahead["prefetch"] == 1
    assert ahead["hit_rate"] == plain["hit_rate"]
    assert 0 < ahead["early_mb"] < plain["mb_per_token"]
    assert ahead["late_mb"] is None, "a CPU has no clock for it"
    assert ahead["mb_per_token"] == pytest.approx(plain["mb_per_token"] + ahead["wasted_mb"])


def test_all_guesses_come_whatever_they_save(bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Budget, "choose", lambda budget: Choice(0))
    options = "--shares", "0.25", "--no-reference", "--prefetch", "lookahead", "--prefetch-experts", "0.125"
    (refused,), (brought,) = (json.loads(bench(*options, *more)[-1])["rows"] for more in ((), ("--all-guesses",)))
    assert refused["early_mb"] == refused["wasted_mb"] == 0 < brought["early_mb"]


def test_all_guesses_of_no_prefetch_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench_decode.main(["--config", "configs/models/qwen3-30b-a3b.toml", "--all-guesses"])
    assert "--all-guesses: there are none; add --prefetch" in capsys.readouterr().err


def test_on_demand_fetches_all_that_is_asked_for(bench) -> None:
    report = json.loads(bench("--shares", "0.25", "0", "--no-reference")[-1])
    on_demand, kept = report["rows"]
    assert (on_demand["share"], kept["share"]) == (0, 0.25)
    assert on_demand["slots"] == kept["slots"] == 4
    assert on_demand["hit_rate"] == 0 < kept["hit_rate"]
    assert on_demand["mb_per_token"] == pytest.approx(report["card"]["routed_mb_per_token"], abs=0.05)
    assert kept["mb_per_token"] == pytest.approx(on_demand["mb_per_token"] * (1 - kept["hit_rate"]))
    assert 0 < kept["prompt_mb"] < on_demand["prompt_mb"]


def test_a_row_for_each_batch_size(bench) -> None:
    lines = bench("--shares", "0.5", "--batch-sizes", "3", "1", "--layers", "1")
    alone, three, reference, reference_of_three = json.loads(lines[-1])["rows"]
    assert [row["batch"] for row in (alone, three, reference, reference_of_three)] == [1, 3, 1, 3]
    assert three["tokens_per_s"] == pytest.approx(3e3 / three["ms_per_step"])
    assert three["planned_bytes"] > alone["planned_bytes"]


def test_a_row_has_no_peak_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = types.SimpleNamespace(peak=10)
    for now, of_the_row in ((30, 30), (30, None), (40, 40), (None, None)):
        monkeypatch.setattr(bench_decode.memory, "peak_device_bytes", lambda now=now: now)
        assert bench_decode.Bench._peak(bench) == of_the_row


def test_an_oracle_is_of_one_batch_size(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench_decode.main(["--config", str(TINY), "--prefetch", "oracle", "--batch-sizes", "1", "8"])
    assert "oracle knows what one of --batch-sizes asks for" in capsys.readouterr().err


def test_an_oracle_is_always_right(bench) -> None:
    """With as many experts as a token has, all that the second of two layers is missing comes early."""
    lines = bench("--shares", "0.25", "--no-reference", "--prefetch", "oracle", "--prefetch-experts", "0", "0.5", "4")
    assert "oracle: 20 decode steps recorded" in lines
    report = json.loads(lines[-1])
    assert report["card"]["prefetch"] == "oracle"
    plain, half, most = report["rows"]
    assert plain["useful"] is None
    assert half["useful"] == most["useful"] == 1
    assert half["hit_rate"] == most["hit_rate"] == plain["hit_rate"]
    assert half["mb_per_token"] == most["mb_per_token"] == plain["mb_per_token"]
    assert 0 < half["early_mb"] < most["early_mb"] < plain["mb_per_token"]


@pytest.mark.parametrize("kind", ["activation", "both"])
def test_guesses_from_past_requests(bench, kind: str) -> None:
    [row] = json.loads(bench("--shares", "0.25", "--no-reference", "--prefetch", kind)[-1])["rows"]
    assert row["prefetch"] == 1
    assert row["early_mb"] + row["wasted_mb"] > 0


def test_an_amount_without_a_prefetch_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        bench_decode.main(["--config", str(TINY), "--prefetch-experts", "1"])
    assert stop.value.code == 2
    assert "is what --prefetch lookahead, activation, both or oracle brings; add one of them" in capsys.readouterr().err
