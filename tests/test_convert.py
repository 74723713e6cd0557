"""Converting Hugging Face checkpoints: what comes out, everything that is refused, and being interrupted."""

import json
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jmoe import checkpoint
from jmoe.config import ModelConfig
from jmoe.convert import convert_hf
from jmoe.model import families

CONFIG = ModelConfig(
    vocab_size=41,
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
    dtype="bfloat16",
)
INDEX = "model.safetensors.index.json"
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
ROUTER = "model.layers.0.mlp.gate.weight"


def random_tensors(layout: families.Layout = "per_expert", seed: int = 0) -> dict[str, np.ndarray]:
    values = np.random.default_rng(seed)
    pieces = [piece for leaf in families.all_leaves(CONFIG, layout) for piece in leaf.pieces]
    return {piece.name: values.standard_normal(piece.shape, np.float32).astype(ml_dtypes.bfloat16) for piece in pieces}


def write_source(path: Path, tensors: dict[str, np.ndarray], **config_changes: object) -> Path:
    """A Hugging Face checkpoint of two shards with an index."""
    path.mkdir()
    names = sorted(tensors)
    groups = [names[: len(names) // 2], names[len(names) // 2 :]]
    for shard, group in zip(SHARDS, groups, strict=True):
        save_file({name: tensors[name] for name in group}, path / shard)
    weight_map = {name: shard for shard, group in zip(SHARDS, groups, strict=True) for name in group}
    (path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    (path / "config.json").write_text(json.dumps(families.to_hf_config(CONFIG) | config_changes))
    (path / "tokenizer.json").write_text("{}")
    return path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_source(tmp_path / "source", random_tensors())


def bits(array: object) -> np.ndarray:
    return np.asarray(array).view(np.uint16)


def refusal(source: Path) -> str:
    """The message of the ValueError, after making sure that nothing was written."""
    destination = source.parent / "refused"
    with pytest.raises(ValueError, match=r".") as caught:
        convert_hf(source, destination)
    assert not destination.exists()
    assert not checkpoint.incomplete_path(destination).exists()
    return str(caught.value)


def test_every_value_lands_where_it_belongs(source: Path, tmp_path: Path):
    tensors = random_tensors()
    assert convert_hf(source, tmp_path / "out") is True
    assert checkpoint.read_config(tmp_path / "out") == CONFIG
    trunk = checkpoint.load_trunk(tmp_path / "out", CONFIG, None)
    assert {path: array.shape for path, array in trunk.items()} == families.trunk_shapes(CONFIG)
    attention = "model.layers.2.self_attn."
    qkv = np.concatenate([bits(tensors[f"{attention}{part}_proj.weight"]) for part in "qkv"])
    np.testing.assert_array_equal(bits(trunk["layers/2/attention/qkv_proj/kernel"]), qkv)
    np.testing.assert_array_equal(bits(trunk["layers/0/router/kernel"]), bits(tensors[ROUTER]))
    np.testing.assert_array_equal(bits(trunk["lm_head/kernel"]), bits(tensors["lm_head.weight"]))
    experts = checkpoint.load_experts(tmp_path / "out", CONFIG, 2, None)
    down = tensors["model.layers.2.mlp.experts.4.down_proj.weight"]
    np.testing.assert_array_equal(bits(experts[4, 2]), bits(down).T)
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"


def test_fused_experts_give_the_same_checkpoint(source: Path, tmp_path: Path):
    tensors = random_tensors()
    fused = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for layer in CONFIG.moe_layers:
        prefix = f"model.layers.{layer}.mlp.experts."
        part = {
            name: np.stack([tensors[f"{prefix}{expert}.{name}_proj.weight"] for expert in range(5)])
            for name in ("gate", "up", "down")
        }
        fused[f"{prefix}gate_up_proj"] = np.concatenate([part["gate"], part["up"]], axis=1)
        fused[f"{prefix}down_proj"] = part["down"]
    convert_hf(source, tmp_path / "one")
    convert_hf(write_source(tmp_path / "fused", fused), tmp_path / "other")
    for layer in CONFIG.moe_layers:
        arrays = [checkpoint.load_experts(tmp_path / name, CONFIG, layer, None) for name in ("one", "other")]
        np.testing.assert_array_equal(bits(arrays[0]), bits(arrays[1]))


def test_one_file_is_as_good_as_shards(source: Path, tmp_path: Path):
    convert_hf(source, tmp_path / "sharded")
    shutil.copytree(source, tmp_path / "single", ignore=shutil.ignore_patterns("*.safetensors", INDEX))
    save_file(random_tensors(), tmp_path / "single" / "model.safetensors")
    convert_hf(tmp_path / "single", tmp_path / "whole")
    manifests = [checkpoint.read_manifest(tmp_path / name) for name in ("sharded", "whole")]
    assert manifests[0] == manifests[1]


def test_progress_counts_every_byte(source: Path, tmp_path: Path):
    calls: list[tuple[str, int, int]] = []
    convert_hf(source, tmp_path / "out", progress=lambda *call: calls.append(call))
    total_bytes = sum(tensor.nbytes for tensor in random_tensors().values())
    assert calls[-1][1:] == (total_bytes, total_bytes)
    assert [done for _, done, _ in calls] == sorted({done for _, done, _ in calls})
    assert "experts/2" in {phase for phase, _, _ in calls}


def test_dtype_casts(source: Path, tmp_path: Path):
    convert_hf(source, tmp_path / "wide", dtype="float32")
    config = checkpoint.read_config(tmp_path / "wide")
    assert config.dtype == "float32"
    trunk = checkpoint.load_trunk(tmp_path / "wide", config, None)
    assert trunk["layers/0/router/kernel"].dtype == np.float32
    np.testing.assert_array_equal(trunk["layers/0/router/kernel"], random_tensors()[ROUTER].astype(np.float32))
    with pytest.raises(ValueError, match="dtype='int4' is not supported"):
        convert_hf(source, tmp_path / "int4", dtype="int4")


def test_float16_overflow_is_refused(tmp_path: Path):
    tensors = random_tensors()
    tensors[ROUTER][0, 0] = 1e6
    with pytest.raises(ValueError, match=r"gate\.weight: holds values beyond float16's range"):
        convert_hf(write_source(tmp_path / "source", tensors), tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()


def test_dtype_of_a_config_that_names_none(tmp_path: Path):
    convert_hf(write_source(tmp_path / "source", random_tensors(), torch_dtype=None), tmp_path / "out")
    assert checkpoint.read_config(tmp_path / "out").dtype == "bfloat16"


def truncate(source: Path) -> None:
    shard = source / SHARDS[0]
    shard.write_bytes(shard.read_bytes()[:-100])


def truncate_header(source: Path) -> None:
    (source / SHARDS[0]).write_bytes((source / SHARDS[0]).read_bytes()[:40])


def empty_shard(source: Path) -> None:
    (source / SHARDS[0]).write_bytes(b"")


def spoil_header(source: Path) -> None:
    shard = source / SHARDS[0]
    shard.write_bytes(shard.read_bytes().replace(b"{", b"[", 1))


def remove_shard(source: Path) -> None:
    (source / SHARDS[1]).unlink()


def remove_index(source: Path) -> None:
    (source / INDEX).unlink()


def spoil_index(source: Path) -> None:
    (source / INDEX).write_text("{")


def escape_by_index(source: Path) -> None:
    (source / INDEX).write_text(json.dumps({"weight_map": {ROUTER: "../elsewhere.safetensors"}}))


def keep_pickles_alone(source: Path) -> None:
    for name in (INDEX, SHARDS[1]):
        (source / name).unlink()
    (source / SHARDS[0]).rename(source / "pytorch_model.bin")


def remove_all_weights(source: Path) -> None:
    for name in (INDEX, *SHARDS):
        (source / name).unlink()


def add_single_file(source: Path) -> None:
    shutil.copyfile(source / SHARDS[0], source / "model.safetensors")


def remove_config(source: Path) -> None:
    (source / "config.json").unlink()


def spoil_config(source: Path) -> None:
    (source / "config.json").write_text("[]")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (truncate, [SHARDS[0], "bytes, its header asks for", "Download it again"]),
        (truncate_header, [SHARDS[0], "40 bytes, its header asks for"]),
        (empty_shard, [SHARDS[0], "0 bytes"]),
        (spoil_header, [SHARDS[0], "not a whole safetensors file"]),
        (remove_shard, [INDEX, SHARDS[1], "not there"]),
        (remove_index, [f"no {INDEX}"]),
        (spoil_index, [INDEX, "not valid JSON"]),
        (escape_by_index, [INDEX, "weight_map has to name safetensors files beside it"]),
        (keep_pickles_alone, ["pytorch_model.bin", "safetensors alone"]),
        (remove_all_weights, ["neither model.safetensors nor"]),
        (add_single_file, ["both", "model.safetensors"]),
        (remove_config, ["config.json: no such file"]),
        (spoil_config, ["config.json: holds a list"]),
    ],
)
def test_damaged_sources_are_refused(source: Path, spoil: Callable[[Path], None], words: list[str]):
    spoil(source)
    message = refusal(source)
    assert all(word in message for word in words), message


def test_every_wrong_tensor_is_listed(tmp_path: Path):
    tensors = random_tensors()
    del tensors["model.norm.weight"]
    tensors["model.layers.0.mlp.shared_expert.up_proj.weight"] = np.zeros((3, 4), ml_dtypes.bfloat16)
    tensors[ROUTER] = np.zeros((20, 5), ml_dtypes.bfloat16)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].astype(np.float32)
    tensors["model.embed_tokens.weight"] = np.zeros((41, 20), np.int8)
    message = refusal(write_source(tmp_path / "source", tensors))
    assert "5 problem(s)" in message
    assert "model.norm.weight is missing" in message
    assert "model.layers.0.mlp.shared_expert.up_proj.weight [3, 4] is unknown" in message
    assert f"{ROUTER} has shape [20, 5], expected [5, 20]" in message
    assert "lm_head.weight is F32, config.json says bfloat16" in message
    assert "model.embed_tokens.weight is I8, expected F32 or BF16 or F16" in message


def test_long_lists_are_cut(tmp_path: Path):
    tensors = {name: tensor for name, tensor in random_tensors().items() if ".experts." not in name}
    message = refusal(write_source(tmp_path / "source", tensors))
    assert "30 problem(s)" in message
    assert "and 10 more" in message


def test_tensors_have_to_be_where_the_index_says(source: Path):
    shard = source / SHARDS[1]
    tensors = load_file(shard)
    twice = load_file(source / SHARDS[0])["lm_head.weight"]
    moved = tensors.pop("model.norm.weight")
    save_file(tensors | {"lm_head.weight": twice}, shard)
    message = refusal(source)
    assert f"lm_head.weight is in two shards, {SHARDS[0]} and {SHARDS[1]}" in message
    assert f"model.norm.weight is in the index, but not in {SHARDS[1]}" in message
    save_file(load_file(source / SHARDS[0]) | {"model.norm.weight": moved}, source / SHARDS[0])
    assert f"model.norm.weight is in {SHARDS[0]}, but the index says {SHARDS[1]}" in refusal(source)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "mixtral"}, "model_type='mixtral' is not supported"),
        ({"architectures": ["MixtralForCausalLM"]}, "architectures=['MixtralForCausalLM']"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ],
)
def test_unsupported_models_are_refused(tmp_path: Path, changes: dict[str, object], words: str):
    assert words in refusal(write_source(tmp_path / "source", random_tensors(), **changes))


