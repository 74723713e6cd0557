"""The rows of `tools.bench_speculative`: a way to decode, and the figures of a run of it."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jmoe.config import DraftPolicy, Missing
from jmoe.stats import GenerationStats

COLUMNS = (
    ("way", "{}"),
    ("batch", "{}"),
    ("slots", "{}"),
    ("γ", "{}"),
    ("N", "{}"),
    ("policy", "{}"),
    ("tokens/s", "{:.1f}"),
    ("ms/step", "{:.2f}"),
    ("acceptance", "{:.3f}"),
    ("tokens/step", "{:.2f}"),
    ("experts", "{:.1f}"),
    ("hit rate", "{:.3f}"),
    ("MB/token", "{:.2f}"),
    ("speed", "{:.2f}"),
    ("compile s", "{:.1f}"),
)


@dataclasses.dataclass(frozen=True)
class Way:
    """One way to decode a batch; `draft` is a number of tokens or "auto", `experts` those that draft (None: all)."""

    name: str
    batch: int
    slots: int
    draft: str | int = "off"
    experts: int | None = None
    policy: DraftPolicy = "hot"
    missing: Missing = "reroute"


def heading() -> str:
    """The names of the columns."""
    return "  ".join(name.rjust(11) for name, _ in COLUMNS)


def line_of(row: Mapping[str, Any]) -> str:
    """A row below its heading; a dash for what it does not have."""
    cells = ["-" if row[name] is None else form.format(row[name]) for name, form in COLUMNS]
    return "  ".join(cell.rjust(11) for cell in cells)


def row_of(way: Way, stats: GenerationStats, num_layers: int) -> dict[str, Any]:
    """The figures of a run."""
    drafts, asked = stats.drafts, stats.decode.hits + stats.decode.misses
    cycles = drafts.cycles if drafts and drafts.cycles.num_steps else None
    steps = max(1, stats.num_decode_steps)
    if drafts is None:
        per_sequence = stats.num_decode_tokens / steps / way.batch
    else:
        per_sequence = stats.num_decode_tokens / sum(calls.num_verifications for calls in drafts.calls)
    return {
        **dataclasses.asdict(way),
        "way": way.name,
        "γ": None if way.draft == "off" else way.draft,
        "N": None if way.draft == "off" else way.experts or way.slots,
        "policy": None if way.draft == "off" else f"{way.policy}, {way.missing}",
        "tokens/s": stats.tokens_per_s,
        "ms/step": stats.ms_per_step,
        "acceptance": cycles.acceptance_rate if cycles else None,
        "tokens/step": per_sequence,
        "experts": asked / steps / num_layers,
        "hit rate": stats.hit_rate,
        "MB/token": stats.bytes_per_token / 1e6,
        "num_tokens": stats.num_decode_tokens,
        "steps_by_draft_tokens": drafts.steps_by_draft_tokens if drafts else None,
    }


def speed_of(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> float | None:
    """Tokens a second over those of the first row of the same batch; None if it is the first."""
    first = next((other for other in rows if other["batch"] == row["batch"] and "skipped" not in other), None)
    return row["tokens/s"] / first["tokens/s"] if first else None


def require_same(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
    """Raises RuntimeError where one of the rows of the same batch has other tokens, as far as both have come."""
    for other in rows:
        if other["batch"] != row["batch"] or "skipped" in other:
            continue
        pairs = zip(row["tokens"], other["tokens"], strict=True)
        if any(a[: len(b)] != b[: len(a)] for a, b in pairs):
            raise RuntimeError(f"{row['name']} gives other tokens than {other['name']} did. Please report it.")
