"""Scores against plain numpy on the reference's logits; windows, batches and slots change how, not what."""

import dataclasses
import functools
import itertools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from jmoe import checkpoint, convert, synthetic
from jmoe.config import RuntimeConfig
from jmoe.decoding.prefill import Prefill
from jmoe.decoding.resident import forward_resident
from jmoe.decoding.step import Steps
from jmoe.engine import Engine, Weights
from jmoe.evaluation import Score, cut_windows, document_start, evaluate
from jmoe.executing import executed_guess
from jmoe.experts.prefetch import everywhere
from jmoe.experts.prefetch_file import Calibration, file_beside
from jmoe.loading import load
from jmoe.synthetic import byte_tokenizer
from jmoe.tokenizer import TOKENIZER_FILE, Tokenizer
from tests import models
from tests.models import MAX_SEQ_LEN, SMALL
from tools import eval_lm

TEXT = dataclasses.replace(SMALL, vocab_size=259, num_hidden_layers=2)  # the byte tokenizer's ids and no more
START, IM_START, IM_END = 256, 257, 258
BYTES = Tokenizer(byte_tokenizer(TEXT.vocab_size), eos_ids=(IM_END, START))
TEXTS = [
    "One line.\n",
    "Größe 10 µs",
    "",
    "x" * 90,
    "A paragraph that is longer than any window here, and goes on, so.",
]


@functools.cache
def text_engine(
    expert_slots: int = 4, batch_size: int = 3, prefill_chunk: int = 32, weights: Callable[[], Weights] | None = None
) -> Engine:
    runtime = RuntimeConfig(
        expert_slots=expert_slots,
        batch_size=batch_size,
        prefill_chunk=prefill_chunk,
        max_seq_len=MAX_SEQ_LEN,
        measure_link=False,
    )
    return Engine.start(TEXT, runtime, weights or (lambda: models.weights(TEXT)), tokenizer=BYTES)


def with_head(value: float) -> Weights:
    params = dict(models.weights(TEXT).params)
    params["lm_head/kernel"] = jnp.full_like(params["lm_head/kernel"], value)
    return dataclasses.replace(models.weights(TEXT), params=params)


def uniform() -> Weights:
    return with_head(0.0)


def broken() -> Weights:
    return with_head(math.nan)


@functools.cache
def reference() -> Callable[[jax.Array], jax.Array]:
    weights = models.on_device(models.weights(TEXT))
    return jax.jit(functools.partial(forward_resident, TEXT, weights.params, weights.store.layers))


def expected(ids: Sequence[int]) -> np.ndarray:
    """log softmax in float64 of the reference's logits; what follows `ids` changes nothing before it."""
    padded = np.zeros((1, MAX_SEQ_LEN), np.int32)
    padded[0, : len(ids)] = ids
    logits = np.asarray(reference()(jnp.asarray(padded)), np.float64)[0, : len(ids) - 1]
    return logits[np.arange(len(ids) - 1), list(ids[1:])] - np.log(np.exp(logits).sum(axis=-1))


def expected_nats(text: str, window: int, stride: int) -> float:
    """Each token given the tokens of the first window that reaches it."""
    ids = [START, *text.encode()]
    nats, scored = 0.0, 0
    for begin in range(0, len(ids), stride):
        end = min(begin + window, len(ids) - 1)
        if end > scored:
            nats -= expected(ids[begin : end + 1])[scored - begin :].sum()
            scored = end
    return nats


# Engine.score


@pytest.mark.parametrize(("expert_slots", "batch_size", "prefill_chunk"), [(2, 1, 16), (8, 3, 16), (4, 3, 32)])
def test_scores_are_those_of_the_reference(expert_slots: int, batch_size: int, prefill_chunk: int) -> None:
    engine = text_engine(expert_slots, batch_size, prefill_chunk)
    sequences = models.prompts(MAX_SEQ_LEN, 1, 19, 2, 33, 17, config=TEXT)
    for start in range(0, len(sequences), batch_size):
        batch = sequences[start : start + batch_size]
        scores = engine.score(batch)
        assert [(row.shape, row.dtype) for row in scores] == [((len(ids) - 1,), np.float32) for ids in batch]
        for row, ids in zip(scores, batch, strict=True):
            np.testing.assert_allclose(row, expected(ids), atol=1e-4)