def test_a_destination_of_the_same_source_is_kept(source: Path, tmp_path: Path):
    destination = tmp_path / "out"
    convert_hf(source, destination)
    before = os.stat(destination / checkpoint.MANIFEST).st_mtime_ns
    assert convert_hf(source, destination) is False
    assert os.stat(destination / checkpoint.MANIFEST).st_mtime_ns == before
    other = write_source(tmp_path / "other", random_tensors(seed=1))
    with pytest.raises(ValueError, match="already a jmoe checkpoint, of another model or dtype"):
        convert_hf(other, destination)
    with pytest.raises(ValueError, match="of another model or dtype"):
        convert_hf(source, destination, dtype="float32")


def test_a_destination_with_anything_else_is_refused(source: Path, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    assert convert_hf(source, tmp_path / "empty") is True
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("years of work")
    for name in ("used", "file"):
        with pytest.raises(ValueError, match=f"{name}: already there and not empty"):
            convert_hf(source, tmp_path / name)
    assert (tmp_path / "used" / "thesis.txt").read_text() == "years of work"


def test_interrupted_anywhere_nothing_loads_and_a_rerun_works(source: Path, tmp_path: Path):
    calls: list[str] = []
    convert_hf(source, tmp_path / "whole", progress=lambda phase, *_: calls.append(phase))
    destination = tmp_path / "out"

    def interrupt_at(stop: int) -> Callable[[str, int, int], None]:
        seen = iter(range(len(calls)))

        def progress(*_: object) -> None:
            if next(seen) == stop:
                raise KeyboardInterrupt

        return progress

    for stop in (0, calls.index("experts/0") + 1, calls.index("experts/2"), len(calls) - 1):
        with pytest.raises(KeyboardInterrupt):
            convert_hf(source, destination, progress=interrupt_at(stop))
        assert not destination.exists()
        assert not checkpoint.incomplete_path(destination).exists()
    assert convert_hf(source, destination) is True
    assert checkpoint.read_manifest(destination) == checkpoint.read_manifest(tmp_path / "whole")


KILLED = """
import os, sys
from jmoe.convert import convert_hf
convert_hf(sys.argv[1], sys.argv[2], progress=lambda phase, *_: os._exit(9) if phase == "experts/2" else None)
"""


def test_a_killed_run_leaves_nothing_that_loads(source: Path, tmp_path: Path):
    destination = tmp_path / "out"
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    killed = subprocess.run([sys.executable, "-c", KILLED, source, destination], env=environment, check=False)
    assert killed.returncode == 9
    scratch = checkpoint.incomplete_path(destination)
    assert (scratch / "experts" / "00000").is_dir(), "it was to be killed half-way"
    with pytest.raises(ValueError, match="conversion was interrupted"):
        checkpoint.read_config(destination)
    with pytest.raises(ValueError, match="interrupted"):
        checkpoint.read_config(scratch)
    (scratch / "experts" / "00077").mkdir()
    assert convert_hf(source, destination) is True
    assert not scratch.exists()
    assert sorted(path.name for path in (destination / "experts").iterdir()) == ["00000", "00002"]


def test_command_line(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    main = runpy.run_path(str(Path(__file__).parents[1] / "tools" / "convert_hf.py"))["main"]
    assert main([str(source), str(tmp_path / "out")]) == 0
    assert "written" in capsys.readouterr().out
    assert main([str(source), str(tmp_path / "out")]) == 0
    assert "kept" in capsys.readouterr().out
    truncate(source)
    assert main([str(source), str(tmp_path / "other")]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "Download it again" in lines[0]
