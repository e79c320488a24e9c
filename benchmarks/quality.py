"""What each scheme of the engine loses against float32: perplexity, divergence, top token.

    python benchmarks/quality.py
    python benchmarks/quality.py --finetune 300 --keep FOLDER --gate int4=1.03
    python benchmarks/quality.py --model FOLDER --text FILE --json

The reference is the model's modules in float32 on the weights as they are stored; both see the same
windows of a text that every Python carries. It fails when a scheme's perplexity ratio is above its
gate.

The weights of the bundled models come from files of 4 bits: int4 finds their grid again and loses
next to nothing, which says little of other models. `--finetune` first trains every weight for some
steps, on text that is not measured, and measures both. How near the grid the weights are is shown:
rounding to int4 changes normally distributed ones by 0.6 % (relative squared error). Where it
changes them by far less, they have hardly left the grid, and what int4 loses is mostly the training
that rounding takes back.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import shlex
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

import deepseek
from deepseek.cli.models import positive
from deepseek.errors import BackendError, ConfigError, DeepseekError, describe
from deepseek.evaluate import Corpus, default_corpus, read_corpus
from deepseek.evaluate.intervals import FloatArray, clustered_wilson, student_quantile
from deepseek.face import load_engine
from deepseek.generate.engine import PAGE_SIZE, Engine
from deepseek.hub.atomic import writing
from deepseek.models import Decoder
from deepseek.ops.linear.reference import round_int4
from deepseek.ops.scheme import SCHEMES
from deepseek.records import Measurement, Spread, StageRecord

MEASURED = ("bfloat16", "bfloat16-kv8", "int8", "int8-kv8", "int4", "int4-kv8", "int4-g64")
GATES = {"int8": 1.005}
"""Largest perplexity ratio of a scheme."""
WINDOW = 512
"""Tokens that are seen together."""
LEARNING_RATE = 2e-5
BATCH, LENGTH = 2, 256
"""Rows of a training step, and tokens of each."""
SEED = 0


class Scores(NamedTuple):
    """How a scheme and the reference predict one window."""

    reference_loss: float
    """Mean over the tokens but the first, in nats."""
    loss: float
    """The same of the scheme."""
    divergence: float
    """Mean KL(reference || scheme) over the tokens, in nats."""
    agreement: float
    """Share of tokens behind which both find the same one likeliest."""


@dataclasses.dataclass(frozen=True)
class Text:
    """Tokens to measure on and tokens to learn from; none are both."""

    measured: Tensor
    """[windows, 512], spread evenly over the text."""
    learned: Tensor
    """[windows, 512], what lies between them."""
    conditions: Mapping[str, Any]
    """Which text it was."""


def read_text(files: Sequence[Path]) -> Corpus:
    """Return the files joined, or the language reference inside Python where there are none."""
    if not files:
        return default_corpus()
    parts = [read_corpus(file) for file in files]
    name = "+".join(part.name for part in parts)
    return Corpus(name=name, text="\n\n".join(part.text for part in parts))


def split(tokens: Sequence[int], count: int) -> tuple[Tensor, Tensor]:
    """Return `count` windows spread evenly over a text [count, 512], and the others [rest, 512].

    Raises:
        ConfigError: the text has fewer windows.
    """
    available = len(tokens) // WINDOW
    if available < count:
        must = f"at least {count * WINDOW} tokens long"
        step = "Give a longer --text or fewer --tokens"
        raise ConfigError(describe("text", "quality", must, f"{len(tokens)} tokens", step))
    windows = torch.tensor(tokens[: available * WINDOW]).view(available, WINDOW)
    is_measured = torch.zeros(available, dtype=torch.bool)
    is_measured[torch.arange(count) * available // count] = True
    return windows[is_measured], windows[~is_measured]


def load_reference(source: str | Path) -> Decoder:
    """Return a model in float32.

    Raises:
        ConfigError: it is no decoder, or has no tokenizer.
    """
    model = deepseek.load(source, dtype="float32")
    if not isinstance(model, Decoder) or model.tokenizer is None:
        must = "a decoder with a tokenizer"
        raise ConfigError(describe("model", "quality", must, str(source)))
    return model


def prepare_text(model: Decoder, files: Sequence[Path], num_tokens: int) -> Text:
    """Return the text in tokens of a model, about `num_tokens` of them to measure on.

    Raises:
        ConfigError: too few tokens, asked for or there.
    """
    if num_tokens < 2 * WINDOW:
        must = f"at least {2 * WINDOW}, two windows, for an interval"
        raise ConfigError(describe("tokens", "quality", must, num_tokens))
    corpus = read_text(files)
    assert model.tokenizer is not None
    measured, learned = split(model.tokenizer.encode(corpus.text), num_tokens // WINDOW)
    return Text(measured, learned, corpus.conditions())


def open_engine(source: str | Path, scheme: str) -> Engine:
    """Return an engine that leaves no packed weights on the disk.

    Raises:
        BackendError: the engine does not run this model here.
    """
    engine = load_engine(source, scheme=scheme, keep=False)
    if engine is None:
        must, step = "one that the engine runs here", "`deepseek doctor` says what runs here"
        raise BackendError(describe("model", f"scheme {scheme!r}", must, str(source), step))
    return engine


def predict(engine: Engine, pages: Any, window: Tensor) -> Tensor:
    """Return the logarithms of an engine's chances of each next token [512, vocab]."""
    places, table = np.arange(WINDOW), np.arange(WINDOW // PAGE_SIZE)[None]
    logits = engine.step(pages, window.numpy(), places, np.zeros_like(places), table, places)
    return torch.from_numpy(logits).log_softmax(-1)


def compare(expected: Tensor, found: Tensor, window: Tensor) -> Scores:
    """Return the scores of one window.

    Args:
        expected: logarithms of the reference's chances of each next token [tokens, vocab].
        found: those of the scheme.
        window: [tokens].
    """
    targets = window[1:, None]
    losses = [-chances[:-1].gather(1, targets).mean().item() for chances in (expected, found)]
    divergence = (expected.exp() * (expected - found)).sum(-1, dtype=torch.float64).mean().item()
    agreement = (expected.argmax(-1) == found.argmax(-1)).double().mean().item()
    return Scores(losses[0], losses[1], divergence, agreement)


def score(
    model: Decoder, engines: Mapping[str, Engine], windows: Tensor, label: str, bar: Progress
) -> dict[str, list[Scores]]:
    """Return each scheme's scores of every window; the reference reads each once."""
    pages = {name: engine.new_pages(WINDOW // PAGE_SIZE) for name, engine in engines.items()}
    scores: dict[str, list[Scores]] = {name: [] for name in engines}
    for window in bar.track(windows, description=f"{escape(label)}: measuring"):
        with torch.no_grad():
            expected = model(window[None]).logits[0].log_softmax(-1)
        for name, engine in engines.items():
            scores[name].append(compare(expected, predict(engine, pages[name], window), window))
    return scores


def rounding_error(model: Decoder) -> float:
    """Return how far the layers' matrices are from a grid of 4 bits: the squared error of rounding
    them to int4 over the sum of their squares.
    """
    error = total = 0.0
    for name, weight in model.state_dict().items():
        if name.startswith("model.layers.") and weight.ndim > 1:
            padded = F.pad(weight, (0, -weight.shape[-1] % 32))
            error += (round_int4(padded, 32) - padded).double().square().sum().item()
            total += weight.double().square().sum().item()
    return error / total


def interval(values: FloatArray) -> Spread:
    """Return Student's 95 % interval of the mean of windows [windows], at least two."""
    half = student_quantile(len(values) - 1) * float(values.std(ddof=1)) / math.sqrt(len(values))
    return Spread("ci95", float(values.mean()) - half, float(values.mean()) + half)


def raised(spread: Spread) -> Spread:
    """Return the interval of exp(x) out of that of x."""
    return Spread(spread.kind, math.exp(spread.low), math.exp(spread.high))


def model_figures(
    model: Decoder, scores: Sequence[Scores], about: Mapping[str, Any]
) -> list[Measurement]:
    """Return the reference's perplexity and the weights' distance from the grid."""
    losses = np.array([each.reference_loss for each in scores])
    return [
        Measurement(
            name="perplexity",
            value=math.exp(losses.mean()),
            unit="1",
            spread=raised(interval(losses)),
            conditions={**about, "dtype": "float32"},
        ),
        Measurement(
            name="int4_rounding_error", value=rounding_error(model), unit="1", conditions=about
        ),
    ]


def scheme_figures(scores: Sequence[Scores], about: Mapping[str, Any]) -> list[Measurement]:
    """Return what a scheme loses; intervals are over windows, paired with the reference's."""
    reference_losses, losses, divergences, agreements = np.array(scores).T
    differences = losses - reference_losses
    change, spread = float(differences.mean()), interval(differences)
    sizes = np.full(len(scores), float(WINDOW))
    found = {
        ("perplexity_ratio", "1"): (math.exp(change), raised(spread)),
        ("log_perplexity_difference", "nats/token"): (change, spread),
        ("kl_divergence", "nats/token"): (float(divergences.mean()), interval(divergences)),
        ("top1_agreement", "1"): (
            float(agreements.mean()),
            clustered_wilson(agreements * sizes, sizes),
        ),
    }
    return [
        Measurement(name=name, value=value, unit=unit, spread=spread, conditions=about)
        for (name, unit), (value, spread) in found.items()
    ]


def measure(
    model: Decoder,
    source: str | Path,
    text: Text,
    schemes: Sequence[str],
    label: str,
    bar: Progress,
) -> list[Measurement]:
    """Return the figures of a model, then those of each scheme.

    Args:
        model: the reference.
        source: where it came from, for the engines.
        text: its measured windows are read.
        schemes: at least one name.
        label: what the model is called.
        bar: shows how far it is.
    """
    steps = bar.track(schemes, description=f"{escape(label)}: packing")
    engines = {name: open_engine(source, name) for name in steps}
    scores = score(model, engines, text.measured, label, bar)
    about = {
        "model": label,
        **text.conditions,
        "windows": len(text.measured),
        "window_tokens": WINDOW,
        "instruction_set": engines[schemes[0]].instruction_set,
        "interval": "Student's over windows; of a share, Wilson at the effective number of tokens",
    }
    found = model_figures(model, scores[schemes[0]], about)
    for name in schemes:
        found += scheme_figures(scores[name], {**about, "scheme": name})
    return found


def finetune(model: Decoder, windows: Tensor, num_steps: int, bar: Progress) -> None:
    """Train every weight in place by a plain loop of AdamW, products in bfloat16.

    Args:
        model: in float32.
        windows: tokens to learn from [windows, 512].
        num_steps: each sees 2 x 256 tokens.
        bar: shows the steps.
    """
    model.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0
    )
    generator = torch.Generator().manual_seed(SEED)
    for _ in bar.track(range(num_steps), description="fine-tuning"):
        rows = torch.randint(len(windows), (BATCH,), generator=generator).tolist()
        starts = torch.randint(WINDOW - LENGTH + 1, (BATCH,), generator=generator).tolist()
        pairs = zip(rows, starts, strict=True)
        batch = torch.stack([windows[row, start : start + LENGTH] for row, start in pairs])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def save_finetuned(model: Decoder, text: Text, num_steps: int, folder: Path) -> None:
    """Write a fine-tuned model into a folder, in bfloat16, with how it was made."""
    settings = {
        "steps": num_steps,
        "tokens_per_step": BATCH * LENGTH,
        "learning_rate": LEARNING_RATE,
        **text.conditions,
    }
    stage = StageRecord(name="finetune", settings=settings, seed=SEED)
    deepseek.save(model.to(torch.bfloat16), folder, stage=stage)


@contextlib.contextmanager
def kept_in(folder: Path | None) -> Iterator[Path]:
    """Yield a folder to write a model into: the one asked for, or one that is gone afterwards.

    Raises:
        ConfigError: it holds something, or cannot be written to.
    """
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="deepseek-quality-") as place:
            yield Path(place)
        return
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        step = "Measure the model in it by --model"
        raise ConfigError(describe("folder", "--keep", "new or empty", str(folder), step))
    yield folder


def run(options: argparse.Namespace, bar: Progress) -> list[Measurement]:
    """Return the figures of the model and, if asked for, of the fine-tuned one."""
    model, schemes, num_steps = load_reference(options.model), options.schemes, options.finetune
    text = prepare_text(model, options.text, options.tokens)
    if num_steps is None:
        return measure(model, options.model, text, schemes, options.model, bar)
    if len(text.learned) == 0:
        must = "longer than what is measured"
        raise ConfigError(describe("text", "--finetune", must, f"{text.measured.numel()} tokens"))
    with kept_in(options.keep) as folder:
        found = measure(model, options.model, text, schemes, options.model, bar)
        finetune(model, text.learned, num_steps, bar)
        save_finetuned(model, text, num_steps, folder)
        label = f"{options.model} after {num_steps} steps of fine-tuning"
        return found + measure(load_reference(folder), folder, text, schemes, label, bar)


def over_gates(found: Sequence[Measurement], gates: Mapping[str, float]) -> list[str]:
    """Return a line for each perplexity ratio that is above its gate, or no number."""
    ratios = [item for item in found if item.name == "perplexity_ratio"]
    return [
        f"{item.conditions['model']}, {item.conditions['scheme']}: the perplexity ratio is "
        f"{item.value:.4f}, the gate is {gates[item.conditions['scheme']]}"
        for item in ratios
        if not item.value <= gates.get(item.conditions["scheme"], math.inf)
    ]


def show(found: Sequence[Measurement], gates: Mapping[str, float]) -> None:
    """Print a table for each model."""
    console = Console(highlight=False)
    for label in dict.fromkeys(item.conditions["model"] for item in found):
        items = [item for item in found if item.conditions["model"] == label]
        figures = {(item.conditions.get("scheme"), item.name): item for item in items}
        console.print(table_of(figures, gates))


def table_of(
    figures: Mapping[tuple[str | None, str], Measurement], gates: Mapping[str, float]
) -> Table:
    """Return the table of one model.

    Args:
        figures: by scheme, None for the model's own, and name.
        gates: largest perplexity ratio by scheme.
    """
    perplexity, error = figures[None, "perplexity"], figures[None, "int4_rounding_error"]
    about = perplexity.conditions
    title = (
        f"{about['model']}: perplexity {perplexity.value:.3f} in float32 over {about['windows']} "
        f"windows of {WINDOW} tokens of {about['text']}; rounding to int4 changes the layers' "
        f"weights by {100 * error.value:.2g} %"
    )
    table = Table(
        "scheme", "perplexity ratio", "95 % of its log", "KL, nats", "same top", "gate",
        title=escape(title), title_justify="left", box=None, pad_edge=False,
    )  # fmt: skip
    for scheme in dict.fromkeys(scheme for scheme, _ in figures if scheme is not None):
        spread = figures[scheme, "log_perplexity_difference"].spread
        assert spread is not None
        table.add_row(
            scheme,
            f"{figures[scheme, 'perplexity_ratio'].value:.4f}",
            f"{spread.low:+.4f} … {spread.high:+.4f}",
            f"{figures[scheme, 'kl_divergence'].value:.5f}",
            f"{100 * figures[scheme, 'top1_agreement'].value:.1f} %",
            str(gates.get(scheme, "")),
        )
    return table


def gate(word: str) -> tuple[str, float]:
    """Return scheme and largest perplexity ratio out of `SCHEME=RATIO`.

    Raises:
        argparse.ArgumentTypeError: it is not of that form.
    """
    scheme, _, ratio = word.partition("=")
    with contextlib.suppress(ValueError):
        if scheme in SCHEMES and float(ratio) > 0:
            return scheme, float(ratio)
    must = f"SCHEME=RATIO, such as int4=1.03, a scheme one of {', '.join(SCHEMES)}"
    raise argparse.ArgumentTypeError(f"must be {must}; got {word!r}")


def read_options(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the options; ends the program at those that do not fit together."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m", help="name or folder")
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=MEASURED, metavar="SCHEME")
    parser.add_argument("--tokens", type=positive, default=8192, help="to measure on (8192)")
    parser.add_argument(
        "--text", type=Path, nargs="+", default=[], metavar="FILE",
        help="UTF-8 files in place of the documentation inside Python",
    )  # fmt: skip
    parser.add_argument("--finetune", type=positive, metavar="STEPS", help="measure that model too")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep the fine-tuned model")
    parser.add_argument(
        "--gate", type=gate, action="append", default=[], metavar="SCHEME=RATIO",
        help="fail above this perplexity ratio (int8=1.005; `inf` for no gate)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    if options.keep is not None and options.finetune is None:
        parser.error("--keep needs --finetune: there is no other model to keep")
    if unused := sorted({scheme for scheme, _ in options.gate} - set(options.schemes)):
        parser.error(f"--gate for what is not measured: {', '.join(unused)}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print tables or one JSON object; 1 when a gate is exceeded, 2 for a mistake."""
    words = sys.argv[1:] if arguments is None else arguments
    options = read_options(words)
    command = shlex.join(["python", "benchmarks/quality.py", *words])
    gates = GATES | dict(options.gate)
    try:
        console = Console(stderr=True)
        with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
            found = [dataclasses.replace(each, command=command) for each in run(options, bar)]
    except DeepseekError as error:
        print(f"quality: {error}", file=sys.stderr)
        return 2
    over = over_gates(found, gates)
    if options.json:
        figures = [item.to_dict() for item in found]
        print(json.dumps({"gates": gates, "over_gates": over, "measurements": figures}, indent=2))
    else:
        show(found, gates)
    for line in over:
        print(f"quality: {line}", file=sys.stderr)
    return 1 if over else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("stopped: nothing was kept")
