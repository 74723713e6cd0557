"""A model of which only the routers may change: its forward pass, with the experts on the device or in host memory."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jmoe import checkpoint, memory
from jmoe.checkpoint import Progress
from jmoe.config import ModelConfig
from jmoe.model.decoder import Decoder, build_decoder, exact
from jmoe.model.kv_cache import init_kv_cache
from jmoe.model.rope import rope_angles
from jmoe.model.router import Router, Routing
from kernels_pallas.expert_mlp.api import expert_mlp

Routers = dict[str, Any]  # kernels [E, D] by flat path, one a MoE layer
PIECE_BYTES = 256 * 2**20  # of experts that are copied to the device at a time


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Frozen:
    """What tuning does not change: the trunk with the routers as they were, and the experts of each MoE layer."""

    trunk: dict[str, Any]  # by flat path, see `jmoe.model.families.trunk_shapes`
    experts: tuple[Float[Array, "E 3 F D"], ...]

    def routers(self, config: ModelConfig) -> Routers:
        """The kernels that the checkpoint has."""
        return {path: self.trunk[path] for path in router_paths(config)}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routed:
    """Log-probabilities of the routers and of the frozen ones for the same rows, float32, and the experts chosen."""

    log_p: Float[Array, "L B T E"]
    log_reference: Float[Array, "L B T E"]
    expert_ids: Int[Array, "L B T A"]


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where the frozen experts are: all on the device, or in host memory, copied `piece` experts at a time (static)."""

    offloaded: bool = False
    piece: int = 0  # a divisor of E; 0: as many as PIECE_BYTES hold


RESIDENT = Placement()


def router_paths(config: ModelConfig) -> list[str]:
    """Flat paths of the routers' kernels, in the order of the MoE layers."""
    return [f"layers/{layer}/router/kernel" for layer in config.moe_layers]


def load_frozen(path: Path, config: ModelConfig, placement: Placement, progress: Progress | None = None) -> Frozen:
    """The weights of a jmoe checkpoint; experts in pinned host memory if they are offloaded."""
    report = progress or (lambda phase, done, total: None)
    sharding = memory.host_sharding() if placement.offloaded else memory.device_sharding()
    trunk = checkpoint.load_trunk(path, config, memory.device_sharding())
    layers = []
    for layer in config.moe_layers:
        layers.append(jax.block_until_ready(checkpoint.load_experts(path, config, layer, sharding)))
        report("loading experts", len(layers) * layers[0].nbytes, config.store_bytes)
    return Frozen(trunk, tuple(layers))


def forward(
    config: ModelConfig,
    frozen: Frozen,
    routers: Mapping[str, Array],
    token_ids: Int[Array, "B T"],
    *,
    placement: Placement = RESIDENT,
    remat: bool = False,
) -> tuple[Float[Array, "B T V"], Routed]:
    """Logits of whole sequences and what was routed; differentiable in the routers.

    `jmoe.decoding.step.forward_routed` with other routers, every expert multiplied with every token. `remat` keeps
    nothing of a layer but its input for the backward pass; offloaded experts always do.
    """
    decoder = build_decoder(config, frozen.trunk)
    batch, length = token_ids.shape
    positions = jnp.broadcast_to(jnp.arange(length)[None], (batch, length))
    angles = rope_angles(config, positions, jnp.full((batch,), length, jnp.int32))
    routed = []
    with exact(config.dtype):
        x = decoder.embed(token_ids)
        for n in range(config.num_hidden_layers):
            layer = functools.partial(_layer, config, decoder, frozen, n, angles, positions, placement)
            layer = jax.checkpoint(layer) if remat or placement.offloaded else layer
            x, found = layer(x, routers.get(f"layers/{n}/router/kernel"))
            routed += [found] if found is not None else []
        logits = decoder.unembed(decoder.norm(x))
    return logits, jax.tree.map(lambda *layers: jnp.stack(layers), *routed)


