"""Compiled steps as XLA keeps and loads them: another process says the same without compiling."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu

COMMAND = "-m jmoe.generate --prompt def --max-new-tokens 24 --expert-slots 16 --json"


def generate(cache: Path, *options: str) -> dict:
    command = [sys.executable, *COMMAND.split(), *options]
    environment = {**os.environ, "JMOE_CACHE": str(cache)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {**json.loads(done.stdout), "said": done.stderr}


@pytest.mark.parametrize("options", [(), ("--draft", "2"), ("--prefetch", "lookahead")], ids=str)
def test_another_process_says_the_same_and_compiles_nothing(options: tuple[str, ...], tmp_path: Path) -> None:
    first = generate(tmp_path, *options)
    files = set((tmp_path / "programs").iterdir())
    assert files, first["said"]
    second = generate(tmp_path, *options)
    assert [each["token_ids"] for each in second["completions"]] == [each["token_ids"] for each in first["completions"]]
    assert set((tmp_path / "programs").iterdir()) == files, second["said"]
    assert second["stats"]["compile_s"] < first["stats"]["compile_s"] / 2
