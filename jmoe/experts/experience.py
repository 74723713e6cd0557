"""What a residency policy has learned of a model, in a file, so that the next run begins with it.

An npz without pickles: `header`, a string of JSON (format, version, policy, fingerprint of the checkpoint), and beside
it the fields that the policy names as `learned`.
"""

import dataclasses
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jmoe.experts.policies import POLICIES
from jmoe.experts.slots import ExpertSlots
from jmoe.whole_files import new_file

FORMAT, VERSION = "jmoe residency experience", 1


class Experience:
    """What a policy has learned of one checkpoint, kept in `file` (None: kept nowhere, and every run starts afresh)."""

    def __init__(self, file: Path | None, policy: str, fingerprint: str, announce: Callable[[str], None]):
        self.file = file if POLICIES[policy].learned else None
        self.policy, self.fingerprint, self.announce = policy, fingerprint, announce
        self._kept_at = 0  # the residency's clock when the file was last written

    def restore(self, slots: ExpertSlots) -> ExpertSlots:
        """New slots, with what the file has learned. Raises RuntimeError for a file that cannot be used."""
        self._kept_at = 0
        if self.file is None or not self.file.is_file():
            return slots
        self.announce(f"residency policy {self.policy}: with what it learned before ({self.file})")
        return with_tracked(slots, load(self.file, self.policy, self.fingerprint, slots.residency.tracked))

    def finish(self, slots: ExpertSlots) -> ExpertSlots:
        """The slots after a batch of requests: the policy is told, and what it learned is written if it is more now."""
        finish, clock = POLICIES[self.policy].finish, int(slots.residency.clock)
        if finish is not None:
            slots = with_tracked(slots, jax.jit(finish, donate_argnums=0)(slots.residency.tracked))
        if self.file is not None and clock != self._kept_at:
            try:
                save(self.file, self.policy, self.fingerprint, slots.residency.tracked)
            except OSError as error:
                self.announce(f"what the residency policy learned is not kept: {error}")
            self._kept_at = clock
        return slots


def with_tracked(slots: ExpertSlots, tracked: Any) -> ExpertSlots:
    """The same slots, where the policy remembers this."""
    return dataclasses.replace(slots, residency=dataclasses.replace(slots.residency, tracked=tracked))


def save(path: Path, policy: str, fingerprint: str, tracked: Any) -> None:
    """Writes what the policy's state `tracked` has learned; whole or not at all. A file that is there is replaced."""
    arrays = {name: np.asarray(getattr(tracked, name)) for name in POLICIES[policy].learned}
    header = json.dumps(_header(policy, fingerprint))
    path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path) as scratch, scratch.open("wb") as file:
        np.savez(file, allow_pickle=False, header=header, **arrays)


def load(path: Path, policy: str, fingerprint: str, tracked: Any) -> Any:
    """`tracked` with what the file has learned. Raises RuntimeError for one that is damaged or of something else."""
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            header, arrays = json.loads(str(file["header"])), {name: file[name] for name in POLICIES[policy].learned}
    except (zipfile.BadZipFile, ValueError, TypeError, KeyError, EOFError, OSError) as error:
        raise RuntimeError(
            f"{path}: damaged, it cannot be read ({type(error).__name__}: {error}). Delete it; jmoe learns it again."
        ) from error
    if header != (expected := _header(policy, fingerprint)):
        raise RuntimeError(f"{path}: it says {header}, but expected is {expected}. Delete it; jmoe learns it again.")
    shapes = {name: getattr(tracked, name).shape for name in arrays}
    if wrong := [name for name in arrays if arrays[name].shape != shapes[name]]:
        found = ", ".join(f"{name} {list(arrays[name].shape)}, expected {list(shapes[name])}" for name in wrong)
        raise RuntimeError(f"{path}: not what the model needs: {found}. Delete it; jmoe learns it again.")
    return dataclasses.replace(tracked, **{name: jnp.asarray(array) for name, array in arrays.items()})


def carry_over(policy: str, learned: Any, fresh: Any) -> Any:
    """A fresh state that has learned what another has: what `save` and `load` do, without the file."""
    return dataclasses.replace(fresh, **{name: getattr(learned, name) for name in POLICIES[policy].learned})


def num_bytes(policy: str, num_layers: int, num_experts: int) -> int:
    """Device memory of what the policy remembers of such a model."""
    state = jax.eval_shape(lambda: POLICIES[policy].start(num_layers, num_experts))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def _header(policy: str, fingerprint: str) -> dict[str, Any]:
    return {"format": FORMAT, "version": VERSION, "policy": policy, "fingerprint": fingerprint}
