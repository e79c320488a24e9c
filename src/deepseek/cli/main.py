"""`deepseek VERB`: parses, runs the verb, and turns every error into one line and an exit code.

Exit codes: 0 done, 1 a gate or check failed, 2 the user's mistake, 70 a defect of ours, 130
interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from deepseek.cli.output import Output
from deepseek.errors import (
    CapacityError,
    ConfigError,
    DeepseekError,
    VerifyError,
    describe,
    is_out_of_memory,
)

VERBS: dict[str, str] = {
    "demo": "the main job, start to end, on a real model",
    "pull": "get a model",
    "list": "the models that are here, and those that can be pulled",
    "show": "a bundle's card: what it is, what it was made from, what was measured",
    "chat": "talk to a model",
    "generate": "continue a text, or answer a question",
    "serve": "serve a model over HTTP, as OpenAI's API",
    "train": "train a model in stages, exactly, and go on after any stop",
    "adapt": "adapt a model to a domain, to conversations or to preferences",
    "compress": "make a model smaller, and prove that it still works",
    "export": "write a model in another runtime's format",
    "verify": "prove that an exported model computes what its source does",
    "delta": "ship a new version as its small, signed difference, and apply it",
    "eval": "measure quality: perplexity, retrieval, choice, divergence",
    "bench": "measure speed and memory beside transformers, what attention costs, or a server",
    "explain": "which kernel runs each operation of a model, and what a step costs",
    "doctor": "what this machine has, and which execution each operation uses",
}
"""Every verb with one line of help; its module in `deepseek.cli.verbs` is imported when it runs."""

EXIT_FAILED_CHECK, EXIT_USER_MISTAKE, EXIT_DEFECT, EXIT_INTERRUPTED = 1, 2, 70, 130
DEBUG_VARIABLE = "DEEPSEEK_DEBUG"
"""Set in the environment, an error of ours is shown with its traceback."""


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are ours: one line. Options are not abbreviated."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}. See: {self.prog} --help")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code.

    Args:
        arguments: the words after `deepseek`; None for those of the process.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    out = Output(as_json="--json" in words)
    try:
        return _run(words, out)
    except VerifyError as error:
        return out.fail(error, EXIT_FAILED_CHECK)
    except DeepseekError as error:
        return out.fail(error, EXIT_USER_MISTAKE)
    except KeyboardInterrupt:
        return out.fail(KeyboardInterrupt("interrupted"), EXIT_INTERRUPTED)
    except BrokenPipeError:
        # Whoever read our output has left; the interpreter must not complain about it on exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_USER_MISTAKE
    except OSError as error:
        if error.filename is None or error.strerror is None:
            return out.fail(error, EXIT_USER_MISTAKE)
        step = "Give another place, or see that it is there and that you may use it"
        words = f"{error.filename}: {error.strerror}. {step}"
        return out.fail(OSError(words), EXIT_USER_MISTAKE)
    except Exception as error:
        if os.environ.get(DEBUG_VARIABLE):
            raise
        if is_out_of_memory(error):
            step = "Close other programs, or take a smaller model or fewer tokens"
            got = str(error) or type(error).__name__
            told = describe("memory", "deepseek", "enough for what was asked", got, step)
            return out.fail(CapacityError(told), EXIT_USER_MISTAKE)
        step = f"This is a defect of deepseek: please report it with what {DEBUG_VARIABLE}=1 shows."
        return out.fail(RuntimeError(f"{type(error).__name__}: {error}. {step}"), EXIT_DEFECT)


def export_main() -> int:
    """Run `ds_export`, which is `deepseek export`, on the words of the process."""
    return main(["export", *sys.argv[1:]])


def _run(words: Sequence[str], out: Output) -> int:
    verb = next((word for word in words if not word.startswith("-")), None)
    parser = top_parser()
    if verb not in VERBS:
        parser.parse_args(words)
        parser.print_help()
        return 0
    before = words[: list(words).index(verb)]
    if before and before != ["--json"]:
        parser.parse_args(words)
    module = importlib.import_module(f"deepseek.cli.verbs.{verb}")
    rest = [*before, *words[len(before) + 1 :]]
    return module.run(verb_parser(verb).parse_args(rest), out)


def top_parser() -> argparse.ArgumentParser:
    """Return the parser of `deepseek` itself, which knows the verbs' names only."""
    verbs = "\n".join(f"  {verb:<10} {line}" for verb, line in VERBS.items())
    parser = _Parser(
        prog="deepseek",
        description="A small or mid-sized model through its whole life on the machines you have.",
        epilog=f"verbs:\n{verbs}\n\nexample: deepseek generate smollm2-135m --prompt 'Hello'",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version)
    parser.add_argument(
        "verb", choices=[*VERBS], metavar="VERB", nargs="?", help="what to do, see below"
    )
    return parser


def verb_parser(verb: str) -> argparse.ArgumentParser:
    """Return the parser of one verb, with its options and an example."""
    module = importlib.import_module(f"deepseek.cli.verbs.{verb}")
    parser = _Parser(
        prog=f"deepseek {verb}",
        description=module.__doc__,
        epilog=f"example: {module.EXAMPLE}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object on standard output"
    )
    return parser


class _Version(argparse.Action):
    """Prints the version; looked up only when asked for."""

    def __init__(self, option_strings: Sequence[str], dest: str) -> None:
        super().__init__(option_strings, dest, nargs=0, help="print the version")

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        print(f"deepseek {version('deepseek-stack')}")
        parser.exit()
