"""Where the tests run: on the CPU, unless `-m gpu` asks for the ones that need a GPU."""

import os
import re
from collections.abc import Iterator

import jax
import pytest

from jmoe.decoding.contest import Choice
from jmoe.decoding.prefetch_budget import Budget

# XLA has two ways to make CPU code of a fusion. The older one compiles in half the time; what it makes is slower, which
# shows with the demo model only.
FAST_TO_COMPILE = "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"


def pytest_configure(config: pytest.Config) -> None:
    if not asks_for_gpu(config):
        jax.config.update("jax_platforms", "cpu")  # the same results on every machine, and no GPU memory taken
        jax.config.update("jax_disable_most_optimizations", True)  # tests compile much and compute little
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FAST_TO_COMPILE}"  # read when JAX first compiles
    jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def brings_all_guesses(monkeypatch: pytest.MonkeyPatch) -> None:
    """An amount is prefetched whole, from the first step, however good the guesses are: random models guess badly."""
    monkeypatch.setattr(Budget, "choose", lambda budget: Choice(budget.most_rows))


def asks_for_gpu(config: pytest.Config) -> bool:
    return re.search(r"(?<!not )\bgpu\b", config.option.markexpr) is not None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    reason = why_no_gpu(config) if marked else None
    for item in marked:
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))


def why_no_gpu(config: pytest.Config) -> str | None:
    """The reason to skip tests marked gpu, or None where they can run."""
    if not asks_for_gpu(config):
        return "needs a GPU, and this run is on the CPU; where there is a GPU: uv run pytest -m gpu"
    backend = jax.default_backend()
    return None if backend == "gpu" else f"needs a GPU, and JAX finds {backend} only"


@pytest.fixture(scope="module", autouse=True)
def no_more_programs_than_a_modules() -> Iterator[None]:
    """Forgets compiled programs: each maps memory, and a process may have so many mappings (65530) and no more."""
    yield
    jax.clear_caches()
