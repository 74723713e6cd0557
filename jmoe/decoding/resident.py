"""The reference: whole sequences at once, with every expert on the device."""

from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jmoe.config import ModelConfig
from jmoe.experts.layer import Observed, ResidentExperts
from jmoe.model.decoder import build_decoder
from jmoe.model.kv_cache import init_kv_cache
from jmoe.model.router import Routing


def forward_resident(
    config: ModelConfig,
    params: Mapping[str, Array],
    expert_layers: tuple[Float[Array, "E 3 F D"], ...],
    token_ids: Int[Array, "B T"],
    *,
    implementation: str | None = "reference",
) -> Float[Array, "B T V"]:
    """Logits of whole sequences with every expert on the device: the reference that every other path must equal."""
    return forward_routed(config, params, expert_layers, token_ids, implementation=implementation)[0]


def forward_routed(
    config: ModelConfig,
    params: Mapping[str, Array],
    expert_layers: tuple[Float[Array, "E 3 F D"], ...],
    token_ids: Int[Array, "B T"],
    *,
    implementation: str | None = "reference",
) -> tuple[Float[Array, "B T V"], tuple[Routing, ...]]:
    """As `forward_resident`, and the routing of each MoE layer, whose rows are the tokens [B*T] in order."""
    decoder = build_decoder(config, params)
    batch, length = token_ids.shape
    cache = init_kv_cache(config, batch, length)
    experts = Observed(ResidentExperts(expert_layers, implementation=implementation))
    valid, lengths = jnp.ones(token_ids.shape, bool), jnp.full((batch,), length, jnp.int32)
    hidden, _, (_, routings) = decoder(token_ids, valid, lengths, cache, experts, (None, ()))
    return decoder.unembed(hidden), routings
