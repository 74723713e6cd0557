"""The kernels are tuned by times that are measured elsewhere: what is tried, what wins, and what the table has then."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import pytest

from kernels_pallas import tuning
from kernels_pallas.expert_mlp import reference
from kernels_pallas.multiprocessors import COPYING
from kernels_pallas.tile_ring import Config
from tools import bench_expert_mlp, bench_kernels, tunable_kernels, tune_kernels
from tools.tunable_kernels import Timed, Tunable

KEY = tuning.key("fetch", jnp.dtype("bfloat16"), num_hidden=768, width=2048)
OWN, FEW, MANY = (Config(num_blocks=number) for number in (8, 2, 32))
GPU = "NVIDIA H200"
SAME = "qwen3_30b_decode", "one_group"  # specs of one key


def kernel(*candidates: Config, **changes) -> Tunable:
    """Of which a function is its configuration, and what has more than a MiB a tile does not fit."""
    made = Tunable(
        key=KEY,
        heuristic=OWN,
        candidates=list(candidates),
        max_error=0.1,
        problem=lambda config: "too large" if config.tile_bytes > 2**20 else None,
        program=lambda config: config,
        function=lambda config: config,
        case=lambda seconds: timed({}),
    )
    return dataclasses.replace(made, **changes)


def timed(times: dict[Config, list[float]], errors: dict[Config, float] | None = None) -> Timed:
    """A configuration's times are taken in turn; one that has none fails."""
    turns = {config: iter(those) for config, those in times.items()}

    def timer(config: Config) -> Callable[[], float]:
        if config not in turns:
            raise ValueError("does not compile\nand this is why")
        return lambda: next(turns[config])

    return Timed(lambda config: (errors or {}).get(config, 0.0), timer, lambda gbps: 1.0)


def test_the_fastest_wins_if_it_is_so_twice() -> None:
    result = tune_kernels.tune(kernel(FEW, MANY), timed({OWN: [10, 10], FEW: [11], MANY: [9, 9.5]}), 1)
    assert [trial.config for trial in result.trials] == [MANY, OWN, FEW]
    assert result.winner is result.trials[0]
    assert result.own.us == 10


@pytest.mark.parametrize("times", [[9.9], [9.0, 9.9]], ids=str)
def test_what_is_not_two_percent_faster_does_not_win(times: list[float]) -> None:
    assert tune_kernels.tune(kernel(FEW), timed({OWN: [10, 10], FEW: times}), 1).winner is None
    assert tune_kernels.tune(kernel(FEW), timed({OWN: [10, 9.1], FEW: [9, 9]}), 1).winner is None


def test_what_is_left_out_is_said_and_the_others_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    large, wrong, broken = Config(tile_bytes=2**21), Config(num_stages=2), Config(num_stages=3)
    case = timed({OWN: [10, 10], MANY: [9, 9], wrong: [1], large: [1]}, {wrong: float("nan")})
    result = tune_kernels.tune(kernel(large, wrong, broken, OWN, MANY, MANY), case, 1)
    assert result.winner
    assert [trial.config for trial in result.trials] == [MANY, OWN]
    lines = capsys.readouterr().out.splitlines()
    said = [line.split(": ", 2)[1:] for line in lines if line.startswith("  left out")]
    assert [words for words, _ in said] == [tune_kernels._words(config) for config in (large, wrong, broken)]
    assert [why.partition(" of the")[0] for _, why in said] == [
        "too large",
        "RuntimeError: its error of nan",
        "ValueError: does not compile",
    ]


def test_after_its_time_one_candidate_has_been_tried(capsys: pytest.CaptureFixture[str]) -> None:
    """The first one: it may be the one that the table has."""
    clock = iter(range(0, 100, 10)).__next__
    result = tune_kernels.tune(kernel(FEW, MANY), timed({OWN: [10, 10], FEW: [9, 9], MANY: [1, 1]}), 5, clock)
    assert [trial.config for trial in result.trials] == [FEW, OWN]
    assert "num_blocks=32 num_stages=6 tile_bytes=32768: the 5 s are over" in capsys.readouterr().out


def test_a_kernel_whose_own_choice_is_wrong_is_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"its error of 5.0e-01 of the largest value is more than 1e-01"):
        tune_kernels.tune(kernel(FEW), timed({OWN: [10], FEW: [9]}, {OWN: 0.5}), 1)


def result_of(us: float | None) -> tune_kernels.Result:
    own = tune_kernels.Trial(OWN, 10.0, lambda: 10.0)
    winner = None if us is None else tune_kernels.Trial(FEW, us, lambda: us)
    return tune_kernels.Result([own], own, winner)


def test_the_table_keeps_what_is_of_others(tmp_path: Path) -> None:
    path, other = tmp_path / "table.toml", dataclasses.replace(KEY, dtype="float32")
    tune_kernels.write(path, other, GPU, result_of(8.0))
    tune_kernels.write(path, KEY, "another", result_of(8.0))
    tune_kernels.write(path, KEY, GPU, result_of(9.0))
    tune_kernels.write(path, KEY, GPU, result_of(7.0))
    entries = {(entry.gpu, entry.key): entry for entry in tuning.read(path)}
    assert entries.keys() >= {(GPU, other), ("another", KEY), (GPU, KEY)}
    assert entries[GPU, KEY] == tuning.Entry(KEY, GPU, dataclasses.asdict(FEW), 7.0, 10.0)
    tune_kernels.write(path, KEY, GPU, result_of(None))
    assert {(entry.gpu, entry.key) for entry in tuning.read(path)} == entries.keys() - {(GPU, KEY)}
    assert {entry.gpu for entry in tuning.read(tuning.TABLE)} <= {entry.gpu for entry in tuning.read(path)}
    assert list(tmp_path.iterdir()) == [path]


