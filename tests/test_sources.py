"""From what the user names to a checkpoint directory: converting once, downloading, and what is refused."""

import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import errors

from jmoe import checkpoint, sources, synthetic
from jmoe.config import ModelConfig

ROOT = Path(__file__).parent.parent
CONFIG = ModelConfig(
    vocab_size=260,
    hidden_size=16,
    intermediate_size=16,
    moe_intermediate_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    num_experts=4,
    num_experts_per_tok=2,
    dtype="float32",
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("JMOE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    synthetic.write_synthetic(CONFIG, tmp_path / "model", regime="flat", seed=0)
    return tmp_path / "model"


@pytest.fixture
def lines() -> list[str]:
    return []


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert sources.cache_dir() == tmp_path / "cache"
    monkeypatch.delenv("JMOE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert sources.cache_dir() == tmp_path / "xdg" / "jmoe"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert sources.cache_dir() == tmp_path / ".cache" / "jmoe"
    monkeypatch.setenv("JMOE_CACHE", "~/here")
    assert sources.cache_dir() == tmp_path / "here"


def test_a_hugging_face_directory_is_converted_once(source: Path, cache: Path, lines: list[str]) -> None:
    phases = []
    first = sources.resolve(source, announce=lines.append, progress=lambda *report: phases.append(report))
    assert first.parent == cache / "checkpoints"
    assert first.name.startswith("model-")
    assert checkpoint.read_config(first) == CONFIG
    assert (first / "tokenizer.json").is_file()
    assert phases
    written = (first / checkpoint.MANIFEST).stat().st_mtime_ns
    assert sources.resolve(str(source), announce=lines.append) == first
    assert (first / checkpoint.MANIFEST).stat().st_mtime_ns == written
    assert ["converting it" in line and str(first) in line for line in lines] == [True, False]
    assert "converted before" in lines[1]


def test_a_changed_source_is_converted_again(source: Path) -> None:
    first = sources.resolve(source)
    assert sources.resolve(source) == first
    os.utime(source / "config.json", ns=(0, 0))
    assert sources.resolve(source) != first


def test_the_dtype_is_that_of_the_conversion(source: Path) -> None:
    plain, cast = sources.resolve(source), sources.resolve(source, dtype="bfloat16")
    assert [checkpoint.read_config(path).dtype for path in (plain, cast)] == ["float32", "bfloat16"]


def test_a_converted_directory_is_taken_as_it_is(source: Path, lines: list[str]) -> None:
    converted = sources.resolve(source)
    assert sources.resolve(converted, announce=lines.append) == converted
    assert lines == []


def test_an_interrupted_conversion_is_made_again(source: Path, cache: Path) -> None:
    def interrupt(phase: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sources.resolve(source, progress=interrupt)
    assert not [entry for entry in (cache / "checkpoints").iterdir() if entry.is_dir()]
    assert checkpoint.is_checkpoint(sources.resolve(source))


def test_two_that_come_at_once_convert_once(source: Path, lines: list[str]) -> None:
    with ThreadPoolExecutor(2) as pool:  # the lock holds between threads as it does between processes
        first, second = pool.map(lambda path: sources.resolve(path, announce=lines.append), [source, source])
    assert first == second
    assert sum("converting it" in line for line in lines) == 1


# The default model


def test_the_default_is_the_demo_model(cache: Path, lines: list[str]) -> None:
    path = sources.resolve(None, announce=lines.append)
    assert checkpoint.read_config(path) == ModelConfig.from_toml(ROOT / "configs" / "models" / "demo.toml")
    assert lines[0].startswith("no --model: the demo model")
    assert sources.resolve(None) == path


# The hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[[object], list]:
    """Puts a function, or an error to raise, in the place of the hub's download; returns the calls that reach it."""

    def put(answer: object) -> list:
        calls = []

        def download(*args, **options):
            calls.append((args, options))
            if isinstance(answer, Exception):
                raise answer
            return answer

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        return calls

    return put


def test_a_hub_id_is_downloaded_and_converted(source: Path, hub, lines: list[str]) -> None:
    calls = hub(str(source))
    path = sources.resolve("some-org/some.model_1", announce=lines.append)
    assert checkpoint.read_config(path) == CONFIG
    assert "downloaded" in lines[0]
    [(args, options)] = calls
    assert args == ("some-org/some.model_1",)
    kept = huggingface_hub.utils.filter_repo_objects(
        ["model-1.safetensors", "config.json", "merges.txt", "chat_template.jinja", "tokenizer.model", "m.bin", "m.pt",
         "m.pth", "m.gguf", "modeling.py", "x.pkl"],
        **options,
    )  # fmt: skip
    assert list(kept) == ["model-1.safetensors", "config.json", "merges.txt", "chat_template.jinja", "tokenizer.model"]


def test_a_local_directory_comes_before_the_hub(source: Path, hub, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = hub(AssertionError("not reached"))
    monkeypatch.chdir(source.parent.parent)
    assert checkpoint.is_checkpoint(sources.resolve(f"{source.parent.name}/model"))
    assert calls == []


def refusal(kind: type[errors.HfHubHTTPError]) -> errors.HfHubHTTPError:
    return kind.__new__(kind, "refused")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (refusal(errors.GatedRepoError), "gated. Accept its terms"),
        (refusal(errors.RepositoryNotFoundError), "no repository of that name"),
        (ConnectionError("no route\nto it"), r"failed \(ConnectionError: no route\)"),
        (errors.OfflineModeIsEnabled("offline"), "OfflineModeIsEnabled"),
    ],
)
def test_a_failed_download_says_what_to_do(hub, error: Exception, expected: str) -> None:
    hub(error)
    with pytest.raises(RuntimeError, match=rf"org/name: no such directory, and .*{expected}.*--model DIRECTORY"):
        sources.resolve("org/name")


def test_no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # HF_HUB_OFFLINE=1, which is read at import
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(RuntimeError, match=r"org/name: no such directory, and the download .* failed"):
        sources.resolve("org/name")


# What is refused


@pytest.mark.parametrize("model", ["/no/such/place", "./org/name", "nothing", "a/b/c", "../x", "~/no-such-place", ""])
def test_a_path_that_is_not_there(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="expected a"):
        sources.resolve(model)


def test_a_conversion_that_was_interrupted_is_pointed_at(tmp_path: Path) -> None:
    (tmp_path / "model.incomplete").mkdir()
    with pytest.raises(ValueError, match=r"model\.incomplete is what an interrupted conversion left"):
        sources.resolve(tmp_path / "model")


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([], "an empty directory"),
        (["config.json", "pytorch_model.bin"], r"only pytorch_model\.bin; jmoe reads safetensors alone"),
        (["consolidated.00.pth"], r"only consolidated\.00\.pth; jmoe reads safetensors alone"),
        (["notes.txt"], r"it holds notes\.txt"),
        (["model.safetensors"], r"no config\.json"),
        (["config.json"], r"neither model\.safetensors nor"),
    ],
)
def test_directories_without_a_checkpoint(tmp_path: Path, names: list[str], expected: str) -> None:
    (tmp_path / "model").mkdir()
    for name in names:
        (tmp_path / "model" / name).write_text(json.dumps({"model_type": "qwen3_moe"}), encoding="utf-8")
    with pytest.raises(ValueError, match=rf"model: .*{expected}"):
        sources.resolve(tmp_path / "model")


def test_a_file(source: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.safetensors: a file; expected the directory"):
        sources.resolve(source / "model.safetensors")


def test_a_directory_that_is_not_converted_leaves_nothing(tmp_path: Path, source: Path, cache: Path) -> None:
    (source / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        sources.resolve(source)
    assert not [entry for entry in (cache / "checkpoints").iterdir() if entry.is_dir()]
