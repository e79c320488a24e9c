"""`deepseek bench attention`: what routed attention saves, and with `--quality` what it loses."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from deepseek.cli.models import load_decoder, positive
from deepseek.cli.output import Output, number
from deepseek.errors import ConfigError, describe, missing_extra
from deepseek.ops.scheme import SCHEMES
from deepseek.records import Measurement

if TYPE_CHECKING:
    from deepseek.evaluate import Corpus
    from deepseek.models import Decoder

WORD = "attention"
"""In the place of a model's name."""
DEFAULT_MODEL = "smollm2-135m"
CONTENDERS = ("dense", "routed-1", "routed-2", "routed-4", "recent")

PLOTS = (".svg", ".png", ".pdf")

OPTIONS: dict[str, dict[str, object]] = {
    "--lengths": {"type": positive, "nargs": "+", "help": "tokens of a text (2048 4096 8192)"},
    "--contenders": {
        "nargs": "+",
        "metavar": "NAME",
        "help": "dense, routed-N or bare-N: N tokens share a choice, what is not seen counts by "
        "its means or not at all, :T behind it is another threshold; recent: the first block and "
        f"recent tokens, as many as the first routed one sees ({' '.join(CONTENDERS)})",
    },
    "--scheme": {"choices": SCHEMES, "metavar": "NAME", "help": "of the weights (bfloat16)"},
    "--quality": {"action": "store_true", "help": "what is lost, in place of what is saved"},
    "--documents": {"type": positive, "help": "of each length, for --quality (20)"},
    "--probes": {"type": positive, "help": "of each kind, for --quality (8)"},
    "--text": {"type": Path, "nargs": "+", "metavar": "FILE", "help": "that is read (own text)"},
    "--keep": {
        "type": Path,
        "metavar": "FILE",
        "help": "for --quality, and for serve: write what is measured as it is measured, and go on "
        "from there",
    },
    "--longest-dense": {"type": positive, "help": "tokens that dense attention reads (16384)"},
    "--plot": {
        "type": Path,
        "metavar": "FILE",
        "help": "draw seconds over tokens, or over the load of serve (.svg, .png)",
    },
}
"""Options of `bench attention` alone; `--repeats` and `--threads` are shared."""
DEFAULTS: dict[str, object] = {
    "lengths": [2048, 4096, 8192],
    "contenders": list(CONTENDERS),
    "scheme": "bfloat16",
    "quality": False,
    "documents": 20,
    "probes": 8,
    "text": [],
    "keep": None,
    "longest_dense": 16384,
    "plot": None,
}


