"""`deepseek bench serve`: what users of an OpenAI-compatible server see, whoever made it."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import importlib.util
import math
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from deepseek.cli.models import positive
from deepseek.cli.output import Output
from deepseek.errors import ConfigError, describe, missing_extra
from deepseek.records import Measurement
from deepseek.serve.load.lengths import VARIES
from deepseek.serve.load.objectives import OBJECTIVES, read_objectives
from deepseek.serve.load.workload import KINDS

if TYPE_CHECKING:
    from deepseek.cli.serve_trial import Plan
    from deepseek.serve.load import ServerProcess, Target, Workload

WORD = "serve"
"""In the place of a model's name."""
EXIT_FAILED_CHECK, EXIT_INTERRUPTED = 1, 130
CONCURRENCY = (1, 4, 16)
PLOTS = (".svg", ".png", ".pdf")
SHARED = ("keep", "plot")
"""Options that `bench attention` has too, which adds them."""
FOREIGN: dict[str, object] = {"dtype": None, "threads": None, "save": False, "repeats": 5}
"""Options of `bench` that mean nothing here, with their defaults."""


def positive_number(word: str) -> float:
    """Return a finite number above 0.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    try:
        value = float(word)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"must be a number above 0; got {word!r}")
    return value


def share(word: str) -> float:
    """Return a number from 0 to 1.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    try:
        value = float(word)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be a number from 0 to 1; got {word!r}")
    return value


OPTIONS: dict[str, dict[str, object]] = {
    "--launch": {
        "metavar": "COMMAND",
        "help": "start this server, with a free port for {port}, and stop it; its processor time "
        "and memory are measured too",
    },
    "--model": {
        "dest": "served_model",
        "metavar": "NAME",
        "help": "the model that is asked for (the first that it lists)",
    },
    "--api-key": {"metavar": "KEY", "help": "sent as a bearer token"},
    "--endpoint": {"choices": ("completions", "chat"), "help": "(completions)"},
    "--requests": {"type": positive, "help": "dialogues at each load (64)"},
    "--concurrency": {
        "type": positive,
        "nargs": "+",
        "metavar": "USERS",
        "help": "users who each wait for their answer before they ask again (1 4 16)",
    },
    "--rate": {
        "type": positive_number,
        "nargs": "+",
        "metavar": "PER_S",
        "help": "requests a second that come whatever becomes of them",
    },
    "--burstiness": {
        "type": positive_number,
        "help": "of a rate: 1 Poisson, below 1 bursts, large even distances (1)",
    },
    "--sweep": {
        "type": positive,
        "metavar": "RATES",
        "help": "one at a time, all at once, and so many rates between what the two gave",
    },
    "--workload": {
        "nargs": "+",
        "metavar": ("KIND", "FILE"),
        "help": f"{', '.join(KINDS)}; behind text the FILE (random)",
    },
    "--vary": {"choices": VARIES, "help": "how lengths lie about --prompt-tokens, --new-tokens"},
    "--prefix-tokens": {"type": positive, "help": "shared by all prompts of shared-prefix (512)"},
    "--turns": {"type": positive, "help": "of a dialogue (2)"},
    "--follow-tokens": {"type": positive, "help": "of a dialogue's later turns' prompts (32)"},
    "--hang-up": {"type": share, "metavar": "SHARE", "help": "users who leave amid an answer (0)"},
    "--natural-end": {
        "action": "store_true",
        "help": "answers end where the model ends them, not at --new-tokens",
    },
    "--timeout": {"type": positive_number, "metavar": "S", "help": "of an answer (600)"},
    "--retries": {"type": positive, "help": "after a refusal that says when to come again (0)"},
    "--goodput": {
        "nargs": "+",
        "metavar": "NAME:S",
        "help": f"count answers within these bounds, in seconds: {', '.join(OBJECTIVES)}",
    },
    "--price-per-kwh": {"type": positive_number, "help": "for the energy of a request"},
    "--seed": {"type": int, "help": "the same seed asks the same (0)"},
}
"""Options of `bench serve` alone; `--prompt-tokens`, `--new-tokens`, `--keep` and `--plot` are
shared."""
DEFAULTS: dict[str, Any] = {
    "launch": None,
    "served_model": None,
    "api_key": None,
    "endpoint": "completions",
    "requests": 64,
    "concurrency": None,
    "rate": None,
    "burstiness": 1.0,
    "sweep": None,
    "workload": ["random"],
    "vary": "fixed",
    "prefix_tokens": 512,
    "turns": 2,
    "follow_tokens": 32,
    "hang_up": 0.0,
    "natural_end": False,
    "timeout": 600.0,
    "retries": 0,
    "goodput": [],
    "price_per_kwh": None,
    "seed": 0,
}


