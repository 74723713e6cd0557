"""Converted checkpoints against Hugging Face's own logits and greedy tokens (tests/golden, tools/make_golden.py)."""

import tomllib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

import jmoe
from jmoe.convert import convert_hf
from jmoe.engine import Engine

GOLDEN = Path(__file__).parent / "golden"
CASES = sorted(file.parent.name for file in GOLDEN.glob("*/golden.npz"))
TOLERANCE = 1e-3  # of logits up to about 20; PyTorch's own float32 is 5e-5 away from its float64


def read_golden(case: str) -> Mapping[str, np.ndarray]:
    with np.load(GOLDEN / case / "golden.npz") as file:
        return dict(file)


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def golden(case: str) -> Mapping[str, np.ndarray]:
    return read_golden(case)


@pytest.fixture(scope="module")
def engine(case: str, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    checkpoint = tmp_path_factory.mktemp("golden") / case
    convert_hf(GOLDEN / case, checkpoint)
    return jmoe.load(checkpoint, jmoe.RuntimeConfig(batch_size=2, max_seq_len=128, measure_link=False))


def test_every_case_is_there() -> None:
    listed = set(tomllib.loads((GOLDEN / "cases.toml").read_text(encoding="utf-8"))) - {"small"}
    assert set(CASES) == listed, "run tools/make_golden.py"


@pytest.mark.parametrize("name", CASES)
def test_greedy_tokens_do_not_hang_on_rounding(name: str) -> None:
    assert read_golden(name)["margins"].min() > 2 * TOLERANCE


def test_logits_are_those_of_hugging_face(engine: Engine, golden: Mapping[str, np.ndarray]) -> None:
    logits = np.asarray(engine.logits(golden["token_ids"]))
    assert logits.shape == golden["logits"].shape
    assert logits.dtype == np.float32
    assert np.abs(logits - golden["logits"]).max() <= TOLERANCE


def test_greedy_tokens_are_those_of_hugging_face(engine: Engine, golden: Mapping[str, np.ndarray]) -> None:
    prompts = [row.tolist() for row in golden["token_ids"]]
    sampling = jmoe.SamplingParams(max_new_tokens=golden["generated"].shape[1], temperature=0.0, ignore_eos=True)
    results = engine.generate(prompts, sampling).results()
    assert [list(result.token_ids) for result in results] == golden["generated"].tolist()