def _layer(
    config: ModelConfig, decoder: Decoder, frozen: Frozen, n: int, angles, positions, placement: Placement, x, kernel
) -> tuple[Float[Array, "B T D"], Routed | None]:
    """One decoder layer with this kernel for a router: what `Decoder` does, on an empty KV cache of its own."""
    layer, (batch, length, _) = decoder.layers[n], x.shape
    with jax.named_scope("attention"):
        cache, valid = init_kv_cache(config, batch, length), jnp.ones((batch, length), bool)
        x, _ = layer.attention(x, layer.input_norm, cache, n, angles, positions, valid)
    rows = layer.post_attention_norm(x)
    if layer.mlp is not None:
        return x + layer.mlp(rows), None
    rows = rows.reshape(-1, x.shape[-1])
    assert layer.router is not None  # a layer has one or the other
    with jax.named_scope("router"):
        routing, reference = with_kernel(layer.router, kernel)(rows), layer.router(rows)
    with jax.named_scope("experts"):
        experts = frozen.experts[config.moe_layers.index(n)]
        y = _all_experts(rows, experts, weights_of_all(routing), placement)
    log_p, log_reference = (jax.nn.log_softmax(each.logits).reshape(batch, length, -1) for each in (routing, reference))
    routed = Routed(log_p, log_reference, routing.expert_ids.reshape(batch, length, -1))
    return x + y.astype(x.dtype).reshape(x.shape), routed


def with_kernel(router: Router, kernel: Float[Array, "E D"]) -> Router:
    """The same router with another kernel."""
    graph, state = nnx.split(router, nnx.Param)
    return nnx.merge(
        graph, nnx.from_flat_state([(path, old.replace(kernel)) for path, old in nnx.to_flat_state(state)])
    )


def weights_of_all(routing: Routing) -> Float[Array, "E T"]:
    """The weight of every expert for every row; 0 where it was not chosen."""
    experts = jnp.arange(routing.logits.shape[-1], dtype=jnp.int32)
    chosen = routing.expert_ids[None] == experts[:, None, None]  # [E, T, A]
    return jnp.sum(jnp.where(chosen, routing.combine_weights[None], 0.0), axis=-1)


def _all_experts(x: Float[Array, "T D"], experts, weights: Float[Array, "E T"], placement: Placement):
    """Sum of all experts' outputs, weighted, float32; in pieces, each copied when its turn comes, if offloaded.

    The pieces are turns of a loop, so no copy can begin before its turn, and no piece outlives it: the backward pass
    copies it again.
    """
    num_experts = experts.shape[0]
    if not placement.offloaded:
        return expert_mlp(x, experts, jnp.arange(num_experts), weights, implementation="dense")
    size = placement.piece or piece_size(num_experts, experts.size // num_experts * experts.dtype.itemsize)

    def add(y: Float[Array, "T D"], piece: tuple[Int[Array, ""], Float[Array, "P T"]]):
        start, piece_weights = piece
        here = memory.to_device(jax.lax.dynamic_slice_in_dim(experts, start, size))
        return y + expert_mlp(x, here, jnp.arange(size), piece_weights, implementation="dense"), None

    starts = jnp.arange(0, num_experts, size, dtype=jnp.int32)
    again = jax.checkpoint(add, prevent_cse=False)  # inside of a scan nothing can be shared between the two passes
    y, _ = jax.lax.scan(again, jnp.zeros(x.shape, jnp.float32), (starts, weights.reshape(-1, size, x.shape[0])))
    return y


def piece_size(num_experts: int, expert_bytes: int) -> int:
    """The most experts that PIECE_BYTES hold and that divide all of them evenly; at least one."""
    fitting = (size for size in range(num_experts, 0, -1) if num_experts % size == 0)
    return next(size for size in fitting if size * expert_bytes <= PIECE_BYTES or size == 1)
