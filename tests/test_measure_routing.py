"""The tool that measures routing, from documents to table, JSON and plots, on a tiny model."""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from jmoe import checkpoint
from jmoe.convert import convert_hf
from jmoe.synthetic import write_synthetic
from jmoe.tokenizer import load_tokenizer
from tests.models import SMALL
from tools import measure_routing, routing_plots

CONFIG = dataclasses.replace(SMALL, vocab_size=259)  # a byte a token; layers 0 and 2 are a mixture of experts
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    write_synthetic(CONFIG, directory / "hf", regime="flat", seed=0)
    convert_hf(directory / "hf", directory / "converted")
    return directory / "converted"


@pytest.fixture
def texts(tmp_path: Path) -> list[str]:
    """Three documents of 40 to 60 bytes, and one of 10."""
    written = {"a": b"one two three " * 3, "b": bytes(range(33, 88)), "c": b"xyzzy " * 10, "short": b"0123456789"}
    for name, text in written.items():
        (tmp_path / name).write_bytes(text)
    return [str(tmp_path / name) for name in written]


def options(*arguments: object):
    return measure_routing._parse([str(argument) for argument in arguments])


def test_from_documents_to_table_json_and_plots(
    model: Path, texts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, plots = tmp_path / "routing.json", tmp_path / "made" / "plots"
    arguments = ["--model", model, "--text", *texts, "--tokens", 40, "--json", file, "--plots", plots]
    assert measure_routing.main([str(argument) for argument in arguments]) == 0
    printed, report = capsys.readouterr(), json.loads(file.read_text())
    assert "4 documents, 3 of them with 40 tokens or more; measuring 3" in printed.err
    lines = printed.out.splitlines()
    header = ["layer", "effective", "min", "use", "max", "use", "dead", "reuse", "shuffled", "LRU", "2", "LRU", "4"]
    assert lines[0].split() == header
    assert [line.split()[0] for line in lines[1:5]] == ["0", "2", "mean", "uniform"]
    assert report["documents"] == texts[:3]
    check_figures(report)
    for name in ("expert_use", "reuse_by_lag", "lru_hit_rate", "skew"):
        content = (plots / f"{name}.png").read_bytes()
        assert content.startswith(PNG)
        assert 5_000 < len(content) < 100_000
        assert f"{name}.png: written" in printed.out


def check_figures(report: dict) -> None:
    """That they agree with each other, and are those of a router that chooses 2 of 8."""
    use, hit_rate = np.array(report["expert_use"]), np.array(report["hit_rate_by_slots"])
    assert use.shape == (2, 8)
    np.testing.assert_allclose(use.sum(axis=1), 1, atol=1e-5)
    assert list(report["reuse_by_lag"]) == ["1", "2", "4", "8", "16", "32"]
    for n, row in enumerate(report["layers"]):
        assert row["layer"] == (0, 2)[n]
        assert 2 <= row["effective_experts"] <= 8
        assert row["min_use"] <= 1 <= row["max_use"]
        assert row["max_use"] == pytest.approx(8 * use[n].max(), abs=1e-4)
        assert row["num_dead"] == (use[n] < 0.01 / 8).sum()
        assert row["reuse"] == pytest.approx(report["reuse_by_lag"]["1"][n], abs=1e-4)
        assert row["hit_rate_2"] == pytest.approx(row["reuse"] * 39 / 40)  # the first token finds nothing
        assert row["hit_rate_4"] == pytest.approx(hit_rate[n, 4], abs=1e-4)
    assert report["mean"]["reuse"] == pytest.approx(np.mean([row["reuse"] for row in report["layers"]]))
    assert report["uniform"]["reuse"] == report["uniform"]["hit_rate_2"] == 0.25
    skew = report["skew"]
    assert skew["prompts"]["top_25%"] >= skew["pooled"]["top_25%"] >= 0.25
    assert skew["prompts"]["similarity"] < skew["shuffled"]["similarity"] < 1


def test_routing_of_a_text_does_not_depend_on_what_follows(model: Path) -> None:
    first, second = np.random.default_rng(0).integers(0, 259, (2, 40)).tolist()
    weights = measure_routing.load_resident(model, CONFIG)
    made, other = measure_routing.record(CONFIG, *weights, [first, first[:9] + second[9:]])
    assert made.shape == (40, 2, 2)
    np.testing.assert_array_equal(made[:9], other[:9])
    assert (made[9:] != other[9:]).any()
    assert len(np.unique(made)) == 8


def test_the_held_out_part_of_a_standard_library(model: Path, tmp_path: Path) -> None:
    for name in ("bisect.py", "calendar.py", "cmd.py", "heapq.py", "queue.py", "seen_in_training.py"):
        (tmp_path / name).write_text(f"{name} " * 5)
    arguments = ["--stdlib-held-out", "--stdlib-root", tmp_path, "--tokens", 20, "--num-documents", 3]
    made = measure_routing.read_documents(options(*arguments), CONFIG, load_tokenizer(model))
    assert list(made) == ["bisect.py", "cmd.py", "queue.py"]  # evenly spaced
    assert made["cmd.py"] == list(b"cmd.py cmd.py cmd.py cmd.py"[:20])


def test_slot_counts_hold_a_token() -> None:
    assert measure_routing.slot_counts(128, 8) == [8, 16, 32, 64]
    assert measure_routing.slot_counts(8, 4) == [4, 8]
    assert measure_routing.slot_counts(8, 6) == [6]


def test_one_layer_can_be_drawn(tmp_path: Path) -> None:
    figure = routing_plots.hit_rate_by_slots(np.linspace(0, 1, 9)[None], [5], 2)
    [line, uniform] = figure.axes[0].lines
    np.testing.assert_allclose(np.asarray(line.get_xydata()), [(slots, slots / 8) for slots in range(2, 9)])
    np.testing.assert_allclose(np.asarray(line.get_xydata()), np.asarray(uniform.get_xydata()))
    assert routing_plots.save(figure, tmp_path / "plot.png").read_bytes().startswith(PNG)


def test_a_missing_matplotlib_is_named_before_anything_is_run(
    model: Path, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert measure_routing.main(["--model", str(model), "--text", *texts, "--plots", str(tmp_path / "plots")]) == 2
    assert "--plots needs matplotlib, which is not installed; uv sync --extra plots" in capsys.readouterr().err
    assert not (tmp_path / "plots").exists()


def test_a_model_that_does_not_fit_is_refused(
    model: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measure_routing.memory, "device_available_bytes", lambda: 2048)
    assert measure_routing.main(["--model", str(model), "--text", *texts, "--tokens", "30"]) == 2
    error = capsys.readouterr().err
    needed, free = map(measure_routing.memory.format_bytes, (checkpoint.checkpoint_bytes(CONFIG), 2048))
    assert f"{needed} of weights, but {free} of device memory are free" in error
    assert "this tool keeps every expert on the device" in error


def test_documents_that_cannot_be_measured_are_refused(
    model: Path, texts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def error(*files: str, tokens: int = 50) -> str:
        assert measure_routing.main(["--model", str(model), "--text", *files, "--tokens", str(tokens)]) == 2
        return capsys.readouterr().err

    assert "1 of 2 documents have 50 tokens or more; expected at least 2" in error(*texts[1:2], texts[3])
    (tmp_path / "latin").write_bytes(b"caf\xe9" * 20)
    assert f"{tmp_path / 'latin'}: not UTF-8 text" in error(*texts, str(tmp_path / "latin"))
    assert "nowhere" in error(*texts, str(tmp_path / "nowhere"))


def test_a_tokenizer_of_another_model_is_refused(model: Path, texts: list[str]) -> None:
    fewer = dataclasses.replace(CONFIG, vocab_size=97)
    with pytest.raises(RuntimeError, match="the tokenizer gives id 122, the model has vocab_size=97"):
        measure_routing.read_documents(options("--text", *texts, "--tokens", 40), fewer, load_tokenizer(model))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "one of the arguments --text --stdlib-held-out is required"),
        (["--text", "a", "--stdlib-root", "b"], "--stdlib-root is where --stdlib-held-out reads"),
        (["--text", "a", "--tokens", "1"], "have to be 2 or more"),
    ],
)
def test_wrong_options_are_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        measure_routing.main(arguments)
    assert raised.value.code == 2
    assert message in capsys.readouterr().err
