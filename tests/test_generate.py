"""The terminal program: what it prints where, and how it says no."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import jmoe
from jmoe import checkpoint, convert, generate, synthetic
from jmoe.config import ModelConfig
from jmoe.experts.prefetch import everywhere
from jmoe.experts.prefetch_file import Calibration, file_beside
from jmoe.tokenizer import TextStream, load_tokenizer

pytestmark = pytest.mark.usefixtures("brings_all_guesses")

CONFIG = ModelConfig(
    vocab_size=259,  # the byte tokenizer's ids and no more: every token has text
    hidden_size=16,
    intermediate_size=16,
    moe_intermediate_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    num_experts=6,
    num_experts_per_tok=2,
    dtype="float32",
)
FIXED = "--no-link-test --max-seq-len 128 --prefill-chunk 16 --expert-slots 3".split()  # the same: compiled once
PLENTY = ["--ignore-eos", "--max-new-tokens", "24"]


class Terminal(io.StringIO):
    """Somebody at a keyboard."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("generate") / "hf"
    synthetic.write_synthetic(CONFIG, path, regime="flat", seed=1)
    return path


@pytest.fixture(scope="module")
def model(source: Path) -> Path:
    convert.convert_hf(source, source.parent / "model")
    return source.parent / "model"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JMOE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def run(model: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[str, str]]:
    """Runs the program; returns what it wrote to stdout and to stderr."""

    def call(*argv: str, code: int = 0, model: Path | str = model) -> tuple[str, str]:
        capsys.readouterr()
        assert generate.main(["--model", str(model), *FIXED, *argv]) == code
        return capsys.readouterr()

    return call


def texts(out: str) -> list[str]:
    return [completion["text"] for completion in json.loads(out)["completions"]]


# Output


def test_text_goes_to_stdout_and_the_rest_to_stderr(run) -> None:
    out, err = run("--prompt", "Hello", *PLENTY)
    report = json.loads(run("--prompt", "Hello", "--json", *PLENTY)[0])
    assert out == report["completions"][0]["text"] + "\n"
    for expected in (
        "memory plan:",
        "expert slots",
        "device",
        "time to first token",
        "generated 24 tokens",
        "hit rate",
    ):
        assert expected in err


def test_json_is_complete(run, model: Path) -> None:
    out, err = run("--prompt", "Hello", "--json", "--logprobs", "--seed", "7", *PLENTY)
    report = json.loads(out)
    assert "memory plan:" in err
    completion = report["completions"][0]
    tokenizer = load_tokenizer(model)
    assert completion["prompt"] == "Hello"
    assert completion["prompt_token_ids"] == list(b"Hello")
    assert len(completion["token_ids"]) == len(completion["logprobs"]) == 24
    assert completion["text"] == tokenizer.decode(completion["token_ids"])
    assert completion["finish_reason"] == "length"
    assert all(logprob <= 0 for logprob in completion["logprobs"])
    assert report["model"] == str(model)
    assert report["sampling"]["max_new_tokens"] == 24
    assert report["sampling"]["seed"] == 7
    assert report["stats"]["num_generated_tokens"] == 24
    assert report["plan"]["slots_per_layer"] == 3
    assert report["runtime"]["expert_slots"] == 3
    assert set(report["versions"]) == {"python", "jmoe", "jax", "jaxlib"}
    assert report["changes_what_the_model_says"] is None
    assert report["interrupted"] is False


def test_logprobs_are_left_out_unless_asked_for(run) -> None:
    out, _ = run("--prompt", "Hello", "--json", *PLENTY)
    assert "logprobs" not in json.loads(out)["completions"][0]


def test_slots_do_not_change_the_text(run) -> None:
    assert run("--prompt", "Hello", "--expert-slots", "6", *PLENTY)[0] == run("--prompt", "Hello", *PLENTY)[0]


