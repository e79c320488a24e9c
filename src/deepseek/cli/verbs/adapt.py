"""Adapt a model: to a domain's text, to conversations, or to preferences."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from deepseek.cli.models import positive, ready
from deepseek.cli.output import Output, number
from deepseek.errors import ConfigError, VerifyError, describe

if TYPE_CHECKING:
    from deepseek.train.adapt import Adaptation, Change, Kind

_SETTINGS = (
    "method",
    "epochs",
    "steps",
    "length",
    "batch",
    "micro_batch",
    "rate",
    "rank",
    "replay",
    "replay_text",
    "keep",
    "held_out",
    "general",
    "precision",
    "seed",
)
"""Options that are fields of an `Adaptation`."""
EXAMPLE = "deepseek adapt smollm2-135m plays.txt --replay 0.5 --out runs/plays"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `deepseek adapt`."""
    parser.add_argument("model", metavar="MODEL", help="a name (smollm2-135m) or a folder")
    parser.add_argument(
        "data",
        metavar="DATA",
        help="text (a file or folder), or .jsonl of conversations (messages) or of preferences "
        "(prompt, chosen, rejected)",
    )
    parser.add_argument(
        "--out", required=True, metavar="FOLDER", help="where the run lives; it goes on from there"
    )
    parser.add_argument(
        "--method",
        choices=("full", "lora", "qlora"),
        help="all weights, low-rank adapters, or those over a base in four bits (full for text, "
        "else lora)",
    )
    parser.add_argument("--epochs", type=_positive_float, help="how often the data comes (1)")
    parser.add_argument("--steps", type=positive, help="optimizer steps, in place of --epochs")
    parser.add_argument("--length", type=positive, help="tokens of a sample (512)")
    parser.add_argument("--batch", type=positive, help="samples or pairs of a step (8)")
    parser.add_argument("--micro-batch", type=positive, help="those of a forward pass")
    parser.add_argument("--rate", type=_positive_float, help="largest learning rate")
    parser.add_argument("--rank", type=positive, help="of adapters (16)")
    parser.add_argument(
        "--replay",
        type=float,
        metavar="SHARE",
        help="share of the samples that the old model writes and teaches, so that it stays known "
        "(0.5 for text, else 0)",
    )
    parser.add_argument(
        "--replay-text",
        nargs="+",
        metavar="FILE",
        help="texts of the kind to be kept, taught by the old model too: each has as large a part "
        "of the replay as what it writes itself",
    )
    parser.add_argument(
        "--keep",
        type=float,
        metavar="SHARE",
        help="share of the old weights in the result, an average of old and new (0.3 for text with "
        "all weights, else 0)",
    )
    parser.add_argument("--held-out", metavar="FILE", help="to measure on (a twentieth of DATA)")
    parser.add_argument(
        "--general",
        nargs="+",
        metavar="FILE",
        help="texts of what is to be kept (the documentation inside Python)",
    )
    parser.add_argument(
        "--most-forgotten",
        type=float,
        metavar="PERCENT",
        help="fail where the perplexity of a general text rises by more",
    )
    parser.add_argument("--beta", type=_positive_float, help="of preferences (0.1)")
    parser.add_argument(
        "--precision", choices=("float32", "bfloat16"), help="of products (bfloat16)"
    )
    parser.add_argument("--seed", type=int, help="of order, adapters and sampling (0)")
    parser.add_argument("--workers", type=positive, default=1, help="processes (1)")
    parser.add_argument("--threads", type=positive, help="threads a worker computes with")


def run(args: argparse.Namespace, out: Output) -> int:
    """Adapt, and show what was learned and what was forgotten."""
    from deepseek.train.adapt import kind_of

    kind = kind_of(args.data)
    ready(args.model, out)
    if kind == "preferences":
        return _prefer(args, out)
    return _adapt(args, kind, out)


