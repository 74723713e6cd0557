"""How alike experts are: measured once, kept beside the checkpoint, and refused when it is another's."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jmoe
from jmoe import checkpoint, convert, synthetic
from jmoe.config import RuntimeConfig
from jmoe.engine import Engine
from jmoe.experts import affinity
from jmoe.experts.affinity import load, load_or_measure, measure, save
from jmoe.experts.draft import expert_distances
from tests import models
from tests.models import SMALL

E = SMALL.num_experts
SHAPE = (2, E, E)


@pytest.fixture
def said() -> list[str]:
    return []


def test_each_layer_is_measured_alone() -> None:
    store = models.weights().store
    expected = [expert_distances(jnp.asarray(np.asarray(layer))) for layer in store.layers]
    np.testing.assert_allclose(measure(store), jnp.stack(expected), atol=1e-6)


def test_it_is_measured_once(tmp_path: Path, said: list[str]) -> None:
    store, files = models.weights().store, [tmp_path / "checkpoint" / affinity.FILE, tmp_path / "cache" / "a.npz"]
    first = load_or_measure(store, files, "abc", said.append)
    assert [line.startswith("measuring how alike the 8 experts of 2 layers are") for line in said] == [True]
    assert [file.is_file() for file in files] == [True, False]
    assert [file.name for file in files[0].parent.iterdir()] == [affinity.FILE], "nothing else is left"
    again = load_or_measure(store, files, "abc", said.append)
    assert len(said) == 1
    np.testing.assert_array_equal(first, again)
    assert first.sharding == again.sharding


def test_where_the_checkpoint_cannot_be_written_it_is_kept_elsewhere(tmp_path: Path, said: list[str]) -> None:
    (tmp_path / "taken").write_text("a file where a directory should be")
    files = [tmp_path / "taken" / affinity.FILE, tmp_path / "cache" / "a.npz"]
    load_or_measure(models.weights().store, files, "abc", said.append)
    assert files[1].is_file()
    assert "is not kept in" in said[1]
    load_or_measure(models.weights().store, files, "abc", said.append)
    assert len(said) == 2


def test_another_checkpoints_is_refused(tmp_path: Path, said: list[str]) -> None:
    save(tmp_path / "a.npz", "abc", np.zeros(SHAPE, np.float32))
    with pytest.raises(RuntimeError, match=r"it says .*'fingerprint': 'abc'.*, but expected is .*'xyz'.* Delete it"):
        load_or_measure(models.weights().store, [tmp_path / "a.npz"], "xyz", said.append)


@pytest.mark.parametrize("array", [np.zeros((2, E, 3), np.float32), np.zeros(SHAPE, np.float64)])
def test_what_does_not_fit_is_refused(tmp_path: Path, array: np.ndarray) -> None:
    save(tmp_path / "a.npz", "abc", array)
    with pytest.raises(RuntimeError, match=r"expected float32 \[2, 8, 8\]. Delete it; jmoe measures it again"):
        load(tmp_path / "a.npz", "abc", SHAPE)


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.npz"
    save(file, "abc", np.zeros(SHAPE, np.float32))
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(RuntimeError, match="damaged, it cannot be read"):
        load(file, "abc", SHAPE)


def test_only_substitution_asks_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through `jmoe.load`: beside the converted checkpoint, and no token changes."""
    monkeypatch.setenv("JMOE_CACHE", str(tmp_path / "cache"))
    synthetic.write_synthetic(dataclasses.replace(SMALL, vocab_size=260), tmp_path / "hf", regime="flat", seed=3)
    convert.convert_hf(tmp_path / "hf", tmp_path / "model")

    def tokens(**runtime) -> tuple[Engine, list[tuple[int, ...]]]:
        options = {"expert_slots": 4, "max_seq_len": 64, "measure_link": False, **runtime}
        engine = jmoe.load(tmp_path / "model", RuntimeConfig(**options))
        [completion] = engine.generate(models.prompts(7), jmoe.SamplingParams(max_new_tokens=12)).results()
        return engine, completion.token_ids

    _, plain = tokens(draft=2)
    assert not (tmp_path / "model" / affinity.FILE).exists()
    engine, substituted = tokens(draft=2, draft_missing="substitute", draft_experts=2)
    assert substituted == plain
    assert engine.drafting is not None
    kept = load(tmp_path / "model" / affinity.FILE, checkpoint.read_manifest(tmp_path / "model").fingerprint, SHAPE)
    np.testing.assert_array_equal(jax.device_get(engine.drafting.distances), kept)