def test_drafts_do_not_change_the_text_and_are_summed_up(run) -> None:
    options = ["--prompt", "Hello", *PLENTY, "--temperature", "0.9"]
    plain, _ = run(*options)
    drafted, err = run(*options, "--draft", "2")
    assert drafted == plain
    assert "drafts of 2 tokens, with 3 of 6 experts a layer, all that have a slot, chosen automatically" in err
    for expected in ("cycles of 2", "tokens accepted", "tokens a verification", "experts a layer; cycles fetched"):
        assert expected in err
    report = json.loads(run(*options, "--draft", "auto", "--draft-tokens", "2", "--json")[0])
    drafts = report["stats"]["drafts"]
    assert report["completions"][0]["text"] + "\n" == plain
    assert sum(drafts["steps_by_draft_tokens"].values()) == report["stats"]["num_decode_steps"]
    assert report["runtime"]["draft"] == "auto"


def test_a_prefetch_does_not_change_the_text_and_is_summed_up(run) -> None:
    options = ["--prompt", "Hello", *PLENTY, "--temperature", "0.9"]
    plain, _ = run(*options)
    ahead, err = run(*options, "--prefetch", "lookahead")
    assert ahead == plain
    assert "prefetch of up to 1 experts a layer, at most " in err
    assert "of that prefetched 0.0" in err
    report = json.loads(run(*options, "--prefetch", "lookahead", "--prefetch-experts", "1", "--json")[0])
    prefetch, plan = report["stats"]["prefetch"], report["plan"]
    assert prefetch["useful_bytes"] + prefetch["wasted_bytes"] == prefetch["prefetched_bytes"] > 0
    assert prefetch["late_bytes"] is None, "a CPU has no clock for it"
    assert " late" not in err
    assert plan["prefetch_bytes"] > 0
    assert report["runtime"]["prefetch_experts"] == 1


def test_guesses_that_are_executed_are_said_aloud(run, model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "model")
    vectors = np.random.default_rng(0).normal(size=(2, 6, 16)).astype(np.float32)
    methods, fingerprint = everywhere("default_vectors", 2), checkpoint.read_manifest(model).fingerprint
    Calibration(fingerprint, vectors, everywhere(None, 2), methods, ((0.75,), ())).save(file_beside(tmp_path / "model"))
    options = ["--prompt", "Hello", *PLENTY, "--execute-guess", "0.5"]
    report, err = run(*options, "--json", model=tmp_path / "model")
    assert "--execute-guess 0.5 CHANGES WHAT THE MODEL SAYS: " in err
    assert json.loads(report)["changes_what_the_model_says"] == {"execute_guess": 0.5, "guessed_layers": [1]}
    assert texts(report) != texts(run("--prompt", "Hello", *PLENTY, "--json")[0])
    _, err = run(*options, "--execute-guess", "0.9", model=tmp_path / "model")
    assert "--execute-guess 0.9 changes nothing" in err


def test_a_batch_is_labelled_and_is_its_prompts_one_by_one(run) -> None:
    alone = [run("--prompt", prompt, *PLENTY)[0] for prompt in ("Hello", "Another\nprompt", "x")]
    expected = "\n".join(["[1] Hello", alone[0] + "[2] Another prompt", alone[1] + "[3] x", alone[2]])
    prompts = ["--prompt", "Hello", "--prompt", "Another\nprompt", "--prompt", "x"]
    assert run(*prompts, *PLENTY, "--batch-size", "2")[0] == expected  # two, then one
    assert run(*prompts, *PLENTY, "--batch-size", "1")[0] == expected


def test_long_prompts_have_short_labels(run) -> None:
    out, _ = run("--prompt", "many words " * 9, "--prompt", "x", "--max-new-tokens", "1", "--batch-size", "1")
    assert out.splitlines()[0] == "[1] " + ("many words " * 9)[:59] + "…"


def test_quiet_is_the_text_alone(run) -> None:
    out, err = run("--prompt", "Hello", "--quiet", *PLENTY)
    assert err == ""
    assert out == run("--prompt", "Hello", *PLENTY)[0]


def test_a_terminal_gets_no_control_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr("sys.stdout", screen)
    generate._write("a\x1b[2J\r\tb\n\x9b世\x7f")
    assert screen.getvalue() == "a\ufffd[2J\ufffd\tb\n\ufffd世\ufffd"