def test_a_token_alone_has_no_score() -> None:
    assert [row.shape for row in text_engine().score([[5], [6], [7]])] == [(0,), (0,), (0,)]


@pytest.mark.parametrize(
    ("token_ids", "message"),
    [
        ([], "0 sequences, the longest of 0 tokens; expected at least one"),
        ([[1], []], "sequence 1 is empty; give at least one token"),
        ([[1] * (MAX_SEQ_LEN + 1)], "the longest of 65 tokens; expected at least one, and at most max_seq_len=64"),
        ([[1], [2, 259, -1]], r"sequence 1 has token ids \[259, -1\] outside 0\.\.258"),
        ([[1, 2]] * 4, "4 sequences at a time, but memory is planned for 3"),
    ],
)
def test_sequences_that_cannot_be_are_refused(token_ids, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        text_engine().score(token_ids)
    assert len(text_engine().score([[1, 2]] * 3)) == 3  # the engine is free


# Windows


@given(num_tokens=st.integers(1, 60), length=st.integers(1, 20), data=st.data())
def test_every_token_but_the_first_is_scored_once(num_tokens: int, length: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, length))
    ids, scored, begin = list(range(num_tokens)), [0], 0
    for number, (window, num_context) in enumerate(cut_windows(ids, length, stride)):
        assert window == ids[begin : begin + length + 1]
        assert num_context == (length - stride if number else 0)
        scored += window[1 + num_context :]
        begin += stride
    assert scored == ids


def test_windows_by_hand() -> None:
    ids = [0, 1, 2, 3, 4, 5, 6, 7]
    assert cut_windows(ids, 3, 3) == [([0, 1, 2, 3], 0), ([3, 4, 5, 6], 0), ([6, 7], 0)]
    assert cut_windows(ids, 4, 2) == [([0, 1, 2, 3, 4], 0), ([2, 3, 4, 5, 6], 2), ([4, 5, 6, 7], 2)]
    assert cut_windows(ids, 7, 1) == [(ids, 0)]
    assert cut_windows([0], 3, 3) == [([0], 0)]


@pytest.mark.parametrize(
    ("ids", "length", "stride", "message"),
    [
        ([], 3, 3, "a document without a token; expected at least its start token"),
        ([0, 1], 0, 0, "window=0 with stride=0; expected 1 <= stride <= window"),
        ([0, 1], 3, 0, "window=3 with stride=0"),
        ([0, 1], 3, 4, "window=3 with stride=4"),
    ],
)
def test_windows_that_cannot_be_are_refused(ids: list[int], length: int, stride: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cut_windows(ids, length, stride)


# evaluate


@pytest.mark.parametrize(
    ("window", "stride", "options"),
    [
        (None, None, {}),
        (20, None, {}),
        (20, 7, {"expert_slots": 2, "batch_size": 1, "prefill_chunk": 16}),
        (20, 1, {"expert_slots": 8, "prefill_chunk": 16}),
        (33, 16, {}),
    ],
)
def test_texts_are_those_of_the_reference(window: int | None, stride: int | None, options: dict[str, int]) -> None:
    score = evaluate(text_engine(**options), iter(TEXTS), window=window, stride=stride)
    length = window or MAX_SEQ_LEN - 1
    nats = sum(expected_nats(text, length, stride or length) for text in TEXTS)
    num_bytes = sum(len(text.encode()) for text in TEXTS)
    assert score.nats == pytest.approx(nats, rel=1e-5)
    assert (score.num_documents, score.num_tokens, score.num_bytes) == (5, num_bytes, num_bytes)


def test_tokens_are_not_bytes() -> None:
    words = {"[": 0, "ein": 1, "Käse": 2, "?": 3}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="?"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    engine = Engine.start(
        TEXT,
        RuntimeConfig(expert_slots=4, batch_size=3, prefill_chunk=32, max_seq_len=MAX_SEQ_LEN, measure_link=False),
        lambda: models.weights(TEXT),
        tokenizer=Tokenizer(inner, eos_ids=()),
    )
    score = evaluate(engine, ["ein Käse", "Käse ein ein was", " "], start_id=0)
    nats = -(expected([0, 1, 2]).sum() + expected([0, 2, 1, 1, 3]).sum())
    assert (score.num_documents, score.num_tokens, score.num_bytes) == (3, 6, 9 + 17 + 1)
    assert score.bits_per_byte == pytest.approx(nats / math.log(2) / 27, rel=1e-5)
    assert score.bits_per_token == pytest.approx(nats / math.log(2) / 6, rel=1e-5)
    assert score.perplexity == pytest.approx(math.exp(nats / 6), rel=1e-5)


def test_a_model_that_knows_nothing_needs_log2_of_its_vocabulary() -> None:
    score = evaluate(text_engine(weights=uniform), TEXTS, window=20, stride=9)
    assert score.bits_per_token == pytest.approx(math.log2(259), rel=1e-7)
    assert score.perplexity == pytest.approx(259, rel=1e-6)


def test_a_model_whose_probabilities_are_no_numbers_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"not finite \(nan nats in 3 windows\).*dtype=float32"):
        evaluate(text_engine(weights=broken), TEXTS)


