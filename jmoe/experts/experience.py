"""What residency policies have learned of a model, in files, so that the next run begins with it.

An npz without pickles: `header`, a string of JSON (format, version, policy, fingerprint of the checkpoint), and beside
it the fields that the policy names as `learned`.
"""

import dataclasses
import json
import zipfile
from collections.abc import Callable, Iterable, Mapping
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
    """What policies have learned of one checkpoint, each kept in a file of its own in `directory`.

    None keeps it nowhere: every run starts afresh.
    """

    def __init__(
        self, directory: Path | None, policies: Iterable[str], fingerprint: str, announce: Callable[[str], None]
    ):
        self.policies, self.fingerprint, self.announce = tuple(sorted(policies)), fingerprint, announce
        kept = [name for name in self.policies if POLICIES[name].learned]
        self.files = {name: directory / f"{fingerprint[:16]}-{name}.npz" for name in kept} if directory else {}
        self._kept_at = 0  # the residency's clock when the files were last written

    def restore(self, slots: ExpertSlots) -> ExpertSlots:
        """New slots, with what the files have learned. Raises RuntimeError for a file that cannot be used."""
        self._kept_at, tracked = 0, dict(slots.residency.tracked)
        for name, file in self.files.items():
            if file.is_file():
                self.announce(f"policy {name}: with what it learned before ({file})")
                tracked[name] = load(file, name, self.fingerprint, tracked[name])
        return with_tracked(slots, tracked)

    def finish(self, slots: ExpertSlots) -> ExpertSlots:
        """The slots after a batch of requests: policies are told, and what they learned is written if it is more."""
        tracked, clock = dict(slots.residency.tracked), int(slots.residency.clock)
        for name in self.policies:
            if (finish := POLICIES[name].finish) is not None:
                tracked[name] = jax.jit(finish, donate_argnums=0)(tracked[name])
        if clock != self._kept_at:
            self._keep(tracked)
            self._kept_at = clock
        return with_tracked(slots, tracked)

    def _keep(self, tracked: Mapping[str, Any]) -> None:
        for name, file in self.files.items():
            try:
                save(file, name, self.fingerprint, tracked[name])
            except OSError as error:
                self.announce(f"what the policy {name} learned is not kept: {error}")


def with_tracked(slots: ExpertSlots, tracked: dict[str, Any]) -> ExpertSlots:
    """The same slots, where policies remember this."""
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
