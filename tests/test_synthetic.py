"""Random checkpoints: their scales, that the same seed gives the same bytes, and their tokenizer."""

import dataclasses
import math
import runpy
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from jmoe import checkpoint
from jmoe.config import ModelConfig
from jmoe.convert import convert_hf
from jmoe.synthetic import SPECIAL_TOKENS, Regime, byte_tokenizer, init_mean, init_std, write_synthetic

ROOT = Path(__file__).parents[1]
TINY = ModelConfig.from_toml(ROOT / "configs" / "models" / "tiny.toml")
EMBEDDING = "model.embed_tokens.weight"
DOWN = "model.layers.1.mlp.experts.3.down_proj.weight"
NORM = "model.layers.0.self_attn.q_norm.weight"


def write(path: Path, regime: Regime = "flat", seed: int = 0, **changes: object) -> dict[str, np.ndarray]:
    config = dataclasses.replace(TINY, **({"num_hidden_layers": 2} | changes))
    write_synthetic(config, path, regime=regime, seed=seed)
    return load_file(path / "model.safetensors")


def test_it_converts(tmp_path: Path):
    config = dataclasses.replace(TINY, num_hidden_layers=2)
    write(tmp_path / "hf")
    convert_hf(tmp_path / "hf", tmp_path / "converted")
    assert checkpoint.read_config(tmp_path / "converted") == config


@pytest.mark.parametrize("regime", ["sticky", "flat"])
def test_tensors_have_the_scale_that_is_promised(tmp_path: Path, regime: Regime):
    for name, tensor in write(tmp_path / "hf", regime).items():
        if "norm" in name:
            assert (tensor == 1).all(), name
        else:
            std = init_std(name, tensor.shape, regime)
            assert abs(tensor.std() / std - 1) < 5 / math.sqrt(tensor.size), name
            assert abs(tensor.mean()) < 5 * std / math.sqrt(tensor.size), name


def test_scales():
    assert init_std(DOWN, (64, 32), "sticky") == init_std(EMBEDDING, (512, 64), "sticky") == 0.02
    assert init_std(DOWN, (64, 32), "flat") == 1 / math.sqrt(32)
    assert init_std("model.layers.1.mlp.experts.gate_up_proj", (16, 64, 64), "flat") == 1 / 8
    assert init_std(EMBEDDING, (512, 64), "flat") == init_std("embed/embedding", (512, 64), "flat") == 1
    assert init_std("layers/0/attention/o_proj/kernel", (64, 100), "flat") == 0.1
    assert init_std(NORM, (16,), "flat") == init_std("norm/scale", (16,), "sticky") == 0
    assert init_mean(NORM) == init_mean("layers/0/input_norm/scale") == 1
    assert init_mean(DOWN) == 0


def test_scales_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="regime='loud' is unknown; expected one of sticky, flat"):
        init_std(DOWN, (64, 32), "loud")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="gate, up and down differ in scale"):
        init_std("experts/0", (16, 3, 32, 64), "flat")


def test_the_seed_decides_every_value(tmp_path: Path):
    first, again, other = (write(tmp_path / name, seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    assert all((first[name] == again[name]).all() for name in first)
    assert not [name for name in first if "norm" not in name and (first[name] == other[name]).any()]


def test_values_do_not_depend_on_shards_or_depth(tmp_path: Path):
    whole = write(tmp_path / "whole")
    config = dataclasses.replace(TINY, num_hidden_layers=3)
    write_synthetic(config, tmp_path / "shards", regime="flat", seed=0, max_shard_bytes=100_000)
    shards = {
        name: array for file in (tmp_path / "shards").glob("*.safetensors") for name, array in load_file(file).items()
    }
    assert len(shards) > len(whole)
    assert all((whole[name] == shards[name]).all() for name in whole)


def test_bfloat16(tmp_path: Path):
    assert {str(tensor.dtype) for tensor in write(tmp_path / "hf", dtype="bfloat16").values()} == {"bfloat16"}


@pytest.mark.parametrize("text", ["plain words", "  two  spaces\n\ttab", "é ñ 漢字 🦜", "\x00\x7f\xad"])
def test_tokens_are_the_bytes_of_the_text(tmp_path: Path, text: str):
    tokenizer = byte_tokenizer(259)
    ids = tokenizer.encode(text).ids
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text


def test_special_tokens_are_one_token_each():
    tokenizer = byte_tokenizer(1000)
    assert tokenizer.encode("a<|im_end|>b").ids == [97, 258, 98]
    assert [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS] == [256, 257, 258]


def test_a_vocabulary_too_small_for_bytes_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"vocab_size=258 is too small .* at least 259"):
        write(tmp_path / "hf", vocab_size=258)
    with pytest.raises(ValueError, match="regime='loud' is unknown"):
        write(tmp_path / "hf", regime="loud")  # type: ignore[arg-type]
    assert not (tmp_path / "hf").exists()


def test_the_tokenizer_loads_with_its_chat_template(tmp_path: Path):
    from transformers import AutoTokenizer  # slow to import, and needed here alone

    write(tmp_path / "hf")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer("hi<|im_end|>").input_ids == [104, 105, 258]
    assert tokenizer.eos_token_id == 258
    assert tokenizer.decode([104, 105, 258], skip_special_tokens=True) == "hi"
    messages = [{"role": "user", "content": "hi"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert prompt == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert Tokenizer.from_file(str(tmp_path / "hf" / "tokenizer.json")).get_vocab_size() == 259


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    main = runpy.run_path(str(ROOT / "tools" / "make_synthetic.py"))["main"]
    arguments = ["--config", str(ROOT / "configs/models/tiny.toml"), "--layers", "1", "--seed", "5"]
    assert main([*arguments, str(tmp_path / "hf")]) == 0
    convert_hf(tmp_path / "hf", tmp_path / "converted")
    assert checkpoint.read_config(tmp_path / "converted").num_hidden_layers == 1
    assert main([*arguments, str(tmp_path / "hf")]) == 2
    assert "error: " in capsys.readouterr().err
