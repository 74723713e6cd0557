"""Workloads: a seed decides them, lengths are as asked for, and prompts are read or refused with their line."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

from jmoe.synthetic import byte_tokenizer
from jmoe.tokenizer import Tokenizer
from tools import make_prompts
from tools.stdlib_corpus import HELD_OUT, read_files, stdlib_root
from tools.workload import Lengths, Prompt, Request, make_workload, random_workload, read_prompts

BYTES = Tokenizer(byte_tokenizer(259), eos_ids=())  # ids are the bytes of the text
PROMPTS = [Prompt(letter, letter * 50) for letter in "abcde"]
SIZES = {"prompt_tokens": Lengths(8, 0.5, 2, 40), "new_tokens": Lengths(16, 1.0, 1, 100)}
WRITTEN = Path(__file__).parents[1] / "configs" / "prompts" / "python.jsonl"


def workload(num_requests: int = 12, seed: int = 0, prompts: list[Prompt] = PROMPTS, **sizes: Lengths) -> list[Request]:
    return make_workload(prompts, BYTES, num_requests=num_requests, seed=seed, **(SIZES | sizes))


def shape(requests: list[Request]) -> list[tuple[str, int, int]]:
    return [(request.source, len(request.prompt_ids), request.max_new_tokens) for request in requests]


# Lengths


def test_lengths_are_lognormal_and_clipped() -> None:
    """Median and spread of those that were not clipped, and how many were, as the normal distribution says."""
    drawn = np.array(Lengths(1000, 0.5, 500, 100_000).draw(np.random.default_rng(0), 40_000))
    assert np.median(drawn) == pytest.approx(1000, rel=0.02)
    upper = np.quantile(drawn, 0.841345)  # one sigma above
    assert math.log(upper / 1000) == pytest.approx(0.5, rel=0.02)
    assert drawn.min() == 500
    assert np.mean(drawn == 500) == pytest.approx(0.0828, abs=0.005)  # the normal distribution below -ln 2 / 0.5
    capped = Lengths(10, 1.0, 1, 20).draw(np.random.default_rng(0), 10_000)
    assert max(capped) == 20
    assert np.mean(np.array(capped) == 20) == pytest.approx(0.255, abs=0.02)  # above ln 1.95, where rounding begins


def test_without_sigma_all_lengths_are_the_median() -> None:
    rng = np.random.default_rng(0)
    assert Lengths(7, 0.0, 1, 9).draw(rng, 5) == Lengths.constant(7).draw(rng, 5) == [7] * 5


def test_a_huge_sigma_stays_in_bounds() -> None:
    assert set(Lengths(5, 1e6, 2, 9).draw(np.random.default_rng(0), 50)) == {2, 9}


@pytest.mark.parametrize("values", [(5, 1, 6, 9), (5, 1, 1, 4), (0, 1, 0, 9), (math.nan, 1, 1, 9)])
def test_bounds_that_do_not_hold_the_median_are_refused(values: tuple) -> None:
    with pytest.raises(ValueError, match=r"Lengths\(median=.*expected 1 <= smallest <= median <= largest"):
        Lengths(*values)


@pytest.mark.parametrize("sigma", [-0.1, math.inf, math.nan])
def test_a_sigma_that_is_none_is_refused(sigma: float) -> None:
    with pytest.raises(ValueError, match="sigma must be a finite number of at least 0"):
        Lengths(5, sigma, 1, 9)


# Workloads of text


def test_a_workload_is_frozen() -> None:
    """Benchmarks of different days have to ask the same."""
    assert shape(workload(4)) == [("a", 12, 41), ("d", 3, 8), ("c", 2, 78), ("b", 13, 42)]


def test_a_request_is_the_beginning_of_its_prompt() -> None:
    for request in workload(30):
        assert bytes(request.prompt_ids).decode() == request.source * len(request.prompt_ids)


def test_a_seed_decides_all_and_another_decides_otherwise() -> None:
    assert workload(seed=3) == workload(seed=3)
    assert shape(workload(seed=3)) != shape(workload(seed=4))


def test_a_longer_workload_begins_with_the_shorter() -> None:
    assert workload(17)[:6] == workload(6)


def test_lengths_do_not_depend_on_each_other() -> None:
    usual, changed = shape(workload()), shape(workload(new_tokens=Lengths.constant(3)))
    assert [row[:2] for row in usual] == [row[:2] for row in changed]
    assert {row[2] for row in changed} == {3}


def test_each_prompt_is_used_before_any_is_used_again() -> None:
    sources = [request.source for request in workload(12)]
    assert sorted(sources[:5]) == sorted(sources[5:10]) == list("abcde")
    assert len(set(sources[10:])) == 2
    assert sources[:5] != sources[5:10]


def test_a_short_prompt_is_kept_whole() -> None:
    requests = workload(2, prompts=[Prompt("short", "abc")], prompt_tokens=Lengths.constant(5))
    assert [request.prompt_ids for request in requests] == [(97, 98, 99)] * 2


# Workloads of random token ids


def test_random_ids_are_those_of_one_draw() -> None:
    sizes = {"prompt_tokens": Lengths.constant(7), "new_tokens": Lengths.constant(9)}
    requests = random_workload(100, num_requests=6, seed=5, **sizes)
    expected = np.random.default_rng(5).integers(0, 100, (3, 2, 7)).reshape(6, 7)
    assert [list(request.prompt_ids) for request in requests] == expected.tolist()
    assert {(request.max_new_tokens, request.source) for request in requests} == {(9, "random")}


def test_random_requests_have_the_lengths_that_text_has() -> None:
    requests = random_workload(100, num_requests=12, seed=0, **SIZES)
    assert [row[1:] for row in shape(requests)] == [row[1:] for row in shape(workload(12))]
    assert random_workload(100, num_requests=4, seed=0, **SIZES) == requests[:4]


def test_workloads_of_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="no prompts to make requests of"):
        workload(prompts=[])
    with pytest.raises(ValueError, match="num_requests=0 must be at least 1"):
        workload(0)
    with pytest.raises(ValueError, match="vocab_size=0 must be at least 1"):
        random_workload(0, num_requests=1, seed=0, **SIZES)


# Files of prompts


def test_prompts_are_read_in_order(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    lines = [{"source": "one", "text": "a\u2028b\n"}, {"text": "ü", "source": "two", "more": 1}]
    file.write_text("\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n", encoding="utf-8")
    assert read_prompts(file) == [Prompt("one", "a\u2028b\n"), Prompt("two", "ü")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"source": "x", "text": ', "line 3: not valid JSON"),
        ('["x"]', "line 3: holds a list, expected an object with source and text"),
        ('{"source": "x"}', "line 3: no text; expected a text that is not empty"),
        ('{"text": "x"}', "line 3: no source; expected"),
        ('{"source": "x", "text": ""}', "line 3: text is ''; expected a text that is not empty"),
        ('{"source": 7, "text": "x"}', "line 3: source is 7; expected"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"source": "x", "text": "x"}\n\n' + line + "\n")
    with pytest.raises(ValueError, match=re.escape(f"{file}, {message}")):
        read_prompts(file)


def test_files_without_prompts_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    with pytest.raises(ValueError, match="no such file; expected JSON lines"):
        read_prompts(file)
    file.write_bytes(b"\n")
    with pytest.raises(ValueError, match="no prompts; expected JSON lines"):
        read_prompts(file)
    file.write_bytes(b'{"source": "x", "text": "\xff"}')
    with pytest.raises(ValueError, match="not UTF-8 text"):
        read_prompts(file)


# The file that benchmarks use


def test_heads_are_whole_lines_of_files_that_are_long_enough() -> None:
    files = {"test/a.py": "t" * 4000, "b.py": "x" * 3999, "z.py": "é" * 2999 + "\n" + "yy\n", "a.py": "é" * 4000}
    heads = make_prompts.heads(files)
    assert [head.source for head in heads] == ["a.py", "z.py", "test/a.py"]
    assert [head.text for head in heads] == ["é" * 3000, "é" * 2999 + "\n", "t" * 4000]


def test_the_prompts_of_benchmarks_are_held_out_text() -> None:
    prompts = read_prompts(WRITTEN)
    sources = [prompt.source for prompt in prompts]
    assert len(set(sources)) == len(prompts) == make_prompts.NUM_PROMPTS
    held_out = [line for line in HELD_OUT.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    directories = tuple(entry for entry in held_out if entry.endswith("/"))
    assert all(source in held_out or source.startswith(directories) for source in sources)
    assert sources == sorted(sources, key=lambda source: (source.startswith("test/"), source))
    assert all(4000 <= len(prompt.text.encode()) <= make_prompts.PROMPT_BYTES for prompt in prompts)
    assert all(prompt.text.endswith("\n") for prompt in prompts)
    assert WRITTEN.stat().st_size < 256_000


def test_the_tool_writes_what_can_be_read_twice_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [tmp_path / "one.jsonl", tmp_path / "two.jsonl"]
    assert [make_prompts.main([str(file)]) for file in files] == [0, 0]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert read_prompts(files[0]) == make_prompts.heads(read_files(stdlib_root(), held_out=True))
    assert make_prompts.main([str(tmp_path / "missing" / "x.jsonl")]) == 2
    assert "error: " in capsys.readouterr().err
