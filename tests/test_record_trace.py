"""The tool that records traces, from prompts to the file and its line, on a tiny model."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest

from jmoe import checkpoint
from jmoe.convert import convert_hf
from jmoe.synthetic import write_synthetic
from jmoe.traces import Trace
from tests.models import SMALL
from tools import record_trace

CONFIG = dataclasses.replace(SMALL, vocab_size=259)  # a byte a token; layers 0 and 2 are a mixture of experts


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    write_synthetic(CONFIG, directory / "hf", regime="flat", seed=0)
    convert_hf(directory / "hf", directory / "converted")
    return directory / "converted"


@pytest.fixture(autouse=True)
def prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Five texts; what JAX compiles is kept where the test leaves nothing behind."""
    monkeypatch.setenv("JMOE_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "prompts.jsonl"
    file.write_text(
        "".join(json.dumps({"source": name, "text": f"{name} says {name}. " * 9}) + "\n" for name in "abcde")
    )
    return file


def record(model: Path, prompts: Path, *arguments: object) -> int:
    file = prompts.with_name("trace.npz")
    given = ["--model", model, "--prompts", prompts, file, "--ignore-eos", "--expert-slots", 3, *arguments]
    return record_trace.main([str(argument) for argument in given])


def test_from_prompts_to_a_file(model: Path, prompts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Twice at a time, and alone, with an odd one left over: which requests run together does not change routing."""
    sizes = ["--num-requests", 3, "--prompt-tokens", 20, "--new-tokens", 6, "--temperature", 0.8]
    assert record(model, prompts, *sizes, "--batch-size", 2) == 0
    file = prompts.with_name("trace.npz")
    trace, line = Trace.read(file), capsys.readouterr().out
    assert line.startswith(f"{file}: 3 requests, 75 tokens (60 of prompts, 15 decoded), {file.stat().st_size} bytes; ")
    rate = re.search(r"hit rate (\d+\.\d)% \(3 slots for 8 experts\)", line)
    assert rate is not None
    assert 0 < float(rate.group(1)) < 100
    assert (trace.model, trace.fingerprint) == (str(model), checkpoint.read_manifest(model).fingerprint)
    assert trace.fingerprint
    np.testing.assert_array_equal(trace.requests, range(3))
    assert trace.needed(prefill=False).shape == (5 + 5, 2, 8)

    assert record(model, prompts, *sizes) == 0
    alone = Trace.read(file)
    assert alone.needed(prefill=False).shape == (15, 2, 8)
    for together, single in zip(trace.sequences(), alone.sequences(), strict=True):
        np.testing.assert_array_equal(together, single)
    again = alone.rebatched(2).needed(prefill=False)
    np.testing.assert_array_equal(again, trace.needed(prefill=False))


def test_lengths_may_be_drawn(model: Path, prompts: Path) -> None:
    drawn = ["--prompt-tokens", 12, "--prompt-sigma", 0.7, "--new-tokens", 4, "--new-sigma", 0.7, "--temperature", 0]
    assert record(model, prompts, *drawn, "--num-requests", 4) == 0
    trace = Trace.read(prompts.with_name("trace.npz"))
    of_prompts, decoded = (list(map(len, trace.sequences(prefill=prefill))) for prefill in (True, False))
    assert len(set(of_prompts)) > 1 < len(set(decoded))
    assert 1 <= min(of_prompts) <= max(of_prompts) <= 96


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prompts", "nowhere.jsonl"], "nowhere.jsonl: no such file; expected JSON lines"),
        (["--num-requests", 0], "num_requests=0 must be at least 1"),
        (["--new-tokens", 0], "expected 1 <= smallest <= median <= largest"),
        (["--expert-slots", 9], "expert_slots=9 is outside 2..8"),
        (["--model", "nowhere"], "nowhere: no such directory"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(
    model: Path, prompts: Path, arguments: list, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert record(model, prompts, *arguments) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert words in error
    assert not prompts.with_name("trace.npz").exists()


def test_a_place_that_is_not_there_is_refused_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert record_trace.main([str(tmp_path / "missing" / "trace.npz")]) == 2
    assert f"no directory {tmp_path / 'missing'}; make it first" in capsys.readouterr().err
