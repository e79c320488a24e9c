"""The main job, start to end, on a real model.

Looks at the machine, gets the model, shows it equal to transformers, lets it answer, measures
quality, speed and memory, makes it smaller and proves that it still works, exports it and proves
that too, makes an update of it, serves it to many at once, and writes a bundle with a card and an
HTML report.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from pathlib import Path

from deepseek.cli.models import positive
from deepseek.cli.output import Output
from deepseek.errors import VerifyError, missing_extra

NEEDED = ("transformers", "matplotlib", "fastapi", "openai")
EXAMPLE = "deepseek demo --to deepseek-demo"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `deepseek demo`."""
    parser.add_argument(
        "model", metavar="MODEL", nargs="?", default="smollm2-135m", help="(smollm2-135m)"
    )
    parser.add_argument("--to", metavar="FOLDER", default="deepseek-demo", help="(deepseek-demo)")
    parser.add_argument("--threads", type=positive, help="threads to compute with (all cores)")


def run(args: argparse.Namespace, out: Output) -> int:
    """Run every step, write the bundle and the report; fail if something checked does not hold."""
    for package in NEEDED:
        if importlib.util.find_spec(package) is None:
            raise missing_extra(package, "demo", "by the demo")
    from deepseek.cli.demo.state import Demo
    from deepseek.cli.demo.steps import STEPS
    from deepseek.cli.report import write_report

    if args.threads is not None:
        import torch

        torch.set_num_threads(args.threads)
    demo = Demo(args.model, Path(args.to), out)
    start_s = time.perf_counter()
    for place, step in enumerate(STEPS, 1):
        title = (step.__doc__ or step.__name__).strip().rstrip(".")
        out.say(f"\n[{place}/{len(STEPS)}] {title}")
        section = step(demo)
        demo.sections.append(section)
        if step.__name__ != "answer":
            out.say(section.words)
        if section.measurements:
            out.measurements("", section.measurements)
    bundle, report = _write(demo)
    write_report(report, f"deepseek demo: {args.model}", demo.sections)
    out.say(f"\nbundle with its card: {bundle}\nreport: {report}")
    out.say(f"done in {time.perf_counter() - start_s:.0f} s")
    if demo.failures:
        raise VerifyError("; ".join(demo.failures))
    return out.finish({"bundle": str(bundle), "report": str(report)}, demo.measurements)


def _write(demo) -> tuple[Path, Path]:
    from deepseek import hub
    from deepseek.records import Parent, StageRecord

    source = demo.bundle
    saved = hub.save(
        demo.model("bfloat16"),
        demo.folder / "bundle",
        name=f"{source.card.name}-demo",
        summary=source.card.summary,
        license=source.card.license,
        parents=(Parent(name=source.card.name, content_hash=source.content_hash),),
        stage=StageRecord(name="demo", settings={"dtype": "bfloat16"}),
        measurements=tuple(demo.measurements),
    )
    return saved.path, demo.folder / "report.html"
