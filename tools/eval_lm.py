"""Bits per byte of a model on text: python -m tools.eval_lm --model M --text FILE …, or --stdlib-held-out.

Each file is a document of its own. Text is scored in windows of --window tokens; with a --stride below that, each
window after the first scores its last tokens alone and has the others as context. Bits per byte compare models whatever
their tokenizers; bits per token and perplexity compare those of one tokenizer.

--execute-guess measures what it would cost to compute guessed experts in place of those that the routers choose, in the
layers whose calibrated recall is each RECALL or more: the text is read as if all of it were decoded so.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from jmoe.arguments import parse_size
from jmoe.config import DTYPES, RuntimeConfig
from jmoe.engine import Engine
from jmoe.evaluation import Score, document_start, evaluate, require_windows
from jmoe.executing import executed_guess
from jmoe.experts.execute_guess import ExecutedGuess
from jmoe.loading import load
from tools.command import exit_code
from tools.stdlib_corpus import read_files, stdlib_root


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0, or 2 after one line on stderr that says what is wrong."""
    return exit_code(_run, _parser().parse_args(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="converted or Hugging Face directory, or hub id; default: the demo model")
    parser.add_argument("--router", type=Path, metavar="FILE", help="tuned routers of that model, instead of its own")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", type=Path, nargs="+", metavar="FILE", help="UTF-8 files, each a document")
    source.add_argument("--stdlib-held-out", action="store_true", help="the files of Python's library not trained on")
    parser.add_argument("--stdlib-root", type=Path, metavar="DIR", help="default: the running interpreter's library")
    parser.add_argument("--window", type=int, metavar="N", help="tokens read at a time (default: as many as fit)")
    parser.add_argument("--stride", type=int, metavar="N", help="tokens from window to window (default: --window)")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="windows at a time (default: 8)")
    parser.add_argument("--expert-slots", type=int, metavar="N", help="device slots of each MoE layer")
    parser.add_argument(
        "--execute-guess",
        type=float,
        nargs="+",
        metavar="RECALL",
        help="measure that too, once for each (0: all layers)",
    )
    parser.add_argument("--dtype", choices=DTYPES, help="default: the checkpoint's")
    parser.add_argument("--max-bytes", type=parse_size, metavar="SIZE", help="stop after so much text, such as 100KB")
    parser.add_argument("--json", action="store_true", help="one line of JSON on stdout")
    return parser


def _run(options: argparse.Namespace) -> None:
    report = _report(options)
    print(json.dumps(report) if options.json else "\n".join(_lines(report)))


def _report(options: argparse.Namespace) -> dict[str, Any]:
    if options.stdlib_root and not options.stdlib_held_out:
        raise ValueError("--stdlib-root is where --stdlib-held-out is read from: add that, or leave it out")
    if wrong := [gate for gate in options.execute_guess or () if not 0 <= gate <= 1]:
        raise ValueError(f"--execute-guess {wrong[0]:g} is no recall; expected a number from 0 to 1")
    runtime = _runtime(options)
    num_bytes, texts = _corpus(options)
    engine = _load(options, runtime)
    start = time.perf_counter()
    score = _evaluate(engine, texts, num_bytes, options)
    seconds = time.perf_counter() - start
    guessed = [_guessed(engine, gate, score, options) for gate in options.execute_guess or ()]
    window = engine.plan.max_seq_len - 1
    return {
        "model": options.model or "demo",
        "router": options.router and str(options.router),
        "dtype": engine.config.dtype,
        "window": window,
        "stride": options.stride or window,
        "start_id": document_start(engine),
        **score.to_dict(),
        "seconds": seconds,
        "tokens_per_s": score.num_tokens / seconds,
        **({"execute_guess": guessed} if guessed else {}),
    }


def _guessed(engine: Engine, gate: float, exact: Score, options: argparse.Namespace) -> dict[str, Any]:
    """The same texts, where layers of such a recall compute what was guessed."""
    executed = executed_guess(
        engine.config, engine.weights.params, gate, engine.calibration, implementation=engine.steps.implementation
    )
    num_bytes, texts = _corpus(options)
    score = _evaluate(engine, texts, num_bytes, options, executed) if executed else exact
    return {
        "gate": gate,
        "guessed_layers": [engine.config.moe_layers[layer] for layer in executed.layers] if executed else [],
        **score.to_dict(),
        "change": score.bits_per_byte / exact.bits_per_byte - 1,
    }


