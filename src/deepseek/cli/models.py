"""What the verbs that run a model share: its arguments, and getting it ready."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from deepseek.cli.output import Output
from deepseek.errors import ConfigError, describe

if TYPE_CHECKING:
    from deepseek.generate import Engine, Memory
    from deepseek.hub import Bundle
    from deepseek.models import Decoder, Encoder, Exits

DTYPES = ("float32", "bfloat16", "float16")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add MODEL, `--dtype` and `--threads`."""
    parser.add_argument(
        "model", metavar="MODEL", help="a name (smollm2-135m), a folder, a .gguf file"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="dtype of the weights (as stored)")
    parser.add_argument("--threads", type=positive, help="threads to compute with (all cores)")


def add_scheme_argument(parser: argparse.ArgumentParser) -> None:
    """Add `--scheme`."""
    from deepseek.ops.scheme import SCHEMES

    parser.add_argument(
        "--scheme",
        choices=SCHEMES,
        metavar="NAME",
        help=f"how generation stores and computes the weights: {', '.join(SCHEMES)} (as stored)",
    )


def add_attention_argument(parser: argparse.ArgumentParser) -> None:
    """Add `--attention`."""
    parser.add_argument(
        "--attention",
        choices=("auto", "dense", "routed"),
        default="auto",
        help="dense: every token sees all before it; routed: the blocks of them that it chooses, "
        "for long texts; auto: what the bundle's card records, dense where it records nothing",
    )


def add_length_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--context` and `--memory`."""
    parser.add_argument(
        "--context",
        type=positive,
        metavar="TOKENS",
        help="stretch the model's positions to so many tokens, where its own context is shorter",
    )
    parser.add_argument(
        "--memory",
        type=positive,
        metavar="TOKENS",
        help="keep at most so many tokens (a multiple of 64), the first and the most recent ones, "
        "so that a text may have any length",
    )


def read_memory(args: argparse.Namespace) -> Memory | None:
    """Return the memory that `--memory` asks for.

    Raises:
        ConfigError: a number that cannot be one.
    """
    from deepseek.generate import Memory

    return None if args.memory is None else Memory.of(args.memory)


def add_exits_argument(parser: argparse.ArgumentParser) -> None:
    """Add `--exits`."""
    parser.add_argument(
        "--exits",
        metavar="FILE|THRESHOLD",
        help="let tokens leave early: as a calibration says, or where the margin of the two "
        "likeliest tokens is above a threshold (0 to 1) behind a half or three quarters of the "
        "layers; runs through PyTorch",
    )


def read_exits(args: argparse.Namespace, num_layers: int) -> Exits | None:
    """Return the exits that `--exits` asks for, of a model of so many layers.

    Raises:
        ConfigError: a number that is no threshold, or a calibration that found none.
        FormatError: a file that is no calibration.
    """
    if args.exits is None:
        return None
    from deepseek.models import Exits

    try:
        return Exits.of(num_layers, float(args.exits))
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
    from deepseek.evaluate import ExitCalibration

    found = ExitCalibration.read(args.exits).exits
    if found is None:
        must = "a calibration that found a threshold"
        step = "Allow more disagreement, or train the model for exits"
        raise ConfigError(describe("--exits", f"deepseek {args.verb}", must, args.exits, step))
    return found


def positive(word: str) -> int:
    """Return a whole number of at least 1.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    if not word.isdigit() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1; got {word!r}")
    return int(word)


def ready(name: str, out: Output) -> str:
    """Return the name of a model that is here; a known name that is not is pulled."""
    from deepseek import hub
    from deepseek.hub.names import NAMES, canonical_name

    try:
        hub.resolve(name)
    except ConfigError:
        if canonical_name(name) not in NAMES:
            raise
        with out.progress() as progress:
            hub.pull(name, progress=progress)
    return name


def load_model(args: argparse.Namespace, out: Output) -> Decoder | Encoder:
    """Return the model that MODEL, `--dtype` and `--threads` ask for, pulled first if need be."""
    name = ready(args.model, out)
    import torch

    from deepseek.face import load

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    return load(
        name,
        dtype=args.dtype,
        scheme=getattr(args, "scheme", None),
        attention=getattr(args, "attention", "auto"),
        context=getattr(args, "context", None),
    )


def load_generator(args: argparse.Namespace, out: Output) -> Decoder | Engine:
    """Return what generates: an engine, which starts without torch, where `--dtype` does not ask
    for the modules' own weights; or else the decoder, with a word on why.

    Raises:
        ConfigError: the model is an encoder, or `--scheme` asks for what it has not.
    """
    name = ready(args.model, out)
    leaves = getattr(args, "exits", None) is not None
    if args.dtype is None and not leaves:
        from deepseek.face import load_engine

        with out.progress() as progress:
            engine = load_engine(
                name,
                scheme=args.scheme,
                attention=args.attention,
                threads=args.threads,
                context=args.context,
                progress=lambda share: progress("packing weights", share),
            )
        if engine is not None:
            return engine
    model = load_decoder(args, out)
    from deepseek.generate.modules import why_no_engine

    reason = "tokens leave early" if leaves else why_no_engine(model)
    if reason is not None:
        out.note(f"(runs through PyTorch: {reason})")
    return model


def bundle_of(model: Decoder, verb: str) -> Bundle:
    """Return the bundle a model was loaded from.

    Raises:
        ConfigError: it came from a `.gguf` file, which has none.
    """
    from deepseek.hub import Bundle

    if not isinstance(model.bundle, Bundle):
        step = "Make one first: deepseek pull FILE.gguf --to FOLDER"
        raise ConfigError(describe("MODEL", f"deepseek {verb}", "a bundle", "a .gguf file", step))
    return model.bundle


def load_decoder(args: argparse.Namespace, out: Output) -> Decoder:
    """Return a model that can generate.

    Raises:
        ConfigError: the model is an encoder.
    """
    from deepseek.models import Decoder

    model = load_model(args, out)
    if not isinstance(model, Decoder):
        step = "Encoders give vectors: see model.embed"
        raise ConfigError(describe("MODEL", f"deepseek {args.verb}", "a decoder", args.model, step))
    return model
