"""The models that are here, those that can be pulled by name, and what is packed of them."""

from __future__ import annotations

import argparse

from deepseek.cli.output import Output, size

EXAMPLE = "deepseek list --json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`deepseek list` has no options of its own."""


def run(args: argparse.Namespace, out: Output) -> int:
    """List the store, then the names that can be pulled."""
    from deepseek import hub
    from deepseek.hub.names import NAMES
    from deepseek.hub.packed import BYTES_VARIABLE, kept_weights, packed_bound
    from deepseek.hub.store import store_folder

    here = hub.list_bundles()
    rows = [(b.path.name, size(b.size_bytes), b.card.license, b.card.summary) for b in here]
    out.table(f"in {store_folder()}", ("model", "size", "licence", "what"), rows)
    names = {bundle.path.name for bundle in here}
    absent = [(name, model) for name, model in NAMES.items() if name not in names]
    if absent:
        rows = [(name, "", model.license, model.summary) for name, model in absent]
        out.table("can be pulled", ("model", "", "licence", "what"), rows)
    kept = kept_weights()
    if kept:
        total = sum(each.size_bytes for each in kept)
        bound = f"at most {size(packed_bound())}, {BYTES_VARIABLE}"
        out.say(f"\npacked weights: {len(kept)} files, {size(total)} ({bound})")
    listed = [
        {"name": b.path.name, "path": str(b.path), "bytes": b.size_bytes, "card": b.card.name}
        for b in here
    ]
    packed = [
        {"path": str(each.path), "model": each.folder, "bytes": each.size_bytes} for each in kept
    ]
    names_absent = [name for name, _ in absent]
    return out.finish({"bundles": listed, "can_be_pulled": names_absent, "packed": packed})
