"""Padding experts: the same model, up to the order of sums, in larger experts; and everything that is refused."""

import dataclasses
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import jmoe
from jmoe import checkpoint, sources
from jmoe.config import ModelConfig
from jmoe.convert import convert_hf
from jmoe.export import export_hf
from jmoe.synthetic import write_synthetic
from kernels_pallas.expert_mlp.api import expert_mlp
from tests import models
from tools.pad_experts import main, pad_experts

CONFIG = dataclasses.replace(models.SMALL, vocab_size=300)  # room for the byte tokenizer
F, D, WIDER = CONFIG.moe_intermediate_size, CONFIG.hidden_size, 50
ROW_BYTES = 3 * D * 4  # of gate, up and down together
GREEDY = jmoe.SamplingParams(max_new_tokens=24, ignore_eos=True)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("original")
    write_synthetic(CONFIG, path / "hf", regime="flat", seed=1)
    convert_hf(path / "hf", path / "converted")
    return path / "converted"


@pytest.fixture(scope="module")
def padded(original: Path) -> Path:
    pad_experts(original, original.parent / "padded", WIDER * ROW_BYTES)
    return original.parent / "padded"


@pytest.fixture(scope="module")
def engines(original: Path, padded: Path) -> list[jmoe.Engine]:
    """Of both, with slots for no more experts than a token needs, so that they come and go."""
    runtime = jmoe.RuntimeConfig(
        expert_slots=2, staging_slots=2, max_seq_len=64, prefill_chunk=16, decode_chunk=4, measure_link=False
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JMOE_CACHE", str(original.parent / "cache"))
        return [jmoe.load(path, runtime) for path in (original, padded)]


def top_two_margin(logits: np.ndarray) -> float:
    second, first = np.sort(logits, axis=-1)[..., -2:].reshape(-1, 2).T
    return float((first - second).min())


# The same model


def test_the_demo_models_logits_are_equal_to_the_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JMOE_CACHE", str(tmp_path / "cache"))
    source = sources.resolve(None)
    width = checkpoint.read_config(source).hidden_size
    pad_experts(source, tmp_path / "padded", 3 * 128 * width * 4, dtype="float32")
    ids = np.random.default_rng(0).integers(0, 4096, (2, 24)).tolist()
    runtime = jmoe.RuntimeConfig(expert_slots=16, batch_size=2, max_seq_len=64, dtype="float32", measure_link=False)
    before, after = (jmoe.load(path, runtime).logits(ids) for path in (source, tmp_path / "padded"))
    np.testing.assert_array_equal(before, after)


def test_experts_are_the_old_ones_then_zeros(original: Path, padded: Path) -> None:
    config = checkpoint.read_config(padded)
    assert config == dataclasses.replace(CONFIG, moe_intermediate_size=WIDER)
    for layer in CONFIG.moe_layers:
        old = checkpoint.load_experts(original, CONFIG, layer, None)
        new = checkpoint.load_experts(padded, config, layer, None)
        assert new.shape == (CONFIG.num_experts, 3, WIDER, D)
        np.testing.assert_array_equal(new[:, :, :F].view(np.uint32), old.view(np.uint32))
        assert not new[:, :, F:].view(np.uint32).any()
    trunks = [checkpoint.load_trunk(path, config, None) for path in (original, padded)]
    for name, array in trunks[0].items():
        np.testing.assert_array_equal(trunks[1][name], array)


@pytest.mark.parametrize("num_rows", [1, 5])
def test_what_was_added_adds_exactly_nothing(padded: Path, num_rows: int) -> None:
    config = checkpoint.read_config(padded)
    experts = checkpoint.load_experts(padded, config, CONFIG.moe_layers[0], None)
    x = np.random.default_rng(0).standard_normal((num_rows, D), np.float32)
    groups = jnp.arange(4, dtype=jnp.int32), jnp.ones((4, num_rows), jnp.float32)
    assert not np.asarray(jax.jit(expert_mlp)(x, experts[:, :, F:], *groups)).any()
    assert np.asarray(jax.jit(expert_mlp)(x, experts[:, :, :F], *groups)).all()


def test_logits_are_equal_up_to_rounding(engines: list[jmoe.Engine]) -> None:
    """In prefill, several rows at a time."""
    before, after = (engine.logits(models.prompts(40, config=CONFIG)) for engine in engines)
    np.testing.assert_allclose(after, before, rtol=0, atol=2e-6 * np.abs(before).max())


def test_greedy_tokens_are_equal(engines: list[jmoe.Engine]) -> None:
    """In decode, one row at a time; no choice in this text is so close that rounding could turn it."""
    prompts = models.prompts(16, config=CONFIG)
    [before], [after] = (engine.generate(prompts, GREEDY).results() for engine in engines)
    assert len(before.token_ids) == GREEDY.max_new_tokens
    assert after.token_ids == before.token_ids
    np.testing.assert_allclose(after.logprobs, before.logprobs, rtol=0, atol=2e-5)
    logits = engines[0].logits([[*prompts[0], *before.token_ids]])[:, len(prompts[0]) - 1 : -1]
    assert top_two_margin(logits) > 1e-3


# What is written


@pytest.mark.parametrize(("num_bytes", "width"), [(F * ROW_BYTES, F), (F * ROW_BYTES + 1, F + 1), (30_000, 79)])
def test_width_is_the_smallest_of_at_least_that_size(
    original: Path, tmp_path: Path, num_bytes: int, width: int
) -> None:
    config = pad_experts(original, tmp_path / "out", num_bytes)
    assert config.moe_intermediate_size == width
    assert config.expert_bytes - ROW_BYTES < num_bytes <= config.expert_bytes


def test_dtype_casts_and_counts(original: Path, tmp_path: Path) -> None:
    config = pad_experts(original, tmp_path / "out", WIDER * ROW_BYTES, dtype="bfloat16")
    assert (config.dtype, config.moe_intermediate_size) == ("bfloat16", 2 * WIDER)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    layer = CONFIG.moe_layers[0]
    old = checkpoint.load_experts(original, CONFIG, layer, None)
    new = checkpoint.load_experts(tmp_path / "out", config, layer, None)
    np.testing.assert_array_equal(new[:, :, :F], old.astype(jnp.bfloat16))


def test_the_fingerprint_is_of_the_source_and_the_width(original: Path, padded: Path, tmp_path: Path) -> None:
    pad_experts(original, tmp_path / "same", WIDER * ROW_BYTES)
    pad_experts(original, tmp_path / "other", (WIDER + 1) * ROW_BYTES)
    paths = (original, padded, tmp_path / "same", tmp_path / "other")
    source, ours, same, other = (checkpoint.read_manifest(path).fingerprint for path in paths)
    assert ours == same
    assert len({source, ours, other}) == 3


def test_it_can_be_exported_and_converted_again(padded: Path, tmp_path: Path) -> None:
    export_hf(padded, tmp_path / "hf")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["moe_intermediate_size"] == WIDER
    down = load_file(tmp_path / "hf" / "model.safetensors")["model.layers.2.mlp.experts.3.down_proj.weight"]
    assert down.shape == (D, WIDER)
    convert_hf(tmp_path / "hf", tmp_path / "again")
    config = checkpoint.read_config(padded)
    assert checkpoint.read_config(tmp_path / "again") == config
    for layer in CONFIG.moe_layers:
        arrays = [checkpoint.load_experts(path, config, layer, None) for path in (padded, tmp_path / "again")]
        np.testing.assert_array_equal(arrays[0], arrays[1])
    assert (tmp_path / "again" / "tokenizer.json").read_bytes() == (padded / "tokenizer.json").read_bytes()


def test_progress_counts_every_byte(original: Path, tmp_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    config = pad_experts(original, tmp_path / "out", 20_000, progress=lambda *call: calls.append(call))
    half = config.store_bytes // 2
    assert calls == [("experts/0", half, 2 * half), ("experts/2", 2 * half, 2 * half)]


# What is refused


def test_refusals_leave_nothing(original: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expert_bytes=6143 is less than the 6144 that an expert has in float32"):
        pad_experts(original, tmp_path / "out", F * ROW_BYTES - 1)
    with pytest.raises(ValueError, match="loading it as float16 could overflow unseen"):
        pad_experts(original, tmp_path / "out", 20_000, dtype="float16")
    with pytest.raises(ValueError, match="a Hugging Face checkpoint, not a jmoe one"):
        pad_experts(original.parent / "hf", tmp_path / "out", 20_000)
    assert list(tmp_path.iterdir()) == []


def test_a_destination_that_is_not_empty_is_kept(original: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path}: already there and not empty")):
        pad_experts(original, tmp_path, 20_000)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_config_of_another_model_is_refused(original: Path, tmp_path: Path) -> None:
    config: ModelConfig = dataclasses.replace(CONFIG, rms_norm_eps=1e-5)
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_bytes((original / "config.json").read_bytes())
    checkpoint.write_manifest(source, checkpoint.Manifest(config, "fingerprint"))
    with pytest.raises(RuntimeError, match=r"config\.json: of another model than jmoe\.json\. Convert the model again"):
        pad_experts(source, tmp_path / "out", 20_000)


def test_interrupted_nothing_is_left(original: Path, tmp_path: Path) -> None:
    def interrupt(phase: str, done_bytes: int, total_bytes: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pad_experts(original, tmp_path / "out", 20_000, progress=interrupt)
    assert list(tmp_path.iterdir()) == []
    pad_experts(original, tmp_path / "out", 20_000)
    assert checkpoint.is_checkpoint(tmp_path / "out")


def test_command_line(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("JMOE_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "out"
    assert (
        main(["--model", str(original.parent / "hf"), "--expert-bytes", "15kB", "--dtype", "bfloat16", str(out)]) == 0
    )
    assert "written; an expert has 15168 bytes, moe_intermediate_size=79" in capsys.readouterr().out
    assert checkpoint.read_config(out).dtype == "bfloat16"
    assert main(["--model", str(original), "--expert-bytes", "1kB", str(tmp_path / "small")]) == 2
    assert capsys.readouterr().err.startswith("error: expert_bytes=1000 is less than the 6144")
