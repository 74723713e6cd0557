"""Who may import whom: arrows go down only, as docs/design.md draws them."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# From the top to the bottom. A unit is a module, or a package with all that is in it and has no row of its own. It may
# import itself and every row below its own, but not its neighbours in the row.
ROWS = (
    ("tools",),
    ("jmoe.tune_router",),
    ("jmoe.__main__", "jmoe.generate"),
    ("jmoe",),  # the public names: jmoe/__init__.py alone
    ("jmoe.training",),
    ("jmoe.evaluation",),
    ("jmoe.engine",),
    ("jmoe.decoding", "jmoe.sources"),
    ("jmoe.experts.affinity",),
    ("jmoe.experts.draft",),
    ("jmoe.experts.layer", "jmoe.convert", "jmoe.export", "jmoe.synthetic"),
    ("jmoe.hf_files", "jmoe.router_delta"),
    ("jmoe.checkpoint", "jmoe.memory_plan"),
    ("jmoe.memory", "jmoe.stats", "jmoe.tokenizer", "jmoe.traces"),
    ("jmoe.experts.prefetch",),
    ("jmoe.model", "jmoe.experts"),
    ("kernels_pallas",),
    ("jmoe.shapes", "jmoe.config", "jmoe.routing_stats", "jmoe.whole_files"),
)
PART_OF = {
    "jmoe.announcement": "jmoe.engine",
    "jmoe.batch": "jmoe.engine",
    "jmoe.clock": "jmoe.engine",
    "jmoe.drafting": "jmoe.engine",
    "jmoe.completions": "jmoe.engine",
    "jmoe.executing": "jmoe.engine",
    "jmoe.generation": "jmoe.engine",
    "jmoe.loading": "jmoe.engine",
    "jmoe.prefetching": "jmoe.engine",
    "jmoe.programs": "jmoe.engine",
    "jmoe.prefetch_stats": "jmoe.stats",
    "jmoe.experts.groups": "jmoe.experts.layer",
    "jmoe.experts.waves": "jmoe.experts.layer",
    "jmoe.experts.prefetch_file": "jmoe.experts.prefetch",
    "jmoe.experts.look_ahead": "jmoe.experts.prefetch",
    "jmoe.experts.execute_guess": "jmoe.experts.prefetch",
    "jmoe.arguments": "jmoe.generate",
}  # modules that are one unit with another
RANKS = {unit: rank for rank, row in enumerate(reversed(ROWS)) for unit in row}
OURS = ("jmoe", "kernels_pallas", "tools", "tests")
KERNELS_MAY_IMPORT = {"jax", "jaxlib", "jaxtyping", "kernels_pallas", "numpy", *sys.stdlib_module_names}
JMOE_MAY_NOT_IMPORT = {"tests", "tools", "torch"}
MEMORY_KINDS = {"pinned_host", "unpinned_host"}
MEMORY_WORDS = {"memory_kind", "with_memory_kind"}


def sources() -> dict[str, str]:
    """Source text of every module of jmoe, kernels_pallas and tools, by its dotted name."""
    paths = [path for top in ("jmoe", "kernels_pallas", "tools") for path in sorted((ROOT / top).rglob("*.py"))]
    return {module_name(path): path.read_text(encoding="utf-8") for path in paths}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def unit_of(module: str) -> str | None:
    """The unit that a module belongs to: its nearest listed ancestor, where `jmoe` is an ancestor of nothing."""
    name = module = PART_OF.get(module, module)
    while name and (name not in RANKS or (name == "jmoe" and module != "jmoe")):
        name = name.rpartition(".")[0]
    return name or None


def imported(module: str, tree: ast.Module, modules: set[str]) -> Iterator[str]:
    """Dotted names of the modules that `module` imports, wherever in its text."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = absolute(module, node, is_package=any(other.startswith(f"{module}.") for other in modules))
            for alias in node.names:
                inner = f"{origin}.{alias.name}"
                yield inner if inner in modules or inner in RANKS or inner in PART_OF else origin


def absolute(module: str, node: ast.ImportFrom, *, is_package: bool) -> str:
    if node.level == 0:
        return node.module or ""
    parts = module.split(".")
    keep = len(parts) - node.level + is_package
    return ".".join([*parts[:keep], *([node.module] if node.module else [])])


def import_fault(module: str, target: str) -> str | None:
    """What is wrong with `module` importing `target`; None when nothing is."""
    top = target.partition(".")[0]
    if module.startswith("kernels_pallas") and top not in KERNELS_MAY_IMPORT:
        return f"{module} imports {target}; kernels import only jax, jaxtyping, numpy and the standard library"
    if module.partition(".")[0] == "jmoe" and top in JMOE_MAY_NOT_IMPORT:
        return f"{module} imports {target}; nothing in jmoe may import {top}"
    if top not in OURS or top == "tests":
        return None
    here, there = unit_of(module), unit_of(target)
    if here is None or there is None:
        return f"{module if here is None else target} has no row; add it to ROWS in tests/test_layering.py"
    if here != there and RANKS[there] >= RANKS[here]:
        return f"{module} imports {target}; {there} is not below {here} (see ROWS in tests/test_layering.py)"
    return None


