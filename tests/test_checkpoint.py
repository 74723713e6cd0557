"""The jmoe format: what is saved comes back, in the kind of memory that is asked for, and damage is noticed."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

from jmoe import checkpoint
from jmoe.checkpoint import Manifest
from jmoe.config import ModelConfig
from jmoe.model import families

CONFIG = ModelConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=24,
    moe_intermediate_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    num_experts=4,
    num_experts_per_tok=2,
    mlp_only_layers=(0,),
    dtype="bfloat16",
)


def random_array(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape, np.float32).astype(ml_dtypes.bfloat16)


TRUNK = {path: random_array(shape) for path, shape in families.trunk_shapes(CONFIG).items()}
EXPERTS = random_array((4, 3, 8, 16))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("made")
    checkpoint.save_experts(path, 1, EXPERTS)
    checkpoint.save_trunk(path, TRUNK)
    checkpoint.write_manifest(path, Manifest(CONFIG, "0123"))
    return path


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "copy"))


def sharding(kind: str) -> jax.sharding.Sharding:
    device = jax.devices()[0]
    kinds = [memory.kind for memory in device.addressable_memories() if memory.kind.startswith(kind)]
    return jax.sharding.SingleDeviceSharding(device, memory_kind=kinds[0])


def test_manifest(made: Path, tmp_path: Path):
    assert checkpoint.is_checkpoint(made)
    assert not checkpoint.is_checkpoint(tmp_path)
    assert checkpoint.read_manifest(made) == Manifest(CONFIG, "0123")
    assert checkpoint.read_config(str(made)) == CONFIG


@pytest.mark.parametrize("kind", ["device", "pinned_host"])
def test_arrays_come_back_in_the_memory_asked_for(made: Path, kind: str):
    trunk = checkpoint.load_trunk(made, CONFIG, sharding(kind))
    assert set(trunk) == set(TRUNK)
    experts = checkpoint.load_experts(made, CONFIG, 1, sharding(kind))
    for loaded, saved in [(experts, EXPERTS), *((trunk[path], TRUNK[path]) for path in TRUNK)]:
        assert isinstance(loaded, jax.Array)
        assert loaded.sharding == sharding(kind)
        np.testing.assert_array_equal(np.asarray(loaded).view(np.uint16), saved.view(np.uint16))


def test_without_a_sharding_they_are_numpy_arrays(made: Path):
    experts = checkpoint.load_experts(made, CONFIG, 1, None)
    assert isinstance(experts, np.ndarray)
    np.testing.assert_array_equal(experts.view(np.uint16), EXPERTS.view(np.uint16))


@pytest.mark.parametrize("kind", ["device", "pinned_host", None])
def test_dtype_of_the_config_wins(made: Path, kind: str | None):
    config = dataclasses.replace(CONFIG, dtype="float32")
    place = None if kind is None else sharding(kind)
    experts = checkpoint.load_experts(made, config, 1, place)
    trunk = checkpoint.load_trunk(made, config, place)
    assert experts.dtype == np.float32
    assert {str(array.dtype) for array in trunk.values()} == {"float32"}
    np.testing.assert_array_equal(np.asarray(experts), EXPERTS.astype(np.float32))


def test_narrowing_rounds_to_nearest(tmp_path: Path):
    config = dataclasses.replace(CONFIG, dtype="float32")
    exact = np.random.default_rng(0).standard_normal((4, 3, 8, 16), np.float32)
    checkpoint.save_experts(tmp_path, 1, exact)
    narrow = checkpoint.load_experts(tmp_path, dataclasses.replace(config, dtype="bfloat16"), 1, sharding("device"))
    np.testing.assert_array_equal(np.asarray(narrow), exact.astype(ml_dtypes.bfloat16))


def test_float16_needs_a_conversion(made: Path):
    with pytest.raises(ValueError, match="stored as bfloat16; loading it as float16 could overflow"):
        checkpoint.load_experts(made, dataclasses.replace(CONFIG, dtype="float16"), 1, None)


def test_no_thread_is_left_behind(made: Path, tmp_path: Path):
    before = set(threading.enumerate())
    checkpoint.save_experts(tmp_path, 1, EXPERTS)
    checkpoint.load_experts(made, CONFIG, 1, sharding("pinned_host"))
    for thread in set(threading.enumerate()) - before:
        thread.join(timeout=5)  # one may be on its way out
    assert set(threading.enumerate()) <= before


def test_what_is_no_checkpoint_says_what_it_is(tmp_path: Path):
    with pytest.raises(ValueError, match="no such directory"):
        checkpoint.read_config(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"not a jmoe checkpoint: it has no jmoe\.json"):
        checkpoint.read_config(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"a Hugging Face checkpoint.*tools/convert_hf\.py"):
        checkpoint.read_config(tmp_path)
    (tmp_path / "half.incomplete").mkdir()
    with pytest.raises(ValueError, match=r"interrupted\. Run it again"):
        checkpoint.read_config(tmp_path / "half")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda manifest: manifest | {"version": 2}, "format version 2, but this jmoe reads version 1. Update jmoe"),
        (lambda manifest: {"format": "jmoe"}, "damaged"),
        (lambda manifest: [], "damaged"),
        (lambda manifest: manifest | {"config": manifest["config"] | {"wings": 2}}, "unknown key wings"),
    ],
)
def test_a_manifest_that_cannot_be_used(copy: Path, change, words: str):
    file = copy / checkpoint.MANIFEST
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    with pytest.raises(RuntimeError, match=words):
        checkpoint.read_config(copy)
    file.write_text("{")
    with pytest.raises(RuntimeError, match="damaged"):
        checkpoint.read_config(copy)


def test_layers_that_are_not_there(copy: Path):
    with pytest.raises(ValueError, match="layer 0 has no experts; the layers that have: 1"):
        checkpoint.load_experts(copy, CONFIG, 0, None)
    shutil.rmtree(copy / "experts" / "00001")
    with pytest.raises(RuntimeError, match=r"experts/00001: missing from the checkpoint"):
        checkpoint.load_experts(copy, CONFIG, 1, None)
    shutil.rmtree(copy / "trunk")
    with pytest.raises(RuntimeError, match=r"trunk: missing from the checkpoint"):
        checkpoint.load_trunk(copy, CONFIG, None)


@pytest.mark.parametrize("how", ["removed", "cut"])
@pytest.mark.parametrize("what", ["_METADATA", "manifest.ocdbt", "the weights"])
def test_damaged_files_are_noticed(copy: Path, what: str, how: str):
    files = [path for path in (copy / "experts" / "00001").rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    file = largest if what == "the weights" else copy / "experts" / "00001" / what
    if how == "removed":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(RuntimeError, match=r"experts/00001: damaged.*Convert the model again"):
        checkpoint.load_experts(copy, CONFIG, 1, sharding("pinned_host"))


def test_a_config_of_another_model_is_noticed(made: Path):
    with pytest.raises(RuntimeError, match=r"experts has shape \[4, 3, 8, 16\], expected \[5, 3, 8, 16\]"):
        checkpoint.load_experts(made, dataclasses.replace(CONFIG, num_experts=5), 1, None)
    with pytest.raises(RuntimeError, match="lm_head/kernel is unknown"):
        checkpoint.load_trunk(made, dataclasses.replace(CONFIG, tie_word_embeddings=True), None)
    with pytest.raises(RuntimeError, match="qkv_proj/bias is missing"):
        checkpoint.load_trunk(made, dataclasses.replace(CONFIG, attention_bias=True), None)


def test_a_full_disk_is_said_before_writing(tmp_path: Path):
    full = pytest.raises(RuntimeError, match=r"out: 4611686018427387904 bytes are needed and \d+ are free")
    with full, checkpoint.new_directory(tmp_path / "out", 1 << 62):
        raise AssertionError("the block must not be entered")
    assert not list(tmp_path.iterdir())


def test_checkpoint_bytes():
    assert checkpoint.checkpoint_bytes(CONFIG) == EXPERTS.nbytes + sum(array.nbytes for array in TRUNK.values())


LOAD_ALL = """
import json, resource, sys
from pathlib import Path
import jax
from jmoe import checkpoint
device = jax.devices()[0]
host = jax.sharding.SingleDeviceSharding(device, memory_kind="pinned_host")
config = checkpoint.read_config(sys.argv[1])
def peak_bytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
checkpoint.load_experts(sys.argv[2], checkpoint.read_config(sys.argv[2]), 1, host)  # what loading needs at all
before = peak_bytes()
layers = [checkpoint.load_experts(sys.argv[1], config, layer, host) for layer in config.moe_layers]
print(peak_bytes() - before, sum(layer.nbytes for layer in layers))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss counts in other units elsewhere")
def test_loading_never_holds_the_experts_twice(made: Path, tmp_path: Path):
    num_layers, layer_bytes = 10, 16 << 20
    sizes = dict(num_hidden_layers=num_layers, mlp_only_layers=(), num_experts=16, moe_intermediate_size=64)
    config = dataclasses.replace(CONFIG, **sizes, hidden_size=layer_bytes // (16 * 3 * 64 * 2))
    experts = np.ones((16, *config.expert_shape), ml_dtypes.bfloat16)
    for layer in range(num_layers):
        checkpoint.save_experts(tmp_path, layer, experts)
    checkpoint.write_manifest(tmp_path, Manifest(config, ""))
    command = [sys.executable, "-c", LOAD_ALL, tmp_path, made]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    run = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    grown_bytes, store_bytes = map(int, run.stdout.split())
    assert store_bytes >= num_layers * (layer_bytes - (1 << 20))
    # Two layers in flight and what threads and allocators keep; twice the store would be ten layers more.
    assert grown_bytes < store_bytes + 6 * layer_bytes
