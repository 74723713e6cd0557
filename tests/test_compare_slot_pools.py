"""The tool that compares one pool of slots with a share for each layer, and the random weights it runs on."""

import json

import numpy as np
import pytest

from jmoe.config import ModelConfig
from tools import compare_slot_pools
from tools.compare_slot_pools import LRU, hit_rates
from tools.random_weights import random_weights

TINY = "configs/models/tiny.toml"


def test_lru_keeps_the_most_recent() -> None:
    lru = LRU([0, 1, 2])
    assert lru.step([0, 5]) == 1
    assert list(lru.experts) == [2, 0, 5]
    assert lru.step([1, 2]) == 1
    assert list(lru.experts) == [5, 1, 2]


def test_one_pool_loses_everything_to_layers_in_turn() -> None:
    """Six layers ask for 3 of their experts again and again, with room for 2 each: a cycle of 18 through 12 slots."""
    step = np.array([[[0, 1, 2]]] * 6)  # [L, B, A]
    pool, per_layer = hit_rates(np.stack([step] * 10), 2)
    only_first_step, _ = hit_rates(step[None], 2)
    assert pool == pytest.approx(only_first_step / 10)  # what it began with, and nothing after
    assert per_layer == pytest.approx(2 / 3)


def test_main_prints_a_row_a_share_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    args = ["--config", TINY, "--layers", "2", "--tokens", "6", "--batch-sizes", "1", "--shares", "0.25", "0.5"]
    assert compare_slot_pools.main(args) == 0
    *rows, last = capsys.readouterr().out.splitlines()
    report = json.loads(last)
    assert len(rows) == len(report["rows"]) == 2
    for row in report["rows"]:
        assert 0 < row["hit_rate_per_layer"] < 1
        assert row["admit_us_per_layer"] > 0


@pytest.mark.parametrize("regime", ["sticky", "flat"])
def test_random_weights_have_the_scales_of_their_regime(regime: str) -> None:
    config = ModelConfig.from_toml(TINY)
    weights = random_weights(config, regime, seed=3)
    expected = {
        "sticky": (0.02, 0.02, 0.02),
        "flat": (1.0, config.hidden_size**-0.5, config.moe_intermediate_size**-0.5),
    }
    embedding, gate, down = expected[regime]
    assert np.std(weights.params["embed/embedding"]) == pytest.approx(embedding, rel=0.05)
    experts = np.asarray(weights.store.layers[1])
    assert np.std(experts[:, 0]) == pytest.approx(gate, rel=0.05)
    assert np.std(experts[:, 2]) == pytest.approx(down, rel=0.05)
    assert (np.asarray(weights.params["norm/scale"]) == 1).all()
    assert not np.array_equal(experts, np.asarray(weights.store.layers[0]))
