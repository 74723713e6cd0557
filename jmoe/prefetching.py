"""Prefetching in the engine: how many rows decode steps bring early, and who guesses of which experts."""

import dataclasses
from collections.abc import Mapping

from jaxtyping import Array

from jmoe import memory
from jmoe.config import ModelConfig, RuntimeConfig
from jmoe.decoding.contest import Choice
from jmoe.decoding.prefetch_budget import GUESS_BYTES, Budget
from jmoe.experts import look_ahead
from jmoe.experts.execute_guess import ExecutedGuess
from jmoe.experts.look_ahead import Foresight
from jmoe.experts.prefetch import PastRequests, make_predictor
from jmoe.experts.prefetch_file import Calibration
from jmoe.memory_plan import MemoryPlan
from jmoe.prefetch_stats import PrefetchStats
from kernels_pallas.prefetch import api as prefetch_api

_GUESSES = {
    "lookahead": "",
    "activation": ", guessed from past requests",
    "both": ", guessed in the layer before and, for the first, from past requests",
}


class Prefetching:
    """How many rows of D values come early in each layer, and never of more than `num_experts`: as many as pay.

    What is known of that (`Budget`) is kept from generation to generation, by how many sequences are decoded together,
    in powers of two. The number of a choice is that of rows, 0 in a plain step.
    """

    def __init__(self, config: ModelConfig, runtime: RuntimeConfig):
        self.num_experts = runtime.most_prefetched
        self.rows_of_expert = 3 * config.moe_intermediate_size
        self.most_rows = max(1, round(runtime.prefetch_experts * self.rows_of_expert))
        self._row_bytes = config.expert_bytes // self.rows_of_expert
        self._num_guesses = len(config.moe_layers) - (not runtime.recalls_requests)
        self._budgets: dict[int, Budget] = {}

    @property
    def programs(self) -> list[Choice]:
        """A choice for each jitted step that may run."""
        return [Choice(0), Choice(self.most_rows)]

    def choose(self, num_sequences: int) -> Choice:
        """For the next call, of so many sequences."""
        return self._budget(num_sequences).choose()

    def learn(self, num_sequences: int, num_rows: int, num_steps: int, came: PrefetchStats) -> None:
        """From what the steps of a call, that began with so many sequences, brought early."""
        self._budget(num_sequences).see(came, num_steps, num_rows)

    def _budget(self, num_sequences: int) -> Budget:
        made = Budget(self.most_rows, self.rows_of_expert, self._row_bytes, self._num_guesses)
        return self._budgets.setdefault((num_sequences - 1).bit_length(), made)


def settled(config: ModelConfig, runtime: RuntimeConfig) -> RuntimeConfig:
    """With what prefetch="auto" stands for here: "off" where something speaks against "lookahead"."""
    if runtime.prefetch != "auto":
        return runtime
    return dataclasses.replace(runtime, prefetch="off" if _against(config, runtime) else "lookahead")


def _against(config: ModelConfig, runtime: RuntimeConfig) -> str:
    """Why nothing is prefetched unless it is asked for, for people; empty where something is."""
    if runtime.draft != "off":
        return "tokens are drafted"
    if prefetch_api.resolve(runtime.implementation) != "mosaic_gpu":
        return "without kernels nothing comes beside other work"
    most_bytes = round(runtime.prefetch_experts * config.expert_bytes)
    if most_bytes < GUESS_BYTES:
        return f"{memory.format_bytes(most_bytes)}, the most for a layer, come in less time than a guess takes"
    return ""


def prefetching(config: ModelConfig, runtime: RuntimeConfig, plan: MemoryPlan) -> Prefetching | None:
    """What `runtime` asks for; None where no step prefetches."""
    needless = plan.layout.all_resident or plan.layout.num_layers < 2
    return Prefetching(config, runtime) if runtime.most_prefetched and not needless else None


def predictor_of(
    config: ModelConfig,
    runtime: RuntimeConfig,
    params: Mapping[str, Array],
    calibration: Calibration | None,
    executed: ExecutedGuess | None = None,
) -> Foresight:
    """Whose guesses `runtime` prefetches by.

    What looks ahead is what is executed, if anything is, else it guesses as calibrated, else by the next router.
    """
    if not runtime.looks_ahead:
        return PastRequests()
    predictor = calibration.predictor if calibration else make_predictor
    ahead = executed or predictor(config, params, implementation=runtime.implementation)
    return PastRequests(ahead) if runtime.recalls_requests else ahead


def pays(config: ModelConfig, plan: MemoryPlan, num_sequences: int) -> bool:
    """Whether decode steps of so many sequences have anything to prefetch for."""
    return look_ahead.pays(plan.layout, num_sequences * config.num_experts_per_tok)


def prefetching_line(config: ModelConfig, runtime: RuntimeConfig, plan: MemoryPlan) -> str:
    """What is prefetched, or why nothing is, for people. Of a runtime that is settled, and did not ask for none."""
    layout, made = plan.layout, prefetching(config, runtime, plan)
    if runtime.prefetch == "off":
        return f"prefetch: none, chosen automatically: {_against(config, runtime)}"
    if made is None:
        return "prefetch: none is needed, every expert is resident, or there is one layer of them"
    num_layers = layout.num_layers - (not runtime.recalls_requests)
    size = memory.format_bytes(num_layers * made.most_rows * config.expert_bytes // made.rows_of_expert)
    amount, guesses = f"up to {runtime.prefetch_experts:g} experts a layer", _GUESSES[runtime.prefetch]
    line = f"prefetch of {amount}{guesses}, at most {size} a step, while attention runs"
    if pays(config, plan, plan.batch_size):
        return line
    most = min(plan.batch_size * config.num_experts_per_tok, layout.num_experts)
    return (
        f"{line}; not for {plan.batch_size} sequences together, which may ask for {most} experts of a layer of "
        f"{layout.slots_per_layer} slots"
    )
