"""The options of sampling, shared by `generate` and `chat`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from deepseek.cli.models import positive

if TYPE_CHECKING:
    from deepseek.ops.sampling import Sampling

FIELDS = (
    ("temperature", float, 0.0, "0 takes the likeliest token"),
    ("top-k", int, 0, "sample from the k likeliest tokens, 0 for all"),
    ("top-p", float, 1.0, "sample from the likeliest tokens that hold this share"),
    ("min-p", float, 0.0, "drop tokens below this share of the likeliest"),
    ("repetition-penalty", float, 1.0, "divide the scores of tokens seen before"),
    ("frequency-penalty", float, 0.0, "lower scores by how often a token was generated"),
    ("presence-penalty", float, 0.0, "lower scores of tokens that were generated"),
)


def add_sampling_arguments(parser: argparse.ArgumentParser, *, temperature: float = 0.0) -> None:
    """Add `--max-tokens`, `--seed`, `--stop` and the fields of `Sampling`."""
    parser.add_argument("--max-tokens", type=positive, default=256, help="most tokens (256)")
    parser.add_argument("--seed", type=int, help="the same seed gives the same text")
    parser.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end before this text; may repeat",
    )
    for name, kind, default, text in FIELDS:
        default = temperature if name == "temperature" else default
        parser.add_argument(f"--{name}", type=kind, default=default, help=f"{text} ({default})")


def read_sampling(args: argparse.Namespace) -> Sampling:
    """Return the sampling that the options ask for.

    Raises:
        ConfigError: a value out of range.
    """
    from deepseek.ops.sampling import Sampling

    names = [name.replace("-", "_") for name, *_ in FIELDS]
    return Sampling(seed=args.seed, **{name: getattr(args, name) for name in names})
