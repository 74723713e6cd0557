"""Pictures of profiler traces."""

import math

import pytest

from tools import plot_trace
from tools.plot_trace import COLOURS, between, draw, main
from tools.profile_decode import KERNEL_SCOPES, LANES, OTHER, SCOPES, Kernel

KERNELS = [
    Kernel("copy_plan", "fetch", 5e6, 2e6),
    Kernel("multiply_groups", "experts", 7e6, 1e6),
    Kernel("fusion_3", "other", 12e6, 1e6),
]


def test_a_stretch_of_a_trace_counts_from_its_beginning():
    assert [(k.name, k.start_ns) for k in between(KERNELS, 0, math.inf)] == [
        ("copy_plan", 0),
        ("multiply_groups", 2e6),
        ("fusion_3", 7e6),
    ]
    assert [(k.name, k.start_ns, k.duration_ns) for k in between(KERNELS, 1, 1.5)] == [
        ("copy_plan", 0, 1e6),
        ("multiply_groups", 1e6, 0.5e6),
    ]


@pytest.mark.parametrize("found", [KERNELS, []])
def test_a_stretch_without_kernels_is_refused(found):
    with pytest.raises(ValueError, match="no kernel from 50 ms for 2 ms; the trace has"):
        between(found, 50, 2)


def test_whatever_a_kernel_is_of_has_a_lane_and_a_colour():
    assert {*SCOPES, *KERNEL_SCOPES.values(), OTHER} == set(LANES) == set(COLOURS)


def test_it_draws_a_lane_for_each_kind_of_kernel(tmp_path):
    pytest.importorskip("matplotlib")
    draw(between(KERNELS, 0, math.inf), tmp_path / "trace.svg", "One step")
    text = (tmp_path / "trace.svg").read_text()
    assert all(f"<!-- {word} -->" in text for word in ("fetch", "experts", "other", "One step"))
    assert "<!-- attention -->" not in text


def test_it_lists_what_it_draws(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(plot_trace, "kernels", lambda directory, scope_by_name: iter(KERNELS[::-1]))
    arguments = [str(tmp_path), str(tmp_path / "trace.png"), "--from-ms", "1", "--ms", "1.5"]
    assert main([*arguments, "--list"]) == 0
    copied, multiplied, last = capsys.readouterr().out.splitlines()
    assert copied.split() == ["0.0000", "ms", "1000.0", "us", "fetch", "copy_plan"]
    assert multiplied.split() == ["1.0000", "ms", "500.0", "us", "experts", "multiply_groups"]
    assert last.startswith("2 kernels drawn")
    assert main(arguments) == 0
    assert capsys.readouterr().out.splitlines() == [last]


def test_a_directory_without_a_trace_is_an_error_line(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert main([str(tmp_path), str(tmp_path / "trace.png")]) == 2
    assert "the profiler left no trace there" in capsys.readouterr().err
