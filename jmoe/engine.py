"""The engine: owns what lies in memory between steps. It has no maths; `jmoe.decoding.step` has."""

import dataclasses
import math
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jmoe import memory
from jmoe.announcement import device_line, policy_line
from jmoe.batch import prompt_chunks
from jmoe.config import DTYPE_BYTES, ModelConfig, RuntimeConfig
from jmoe.decoding.prefill import Prefill
from jmoe.decoding.sampling import SamplingParams
from jmoe.decoding.speculative import SpeculativeSteps
from jmoe.decoding.step import DecodeState, Steps, init_state
from jmoe.drafting import Drafting, drafting_line, speculative_steps
from jmoe.executing import executed_guess, executing_line
from jmoe.experts.affinity import load_or_measure
from jmoe.experts.execute_guess import ExecutedGuess
from jmoe.experts.experience import Experience
from jmoe.experts.look_ahead import Foresight
from jmoe.experts.policies import DEFAULT_POLICY
from jmoe.experts.prefetch_file import Calibration
from jmoe.experts.slots import ExpertSlots, init_slots
from jmoe.experts.store import ExpertStore
from jmoe.generation import Generation
from jmoe.memory_plan import MemoryPlan, plan_memory
from jmoe.model.families import trunk_shapes
from jmoe.model.kv_cache import KVCache, emptied
from jmoe.prefetching import predictor_of, prefetching, prefetching_line, settled
from jmoe.programs import Programs
from jmoe.tokenizer import Tokenizer

Announce = Callable[[str], None]
Progress = Callable[[str, int, int], None]
LOGITS_POSITIONS = 32


@dataclasses.dataclass(frozen=True)
class Weights:
    """What never changes: the trunk on the device, the experts in host memory."""

    params: dict[str, jax.Array]  # by flat path, see `jmoe.model.families.trunk_shapes`
    store: ExpertStore