def test_the_progress_bar_shows_phase_and_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    with generate._progress_bar(quiet=False) as progress:
        progress("loading experts", 500_000, 1_000_000)
        progress("another phase", 2_000, 8_000)
    assert "loading experts" in screen.getvalue()
    assert "another phase" in screen.getvalue()
    assert "1.00M" in screen.getvalue()
    screen.truncate(0)
    with generate._progress_bar(quiet=True) as progress:
        progress("loading experts", 500_000, 1_000_000)
    assert screen.getvalue() == ""


def test_a_profile_is_written(run, tmp_path: Path) -> None:
    _, err = run("--prompt", "Hello", "--max-new-tokens", "2", "--profile", str(tmp_path / "trace"))
    assert [file for file in (tmp_path / "trace").rglob("*") if file.is_file()]
    assert f"profiler trace written to {tmp_path / 'trace'}" in err


def test_the_default_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert generate.main(["--prompt", "Hello", "--max-new-tokens", "1", "--no-link-test"]) == 0
    assert "no --model: the demo model" in capsys.readouterr().err


# Prompts


def test_prompts_come_in_the_order_of_the_command_line(run, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("äöü\n\n", encoding="utf-8")
    prompts = ["--prompt", "1", "--prompt-file", str(tmp_path / "a.txt"), "--prompt", "3"]
    out, _ = run(*prompts, "--json", "--max-new-tokens", "1", "--batch-size", "1")
    assert [completion["prompt"] for completion in json.loads(out)["completions"]] == ["1", "äöü\n", "3"]


def test_stdin_is_a_prompt(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n"))
    assert run(*PLENTY)[0] == run("--prompt", "Hello", *PLENTY)[0]


def test_one_turn_of_a_chat(run, model: Path) -> None:
    out, _ = run("--chat", "--system", "Be kind.", "--prompt", "Hello", "--json", *PLENTY)
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}]
    assert json.loads(out)["completions"][0]["prompt_token_ids"] == load_tokenizer(model).apply_chat_template(messages)


