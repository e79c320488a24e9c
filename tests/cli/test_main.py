"""The frame of the command line: help, exit codes, one-line errors, one object."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib

import pytest

from deepseek.cli.main import VERBS, main, verb_parser
from tests.cli.conftest import Run
from tests.house import REPO


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_an_example_that_parses(verb: str, run: Run, capsys) -> None:
    with pytest.raises(SystemExit) as left:
        main([verb, "--help"])
    assert left.value.code == 0
    shown = capsys.readouterr().out
    example = re.search(r"^example: deepseek (.*)$", shown, re.MULTILINE)
    assert example is not None and "--json" in shown
    import shlex

    words = shlex.split(example.group(1))
    assert words[0] == verb
    verb_parser(verb).parse_args(words[1:])


def test_no_words_show_the_verbs(run: Run) -> None:
    ended = run()
    assert ended.code == 0
    assert all(verb in ended.out for verb in VERBS)


@pytest.mark.parametrize(
    "words,said",
    [
        (["nonsense"], "invalid choice: 'nonsense'"),
        (["generate"], "the following arguments are required: MODEL"),
        (["generate", "m", "--max-tokens", "0"], "must be a whole number of at least 1; got '0'"),
        (["generate", "m", "--prompt", "x", "--top-p", "7"], "top_p of Sampling must be"),
        (["generate", "smollm-135m", "--prompt", "x"], "Did you mean 'smollm2-135m'"),
        (["show", "/nowhere/at/all"], "model of load must be a known name"),
        (["doctor", "--frobnicate"], "unrecognized arguments: --frobnicate"),
        (["--frobnicate"], "unrecognized arguments: --frobnicate"),
        (["--frobnicate", "doctor"], "unrecognized arguments: --frobnicate"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(words: list[str], said: str, run: Run) -> None:
    ended = run(*words)
    assert ended.code == 2
    assert said in ended.err and ended.err.count("\n") == 1
    assert ended.err.startswith("deepseek: ") and ended.out == ""


def test_a_mistake_with_json_is_one_object(run: Run) -> None:
    ended = run("--json", "show", "nobody-knows-this")
    assert ended.code == 2
    assert ended.object["exit_code"] == 2
    assert ended.object["error"]["kind"] == "ConfigError"


def test_version_is_that_of_the_distribution() -> None:
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    command = [sys.executable, "-m", "deepseek", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"deepseek {project['version']}\n"


def test_help_loads_no_torch() -> None:
    program = (
        "import sys\nfrom deepseek.cli.main import VERBS, verb_parser\n"
        "[verb_parser(verb) for verb in VERBS]\n"
        "print([n for n in ('torch', 'transformers', 'numpy') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


def test_a_reader_that_leaves_is_no_traceback() -> None:
    command = f"{sys.executable} -m deepseek doctor --json | true"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr


def test_interrupted_is_130(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from deepseek.cli.verbs import doctor

    def stop(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "run", stop)
    ended = run("doctor", "--json")
    assert ended.code == 130
    assert json.loads(ended.out)["exit_code"] == 130


def test_a_defect_of_ours_is_one_line_with_a_code_of_its_own(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deepseek.cli.verbs import doctor

    def fail(*_: object) -> int:
        raise ValueError("unforeseen")

    monkeypatch.setattr(doctor, "run", fail)
    ended = run("doctor", "--json")
    assert ended.code == 70 and ended.err.count("\n") == 1 and "unforeseen" in ended.err
    monkeypatch.setenv("DEEPSEEK_DEBUG", "1")
    with pytest.raises(ValueError, match="unforeseen"):
        run("doctor")


def test_options_are_not_abbreviated(run: Run) -> None:
    assert run("list", "--js").code == 2