def memory_faults(module: str, tree: ast.Module) -> Iterator[str]:
    """Places outside jmoe/memory.py where jmoe names a memory kind."""
    if module == "jmoe.memory" or module.partition(".")[0] != "jmoe":
        return
    for node in ast.walk(tree):
        if word := memory_word(node):
            yield f"{module}:{getattr(node, 'lineno', '?')} names {word}; only jmoe.memory names memory kinds"


def memory_word(node: ast.AST) -> str | None:
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in MEMORY_KINDS:
        return repr(node.value)
    if isinstance(node, ast.keyword) and node.arg in MEMORY_WORDS:
        return f"{node.arg}="
    if isinstance(node, ast.Attribute) and node.attr in MEMORY_WORDS:
        return f".{node.attr}"
    is_jax_memory = isinstance(node, ast.Attribute) and ast.unparse(node) == "jax.memory"
    return "jax.memory" if is_jax_memory else None


def faults(module: str, source: str, modules: set[str]) -> list[str]:
    tree = ast.parse(source)
    unlisted = [] if unit_of(module) else [f"{module} has no row; add it to ROWS in tests/test_layering.py"]
    found = [import_fault(module, target) for target in imported(module, tree, modules)]
    return unlisted + [fault for fault in found if fault] + list(memory_faults(module, tree))


def test_arrows_go_down() -> None:
    texts = sources()
    found = [fault for module, source in texts.items() for fault in faults(module, source, set(texts))]
    assert not found, "\n" + "\n".join(found)


def test_the_core_is_there_to_be_checked() -> None:
    core = {"jmoe", "jmoe.config", "jmoe.model.decoder", "jmoe.experts.residency", "kernels_pallas.fetch.api"}
    assert core <= set(sources())


@pytest.mark.parametrize(
    ("module", "source", "expected"),
    [
        ("jmoe.model.decoder", "import jmoe.experts.store", "jmoe.experts is not below jmoe.model"),
        ("jmoe.model.decoder", "from jmoe import experts", "jmoe.experts is not below jmoe.model"),
        ("jmoe.model.decoder", "from ..decoding import step", "jmoe.decoding is not below jmoe.model"),
        ("jmoe.model", "from .. import engine", "jmoe.engine is not below jmoe.model"),
        ("jmoe.experts.residency", "from jmoe.experts.layer import moe", "jmoe.experts.layer is not below"),
        ("jmoe.experts", "from . import layer", "jmoe.experts.layer is not below"),
        ("jmoe.experts.store", "def f():\n    import jmoe", "jmoe is not below jmoe.experts"),
        ("jmoe.decoding.step", "from jmoe.engine import Engine", "jmoe.engine is not below jmoe.decoding"),
        ("jmoe.decoding.step", "from jmoe import generation", "jmoe.engine is not below jmoe.decoding"),
        ("jmoe.config", "from jmoe.shapes import Rows", "jmoe.shapes is not below jmoe.config"),
        ("jmoe.engine", "from tools.bench import run", "nothing in jmoe may import tools"),
        ("jmoe.convert", "import torch", "nothing in jmoe may import torch"),
        ("kernels_pallas.fetch.api", "from jmoe.config import ModelConfig", "kernels import only jax"),
        ("kernels_pallas.fetch.api", "import flax", "kernels import only jax"),
        ("jmoe.novelty", "import jax", "jmoe.novelty has no row; add it"),
        ("jmoe.engine", "import jmoe.novelty", "jmoe.novelty has no row; add it"),
        ("jmoe.engine", "kind = 'pinned_host'", "names 'pinned_host'"),
        ("jmoe.engine", "s = sharding(device, memory_kind=kind)", "names memory_kind="),
        ("jmoe.engine", "s = s.with_memory_kind(kind)", "names .with_memory_kind"),
        ("jmoe.engine", "x = jax.device_put(x, jax.memory.Space.Device)", "names jax.memory"),
    ],
)
def test_a_wrong_arrow_is_found(module: str, source: str, expected: str) -> None:
    found = faults(module, source, {"jmoe.model.decoder", "jmoe.experts.layer"})
    assert len(found) == 1, found
    assert expected in found[0]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("jmoe.engine", "from jmoe.decoding.step import decode\nimport jmoe.memory\nimport jmoe.generation"),
        ("jmoe.generation", "from jmoe.engine import Engine"),
        ("jmoe.experts.layer", "from jmoe.experts import residency\nfrom jmoe.model.router import route"),
        (
            "jmoe.experts.slots",
            "from . import store\nfrom jmoe.config import RuntimeConfig\nimport kernels_pallas.fetch",
        ),
        ("jmoe", "from jmoe.loading import load\nfrom .config import RuntimeConfig"),
        ("jmoe.memory", "kind = sharding(memory_kind='pinned_host')"),
        ("kernels_pallas.fetch.api", '"""In `pinned_host` memory."""\nimport jax.experimental.pallas\nimport numpy'),
        ("tools.make_golden", "import torch\nimport jmoe"),
    ],
)
def test_a_right_arrow_is_let_through(module: str, source: str) -> None:
    assert faults(module, source, {"jmoe.model.router", "jmoe.experts.slots"}) == []
