"""What the model is (`ModelConfig`) and how this machine runs it (`RuntimeConfig`). Never mixed.

Both are frozen and validated where they are made; both can be read from TOML (configs/models, configs/runtime), where
an unknown key is an error.
"""

import dataclasses
import math
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self, get_args

DTYPES = ("float32", "bfloat16", "float16")
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
RESIDENCY_POLICIES = ("lru", "lru2", "lfu", "lfru", "activation", "reuse")
DraftPolicy = Literal["hot", "hot_temporal", "hot_global", "frozen", "random", "resident"]  # see `jmoe.experts.draft`
Missing = Literal["reroute", "substitute", "drop"]
Prefetching = Literal["auto", "off", "lookahead", "activation", "both"]
MOST_PREFETCHED = 4  # experts of a layer
ROPE_TYPES = ("default", "linear", "dynamic", "yarn")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _from_mapping[T](cls: type[T], values: Mapping[str, Any], source: str) -> T:
    known = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(values) - known)
    _require(
        not unknown,
        f"{source}: unknown key {', '.join(unknown)}; {cls.__name__} knows {', '.join(sorted(known))}. "
        "Remove it or correct its spelling.",
    )
    try:
        return cls(**values)
    except TypeError as error:
        raise ValueError(f"{source}: {error}") from error


