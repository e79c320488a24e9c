"""`--target edge`: a model within a memory cap, for the verbs that run one."""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING

from deepseek.cli.models import ready
from deepseek.cli.output import Output
from deepseek.errors import ConfigError, describe

if TYPE_CHECKING:
    from deepseek.export import EdgeModel, EdgeProfile

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_CHOSEN_HERE = ("dtype", "exits", "pages", "max_running", "draft", "audit_scheme")
"""Options that a profile decides or that would take memory which it does not count."""


def add_target_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--target` and what belongs to it."""
    group = parser.add_argument_group("a small device")
    group.add_argument(
        "--target",
        choices=("edge",),
        help="edge: keep within a memory cap, by int8 or int4, fewer rows, a shorter context; "
        "--context is then the most tokens of a text",
    )
    group.add_argument(
        "--memory-cap",
        type=byte_count,
        metavar="SIZE",
        help="of the whole process: 512MiB, 4GB (4GB, or its control group's limit)",
    )
    group.add_argument(
        "--rows", type=int, metavar="N", help="most texts together, from 1 to 16 (8)"
    )


def byte_count(word: str) -> int:
    """Return the bytes that a size such as `512MiB` or `4GB` means.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", word)
    unit = match[2].upper() if match else ""
    if match is None or unit not in _UNITS:
        raise argparse.ArgumentTypeError(f"must be a size such as 512MiB or 4GB; got {word!r}")
    return int(float(match[1]) * _UNITS[unit])


def edge_profile(args: argparse.Namespace, reserve_bytes: int = 0) -> EdgeProfile | None:
    """Return the profile that `--target edge` asks for; None where it is not given.

    Args:
        args: of a verb with `add_target_arguments`.
        reserve_bytes: what the verb will take beside the model.

    Raises:
        ConfigError: an option that belongs to the profile alone, or does not go with it.
    """
    owner = f"deepseek {args.verb}"
    if args.target is None:
        for name in ("memory_cap", "rows"):
            if getattr(args, name) is not None:
                must, step = "used with --target edge", "Add --target edge"
                raise ConfigError(describe(_option(name), owner, must, getattr(args, name), step))
        return None
    for name in _CHOSEN_HERE:
        if getattr(args, name, None) is not None:
            must = "left out with --target edge"
            raise ConfigError(describe(_option(name), owner, must, getattr(args, name)))
    if args.attention == "routed":
        must = "auto or dense with --target edge"
        raise ConfigError(describe("--attention", owner, must, args.attention))
    from deepseek.export import EdgeProfile

    asked = {
        "memory_bytes": args.memory_cap,
        "dynamic_batching": args.rows,
        "threads": args.threads,
        "scheme": args.scheme,
        "context": args.context,
    }
    given = {name: value for name, value in asked.items() if value is not None}
    return EdgeProfile(**given, reserve_bytes=reserve_bytes)


def load_for_edge(model: str, profile: EdgeProfile, out: Output) -> EdgeModel:
    """Return a model within a profile, and say what was chosen; it is pulled first if need be."""
    from deepseek.export import optimize_for_edge

    name = ready(model, out)
    with out.progress() as progress:
        edge = optimize_for_edge(
            name, profile, progress=lambda share: progress("packing weights", share)
        )
    out.note(edge.plan.text)
    return edge


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
