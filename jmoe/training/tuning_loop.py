"""The loop around router tuning: held-out text watched, the quality gate, checkpoints that outlive a kill."""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from jmoe.training.batches import Batches
from jmoe.training.frozen import Frozen, Routers
from jmoe.training.loop import KEEP_TWO, REPORT_EVERY, HeldOut, require_same, restore_point, save_point
from jmoe.training.router_tuning import Knobs, Terms, Tuner, TuningState

Report = Callable[[int, dict[str, float], float], None]  # told (steps done, terms of the last one, tokens/s)


@dataclasses.dataclass(frozen=True)
class TuningEvaluation:
    """Held-out text after `step` steps: bits a byte, and the share of a token's experts that the one before had.

    `terms` are those of the last step, over its batch; none before the first.
    """

    step: int
    bits_per_byte: float
    reuse: float
    terms: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class TuningOutcome:
    """The routers of the most reuse within the gate, float32, all evaluations, and the median speed of this run."""

    routers: Routers
    before: TuningEvaluation
    best: TuningEvaluation
    evaluations: tuple[TuningEvaluation, ...]
    ended_by_gate: bool
    tokens_per_s: float


@dataclasses.dataclass(frozen=True)
class _Point:
    """Where a tuning stands: what a checkpoint holds. The first evaluation is of the model as it was."""

    state: TuningState
    best_routers: Routers
    evaluations: tuple[TuningEvaluation, ...]
    most_worse: float

    def passes(self, evaluation: TuningEvaluation) -> bool:
        return evaluation.bits_per_byte <= (1 + self.most_worse) * self.evaluations[0].bits_per_byte

    @property
    def best(self) -> TuningEvaluation:
        """The earliest of those with the most reuse, among those that pass; the first always does."""
        return max(filter(self.passes, self.evaluations), key=lambda evaluation: evaluation.reuse)

    @property
    def failed(self) -> bool:
        return not self.passes(self.evaluations[-1])


def tune(
    tuner: Tuner,
    frozen: Frozen,
    batches: Batches,
    held_out: HeldOut,
    directory: Path,
    fingerprint: str,
    report: Report,
    tell: Callable[[TuningEvaluation], None] = lambda evaluation: None,
) -> TuningOutcome:
    """Tunes to the last step or until the gate closes, or goes on from the last checkpoint in `directory`.

    `fingerprint` is the checkpoint's. `report` hears of the steps, `tell` of each evaluation. Raises ValueError if the
    directory holds another tuning, RuntimeError if the loss is no longer a number.
    """
    require_same(directory / "tuning.json", _identity(tuner, batches, held_out, fingerprint))
    speeds: list[float] = []
    tuning = tuner.tuning
    with ocp.CheckpointManager(directory.absolute() / "checkpoints", options=KEEP_TWO) as manager:
        point = _restore(manager, tuner, frozen, held_out, tell)
        while int(point.state.step) < tuning.num_steps and not point.failed:
            point = _until_evaluation(tuner, frozen, batches, held_out, point, report, speeds)
            tell(point.evaluations[-1])
            step = int(point.state.step)
            if step % tuning.checkpoint_every < tuning.eval_every or step == tuning.num_steps or point.failed:
                _save(manager, point)
        manager.wait_until_finished()
    speed = statistics.median(speeds[1:]) if speeds[1:] else math.nan  # the first stretch compiled
    ends = point.evaluations[0], point.best, point.evaluations
    return TuningOutcome(point.best_routers, *ends, ended_by_gate=point.failed, tokens_per_s=speed)


def _identity(tuner: Tuner, batches: Batches, held_out: HeldOut, fingerprint: str) -> dict:
    return {
        "model": tuner.config.to_dict(),
        "tuning": dataclasses.asdict(tuner.tuning),
        "checkpoint": fingerprint,
        "num_tokens": batches.num_tokens,
        "held_out_bytes": held_out.num_bytes,
    }