def add_attention_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `bench attention`; what is not given is absent from the namespace."""
    group = parser.add_argument_group("bench attention [MODEL]")
    for flag, settings in OPTIONS.items():
        group.add_argument(flag, default=argparse.SUPPRESS, **settings)  # type: ignore[arg-type]


def refuse_attention_options(args: argparse.Namespace) -> None:
    """Raise if something was given that only `bench attention` takes.

    Raises:
        ConfigError: names it.
    """
    given = [name for name in DEFAULTS if name in vars(args)]
    if args.attended is not None:
        given = [args.attended]
    if given:
        must = f"given behind the word {WORD}: deepseek bench {WORD} MODEL"
        raise ConfigError(describe(given[0].replace("_", "-"), "bench", must, args.model))


def bench_attention(args: argparse.Namespace, out: Output) -> int:
    """Measure each contender at each length, show the tables, draw what was asked for."""
    options = argparse.Namespace(**{**DEFAULTS, **vars(args)})
    options.model = args.attended or DEFAULT_MODEL
    if options.plot is not None:
        _check_plot(options.plot, options.quality)
    if options.keep is not None:
        _check_keep(options.keep, options.quality)
    model = load_decoder(options, out)
    import torch

    from deepseek.cli.attention_contenders import Trial, routing_of
    from deepseek.cli.attention_quality import attention_quality, joined
    from deepseek.cli.attention_speed import attention_speed, draw_speed
    from deepseek.cli.kept import Kept
    from deepseek.evaluate import default_corpus, read_corpus

    corpora = [read_corpus(file) for file in options.text] or [default_corpus()]
    trial = Trial(
        lengths=tuple(options.lengths),
        contenders=tuple(dict.fromkeys(options.contenders)),
        scheme=options.scheme,
        threads=torch.get_num_threads(),
        rounds=options.repeats,
        documents=options.documents,
        probes=options.probes,
        longest_dense=options.longest_dense,
    )
    for name in trial.contenders:
        routing_of(name, max(trial.lengths))  # an unknown name is told at once
    with out.progress() as progress:
        if options.quality:
            kept = Kept(options.keep, _kept_of(model, options, corpora))
            found = attention_quality(model, corpora, trial, kept, progress)
        else:
            found = attention_speed(model, joined(corpora), trial, progress)
    command = _command(args)
    found = [dataclasses.replace(each, command=command) for each in found]
    title = f"{options.model}, {trial.scheme}, {trial.threads} threads"
    (_show_quality if options.quality else _show_speed)(title, found, out)
    if options.plot is not None:
        draw_speed(found).savefig(options.plot)
        out.say(f"drawn in {options.plot}")
    return out.finish({"model": options.model, "scheme": trial.scheme}, found)


def _check_plot(path: Path, of_quality: bool) -> None:
    """Raise if a plot could not be written once everything is measured."""
    if of_quality:
        raise ConfigError(describe("plot", "bench attention", "of speed", "--quality"))
    if path.suffix not in PLOTS or not path.parent.is_dir():
        must = f"a file that ends in {', '.join(PLOTS)}, in a folder that is there"
        raise ConfigError(describe("plot", "bench attention", must, path))
    if importlib.util.find_spec("matplotlib") is None:
        raise missing_extra("matplotlib", "report", "to draw a plot")


def _check_keep(path: Path, of_quality: bool) -> None:
    """Raise if figures could not be kept."""
    if not of_quality:
        raise ConfigError(describe("keep", "bench attention", "given with --quality", "speed"))
    if path.is_dir() or not path.parent.is_dir():
        must = "a file in a folder that is there"
        raise ConfigError(describe("keep", "bench attention", must, path))


def _kept_of(
    model: Decoder, options: argparse.Namespace, corpora: Sequence[Corpus]
) -> dict[str, object]:
    """Return what every figure of quality depends on, beside its length and its contender."""
    content = getattr(model.bundle, "content_hash", options.model)
    return {
        "model": content,
        "scheme": options.scheme,
        "text": [each.sha256 for each in corpora],
        "documents": options.documents,
        "probes": options.probes,
    }


def _command(args: argparse.Namespace) -> str:
    words = ["deepseek", "bench", WORD, args.attended or DEFAULT_MODEL]
    for name in DEFAULTS:
        if name in vars(args):
            given = vars(args)[name]
            values = given if isinstance(given, list) else [] if given is True else [given]
            words += [f"--{name.replace('_', '-')}", *map(str, values)]
    return shlex.join([*words, "--repeats", str(args.repeats)])


QUALITIES = {
    "tokens_seen": "seen",
    "perplexity_ratio": "perplexity, ratio",
    "kl_divergence": "KL, nats",
    "copy_accuracy": "copies right",
    "needle_accuracy": "needles found",
    "tracking_accuracy": "names followed",
}
"""The columns of the table of quality."""

Place = tuple[int, str]
"""A length and a contender."""


def _by_place(found: Sequence[Measurement]) -> dict[Place, list[Measurement]]:
    places: dict[Place, list[Measurement]] = {}
    for each in found:
        if "length" in each.conditions:
            place = (int(str(each.conditions["length"])), str(each.conditions["contender"]))
            places.setdefault(place, []).append(each)
    return places


def _show_speed(title: str, found: Sequence[Measurement], out: Output) -> None:
    from deepseek.cli.attention_speed import RATIOS, TIMED

    values = {
        place: {each.name: each for each in figures} for place, figures in _by_place(found).items()
    }
    rows = []
    columns = [each for pair in zip(TIMED, RATIOS, strict=True) for each in pair]
    for (length, name), figures in values.items():
        told = [_with_range(figures[what]) if what in figures else "" for what in columns]
        rows.append((f"{length:,} {name}", *told))
    # short, so that names stay whole on 80 columns
    header = ("tokens", "attention, s", "times", "prompt, s", "times", "a token, s", "times")
    out.table(title, header, rows)
    slopes = [
        (str(each.conditions["contender"]), str(each.conditions["of"]), number(each.value))
        for each in found
        if each.name == "exponent"
    ]
    if slopes:
        out.say()
        out.table("seconds grow with tokens to the power of", ("", "of", "power"), slopes)


def _show_quality(title: str, found: Sequence[Measurement], out: Output) -> None:
    rows = []
    for (length, name), figures in _by_place(found).items():
        told = [f"{length:,} {name}"]
        for what in QUALITIES:
            told.append("; ".join(_with_range(each) for each in figures if each.name == what))
        rows.append(tuple(told))
    header = ("tokens", *QUALITIES.values())
    out.table(title, header, rows)
    shares = [each for each in found if each.name.startswith("retained")]
    tasks = list(dict.fromkeys(each.conditions.get("task", "mean") for each in shares))
    rows = []
    for (length, name), figures in _by_place(shares).items():
        if name != "dense":
            by_task = {each.conditions.get("task", "mean"): each for each in figures}
            told = [f"{by_task[task].value:.3f}" if task in by_task else "" for task in tasks]
            rows.append((f"{length:,} {name}", *told))
    if rows:
        out.say()
        out.table("share of the tokens that dense attention has right", ("", *tasks), rows)


def _with_range(each: Measurement) -> str:
    if each.name == "perplexity_ratio":
        value = f"{each.value:.4f}"
    else:
        value = number(each.value)
    if each.spread is None or each.name.endswith("accuracy"):
        return value
    return f"{value} ({number(each.spread.low)} to {number(each.spread.high)})"
