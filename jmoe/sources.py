"""Where a model comes from: from what the user names to a directory that jmoe can load.

Hugging Face checkpoints are converted once, into the cache directory, and found there the next time.
"""

import contextlib
import fcntl
import hashlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from jmoe import checkpoint, convert
from jmoe.checkpoint import Progress
from jmoe.config import ModelConfig
from jmoe.hf_files import read_json
from jmoe.model.families import read_hf_config

Announce = Callable[[str], None]

DEMO = Path(__file__).parent / "demo"  # a Hugging Face checkpoint that comes with jmoe; made by tools/train_demo.py
_DOWNLOADED = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model")  # no pickles, no code
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_ELSEWHERE = "Or download it elsewhere and name the directory: --model DIRECTORY."


def cache_dir() -> Path:
    """Where jmoe keeps what it can make again: $JMOE_CACHE, else $XDG_CACHE_HOME/jmoe, else ~/.cache/jmoe."""
    if chosen := os.environ.get("JMOE_CACHE"):
        return Path(chosen).expanduser().absolute()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared).expanduser().absolute() / "jmoe"
    return Path.home() / ".cache" / "jmoe"


def resolve(
    model: str | Path | None,
    *,
    dtype: str | None = None,
    progress: Progress | None = None,
    announce: Announce | None = None,
    prepare: Callable[[ModelConfig], None] | None = None,
) -> Path:
    """The jmoe checkpoint directory of a model, which is converted or downloaded where that is needed.

    `model` is a jmoe checkpoint (taken as it is), a Hugging Face directory (converted once, to `dtype` if given), a
    hub id "organisation/name" (downloaded first), or None: the demo model. `announce` gets a line for
    whatever takes time or disk. `prepare` gets the configuration before anything is converted, since converting starts
    JAX, which reads its settings only then. Raises ValueError for a path without a usable checkpoint, RuntimeError if
    the download fails or the disk is full.
    """
    say, prepare = announce or (lambda line: None), prepare or (lambda config: None)
    if model is None:
        say(f"no --model: the demo model that comes with jmoe; it writes what looks like Python ({DEMO / 'README.md'})")
    path = Path(DEMO if model is None else model).expanduser()
    if not path.exists():
        path = _download(str(model), say) if _HUB_ID.fullmatch(str(model)) else _refuse_missing(path)
    if checkpoint.is_checkpoint(path):
        prepare(checkpoint.read_config(path))
        return path
    _require_hugging_face(path)
    prepare(read_hf_config(read_json(path / "config.json"), str(path / "config.json"), dtype))
    return _converted(path, dtype, progress, say)


def _refuse_missing(path: Path) -> Path:
    partial = checkpoint.incomplete_path(path)
    hint = f" {partial} is what an interrupted conversion left; run it again." if partial.exists() else ""
    raise ValueError(f"{path}: no such directory; expected a checkpoint directory or a hub id organisation/name.{hint}")


def _require_hugging_face(path: Path) -> None:
    """Raises ValueError, saying what is there instead, unless this looks like a Hugging Face checkpoint."""
    if not path.is_dir():
        raise ValueError(f"{path}: a file; expected the directory of a checkpoint. Name the directory that it is in.")
    names = sorted(entry.name for entry in path.iterdir())
    pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth"))]
    if not names:
        raise ValueError(f"{path}: an empty directory; expected a checkpoint (config.json and *.safetensors).")
    if pickles and not any(name.endswith(".safetensors") for name in names):
        raise ValueError(
            f"{path}: only {checkpoint.some_of(pickles, 3)}; jmoe reads safetensors alone, since unpickling can run "
            "any code. Download the model's safetensors files."
        )
    if "config.json" not in names:
        raise ValueError(
            f"{path}: neither a jmoe checkpoint (no {checkpoint.MANIFEST}) nor a Hugging Face one (no config.json); "
            f"it holds {checkpoint.some_of(names, 5)}. Name the directory of a checkpoint."
        )


def _converted(source: Path, dtype: str | None, progress: Progress | None, say: Announce) -> Path:
    """The conversion of a Hugging Face directory, in the cache; made now if it is not there or the files changed."""
    destination = cache_dir() / "checkpoints" / f"{source.absolute().name}-{_key(source, dtype)}"
    with _lock(destination):
        if checkpoint.is_checkpoint(destination):
            say(f"{source}: converted before, to {destination}")
        else:
            say(f"{source}: a Hugging Face checkpoint; converting it, this once, to {destination}")
            convert.convert_hf(source, destination, dtype=dtype, progress=progress)
    return destination


def _key(source: Path, dtype: str | None) -> str:
    """Changes with the directory, the names, sizes and times of its files, and the dtype."""
    files = sorted(entry for entry in source.iterdir() if entry.is_file())
    lines = [f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files]
    return hashlib.sha256("\n".join([str(source.absolute()), str(dtype), *lines]).encode()).hexdigest()[:16]


@contextlib.contextmanager
def _lock(destination: Path) -> Iterator[None]:
    """Lets one process at a time make `destination`; the others wait, and find it made."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    with destination.with_name(destination.name + ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _download(hub_id: str, say: Announce) -> Path:
    import huggingface_hub  # slow to import, and most runs need none of it

    say(f"{hub_id}: no such directory here, so it is downloaded from the Hugging Face hub")
    try:
        return Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=list(_DOWNLOADED)))
    except Exception as error:  # the hub's own kinds, the network's, the disk's
        raise RuntimeError(f"{hub_id}: no such directory, and {_why_no_download(error)} {_ELSEWHERE}") from error


def _why_no_download(error: Exception) -> str:
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return "the hub's repository of that name is gated. Accept its terms there and log in: hf auth login."
    if isinstance(error, errors.RepositoryNotFoundError):
        return "the hub has no repository of that name (or it is private). Check the name, or log in: hf auth login."
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"the download from the Hugging Face hub failed ({type(error).__name__}: {reason}). Check the network."
