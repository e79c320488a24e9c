"""A bundle's card: what it is, what it was made from, what was measured of it."""

from __future__ import annotations

import argparse
import dataclasses
from typing import TYPE_CHECKING

from deepseek.cli.models import ready
from deepseek.cli.output import Output, size

if TYPE_CHECKING:
    from deepseek.hub import Bundle

EXAMPLE = "deepseek show smollm2-135m --verify"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `deepseek show`."""
    parser.add_argument("model", metavar="MODEL", help="a name or a folder")
    parser.add_argument("--verify", action="store_true", help="read every file and check its hash")


def _attention(bundle: Bundle) -> str:
    """Return in words what a card records of attention; empty where it records nothing."""
    if bundle.routing is None:
        return ""
    fields = dataclasses.asdict(bundle.routing)
    return "routed: " + ", ".join(f"{name} {value}" for name, value in fields.items())


def run(args: argparse.Namespace, out: Output) -> int:
    """Show the card; with `--verify` fail if a file is not as it was written."""
    from deepseek import hub
    from deepseek.hub.grids import words_of

    bundle = hub.Bundle.open(hub.resolve(ready(args.model, out)), verify=args.verify)
    card, config = bundle.card, bundle.config
    facts = [
        ("name", card.name),
        ("what", card.summary),
        ("licence", card.license),
        ("folder", str(bundle.path)),
        ("family", str(config.get("model_type"))),
        ("parameters", f"{bundle.num_parameters:,}"),
        ("attention", _attention(bundle)),
        ("weights on grids", words_of(bundle.grids)),
        ("keys and values", bundle.kv or ""),
        ("size", size(bundle.size_bytes)),
        ("content", bundle.content_hash),
        ("made", card.created),
        (
            "by stage",
            "" if card.stage is None else f"{card.stage.name} {dict(card.stage.settings)}",
        ),
        *(("from", f"{parent.name} {parent.content_hash}") for parent in card.parents),
        ("versions", ", ".join(f"{name} {value}" for name, value in card.versions.items())),
    ]
    out.table("", ("", ""), [(name, value) for name, value in facts if value])
    out.table(
        "files",
        ("file", "size", "sha256"),
        [(name, size(f.size_bytes), f.sha256[:16]) for name, f in sorted(card.files.items())],
    )
    if card.measurements:
        out.measurements("measured", card.measurements)
    out.verdicts(card.verdicts)
    if args.verify:
        out.say("every file is as it was written")
    result = {"card": card.to_dict(), "path": str(bundle.path), "verified": bool(args.verify)}
    result |= {"content_hash": bundle.content_hash, "num_parameters": bundle.num_parameters}
    result |= {"weights_on_grids": words_of(bundle.grids), "kv": bundle.kv}
    return out.finish(result, card.measurements)
