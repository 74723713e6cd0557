"""Which Hugging Face tensors make up which array of jmoe. One table is read both ways: by convert and by export.

A *leaf* is an array of jmoe: a trunk parameter such as `layers/3/attention/qkv_proj/kernel`, or the experts of one
layer, [E, 3, F, D]. A *piece* is one Hugging Face tensor and the region of the leaf that it fills. A *rule* is a row of
the table in `jmoe.model.families`: it becomes leaves and pieces for a given model.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np

from jmoe.config import ModelConfig

Scope = Literal["model", "layer", "moe_layer", "dense_layer"]


@dataclasses.dataclass(frozen=True)
class Piece:
    """One Hugging Face tensor and where it sits in its leaf: at `leaf[index]`, its last axes swapped if transposed."""

    name: str
    shape: tuple[int, ...]
    index: tuple[int | slice, ...]
    transposed: bool = False

    def put(self, leaf: np.ndarray, tensor: np.ndarray) -> None:
        """Writes the tensor into its region of the leaf, cast to the leaf's dtype."""
        region = leaf[self.index]
        if self.transposed:
            tensor = tensor.swapaxes(-1, -2)
        region[...] = tensor.reshape(region.shape)

    def take(self, leaf: np.ndarray) -> np.ndarray:
        """The tensor, read back out of the leaf: the inverse of `put`."""
        shape = (*self.shape[:-2], self.shape[-1], self.shape[-2]) if self.transposed else self.shape
        tensor = leaf[self.index].reshape(shape)
        return np.ascontiguousarray(tensor.swapaxes(-1, -2) if self.transposed else tensor)


@dataclasses.dataclass(frozen=True)
class Leaf:
    """An array of jmoe: its flat path, its shape and the Hugging Face tensors that fill it exactly.

    `expert_layer` is the decoder layer whose experts it holds, None for the trunk.
    """

    path: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    expert_layer: int | None = None


@dataclasses.dataclass(frozen=True)
class TrunkRule:
    """A trunk leaf made of tensors stacked along axis 0: `tensors` pairs each name with the letters of its rows.

    `{layer}` in the path and the names is the decoder layer index. `when` and `unless` name a boolean of ModelConfig.
    """

    path: str
    tensors: tuple[tuple[str, str], ...]
    columns: str | None
    scope: Scope
    when: str | None = None
    unless: str | None = None

    def applies(self, config: ModelConfig) -> bool:
        wanted = self.when is None or getattr(config, self.when)
        return bool(wanted) and not (self.unless is not None and getattr(config, self.unless))

    def leaf(self, config: ModelConfig, layer: int | None) -> Leaf:
        letters = dimensions(config)
        columns = () if self.columns is None else (letters[self.columns],)
        pieces, start = [], 0
        for name, rows in self.tensors:
            stop = start + letters[rows]
            pieces.append(Piece(name.format(layer=layer), (stop - start, *columns), (slice(start, stop),)))
            start = stop
        return Leaf(self.path.format(layer=layer), (start, *columns), tuple(pieces))


@dataclasses.dataclass(frozen=True)
class ExpertRule:
    """Tensors of the routed experts that fill `num_parts` of gate, up, down from `first_part` on.

    With `{expert}` in the name there is one tensor an expert, [parts * F, D]; without it, one for all of them,
    [E, parts * F, D]. A transposed one has its last two axes the other way round.
    """

    name: str
    first_part: int
    num_parts: int = 1
    transposed: bool = False

    def pieces(self, config: ModelConfig, layer: int) -> Iterator[Piece]:
        rows = self.num_parts * config.moe_intermediate_size
        matrix = (config.hidden_size, rows) if self.transposed else (rows, config.hidden_size)
        parts = slice(self.first_part, self.first_part + self.num_parts)
        if "{expert}" not in self.name:
            name = self.name.format(layer=layer)
            yield Piece(name, (config.num_experts, *matrix), (slice(None), parts), self.transposed)
            return
        for expert in range(config.num_experts):
            name = self.name.format(layer=layer, expert=expert)
            yield Piece(name, matrix, (expert, parts), self.transposed)


ExpertLayouts = Mapping[str, tuple[ExpertRule, ...]]


def dimensions(config: ModelConfig) -> dict[str, int]:
    """Sizes by letter (see `jmoe.shapes`); I is the width of a dense layer, NH and KH are all heads side by side."""
    return {
        "V": config.vocab_size,
        "D": config.hidden_size,
        "I": config.intermediate_size,
        "E": config.num_experts,
        "F": config.moe_intermediate_size,
        "H": config.head_dim,
        "NH": config.num_attention_heads * config.head_dim,
        "KH": config.num_key_value_heads * config.head_dim,
    }


def trunk_leaves(rules: tuple[TrunkRule, ...], config: ModelConfig, layer: int | None) -> list[Leaf]:
    """The trunk's leaves of one decoder layer, or with None those outside the decoder layers."""
    if layer is None:
        scopes: set[Any] = {"model"}
    else:
        scopes = {"layer", "moe_layer" if layer in config.moe_layers else "dense_layer"}
    return [rule.leaf(config, layer) for rule in rules if rule.scope in scopes and rule.applies(config)]


def expert_leaf(rules: tuple[ExpertRule, ...], config: ModelConfig, layer: int) -> Leaf:
    """The experts of one layer, [E, 3, F, D], at the path `experts/{layer}`."""
    pieces = tuple(piece for rule in rules for piece in rule.pieces(config, layer))
    return Leaf(f"experts/{layer}", (config.num_experts, *config.expert_shape), pieces, expert_layer=layer)
