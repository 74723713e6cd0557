"""Prefetching in the engine: how many rows decode steps bring early, and who guesses of which experts."""

from collections.abc import Mapping

from jaxtyping import Array

from jmoe import memory
from jmoe.config import ModelConfig, RuntimeConfig
from jmoe.decoding.contest import Choice, Contest
from jmoe.decoding.prefetch_budget import Budget
from jmoe.decoding.prefetch_choice import AMOUNTS, prefetch_chooser
from jmoe.experts import look_ahead
from jmoe.experts.execute_guess import ExecutedGuess
from jmoe.experts.look_ahead import Foresight
from jmoe.experts.prefetch import PastRequests, make_predictor
from jmoe.experts.prefetch_file import Calibration
from jmoe.memory_plan import MemoryPlan
from jmoe.prefetch_stats import PrefetchStats
from jmoe.stats import DecodeCalls

_GUESSES = {
    "lookahead": "",
    "auto": "",
    "activation": ", guessed from past requests",
    "both": ", guessed in the layer before and, for the first, from past requests",
}


class Prefetching:
    """How many rows come early in each layer, at most `num_experts` experts; kept from generation to generation.

    The number of a choice is that of rows of D values, 0 in a plain step. Of "auto" it is what is fastest, else as much
    of what was asked for as pays (`Budget`).
    """

    def __init__(self, config: ModelConfig, runtime: RuntimeConfig):
        self.num_experts = runtime.most_prefetched
        self.rows_of_expert = 3 * config.moe_intermediate_size
        self._chooser = prefetch_chooser(self.rows_of_expert) if runtime.prefetch == "auto" else None
        rows = max(1, round(runtime.prefetch_experts * self.rows_of_expert))
        num_guesses = len(config.moe_layers) - (not runtime.recalls_requests)
        self._budget = Budget(rows, self.rows_of_expert, config.expert_bytes // self.rows_of_expert, num_guesses)

    @property
    def learns(self) -> bool:
        """Whether the amount is chosen by how fast steps are."""
        return self._chooser is not None

    @property
    def programs(self) -> list[Choice]:
        """A choice for each jitted step that may run."""
        return [Choice(0), Choice(self.most_rows)]

    @property
    def most_rows(self) -> int:
        return self._chooser.numbers[-1] if self._chooser else self._budget.most_rows

    def contest(self, num_sequences: int) -> Contest | None:
        """What is known about how fast amounts are for so many sequences together, if it is learned."""
        return self._chooser.contest(num_sequences) if self._chooser else None

    def choose(self, num_sequences: int) -> Choice:
        """For the next call, of so many sequences."""
        return self._chooser.choose(num_sequences) if self._chooser else self._budget.choose()

    def learn(self, num_sequences: int, num_rows: int, call: DecodeCalls, came: PrefetchStats) -> None:
        """From a call that began with so many sequences, and what it brought early."""
        if self._chooser:
            self._chooser.record(num_sequences, num_rows, call)
        else:
            self._budget.see(came, call.num_steps, num_rows)


def prefetching(config: ModelConfig, runtime: RuntimeConfig, plan: MemoryPlan) -> Prefetching | None:
    """What `runtime` asks for; None where no step prefetches."""
    needless = plan.layout.all_resident or plan.layout.num_layers < 2
    return None if runtime.prefetch == "off" or needless else Prefetching(config, runtime)


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
    """What is prefetched, or why nothing is, for people."""
    layout, made = plan.layout, prefetching(config, runtime, plan)
    if made is None:
        return "prefetch: none is needed, every expert is resident, or there is one layer of them"
    num_layers = layout.num_layers - (not runtime.recalls_requests)
    size = memory.format_bytes(num_layers * made.most_rows * config.expert_bytes // made.rows_of_expert)
    tried, most = ", ".join(f"{amount:g}" for amount in AMOUNTS), f"{runtime.prefetch_experts:g}"
    amounts = f"0, {tried} experts a layer, whichever is fastest" if made.learns else f"up to {most} experts a layer"
    guesses = _GUESSES[runtime.prefetch]
    line = f"prefetch of {amounts}{guesses}, at most {size} a step, while attention runs"
    if pays(config, plan, plan.batch_size):
        return line
    most = min(plan.batch_size * config.num_experts_per_tok, layout.num_experts)
    return (
        f"{line}; not for {plan.batch_size} sequences together, which may ask for {most} experts of a layer of "
        f"{layout.slots_per_layer} slots"
    )