def test_a_conversation_keeps_its_history(run, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", Terminal("Hello\n\nAnd then?\n/exit\nunread\n"))
    out, err = run("--chat", "--max-new-tokens", "4", "--ignore-eos")
    first, second = out.split("> ")[1], out.split("> ")[3]
    messages = [{"role": "user", "content": "Hello"}]
    tokenizer = load_tokenizer(model)
    lengths = [len(tokenizer.apply_chat_template(messages))]
    messages += [{"role": "assistant", "content": first.removesuffix("\n")}, {"role": "user", "content": "And then?"}]
    lengths += [len(tokenizer.apply_chat_template(messages))]
    assert [f"prompt {length} tokens" in err for length in lengths] == [True, True]
    assert out == f"> {first}> > {second}> "


# Sampling


def test_a_stop_string_ends_the_text(run) -> None:
    whole = texts(run("--prompt", "Hello", "--json", *PLENTY)[0])[0]
    stop = whole[5:7]
    report = json.loads(run("--prompt", "Hello", "--json", "--stop", "never seen", "--stop", stop, *PLENTY)[0])
    assert report["completions"][0]["text"] == whole[: whole.index(stop)]
    assert report["completions"][0]["finish_reason"] == "stop"


def test_a_seed_gives_the_same_text_again(run) -> None:
    def text(seed: str) -> str:
        return run("--prompt", "Hello", "--temperature", "1.5", "--seed", seed, *PLENTY)[0]

    assert text("5") == text("5") != text("6")


def test_origins_are_printed_when_asked_for(run) -> None:
    _, err = run("--prompt", "Hello", "--verbose", "--max-new-tokens", "2")
    assert "max_new_tokens 2 (option)" in err
    assert "temperature 0.0 (generation_config.json)" in err


# Interruptions and errors


def interrupt(monkeypatch: pytest.MonkeyPatch, at_call: int) -> None:
    """Ctrl-C, just as text comes for the nth time."""
    push, calls = TextStream.push, []

    def interrupted(stream: TextStream, token_ids):
        calls.append(token_ids)
        if len(calls) == at_call:
            raise KeyboardInterrupt
        return push(stream, token_ids)

    monkeypatch.setattr(TextStream, "push", interrupted)


def test_an_interruption_keeps_what_was_generated(run, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = run("--prompt", "Hello", "--quiet", *PLENTY)
    monkeypatch.setattr(jmoe.batch, "LIVE_S", 0)  # a token at a time
    interrupt(monkeypatch, at_call=10)
    out, err = run("--prompt", "Hello", *PLENTY, code=generate.INTERRUPTED)
    assert out.removesuffix("\n")
    assert whole.startswith(out.removesuffix("\n"))
    assert "interrupted" in err
    assert "tokens/s" in err


def test_an_interruption_shows_in_json(run, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(monkeypatch, at_call=2)
    out, _ = run("--prompt", "Hello", "--json", *PLENTY, code=generate.INTERRUPTED)
    report = json.loads(out)
    assert report["interrupted"] is True
    assert report["completions"][0]["token_ids"]
    assert report["stats"]["num_generated_tokens"] >= 1


def failing(error: BaseException, where: str) -> Callable:
    """A function that raises, as if the module `where` did."""
    scope = {"__name__": where, "error": error}
    exec("def fail(*args, **options): raise error", scope)
    return scope["fail"]  # type: ignore[return-value]


def test_an_interruption_while_loading(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jmoe, "load", failing(KeyboardInterrupt(), "jmoe.engine"))
    out, err = run("--prompt", "Hello", code=generate.INTERRUPTED)
    assert (out, err) == ("", "interrupted\n")


@pytest.mark.parametrize(
    ("error", "where"),
    [
        (ValueError("two\nlines"), "jmoe.engine"),
        (NotImplementedError("two\nlines"), "kernels_pallas.fetch.api"),
        (RuntimeError("two\nlines"), "jmoe.checkpoint"),
        (OSError("two\nlines"), "anywhere"),
    ],
)
def test_an_error_of_ours_is_one_line(run, monkeypatch: pytest.MonkeyPatch, error: Exception, where: str) -> None:
    monkeypatch.setattr(jmoe, "load", failing(error, where))
    assert run("--prompt", "Hello", code=2) == ("", "error: two lines\n")
    _, err = run("--prompt", "Hello", "--verbose", code=2)
    assert "Traceback" in err


def test_a_full_device_is_one_line(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jmoe, "load", failing(RuntimeError("RESOURCE_EXHAUSTED: out of memory"), "jax.api"))
    assert run("--prompt", "Hello", code=2)[1] == "error: RESOURCE_EXHAUSTED: out of memory\n"


@pytest.mark.parametrize("error", [ValueError("bug"), RuntimeError("bug"), TypeError("bug")])
def test_a_bug_is_not_hidden(run, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    monkeypatch.setattr(jmoe, "load", failing(error, "jax.api"))
    with pytest.raises(type(error), match="bug"):
        run("--prompt", "Hello")


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--prompt", ""], "prompt 1 of 1 is empty"),
        (["--prompt", "x", "--prompt-file", "/dev/null"], "prompt 2 of 2 is empty"),
        (["--prompt-file", "/no/such/file"], "--prompt-file /no/such/file: no such file"),
        (["--prompt", "x" * 128], "prompt 0 has 128 tokens, but max_seq_len=128"),
        (["--prompt", "x", "--expert-slots", "1"], "expert_slots=1 is outside 2..6"),
        (["--prompt", "x", "--expert-slots", "7"], "expert_slots=7 is outside 2..6"),
        (["--prompt", "x", "--batch-size", "0"], "batch_size=0 must be"),
        (["--prompt", "x", "--device-memory", "1kB"], "not enough device memory"),
        (["--prompt", "x", "--host-memory", "1kB"], "not enough host memory"),
        (["--prompt", "x", "--implementation", "magic"], "implementation='magic' must be"),
        (["--prompt", "x", "--temperature", "-1"], "temperature=-1.0 must be"),
        (["--prompt", "x", "--temperature", "nan"], "temperature=nan must be"),
        (["--prompt", "x", "--top-p", "0"], "top_p=0.0 must be"),
        (["--prompt", "x", "--max-new-tokens", "0"], "max_new_tokens=0 must be"),
        (["--prompt", "x", "--seed", "-1"], "seed=-1 must be"),
        (["--prompt", "x", "--stop", ""], "stop=('',) must be"),
        (["--prompt", "x", "--system", "y"], "add --chat"),
        (["--prompt", "x", "--logprobs"], "add --json"),
        (["--prompt", "x", "--draft", "2", "--draft-experts", "4"], "draft_experts=4 are more than the 3 slots"),
        (["--prompt", "x", "--draft-experts", "2"], "add --draft auto"),
        (["--prompt", "x", "--execute-guess", "0.9"], "make one: python -m tools.calibrate_prefetch"),
        (["--prompt", "x", "--execute-guess", "9"], "execute_guess=9.0 must be a recall"),
        (["--prompt", "x", "--execute-guess", "0", "--draft", "2"], "execute_guess=0.0 does not go with draft=2"),
        (["--prompt", "x", "--runtime", "/no/such.toml"], "/no/such.toml: no such file"),
    ],
)
def test_bad_input(run, argv: list[str], expected: str) -> None:
    out, err = run(*argv, code=2)
    assert out == ""
    assert err.splitlines()[-1].startswith("error: ")
    assert expected in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("toml", "expected"),
    [
        ("expert_slots = ", "not valid TOML"),
        ("expert_slot = 3", "unknown key expert_slot"),
        ("batch_size = 0", "batch"),
    ],
)
def test_bad_runtime_files(run, tmp_path: Path, toml: str, expected: str) -> None:
    (tmp_path / "runtime.toml").write_text(toml, encoding="utf-8")
    _, err = run("--prompt", "x", "--runtime", str(tmp_path / "runtime.toml"), code=2)
    assert err.startswith("error: ")
    assert expected in err
    assert str(tmp_path / "runtime.toml") in err or "batch" in expected


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, "gpt2"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"an_option_of_tomorrow": 1}, "an_option_of_tomorrow"),
    ],
)
def test_models_that_are_not_supported(run, source: Path, tmp_path: Path, change: dict, expected: str) -> None:
    shutil.copytree(source, tmp_path / "hf")
    config = json.loads((source / "config.json").read_text(encoding="utf-8")) | change
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    _, err = run("--prompt", "x", model=tmp_path / "hf", code=2)
    assert expected in err.splitlines()[-1]