def score_held_out(tuner: Tuner, frozen: Frozen, routers: Routers, held_out: HeldOut) -> tuple[float, float]:
    """(bits a byte, reuse) of held-out windows."""
    made = [tuner.score(frozen, routers, *pair) for pair in held_out.batches(tuner.tuning.batch_size)]
    nats, reused, followed = (
        math.fsum(float(getattr(part, name)) for part in made) for name in ("nats", "num_reused", "num_followed")
    )
    return nats / math.log(2) / held_out.num_bytes, reused / max(followed, 1.0)


def steps_per_call(tuner: Tuner) -> int:
    """The most steps of one call that divide the intervals, at most REPORT_EVERY."""
    return math.gcd(tuner.tuning.eval_every, tuner.tuning.num_steps, REPORT_EVERY)


def tokens_of(batches: Batches, first_step: int, num_steps: int, accumulation: int) -> np.ndarray:
    """The tokens of some steps, [S, G, B, T+1]."""
    first = first_step * accumulation
    rows = [batches[n] for n in range(first, first + num_steps * accumulation)]
    return np.stack(rows).reshape(num_steps, accumulation, *rows[0].shape)


def _until_evaluation(
    tuner: Tuner,
    frozen: Frozen,
    batches: Batches,
    held_out: HeldOut,
    point: _Point,
    report: Report,
    speeds: list[float],
) -> _Point:
    """Steps up to the next evaluation, and that."""
    tuning, state, size = tuner.tuning, point.state, steps_per_call(tuner)
    knobs, first = Knobs.of(tuning), int(point.state.step)
    last = min(first - first % tuning.eval_every + tuning.eval_every, tuning.num_steps)
    terms: dict[str, float] = {}
    for step in range(first, last, size):
        started = time.perf_counter()
        tokens = tokens_of(batches, step, size, tuning.gradient_accumulation)
        state, made = tuner.steps(frozen, knobs, state, tokens)
        terms = _checked(jax.device_get(made), step + size)
        speeds.append(size * tuning.tokens_per_step / (time.perf_counter() - started))
        report(step + size, terms, speeds[-1])
    bits, reuse = score_held_out(tuner, frozen, state.routers, held_out)
    evaluation = TuningEvaluation(last, bits, reuse, terms)
    after = dataclasses.replace(point, state=state, evaluations=(*point.evaluations, evaluation))
    if after.best is evaluation:
        return dataclasses.replace(after, best_routers=jax.tree.map(jnp.copy, state.routers))
    return after


def _checked(made: Terms, step: int) -> dict[str, float]:
    """The terms of the last of these steps. Raises RuntimeError unless they are numbers."""
    terms = {field.name: float(getattr(made, field.name)[-1]) for field in dataclasses.fields(made)}
    if not all(math.isfinite(value) for value in terms.values()):
        raise RuntimeError(
            f"step {step}: the terms are {terms}; tuning has diverged. Lower learning_rate or clip_norm, and begin in "
            "a new directory."
        )
    return terms


def _save(manager: ocp.CheckpointManager, point: _Point) -> None:
    arrays = {"state": point.state, "best_routers": point.best_routers}
    save_point(manager, int(point.state.step), arrays, [dataclasses.asdict(each) for each in point.evaluations])


def _restore(
    manager: ocp.CheckpointManager,
    tuner: Tuner,
    frozen: Frozen,
    held_out: HeldOut,
    tell: Callable[[TuningEvaluation], None],
) -> _Point:
    state, most_worse = tuner.start(frozen), tuner.tuning.most_worse
    best = jax.tree.map(jnp.copy, state.routers)
    restored = restore_point(manager, {"state": state, "best_routers": best})
    if restored is not None:
        arrays, evaluations = restored
        history = tuple(TuningEvaluation(**values) for values in evaluations)
        return _Point(arrays["state"], arrays["best_routers"], history, most_worse)
    before = TuningEvaluation(0, *score_held_out(tuner, frozen, state.routers, held_out))
    tell(before)
    return _Point(state, best, (before,), most_worse)
