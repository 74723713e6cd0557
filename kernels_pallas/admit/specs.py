"""Named shapes of admissions: real models, few slots and many, batches, slots that are empty."""

import dataclasses

import numpy as np

from kernels_pallas.admit.result import NONE


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdmitSpec:
    """T rows that choose A of E experts, S slots of which a share is taken; the last `num_masked` rows are no tokens.

    `admits` is False where all experts are resident and none changes its slot.
    """

    name: str
    num_experts: int
    num_slots: int
    num_chosen: int
    num_rows: int = 1
    num_masked: int = 0
    share_taken: float = 1.0
    admits: bool = True
    chosen_twice: bool = False  # each row's last choice is its first

    def make(self, seed: int = 0) -> tuple[np.ndarray | None, ...]:
        """The arguments of `admit`; values have many ties."""
        rng, experts = np.random.default_rng(seed), self.num_experts
        ids = np.stack([rng.permutation(experts)[: self.num_chosen] for _ in range(self.num_rows)]).astype(np.int32)
        ids[self.num_rows - self.num_masked :] = experts
        if self.chosen_twice:
            ids[:, -1] = ids[:, 0]
        weights = np.where(ids < experts, rng.random(ids.shape), 0).astype(np.float32)
        used = np.bincount(ids[ids < experts], minlength=experts).astype(np.int32)
        slot_of, owner = np.full(experts, NONE, np.int32), np.full(self.num_slots, NONE, np.int32)
        taken = rng.permutation(self.num_slots)[: round(self.share_taken * self.num_slots)]
        owner[taken] = rng.permutation(experts)[: taken.size]
        slot_of[owner[taken]] = taken
        value = rng.integers(-4, 5, experts).astype(np.int32)
        return ids, weights, used, value if self.admits else None, slot_of, owner


_QWEN3_30B = AdmitSpec(name="qwen3_30b", num_experts=128, num_slots=64, num_chosen=8)

SPECS: tuple[AdmitSpec, ...] = (
    _QWEN3_30B,
    dataclasses.replace(_QWEN3_30B, name="fewest_slots", num_slots=8),
    dataclasses.replace(_QWEN3_30B, name="empty_slots", share_taken=0.3),
    dataclasses.replace(_QWEN3_30B, name="no_slot_taken", share_taken=0.0),
    dataclasses.replace(_QWEN3_30B, name="no_token", num_masked=1),
    dataclasses.replace(_QWEN3_30B, name="all_resident", num_slots=128, admits=False),
    dataclasses.replace(_QWEN3_30B, name="b8", num_rows=8, num_masked=1),
    dataclasses.replace(_QWEN3_30B, name="b32_of_16_slots", num_rows=32, num_slots=16),
    dataclasses.replace(_QWEN3_30B, name="b32_all_resident", num_rows=32, num_slots=128, admits=False),
    dataclasses.replace(_QWEN3_30B, name="chosen_twice", num_rows=2, chosen_twice=True),
    AdmitSpec(name="mixtral", num_experts=8, num_slots=3, num_chosen=2, num_rows=2),
    AdmitSpec(name="gpt_oss_20b", num_experts=32, num_slots=12, num_chosen=4, num_rows=2),
    AdmitSpec(name="llama4_scout", num_experts=16, num_slots=5, num_chosen=1, num_rows=3),
    AdmitSpec(name="deepseek_v2_lite", num_experts=64, num_slots=27, num_chosen=6),
    AdmitSpec(name="experts_256", num_experts=256, num_slots=100, num_chosen=8, num_rows=4),
    AdmitSpec(name="odd", num_experts=7, num_slots=5, num_chosen=3, num_rows=3, share_taken=0.5),
)
