"""Compiled steps that are kept: the same tokens without compiling, and nothing lost where a file cannot be used.

XLA cannot always run on a CPU what it loads there, so executables stay in memory here and only their numbers go to the
files; tests/gpu/test_programs.py has the real ones.
"""

import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jmoe import programs
from jmoe.config import RuntimeConfig
from jmoe.decoding.compiled import Call
from jmoe.decoding.sampling import SamplingParams
from jmoe.engine import Engine
from jmoe.experts.execute_guess import ExecutedGuess
from jmoe.experts.prefetch import make_predictor
from jmoe.programs import Programs
from tests import models
from tests.models import SMALL

pytestmark = pytest.mark.usefixtures("brings_all_guesses")

PROMPT = models.prompts(7)[0]
GREEDY = SamplingParams(max_new_tokens=9)
PLAIN = {"prefill_chunk": 16, "decode_chunk": 4}
PARTS = ["decode", "prefill_begin", "prefill_end", "prefill_layers", "prefill_layers"]  # a layer of each kind


def engine(directory: Path | None, say: Callable[[str], None] = lambda line: None, **runtime) -> Engine:
    options = RuntimeConfig(**{"expert_slots": 4, "max_seq_len": 64, "measure_link": False, **PLAIN, **runtime})
    return Engine.start(SMALL, options, lambda: models.weights(SMALL), programs=Programs(directory, say))


def tokens(engine: Engine) -> tuple[int, ...]:
    return engine.generate([PROMPT], GREEDY).results()[0].token_ids


def steps_in(directory: Path) -> list[str]:
    return sorted(file.name.split("-")[0] for file in directory.iterdir())


class InMemory:
    """In place of jax.experimental.serialize_executable."""

    def __init__(self):
        self.programs = []

    def serialize(self, program) -> tuple[int, str, str]:
        self.programs.append(program)
        return len(self.programs) - 1, "inputs", "outputs"

    def deserialize_and_load(self, number: int, inputs: str, outputs: str):
        assert (inputs, outputs) == ("inputs", "outputs")
        return self.programs[number]


@pytest.fixture(scope="module", autouse=True)
def executables() -> Iterator[InMemory]:
    with pytest.MonkeyPatch.context() as patch:
        here = InMemory()
        patch.setattr(programs, "serialize_executable", here)
        yield here


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory, executables: InMemory) -> tuple[Path, tuple[int, ...]]:
    """A directory with the plain steps, and what they said."""
    directory = tmp_path_factory.mktemp("programs")
    return directory, tokens(engine(directory))


def test_kept_steps_say_the_same_as_those_of_no_directory(kept: tuple[Path, tuple[int, ...]]) -> None:
    directory, said = kept
    assert tokens(engine(None)) == said
    assert steps_in(directory) == PARTS


def test_another_start_compiles_no_step(
    kept: tuple[Path, tuple[int, ...]], executables: InMemory, tmp_path: Path
) -> None:
    directory, said = shutil.copytree(kept[0], tmp_path / "copy"), kept[1]
    number = len(executables.programs)
    assert tokens(engine(directory)) == said
    assert len(executables.programs) == number
    assert tokens(engine(directory, expert_slots=5)) == said
    assert len(executables.programs) == number + len(PARTS)


