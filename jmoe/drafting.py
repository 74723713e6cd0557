"""Speculative decoding in the engine: what it drafts with, and how many tokens at a time."""

import jax

from jmoe.config import RuntimeConfig
from jmoe.decoding.contest import Choice
from jmoe.decoding.draft_choice import draft_chooser
from jmoe.decoding.speculative import SpeculativeSteps
from jmoe.decoding.step import Steps
from jmoe.experts.draft import DraftConfig
from jmoe.experts.slots import SlotLayout
from jmoe.stats import DecodeCalls


class Drafting:
    """The jitted cycles, and what was learned about them; an engine keeps it from generation to generation.

    `distances` of the experts are there if the choice of experts that do not draft is substituted.
    """

    def __init__(self, steps: SpeculativeSteps, draft: str | int, distances: jax.Array | None = None):
        self.steps, self.distances = steps, distances
        self._fixed = Choice(draft) if isinstance(draft, int) else None
        self._chooser = draft_chooser(steps.max_draft_tokens)

    @property
    def has_plain_steps(self) -> bool:
        """Whether some calls may be plain steps."""
        return self._fixed is None

    def choose(self, num_sequences: int) -> Choice:
        """For the next call, of so many sequences."""
        return self._fixed or self._chooser.choose(num_sequences)

    def record(self, num_sequences: int, call: DecodeCalls) -> None:
        """Learns from a call that began with so many sequences, if there is anything to choose."""
        if self._fixed is None:
            self._chooser.record(num_sequences, call.num_draft_tokens, call)

    def num_cycles(self, decode_chunk: int, number: int) -> int:
        """The most cycles of a call that drafts so many: as may produce `decode_chunk` tokens, and one at least."""
        return max(1, decode_chunk // (number + 1))

    def most_cycles(self, decode_chunk: int) -> int:
        """Of any call: the fewer tokens are drafted at a time, the more cycles."""
        return self.num_cycles(decode_chunk, self._fixed.number if self._fixed else 1)


def speculative_steps(steps: Steps, runtime: RuntimeConfig) -> SpeculativeSteps | None:
    """The cycles that `runtime` asks for; None without drafts, or where "auto" could only find them slower.

    All experts that have a slot draft unless it says how many: acceptance grows with their number, and what they cost
    is device memory's bandwidth alone (docs/speculative.md). Raises ValueError for more than there are slots, and for a
    model whose rotary embedding does not go with drafts.
    """
    if runtime.draft == "off":
        return None
    slots, wanted = steps.layout.slots_per_layer, runtime.draft_experts
    if wanted is not None and wanted > slots:
        raise ValueError(
            f"draft_experts={wanted} are more than the {slots} slots of a layer, and only what has a slot can draft; "
            "ask for fewer, or give more --expert-slots"
        )
    if runtime.draft == "auto" and (wanted or slots) == steps.layout.num_experts:
        return None  # what drafts a token is the whole model: it takes a plain step for each token, then verifies
    config = DraftConfig(wanted or slots, runtime.draft_policy, runtime.draft_missing)
    return SpeculativeSteps(steps, config, runtime.most_draft_tokens)


def drafting_line(steps: SpeculativeSteps | None, runtime: RuntimeConfig, layout: SlotLayout) -> str:
    """What drafts, or why nothing does, for people."""
    if steps is None:
        return (
            "no drafts, chosen automatically: every expert is resident and would draft, so that to draft a token takes "
            "as long as to decode it; fewer --draft-experts may be faster for many sequences"
        )
    number = f"{runtime.draft}" if isinstance(runtime.draft, int) else f"up to {runtime.draft_tokens}"
    how = "" if isinstance(runtime.draft, int) else ", as many as are fastest"
    config, chosen = steps.draft, "" if runtime.draft_experts else ", all that have a slot, chosen automatically"
    return (
        f"drafts of {number} tokens{how}, with {config.num_experts} of {layout.num_experts} experts a layer{chosen} "
        f"({config.policy}, {config.missing})"
    )
