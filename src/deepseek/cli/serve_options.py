"""The options of `deepseek serve`, by what they are about."""

from __future__ import annotations

import argparse
import math

from deepseek.cli.models import positive


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what decides how requests share the machine."""
    group = parser.add_argument_group("the engine (what is not given is chosen, see --explain)")
    group.add_argument("--pages", type=positive, help="pages of 64 tokens for keys and values")
    group.add_argument("--max-running", type=positive, help="requests that run together")
    group.add_argument("--max-waiting", type=positive, help="requests that wait; others get 503")
    group.add_argument("--step-tokens", type=positive, help="most tokens of a step")
    group.add_argument("--no-guesses", action="store_true", help="do not guess tokens ahead")
    group.add_argument(
        "--draft",
        metavar="MODEL",
        help="a small model of the same tokenizer that guesses ahead (what the text said before)",
    )
    group.add_argument(
        "--audit", type=positive, metavar="N", help="read one answer in N again, and compare"
    )
    group.add_argument(
        "--audit-scheme",
        metavar="NAME",
        help="scheme of the reference that audits compute (the one that serves)",
    )
    group.add_argument(
        "--price-per-hour",
        type=not_negative,
        metavar="PRICE",
        help="of the machine, for cost a request",
    )


def add_state_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what is kept between runs, and what is served beside the model."""
    group = parser.add_argument_group("state and what is beside the model")
    group.add_argument(
        "--state",
        metavar="FOLDER",
        help="where keys, usage, files, batches and responses are kept; 'none' for nothing "
        "($DEEPSEEK_HOME/serve/NAME)",
    )
    group.add_argument("--database", metavar="URL", help="of PostgreSQL, in place of SQLite")
    group.add_argument("--events", metavar="FILE", help="append the event of every answer as JSON")
    group.add_argument(
        "--embeddings",
        metavar="MODEL",
        help="an encoder for /v1/embeddings and /v1/rerank (the model's own states)",
    )
    group.add_argument(
        "--embeddings-scheme",
        default="bfloat16",
        metavar="NAME",
        help="how that encoder is stored and computed (bfloat16)",
    )
    group.add_argument(
        "--pooling",
        choices=("mean", "last"),
        default="mean",
        help="which of the model's own states make a text's vector (mean)",
    )
    group.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="NAME=FOLDER",
        help="a low-rank adapter that can be asked for by its name",
    )


def add_key_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what changes keys in place of serving."""
    keys = parser.add_argument_group("keys (does that alone, and ends)")
    keys.add_argument("--add-key", metavar="NAME", help="make a key, shown once")
    keys.add_argument("--key-admin", action="store_true", help="it opens the admin routes")
    keys.add_argument("--key-requests", type=positive, metavar="N", help="a minute, for that key")
    keys.add_argument("--key-tokens", type=positive, metavar="N", help="a minute, for that key")
    keys.add_argument("--key-concurrency", type=positive, metavar="N", help="at once, for that key")
    keys.add_argument("--revoke-key", metavar="ID", help="refuse a key from now on")
    keys.add_argument("--list-keys", action="store_true", help="show all keys and what they used")


def port(word: str) -> int:
    """Return the number of a port; 0 is any free one.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    if not word.isdecimal() or int(word) > 65_535:
        raise argparse.ArgumentTypeError(f"must be a number from 0 to 65535; got {word!r}")
    return int(word)


def not_negative(word: str) -> float:
    """Return a number of at least 0.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    try:
        value = float(word)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError(f"must be a number of at least 0; got {word!r}")
    return value
