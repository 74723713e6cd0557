"""Prefetching in the engine: how many rows decode steps bring early, and who guesses of which experts."""

from collections.abc import Mapping

from jaxtyping import Array

from jmoe import memory
from jmoe.config import ModelConfig, RuntimeConfig
from jmoe.decoding.contest import Choice, Contest
from jmoe.decoding.prefetch_choice import AMOUNTS, prefetch_chooser
from jmoe.experts import look_ahead
from jmoe.experts.execute_guess import ExecutedGuess
from jmoe.experts.look_ahead import Foresight
from jmoe.experts.prefetch import PastRequests, make_predictor
from jmoe.experts.prefetch_file import Calibration
from jmoe.memory_plan import MemoryPlan
from jmoe.prefetch_stats import PrefetchStats
from jmoe.stats import DecodeCalls

WORTH = 0.5  # of what comes early, that has to be of use: a wasted copy costs about 0.6 of what a useful one saves
LOOK = 8  # steps that look how good the guesses are, before anything else comes early
HALF_LIFE = 32  # steps, after which what was seen weighs half as much
LOOK_AGAIN = 4096  # plain steps; a look, with the changes to it and back, costs about as much as 20 steps

_GUESSES = {
    "lookahead": "",
    "auto": "",
    "activation": ", guessed from past requests",
    "both": ", guessed in the layer before and, for the first, from past requests",
}


class Prefetching:
    """How many rows come early in each layer, at most `num_experts` experts; kept from generation to generation.

    The number of a choice is that of rows of D values, 0 in a plain step. A fixed amount comes only while guesses are
    right. The first `LOOK` steps bring one row of each, by which it is seen whether they are; if less than `WORTH` of
    what comes is of use, steps are plain ones, and after `LOOK_AGAIN` of these there is another look.
    """

    def __init__(self, config: ModelConfig, runtime: RuntimeConfig):
        self.num_experts = runtime.most_prefetched
        self.rows_of_expert = 3 * config.moe_intermediate_size
        rows = max(1, round(runtime.prefetch_experts * self.rows_of_expert))
        self._fixed = Choice(rows) if runtime.prefetch != "auto" else None
        self._chooser = prefetch_chooser(self.rows_of_expert)
        self._num_looks, self._num_plain = 0, 0  # steps
        self._useful_share: float | None = None  # of what the last ones brought, once they brought anything

    @property
    def learns(self) -> bool:
        """Whether the amount is chosen by how fast steps are."""
        return self._fixed is None

    @property
    def programs(self) -> list[Choice]:
        """A choice for each jitted step that may run."""
        return [Choice(0), Choice(self.most_rows)]

    @property
    def most_rows(self) -> int:
        return self._fixed.number if self._fixed else self._chooser.numbers[-1]

    def contest(self, num_sequences: int) -> Contest:
        """What is known about the amounts for so many sequences together."""
        return self._chooser.contest(num_sequences)

    def choose(self, num_sequences: int) -> Choice:
        """For the next call, of so many sequences."""
        if self._fixed is None:
            return self._chooser.choose(num_sequences)
        if self._num_looks < LOOK:
            return Choice(1, LOOK - self._num_looks)
        return self._fixed if (self._useful_share or 0.0) >= WORTH else Choice(0)

    def see(self, came: PrefetchStats, num_steps: int, num_rows: int) -> None:
        """What a call brought early, of so many steps; it tells nothing if all that was guessed had slots."""
        if not num_rows:
            self._num_plain += num_steps
            if self._num_plain >= LOOK_AGAIN:
                self._num_looks, self._num_plain, self._useful_share = 0, 0, None
            return
        self._num_looks += num_steps
        if came.prefetched_bytes:
            known = came.useful_share if self._useful_share is None else self._useful_share
            kept = 0.5 ** (num_steps / HALF_LIFE)
            self._useful_share = kept * known + (1 - kept) * came.useful_share

    def record(self, num_sequences: int, num_rows: int, call: DecodeCalls) -> None:
        """Learns from a call that began with so many sequences, if there is anything to choose."""
        if self.learns:
            self._chooser.record(num_sequences, num_rows, call)


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
    amounts = f"0, {', '.join(f'{amount:g}' for amount in AMOUNTS)}" if made.learns else f"{runtime.prefetch_experts:g}"
    how = ", whichever is fastest" if made.learns else ""
    guesses = _GUESSES[runtime.prefetch]
    line = f"prefetch of {amounts} experts a layer{how}{guesses}, at most {size} a step, while attention runs"
    if pays(config, plan, plan.batch_size):
        return line
    most = min(plan.batch_size * config.num_experts_per_tok, layout.num_experts)
    return (
        f"{line}; not for {plan.batch_size} sequences together, which may ask for {most} experts of a layer of "
        f"{layout.slots_per_layer} slots"
    )
