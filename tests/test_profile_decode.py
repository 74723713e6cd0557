"""tools/profile_decode.py: how kernels are added up. The trace itself needs a GPU, and says so without one."""

import json
from pathlib import Path

import pytest

from tools import profile_decode
from tools.profile_decode import Kernel, busy_ns, report, scope_of, scopes, totals

TINY = str(Path(__file__).parent.parent / "configs" / "models" / "tiny.toml")


@pytest.mark.parametrize(
    ("path", "scope"),
    [
        ("jit(decode)/while/body/attention/dot_general", "attention"),
        ("jit(decode)/while/body/experts/jit(expert_mlp)/pallas_call custom-call.3", "experts"),
        ("jit(decode)/while/body/attention/router/mul", "router"),
        ("jit(decode)/while/body/attention_like/mul", "other"),
        ("", "other"),
    ],
)
def test_the_scope_is_the_last_that_is_known(path: str, scope: str) -> None:
    assert scope_of(path) == scope


def test_kernels_have_the_scopes_of_their_instructions() -> None:
    text = """
  %input_reduce_fusion.18 = f32[8]{0} fusion(%a), kind=kInput, metadata={op_name="jit(decode)/while/body/head/dot"}
  ROOT %loop_add_fusion = s32[] fusion(%b), metadata={op_name="jit(decode)/while/body/add"}
  %no_metadata.1 = s32[] add(%b, %b)
"""
    assert scopes(text) == {"input_reduce_fusion_18": "head", "loop_add_fusion": "other"}


def test_times_and_counts_are_of_a_step(capsys: pytest.CaptureFixture[str]) -> None:
    made = [Kernel("a", "admit", 0, 3000), Kernel("b", "fetch", 4000, 5000), Kernel("a", "admit", 9000, 1000)]
    rows = totals(((kernel.scope, kernel) for kernel in made), steps=2)
    assert rows == [{"name": "fetch", "us": 2.5, "count": 0.5}, {"name": "admit", "us": 2.0, "count": 1.0}]
    report(made, 2, longest=1)
    out = capsys.readouterr().out
    assert "2 steps, 5.0 us each, a kernel running in 4.5 us of them" in out
    assert json.loads(out.splitlines()[-1])["scopes"] == [{**row, "alone_us": row["us"]} for row in rows]


def test_what_runs_beside_others_is_not_alone(capsys: pytest.CaptureFixture[str]) -> None:
    made = [
        Kernel("a", "prefetch", 0, 5000),  # beside b for 3 µs, and once more alone
        Kernel("b", "attention", 1000, 1000),
        Kernel("b", "attention", 2500, 2000),
        Kernel("a", "prefetch", 7000, 500),
    ]
    report(made, 1, longest=1)
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["scopes"]
    assert {row["name"]: row["alone_us"] for row in rows} == {"prefetch": 2.5, "attention": 0.0}


def test_kernels_beside_each_other_are_busy_once() -> None:
    made = [
        Kernel("a", "prefetch", 1000, 5000),
        Kernel("b", "attention", 2000, 1000),
        Kernel("c", "router", 5500, 1500),
    ]
    assert busy_ns([*made, Kernel("d", "admit", 9000, 10)]) == 6010


@pytest.mark.parametrize("what", [[], ["--prefill"]])
def test_without_a_gpu_it_says_so(what: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert profile_decode.main(["--config", TINY, "--layers", "1", "--steps", "2", "--prompt-tokens", "8", *what]) == 2
    assert "is there a GPU?" in capsys.readouterr().err
