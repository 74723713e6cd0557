"""Reading and writing config.json: the parts that model families share (types, spellings, rope, sliding window)."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from jmoe.config import ROPE_TYPES, ModelConfig, RopeConfig

Spelling = Literal["transformers-4", "transformers-5"]

_YARN_KEYS = (
    "factor original_max_position_embeddings attention_factor beta_fast beta_slow mscale mscale_all_dim truncate"
)
_ROPE_KEYS = {"default": (), "linear": ("factor",), "dynamic": ("factor",), "yarn": tuple(_YARN_KEYS.split())}
_FIXED = {"is_encoder_decoder": False, "partial_rotary_factor": 1.0}
_SHARED_KEYS = frozenset("rope_theta rope_scaling rope_parameters use_sliding_window layer_types".split())


@dataclasses.dataclass(frozen=True)
class ConfigKey:
    """A key of config.json that ModelConfig has too: its type, and what leaving it out means in transformers.

    The name is transformers 4's; `transformers_5` is the newer one where that differs. null is the same as leaving the
    key out where the default is null, and a value of its own where `nullable`.
    """

    name: str
    kind: type
    default: Any
    transformers_5: str | None = None
    nullable: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,) if self.transformers_5 is None else (self.name, self.transformers_5)

    def named(self, spelling: Spelling) -> str:
        return self.names[-1] if spelling == "transformers-5" else self.name


class _Refusals(list[str]):
    """What is wrong with a config.json, one entry for each key."""

    def add(self, key: str, value: Any, supported: str) -> None:
        self.append(f"{key}={value!r} ({supported})")

    def read(self, values: Mapping[str, Any], key: str, kind: type, default: Any, *, nullable: bool = False) -> Any:
        """`values[key]` if it is of this kind; else the default, with an entry here unless the key is absent."""
        value = values.get(key, default)
        if (value is None and (nullable or default is None)) or _is_of(value, kind):
            return value
        self.add(key, value, f"expected {_KIND_WORDS[kind]}")
        return default


_KIND_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a string",
    list: "a list of whole numbers",
}


def _is_of(value: Any, kind: type) -> bool:
    if kind is list:
        return isinstance(value, list | tuple) and all(_is_of(entry, int) for entry in value)
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, int | float) if kind is float else isinstance(value, kind)


def fields_of(
    hf: Mapping[str, Any], keys: Iterable[ConfigKey], fixed: Mapping[str, Any], ignored: frozenset[str]
) -> tuple[dict[str, Any], list[str]]:
    """ModelConfig's fields from a config.json, and the options that have to be refused, each with what is supported."""
    refused = _Refusals()
    keys = tuple(keys)
    fields = {key.name: _read_key(hf, key, refused) for key in keys}
    fields["rope"] = _read_rope(hf, fields["max_position_embeddings"], refused)
    fields["sliding_window"] = _read_sliding_window(hf, fields, refused)
    fields["mlp_only_layers"] = tuple(fields["mlp_only_layers"] or ())
    fields["dtype"] = fields.pop("torch_dtype") or "float32"  # what transformers takes when config.json has none
    if fields["head_dim"] is None:
        fields["head_dim"] = fields["hidden_size"] // max(fields["num_attention_heads"], 1)
    fixed = _FIXED | dict(fixed)
    for name, supported in fixed.items():
        if hf.get(name, supported) not in (supported, None):
            refused.add(name, hf[name], f"only {supported!r} is supported")
    known = {name for key in keys for name in key.names} | set(fixed) | ignored | _SHARED_KEYS
    for name in sorted(set(hf) - known):
        if hf[name] is not None:
            refused.add(name, hf[name], "unknown to jmoe; only leaving it out, or null, is supported")
    return fields, refused


def _read_key(hf: Mapping[str, Any], key: ConfigKey, refused: _Refusals) -> Any:
    present = [name for name in key.names if name in hf]
    if len(present) > 1 and len({repr(hf[name]) for name in present}) > 1:
        refused.add(present[0], hf[present[0]], f"contradicts {present[1]}={hf[present[1]]!r}; leave one of them out")
    name = present[0] if present else key.name
    return refused.read(hf, name, key.kind, key.default, nullable=key.nullable)


