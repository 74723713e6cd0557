"""Exporting: Hugging Face → jmoe → Hugging Face gives back every tensor bit for bit, under the released names."""

import json
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from jmoe import checkpoint
from jmoe.config import ModelConfig
from jmoe.convert import convert_hf
from jmoe.export import export_hf
from jmoe.synthetic import write_synthetic

INDEX = "model.safetensors.index.json"
CONFIG = ModelConfig(
    vocab_size=260,
    hidden_size=20,
    intermediate_size=28,
    moe_intermediate_size=12,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=3,
    head_dim=8,
    num_experts=5,
    num_experts_per_tok=2,
    mlp_only_layers=(1,),
    attention_bias=True,
    dtype="bfloat16",
)


def all_tensors(path: Path) -> dict[str, np.ndarray]:
    return {name: array for file in sorted(path.glob("*.safetensors")) for name, array in load_file(file).items()}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_synthetic(CONFIG, tmp_path / "source", regime="flat", seed=3, max_shard_bytes=20_000)
    return tmp_path / "source"


@pytest.fixture
def converted(source: Path, tmp_path: Path) -> Path:
    convert_hf(source, tmp_path / "converted")
    return tmp_path / "converted"


def test_round_trip_is_bit_exact(source: Path, converted: Path, tmp_path: Path):
    export_hf(converted, tmp_path / "back", max_shard_bytes=9_000)
    original, back = all_tensors(source), all_tensors(tmp_path / "back")
    assert set(back) == set(original)
    assert "model.layers.2.mlp.experts.4.down_proj.weight" in back
    for name, tensor in original.items():
        assert back[name].dtype == tensor.dtype
        np.testing.assert_array_equal(back[name].view(np.uint16), tensor.view(np.uint16), err_msg=name)
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes()


def test_converting_the_export_gives_the_same_fingerprint(converted: Path, tmp_path: Path):
    export_hf(converted, tmp_path / "back")
    assert convert_hf(tmp_path / "back", converted) is False


def test_shards_respect_the_limit_and_the_index(converted: Path, tmp_path: Path):
    export_hf(converted, tmp_path / "back", max_shard_bytes=9_000)
    index = json.loads((tmp_path / "back" / INDEX).read_text())
    files = sorted(path.name for path in (tmp_path / "back").glob("*.safetensors"))
    assert files == sorted(set(index["weight_map"].values()))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    total_bytes = 0
    for file in files:
        tensors = load_file(tmp_path / "back" / file)
        assert {name for name, shard in index["weight_map"].items() if shard == file} == set(tensors)
        shard_bytes = sum(tensor.nbytes for tensor in tensors.values())
        assert shard_bytes <= 9_000 or len(tensors) == 1
        total_bytes += shard_bytes
    assert index["metadata"]["total_size"] == total_bytes == checkpoint.checkpoint_bytes(CONFIG)


def test_a_small_model_is_one_file(converted: Path, tmp_path: Path):
    export_hf(converted, tmp_path / "back")
    assert [path.name for path in (tmp_path / "back").glob("*.safetensors")] == ["model.safetensors"]
    assert not (tmp_path / "back" / INDEX).exists()


def test_config_says_the_dtype_that_was_cast_to(source: Path, tmp_path: Path):
    convert_hf(source, tmp_path / "wide", dtype="float32")
    export_hf(tmp_path / "wide", tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["torch_dtype"] == "float32"
    convert_hf(tmp_path / "back", tmp_path / "again")
    assert checkpoint.read_config(tmp_path / "again").dtype == "float32"


def test_progress_counts_every_byte(converted: Path, tmp_path: Path):
    calls: list[tuple[str, int, int]] = []
    export_hf(converted, tmp_path / "back", progress=lambda *call: calls.append(call))
    assert calls[-1][1:] == (checkpoint.checkpoint_bytes(CONFIG),) * 2


def test_interrupted_nothing_is_left(converted: Path, tmp_path: Path):
    def interrupt(phase: str, done_bytes: int, total_bytes: int) -> None:
        if done_bytes > total_bytes // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_hf(converted, tmp_path / "back", progress=interrupt)
    assert not (tmp_path / "back").exists()
    assert not checkpoint.incomplete_path(tmp_path / "back").exists()
    export_hf(converted, tmp_path / "back")
    assert (tmp_path / "back" / "model.safetensors").is_file()


def test_bad_arguments_are_refused(source: Path, converted: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="a Hugging Face checkpoint, not a jmoe one"):
        export_hf(source, tmp_path / "back")
    with pytest.raises(ValueError, match="max_shard_bytes=0 must be at least 1"):
        export_hf(converted, tmp_path / "back", max_shard_bytes=0)
    with pytest.raises(ValueError, match=re.escape(f"{source}: already there and not empty")):
        export_hf(converted, source)
    assert not (tmp_path / "back").exists()


def test_command_line(source: Path, converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    main = runpy.run_path(str(Path(__file__).parents[1] / "tools" / "export_hf.py"))["main"]
    assert main([str(converted), str(tmp_path / "back")]) == 0
    assert "written" in capsys.readouterr().out
    assert main([str(source), str(tmp_path / "other")]) == 2
    assert "error: " in capsys.readouterr().err