def test_decode_is_compiled_while_the_parts_of_prefill_are(
    kept: tuple[Path, tuple[int, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its compilation, which takes longest, waits here until that of a layer has begun, and began before."""
    both, compile_one, lower, order = threading.Barrier(2, timeout=60), Programs._compiled, Call.lower, []

    def compile_together(self, lowered, file: Path) -> Callable:
        if file.name.split("-")[0] in ("decode", "prefill_begin"):
            both.wait()
        return compile_one(self, lowered, file)

    def lower_in_order(call: Call):
        order.append((call.name, threading.current_thread() is threading.main_thread()))
        return lower(call)

    monkeypatch.setattr(Programs, "_compiled", compile_together)
    monkeypatch.setattr(Call, "lower", lower_in_order)
    assert tokens(engine(tmp_path)) == kept[1]
    assert order == [(name, True) for name in ("decode", "prefill_begin", *["prefill_layers"] * 2, "prefill_end")]
    assert steps_in(tmp_path) == PARTS


@pytest.mark.parametrize(
    ("runtime", "names"),
    [
        ({}, ["decode"]),
        ({"prefetch": "lookahead"}, ["decode", "decode_prefetching"]),
        ({"draft": 2}, ["start", "decode"]),
    ],
    ids=str,
)
def test_each_program_runs_twice_before_the_prompt_is_taken_in(
    runtime: dict, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a step: so XLA has recorded its CUDA graph when the first token is awaited. `start` repeats nothing."""
    call, ran = Programs.__call__, []

    def run(self, call_: Call):
        ran.append(call_.name)
        return call(self, call_)

    monkeypatch.setattr(Programs, "__call__", run)
    generation = engine(None, **runtime).generate([PROMPT], SamplingParams(max_new_tokens=1))
    next(iter(generation))
    decoding = [name for name in ran if not name.startswith("prefill")]
    assert decoding == names + [name for name in names if name != "start"]


def test_guesses_of_other_layers_are_another_program(tmp_path: Path) -> None:
    kept, direct = engine(tmp_path), engine(None)
    predictor = make_predictor(SMALL, kept.weights.params)
    scores = []
    for layers in ((1,), ()):
        executed = ExecutedGuess(predictor, layers, SMALL.norm_topk_prob)
        scores += [kept.score([PROMPT], executed)[0]]
        np.testing.assert_array_equal(scores[-1], direct.score([PROMPT], executed)[0])
    np.testing.assert_allclose(scores[1], direct.score([PROMPT])[0], atol=1e-5)
    assert np.abs(scores[0] - scores[1]).max() > 1e-3


def test_what_fails_to_compile_beside_something_else_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self, lowered, file: Path) -> Callable:
        raise RuntimeError(f"no room to compile {file.name.split('-')[0]}")

    monkeypatch.setattr(Programs, "_compiled", fail)
    start = engine(None)
    call = Call(start.steps, "unembed", (), (start.weights.params, jnp.zeros((1, 1, SMALL.hidden_size))), {})
    made = Programs(tmp_path)
    with pytest.raises(RuntimeError, match="no room to compile unembed"), made.making([call]):
        assert not made._made


@pytest.mark.parametrize("runtime", [{"draft": 2}, {"prefetch": "lookahead", "prefetch_experts": 1.0}], ids=str)
def test_drafts_and_prefetches_are_kept_too(kept: tuple[Path, tuple[int, ...]], runtime: dict, tmp_path: Path) -> None:
    first = tokens(engine(tmp_path, **runtime))
    files = {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    said: list[str] = []
    assert tokens(engine(tmp_path, said.append, **runtime)) == first == kept[1]
    assert set(tmp_path.iterdir()) == set(files)
    assert not [line for line in said if "cannot be used" in line]


def test_a_damaged_file_is_said_and_replaced(kept: tuple[Path, tuple[int, ...]]) -> None:
    directory, expected = kept
    [file] = directory.glob("decode-*")
    size, said = file.stat().st_size, []
    os.truncate(file, size // 2)
    assert tokens(engine(directory, said.append)) == expected
    assert any(str(file) in line and "cannot be used, compiling again" in line for line in said)
    assert file.stat().st_size == size


def test_what_cannot_be_written_is_said(tmp_path: Path, kept: tuple[Path, tuple[int, ...]]) -> None:
    (tmp_path / "file").write_text("no directory")
    said: list[str] = []
    assert tokens(engine(tmp_path / "file", said.append)) == kept[1]
    assert sum("is not kept in" in line for line in said) == len(PARTS)


def digest(start: Engine, name: str = "decode", args: tuple = (1.0,), mode: str = "greedy") -> str:
    return programs._digest(Call(start.steps, name, (), args, {"mode": mode}))


def test_a_file_goes_by_all_that_may_change_it(monkeypatch: pytest.MonkeyPatch) -> None:
    start = engine(None)
    digests = [digest(start), digest(engine(None, expert_slots=5)), digest(start, "unembed")]
    digests += [digest(start, args=(1,)), digest(start, args=((1.0,),)), digest(start, mode="full")]
    with monkeypatch.context() as patch:
        patch.setenv("XLA_FLAGS", f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_hlo_as_text")
        digests.append(digest(start))
    with monkeypatch.context() as patch:
        patch.setattr(programs, "_sources", lambda: "other code")
        digests.append(digest(start))
    assert len(set(digests)) == len(digests)
    assert digest(start) == digests[0]


def test_the_newest_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "MOST_FILES", 2)
    for age in range(4):
        file = tmp_path / f"decode-{age}"
        file.touch()
        os.utime(file, (1000 - age, 1000 - age))
    programs._keep_newest(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["decode-0", "decode-1"]
