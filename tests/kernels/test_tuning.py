"""The tuning table: what it may hold, and that a kernel runs with its entry for these shapes, and with no other."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from kernels_pallas import tile_ring, tuning
from kernels_pallas.decode_attention import mosaic_gpu as attention
from kernels_pallas.decode_attention.shape import Shape
from kernels_pallas.expert_mlp import mosaic_gpu_fma, mosaic_gpu_grouped, mosaic_gpu_prefill, mosaic_gpu_wgmma
from kernels_pallas.fetch import mosaic_gpu as fetching
from kernels_pallas.norm_linear import mosaic_gpu as norm_linear

GPU = "NVIDIA H200"
KEY = tuning.key("fetch", jnp.dtype("bfloat16"), width=64, num_hidden=32, sliding_window=None)
ENTRY = tuning.Entry(KEY, GPU, {"num_blocks": 4, "num_stages": 3, "tile_bytes": 4096}, 10.25, 12.5)


@pytest.fixture
def write_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts a table of some entries in the place of the checked-in one, and an H200 in that of the CPU."""

    def write(*entries: tuning.Entry) -> None:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.toml"
        path.write_text(tuning.text(entries), encoding="utf-8")
        monkeypatch.setattr(tuning, "TABLE", path)
        monkeypatch.setattr(tuning, "device_kind", lambda: GPU)
        jax.clear_caches()  # of traces that have looked into another table

    return write


def test_a_table_comes_back_as_it_was_written(tmp_path: Path) -> None:
    elsewhere = dataclasses.replace(ENTRY, gpu="another", us=1e-2)
    path = tmp_path / "table.toml"
    path.write_text(tuning.text([elsewhere, ENTRY]), encoding="utf-8")
    assert tuning.read(path) == [ENTRY, elsewhere]
    assert "sliding_window" not in path.read_text(encoding="utf-8")


def test_the_checked_in_table_is_as_the_tool_writes_it() -> None:
    assert tuning.TABLE.read_text(encoding="utf-8") == tuning.text(tuning.read(tuning.TABLE))


def test_the_checked_in_table_has_what_the_kernels_can_have() -> None:
    types = {key.kernel: type(own) for _, _, key, own, _ in KERNELS.values()}
    for entry in tuning.read(tuning.TABLE):
        entry.made(types[entry.key.kernel])
        assert entry.us < entry.heuristic_us


def test_only_the_same_gpu_dtype_and_shape_have_an_entry(write_table: Callable[..., None]) -> None:
    own, other = tile_ring.Config(), tuning.key("fetch", jnp.dtype("float32"), width=64, num_hidden=32)
    write_table(dataclasses.replace(ENTRY, gpu="NVIDIA H100"), dataclasses.replace(ENTRY, key=other))
    assert tuning.configured(KEY, own) is own
    write_table(ENTRY)
    assert tuning.configured(KEY, own) == tile_ring.Config(num_blocks=4, num_stages=3, tile_bytes=4096)
    for wrong in ({"width": 128}, {"rows": 1}):
        sizes = {"width": 64, "num_hidden": 32} | wrong
        assert tuning.configured(tuning.key("fetch", jnp.dtype("bfloat16"), **sizes), own) is own


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_blocks": 4, "num_stages": 1, "tile_bytes": 64}, "'num_stages': 1, .*num_stages=1 at least 2; remove"),
        ({"num_blocks": 4, "num_stages": 2}, "its fields are num_blocks, num_stages, tile_bytes"),
        ({**ENTRY.config, "num_warps": 4}, "'num_warps': 4.*its fields are num_blocks, num_stages, tile_bytes"),
    ],
)
def test_what_the_kernel_cannot_have_is_an_error(
    config: dict[str, int], message: str, write_table: Callable[..., None]
) -> None:
    write_table(dataclasses.replace(ENTRY, config=config))
    with pytest.raises(
        RuntimeError, match=f"fetch for .*'width': 64.* bfloat16 on NVIDIA H200 cannot have .*{message}"
    ):
        tuning.configured(KEY, tile_ring.Config())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[entry]", "cannot be read"),
        ('[[entry]]\nkernel = "fetch"', r"entry 1 is \{'kernel': 'fetch'\}; expected kernel \(str\), gpu"),
        (tuning.text([ENTRY]).replace("= 4096", "= 0.5"), "entry 1 has config .*'tile_bytes': 0.5.*whole numbers"),
        (tuning.text([ENTRY]).replace("= 64", "= true"), "entry 1 has shape .*'width': True.*whole numbers"),
        (tuning.text([ENTRY, dataclasses.replace(ENTRY, us=1.0)]), "more than one entry for .*NVIDIA H200.*fetch"),
    ],
)
def test_a_malformed_table_is_an_error(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "table.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RuntimeError, match=f"tuning table {path}: {message}"):
        tuning.read(path)


def shaped(*arguments: tuple[tuple[int, ...], str]) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct(*argument) for argument in arguments]