def _read_rope(hf: Mapping[str, Any], max_position_embeddings: int, refused: _Refusals) -> RopeConfig:
    """Rope from `rope_theta` and `rope_scaling` (transformers 4) or from `rope_parameters` (transformers 5)."""
    name = "rope_scaling" if hf.get("rope_scaling") else "rope_parameters"
    rope = hf.get(name) or {}
    if not isinstance(rope, Mapping):
        refused.add(name, rope, "expected a table of options, or null")
        return RopeConfig()
    if hf.get("rope_scaling") and hf.get("rope_parameters"):
        refused.add("rope_scaling", rope, "given beside rope_parameters; leave one of them out")
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ROPE_TYPES or rope.get("type", rope_type) != rope_type:
        refused.add(f"{name}.rope_type", rope_type, f"supported: {', '.join(ROPE_TYPES)}")
        return RopeConfig()
    options = {"rope_type": rope_type, "theta": _read_theta(hf, rope, name, refused)}
    options |= _read_rope_options(rope, name, rope_type, refused)
    if rope_type == "yarn":  # transformers takes what is missing from the context length
        original = options.setdefault("original_max_position_embeddings", max_position_embeddings)
        options.setdefault("factor", max_position_embeddings / max(original, 1))
    try:
        return RopeConfig(**options)
    except ValueError as error:
        refused.add(name, dict(rope), str(error))
        return RopeConfig()


def _read_theta(hf: Mapping[str, Any], rope: Mapping[str, Any], name: str, refused: _Refusals) -> float:
    outer = refused.read(hf, "rope_theta", float, None)
    inner = refused.read(rope, "rope_theta", float, None)
    if outer is not None and inner is not None and outer != inner:
        refused.add("rope_theta", outer, f"contradicts {name}.rope_theta={inner!r}; leave one of them out")
    return float(next((theta for theta in (inner, outer) if theta is not None), 10000.0))


def _read_rope_options(rope: Mapping[str, Any], name: str, rope_type: str, refused: _Refusals) -> dict[str, Any]:
    """The options that belong to this rope type; null means absent, as in transformers. Others are refused."""
    options = {}
    for key, value in rope.items():
        if key in ("type", "rope_type", "rope_theta") or (value is None and key != "truncate"):
            continue
        if key == "partial_rotary_factor" and value == 1:
            continue
        if key not in _ROPE_KEYS[rope_type]:
            supported = ", ".join(_ROPE_KEYS[rope_type]) or "no options"
            refused.add(f"{name}.{key}", value, f"rope_type {rope_type!r} takes {supported}")
            continue
        kind = {"truncate": bool, "original_max_position_embeddings": int}.get(key, float)
        if not _is_of(value, kind) or (isinstance(value, int) and kind is int and value < 1):
            refused.add(f"{name}.{key}", value, f"expected {_KIND_WORDS[kind]}" + " above 0" * (kind is int))
        elif value != 0 or key not in ("beta_fast", "beta_slow"):  # transformers reads a beta of 0 as the default
            options[key] = value
    return options


def _read_sliding_window(hf: Mapping[str, Any], fields: Mapping[str, Any], refused: _Refusals) -> int | None:
    """The window, or None when all layers see everything; `layer_types` may repeat what the other keys say."""
    window = fields["sliding_window"] if refused.read(hf, "use_sliding_window", bool, False) else None
    everywhere = "full_attention" if window is None else "sliding_attention"
    layer_types = hf.get("layer_types")
    if layer_types is not None and layer_types != [everywhere] * fields["num_hidden_layers"]:
        refused.add("layer_types", layer_types, f"the sliding window's keys ask for {everywhere!r} in every layer")
    return window


def keys_of(config: ModelConfig, keys: Iterable[ConfigKey], spelling: Spelling) -> dict[str, Any]:
    """The keys of a config.json in the given spelling: the inverse of `fields_of`."""
    values = config.to_dict() | {"torch_dtype": config.dtype, "mlp_only_layers": list(config.mlp_only_layers)}
    written = {key.named(spelling): values[key.name] for key in keys}
    written["use_sliding_window"] = config.sliding_window is not None
    rope = dataclasses.asdict(config.rope)
    options = {key: rope[key] for key in _ROPE_KEYS[config.rope.rope_type] if rope[key] is not None}
    if spelling == "transformers-5":
        theta_and_type = {"rope_theta": config.rope.theta, "rope_type": config.rope.rope_type}
        return written | {"rope_parameters": theta_and_type | options}
    scaling = None if config.rope.rope_type == "default" else {"rope_type": config.rope.rope_type} | options
    return written | {"rope_theta": config.rope.theta, "rope_scaling": scaling}
