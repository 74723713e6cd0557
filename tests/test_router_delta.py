"""Tuned routers in a file: applied, refused where they do not belong, and exported as a whole checkpoint."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jmoe
from jmoe import checkpoint
from jmoe.convert import convert_hf
from jmoe.engine import Engine
from jmoe.export import export_hf
from jmoe.router_delta import RouterDelta, router_leaves
from jmoe.synthetic import write_synthetic
from tests.models import SMALL
from tools import export_hf as export_tool

CONFIG = dataclasses.replace(SMALL, vocab_size=300)  # room for the byte tokenizer
TOKENS = [[1, 5, 9, 200, 7, 7, 30, 2]]


def make(directory: Path, seed: int) -> Path:
    write_synthetic(CONFIG, directory / "hf", regime="flat", seed=seed)
    convert_hf(directory / "hf", directory / "converted")
    return directory / "converted"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("model"), 1)


@pytest.fixture
def delta(model: Path) -> RouterDelta:
    """Other routers than the checkpoint's."""
    trunk = checkpoint.load_trunk(model, CONFIG, None)
    rng = np.random.default_rng(0)
    routers = {
        leaf.path: trunk[leaf.path] + rng.normal(size=leaf.shape).astype(np.float32) for leaf in router_leaves(CONFIG)
    }
    return RouterDelta(routers, checkpoint.read_manifest(model).fingerprint, {"before": 1})


@pytest.fixture
def file(delta: RouterDelta, tmp_path: Path) -> Path:
    delta.save(tmp_path / "tuned.safetensors", CONFIG)
    return tmp_path / "tuned.safetensors"


def load(path: Path, router: Path | None = None, monkeypatch=None) -> Engine:
    runtime = jmoe.RuntimeConfig(expert_slots=4, staging_slots=2, max_seq_len=32, measure_link=False)
    return jmoe.load(path, runtime, router=router)


def test_what_is_saved_is_read_again(delta: RouterDelta, file: Path, model: Path) -> None:
    read = RouterDelta.read(file, checkpoint.read_manifest(model))
    assert read.facts == {"before": 1}
    assert read.fingerprint == delta.fingerprint != delta.base_fingerprint
    assert set(read.routers) == {"layers/0/router/kernel", "layers/2/router/kernel"}
    for path, kernel in delta.routers.items():
        np.testing.assert_array_equal(read.routers[path], kernel)
    assert set(load_file(file)) == {f"model.layers.{layer}.mlp.gate.weight" for layer in (0, 2)}
    assert [entry.name for entry in file.parent.iterdir()] == [file.name], "nothing unfinished is left"


def test_the_engine_runs_with_the_tuned_routers(
    delta: RouterDelta, file: Path, model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("JMOE_CACHE", str(tmp_path / "cache"))
    plain, tuned = load(model), load(model, file)
    assert tuned.fingerprint == delta.fingerprint != plain.fingerprint
    for path, kernel in delta.routers.items():
        np.testing.assert_array_equal(tuned.weights.params[path], kernel)
    assert np.abs(plain.logits(TOKENS) - tuned.logits(TOKENS)).max() > 1e-3


def test_the_export_gives_the_same_logits(
    file: Path, model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("JMOE_CACHE", str(tmp_path / "cache"))
    assert export_tool.main([str(model), str(tmp_path / "hf"), "--router", str(file)]) == 0
    exported, original = (load_file(path / "model.safetensors") for path in (tmp_path / "hf", model.parent / "hf"))
    changed = {name for name in original if not np.array_equal(original[name], exported[name])}
    assert set(exported) == set(original)
    assert changed == set(load_file(file)), "the routers and nothing else"
    np.testing.assert_array_equal(load(tmp_path / "hf").logits(TOKENS), load(model, file).logits(TOKENS))


def test_guesses_of_other_routers_are_not_executed(file: Path, model: Path) -> None:
    runtime = jmoe.RuntimeConfig(expert_slots=4, max_seq_len=32, measure_link=False, execute_guess=0.5)
    with pytest.raises(ValueError, match=r"--execute-guess 0\.5 does not go with --router "):
        jmoe.load(model, runtime, router=file)


def test_routers_of_another_checkpoint_are_refused(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("JMOE_CACHE", str(tmp_path / "cache"))
    other = make(tmp_path, 2)
    with pytest.raises(ValueError, match=r"routers of the checkpoint .*, but this one is"):
        load(other, file)
    with pytest.raises(ValueError, match="routers of the checkpoint"):
        export_hf(other, tmp_path / "back", router=file)
    assert not (tmp_path / "back").exists()
    assert export_tool.main([str(other), str(tmp_path / "back"), "--router", str(file)]) == 2
    assert "give the model that they were tuned for" in capsys.readouterr().err


def rewritten(file: Path, **changes: np.ndarray | None) -> Path:
    """The file with tensors changed, added or (None) left out."""
    with file.open("rb") as opened:
        header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
    tensors = {name: array for name, array in (load_file(file) | changes).items() if array is not None}
    save_file(tensors, file, metadata=header["__metadata__"])
    return file


GATE = "model.layers.2.mlp.gate.weight"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({GATE: None}, f"{GATE} is missing"),
        ({"extra": np.zeros(1, np.float32)}, "extra is no router of the model"),
        ({GATE: np.zeros((8, 31), np.float32)}, r"has shape \[8, 31\], expected \[8, 32\]"),
        ({GATE: np.full((8, 32), np.nan, np.float32)}, "holds numbers that are not finite"),
    ],
)
def test_odd_tensors_are_refused(file: Path, model: Path, changes: dict, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        RouterDelta.read(rewritten(file, **changes), checkpoint.read_manifest(model))


def test_other_files_are_refused(file: Path, model: Path, tmp_path: Path) -> None:
    manifest = checkpoint.read_manifest(model)
    with pytest.raises(ValueError, match="no such file"):
        RouterDelta.read(tmp_path / "nothing", manifest)
    with pytest.raises(ValueError, match="not of tuned routers"):
        RouterDelta.read(model.parent / "hf" / "model.safetensors", manifest)
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(RuntimeError, match="not a whole safetensors file"):
        RouterDelta.read(file, manifest)


def test_what_is_not_the_models_routers_is_not_saved(delta: RouterDelta, tmp_path: Path) -> None:
    odd = dataclasses.replace(delta, routers={"layers/0/router/kernel": delta.routers["layers/0/router/kernel"]})
    with pytest.raises(ValueError, match="layers/2/router/kernel is missing"):
        odd.save(tmp_path / "odd", CONFIG)
    assert not list(tmp_path.iterdir())
