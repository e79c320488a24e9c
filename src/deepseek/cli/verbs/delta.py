"""Ship a new version of a model as its small, signed difference from the old one.

  key FILE                                         make a pair of keys, FILE and FILE.pub
  make OLD NEW --out FILE --key KEY                write the package that turns OLD into NEW
  verify FILE --trust PUBKEY [--base BUNDLE]       check one, and whether it fits a bundle
  apply FILE --to BUNDLE --trust PUBKEY            turn a bundle into NEW: all of it or nothing
  rollback BUNDLE                                  take it back to the version before
  forget BUNDLE                                    remove the version kept for that

`deepseek delta ACTION --help` shows each one's options. Exit code 1 when a package is not what was
signed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path

from deepseek.cli.models import ready
from deepseek.cli.output import Output, size
from deepseek.cli.verbs.train import telling
from deepseek.errors import ConfigError, describe
from deepseek.records import Measurement

EXAMPLE = "deepseek delta make runs/int8 runs/tuned --out tuned.delta --key release.key"
_OF_FLOATS = ("before", "margin", "keep")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the actions of `deepseek delta`, each with its options."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    make = actions.add_parser("make", help="write a package")
    make.add_argument("old", metavar="OLD", help="the bundle that it will be applied to")
    make.add_argument(
        "new", metavar="NEW", help="the new version; one in floats is put on OLD's grid first"
    )
    make.add_argument("--out", required=True, metavar="FILE", help="the package")
    make.add_argument("--key", required=True, metavar="FILE", help="the private key that signs")
    make.add_argument("--before", metavar="MODEL", help="what OLD was made of, in floats")
    make.add_argument("--margin", type=float, help="steps past half a step until a code moves (0)")
    make.add_argument("--keep", metavar="FOLDER", help="keep the new version on OLD's grid there")
    make.add_argument(
        "--no-price", action="store_true", help="do not measure what OLD's grid costs"
    )
    apply = actions.add_parser("apply", help="turn a bundle into the new version")
    apply.add_argument("package", metavar="FILE")
    apply.add_argument("--to", required=True, metavar="BUNDLE", help="the old version")
    apply.add_argument("--no-rollback", action="store_true", help="keep no version before")
    verify = actions.add_parser("verify", help="check a package, and whether it fits a bundle")
    verify.add_argument("package", metavar="FILE")
    verify.add_argument("--base", metavar="BUNDLE", help="try it on this bundle, changing nothing")
    for each in (apply, verify):
        each.add_argument("--trust", required=True, metavar="PUBKEY", help="who must have signed")
    for name, words in (
        ("rollback", "take a bundle back to the version before"),
        ("forget", "remove the version that is kept for rollback"),
    ):
        actions.add_parser(name, help=words).add_argument("bundle", metavar="BUNDLE")
    key = actions.add_parser("key", help="make FILE, the private key, and FILE.pub")
    key.add_argument("file", metavar="FILE")
    for each in actions.choices.values():
        # behind the action too; what stands before it must not be unset
        each.add_argument("--json", action="store_true", default=argparse.SUPPRESS)


def run(args: argparse.Namespace, out: Output) -> int:
    """Do what the action says."""
    return _ACTIONS[args.action](args, out)


def _make(args: argparse.Namespace, out: Output) -> int:
    from deepseek.export.delta import make_delta
    from deepseek.export.delta.keys import private_key

    private_key(args.key)  # before the long work
    old, new = (_folder(name, out) for name in (args.old, args.new))
    with telling(out) as tell, contextlib.ExitStack() as stack:
        found: list[Measurement] = []
        report = _report(tell)
        if _is_in_floats(new) and not _is_in_floats(old):
            new, found = _on_grid(args, old, new, out, report, stack)
        elif given := [name for name in _OF_FLOATS if getattr(args, name) is not None]:
            must = "left out, where NEW need not be put on OLD's grid"
            raise ConfigError(
                describe(f"--{given[0]}", "delta make", must, getattr(args, given[0]))
            )
        made = make_delta(old, new, args.out, args.key, report=report)
    found += made.measurements
    out.measurements(args.out, found)
    out.say(
        f"{args.out}: {size(made.package_bytes)}, {100 * made.share:.1f} % of the new version's "
        f"{size(made.bundle_bytes)}"
    )
    result = {"package": args.out, "bytes": made.package_bytes, "bundle_bytes": made.bundle_bytes}
    return out.finish({**result, "bytes_by_kind": dict(made.bytes_by_kind)}, found)


def _on_grid(
    args: argparse.Namespace,
    old: Path,
    new: Path,
    out: Output,
    report: Callable[[str, float | None], None],
    stack: contextlib.ExitStack,
) -> tuple[Path, list[Measurement]]:
    """Put a model in floats on the old bundle's grid; return where, and what that costs."""
    from deepseek.export.delta import on_grid_of

    keep = args.keep
    if keep is None:
        beside = Path(args.out).absolute().parent
        beside.mkdir(parents=True, exist_ok=True)
        keep = stack.enter_context(tempfile.TemporaryDirectory(dir=beside))
    done = on_grid_of(
        old,
        new,
        keep,
        before=None if args.before is None else _folder(args.before, out),
        margin=args.margin or 0.0,
        price_tokens=0 if args.no_price else 1024,
        report=report,
    )
    return done.bundle.path, [*done.measurements]


