"""On demand nothing is kept, and so nothing is hit; tokens are the same."""

import pytest

from jmoe.decoding.sampling import SamplingParams
from jmoe.generation import Generation
from tests import models
from tests.models import SMALL
from tools.on_demand import keep_nothing

SAMPLING = SamplingParams(max_new_tokens=12, temperature=1.0)


def ran(batch_size: int, *, keeps: bool) -> list[Generation]:
    engine = models.engine(batch_size=batch_size)
    if not keeps:
        keep_nothing(engine)
    made = []
    for seed in range(2):
        made.append(engine.generate(models.prompts(*range(9, 9 + batch_size), seed=seed), SAMPLING))
        made[-1].results()
    return made


@pytest.mark.parametrize("batch_size", [1, 5])
def test_nothing_is_hit_and_no_token_changes(batch_size: int) -> None:
    """The larger batch may ask for more experts of a layer than it has slots."""
    for kept, on_demand in zip(ran(batch_size, keeps=True), ran(batch_size, keeps=False), strict=True):
        assert [each.token_ids for each in on_demand.completions] == [each.token_ids for each in kept.completions]
        for before, after in (
            (kept.stats.decode, on_demand.stats.decode),
            (kept.stats.prefill, on_demand.stats.prefill),
        ):
            assert before.hits > 0 == after.hits
            assert after.misses == before.hits + before.misses


def test_slots_for_all_experts_are_refused() -> None:
    engine = models.engine(expert_slots=SMALL.num_experts)
    with pytest.raises(ValueError, match="8 slots a layer hold all 8 experts; on demand takes fewer"):
        keep_nothing(engine)