def mlp(num_rows: int, num_groups: int = 2, width: int = 256) -> list[jax.ShapeDtypeStruct]:
    slots = ((4, 3, 64, width), "bfloat16")
    groups = ((num_groups,), "int32"), ((num_groups, num_rows), "float32")
    return shaped(((num_rows, width), "bfloat16"), slots, *groups)


X, SLOTS = mlp(1)[:2]
ATTENTION = Shape(2, 4, 1024, 2, 64, jnp.dtype("bfloat16"), None)
CACHE = ((2, 1024, 2, 64), "bfloat16")
KERNELS = {
    "fetch": (
        fetching.fetch,
        shaped(((8, 3, 64, 256), "bfloat16"), ((4, 3, 64, 256), "bfloat16"), *[((2,), "int32")] * 2, ((), "int32")),
        fetching.key(SLOTS),
        tile_ring.Config(),
        tile_ring.Config(num_blocks=7, num_stages=2, tile_bytes=1024),
    ),
    "fma": (
        mosaic_gpu_fma.expert_mlp,
        mlp(1),
        mosaic_gpu_fma.key(X, SLOTS),
        mosaic_gpu_fma.Config(),
        mosaic_gpu_fma.Config(num_blocks=7, max_warpgroups=1),
    ),
    "read_through": (
        mosaic_gpu_fma.read_through,
        [X, SLOTS, SLOTS, *shaped(*[((2,), "int32")] * 3, ((2, 1), "float32"))],
        mosaic_gpu_fma.key(X, SLOTS),
        mosaic_gpu_fma.Config(),
        mosaic_gpu_fma.Config(num_blocks=7, max_warpgroups=1),
    ),
    "wgmma": (
        mosaic_gpu_wgmma.expert_mlp,
        mlp(5),
        mosaic_gpu_wgmma.key(mlp(8)[0], SLOTS),  # 5 rows and 8 are the same to the tensor cores
        mosaic_gpu_wgmma.Config(),
        mosaic_gpu_wgmma.Config(num_blocks=7, max_warpgroups=1),
    ),
    "prefill": (
        functools.partial(mosaic_gpu_prefill.expert_mlp, max_groups_per_row=1),
        mlp(33),
        mosaic_gpu_prefill.key(mlp(33)[0], SLOTS, 2, 1),
        mosaic_gpu_prefill.config_of(33, 2, 1),
        mosaic_gpu_grouped.Config(num_blocks=7, num_warpgroups=2),
    ),
    "decode_attention": (
        functools.partial(attention.decode_attention, num_heads=4, sliding_window=None, eps=1e-6),
        shaped(
            ((2, 8 * 64), "bfloat16"), *[((64,), "bfloat16")] * 2, *[((2, 32), "float32")] * 2, CACHE, CACHE,
            ((2,), "int32"), ((2,), "bool"),
        ),
        attention.key(ATTENTION),
        attention.Config(),
        attention.Config(num_blocks=1, max_stages=1),
    ),
    "norm_linear": (
        functools.partial(norm_linear.norm_linear, eps=1e-6, out_dtype=jnp.dtype("bfloat16")),
        shaped(*[(shape, "bfloat16") for shape in ((2, 512), (512,), (256, 512), (2, 256), (2, 512))]),
        norm_linear.key(*shaped(((2, 512), "bfloat16"), ((256, 512), "bfloat16"))),
        norm_linear.Config(),
        norm_linear.Config(num_blocks=7, max_warpgroups=2, max_stages=2, tile_bytes=4096),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_is_traced_with_its_entry_and_without_one_as_ever(name: str, write_table: Callable[..., None]) -> None:
    """The whole program, kernels and all: what is lowered is made of it and of nothing else."""
    kernel, arguments, key, own, tuned = KERNELS[name]

    def traced(**options) -> str:
        return str(jax.make_jaxpr(functools.partial(kernel, **options))(*arguments))

    as_ever, as_tuned = traced(config=own), traced(config=tuned)
    assert as_ever != as_tuned
    assert traced() == as_ever
    write_table(tuning.Entry(key, GPU, dataclasses.asdict(tuned), 1.0, 2.0))
    assert traced() == as_tuned


def test_a_key_has_nothing_in_it_that_may_not_change_a_bit() -> None:
    """The same groups give the same bits beside groups that nobody asks for, and in any number of slots."""
    wide = jax.ShapeDtypeStruct((99, *SLOTS.shape[1:]), "bfloat16")
    for form, x in ((mosaic_gpu_fma, X), (mosaic_gpu_wgmma, mlp(5)[0])):
        assert form.key(x, wide) == form.key(x, SLOTS)
        assert {name for name, _ in form.key(x, SLOTS).shape} <= {"num_rows", "columns", "num_hidden", "width"}