def test_a_truncated_shard(run, source: Path, tmp_path: Path) -> None:
    shutil.copytree(source, tmp_path / "hf")
    shard = tmp_path / "hf" / "model.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100])
    _, err = run("--prompt", "x", model=tmp_path / "hf", code=2)
    assert f"{shard}: not a whole safetensors file ({len(whole) - 100} bytes" in err.splitlines()[-1]
    assert "Download it again" in err.splitlines()[-1]


def test_a_model_that_is_not_there(run, tmp_path: Path) -> None:
    assert "no such directory" in run("--prompt", "x", model=tmp_path / "nothing", code=2)[1]


def test_a_hub_id_without_a_network(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # HF_HUB_OFFLINE=1, which is read at import
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    _, err = run("--prompt", "x", model="some-org/some-model", code=2)
    assert err.splitlines()[-1].startswith("error: some-org/some-model: no such directory, and the download")


def test_a_checkpoint_without_tokenizer(run, model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").unlink()
    assert "no tokenizer.json" in run("--prompt", "x", model=tmp_path / "model", code=2)[1]


def test_a_terminal_without_a_prompt(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", Terminal())
    assert "error: no prompt: give --prompt" in run(code=2)[1]
    assert "error: --json needs prompts" in run("--chat", "--json", code=2)[1]


def test_prompts_that_are_no_text(run, tmp_path: Path) -> None:
    (tmp_path / "prompt").write_bytes(b"\xff\xfe")
    assert "not UTF-8 text" in run("--prompt-file", str(tmp_path / "prompt"), code=2)[1]
