"""The command line: sizes, and where settings and sampling defaults come from."""

from pathlib import Path

import pytest

from jmoe import RuntimeConfig, arguments


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8GiB", 8 << 30),
        ("500MB", 500_000_000),
        ("2e9", 2_000_000_000),
        ("1.5 kib", 1536),
        ("64", 64),
        ("1TB", 10**12),
        ("7B", 7),
    ],
)
def test_sizes(text: str, expected: int) -> None:
    assert arguments.parse_size(text) == expected


@pytest.mark.parametrize("text", ["", "GiB", "8 gigs", "-1GB", "0", "1..2MB", "1e"])
def test_what_is_no_size(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        arguments.parse([f"--device-memory={text}"])
    assert stop.value.code == 2
    assert "is not a size; expected for example 8GiB" in capsys.readouterr().err


def test_options_override_the_runtime_file(tmp_path: Path) -> None:
    file = tmp_path / "runtime.toml"
    file.write_text('expert_slots = 3\nmax_seq_len = 64\nbatch_size = 2\ndtype = "float32"\n', encoding="utf-8")
    options = ["--runtime", str(file), "--max-seq-len", "32", "--device-memory", "1GiB", "--no-link-test"]
    runtime = arguments.runtime_config(arguments.parse(options), 5)
    expected = RuntimeConfig(
        expert_slots=3,
        max_seq_len=32,
        batch_size=2,
        dtype="float32",
        device_memory_bytes=1 << 30,
        measure_link=False,
    )
    assert runtime == expected


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], {"draft": "off"}),
        (["--draft", "off"], {"draft": "off"}),
        (["--draft", "3", "--draft-experts", "5"], {"draft": 3, "draft_experts": 5, "most_draft_tokens": 3}),
        (["--draft", "auto"], {"draft": "auto", "draft_experts": None, "draft_tokens": 4, "most_draft_tokens": 4}),
        (["--draft", "auto", "--draft-tokens", "6"], {"draft": "auto", "most_draft_tokens": 6}),
    ],
)
def test_drafts(argv: list[str], expected: dict) -> None:
    runtime = arguments.runtime_config(arguments.parse(argv), 1)
    assert {name: getattr(runtime, name) for name in expected} == expected


@pytest.mark.parametrize("text", ["0", "-1", "on", "2.5", ""])
def test_what_is_no_number_of_drafts(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        arguments.parse([f"--draft={text}"])
    assert stop.value.code == 2
    assert "is not off, auto or a number of tokens to draft, at least 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--draft", "2", "--draft-tokens", "3"],
            "--draft-tokens is the most that --draft auto tries, and --draft is 2",
        ),
        (["--draft-tokens", "3"], "--draft is off; leave it out"),
        (["--draft-experts", "3"], "--draft-experts says what drafts, and nothing does; add --draft auto, or a number"),
        (["--draft", "auto", "--draft-tokens", "0"], "draft_tokens=0 must be at least 1"),
    ],
)
def test_draft_options_that_mean_nothing_are_refused(argv: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        arguments.runtime_config(arguments.parse(argv), 1)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], {"prefetch": "auto", "prefetch_experts": 1.0}),
        (["--draft", "2"], {"prefetch": "auto", "draft": 2}),
        (["--prefetch", "off"], {"prefetch": "off", "most_prefetched": 0}),
        (["--prefetch", "lookahead"], {"prefetch": "lookahead", "prefetch_experts": 1.0, "most_prefetched": 1}),
        (["--prefetch-experts", "0.5"], {"prefetch": "auto", "prefetch_experts": 0.5}),
        (["--prefetch", "lookahead", "--prefetch-experts", "1.5"], {"prefetch_experts": 1.5, "most_prefetched": 2}),
        (["--prefetch", "activation", "--prefetch-experts", "1.5"], {"prefetch": "activation", "most_prefetched": 2}),
        (["--prefetch", "both"], {"prefetch": "both", "prefetch_experts": 1.0, "most_prefetched": 1}),
    ],
)
def test_prefetching(argv: list[str], expected: dict) -> None:
    runtime = arguments.runtime_config(arguments.parse(argv), 1)
    assert {name: getattr(runtime, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--prefetch", "off", "--prefetch-experts", "1"], "and --prefetch is off; leave it out"),
        (
            ["--prefetch", "lookahead", "--prefetch-experts", "0"],
            "prefetch_experts=0.0 must be a number",
        ),
        (["--prefetch", "lookahead", "--prefetch-experts", "5"], "prefetch_experts=5.0 must be"),
        (["--prefetch", "lookahead", "--prefetch-experts", "nan"], "prefetch_experts=nan must be"),
        (["--prefetch", "lookahead", "--draft", "2"], "prefetch='lookahead' does not go with draft=2"),
        (["--prefetch", "both", "--draft", "2"], "prefetch='both' does not go with draft=2"),
        (
            ["--prefetch", "activation", "--execute-guess", "0.8"],
            "execute_guess=0.8 does not go with prefetch='activation'",
        ),
    ],
)
def test_prefetch_options_that_mean_nothing_are_refused(argv: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        arguments.runtime_config(arguments.parse(argv), 1)


def test_prefetching_in_a_runtime_file(tmp_path: Path) -> None:
    file = tmp_path / "runtime.toml"
    file.write_text('prefetch = "lookahead"\nprefetch_experts = 1\n', encoding="utf-8")
    assert RuntimeConfig.from_toml(file) == RuntimeConfig(prefetch="lookahead", prefetch_experts=1)
    file.write_text('prefetch = "on"\n', encoding="utf-8")
    with pytest.raises(ValueError, match="prefetch='on' is not one of auto, off, lookahead, activation, both"):
        RuntimeConfig.from_toml(file)


def test_a_batch_holds_all_prompts_unless_told_otherwise() -> None:
    assert arguments.runtime_config(arguments.parse([]), 5).batch_size == 5
    assert arguments.runtime_config(arguments.parse(["--batch-size", "1"]), 5).batch_size == 1


def test_help_lists_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        arguments.parse(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(f"--{name.replace('_', '-')}" in text for name in vars(arguments.parse([])) if name != "prompts")


@pytest.mark.parametrize(
    ("generation_config", "argv", "expected"),
    [
        ({}, [], {"temperature": (0.0, "default"), "top_k": (0, "default"), "max_new_tokens": (128, "default")}),
        (
            {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95},
            ["--top-p", "0.5"],
            {
                "temperature": (0.6, "generation_config.json"),
                "top_k": (20, "generation_config.json"),
                "top_p": (0.5, "option"),
            },
        ),
        (
            {"do_sample": False, "temperature": 0.6, "max_new_tokens": 9},
            [],
            {"temperature": (0.0, "generation_config.json"), "max_new_tokens": (9, "generation_config.json")},
        ),
        ({"do_sample": True, "top_k": None}, [], {"temperature": (1.0, "generation_config.json")}),
        ({"do_sample": False}, ["--temperature", "0.7"], {"temperature": (0.7, "option")}),
    ],
)
def test_where_sampling_defaults_come_from(generation_config: dict, argv: list[str], expected: dict) -> None:
    params, origins = arguments.sampling_params(arguments.parse(argv), generation_config)
    assert {name: (getattr(params, name), origins[name]) for name in expected} == expected