def _apply(args: argparse.Namespace, out: Output) -> int:
    from deepseek.export.delta import apply_delta

    folder = _folder(args.to, out)
    try:
        with telling(out) as tell:
            done = apply_delta(
                args.package,
                folder,
                args.trust,
                keeps_before=not args.no_rollback,
                report=_report(tell),
            )
    except KeyboardInterrupt:
        out.note("stopped. The bundle is as it was; the same command begins again.")
        raise
    words = "is now" if done.is_changed else "was already"
    out.say(f"{folder} {words} {done.bundle.card.name}, {done.bundle.content_hash[:19]}…")
    if done.is_changed and not args.no_rollback:
        out.say(f"the version before is kept; back: deepseek delta rollback {args.to}")
    return out.finish(
        {**_told(done.bundle.path, done.bundle.content_hash), "changed": done.is_changed}
    )


def _verify(args: argparse.Namespace, out: Output) -> int:
    from deepseek.export.delta import verify_delta

    base = None if args.base is None else _folder(args.base, out)
    with telling(out) as tell:
        found = verify_delta(args.package, args.trust, base, report=_report(tell))
    out.say(f"{args.package}: whole, signed by {found.signed_by}")
    out.say(f"from {found.base_name} {found.base_hash[:19]}…")
    out.say(f"to   {found.target_name} {found.target_hash[:19]}…, {size(found.target_bytes)}")
    if found.is_applied:
        out.say(f"fits {args.base}: every file that it gives was compared")
    return out.finish(dataclasses.asdict(found))


def _rollback(args: argparse.Namespace, out: Output) -> int:
    from deepseek.export.delta import rollback

    bundle = rollback(_folder(args.bundle, out))
    out.say(f"{bundle.path} is {bundle.card.name} again, {bundle.content_hash[:19]}…")
    return out.finish(_told(bundle.path, bundle.content_hash))


def _forget(args: argparse.Namespace, out: Output) -> int:
    from deepseek.export.delta import forget

    folder = _folder(args.bundle, out)
    forget(folder)
    out.say(f"no version before {folder} is kept")
    return out.finish({"path": str(folder)})


def _key(args: argparse.Namespace, out: Output) -> int:
    from deepseek.export.delta import make_keys

    private, public = make_keys(args.file)
    out.say(f"{private}: keep it secret and safe. {public}: give it to those who apply packages.")
    return out.finish({"private": str(private), "public": str(public)})


_ACTIONS: dict[str, Callable[[argparse.Namespace, Output], int]] = {
    "make": _make,
    "apply": _apply,
    "verify": _verify,
    "rollback": _rollback,
    "forget": _forget,
    "key": _key,
}


def _folder(name: str, out: Output) -> Path:
    """Return the folder of a model that is here, or that is pulled now."""
    from deepseek.hub import resolve

    path = resolve(ready(name, out))
    if not path.is_dir():
        raise ConfigError(describe("model", "delta", "a bundle: a folder", str(path)))
    return path


def _is_in_floats(folder: Path) -> bool:
    from deepseek.hub import Bundle

    return not Bundle.open(folder).grids


def _report(tell: Callable[[str, float], None]) -> Callable[[str, float | None], None]:
    return lambda words, share: tell(words, share or 0.0)


def _told(path: Path, content: str) -> dict[str, object]:
    return {"path": str(path), "content_hash": content}
