"""Compiled steps, kept from one start to the next: what was compiled before is neither traced nor lowered again.

XLA's own cache has to be asked with the lowered program, and to trace and lower the steps of a model of many layers
takes longer than to compile them.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import os
import pickle
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
from jax.experimental import serialize_executable

from jmoe.decoding.compiled import Call
from jmoe.whole_files import new_file
from kernels_pallas import backends

MOST_FILES = 128  # the oldest go; each is some megabytes


class Programs:
    """Runs jitted steps; with a directory, by executables that lie there, or then will.

    A file goes by everything that may change what is compiled: the steps, shapes, sources, versions, device and flags.
    It is a pickle, so the directory must be one's own. `announce` is told of files that cannot be used or written.
    """

    def __init__(self, directory: Path | None = None, announce: Callable[[str], None] = lambda line: None):
        self._directory, self._announce = directory, announce
        self._made: dict[Hashable, Callable] = {}

    def __call__(self, call: Call) -> Any:
        """What the step returns."""
        if self._directory is None:
            return call.run()
        key = call.key
        if key not in self._made:
            with self.making([call]):
                pass  # nothing else is to be done
        return self._made[key](*call.args)

    @contextlib.contextmanager
    def making(self, calls: Sequence[Call]) -> Iterator[None]:
        """Loads or compiles what these calls need, side by side and beside what is done meanwhile; runs nothing.

        What takes longest should be first. Without a directory a step is compiled when it first runs.
        """
        directory, missing = self._directory, {call.key: call for call in calls if call.key not in self._made}
        if directory is None or not missing:
            yield
            return
        with ThreadPoolExecutor(len(missing)) as threads:
            made = {key: threads.submit(self._begin(directory, call)) for key, call in missing.items()}
            yield
        self._made |= {key: program.result() for key, program in made.items()}
        _keep_newest(directory)

    def _begin(self, directory: Path, call: Call) -> Callable[[], Callable]:
        """What loads the step or compiles it.

        Steps are lowered here and now, one after the other: that is Python, and so the first of them comes soonest to
        XLA, which compiles without Python's lock.
        """
        file = directory / f"{call.name}-{_digest(call)}"
        if file.is_file():
            return lambda: self._loaded(file) or self._compiled(call.lower(), file)
        lowered = call.lower()
        return lambda: self._compiled(lowered, file)

    def _loaded(self, file: Path) -> Callable | None:
        try:
            program = serialize_executable.deserialize_and_load(*pickle.loads(file.read_bytes()))
            os.utime(file)
            return program
        except Exception as error:  # whatever a damaged pickle, or XLA, may raise
            self._announce(f"{file} cannot be used, compiling again: {type(error).__name__}: {error}")
            return None

    def _compiled(self, lowered: jax.stages.Lowered, file: Path) -> Callable:
        program = lowered.compile()
        try:
            file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with new_file(file) as scratch:
                scratch.write_bytes(pickle.dumps(serialize_executable.serialize(program)))
        except (OSError, ValueError, RuntimeError, NotImplementedError) as error:
            self._announce(f"a compiled step is not kept in {file}: {type(error).__name__}: {error}")
        return program


def _digest(call: Call) -> str:
    """Of everything that the executable depends on."""
    leaves, tree = jax.tree.flatten(call.args)
    shapes = [f"{jax.typeof(leaf)} {getattr(leaf, 'sharding', None)}" for leaf in leaves]
    static = repr(sorted(call.static.items()))
    parts = (*_machine(), _sources(), call.name, repr(call.steps), static, str(tree), *shapes)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def _machine() -> tuple[str, ...]:
    device = jax.devices()[0]
    versions = jax.__version__, importlib.metadata.version("jaxlib"), device.client.platform_version
    settings = os.environ.get("XLA_FLAGS", ""), jax.config.jax_default_matmul_precision, jax.config.jax_enable_x64
    return *versions, str(backends.cudnn_version()), device.device_kind, *map(str, settings)


@functools.cache
def _sources() -> str:
    """A digest of the code that steps are made of, and of the kernels' measured configurations."""
    digest = hashlib.sha256()
    root = Path(__file__).parent.parent
    for package in ("jmoe", "kernels_pallas"):
        for file in sorted(path for suffix in ("py", "toml") for path in (root / package).rglob(f"*.{suffix}")):
            digest.update(f"{file.relative_to(root)}\n".encode() + file.read_bytes())
    return digest.hexdigest()


def _keep_newest(directory: Path) -> None:
    with contextlib.suppress(OSError):  # another process does the same, or nothing was written
        files = sorted(directory.iterdir(), key=lambda file: file.stat().st_mtime, reverse=True)
        for file in files[MOST_FILES:]:
            file.unlink(missing_ok=True)