class Engine:
    """A model in memory. Make it with `jmoe.load` or, for weights that are already there, `Engine.start`.

    One generation runs at a time. `config` is the model, `plan` says where bytes went, `link_ceiling_gbps` is the
    measured speed of plain copies to the device (None if not measured), `fingerprint` is the checkpoint's ("" if
    unknown), `experience_dir` has a file of what each policy learns (None: nothing keeps it), the first of
    `affinity_files` that can be how alike the experts are. `drafting` is None unless `runtime` asks for drafts that may
    gain something, and `prefetching` unless it asks for a prefetch and some expert is not resident. `prefill` takes in
    prompts, `steps` decode, and `programs` runs both.
    `calibration` is what `predictor` guesses with, unless another is given; without one it is the next layer's router
    alone. `executed` is None unless `runtime` asks to execute guesses, and some layer passes its gate: then it is the
    `predictor` as well, and decoding says other things.
    """

    def __init__(
        self,
        config: ModelConfig,
        runtime: RuntimeConfig,
        plan: MemoryPlan,
        steps: Steps,
        weights: Weights,
        *,
        tokenizer: Tokenizer | None = None,
        generation_defaults: dict[str, Any] | None = None,
        link_ceiling_gbps: float | None = None,
        fingerprint: str = "",
        experience_dir: Path | None = None,
        affinity_files: Sequence[Path] = (),
        calibration: Calibration | None = None,
        predictor: Foresight | None = None,
        programs: Programs | None = None,
        speculative: SpeculativeSteps | None = None,
        announce: Announce | None = None,
    ):
        self.config, self.runtime, self.plan, self.steps, self.weights = config, runtime, plan, steps, weights
        self.prefill, self.tokenizer = Prefill(steps), tokenizer
        self.generation_defaults = generation_defaults or {}
        self.link_ceiling_gbps = link_ceiling_gbps
        self.fingerprint = fingerprint
        self.announce = announce or (lambda line: None)
        self.programs = programs or Programs()
        self.compiled: set[Hashable] = set()  # the shapes of generation that were compiled
        self.drafting = self._drafting(speculative, affinity_files)
        self.calibration, self.executed = calibration, self._executed(calibration)
        self.prefetching = prefetching(config, runtime, plan)
        self.predictor = self._predictor(predictor) if self.prefetching else None
        self._watched = {"activation"} if self.prefetching and runtime.recalls_requests else set()
        kept_in = None if plan.layout.all_resident else experience_dir
        self._experience = Experience(kept_in, {steps.policy, *self._watched}, fingerprint, self.announce)
        self._slots: ExpertSlots | None = self._fill_slots()
        self._cache: KVCache | None = None  # of the last generation, for the next one of as many sequences

    def _drafting(self, speculative: SpeculativeSteps | None, affinity_files: Sequence[Path]) -> Drafting | None:
        if speculative is None:
            return None
        substitutes = speculative.draft.missing == "substitute"
        distances = (
            load_or_measure(self.weights.store, affinity_files, self.fingerprint, self.announce)
            if substitutes
            else None
        )
        return Drafting(speculative, self.runtime.draft, distances)

    def _executed(self, calibration: Calibration | None) -> ExecutedGuess | None:
        gate, implementation = self.runtime.execute_guess, self.steps.implementation
        if gate is None:
            return None
        return executed_guess(self.config, self.weights.params, gate, calibration, implementation=implementation)

    def _predictor(self, given: Foresight | None) -> Foresight:
        if given and not self.executed:
            return given
        return predictor_of(self.config, self.runtime, self.weights.params, self.calibration, self.executed)

    @classmethod
    def start(
        cls,
        config: ModelConfig,
        runtime: RuntimeConfig,
        make_weights: Callable[[], Weights],
        *,
        announce: Announce | None = None,
        **details: Any,
    ) -> "Engine":
        """Settles what is automatic, plans memory, announces the plan, and only then makes the weights.

        Raises ValueError if it cannot fit, or to execute guesses without a calibration, or with one MoE layer.
        """
        asked, runtime, say = runtime, settled(config, runtime), announce or (lambda line: None)
        trunk_bytes = sum(math.prod(shape) for shape in trunk_shapes(config).values()) * DTYPE_BYTES[config.dtype]
        calibration: Calibration | None = details.get("calibration")
        calibration_bytes = calibration.device_bytes(config) if calibration else 0
        plan = plan_for(config, runtime, trunk_bytes=trunk_bytes, calibration_bytes=calibration_bytes)
        for line in ["memory plan:", *plan.lines(), device_line(config, runtime, plan)]:
            say(line)
        ceiling = memory.measure_link_gbps() if runtime.measure_link else None
        if ceiling:
            say(f"link ceiling {ceiling:.1f} GB/s (plain copies, pinned host to device)")
        policy = runtime.residency_policy or DEFAULT_POLICY
        say(policy_line(policy, runtime, plan))
        how = {"record": runtime.record_routing, "policy": policy, "profiled": runtime.profiled}
        steps = Steps(config, plan.layout, runtime.implementation, **how)
        speculative = speculative_steps(steps, runtime)
        if runtime.draft != "off":
            say(drafting_line(speculative, runtime, plan.layout))
        if asked.prefetch != "off":
            say(prefetching_line(config, runtime, plan))
        if runtime.execute_guess is not None:
            say(executing_line(config, runtime.execute_guess, calibration))
        weights, details = make_weights(), {"speculative": speculative, "announce": announce, **details}
        return cls(config, runtime, plan, steps, weights, link_ceiling_gbps=ceiling, **details)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Token ids that end a sequence, from generation_config.json, else from the tokenizer."""
        listed = self.generation_defaults.get("eos_token_id")
        if listed is None:
            return tuple(self.tokenizer.eos_ids) if self.tokenizer else ()
        return tuple(listed) if isinstance(listed, list | tuple) else (listed,)

    def generate(
        self,
        prompts: str | Sequence[str] | Sequence[Sequence[int]],
        sampling: SamplingParams | Sequence[SamplingParams] = SamplingParams(),
    ) -> Generation:
        """Continues the prompts (text or token ids): iterate for text as it comes, or ask for `.results()`.

        More prompts than the plan's batch size are taken in turn. Raises ValueError for an empty prompt, one that does
        not fit in max_seq_len, or token ids outside the vocabulary.
        """
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        encoded = [self._encode(number, prompt) for number, prompt in enumerate(texts)]
        requests = [sampling] * len(encoded) if isinstance(sampling, SamplingParams) else list(sampling)
        if len(requests) != len(encoded):
            raise ValueError(
                f"{len(requests)} sampling parameters for {len(encoded)} prompts; give one, or one a prompt"
            )
        if not encoded:
            raise ValueError("no prompt: give at least one")
        return Generation(self, encoded, requests)

    def logits(self, token_ids: Sequence[Sequence[int]] | np.ndarray) -> np.ndarray:
        """Logits [B, T, V], float32, of whole sequences of equal length, with the experts streaming through."""
        ids = np.asarray(token_ids, np.int32)
        if ids.ndim != 2:
            raise ValueError(f"token_ids of shape {ids.shape} must be [B, T]: sequences of equal length")
        for number, row in enumerate(ids):
            self._encode(number, row.tolist())
        return self._by_position(ids.tolist(), lambda _, hidden: self.steps.unembed(self.weights.params, hidden))

    def score(self, token_ids: Sequence[Sequence[int]], executed: ExecutedGuess | None = None) -> list[np.ndarray]:
        """Natural log-probabilities, float32, of each sequence's tokens but the first, given those before.

        With `executed` they are those of decoding with these guesses (`jmoe.executing`); else they are the model's.

        Sequences may differ in length, up to max_seq_len; at most the plan's batch size of them. Raises ValueError for
        none, more, an empty or too long one, or token ids outside the vocabulary.
        """
        sequences = [self._checked(f"sequence {number}", row) for number, row in enumerate(token_ids)]
        longest, limit = max(map(len, sequences), default=0), self.plan.max_seq_len
        if not 1 <= longest <= limit:
            raise ValueError(
                f"{len(sequences)} sequences, the longest of {longest} tokens; expected at least one, and at most "
                f"max_seq_len={limit} tokens; cut them, or raise the runtime configuration's max_seq_len"
            )
        targets = np.zeros((len(sequences), longest + LOGITS_POSITIONS), np.int32)  # so that each part is whole
        for row, ids in zip(targets, sequences, strict=True):
            row[: len(ids) - 1] = ids[1:]

        def head(start: int, hidden: jax.Array) -> jax.Array:
            part = targets[:, start : start + hidden.shape[1]]
            return self.steps.token_logprobs(self.weights.params, hidden, part)

        prompts = [ids[:-1] or ids for ids in sequences]  # an empty prompt cannot run
        logprobs = self._by_position(prompts, head, executed)
        return [row[: len(ids) - 1] for row, ids in zip(logprobs, sequences, strict=True)]

    def _by_position(
        self,
        token_ids: Sequence[Sequence[int]],
        head: Callable[[int, jax.Array], jax.Array],
        executed: ExecutedGuess | None = None,
    ) -> np.ndarray:
        """`head` of the first position and the hidden states [B, t, D] of a few at a time, joined: [B, T, …]."""
        params, store = self.weights.params, self.weights.store
        start, longest, parts = 0, max(map(len, token_ids)), []
        state = self.new_state(len(token_ids), [0] * len(token_ids))
        try:
            for chunk in prompt_chunks(token_ids, self.plan.prefill_chunk):
                hidden, state = self.prefill.hidden(params, store, state, chunk, executed, run=self.programs)
                for at in range(0, min(hidden.shape[1], longest - start), LOGITS_POSITIONS):
                    part = hidden[:, at : at + LOGITS_POSITIONS]  # the workspace holds no more at a time
                    parts.append(np.asarray(head(start + at, part)))
                start += hidden.shape[1]
            return np.concatenate(parts, axis=1)[:, :longest]
        finally:
            self.give_back(state)

    def _encode(self, number: int, prompt: str | Sequence[int]) -> list[int]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError("this engine has no tokenizer; give token ids instead of text")
            ids = self.tokenizer.encode(prompt)
        else:
            ids = list(prompt)
        limit = self.plan.max_seq_len
        if len(ids) >= limit:
            raise ValueError(
                f"prompt {number} has {len(ids)} tokens, but max_seq_len={limit} must hold it and at least one more; "
                "raise --max-seq-len or shorten it"
            )
        return self._checked(f"prompt {number}", ids)

    def _checked(self, name: str, token_ids: Sequence[int]) -> list[int]:
        ids, vocab = [int(token) for token in token_ids], self.config.vocab_size
        if not ids:
            raise ValueError(f"{name} is empty; give at least one token")
        outside = [token for token in ids if not 0 <= token < vocab]
        if outside:
            raise ValueError(f"{name} has token ids {outside[:5]} outside 0..{vocab - 1} (vocab_size={vocab})")
        return ids

    # What a generation needs: the state of its batch, and the slots back when it is done.

    def new_state(self, batch_size: int, budget: Sequence[int] | np.ndarray) -> DecodeState:
        """State of a batch that has seen nothing. It takes the slots, until `give_back`.

        Raises ValueError for a batch that is larger than planned, RuntimeError while another has the slots.
        """
        if batch_size > self.plan.batch_size:
            raise ValueError(
                f"{batch_size} sequences at a time, but memory is planned for {self.plan.batch_size}; "
                "raise the runtime configuration's batch_size, or give fewer"
            )
        if self._slots is None:
            raise RuntimeError("another generation of this engine is unfinished; finish or close it first")
        cache, self._cache = self._cache, None
        cache = emptied(cache) if cache and cache.batch_size == batch_size else None
        state = init_state(self.config, batch_size, self.plan.max_seq_len, budget, self._slots, cache)
        self._slots = None
        return state

    def give_back(self, state: DecodeState) -> None:
        """Takes the slots back, and the KV cache. A step that was interrupted has consumed them: then they are made
        anew, the slots filled.
        """
        deleted = state.experts.is_deleted()
        self._slots = self._fill_slots() if deleted else self._experience.finish(state.experts)
        self._cache = None if state.cache.is_deleted() else state.cache

    def _fill_slots(self) -> ExpertSlots:
        store, steps = self.weights.store, self.steps
        how = {"implementation": steps.implementation, "policy": steps.policy, "watched": self._watched}
        return self._experience.restore(init_slots(store, self.plan.layout, **how))


def plan_for(
    config: ModelConfig, runtime: RuntimeConfig, *, trunk_bytes: int, calibration_bytes: int = 0
) -> MemoryPlan:
    """The memory plan on this machine, as it is now."""
    host_limit, pinned_limit = memory.host_available_bytes(), memory.pinned_limit_bytes()
    if pinned_limit is not None:
        host_limit = min(host_limit, pinned_limit)
    limits = {"device_limit_bytes": memory.device_available_bytes(), "host_limit_bytes": host_limit}
    return plan_memory(config, runtime, trunk_bytes=trunk_bytes, calibration_bytes=calibration_bytes, **limits)
