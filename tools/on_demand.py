"""Experts on demand, none kept: each layer fetches all that it asks for. Beside it one sees what keeping is worth."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from jmoe.config import ModelConfig, RuntimeConfig
from jmoe.decoding.prefill import Prefill
from jmoe.decoding.step import Steps
from jmoe.engine import Engine, Weights
from jmoe.experts.layer import OffloadedExperts, ResidentExperts
from jmoe.experts.look_ahead import Prefetch
from jmoe.experts.residency import LayerResidency
from jmoe.experts.slots import ExpertSlots
from jmoe.experts.store import ExpertStore
from jmoe.loading import kept_programs
from kernels_pallas.admit.result import NONE


class OnDemandSteps(Steps):
    """Steps, of decoding and of prompts, that find no expert in any slot: so nothing is ever a hit."""

    def experts(
        self, store: ExpertStore, slots: ExpertSlots, *, admits: bool, prefetch: Prefetch | None = None
    ) -> ResidentExperts | OffloadedExperts:
        return super().experts(store, without_experts(slots), admits=admits, prefetch=prefetch)


def without_experts(slots: ExpertSlots) -> ExpertSlots:
    """The same slots, of which none counts as holding anything."""
    layers = tuple(
        LayerResidency(jnp.full_like(layer.slot_of, NONE), jnp.full_like(layer.owner, NONE))
        for layer in slots.residency.layers
    )
    return dataclasses.replace(slots, residency=dataclasses.replace(slots.residency, layers=layers))


def keep_nothing(engine: Engine) -> None:
    """From now on this engine's steps keep no expert from one to the next.

    Raises ValueError if it has a slot for every expert: then its steps ask no residency.
    """
    steps = engine.steps
    if steps.layout.all_resident:
        raise ValueError(
            f"{steps.layout.slots_per_layer} slots a layer hold all {steps.layout.num_experts} experts; "
            "on demand takes fewer slots than experts"
        )
    engine.steps = OnDemandSteps(**{field.name: getattr(steps, field.name) for field in dataclasses.fields(steps)})
    engine.prefill = Prefill(engine.steps)


def start_engine(
    config: ModelConfig, runtime: RuntimeConfig, weights: Weights, *, keeps: bool = True, **details: Any
) -> Engine:
    """An engine of weights that are there, with the steps that earlier ones compiled; or, unless `keeps`, on demand.

    A kept step goes by the sources of jmoe, and what is on demand is a tool's: that is compiled each time. Raises what
    `Engine.start` and `keep_nothing` do.
    """
    programs = kept_programs() if keeps else None
    engine = Engine.start(config, runtime, lambda: weights, programs=programs, **details)
    if not keeps:
        keep_nothing(engine)
    return engine