def test_texts_are_read_as_they_are_needed_and_progress_is_told() -> None:
    read, told = [], []

    def texts():
        for text in TEXTS:
            read.append(text)
            yield text

    def progress(score: Score) -> None:
        told.append((len(read), score))

    total = evaluate(text_engine(), texts(), window=20, progress=progress)
    scores = [score for _, score in told]
    assert told[0][0] < len(TEXTS)
    assert scores[-1] == total
    for earlier, later in itertools.pairwise(scores):
        assert earlier.num_tokens < later.num_tokens
        assert earlier.num_bytes < later.num_bytes
        assert earlier.nats < later.nats
    assert all(score.num_bytes == score.num_tokens for score in scores)  # a document that goes on counts in part
    assert [score.num_documents for score in scores] == [3, 3, 4, 5]


def test_few_shapes_are_compiled() -> None:
    """Whatever the lengths, one for each power of two up to the chunk; and a batch is always full."""

    def compiled() -> tuple[int, int]:
        return Prefill.prefill_hidden._cache_size(), Steps.token_logprobs._cache_size()

    engine = text_engine(expert_slots=5)
    before = compiled()
    evaluate(engine, ["y" * length for length in (*range(1, 20), 35, 47, 60, 200)], window=50, stride=27)
    once = compiled()
    assert [now - then for now, then in zip(once, before, strict=True)] == [2, 2]
    evaluate(engine, TEXTS, window=41, stride=3)
    assert compiled() == once


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ([], {}, "0 texts without a token to score; give at least one"),
        (["", ""], {}, "2 texts without a token"),
        ("text", {}, "texts is one string"),
        (TEXTS, {"window": MAX_SEQ_LEN}, "window=64 .*do not fit in max_seq_len=64; choose at most 63"),
        (TEXTS, {"window": 0}, "window=0 with stride=0"),
        (TEXTS, {"window": 8, "stride": 9}, "window=8 with stride=9"),
        (TEXTS, {"start_id": 259}, r"sequence 0 has token ids \[259\] outside 0\.\.258"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(texts, options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(text_engine(), texts, **options)


def test_an_engine_without_tokenizer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_engine(), "tokenizer", None)
    with pytest.raises(ValueError, match="this engine has no tokenizer, which texts need"):
        evaluate(text_engine(), TEXTS)


@pytest.mark.parametrize(
    ("named", "eos_ids", "start"),
    [
        ({"bos_token": "<|im_start|>"}, (START,), IM_START),
        ({"bos_token": "<unheard of>"}, (IM_END, START), START),
        ({}, (IM_END, START), START),
        ({}, (IM_END,), IM_END),
        ({}, (IM_END, IM_START), None),
        ({}, (), None),
    ],
)
def test_what_stands_before_a_document(named, eos_ids, start: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = text_engine()
    monkeypatch.setattr(engine, "tokenizer", dataclasses.replace(BYTES, named_tokens=named, eos_ids=eos_ids))
    if start is None:
        with pytest.raises(ValueError, match=r"no token to begin documents with: .*give start_id"):
            document_start(engine)
    else:
        assert document_start(engine) == start


def test_figures_by_hand() -> None:
    score = Score(num_documents=1, num_tokens=4, num_bytes=6, nats=12 * math.log(2))
    assert score.bits_per_byte == pytest.approx(2)
    assert score.bits_per_token == pytest.approx(3)
    assert score.perplexity == pytest.approx(8)
    assert score + score == Score(num_documents=2, num_tokens=8, num_bytes=12, nats=24 * math.log(2))
    assert score.to_dict()["num_bytes"] == 6
    assert score.to_dict()["bits_per_byte"] == score.bits_per_byte
    assert Score(num_documents=1, num_tokens=1, num_bytes=1, nats=1e4).perplexity == math.inf
    empty = Score(num_documents=1, num_tokens=0, num_bytes=0, nats=0.0)
    assert all(math.isnan(value) for value in (empty.bits_per_byte, empty.bits_per_token, empty.perplexity))


# The tool


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("evaluation")
    synthetic.write_synthetic(TEXT, path / "hf", regime="flat", seed=3)
    convert.convert_hf(path / "hf", path / "model")
    return path / "model"


@pytest.fixture
def run(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs the tool; returns what it wrote to stdout and to stderr."""
    monkeypatch.setenv("JMOE_CACHE", str(tmp_path / "cache"))

    def call(*argv: object, code: int = 0) -> tuple[str, str]:
        capsys.readouterr()
        arguments = ["--model", model, "--window", 16, "--batch-size", 3, *argv]
        assert eval_lm.main([str(argument) for argument in arguments]) == code
        return capsys.readouterr()

    return call


def write_texts(folder: Path) -> list[Path]:
    files = [folder / f"{number}.txt" for number in range(len(TEXTS))]
    for file, text in zip(files, TEXTS, strict=True):
        file.write_text(text, encoding="utf-8")
    return files


def test_the_tool_scores_files(run, model: Path, tmp_path: Path) -> None:
    out, err = run("--text", *write_texts(tmp_path), "--stride", 7, "--expert-slots", 3, "--json")
    [line] = out.splitlines()
    report = json.loads(line)
    runtime = RuntimeConfig(max_seq_len=17, batch_size=3, measure_link=False)
    score = evaluate(load(model, runtime), TEXTS, stride=7)
    figures = score.to_dict()
    assert {name: report[name] for name in figures} == pytest.approx(figures, rel=1e-5)
    assert (report["window"], report["stride"], report["start_id"]) == (16, 7, START)
    assert (report["model"], report["dtype"]) == (str(model), "float32")
    assert report["tokens_per_s"] == pytest.approx(score.num_tokens / report["seconds"])
    assert "memory plan:" in err
    assert "3 of 8 a layer" in err


def test_the_tool_says_what_executed_guesses_cost(run, tmp_path: Path) -> None:
    model = tmp_path / "model"
    synthetic.write_synthetic(dataclasses.replace(TEXT, mlp_only_layers=()), tmp_path / "hf", regime="flat", seed=3)
    convert.convert_hf(tmp_path / "hf", model)
    methods, fingerprint = everywhere("default_vectors", 2), checkpoint.read_manifest(model).fingerprint
    vectors = np.random.default_rng(0).normal(size=(2, TEXT.num_experts, TEXT.hidden_size)).astype(np.float32)
    made = Calibration(fingerprint, vectors, everywhere(None, 2), methods, ((0.75,), ()))
    made.save(file_beside(model))
    options = ["--model", model, "--text", *write_texts(tmp_path), "--execute-guess", 0.5, 0.9]
    report = json.loads(run(*options, "--json")[0])
    guessed, exact = report["execute_guess"]
    assert (guessed["gate"], guessed["guessed_layers"]) == (0.5, [1])
    assert (exact["gate"], exact["guessed_layers"], exact["change"]) == (0.9, [], 0)
    assert exact["bits_per_byte"] == report["bits_per_byte"]
    engine = load(model, RuntimeConfig(max_seq_len=17, batch_size=3, measure_link=False))
    executed = executed_guess(engine.config, engine.weights.params, 0.5, made)
    score = evaluate(engine, TEXTS, executed=executed)
    assert guessed["bits_per_byte"] == pytest.approx(score.bits_per_byte, rel=1e-5)
    assert guessed["change"] == pytest.approx(score.bits_per_byte / report["bits_per_byte"] - 1, abs=1e-4)
    assert abs(guessed["change"]) > 1e-3


def test_the_tool_writes_for_people(run, tmp_path: Path) -> None:
    out, _ = run("--text", *write_texts(tmp_path))
    rows = dict(line.split("  ", 1) for line in out.splitlines())
    assert list(rows) == ["bits per byte", "bits per token", "perplexity", "text", "windows", "time"]
    num_bytes = sum(len(text.encode()) for text in TEXTS)
    assert rows["text"].strip() == f"5 documents, {num_bytes} bytes, {num_bytes} tokens"
    assert rows["windows"].strip() == "of 16 tokens, 16 apart, after token 256"
    assert float(rows["bits per byte"]) > 0


def test_the_tool_takes_the_first_bytes(run, tmp_path: Path) -> None:
    files = write_texts(tmp_path)
    report = json.loads(run("--text", *files, "--max-bytes", 13, "--json")[0])
    assert (report["num_documents"], report["num_bytes"]) == (2, 12)  # "ö" would be bytes 13 and 14


def test_the_tool_reads_what_was_held_out(run, tmp_path: Path) -> None:
    root = tmp_path / "lib"
    (root / "json").mkdir(parents=True)
    for name in ("heapq.py", "json/decoder.py", "os.py"):
        (root / name).write_text(f"# {name}\n")
    report = json.loads(run("--stdlib-held-out", "--stdlib-root", root, "--json")[0])
    assert (report["num_documents"], report["num_bytes"]) == (2, len("# heapq.py\n# json/decoder.py\n"))


def test_the_tool_says_no(run, model: Path, tmp_path: Path) -> None:
    good, empty, latin = tmp_path / "good.txt", tmp_path / "empty.txt", tmp_path / "latin.txt"
    good.write_text("text")
    empty.write_text("")
    latin.write_bytes("Größe".encode("latin-1"))
    mute = tmp_path / "mute"
    mute.mkdir()
    for entry in model.iterdir():
        if entry.name != TOKENIZER_FILE:
            (mute / entry.name).symlink_to(entry)
    for argv, message in (
        (["--text", tmp_path / "none.txt"], "none.txt: no such file"),
        (["--text", latin], "latin.txt: not UTF-8 text"),
        (["--text", empty], "1 texts without a token to score"),
        (["--text", good, "--window", 0], "window=0 with stride=0"),
        (["--text", good, "--stride", 17], "window=16 with stride=17"),
        (["--text", good, "--batch-size", 0], "batch_size=0 must be"),
        (["--text", good, "--expert-slots", 1], "expert_slots=1 is outside 2..8"),
        (["--text", good, "--execute-guess", 0, 2], "--execute-guess 2 is no recall"),
        (["--text", good, "--execute-guess", 0], "--execute-guess 0: this model has one MoE layer (layer 0)"),
        (["--text", good, "--stdlib-root", tmp_path], "--stdlib-root is where --stdlib-held-out"),
        (["--stdlib-held-out", "--stdlib-root", tmp_path], "no held-out Python file"),
        (["--text", good, "--model", tmp_path / "nowhere"], "no such directory"),
        (["--text", good, "--model", mute], "this engine has no tokenizer"),
    ):
        out, err = run(*argv, code=2)
        assert out == ""
        last = err.splitlines()[-1]
        assert last.startswith("error: ")
        assert message in last


def test_the_tool_needs_a_text(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        eval_lm.main([])
    assert "--text --stdlib-held-out is required" in capsys.readouterr().err
