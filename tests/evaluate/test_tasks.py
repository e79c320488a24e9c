"""The suite runs tasks by name; the room's names are pinned and lazy."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn

from deepseek import evaluate
from deepseek.errors import ConfigError
from deepseek.evaluate import SuiteSettings, suite, task_names


def test_every_task_runs(tiny: nn.Module, other: nn.Module, tokenizer: object) -> None:
    settings = SuiteSettings(
        window=64,
        max_tokens=128,
        lengths=(1500,),
        num_items=2,
        max_gen_toks=3,
        prompt_tokens=8,
        new_tokens=3,
        repeats=1,
    )
    tasks = [name for name in task_names() if name not in ("needle", "copy")]
    found = suite(tiny, tasks, settings=settings, tokenizer=tokenizer, reference=other)
    assert {"perplexity", "kl_divergence", "needle_accuracy", "copy_accuracy"} <= {
        each.name for each in found
    }
    known = {f"--{name.replace('_', '-')}" for name in settings.to_dict()} | {
        "--tasks",
        "--reference",
    }
    for each in found:
        words = shlex.split(each.command)
        assert words[:3] == ["deepseek", "eval", "MODEL"]
        assert {word for word in words if word.startswith("--")} <= known


def test_lengths_and_depths_are_measured_one_by_one(tiny: nn.Module, tokenizer: object) -> None:
    settings = SuiteSettings(lengths=(420, 440), depths=(0.0, 1.0), num_items=1)
    found = suite(tiny, ["needle"], settings=settings, tokenizer=tokenizer)
    cases = [
        (each.conditions["length"], each.conditions["depth"])
        for each in found
        if each.name == "needle_accuracy"
    ]
    assert cases == [(420, 0.0), (420, 1.0), (440, 0.0), (440, 1.0)]


def test_a_file_takes_the_place_of_the_default_text(
    tiny: nn.Module, tokenizer: object, tmp_path: Path
) -> None:
    path = tmp_path / "my text.txt"
    path.write_text("word " * 60)
    settings = SuiteSettings(text=str(path), window=64)
    found = suite(tiny, settings=settings, tokenizer=tokenizer)
    assert f"--text '{path}'" in found[0].command
    assert found[0].conditions["text"] == "my text.txt"


def test_mistakes_are_explained(tiny: nn.Module, tokenizer: object) -> None:
    with pytest.raises(ConfigError, match="one of choice, copy, divergence, match, needle"):
        suite(tiny, ["perplexitty"], tokenizer=tokenizer)
    with pytest.raises(ConfigError, match="--reference MODEL"):
        suite(tiny, ["divergence"], tokenizer=tokenizer)


def test_room_names_are_sorted_and_resolve() -> None:
    assert list(evaluate.__all__) == sorted(evaluate.__all__)
    assert all(callable(getattr(evaluate, name)) for name in evaluate.__all__)


def test_the_room_is_lazy_and_its_functions_are_never_hidden_by_modules() -> None:
    code = (
        "import sys, deepseek.evaluate as room; assert 'torch' not in sys.modules; "
        "import deepseek.evaluate.tasks, types; "
        "assert not [n for n in room.__all__ if isinstance(getattr(room, n), types.ModuleType)]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