def test_every_spec_of_a_kernel_has_candidates_that_fit() -> None:
    """And its own choice fits; specs that no kernel can do are told apart."""
    kernels, cannot = set(), []
    for op in tune_kernels.DEFAULTS:
        for spec in bench_kernels.SPECS[op].values():
            try:
                made = tunable_kernels.tunable(spec)
            except NotImplementedError:
                cannot.append(spec)
                continue
            kernels.add(made.key.kernel)
            assert made.problem(made.heuristic) is None, spec.name
            fitting = [config for config in tune_kernels._distinct(made) if made.problem(config) is None]
            assert fitting or made.key.kernel == "decode_attention" or spec.name == "one_item", spec.name
            assert {type(config) for config in fitting} <= {type(made.heuristic)}
    forms = {f"expert_mlp.{form}" for form in ("fma", "wgmma", "prefill")}
    assert kernels == {"fetch", "decode_attention", "norm_linear", *forms}
    assert all(spec.dtype == "float32" or spec.width == 2880 for spec in cannot if hasattr(spec, "width"))


def test_candidates_that_do_not_fit_say_why() -> None:
    made = tunable_kernels.tunable(bench_kernels.SPECS["expert_mlp"]["batch_of_32"])
    assert [made.problem(config) for config in made.candidates if config.max_warpgroups == 3] == [
        "307200 bytes of shared memory are more than 229376"
    ] * 2


@pytest.mark.parametrize(
    ("op", "spec"), [("expert_mlp", "batch_of_8"), ("decode_attention", "qwen3_30b"), ("norm_linear", "qwen3_30b_qkv")]
)
def test_what_may_run_beside_a_prefetch_leaves_it_its_multiprocessors(op: str, spec: str) -> None:
    """Timed alone, more blocks may be faster."""
    made = tunable_kernels.tunable(bench_kernels.SPECS[op][spec])
    left = tunable_kernels.multiprocessors() - COPYING
    numbers = {config.num_blocks for config in (made.heuristic, *made.candidates)}
    assert {number % left and left % number for number in numbers} == {0}


def test_the_defaults_have_places_of_their_own() -> None:
    chosen = bench_kernels.chosen_specs(list(tune_kernels.DEFAULTS), None, tune_kernels.DEFAULTS)
    tune_kernels._require_distinct([spec for specs in chosen.values() for spec in specs])
    with pytest.raises(ValueError, match="specs qwen3_30b_decode and one_group have one place in the table, Key"):
        tune_kernels._require_distinct([bench_kernels.SPECS["expert_mlp"][name] for name in SAME])


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert tune_kernels.main(["--ops", "fetch"]) == 2
    assert capsys.readouterr().err.startswith(
        "error: tuning times kernels on a GPU, and here the default device is a cpu"
    )


@pytest.fixture
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference in the place of every kernel with any configuration, at a 64th of its size; a bound of 2 µs."""

    def tunable(spec) -> Tunable:
        real = tunable_kernels.tunable(spec)

        def case(seconds: Callable) -> Timed:
            if spec.dtype == "float32":
                raise RuntimeError("out of memory\nand so on")
            here = bench_expert_mlp.Case(spec.scaled(64), 2, 1, seconds)
            return Timed(here.error, lambda function: here.timer(function, 1), lambda gbps: gbps)

        candidates = real.candidates[2:3]
        return dataclasses.replace(real, candidates=candidates, case=case, function=lambda _: reference.expert_mlp)

    monkeypatch.setattr(tune_kernels, "tunable", tunable)
    monkeypatch.setattr(tune_kernels.backends, "mosaic_gpu_problem", lambda: None)
    monkeypatch.setattr(tune_kernels, "memory_gbps", lambda: 2.0)


@pytest.mark.usefixtures("_as_on_a_gpu")
def test_the_tool_prints_a_table_and_goes_on_after_a_failure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "table.toml"
    arguments = ["--ops", "expert_mlp", "--repeats", "1", "--write", str(path), "--specs", "float32", "two_rows"]
    assert tune_kernels.main(arguments) == 2
    printed = capsys.readouterr()
    assert "error: 1 specs could not be tuned: expert_mlp float32" in printed.err
    *lines, last = printed.out.splitlines()
    assert "expert_mlp float32: failed: RuntimeError: out of memory" in lines
    (said,) = json.loads(last)["specs"]
    assert (said["kernel"], said["spec"], said["bound_us"]) == ("expert_mlp.fma", "two_rows", 2.0)
    at = lines.index(f"{'us':>12}{'% of bound':>12}  configuration")
    assert len(lines) == at + 3, "its own choice and a candidate"
    assert any("the kernel's own choice" in line for line in lines[at + 1 :])
    known = tuning.read(tuning.TABLE)
    assert [entry for entry in tuning.read(path) if entry.gpu != tuning.device_kind()] == known