def _adapt(args: argparse.Namespace, kind: Kind, out: Output) -> int:
    from deepseek.cli.verbs.train import launch, set_threads, telling, train_here
    from deepseek.hub import Bundle
    from deepseek.parallel import joined_world
    from deepseek.train.adapt import as_measurements, changes, measure_before, plan, read_plan

    _refuse(args, ("beta",), "conversations and text")
    if args.workers > 1:
        return launch(_words(args), args)
    asked = _asked(args, kind)
    with joined_world() as world:
        if world.is_first:
            plan(asked, args.out)
        world.barrier()
        planned = read_plan(args.out)
        set_threads(args.threads, world)
        before = []
        if world.is_first:
            with telling(out) as say:
                before = measure_before(planned, args.out, say)
        folder = train_here(planned, args, out, world)
    if not world.is_first:
        return 0
    bundle = Bundle.open(folder)
    found = changes(planned, before, bundle.card.measurements)
    figures = as_measurements(found)
    bundle.add_measurements(figures)
    _show(args, found, out)
    out.say(f"the model is in {folder}")
    _check(args, found)
    result = {"out": args.out, "bundle": str(folder), "data": kind, "settings": asked.to_dict()}
    return out.finish(result, [*before, *bundle.card.measurements])


def _asked(args: argparse.Namespace, kind: Kind) -> Adaptation:
    from deepseek.train.adapt import Adaptation

    is_text = kind == "text"
    method = args.method or ("full" if is_text else "lora")
    defaults = {
        "method": method,
        "replay": 0.5 if is_text else 0.0,
        "keep": 0.3 if is_text and method == "full" else 0.0,
    }
    given = {name: getattr(args, name) for name in _SETTINGS if getattr(args, name) is not None}
    return Adaptation.from_dict({"model": args.model, "data": args.data, **defaults, **given})


def _words(args: argparse.Namespace) -> list[str]:
    """Return the words that a worker is started with."""
    words = ["adapt", args.model, args.data, "--out", args.out]
    for name in (*_SETTINGS, "most_forgotten"):
        value = getattr(args, name)
        if value is not None:
            values = value if isinstance(value, list) else [value]
            words += [f"--{name.replace('_', '-')}", *map(str, values)]
    return words


def _show(args: argparse.Namespace, found: list[Change], out: Output) -> None:
    out.table(
        f"{args.model} after {args.data}",
        ("text", "perplexity before", "after", "change"),
        [
            (
                f"{each.text}, {'to be kept' if each.is_general else 'to be learned'}",
                number(each.before),
                number(each.after),
                f"{each.percent:+.1f} %",
            )
            for each in found
        ],
    )


def _check(args: argparse.Namespace, found: list[Change]) -> None:
    if args.most_forgotten is None:
        return
    for each in found:
        if each.is_general and each.percent > args.most_forgotten:
            must = f"at most {args.most_forgotten} % higher than before"
            step = "Take more --keep or --replay, or a smaller --rate"
            got = f"{each.percent:.1f} %"
            raise VerifyError(describe("perplexity", each.text, must, got, step))


def _prefer(args: argparse.Namespace, out: Output) -> int:
    import torch

    from deepseek.hub import Bundle
    from deepseek.train.preference import Preference, prefer

    if args.workers > 1:
        raise ConfigError(describe("--workers", "preferences", "1", args.workers))
    kept = ("replay", "replay_text", "keep", "held_out", "general", "most_forgotten")
    _refuse(args, kept, "preferences")
    if args.method == "qlora":
        raise ConfigError(describe("--method", "preferences", "full or lora", args.method))
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    names = "epochs steps length batch micro_batch rate rank beta precision seed"
    given = {name: value for name in names.split() if (value := getattr(args, name)) is not None}
    if args.method == "full":
        given["rank"] = None
    asked = Preference.from_dict({"model": args.model, "data": args.data, **given})
    from deepseek.cli.verbs.train import saying_that_it_is_saved, telling

    with saying_that_it_is_saved(out), telling(out) as report:
        folder = prefer(asked, args.out, report=report)
    found = list(Bundle.open(folder).card.measurements)
    out.measurements(args.out, found)
    out.say(f"the model is in {folder}")
    result = {"out": args.out, "bundle": str(folder), "data": "preferences"}
    return out.finish({**result, "settings": asked.to_dict()}, found)


def _refuse(args: argparse.Namespace, names: tuple[str, ...], owner: str) -> None:
    for name in names:
        if getattr(args, name) is not None:
            flag = f"--{name.replace('_', '-')}"
            raise ConfigError(describe(flag, owner, "left out", getattr(args, name)))


def _positive_float(word: str) -> float:
    try:
        value = float(word)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a positive number; got {word!r}")
    return value
