"""Traces: which experts the tokens of some requests went to, in the order in which they were computed, and in a file.

The file is a compressed npz, without pickles: `header`, a string of JSON (format, version, num_experts, moe_layers,
fingerprint, model), and beside it the arrays of `Trace` by their names.
"""

import dataclasses
import json
import zipfile
import zlib
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from jmoe.config import ModelConfig
from jmoe.whole_files import new_file

FORMAT, VERSION = "jmoe trace", 1
_ARRAYS = ("expert_ids", "combine_weights", "request", "position", "step", "is_prefill")
_FACTS = ("num_experts", "moe_layers", "fingerprint", "model")
_AGAIN = "Record it again with python -m tools.record_trace."


@dataclasses.dataclass(frozen=True, eq=False)
class Trace:
    """The routing of N computed tokens, a row each: A experts in each of L MoE layers, of E.

    `position` is the token's in its sequence. Rows with the same `step`, which ascends, were computed together: a token
    of each sequence that decoded, or a chunk of prompts. `fingerprint` is the checkpoint's ("" if unknown), `model` a
    name for people. Arrays take the narrowest dtypes: expert ids uint8, or uint16 if E > 256; combine weights float16;
    the others int32 and bool. Raises ValueError for arrays that do not fit together.
    """

    expert_ids: np.ndarray  # [N, L, A]
    combine_weights: np.ndarray  # [N, L, A]
    request: np.ndarray  # [N]
    position: np.ndarray  # [N]
    step: np.ndarray  # [N]
    is_prefill: np.ndarray  # [N]
    num_experts: int
    moe_layers: tuple[int, ...]  # which decoder layers the L are
    fingerprint: str = ""
    model: str = ""

    def __post_init__(self) -> None:
        self._require_fit()
        ids = np.uint8 if self.num_experts <= 256 else np.uint16
        for name, dtype in zip(_ARRAYS, (ids, np.float16, np.int32, np.int32, np.int32, bool), strict=True):
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtype))
        object.__setattr__(self, "moe_layers", tuple(int(layer) for layer in self.moe_layers))

    def _require_fit(self) -> None:
        ids, num_layers = np.asarray(self.expert_ids), len(self.moe_layers)
        if ids.ndim != 3 or ids.shape[1] != num_layers or not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(f"expert_ids {ids.dtype}{list(ids.shape)}; expected integers [N, {num_layers}, A]")
        if ids.size and not 0 <= ids.min() <= ids.max() < self.num_experts:
            raise ValueError(
                f"expert_ids are in {ids.min()}..{ids.max()}, but there are {self.num_experts} experts: expected "
                f"0..{self.num_experts - 1}; leave out rows that are no token"
            )
        shapes = dict.fromkeys(_ARRAYS, ids.shape[:1]) | {"expert_ids": ids.shape, "combine_weights": ids.shape}
        for name, shape in shapes.items():
            if np.shape(getattr(self, name)) != shape:
                raise ValueError(f"{name} of shape {list(np.shape(getattr(self, name)))}; expected {list(shape)}")
        if np.any(np.diff(np.asarray(self.step, np.int64)) < 0):
            raise ValueError("step descends; expected rows in the order in which they were computed")

    def __len__(self) -> int:
        """The number of rows, N."""
        return len(self.request)

    @property
    def requests(self) -> np.ndarray:
        """The numbers of the requests, ascending."""
        return np.unique(self.request)

    def needed(self, *, prefill: bool) -> np.ndarray:
        """Which distinct experts each step of this kind asks for, [S, L, E] bool, in the order of the steps."""
        rows = self.is_prefill == prefill
        steps, at = np.unique(self.step[rows], return_inverse=True)
        needed = np.zeros((len(steps), len(self.moe_layers), self.num_experts), bool)
        needed[at[:, None, None], np.arange(len(self.moe_layers))[:, None], self.expert_ids[rows]] = True
        return needed

    def sequences(self, *, prefill: bool | None = None) -> list[np.ndarray]:
        """Expert ids [T, L, A] of each request of `requests`, by position: what `jmoe.routing_stats` takes.

        Only of prompts, or only of decoded tokens, if `prefill` says so; T is 0 where a request has none of the kind.
        """
        rows = self._by_position(prefill)
        ends = np.searchsorted(self.request[rows], self.requests, side="right")
        return np.split(self.expert_ids[rows], ends[:-1]) if ends.size else []

    def only(self, requests: Collection[int]) -> Self:
        """The rows of these requests; numbers stay. Raises ValueError for a request that is not there."""
        if absent := sorted(set(requests) - set(self.requests.tolist())):
            raise ValueError(f"no requests {absent[:5]} in this trace; it has {_span(self.requests)}")
        return self._take(np.flatnonzero(np.isin(self.request, list(requests))))

    def rebatched(self, batch_size: int) -> Self:
        """The decoded tokens as if the first `batch_size` requests had been one batch, the next the one after, ….

        The n-th step of a batch has the n-th decoded token of each of its requests. Which tokens come does not depend
        on what is beside them, so this is what such a run would have recorded, prompts apart. Raises ValueError for a
        `batch_size` less than 1.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1")
        rows = self._by_position(prefill=False)
        number = np.searchsorted(self.requests, self.request[rows])  # 0, 1, … whatever they are called
        nth = np.arange(rows.size) - np.searchsorted(number, number, side="left")
        batch = number // batch_size
        order = np.lexsort((number, nth, batch))
        moments = batch.astype(np.int64) * (rows.size + 1) + nth
        steps = np.unique(moments[order], return_inverse=True)[1]
        return self._take(rows[order], step=steps)

    @classmethod
    def concatenate(cls, traces: Sequence["Trace"]) -> Self:
        """One after another, their requests and steps numbered on. Raises ValueError for none, or of several models."""
        if not traces:
            raise ValueError("no traces to concatenate; give at least one")
        facts = [{name: getattr(trace, name) for name in _FACTS} | {"A": trace.expert_ids.shape[2]} for trace in traces]
        for other in facts[1:]:
            if differing := [name for name in other if other[name] != facts[0][name]]:
                pair = ", ".join(f"{name} {facts[0][name]!r} and {other[name]!r}" for name in differing)
                raise ValueError(f"traces of different models: {pair}; expected traces of one")
        columns = {name: np.concatenate([getattr(trace, name) for trace in traces]) for name in _ARRAYS}
        for name in ("request", "step"):
            starts = np.cumsum([0, *(getattr(trace, name).max(initial=-1) + 1 for trace in traces[:-1])])
            columns[name] = columns[name] + np.repeat(starts, [len(trace) for trace in traces])
        return cls(**columns, **{name: getattr(traces[0], name) for name in _FACTS})

    def save(self, path: str | Path) -> None:
        """Writes the file, whole or not at all; one that is there is replaced."""
        path = Path(path)
        header = {"format": FORMAT, "version": VERSION} | {name: getattr(self, name) for name in _FACTS}
        with new_file(path) as scratch, scratch.open("wb") as file:
            np.savez_compressed(file, header=json.dumps(header), **{name: getattr(self, name) for name in _ARRAYS})

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """What `save` wrote. Raises ValueError where no trace is, RuntimeError for one that cannot be used."""
        path = Path(path)
        content = _read_npz(path)
        header = _header(content, path)
        if header.get("version") != VERSION:
            raise RuntimeError(
                f"{path}: format version {header.get('version')}, but this jmoe reads version {VERSION}. "
                f"Update jmoe, or: {_AGAIN}"
            )
        try:
            return cls(**{name: content[name] for name in _ARRAYS}, **{name: header[name] for name in _FACTS})
        except (KeyError, TypeError, ValueError) as error:
            raise RuntimeError(f"{path}: damaged ({type(error).__name__}: {error}). {_AGAIN}") from error

    def _take(self, rows: np.ndarray, **changes: np.ndarray) -> Self:
        return dataclasses.replace(self, **{name: getattr(self, name)[rows] for name in _ARRAYS} | changes)

    def _by_position(self, prefill: bool | None) -> np.ndarray:
        """Rows of this kind (None: all), request by request, in the order of positions."""
        of_kind = np.ones(len(self), bool) if prefill is None else self.is_prefill == prefill
        rows = np.flatnonzero(of_kind)
        return rows[np.lexsort((self.position[rows], self.request[rows]))]


class Recording:
    """Takes in what steps routed as they go, and makes a `Trace` of it."""

    def __init__(self, config: ModelConfig, fingerprint: str = ""):
        self._config, self._fingerprint = config, fingerprint
        self._num_steps = 0
        self._num_tokens: Counter[int] = Counter()  # of each request so far, and so the position of its next one
        shape = 0, len(config.moe_layers), config.num_experts_per_tok
        nothing = dict.fromkeys(_ARRAYS[2:], np.zeros(0, np.int32))
        self._parts = [{"expert_ids": np.zeros(shape, np.int32), "combine_weights": np.zeros(shape)} | nothing]

    def add(
        self, expert_ids: np.ndarray, combine_weights: np.ndarray, requests: Sequence[int], *, is_prefill: bool
    ) -> None:
        """The next n steps, of T tokens of each request: [n, L, B, T, A]; expert id E marks what is no token."""
        rows = np.moveaxis(expert_ids, 1, 3)  # [n, B, T, L, A]
        real = rows[..., 0, 0] < self._config.num_experts  # [n, B, T]
        position = np.zeros(real.shape, np.int64)
        for b, request in enumerate(requests):
            position[:, b] = self._num_tokens[request] + np.cumsum(real[:, b]).reshape(real[:, b].shape) - 1
            self._num_tokens[request] += int(real[:, b].sum())
        step = self._num_steps + np.arange(len(real))
        self._num_steps += len(real)
        self._parts.append(
            {
                "expert_ids": rows[real],
                "combine_weights": np.moveaxis(combine_weights, 1, 3)[real],
                "request": np.broadcast_to(np.asarray(requests)[:, None], real.shape)[real],
                "position": position[real],
                "step": np.broadcast_to(step[:, None, None], real.shape)[real],
                "is_prefill": np.full(int(real.sum()), is_prefill),
            }
        )

    def trace(self) -> Trace:
        """Of all that was taken in so far."""
        columns: dict[str, Any] = {name: np.concatenate([part[name] for part in self._parts]) for name in _ARRAYS}
        config = self._config
        return Trace(
            **columns, num_experts=config.num_experts, moe_layers=config.moe_layers, fingerprint=self._fingerprint
        )


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected a trace, as tools.record_trace writes it")
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            raise ValueError(f"{path}: not a trace (no npz file); expected what tools.record_trace writes")
        file.seek(0)
        try:
            with np.load(file, allow_pickle=False) as arrays:
                return dict(arrays)
        except (zipfile.BadZipFile, zlib.error, ValueError, EOFError, OSError, KeyError) as error:
            raise RuntimeError(f"{path}: damaged, it cannot be read ({error}). {_AGAIN}") from error


def _header(content: dict[str, np.ndarray], path: Path) -> dict[str, Any]:
    """Raises ValueError unless it is a trace's."""
    try:
        header = json.loads(str(content["header"]))
    except (KeyError, ValueError):
        header = None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        held = ", ".join(sorted(content)[:5])
        raise ValueError(f"{path}: not a trace (an npz file of {held}); expected what tools.record_trace writes")
    return header


def _span(requests: np.ndarray) -> str:
    return f"{len(requests)} in {requests[0]}..{requests[-1]}" if len(requests) else "none"
