"""Continue a text, or answer a question with `--chat`; the text is printed as it comes."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from deepseek.cli.edge import add_target_arguments, edge_profile, load_for_edge
from deepseek.cli.models import (
    add_attention_argument,
    add_exits_argument,
    add_length_arguments,
    add_model_arguments,
    add_scheme_argument,
    load_generator,
    read_exits,
    read_memory,
)
from deepseek.cli.output import Output
from deepseek.cli.sampling import add_sampling_arguments, read_sampling
from deepseek.errors import ConfigError, describe

if TYPE_CHECKING:
    from deepseek.generate import Completion, Engine
    from deepseek.models import Decoder

EXAMPLE = "deepseek generate smollm2-135m --chat --prompt 'What is the capital of France?'"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `deepseek generate`."""
    add_model_arguments(parser)
    add_scheme_argument(parser)
    add_attention_argument(parser)
    add_length_arguments(parser)
    add_exits_argument(parser)
    parser.add_argument("--prompt", help="the text to continue; - reads standard input")
    parser.add_argument("--chat", action="store_true", help="put the prompt as a user's message")
    parser.add_argument("--system", metavar="TEXT", help="system message, with --chat")
    add_sampling_arguments(parser)
    add_target_arguments(parser)
    parser.set_defaults(verb="generate")


def run(args: argparse.Namespace, out: Output) -> int:
    """Generate, streaming the text to standard output."""
    sampling, memory = read_sampling(args), read_memory(args)
    prompt, profile = _prompt(args), edge_profile(args)
    edge = None if profile is None else load_for_edge(args.model, profile, out)
    model = load_generator(args, out) if edge is None else edge.engine
    exits = read_exits(args, model.config.num_layers)
    from deepseek.generate import Completion, generate

    completion = generate(
        model,
        _ids(model, prompt, args) if args.chat else prompt,
        max_tokens=args.max_tokens,
        sampling=sampling,
        stop=args.stop,
        memory=memory,
        exits=exits,
        on_piece=lambda piece: out.say(piece.text, end=""),
    )
    assert isinstance(completion, Completion)
    out.say()
    runs_on = _runs_on(model, leaves=exits is not None)
    result = {"model": args.model, "runs_on": runs_on, **completion.to_dict()}
    if edge is not None:
        result["edge"] = edge.plan.to_dict()
    return out.finish(result, _speed(completion, args))


def _runs_on(model: Decoder | Engine, leaves: bool) -> dict[str, object]:
    """Return what computed: the engine with its scheme and instruction set, or the modules."""
    from deepseek.generate import Engine

    if not isinstance(model, Engine):
        from deepseek.generate.modules import engine_of

        engine = None if leaves else engine_of(model)
        if engine is None:
            return {"engine": False, "dtype": str(model.dtype).removeprefix("torch.")}
        model = engine
    return {
        "engine": True,
        "scheme": model.scheme.name,
        "instruction_set": model.instruction_set,
        "threads": model.threads,
    }


def _prompt(args: argparse.Namespace) -> str:
    if args.system is not None and not args.chat:
        step = "Add --chat"
        raise ConfigError(
            describe("--system", "deepseek generate", "used with --chat", args.system, step)
        )
    if args.prompt is not None and args.prompt != "-":
        return args.prompt
    if args.prompt is None and sys.stdin.isatty():
        step = "Give --prompt TEXT, or pipe the text in"
        raise ConfigError(describe("--prompt", "deepseek generate", "given", None, step))
    text = sys.stdin.buffer.read()
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        must = "UTF-8 text"
        raise ConfigError(
            describe("standard input", "deepseek generate", must, str(error))
        ) from error


def _ids(model: Decoder | Engine, prompt: str, args: argparse.Namespace) -> list[int]:
    from deepseek.generate import chat_prompt

    if model.tokenizer is None:
        step = "Use a model folder that has tokenizer.json"
        raise ConfigError(
            describe("--chat", "deepseek generate", "off without a tokenizer", True, step)
        )
    messages = [{"role": "user", "content": prompt}]
    if args.system is not None:
        messages.insert(0, {"role": "system", "content": args.system})
    return chat_prompt(model.tokenizer, messages)


def _speed(completion: Completion, args: argparse.Namespace) -> list:
    from deepseek.records import Measurement

    conditions = {
        "model": args.model,
        "prompt_tokens": completion.num_prompt_tokens,
        "new_tokens": len(completion.token_ids),
        "runs": 1,
    }
    figures = (
        ("first_token_s", completion.first_token_s, "s"),
        ("total_s", completion.total_s, "s"),
    )
    if completion.depths is not None:
        conditions["exits"] = args.exits
        mean = sum(completion.depths) / len(completion.depths)
        figures = (*figures, ("mean_layers", mean, "layers/token"))
    return [
        Measurement(name=name, value=value, unit=unit, conditions=conditions)
        for name, value, unit in figures
    ]