def add_serve_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `bench serve`; what is not given is absent from the namespace."""
    group = parser.add_argument_group("bench serve [URL]")
    for flag, settings in OPTIONS.items():
        group.add_argument(flag, default=argparse.SUPPRESS, **settings)  # type: ignore[arg-type]


def refuse_serve_options(args: argparse.Namespace) -> None:
    """Raise if something was given that only `bench serve` takes.

    Raises:
        ConfigError: names it.
    """
    for name in DEFAULTS:
        if name in vars(args):
            must = f"given behind the word {WORD}: deepseek bench {WORD} URL"
            raise ConfigError(describe(_flag(name), "bench", must, args.model))


def _flag(name: str) -> str:
    """Return the option that a name of the namespace was given by."""
    return "--model" if name == "served_model" else f"--{name.replace('_', '-')}"


def bench_serve(args: argparse.Namespace, out: Output) -> int:
    """Put every load on the server, show what its users saw, draw what was asked for."""
    options = argparse.Namespace(**{**DEFAULTS, "plot": None, "keep": None, **vars(args)})
    _check(options)
    workload = _workload(options)
    from deepseek.cli.kept import Kept
    from deepseek.cli.serve_tables import show_loads
    from deepseek.cli.serve_trial import Trial, warm_up
    from deepseek.serve.load import draw_load

    with _server(options, out) as server:
        url = options.attended or f"http://127.0.0.1:{server.port if server else 0}"
        target = warm_up(_target(options, url), workload)
        kept = Kept(options.keep, _kept_of(options, target, workload), f"bench {WORD}")
        trial = Trial(_plan(options, workload), target, server, kept)
        with out.progress() as progress:
            trial.run(progress)
    command = _command(args)
    found = [
        dataclasses.replace(Measurement.from_dict(each), command=command)
        for point in trial.points
        for each in point["measurements"]
    ]
    show_loads(f"{target.model} at {url}, {workload.kind}", trial.points, found, out)
    if options.plot is not None and found:
        draw_load(found).savefig(options.plot)
        out.say(f"drawn in {options.plot}")
    loads = [
        {name: value for name, value in point.items() if name != "measurements"}
        for point in trial.points
    ]
    about = {"url": url, "model": target.model, "interrupted": trial.was_interrupted}
    out.finish({**about, "loads": loads}, found)
    if trial.was_interrupted:
        out.note("(interrupted: what is shown is what there was)")
        return EXIT_INTERRUPTED
    if not any(each.value for each in found if each.name == "requests_answered"):
        out.note("deepseek: not one request was answered; see the errors")
        return EXIT_FAILED_CHECK
    return 0


@contextlib.contextmanager
def _server(options: argparse.Namespace, out: Output) -> Iterator[ServerProcess | None]:
    """Yield the server that `--launch` starts, None without it."""
    if options.launch is None:
        yield None
        return
    from deepseek.serve.load import ServerProcess

    port = urlsplit(options.attended).port if options.attended else None
    out.note("(starting the server)")
    with ServerProcess(options.launch, port=port) as server:
        yield server


def _target(options: argparse.Namespace, url: str) -> Target:
    from deepseek.serve.load import Target

    return Target(
        url=url,
        model=options.served_model or "",
        api_key=options.api_key,
        endpoint=options.endpoint,
        natural_end=options.natural_end,
        timeout_s=options.timeout,
        max_retries=options.retries,
    )


def _plan(options: argparse.Namespace, workload: Workload) -> Plan:
    from deepseek.cli.serve_trial import Plan
    from deepseek.serve.load import Load
    from deepseek.serve.load.sweep import ends_of_sweep

    if options.sweep is not None:
        loads = ends_of_sweep(workload.num_dialogues)
    elif options.rate is not None:
        loads = tuple(Load(rate=each, burstiness=options.burstiness) for each in options.rate)
    else:
        loads = tuple(Load(concurrency=each) for each in options.concurrency or CONCURRENCY)
    return Plan(
        workload=workload,
        loads=loads,
        sweep=options.sweep or 0,
        burstiness=options.burstiness,
        objectives=read_objectives(options.goodput),
        price_per_kwh=options.price_per_kwh,
    )


def _workload(options: argparse.Namespace) -> Workload:
    from deepseek.evaluate.corpus import read_corpus
    from deepseek.serve.load import Workload

    kind, *files = options.workload
    if len(files) != (kind == "text"):
        must = f"{', '.join(KINDS)}, and behind text one FILE"
        raise ConfigError(describe("workload", f"bench {WORD}", must, " ".join(options.workload)))
    return Workload(
        kind=kind,
        num_dialogues=options.requests,
        prompt_tokens=options.prompt_tokens,
        new_tokens=options.new_tokens,
        vary=options.vary,
        prefix_tokens=options.prefix_tokens,
        turns=options.turns,
        follow_tokens=options.follow_tokens,
        hang_up_share=options.hang_up,
        seed=options.seed,
        text=read_corpus(Path(files[0])).text if files else "",
    )


def _check(options: argparse.Namespace) -> None:
    """Raise for what would be found out only when all is measured, or would be read over."""
    from deepseek.cli.attention_bench import DEFAULTS as OF_ATTENTION

    owner = f"bench {WORD}"
    for name, default in {**dict.fromkeys(OF_ATTENTION), **FOREIGN}.items():
        if name not in SHARED and vars(options).get(name, default) != default:
            raise ConfigError(describe(_flag(name), owner, "left out", getattr(options, name)))
    given = [name for name in ("concurrency", "rate", "sweep") if getattr(options, name)]
    if len(given) > 1:
        raise ConfigError(describe("load", owner, "of one kind", " and ".join(given)))
    if options.attended is None and "{port}" not in (options.launch or ""):
        must = "given, or started by --launch 'COMMAND {port}'"
        raise ConfigError(describe("URL", owner, must, options.launch))
    read_objectives(options.goodput)
    if options.keep is not None and (options.keep.is_dir() or not options.keep.parent.is_dir()):
        must = "a file in a folder that is there"
        raise ConfigError(describe("keep", owner, must, str(options.keep)))
    if options.plot is not None:
        if options.plot.suffix not in PLOTS or not options.plot.parent.is_dir():
            must = f"a file that ends in {', '.join(PLOTS)}, in a folder that is there"
            raise ConfigError(describe("plot", owner, must, str(options.plot)))
        if importlib.util.find_spec("matplotlib") is None:
            raise missing_extra("matplotlib", "report", "to draw a plot")


def _kept_of(options: argparse.Namespace, target: Target, workload: Workload) -> dict[str, Any]:
    """Return what every figure depends on, beside its load."""
    about = dataclasses.asdict(workload)
    about["text"] = hashlib.sha256(workload.text.encode()).hexdigest()
    return {
        "server": options.launch or target.base,
        "model": target.model,
        "endpoint": target.endpoint,
        "natural_end": target.natural_end,
        "goodput": options.goodput,
        "workload": about,
    }


def _command(args: argparse.Namespace) -> str:
    """Return the command that measures the same; without the key."""
    words = ["deepseek", "bench", WORD, *([args.attended] if args.attended else [])]
    words += ["--prompt-tokens", str(args.prompt_tokens), "--new-tokens", str(args.new_tokens)]
    for name in DEFAULTS:
        if name in vars(args) and name != "api_key":
            given = vars(args)[name]
            values = given if isinstance(given, list) else [] if given is True else [given]
            words += [_flag(name), *map(str, values)]
    return shlex.join(words)
