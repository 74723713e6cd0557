"""Which configuration a kernel runs with: the one measured to be best for its shapes on this GPU, else its own choice.

The measured ones are in tuning.toml beside this file, which `tools/tune_kernels.py` writes. They are looked up while a
program is traced, so they change no program for shapes, dtypes or GPUs that are not in it.
"""

import dataclasses
import functools
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax

TABLE = Path(__file__).with_name("tuning.toml")
HEADING = """\
# Configurations of kernels that were measured to be at least 2 % faster than the kernels' own choice.
# kernels_pallas/tuning.py reads this file; python -m tools.tune_kernels --write writes it.
"""
TYPES = {"kernel": str, "gpu": str, "dtype": str, "shape": dict, "config": dict, "us": float, "heuristic_us": float}


@dataclasses.dataclass(frozen=True)
class Key:
    """A kernel, the dtype of its weights, and the static sizes that its configuration may depend on, by name."""

    kernel: str
    dtype: str
    shape: tuple[tuple[str, int], ...]


def key(kernel: str, dtype, **shape: int | None) -> Key:
    """Of sizes, of which those that are None are left out."""
    return Key(kernel, dtype.name, tuple(sorted((name, size) for name, size in shape.items() if size is not None)))


@dataclasses.dataclass(frozen=True)
class Entry:
    """A configuration for a key on a kind of GPU, and the microseconds of a call with it and with the kernel's own."""

    key: Key
    gpu: str
    config: Mapping[str, int]
    us: float
    heuristic_us: float

    def made[C](self, config_type: type[C]) -> C:
        """The kernel's configuration. Raises RuntimeError, with the values, if it can have no such one."""
        names = [field.name for field in dataclasses.fields(config_type)]  # pyright: ignore[reportArgumentType]
        problem = None if sorted(self.config) == sorted(names) else f"its fields are {', '.join(names)}"
        if problem is None:
            try:
                return config_type(**self.config)
            except ValueError as error:
                problem = str(error)
        raise RuntimeError(
            f"tuning table: {self.key.kernel} for {dict(self.key.shape)} {self.key.dtype} on {self.gpu} cannot have "
            f"config {dict(self.config)}: {problem}; remove the entry, or tune again"
        )


def configured[C](key: Key, heuristic: C) -> C:
    """The table's configuration for `key` on the default device, else `heuristic`.

    Raises RuntimeError for a table that cannot be read, or a configuration that the kernel cannot have.
    """
    entry = _by_gpu_and_key(TABLE).get((device_kind(), key))
    return heuristic if entry is None else entry.made(type(heuristic))


def device_kind() -> str:
    return jax.devices()[0].device_kind


@functools.cache
def _by_gpu_and_key(path: Path) -> Mapping[tuple[str, Key], Entry]:
    return {(entry.gpu, entry.key): entry for entry in read(path)}


def read(path: Path) -> list[Entry]:
    """The entries of a table. Raises RuntimeError for a malformed one, or for two entries of one key."""
    try:
        rows = tomllib.loads(path.read_text(encoding="utf-8")).get("entry", [])
    except (OSError, ValueError) as error:
        raise RuntimeError(f"tuning table {path}: cannot be read: {error}") from error
    entries = [_entry(row, f"tuning table {path}: entry {number}") for number, row in enumerate(rows, start=1)]
    places = [(entry.gpu, entry.key) for entry in entries]
    for place in places:
        if places.count(place) > 1:
            raise RuntimeError(f"tuning table {path}: more than one entry for {place}; remove all but one")
    return entries


def _entry(row: Mapping[str, Any], what: str) -> Entry:
    """Raises RuntimeError, which begins with `what`."""
    if {name: type(value) for name, value in row.items()} != TYPES:
        expected = ", ".join(f"{name} ({kind.__name__})" for name, kind in TYPES.items())
        raise RuntimeError(f"{what} is {dict(row)}; expected {expected}, and nothing else")
    for name in ("shape", "config"):
        if any(type(value) is not int for value in row[name].values()):
            raise RuntimeError(f"{what} has {name} {row[name]}; expected whole numbers")
    shape = tuple(sorted(row["shape"].items()))
    return Entry(Key(row["kernel"], row["dtype"], shape), row["gpu"], row["config"], row["us"], row["heuristic_us"])


def text(entries: Iterable[Entry]) -> str:
    """A table's text, which `read` takes, in the order of kernels, GPUs, dtypes and shapes."""

    def place(entry: Entry) -> tuple:
        return entry.key.kernel, entry.gpu, entry.key.dtype, entry.key.shape

    return "\n".join([HEADING, *map(_text, sorted(entries, key=place))])


def _text(entry: Entry) -> str:
    """TOML of one entry."""
    strings = {"kernel": entry.key.kernel, "gpu": entry.gpu, "dtype": entry.key.dtype}
    tables = {"shape": entry.key.shape, "config": entry.config.items()}
    lines = [f'{name} = "{value}"' for name, value in strings.items()]
    for name, pairs in tables.items():
        lines.append(f"{name} = {{ {', '.join(f'{field} = {number}' for field, number in pairs)} }}")
    lines += [f"us = {entry.us:.2f}", f"heuristic_us = {entry.heuristic_us:.2f}"]
    return "\n".join(["[[entry]]", *lines, ""])
