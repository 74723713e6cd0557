"""Text generation on the terminal: python -m jmoe.generate --prompt "…" (all options: --help)."""

import argparse
import contextlib
import dataclasses
import json
import os
import platform
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from jmoe import arguments

if TYPE_CHECKING:
    from jmoe import Engine, Generation, RuntimeConfig, SamplingParams
    from jmoe.tokenizer import Tokenizer

INTERRUPTED = 130  # 128 + SIGINT, as shells count
_LABEL_CHARACTERS = 60
_CONTROLS = {code: "\ufffd" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; returns its exit code. Errors of the user, the checkpoint or the machine are one line."""
    options = arguments.parse(argv)
    try:
        return _run(options)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # whoever read our output has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, RuntimeError, NotImplementedError, OSError) as error:
        if not _is_ours(error):
            raise
        if options.verbose:
            traceback.print_exc()
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2


def _is_ours(error: Exception) -> bool:
    """Whether jmoe, the system or a full device raised it on purpose; anything else is a bug, to be shown in full."""
    if isinstance(error, OSError) or "RESOURCE_EXHAUSTED" in str(error):
        return True
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_globals["__name__"].partition(".")[0] in ("jmoe", "kernels_pallas", "__main__")


def _run(options: argparse.Namespace) -> int:
    conversation = arguments.is_conversation(options)
    if conversation and options.json:
        raise ValueError("--json needs prompts: give --prompt or --prompt-file, or leave out --json")
    if options.system is not None and not options.chat:
        raise ValueError("--system is part of a chat: add --chat")
    if options.logprobs and not options.json:
        raise ValueError("--logprobs are part of the JSON output: add --json")
    prompts = [] if conversation else arguments.read_prompts(options)
    runtime = arguments.runtime_config(options, max(1, len(prompts)))
    arguments.sampling_params(options, {})  # a value out of range shows before anything is loaded
    engine = _load(options, runtime)
    sampling, origins = arguments.sampling_params(options, engine.generation_defaults)
    if options.verbose:
        for name, origin in origins.items():
            _note(options, f"{name} {getattr(sampling, name)} ({origin})")
    if conversation:
        return _converse(engine, sampling, options)
    return _complete(engine, prompts, sampling, options)


def _note(options: argparse.Namespace, line: str) -> None:
    if not options.quiet:
        print(line, file=sys.stderr, flush=True)


def _load(options: argparse.Namespace, runtime: "RuntimeConfig") -> "Engine":
    if options.quiet:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from tqdm import tqdm

    import jmoe  # takes seconds: not for --help, nor for an error in the arguments

    def announce(line: str) -> None:
        tqdm.write(line, file=sys.stderr)  # above the progress bar

    with _progress_bar(options.quiet) as progress:
        say = None if options.quiet else announce
        return jmoe.load(options.model, runtime, router=options.router, progress=progress, announce=say)


@contextlib.contextmanager
def _progress_bar(quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """Shows phase and bytes on stderr where that is a terminal."""
    from tqdm import tqdm

    with tqdm(unit="B", unit_scale=True, leave=False, file=sys.stderr, disable=True if quiet else None) as bar:
        shown = [""]

        def report(phase: str, done_bytes: int, total_bytes: int) -> None:
            if total_bytes != bar.total or done_bytes < bar.n:
                bar.reset(total_bytes)
            bar.update(done_bytes - bar.n)
            bar.set_description(phase, refresh=phase != shown.pop())  # tqdm shows bytes by and by, a new phase at once
            shown.append(phase)

        yield report


def _complete(engine: "Engine", prompts: list[str], sampling: "SamplingParams", options: argparse.Namespace) -> int:
    """Each prompt once, as a batch."""
    tokenizer = _tokenizer(engine)
    encoded = [_encode(tokenizer, prompt, options) for prompt in prompts]
    generation = engine.generate(encoded, sampling)
    labels = [f"[{n}] {_shortened(prompt)}" for n, prompt in enumerate(prompts, 1)] if len(prompts) > 1 else []

    def consume() -> None:
        if options.json:
            generation.results()
        else:
            _print_text(generation, labels, engine.plan.batch_size)

    finished = _generate(generation, consume, options)
    if options.json:
        report = _report(engine, generation, prompts, sampling, options)
        print(json.dumps({**report, "interrupted": not finished}, ensure_ascii=False, indent=2))
    else:
        print()
    _summarize(generation, options)
    return 0 if finished else INTERRUPTED


def _tokenizer(engine: "Engine") -> "Tokenizer":
    if engine.tokenizer is None:
        raise RuntimeError("this checkpoint has no tokenizer.json; download it into the model's directory")
    return engine.tokenizer


def _encode(tokenizer: "Tokenizer", prompt: str, options: argparse.Namespace) -> list[int]:
    if not options.chat:
        return tokenizer.encode(prompt)
    return tokenizer.apply_chat_template([*_opening(options), {"role": "user", "content": prompt}])


def _opening(options: argparse.Namespace) -> list[dict[str, str]]:
    return [] if options.system is None else [{"role": "system", "content": options.system}]


def _shortened(prompt: str) -> str:
    line = " ".join(prompt.split())
    return line if len(line) <= _LABEL_CHARACTERS else line[: _LABEL_CHARACTERS - 1] + "…"


def _generate(generation: "Generation", consume: Callable[[], None], options: argparse.Namespace) -> bool:
    """Runs `consume`, profiled if asked for; False if it was interrupted, which ends the generation where it is."""
    try:
        with _profile(options):
            consume()
        return True
    except KeyboardInterrupt:
        _note(options, "\ninterrupted")
        return False
    finally:
        generation.close()


@contextlib.contextmanager
def _profile(options: argparse.Namespace) -> Iterator[None]:
    if options.profile is None:
        yield
        return
    import jax

    with jax.profiler.trace(str(options.profile)):
        yield
    _note(options, f"profiler trace written to {options.profile}")


def _print_text(generation: "Generation", labels: list[str], batch_size: int) -> None:
    """Streams the first sequence of a batch; the others, which come at the same time, follow when it is done."""
    waiting = [""] * max(1, len(labels))
    current = 0
    _write(_heading(labels, 0))

    def advance(to: int) -> None:
        nonlocal current
        while current < to:
            current += 1
            _write("\n" + _heading(labels, current) + waiting[current])

    for delta in generation:
        advance(delta.index // batch_size * batch_size)  # the batches before this one's are done
        if delta.index == current:
            _write(delta.text)
        else:
            waiting[delta.index] += delta.text
    advance(len(waiting) - 1)


def _heading(labels: list[str], index: int) -> str:
    return f"{labels[index]}\n" if labels else ""


def _write(text: str) -> None:
    """To stdout, at once. A terminal is not shown control characters, which could change how it works."""
    sys.stdout.write(text.translate(_CONTROLS) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def _summarize(generation: "Generation", options: argparse.Namespace) -> None:
    for line in generation.stats.lines():
        _note(options, line)


def _report(
    engine: "Engine",
    generation: "Generation",
    prompts: list[str],
    sampling: "SamplingParams",
    options: argparse.Namespace,
) -> dict[str, Any]:
    """All there is to know about a generation, for --json."""
    completions = []
    for prompt, completion in zip(prompts, generation.completions, strict=True):
        fields = dataclasses.asdict(completion)
        if not options.logprobs:
            del fields["logprobs"]
        completions.append({"prompt": prompt, **fields})
    return {
        "model": options.model,
        "completions": completions,
        "sampling": dataclasses.asdict(sampling),
        "stats": generation.stats.to_dict(),
        "plan": engine.plan.to_dict(),
        "runtime": dataclasses.asdict(engine.runtime),
        "changes_what_the_model_says": _guessed(engine),
        "versions": {
            "python": platform.python_version(),
            **{name: arguments.version_of(name) for name in ("jmoe", "jax", "jaxlib")},
        },
    }


def _guessed(engine: "Engine") -> dict[str, Any] | None:
    """Which layers decoded with guessed experts, and from which recall on; None where the model spoke for itself."""
    if engine.executed is None:
        return None
    layers = [engine.config.moe_layers[layer] for layer in engine.executed.layers]
    return {"execute_guess": engine.runtime.execute_guess, "guessed_layers": layers}


def _converse(engine: "Engine", sampling: "SamplingParams", options: argparse.Namespace) -> int:
    """Turns from the terminal until end of file or /exit. Ctrl-C ends an answer; at the prompt, the program."""
    tokenizer, messages = _tokenizer(engine), _opening(options)
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            print()
            return 0
        if text == "/exit":
            return 0
        if not text:
            continue
        messages.append({"role": "user", "content": text})
        generation = engine.generate([tokenizer.apply_chat_template(messages)], sampling)
        _generate(generation, lambda answer=generation: _print_text(answer, [], 1), options)
        print()
        _summarize(generation, options)
        messages.append({"role": "assistant", "content": generation.completions[0].text})


if __name__ == "__main__":
    sys.exit(main())
