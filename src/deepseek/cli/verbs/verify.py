"""Prove that an exported model computes what its source does, by generated cases.

Rows of every length, padding on either side, batches, ids with a meaning, texts in many scripts,
long rows, and reading on through a cache. A case that departs is made as small as can be, and the
first layer that goes wrong is named. Exit code 1 when a case departs.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from deepseek.cli.models import positive, ready
from deepseek.cli.output import Output
from deepseek.cli.verbs.train import telling
from deepseek.errors import ConfigError, FormatError, describe

if TYPE_CHECKING:
    from deepseek.export.verifying.cases import Case
    from deepseek.export.verifying.verifier import Verified

EXAMPLE = "deepseek verify smollm2-135m exported --report report"
EXIT_FAILED_CHECK = 1
_TOLERANCES = ("float32", "float16", "bfloat16", "int8", "int4")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `deepseek verify`."""
    parser.add_argument("source", metavar="SOURCE", help="the model: a name or folder")
    parser.add_argument("exported", metavar="EXPORTED", help="what deepseek export wrote of it")
    parser.add_argument("--cases", type=positive, default=1000, help="how many are asked (1000)")
    parser.add_argument("--seed", type=int, default=0, help="of the cases (0)")
    parser.add_argument(
        "--case", metavar="ID|FILE", help="ask only this one again, or one that a report wrote"
    )
    parser.add_argument("--report", metavar="FOLDER", help="write report.html and report.json here")
    parser.add_argument(
        "--tolerance",
        choices=_TOLERANCES,
        help="what the export's numbers are (as its manifest says, float32 where it says nothing)",
    )
    parser.add_argument(
        "--longest", type=positive, default=2048, help="most tokens of a row (2048)"
    )
    parser.add_argument("--threads", type=positive, help="threads to compute with (all cores)")


def run(args: argparse.Namespace, out: Output) -> int:
    """Verify, and show what was found."""
    name = ready(args.source, out)
    if not Path(args.exported).exists():
        step = "Make it first: deepseek export"
        raise ConfigError(describe("EXPORTED", "deepseek verify", "there", args.exported, step))
    from deepseek.export import verify

    if args.threads is not None:
        import torch

        torch.set_num_threads(args.threads)
    try:
        with telling(out) as tell:
            found = verify(
                name,
                args.exported,
                cases=args.cases,
                seed=args.seed,
                only=None if args.case is None else _case(args.case),
                tolerance=args.tolerance,
                longest=args.longest,
                report=args.report,
                threads=args.threads,
                progress=lambda words, share: tell(words, share or 0.0),
            )
    except KeyboardInterrupt:
        if args.report is not None:
            out.note(f"stopped. What was found until then is in {args.report}")
        raise
    _show(found, out, args.report)
    return _finish(found, out)


def _case(word: str) -> str | Case:
    """Return a case's id, or the case in a file."""
    path = Path(word)
    if path.suffix != ".json":
        return word
    from deepseek.export.verifying.cases import Case
    from deepseek.hub.bundle import read_json

    if not path.is_file():
        raise FormatError(describe("--case", "deepseek verify", "a file that is there", word))
    return Case.from_dict(read_json(path))


def _show(found: Verified, out: Output, report: str | None) -> None:
    from deepseek.export.verifying.report import described, verdict

    out.measurements(f"{found.exported} against {found.source}", found.measurements)
    for each in found.smallest:
        out.say(f"\n{each.case.id}: {each.departure.words}")
        out.say(f"the smallest case found: {described(each.smallest)}")
        out.say(f"where: {each.location.words}")
    out.say(verdict(found))
    if report is not None:
        out.say(f"the report is in {Path(report) / 'report.html'}")


def _finish(found: Verified, out: Output) -> int:
    from deepseek.export.verifying.report import to_dict, verdict

    result = to_dict(found)
    del result["measurements"], result["cases"]
    out.finish(result, found.measurements)
    if found.holds:
        return 0
    first = found.departed[0].case.id if found.departed else None
    step = "" if first is None else f"Ask one again with --case {first}"
    told = describe("export", found.exported, "equal to its source", verdict(found), step)
    out.note(f"deepseek: {told}")
    return EXIT_FAILED_CHECK
