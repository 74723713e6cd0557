"""The command line of `python -m jmoe.generate`: options, and what they mean for prompts, memory and sampling."""

import argparse
import dataclasses
import importlib.metadata
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from jmoe.config import DTYPES, RESIDENCY_POLICIES, Prefetching, RuntimeConfig

if TYPE_CHECKING:
    from jmoe.decoding.sampling import SamplingParams

DEMO_SLOTS = 24
_SIZE = re.compile(r"\s*(?P<number>[0-9.]+(?:e[0-9]+)?)\s*(?P<unit>[kmgt]i?b|b)?\s*", re.IGNORECASE)
_SAMPLED = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p")  # what generation_config.json may set

_EPILOG = """\
Text goes to stdout, everything else to stderr. Sizes are written 8GiB, 500MB or 2e9.
Exit codes: 0 good; 2 bad input, or a plan that cannot fit; 130 interrupted (what was generated is kept).
"""


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options as given; None where an option was left out and has no fixed default."""
    parser = argparse.ArgumentParser(
        prog="python -m jmoe.generate",
        description="Generates text with a Mixture-of-Experts model whose experts lie in host memory.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"jmoe {version_of('jmoe')}")
    _add_input(parser.add_argument_group("model and prompts"))
    _add_sampling(parser.add_argument_group("sampling", "Defaults come from the model's generation_config.json."))
    _add_memory(parser.add_argument_group("memory and machine", "Chosen automatically, and said, where left out."))
    _add_output(parser.add_argument_group("output"))
    return parser.parse_args(argv)


def _add_input(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--model",
        metavar="MODEL",
        help="converted directory, Hugging Face directory, or hub id organisation/name; default: the demo model",
    )
    group.add_argument("--router", metavar="FILE", help="tuned routers of that model (python -m jmoe.tune_router)")
    group.add_argument("--prompt", dest="prompts", action="append", metavar="TEXT", help="repeat it for a batch")
    group.add_argument(
        "--prompt-file",
        dest="prompts",
        action="append",
        type=Path,
        metavar="FILE",
        help="a file that is one prompt (less the newline at its end); repeat it for a batch",
    )
    group.add_argument(
        "--chat",
        action="store_true",
        help="use the chat template: one turn for each prompt; a conversation on the terminal if there is none",
    )
    group.add_argument("--system", metavar="TEXT", help="system message of a chat")


def _add_sampling(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--max-new-tokens", type=int, metavar="N")
    group.add_argument("--temperature", type=float, metavar="X", help="0 is greedy")
    group.add_argument("--top-k", type=int, metavar="N", help="0 is off")
    group.add_argument("--top-p", type=float, metavar="X", help="1 is off")
    group.add_argument("--min-p", type=float, metavar="X", help="0 is off")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
    group.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeatable")
    group.add_argument("--ignore-eos", action="store_true", help="generate past the end of sequence")


def _add_memory(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--expert-slots", type=int, metavar="N", help="device slots of each MoE layer")
    group.add_argument(
        "--staging-slots", type=int, metavar="N", help="experts that stream at a time; twice as many slots"
    )
    group.add_argument("--device-memory", type=parse_size, metavar="SIZE", help="the most to use of the device")
    group.add_argument("--host-memory", type=parse_size, metavar="SIZE", help="the most to pin of the host")
    group.add_argument("--batch-size", type=int, metavar="N", help="prompts at a time; default: all of them")
    group.add_argument("--max-seq-len", type=int, metavar="N", help="tokens of a prompt and its answer together")
    group.add_argument("--prefill-chunk", type=int, metavar="N", help="prompt tokens taken in at a time")
    group.add_argument(
        "--draft", type=parse_draft, metavar="{off,auto,N}", help="tokens to draft at a time; auto: what is fastest"
    )
    group.add_argument("--draft-experts", type=int, metavar="N", help="of each layer that draft; default: all slots")
    group.add_argument("--draft-tokens", type=int, metavar="N", help="the most that --draft auto tries (default: 4)")
    group.add_argument(
        "--prefetch",
        choices=get_args(Prefetching),
        help="bring experts before their router asks (default: auto, by lookahead where that may pay)",
    )
    group.add_argument(
        "--prefetch-experts", type=float, metavar="X", help="most to prefetch of each layer (default: 1)"
    )
    group.add_argument(
        "--execute-guess",
        type=float,
        metavar="RECALL",
        help="CHANGES WHAT THE MODEL SAYS: layers guessed so well (0: all but the first) compute the guess",
    )
    group.add_argument("--residency-policy", choices=RESIDENCY_POLICIES, help="which experts keep their slots")
    group.add_argument("--dtype", choices=DTYPES, help="default: the checkpoint's")
    group.add_argument("--implementation", metavar="NAME", help='"reference": plain JAX instead of the kernels')
    group.add_argument("--runtime", type=Path, metavar="FILE", help="TOML with such settings; options override it")
    group.add_argument("--no-link-test", action="store_true", help="do not measure the link to the device")


def _add_output(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--json", action="store_true", help="one JSON object on stdout, at the end")
    group.add_argument("--logprobs", action="store_true", help="with --json: the log-probability of each token")
    group.add_argument("--profile", type=Path, metavar="DIR", help="write a jax profiler trace of the generation")
    loudness = group.add_mutually_exclusive_group()
    loudness.add_argument("--quiet", action="store_true", help="the text alone (and errors)")
    loudness.add_argument("--verbose", action="store_true", help="say where defaults come from; tracebacks of errors")


def version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"  # run from a source directory


def parse_size(text: str) -> int:
    """Bytes of "8GiB", "500MB", "2e9", … Raises argparse.ArgumentTypeError for anything else."""
    match = _SIZE.fullmatch(text)
    try:
        number = float(match["number"]) if match else 0.0
    except ValueError:
        number = 0.0
    if match is None or number <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; expected for example 8GiB, 500MB or 2e9")
    unit = (match["unit"] or "b").lower()
    power = "bkmgt".index(unit[0])
    return int(number * (1024 if "i" in unit else 1000) ** power)


def parse_draft(text: str) -> str | int:
    """ "off", "auto" or a number of at least 1. Raises argparse.ArgumentTypeError for anything else."""
    if text in ("off", "auto"):
        return text
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not off, auto or a number of tokens to draft, at least 1")
    return int(text)


def is_conversation(options: argparse.Namespace) -> bool:
    """Whether turns are to be read from the terminal."""
    return options.chat and not options.prompts and sys.stdin.isatty()


def read_prompts(options: argparse.Namespace) -> list[str]:
    """The prompts, in the order of the command line; standard input if there are none. Raises ValueError."""
    sources = options.prompts or ["-"]
    if not options.prompts and sys.stdin.isatty():
        raise ValueError('no prompt: give --prompt "…" or --prompt-file FILE, pipe text in, or start a --chat')
    prompts = [source if options.prompts and isinstance(source, str) else _read(source) for source in sources]
    for number, prompt in enumerate(prompts, 1):
        if not prompt:
            raise ValueError(f"prompt {number} of {len(prompts)} is empty; give at least one character")
    return prompts


def _read(source: Path | str) -> str:
    try:
        text = sys.stdin.read() if source == "-" else Path(source).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ValueError(f"--prompt-file {source}: no such file") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"prompt of {'stdin' if source == '-' else source}: not UTF-8 text ({error})") from error
    return text.removesuffix("\n")


def runtime_config(options: argparse.Namespace, num_prompts: int) -> RuntimeConfig:
    """--runtime, with the options over it; a batch that holds all prompts, unless told otherwise. Raises ValueError."""
    runtime = RuntimeConfig.from_toml(options.runtime) if options.runtime else RuntimeConfig()
    given = {
        "expert_slots": options.expert_slots or _demo_slots(options),
        "staging_slots": options.staging_slots,
        "device_memory_bytes": options.device_memory,
        "host_memory_bytes": options.host_memory,
        "batch_size": _batch_size(options.batch_size, runtime.batch_size, num_prompts),
        "max_seq_len": options.max_seq_len,
        "prefill_chunk": options.prefill_chunk,
        "dtype": options.dtype,
        "draft": options.draft,
        "draft_experts": options.draft_experts,
        "draft_tokens": options.draft_tokens,
        "prefetch": options.prefetch,
        "prefetch_experts": options.prefetch_experts,
        "execute_guess": options.execute_guess,
        "residency_policy": options.residency_policy,
        "implementation": options.implementation,
        "measure_link": False if options.no_link_test else None,
        "profiled": True if options.profile else None,
    }
    made = dataclasses.replace(runtime, **{name: value for name, value in given.items() if value is not None})
    if options.draft_tokens is not None and made.draft != "auto":
        raise ValueError(
            f"--draft-tokens is the most that --draft auto tries, and --draft is {made.draft}; leave it out"
        )
    if options.draft_experts is not None and made.draft == "off":
        raise ValueError("--draft-experts says what drafts, and nothing does; add --draft auto, or a number")
    if options.prefetch_experts is not None and made.prefetch == "off":
        raise ValueError("--prefetch-experts is the most that a prefetch brings, and --prefetch is off; leave it out")
    return made


def _demo_slots(options: argparse.Namespace) -> int | None:
    """Few slots for the demo model, which would fit as a whole: so that there is something to see."""
    return None if options.model or options.runtime or options.device_memory else DEMO_SLOTS


def _batch_size(option: int | None, configured: int, num_prompts: int) -> int:
    if option is not None:
        return option
    return num_prompts if configured == 1 else configured


def sampling_params(
    options: argparse.Namespace, generation_config: Mapping[str, Any]
) -> tuple["SamplingParams", dict[str, str]]:
    """The request: options, over generation_config.json, over jmoe's defaults; and where each value came from.

    A generation_config.json without `do_sample: true` means greedy. Raises ValueError for a value out of range.
    """
    from jmoe.decoding.sampling import SamplingParams  # imports jax

    config = {name: generation_config[name] for name in _SAMPLED if generation_config.get(name) is not None}
    if not generation_config.get("do_sample"):
        config["temperature"] = 0.0
    elif "temperature" not in config:
        config["temperature"] = 1.0
    given = {name: getattr(options, name) for name in _SAMPLED if getattr(options, name) is not None}
    values = config | given
    params = SamplingParams(**values, seed=options.seed, stop=tuple(options.stop), ignore_eos=options.ignore_eos)
    listed = generation_config.keys() | ({"temperature"} if "do_sample" in generation_config else set())
    origins = {
        name: "option" if name in given else "generation_config.json" if name in listed else "default"
        for name in _SAMPLED
    }
    return params, origins
