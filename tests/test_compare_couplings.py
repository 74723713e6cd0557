"""The two couplings in closed form, against their definitions, and the tool on a tiny model."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from jmoe.synthetic import write_synthetic
from tests.models import SMALL
from tools import compare_couplings
from tools.compare_couplings import rejection_acceptance, shared_noise_acceptance


def drawn(seed: int, shape: tuple[int, ...], sharpness: float = 1.0) -> np.ndarray:
    logits = sharpness * np.random.default_rng(seed).standard_normal(shape)
    return np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)


def test_by_hand() -> None:
    p, q = np.array([0.5, 0.5, 0.0]), np.array([0.25, 0.25, 0.5])
    assert rejection_acceptance(p, q) == 0.5
    assert shared_noise_acceptance(p, q) == pytest.approx(2 / (1 + 1 + 2))


@pytest.mark.parametrize("sharpness", [0.1, 1.0, 4.0])
def test_the_ordered_sums_are_all_the_maxima(sharpness: float) -> None:
    p, q = drawn(0, (20, 9), sharpness), drawn(1, (20, 9), sharpness)
    p[3, 2:5] = q[4, 2:5] = 0  # as truncation leaves them
    p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
    q[5] = p[5]
    for a, b, got in zip(p, q, shared_noise_acceptance(p, q), strict=True):
        both = [i for i in range(9) if a[i] > 0 and b[i] > 0]
        wanted = sum(1 / sum(max(a[j] / a[i], b[j] / b[i]) for j in range(9)) for i in both)
        assert got == pytest.approx(wanted)
    assert shared_noise_acceptance(p, q)[5] == pytest.approx(1)
    assert (shared_noise_acceptance(p, q) <= rejection_acceptance(p, q) + 1e-12).all()


def test_it_is_what_shared_noise_does() -> None:
    p, q = drawn(2, (6,)), drawn(3, (6,))
    noise = np.random.default_rng(4).gumbel(size=(200_000, 6))
    agree = ((np.log(p) + noise).argmax(1) == (np.log(q) + noise).argmax(1)).mean()
    assert agree == pytest.approx(shared_noise_acceptance(p, q), abs=0.005)
    assert agree < rejection_acceptance(p, q) - 0.01


def test_the_tool_prints_a_row_for_each_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("JMOE_CACHE", str(tmp_path / "cache"))
    write_synthetic(dataclasses.replace(SMALL, vocab_size=260), tmp_path / "hf", regime="flat", seed=2)
    sizes = "--num-prompts 3 --prompt-tokens 8 --new-tokens 9 --draft-tokens 2 --draft-experts 3 8 --dtype float32"
    assert compare_couplings.main(["--model", str(tmp_path / "hf"), *sizes.split()]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = json.loads(lines[-1])["rows"]
    assert [(row["experts"], row["place"], row["positions"]) for row in rows] == [
        (3, 1, 6),
        (3, 2, 6),
        (3, "all", 12),
        (8, 1, 6),
        (8, 2, 6),
        (8, "all", 12),
    ]
    assert len(lines) == 1 + len(rows) + 1
    assert all(0 < row["shared"] <= row["rejection"] < 1 for row in rows[:3])
    assert all(row["shared"] == pytest.approx(1, abs=1e-3) for row in rows[3:]), "the draft is the model"


def test_a_bad_setting_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert compare_couplings.main(["--model", "/no/such/model"]) == 2
    assert "/no/such/model" in capsys.readouterr().err
