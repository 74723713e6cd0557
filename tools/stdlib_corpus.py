"""Python's standard library as text to train on, and the fixed part of it that is held out."""

import sysconfig
from collections.abc import Iterator
from pathlib import Path

HELD_OUT = Path(__file__).parent.parent / "configs" / "training" / "stdlib_held_out.txt"
_LEFT_OUT = {"site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data"}  # tables and prose; not ours


def stdlib_root() -> Path:
    """Where the running interpreter keeps its standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def read_files(root: Path, *, held_out: bool) -> dict[str, str]:
    """Text by path below `root`, in order: the held-out files, or all the others, each text once.

    Files that are not UTF-8 are left out. Raises ValueError if `root` has no such file.
    """
    entries = _held_out_entries()
    seen: set[str] = set()
    texts = {}
    for path, text in _python_files(root):
        if text in seen:
            continue
        seen.add(text)
        if _is_held_out(path, entries) == held_out:
            texts[path] = text
    if not texts:
        raise ValueError(f"{root}: no {'held-out ' * held_out}Python file of the standard library; expected its root")
    return texts


def _held_out_entries() -> list[str]:
    lines = HELD_OUT.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def _is_held_out(path: str, entries: list[str]) -> bool:
    return any(path == entry or (entry.endswith("/") and path.startswith(entry)) for entry in entries)


def _python_files(root: Path) -> Iterator[tuple[str, str]]:
    for file in sorted(root.rglob("*.py")):
        parts = file.relative_to(root).parts
        if _LEFT_OUT.intersection(parts):
            continue
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            yield "/".join(parts), text