def _runtime(options: argparse.Namespace) -> RuntimeConfig:
    """Memory for exactly the windows that are asked for; what cannot be is refused before anything is loaded."""
    window, stride = options.window, options.stride
    if window is not None:
        require_windows(window, window if stride is None else stride)
    return RuntimeConfig(
        expert_slots=options.expert_slots,
        batch_size=options.batch_size,
        max_seq_len=None if window is None else window + 1,
        dtype=options.dtype,
        measure_link=False,
        execute_guess=min(options.execute_guess) if options.execute_guess else None,  # for the calibration
    )


def _corpus(options: argparse.Namespace) -> tuple[int, Iterator[str]]:
    """Bytes in all, and the texts, cut to --max-bytes."""
    texts: Iterable[str]
    if options.stdlib_held_out:
        texts = read_files(options.stdlib_root or stdlib_root(), held_out=True).values()
        num_bytes = sum(len(text.encode("utf-8")) for text in texts)
    else:
        num_bytes = sum(_file_size(file) for file in options.text)
        texts = map(_read, options.text)
    most = num_bytes if options.max_bytes is None else min(num_bytes, options.max_bytes)
    return most, _first_bytes(texts, most)


def _file_size(file: Path) -> int:
    if not file.is_file():
        raise ValueError(f"--text {file}: no such file; expected a UTF-8 text")
    return file.stat().st_size


def _read(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8")  # line ends as they are: each byte counts
    except UnicodeDecodeError as error:
        raise ValueError(f"--text {file}: not UTF-8 text ({error}); convert it, or leave it out") from error


def _first_bytes(texts: Iterable[str], most: int) -> Iterator[str]:
    """The first `most` bytes of the texts; the last text ends where a character does."""
    for text in texts:
        data = text.encode("utf-8")
        yield data[:most].decode("utf-8", errors="ignore")  # nothing but half a character at the end
        most -= len(data)
        if most <= 0:
            return


def _load(options: argparse.Namespace, runtime: RuntimeConfig) -> Engine:
    with tqdm(unit="B", unit_scale=True, unit_divisor=1024, leave=False, disable=None) as bar:

        def report(phase: str, done_bytes: int, total_bytes: int) -> None:
            bar.total = total_bytes
            bar.set_description(phase, refresh=False)
            bar.update(done_bytes - bar.n)

        def announce(line: str) -> None:
            tqdm.write(line, file=sys.stderr)

        return load(options.model, runtime, router=options.router, progress=report, announce=announce)


def _evaluate(
    engine: Engine,
    texts: Iterator[str],
    num_bytes: int,
    options: argparse.Namespace,
    executed: ExecutedGuess | None = None,
) -> Score:
    with tqdm(total=num_bytes, unit="B", unit_scale=True, leave=False, disable=None) as bar:

        def report(score: Score) -> None:
            bar.set_postfix_str(f"{score.bits_per_byte:.4f} bits per byte", refresh=False)
            bar.update(score.num_bytes - bar.n)

        windows = {"window": options.window, "stride": options.stride}
        return evaluate(engine, texts, **windows, executed=executed, progress=report)


def _lines(report: dict[str, Any]) -> list[str]:
    """The report for people."""
    rows = [
        ("bits per byte", f"{report['bits_per_byte']:.4f}"),
        ("bits per token", f"{report['bits_per_token']:.4f}"),
        ("perplexity", f"{report['perplexity']:.4g} per token"),
        ("text", f"{report['num_documents']} documents, {report['num_bytes']} bytes, {report['num_tokens']} tokens"),
        ("windows", f"of {report['window']} tokens, {report['stride']} apart, after token {report['start_id']}"),
        ("time", f"{report['seconds']:.1f} s, {report['tokens_per_s']:.1f} tokens/s, compilation included"),
    ]
    rows += [(f"guesses {row['gate']:g}", _guessed_text(row)) for row in report.get("execute_guess", ())]
    return [f"{name:<16}{value}" for name, value in rows]


def _guessed_text(row: Mapping[str, Any]) -> str:
    layers = row["guessed_layers"]
    named = f"{len(layers)} layers ({', '.join(map(str, layers))})" if layers else "no layer"
    return f"executed in {named}: {row['bits_per_byte']:.4f} bits per byte, {row['change']:+.2%}"


if __name__ == "__main__":
    sys.exit(main())
