"""Talk to a model.

Ctrl-C stops the answer, not the program; Ctrl-D or /quit leaves, /reset forgets the dialogue.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from deepseek.cli.edge import add_target_arguments, edge_profile, load_for_edge
from deepseek.cli.models import (
    add_attention_argument,
    add_length_arguments,
    add_model_arguments,
    add_scheme_argument,
    load_generator,
    read_memory,
)
from deepseek.cli.output import Output
from deepseek.cli.sampling import add_sampling_arguments, read_sampling
from deepseek.errors import CapacityError, ConfigError, describe

if TYPE_CHECKING:
    from deepseek.generate import Engine, Memory, Sampling
    from deepseek.models import Decoder

EXAMPLE = "deepseek chat smollm2-135m --temperature 0.6"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `deepseek chat`."""
    add_model_arguments(parser)
    add_scheme_argument(parser)
    add_attention_argument(parser)
    add_length_arguments(parser)
    parser.add_argument("--system", metavar="TEXT", help="system message")
    add_sampling_arguments(parser, temperature=0.6)
    add_target_arguments(parser)
    parser.set_defaults(verb="chat")


def run(args: argparse.Namespace, out: Output) -> int:
    """Read questions from standard input until it ends, and answer each."""
    sampling, memory = read_sampling(args), read_memory(args)
    profile = edge_profile(args)
    edge = None if profile is None else load_for_edge(args.model, profile, out)
    model = load_generator(args, out) if edge is None else edge.engine
    if model.tokenizer is None:
        step = "Use a model folder that has tokenizer.json"
        raise ConfigError(
            describe("MODEL", "deepseek chat", "one with a tokenizer", args.model, step)
        )
    first = [{"role": "system", "content": args.system}] if args.system else []
    history = [*first]
    while (question := _ask(out)) is not None:
        if question == "/reset":
            history = [*first]
            out.note("(forgotten)")
        elif question:
            history.append({"role": "user", "content": question})
            _answer(model, history, sampling, memory, args, out)
    return out.finish({"model": args.model, "messages": history})


def _ask(out: Output) -> str | None:
    """Return the next question; None at the end of the input."""
    is_person = sys.stdin.isatty()
    while True:
        try:
            if is_person:
                print("> ", end="", file=sys.stderr, flush=True)
            line = sys.stdin.readline()
        except KeyboardInterrupt:
            out.note("\n(Ctrl-D or /quit leaves)")
            continue
        except UnicodeDecodeError:
            out.note("(not UTF-8 text, ignored)")
            continue
        question = line.strip()
        return None if not line or question == "/quit" else question


def _answer(
    model: Decoder | Engine,
    history: list[dict[str, str]],
    sampling: Sampling,
    memory: Memory | None,
    args: argparse.Namespace,
    out: Output,
) -> None:
    """Stream the answer and add it to the history; a question that cannot be read is taken back."""
    from deepseek.generate import chat_prompt, stream

    assert model.tokenizer is not None
    said: list[str] = []
    try:
        pieces = stream(
            model,
            chat_prompt(model.tokenizer, history),
            max_tokens=args.max_tokens,
            sampling=sampling,
            stop=args.stop,
            memory=memory,
        )
        for piece in pieces:
            said.append(piece.text)
            out.say(piece.text, end="")
    except KeyboardInterrupt:
        out.note(" (stopped)")
    except CapacityError as error:
        history.pop()
        out.note(f"{error} Type /reset to start again.")
        return
    out.say()
    history.append({"role": "assistant", "content": "".join(said)})
