"""The programs around router tuning, at toy size: tune, load, measure, sweep; and what they refuse."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

import jmoe
from jmoe import checkpoint, tune_router
from jmoe.convert import convert_hf
from jmoe.router_delta import RouterDelta
from jmoe.synthetic import write_synthetic
from jmoe.training.texts import Texts
from tests.models import SMALL
from tools import measure_reuse, sweep_router_tuning
from tools import tune_router as tune_tool
from tools.stdlib_corpus import stdlib_root

CONFIG = dataclasses.replace(SMALL, vocab_size=259)  # a byte a token
FILES = ("heapq.py", "bisect.py", "json/decoder.py", "abc.py", "glob.py", "fnmatch.py", "keyword.py", "types.py")
TOY = "num_steps=4 batch_size=2 sequence_length=32 warmup_steps=0 ramp_steps=1 eval_every=2 lags=(1,2) window=8"
TUNED = [*TOY.split(), "learning_rate=0.05", "reuse=3", "trust=0", "most_worse=9"]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JMOE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    write_synthetic(CONFIG, directory / "hf", regime="flat", seed=0)
    convert_hf(directory / "hf", directory / "converted")
    return directory / "converted"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The beginnings of some files of the standard library, of which three are held out."""
    root = tmp_path_factory.mktemp("lib")
    for name in FILES:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text((stdlib_root() / name).read_text(encoding="utf-8")[:600], encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def tuned(model: Path, library: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("tuned") / "tuned.safetensors"
    arguments = [str(file), "--model", str(model), "--stdlib-root", str(library), "--set", *TUNED]
    assert tune_tool.main(arguments) == 0
    return file


def test_the_result_is_a_small_file_of_routers_with_facts(tuned: Path, model: Path) -> None:
    delta = RouterDelta.read(tuned, checkpoint.read_manifest(model))
    assert delta.facts["after"]["reuse"] > delta.facts["before"]["reuse"]
    assert delta.facts["tuning"]["learning_rate"] == 0.05
    assert tuned.stat().st_size < 20_000
    trunk = checkpoint.load_trunk(model, CONFIG, None)
    assert all(np.abs(kernel - trunk[path]).max() > 1e-3 for path, kernel in delta.routers.items())


def test_a_finished_tuning_is_not_done_again(
    tuned: Path, model: Path, library: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = tuned.read_bytes()
    assert tune_tool.main([str(tuned), "--model", str(model), "--stdlib-root", str(library), "--set", *TUNED]) == 0
    assert tuned.read_bytes() == before
    assert "step 2: held-out" not in capsys.readouterr().out, "there was nothing left to evaluate"


def test_the_engine_generates_with_it(tuned: Path, model: Path) -> None:
    runtime = jmoe.RuntimeConfig(expert_slots=4, staging_slots=2, max_seq_len=32, measure_link=False)
    sampling = jmoe.SamplingParams(max_new_tokens=6, ignore_eos=True)
    texts = [
        jmoe.load(model, runtime, router=each).generate(["def f"], sampling).results()[0] for each in (None, tuned)
    ]
    assert texts[0].token_ids != texts[1].token_ids


def test_text_directories_and_offloaded_experts(model: Path, library: Path, tmp_path: Path, capsys) -> None:
    arguments = [
        str(tmp_path / "out.safetensors"),
        "--model",
        str(model),
        "--text",
        str(library),
        "--experts",
        "offloaded",
    ]
    arguments += ["--held-out", str(library / "heapq.py"), "--set", *TUNED]
    assert tune_router.main(arguments) == 0
    assert "written; step" in capsys.readouterr().out
    RouterDelta.read(tmp_path / "out.safetensors", checkpoint.read_manifest(model))


def test_random_weights_need_no_checkpoint(library: Path, tmp_path: Path) -> None:
    arguments = [str(tmp_path / "out.safetensors"), "--stdlib-root", str(library), "--set", *TUNED]
    arguments += ["--config", "configs/models/tiny.toml", "--layers", "2", "--random-weights", "flat"]
    assert tune_tool.main([*arguments, "--experts", "offloaded", "--dtype", "float32"]) == 0


def test_before_and_after_are_measured(
    tuned: Path, model: Path, library: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", model, "--router", tuned, "--text", *(library / name for name in FILES[:4])]
    arguments += ["--tokens", 200, "--json", tmp_path / "reuse.json", "--plot", tmp_path / "reuse.png"]
    assert measure_reuse.main([str(argument) for argument in arguments]) == 0
    report = json.loads((tmp_path / "reuse.json").read_text())
    before, after = report["before"], report["after"]
    assert after["overlap"] > before["overlap"]
    for figures in (before, after):
        assert figures["LRU 2"] == pytest.approx(figures["overlap"] * 199 / 200, rel=1e-6), "slots for one token alone"
        assert figures["misses 4"] == pytest.approx((1 - figures["reuse 4"]) * 2 * 2)
        assert figures["MB 4"] == pytest.approx(figures["misses 4"] * CONFIG.expert_bytes / 1e6)
        assert 0 < figures["load entropy"] <= 1
        assert 2 <= figures["distinct"] <= 8
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["before", "after", "change"]
    assert lines[1].split()[0] == "overlap"
    assert (tmp_path / "reuse.png").read_bytes().startswith(b"\x89PNG")


def test_the_sweep_prints_a_row_for_each_setting(
    model: Path, library: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = ("[[row]]", 'name = "nothing"', "learning_rate = 0.0", "[[row]]", 'name = "much"', "reuse = 9.0")
    (tmp_path / "rows.toml").write_text("\n".join([*rows, "[random]", "reuse = [1.0, 2.0]"]))
    arguments = ["--model", model, "--stdlib-root", library, "--rows", tmp_path / "rows.toml", "--random", 1]
    arguments += ["--out", tmp_path / "sweep.jsonl", "--plot", tmp_path / "sweep.png", "--set", *TUNED]
    assert sweep_router_tuning.main([str(argument) for argument in arguments]) == 0
    made = [json.loads(line) for line in (tmp_path / "sweep.jsonl").read_text().splitlines()]
    assert [row["name"] for row in made] == ["nothing", "much", "random 0"]
    assert made[0]["reuse_change"] == made[0]["bits_change"] == 0
    assert made[1]["reuse_change"] > 0
    assert 1 <= made[2]["reuse"] <= 2
    assert made[1]["after"]["lru"] > made[0]["after"]["lru"]
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed[:5]] == ["before:", "row", "nothing", "much", "random"]
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_the_sweep_of_the_configs_names_its_ablations() -> None:
    names = [name for name, _ in sweep_router_tuning.read_rows(sweep_router_tuning.ROWS, None, 0, 0)]
    terms = ("trust", "reuse", "smoothness", "lags", "window entropy")
    assert {"cross-entropy only", *(f"without {term}" for term in terms)} <= set(names)


def test_bad_rows_are_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.toml").write_text('[[row]]\nname = "odd"\nnum_steps = 3\n')
    with pytest.raises(ValueError, match="odd changes num_steps; a row may change"):
        list(sweep_router_tuning.read_rows(tmp_path / "rows.toml", None, 0, 0))
    with pytest.raises(ValueError, match="no rows absent"):
        list(sweep_router_tuning.read_rows(sweep_router_tuning.ROWS, ["absent"], 0, 0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "nowhere"], "nowhere: no such file or directory"),
        (["--text", "LIBRARY"], "8 documents to train on and none held out; give --held-out"),
        (["--text", "LIBRARY", "--set", "steps=3"], "expected NAME=VALUE with a name of"),
        (["--text", "LIBRARY", "--set", "reuse=much"], "'much' is no number"),
        (["--text", "LIBRARY", "--tuning", "nothing.toml"], "nothing.toml: no such file"),
    ],
)
def test_bad_input_is_one_line(
    model: Path, library: Path, tmp_path: Path, capsys, arguments: list[str], message: str
) -> None:
    given = [str(library) if argument == "LIBRARY" else argument for argument in arguments]
    assert tune_router.main([str(tmp_path / "out"), "--model", str(model), *given]) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert not list(tmp_path.iterdir())


def test_nothing_is_written_if_nothing_passes_the_gate(model: Path, library: Path, tmp_path: Path, capsys) -> None:
    arguments = [str(tmp_path / "out"), "--model", str(model), "--stdlib-root", str(library), "--set", *TOY.split()]
    assert tune_tool.main([*arguments, "learning_rate=0.0"]) == 2
    assert "have more reuse than before" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_every_twentieth_document_is_held_out_if_none_is_named(tmp_path: Path) -> None:
    for n in range(40):
        (tmp_path / f"{n:02}.txt").write_text(f"text {n}")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    texts = Texts.read([tmp_path], [])
    assert sorted(texts.held_out.values()) == ["text 10", "text 30"]
    assert len(texts.train) == 38
    named = Texts.read([tmp_path], [tmp_path / "05.txt"])
    assert list(named.held_out.values()) == ["text 5"]
    assert len(named.train) == 39
    assert len(named.held_out_at_most(1)) == 1
