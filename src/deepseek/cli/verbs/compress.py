"""Make a model smaller, in stages, and prove that it still works.

One model and a target, or a pipeline of stages and gates in a file. Exit code 1 when a gate does
not hold; the bundle is there then, and its card says so.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepseek.cli.models import positive, ready
from deepseek.cli.output import Output, size
from deepseek.cli.verbs.train import telling
from deepseek.errors import ConfigError, describe

if TYPE_CHECKING:
    from deepseek.compress import Compressed, Pipeline

EXAMPLE = "deepseek compress smollm2-135m --to int4 --out runs/small"
EXIT_FAILED_CHECK = 1
_TARGETS = ("int8", "int4")
_OF_TARGET = ("to", "method", "group", "rotate", "text", "samples", "head_bits")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `deepseek compress`."""
    parser.add_argument(
        "model", metavar="MODEL|FILE", help="a name or folder; or a pipeline, .yaml or .py"
    )
    parser.add_argument(
        "--out", required=True, metavar="FOLDER", help="where the run lives; it goes on from there"
    )
    parser.add_argument("--to", choices=_TARGETS, help="the weights' grid (int8)")
    parser.add_argument(
        "--method",
        choices=("round", "awq", "gptq", "learned"),
        help="how the grid is found (round for int8, learned for int4)",
    )
    parser.add_argument(
        "--group", type=int, choices=(32, 64, 128), help="weights of one scale (a row, or 32)"
    )
    parser.add_argument(
        "--rotate",
        action=argparse.BooleanOptionalAction,
        help="spread outliers before 8 bits are rounded (for int8, where it can be)",
    )
    parser.add_argument("--head-bits", type=int, choices=(4, 8), help="of embedding and head (8)")
    parser.add_argument("--text", metavar="FILE", help="to learn from (inside Python)")
    parser.add_argument("--samples", type=positive, help="texts to learn from (128)")
    parser.add_argument("--kv", choices=("bfloat16", "int8"), help="how keys and values are cached")
    parser.add_argument("--seed", type=int, help="of samples and whatever is drawn (0)")
    parser.add_argument("--no-gates", action="store_true", help="judge nothing")


def run(args: argparse.Namespace, out: Output) -> int:
    """Compress, and show what was measured and what the gates say."""
    from deepseek.compress import compress

    asked = _pipeline(args)
    ready(asked.model, out)
    try:
        with telling(out) as tell:
            done = compress(asked, args.out, report=lambda words, share: tell(words, share or 0.0))
    except KeyboardInterrupt:
        out.note("stopped. The same command goes on from the last stage that is done.")
        raise
    _show(done, out)
    result = {
        "out": args.out,
        "bundle": str(done.bundle.path),
        "bytes": done.bundle.size_bytes,
        "verdicts": [verdict.to_dict() for verdict in done.verdicts],
    }
    found = [*done.bundle.card.measurements]
    found += [item for verdict in done.verdicts for item in verdict.measurements]
    out.finish(result, found)
    if not done.is_refused:
        return 0
    failed = [f"{each.gate}: {each.words}" for each in done.verdicts if not each.holds]
    step = "The bundle is there, marked; give it more time or bits, or other gates"
    out.note(f"deepseek: {describe('gates', args.out, 'held, all', '; '.join(failed), step)}")
    return EXIT_FAILED_CHECK


def _pipeline(args: argparse.Namespace) -> Pipeline:
    from deepseek.compress import read_pipeline

    if Path(args.model).suffix not in (".yaml", ".yml", ".py"):
        return _of_target(args)
    given = [name for name in (*_OF_TARGET, "kv") if getattr(args, name, None) is not None]
    if given:
        must = "in the file, where one is given"
        raise ConfigError(describe(f"--{given[0]}", "compress", must, getattr(args, given[0])))
    asked = read_pipeline(args.model)
    changes: dict[str, object] = {} if args.seed is None else {"seed": args.seed}
    return asked.replace(**changes, **({"gates": ()} if args.no_gates else {}))


def _of_target(args: argparse.Namespace) -> Pipeline:
    from deepseek.compress import Pipeline, Quantize, usual_gates

    bits = 4 if args.to == "int4" else 8
    method = args.method or ("learned" if bits == 4 else "round")
    # rounding learns nothing: a few samples tell how far the layers' outputs move
    samples = args.samples or (4 if method == "round" else None)
    calibration = {"text": args.text, "samples": samples, "seed": args.seed}
    settings = {name: getattr(args, name) for name in ("method", "group", "head_bits", "rotate")}
    stage = Quantize.usual(bits, calibration=_given(calibration), **_given(settings))
    return Pipeline(
        model=args.model,
        stages=(stage,),
        gates=() if args.no_gates else usual_gates(bits),
        kv=args.kv,
        seed=args.seed or 0,
    )


def _given(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if value is not None}


def _show(done: Compressed, out: Output) -> None:
    out.measurements(str(done.bundle.path), done.bundle.card.measurements)
    out.verdicts(done.verdicts)
    out.say(f"the model is in {done.bundle.path}, {size(done.bundle.size_bytes)}")
