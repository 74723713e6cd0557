"""Makes a model's experts larger without changing what it computes: zeros after the end of their inner dimension F.

    python -m tools.pad_experts --model path/to/small --expert-bytes 9.4MB path/to/padded

What moves and when depends on routing, which stays the model's own, and on the bytes of an expert, which are chosen
here: so a small trained model can be measured with experts of the size that a large one has.

Every sum has the same terms, and zeros. In float32 the demo model's logits stay the same to the bit; of other widths,
and for a single row, a compiler may split the longer sum differently, which rounds differently. In bfloat16 that may
turn a near-tie.
"""

import argparse
import dataclasses
import hashlib
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jmoe import checkpoint, hf_files, sources
from jmoe.arguments import parse_size
from jmoe.checkpoint import Manifest, Progress
from jmoe.config import DTYPE_BYTES, DTYPES, ModelConfig
from jmoe.model.families import read_hf_config
from tools.command import byte_bar, exit_code


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0, or 2 after one line on stderr that says what is wrong."""
    return exit_code(_run, _parser().parse_args(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("destination", type=Path, help="directory to make: a jmoe checkpoint")
    parser.add_argument(
        "--model", help="converted checkpoint, Hugging Face directory or hub id; default: the demo model"
    )
    parser.add_argument("--expert-bytes", type=parse_size, required=True, metavar="SIZE", help="of an expert at least")
    parser.add_argument("--dtype", choices=DTYPES, help="cast the weights (default: keep them as they are)")
    return parser


def _run(options: argparse.Namespace) -> None:
    with byte_bar() as (bar, report):
        source = sources.resolve(options.model, dtype=options.dtype, progress=report, announce=bar.write)
        config = pad_experts(source, options.destination, options.expert_bytes, dtype=options.dtype, progress=report)
    size = f"{config.expert_bytes} bytes, moe_intermediate_size={config.moe_intermediate_size}"
    print(f"{options.destination}: written; an expert has {size}, all of them {config.store_bytes / 1e9:.2f} GB")


def pad_experts(
    source: Path, destination: Path, expert_bytes: int, *, dtype: str | None = None, progress: Progress | None = None
) -> ModelConfig:
    """Writes a jmoe checkpoint whose experts [E, 3, F, D] have the smallest F of at least `expert_bytes` an expert.

    The further rows of gate, up and down are zero: their hidden values are silu(0) * 0, and add nothing. Returns the
    configuration of what was written. `dtype` casts the weights. `progress` is called with (phase, bytes done, bytes
    in all). Host memory holds the trunk, then one layer of experts at a time. Interrupted at any point, nothing is left
    at `destination`.

    Raises ValueError if `source` is no jmoe checkpoint, its experts are larger already, `destination` is not empty or
    the cast is not supported, RuntimeError if the checkpoint is damaged or the disk is full.
    """
    manifest = checkpoint.read_manifest(source)
    config = dataclasses.replace(manifest.config, dtype=dtype or manifest.config.dtype)
    padded = dataclasses.replace(config, moe_intermediate_size=_padded_width(config, expert_bytes))
    hf = _hf_config(source, padded)
    with checkpoint.new_directory(destination, checkpoint.checkpoint_bytes(padded)) as scratch:
        checkpoint.save_trunk(scratch, checkpoint.load_trunk(source, config, None))
        for number, layer in enumerate(config.moe_layers, 1):
            _pad_layer(source, scratch, config, padded, layer)
            if progress is not None:
                progress(f"experts/{layer}", number * padded.store_bytes // len(config.moe_layers), padded.store_bytes)
        hf_files.copy_files(source, scratch)
        hf_files.write_json(scratch / "config.json", hf)
        checkpoint.write_manifest(scratch, Manifest(padded, _fingerprint(manifest, padded)))
    return padded


def _padded_width(config: ModelConfig, expert_bytes: int) -> int:
    if expert_bytes < config.expert_bytes:
        raise ValueError(
            f"expert_bytes={expert_bytes} is less than the {config.expert_bytes} that an expert has in {config.dtype}; "
            "padding makes experts larger only, so ask for more"
        )
    return math.ceil(expert_bytes / (3 * config.hidden_size * DTYPE_BYTES[config.dtype]))


def _hf_config(source: Path, padded: ModelConfig) -> dict[str, Any]:
    """The source's config.json with the changes that make it one of the padded model."""
    file = source / "config.json"
    hf = hf_files.read_json(file)
    hf["moe_intermediate_size"] = padded.moe_intermediate_size
    hf["dtype" if "dtype" in hf else "torch_dtype"] = padded.dtype
    if read_hf_config(hf, str(file)) != padded:
        raise RuntimeError(f"{file}: of another model than {checkpoint.MANIFEST}. Convert the model again.")
    return hf


def _pad_layer(source: Path, scratch: Path, config: ModelConfig, padded: ModelConfig, layer: int) -> None:
    experts = checkpoint.load_experts(source, config, layer, None)
    larger = np.zeros((config.num_experts, *padded.expert_shape), experts.dtype)
    larger[:, :, : config.moe_intermediate_size] = experts
    checkpoint.save_experts(scratch, layer, larger)


def _fingerprint(manifest: Manifest, padded: ModelConfig) -> str:
    """The same for the same padding of the same model; not the source's, which would vouch for tensors changed here."""
    changes = f"{manifest.fingerprint} {padded.moe_intermediate_size} {padded.dtype}"
    return hashlib.sha256(changes.encode()).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