def read_toml[T](cls: type[T], path: str | Path) -> T:
    """An object of this dataclass from TOML. Raises ValueError for what is malformed, unknown or out of range."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected a TOML configuration (see configs/)")
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid TOML: {error}. Mend the file at that place.") from error
    return _from_mapping(cls, values, str(path))


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding. `rope_type` decides which of the other fields are read (YaRN: arXiv 2309.00071)."""

    rope_type: str = "default"
    theta: float = 10000.0
    factor: float | None = None
    original_max_position_embeddings: int | None = None
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        _require(
            self.rope_type in ROPE_TYPES,
            f"rope_type={self.rope_type!r} is not supported; expected one of {', '.join(ROPE_TYPES)}",
        )
        _require(self.theta > 0, f"rope theta={self.theta} must be positive")
        needs_factor = self.rope_type in ("linear", "dynamic")
        _require(not (needs_factor and self.factor is None), f"rope_type={self.rope_type!r} needs a factor")
        _require(self.factor is None or self.factor >= 1, f"rope factor={self.factor} must be at least 1")

    @property
    def scale(self) -> float:
        """The factor; 1 where there is none."""
        return 1.0 if self.factor is None else self.factor


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Architecture of a checkpoint, in Hugging Face's words. Dimension letters are those of `jmoe.shapes`."""

    model_type: str = "qwen3_moe"
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    num_experts: int
    num_experts_per_tok: int
    norm_topk_prob: bool = False
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()
    attention_bias: bool = False
    tie_word_embeddings: bool = False
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 32768
    sliding_window: int | None = None
    rope: RopeConfig = RopeConfig()
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        if isinstance(self.rope, Mapping):
            object.__setattr__(self, "rope", _from_mapping(RopeConfig, self.rope, "rope"))
        object.__setattr__(self, "mlp_only_layers", tuple(self.mlp_only_layers))
        for name in _POSITIVE:
            value = getattr(self, name)
            _require(isinstance(value, int) and value >= 1, f"{name}={value!r} must be a whole number of at least 1")
        _require(
            self.num_experts_per_tok <= self.num_experts,
            f"num_experts_per_tok={self.num_experts_per_tok} must not exceed num_experts={self.num_experts}",
        )
        _require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            f"num_attention_heads={self.num_attention_heads} must be a multiple of "
            f"num_key_value_heads={self.num_key_value_heads}",
        )
        _require(self.head_dim % 2 == 0, f"head_dim={self.head_dim} must be even (rotary embedding)")
        _require(self.dtype in DTYPES, f"dtype={self.dtype!r} is not one of {', '.join(DTYPES)}")
        _require(
            self.sliding_window is None or self.sliding_window >= 1,
            f"sliding_window={self.sliding_window} must be at least 1, or absent",
        )
        outside = [n for n in self.mlp_only_layers if not 0 <= n < self.num_hidden_layers]
        _require(not outside, f"mlp_only_layers={outside} are outside 0..{self.num_hidden_layers - 1}")
        _require(bool(self.moe_layers), "no layer is a mixture of experts; jmoe runs models that have some")

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the layers that are a mixture of experts, ascending."""
        return tuple(
            n
            for n in range(self.num_hidden_layers)
            if n not in self.mlp_only_layers and (n + 1) % self.decoder_sparse_step == 0
        )

    @property
    def expert_shape(self) -> tuple[int, int, int]:
        """[3, F, D] of one expert: gate, up and transposed down projection, all rows of D."""
        return (3, self.moe_intermediate_size, self.hidden_size)

    @property
    def expert_bytes(self) -> int:
        return math.prod(self.expert_shape) * DTYPE_BYTES[self.dtype]

    @property
    def store_bytes(self) -> int:
        """Bytes of every routed expert of the model."""
        return len(self.moe_layers) * self.num_experts * self.expert_bytes

    @classmethod
    def from_toml(cls, path: str | Path) -> Self:
        """Reads configs/models/*.toml. Raises ValueError for a malformed file, an unknown key or a bad value."""
        return read_toml(cls, path)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str) -> Self:
        """The inverse of `to_dict`. Raises ValueError, beginning with `source`, for an unknown key or a bad value."""
        return _from_mapping(cls, values, source)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


_POSITIVE = (
    "vocab_size hidden_size intermediate_size moe_intermediate_size num_hidden_layers num_attention_heads "
    "num_key_value_heads head_dim num_experts num_experts_per_tok decoder_sparse_step max_position_embeddings"
).split()


@dataclasses.dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    """How this machine runs a model. None means: chosen automatically, and said once.

    `expert_slots` is the number of device slots of each MoE layer (num_experts_per_tok … num_experts). Where a layer
    needs more, `staging_slots` experts stream at a time, through twice as many slots that all layers share: some are
    multiplied with while the next ones come. `prefill_chunk` tokens of each prompt are taken in at a time;
    automatically as many as pay, since each chunk streams what is not resident. `device_memory_bytes` and
    `host_memory_bytes` bound what the plan may use. `dtype` overrides the checkpoint's. `implementation` "reference"
    runs plain JAX instead of the kernels. `decode_chunk` is the most tokens that one call of the jitted step produces.
    `record_routing` keeps which experts every token went to, see `Generation.trace`. `profiled` lets a profiler see
    every kernel, which takes a little speed: a call of a step waits for the one before, each turn of its loops for the
    host. `residency_policy` names what decides which experts keep their slots (docs/residency.md).

    `draft` says how many tokens speculative decoding drafts at a time (docs/speculative.md): "off", a number, or
    "auto", which measures what is fastest, `draft_tokens` at most. `draft_experts` of each layer draft, chosen by
    `draft_policy`; None is all that have a slot. `draft_missing` says what becomes of the choice of others.

    `prefetch` brings at most `prefetch_experts` of each layer (0.25: a quarter of one) while its attention runs, those
    that it will most probably miss: as much as comes in time, as long as that saves something (docs/prefetch.md).
    "lookahead" guesses in the layer before, "activation" from past requests, "both" in the layer before, and from past
    requests for the first; "auto" is "lookahead" where the kernels run, nothing is drafted and experts are not
    small, else "off".

    `execute_guess` CHANGES WHAT THE MODEL SAYS: layers whose calibrated recall is this or more decode with guessed
    experts, and not with those that their routers choose (docs/prefetch.md). 0 is every layer but the first.
    """

    expert_slots: int | None = None
    staging_slots: int | None = None
    device_memory_bytes: int | None = None
    host_memory_bytes: int | None = None
    batch_size: int = 1
    max_seq_len: int | None = None
    prefill_chunk: int | None = None
    decode_chunk: int = 32
    dtype: str | None = None
    implementation: str | None = None
    measure_link: bool = True
    record_routing: bool = False
    profiled: bool = False
    residency_policy: str | None = None
    draft: str | int = "off"
    draft_experts: int | None = None
    draft_tokens: int = 4
    draft_policy: DraftPolicy = "hot"
    draft_missing: Missing = "reroute"
    prefetch: Prefetching = "auto"
    prefetch_experts: float = 1.0
    execute_guess: float | None = None

    def __post_init__(self) -> None:
        sizes = "expert_slots staging_slots device_memory_bytes host_memory_bytes max_seq_len prefill_chunk".split()
        for name in sizes:
            value = getattr(self, name)
            _require(value is None or (isinstance(value, int) and value >= 1), f"{name}={value!r} must be at least 1")
        for name in ("batch_size", "decode_chunk"):
            value = getattr(self, name)
            _require(isinstance(value, int) and value >= 1, f"{name}={value!r} must be a whole number of at least 1")
        _require(
            self.implementation in (None, "reference"),
            f'implementation={self.implementation!r} must be "reference", or absent for the fastest that runs here',
        )
        _require(self.dtype is None or self.dtype in DTYPES, f"dtype={self.dtype!r} is not one of {', '.join(DTYPES)}")
        _require(
            self.residency_policy is None or self.residency_policy in RESIDENCY_POLICIES,
            f"residency_policy={self.residency_policy!r} is not one of {', '.join(RESIDENCY_POLICIES)}; "
            "choose one of them, or leave it out for the best",
        )
        self._check_draft()
        self._check_prefetch()
        self._check_execute_guess()

    def _check_draft(self) -> None:
        number, experts = self.draft, self.draft_experts
        _require(
            _is_count(number) or number in ("off", "auto"),
            f'draft={number!r} must be "off", "auto", or how many tokens to draft at a time, at least 1',
        )
        _require(experts is None or _is_count(experts), f"draft_experts={experts!r} must be at least 1")
        _require(_is_count(self.draft_tokens), f"draft_tokens={self.draft_tokens!r} must be at least 1")
        for name, kinds in (("draft_policy", get_args(DraftPolicy)), ("draft_missing", get_args(Missing))):
            value = getattr(self, name)
            _require(value in kinds, f"{name}={value!r} is not one of {', '.join(kinds)}")
        _require(
            number == "off" or not self.record_routing,
            f"record_routing=True does not go with draft={number!r}: routing is recorded of plain steps; "
            'choose draft="off"',
        )

    def _check_prefetch(self) -> None:
        kind, amount = self.prefetch, self.prefetch_experts
        kinds = get_args(Prefetching)
        _require(kind in kinds, f"prefetch={kind!r} is not one of {', '.join(kinds)}")
        is_number = isinstance(amount, int | float) and not isinstance(amount, bool)
        _require(
            is_number and 0 < amount <= MOST_PREFETCHED,
            f"prefetch_experts={amount!r} must be a number of experts a layer, above 0 and at most {MOST_PREFETCHED}",
        )
        _require(
            kind in ("auto", "off") or self.draft == "off",
            f"prefetch={kind!r} does not go with draft={self.draft!r}: what drafts is resident, and a verification "
            'asks for more experts than a prefetch brings; choose draft="off" or prefetch="off"',
        )

    def _check_execute_guess(self) -> None:
        gate = self.execute_guess
        if gate is None:
            return
        is_number = isinstance(gate, int | float) and not isinstance(gate, bool)
        _require(
            is_number and 0 <= gate <= 1,
            f"execute_guess={gate!r} must be a recall from 0 (every layer but the first guesses) to 1",
        )
        _require(
            self.draft == "off",
            f"execute_guess={gate!r} does not go with draft={self.draft!r}: a verification promises the tokens of the "
            'true routers, and guesses change them; choose draft="off", or leave execute_guess out',
        )
        _require(
            self.prefetch != "activation",
            f"execute_guess={gate!r} does not go with prefetch='activation': what is computed was guessed by looking "
            'ahead, so that is known to come; choose prefetch="both" or "lookahead", or leave execute_guess out',
        )

    @property
    def most_prefetched(self) -> int:
        """The most experts of a layer that a prefetch brings, whole or not; 0 without one, and for "auto" as it is."""
        return math.ceil(self.prefetch_experts) if self.looks_ahead or self.recalls_requests else 0

    @property
    def looks_ahead(self) -> bool:
        """Whether a prefetch goes by what the layer before guesses."""
        return self.prefetch in ("lookahead", "both")

    @property
    def recalls_requests(self) -> bool:
        """Whether a prefetch goes by what past requests used."""
        return self.prefetch in ("activation", "both")

    @property
    def most_draft_tokens(self) -> int:
        """The most tokens that are drafted at a time; 0 without drafts."""
        if isinstance(self.draft, int):
            return self.draft
        return self.draft_tokens if self.draft == "auto" else 0

    @classmethod
    def from_toml(cls, path: str | Path) -> Self:
        """Reads configs/runtime/*.toml. Raises ValueError for a malformed file, an unknown key or a bad value."""
        return read_toml(cls, path)
