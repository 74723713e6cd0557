"""The loop around the step: held-out text watched, the minimum kept, checkpoints that outlive a kill."""

import dataclasses
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from jmoe.evaluation import cut_windows
from jmoe.training.batches import Batches
from jmoe.training.step import Losses, Params, Trainer, TrainState
from jmoe.whole_files import new_file

REPORT_EVERY = 10  # steps: reading a loss waits for the device
Report = Callable[[int, Losses, float], None]  # told (steps done, losses of the last one, tokens/s)


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Held-out text as windows [n, T+1], the predictions of each that count, and its size in UTF-8 bytes."""

    windows: np.ndarray
    scored: np.ndarray
    num_bytes: int

    @classmethod
    def cut(cls, documents: Sequence[np.ndarray], start_id: int, num_bytes: int, length: int) -> "HeldOut":
        """Every token of every document counts once; windows are filled up at their end."""
        pairs = [pair for document in documents for pair in cut_windows([start_id, *document.tolist()], length, length)]
        windows, scored = np.zeros((len(pairs), length + 1), np.int32), np.zeros((len(pairs), length), bool)
        for n, (ids, num_context) in enumerate(pairs):
            windows[n, : len(ids)] = ids
            scored[n, num_context : len(ids) - 1] = True
        return cls(windows, scored, num_bytes)

    def batches(self, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """All windows, `size` at a time; the last batch is filled up with windows that do not count."""
        missing = -len(self.windows) % size
        windows, scored = (np.pad(array, ((0, missing), (0, 0))) for array in (self.windows, self.scored))
        for start in range(0, len(windows), size):
            yield windows[start : start + size], scored[start : start + size]

    def bits_per_byte(self, trainer: Trainer, params: Params) -> float:
        sums = [trainer.held_out_nats(params, *pair) for pair in self.batches(trainer.training.batch_size)]
        return math.fsum(map(float, jax.device_get(sums))) / math.log(2) / self.num_bytes


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The state of a training after `step` steps."""

    step: int
    held_out_bits_per_byte: float
    cross_entropy: float
    load_balancing: float
    router_z: float


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The parameters of the held-out minimum, all evaluations, and the median speed of this run."""

    params: Params
    best: Evaluation
    evaluations: tuple[Evaluation, ...]
    tokens_per_s: float


@dataclasses.dataclass(frozen=True)
class _Point:
    """Where a training stands: what a checkpoint holds."""

    state: TrainState
    best_params: Params
    evaluations: tuple[Evaluation, ...] = ()

    @property
    def best(self) -> Evaluation:
        return min(self.evaluations, key=lambda evaluation: evaluation.held_out_bits_per_byte)

    def is_over(self, trainer: Trainer) -> bool:
        if int(self.state.step) >= trainer.training.num_steps:
            return True
        return bool(self.evaluations) and (
            len(self.evaluations) - 1 - self.evaluations.index(self.best) >= trainer.training.patience
        )


def fit(
    trainer: Trainer,
    batches: Batches,
    held_out: HeldOut,
    directory: Path,
    report: Report,
    tell: Callable[[Evaluation], None] = lambda evaluation: None,
) -> Outcome:
    """Trains to the held-out minimum, or goes on from the last checkpoint in `directory`.

    `report` hears of the steps, `tell` of each evaluation. Raises ValueError if that checkpoint is of another training,
    RuntimeError if the loss is no longer a number.
    """
    mine = {
        "model": trainer.config.to_dict(),
        "training": dataclasses.asdict(trainer.training),
        "num_tokens": batches.num_tokens,
    }
    require_same(directory / "training.json", mine)
    speeds: list[float] = []
    with ocp.CheckpointManager(directory.absolute() / "checkpoints", options=KEEP_TWO) as manager:
        point = _restore(manager, trainer)
        while not point.is_over(trainer):
            point = _until_evaluation(trainer, batches, held_out, point, report, speeds)
            tell(point.evaluations[-1])
            step = int(point.state.step)
            if step % trainer.training.checkpoint_every < trainer.training.eval_every or point.is_over(trainer):
                _save(manager, point)
        manager.wait_until_finished()
    speed = statistics.median(speeds[1:]) if speeds[1:] else math.nan  # the first stretch compiled
    return Outcome(point.best_params, point.best, point.evaluations, speed)


def _until_evaluation(
    trainer: Trainer, batches: Batches, held_out: HeldOut, point: _Point, report: Report, speeds: list[float]
) -> _Point:
    """Steps up to the next evaluation, and that."""
    state, first = point.state, int(point.state.step)
    last = min(first - first % trainer.training.eval_every + trainer.training.eval_every, trainer.training.num_steps)
    losses, since, started = None, first, time.perf_counter()
    for step in range(first, last):
        state, losses = trainer.step(state, batches[step])
        if (step + 1) % REPORT_EVERY == 0 or step + 1 == last:
            losses = _checked(jax.device_get(losses), step + 1)
            now = time.perf_counter()
            speed = (step + 1 - since) * trainer.training.tokens_per_step / (now - started)
            speeds.append(speed)
            report(step + 1, losses, speed)
            since, started = step + 1, now
    assert losses is not None  # there was at least one step
    parts = {field.name: float(getattr(losses, field.name)) for field in dataclasses.fields(losses)}
    evaluation = Evaluation(last, held_out.bits_per_byte(trainer, state.params), **parts)
    after = _Point(state, point.best_params, (*point.evaluations, evaluation))
    return (
        dataclasses.replace(after, best_params=jax.tree.map(jnp.copy, state.params))
        if (after.best == evaluation)
        else after
    )


def _checked(losses: Losses, step: int) -> Losses:
    if not math.isfinite(float(losses.cross_entropy)):
        raise RuntimeError(
            f"step {step}: the cross-entropy is {float(losses.cross_entropy)}; training has diverged. "
            "Lower learning_rate or clip_norm, and begin in a new directory."
        )
    return losses


KEEP_TWO = ocp.CheckpointManagerOptions(max_to_keep=2)


def _save(manager: ocp.CheckpointManager, point: _Point) -> None:
    arrays = {"state": point.state, "best_params": point.best_params}
    save_point(manager, int(point.state.step), arrays, [dataclasses.asdict(each) for each in point.evaluations])


def _restore(manager: ocp.CheckpointManager, trainer: Trainer) -> _Point:
    state = trainer.start()
    restored = restore_point(manager, {"state": state, "best_params": state.params})
    if restored is None:
        return _Point(state, state.params)
    arrays, evaluations = restored
    return _Point(arrays["state"], arrays["best_params"], tuple(Evaluation(**values) for values in evaluations))


def save_point(
    manager: ocp.CheckpointManager, step: int, arrays: dict[str, Any], evaluations: list[dict[str, Any]]
) -> None:
    """Begins to write where a training stands after `step` steps."""
    history = ocp.args.JsonSave({"evaluations": evaluations})
    manager.save(step, args=ocp.args.Composite(arrays=ocp.args.PyTreeSave(arrays), history=history))


def restore_point(
    manager: ocp.CheckpointManager, arrays: dict[str, Any]
) -> tuple[dict[str, Any], list[dict[str, Any]]] | None:
    """What `save_point` wrote last, None if nothing; `arrays` says of what shapes and where."""
    step = manager.latest_step()
    if step is None:
        return None
    restore_args = ocp.checkpoint_utils.construct_restore_args(arrays)
    restored = manager.restore(
        step,
        args=ocp.args.Composite(
            arrays=ocp.args.PyTreeRestore(arrays, restore_args=restore_args), history=ocp.args.JsonRestore()
        ),
    )
    return restored["arrays"], restored["history"]["evaluations"]


def require_same(file: Path, mine: dict[str, Any]) -> None:
    """Remembers what is trained in a directory. Raises ValueError if it is something else this time."""
    mine = json.loads(json.dumps(mine))  # tuples become lists, as they will be read
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        with new_file(file) as scratch:
            scratch.write_text(json.dumps(mine, indent=2) + "\n", encoding="utf-8")
        return
    theirs = json.loads(file.read_text(encoding="utf-8"))
    if mine != theirs:
        there, now = _flat(theirs), _flat(mine)
        differing = [
            f"{name}: {there.get(name)!r} there, {now[name]!r} now" for name in now if there.get(name) != now[name]
        ]
        raise ValueError(
            f"{file.parent} holds another training ({'; '.join(differing) or 'of another version'}). "
            "Choose another directory."
        )


def _flat(facts: dict[str, Any]) -> dict[str, Any]:
    """One level: "training.learning_rate", "num_tokens"."""
    flat = {}
    for name, value in facts.items():
        parts = {f"{name}.{inner}": each for inner, each in value.items()} if isinstance(value, dict) else {name: value}
        flat |= parts
    return flat
