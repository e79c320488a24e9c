"""What each way to a grid of 4 or 8 bits loses against float32: perplexity, divergence, top token.

    python -m benchmarks.compress_quantize
    python -m benchmarks.compress_quantize --recipes learned-int4 --gate learned-int4=1.03 --json
    python -m benchmarks.compress_quantize --model FOLDER --as-is --text FILE

The weights of the bundled models come from files of 4 bits and lie on that grid still; rounding
them to it again loses next to nothing and says nothing of other models. So the channels of a
decoder are put in another order first, unless `--as-is` is given: hidden channels, those of the
feed-forward and those of each head's values. The model computes what it did, and groups of 32 are
made of numbers of many groups.

Both models run as modules in float32 on the same windows of a text that every Python carries; the
windows between them are what calibrates, with as many of the files of `--calibrate`. A second text,
given by `--other`, shows what rounding costs where nothing was learned. `--llama-quantize PROGRAM`
measures what llama.cpp makes of the same numbers, without an importance matrix, and `--others` what
torchao, NNCF and llm-compressor do (`benchmarks/peers/README.md`). It fails when a recipe's
perplexity ratio is above its gate.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import functools
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from benchmarks.peers.llama_quantize import quantized as quantized_by_llama
from benchmarks.peers.weight_quantizers import KINDS as OTHERS
from benchmarks.peers.weight_quantizers import check_installed
from benchmarks.peers.weight_quantizers import quantized as quantized_by_other
from benchmarks.quality import (
    WINDOW,
    Scores,
    compare,
    load_reference,
    model_figures,
    over_gates,
    prepare_text,
    scheme_figures,
    split,
)
from deepseek.cli.models import positive
from deepseek.compress.calibration import Batch
from deepseek.compress.quantize import EndToEnd, Quantize
from deepseek.compress.quantize.stage import quantize
from deepseek.compress.work import Report, Work
from deepseek.errors import ConfigError, DeepseekError, describe
from deepseek.evaluate import read_corpus
from deepseek.hub import save
from deepseek.models import Decoder
from deepseek.models.layers import Attention, FeedForward
from deepseek.records import Measurement

RECIPES: Mapping[str, Quantize] = {
    "round-int8": Quantize(method="round", bits=8, group=None),
    "rotated-int8": Quantize(method="round", bits=8, group=None, rotate=True),
    "gptq-int8": Quantize(method="gptq", bits=8, group=None),
    "round-int4": Quantize(method="round"),
    "awq-int4": Quantize(method="awq"),
    "gptq-int4": Quantize(method="gptq"),
    "learned-int4": Quantize(method="learned"),
    "together-int4": Quantize(method="learned", end_to_end=EndToEnd()),
}
"""int4: groups of 32 in the layers, embedding and head in 8 bits; int8: a scale for each row."""
SAMPLES = 128
SEED = 0


def put_in_another_order(model: Decoder, seed: int = SEED) -> None:
    """Permute a decoder's channels in place so that it computes what it did.

    Raises:
        ConfigError: it has a part whose channels are not known here.
    """
    generator = torch.Generator().manual_seed(seed)
    config, layers = model.config, model.model.layers

    def order_of(count: int) -> Tensor:
        return torch.randperm(count, generator=generator)

    hidden = order_of(config.hidden_size)
    done: set[str] = set()

    def permute(name: str, dim: int, order: Tensor) -> None:
        parameter = model.get_parameter(name)
        parameter.data.copy_(parameter.data.index_select(dim, order).clone())
        done.add(name)

    permute("model.embed_tokens.weight", 1, hidden)
    permute("model.norm.weight", 0, hidden)
    if not config.tie_embeddings:
        permute("lm_head.weight", 1, hidden)
    for place, layer in enumerate(layers):
        attention, mlp = layer.get_submodule("self_attn"), layer.get_submodule("mlp")
        if type(attention) is not Attention or type(mlp) is not FeedForward:
            must = "of plain attention and feed-forwards, or measured --as-is"
            raise ConfigError(describe("model", "another order", must, config.family))
        prefix = f"model.layers.{place}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            permute(f"{prefix}.{norm}.weight", 0, hidden)
        inner = order_of(config.intermediate_size)
        heads = torch.stack([order_of(config.head_dim) for _ in range(config.num_kv_heads)])
        starts = torch.arange(config.num_heads)[:, None] * config.head_dim
        values = (heads + starts[: config.num_kv_heads]).flatten()
        repeats = config.num_heads // config.num_kv_heads
        outputs = (heads.repeat_interleave(repeats, 0) + starts).flatten()
        turned = {
            "self_attn.q_proj": (None, hidden),
            "self_attn.k_proj": (None, hidden),
            "self_attn.v_proj": (values, hidden),
            "self_attn.o_proj": (hidden, outputs),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }
        for name, (rows, columns) in turned.items():
            module = layer.get_submodule(name)
            permute(f"{prefix}.{name}.weight", 1, columns)
            if rows is not None:
                permute(f"{prefix}.{name}.weight", 0, rows)
            if module.bias is not None and rows is not None:
                permute(f"{prefix}.{name}.bias", 0, rows)


def calibration(texts: Sequence[Tensor], stage: Quantize) -> list[Batch]:
    """Return samples of windows that are not measured, in an order of their own.

    Args:
        texts: windows of each text [windows, 512]; each gives about as many.
        stage: what they are for.
    """
    generator = torch.Generator().manual_seed(SEED)
    share = -(-SAMPLES // len(texts))
    parts = [each[torch.randperm(len(each), generator=generator)[:share]] for each in texts]
    windows = torch.cat(parts)
    order = torch.randperm(len(windows), generator=generator)[:SAMPLES]
    return [Batch(part, None) for part in windows[order].split(stage.learned.batch)]


def log_chances(model: Decoder, window: Tensor) -> Tensor:
    """Return the logarithms of a model's chances of each next token [512, vocab]."""
    with torch.no_grad():
        return model(window[None]).logits[0].log_softmax(-1)


def score(reference: Decoder, chances: Callable[[Tensor], Tensor], windows: Tensor) -> list[Scores]:
    """Return the scores of a model, given by its `log_chances`, of every window."""
    return [compare(log_chances(reference, each), chances(each), each) for each in windows]


@dataclasses.dataclass(frozen=True)
class Contest:
    """What every way to a grid is measured by."""

    reference: Decoder
    texts: Mapping[str, Tensor]
    """Windows [windows, 512] that are measured; the first text has no name."""
    learned: Sequence[Tensor]
    """Windows of each text that may be learned from."""
    about: Mapping[str, object]

    def samples(self, stage: Quantize) -> list[Batch]:
        """Return what a stage learns from."""
        return calibration(self.learned, stage)

    def losses(
        self, chances: Callable[[Tensor], Tensor], conditions: Mapping[str, object]
    ) -> list[Measurement]:
        """Return what a model, given by its `log_chances`, loses on each text."""
        found: list[Measurement] = []
        for label, windows in self.texts.items():
            scores = score(self.reference, chances, windows)
            figures = scheme_figures(scores, {**conditions, **({"text": label} if label else {})})
            found += [
                dataclasses.replace(each, name=f"{each.name}_other") if label else each
                for each in figures
            ]
        return found

    def sizes(self, num_bytes: int, conditions: Mapping[str, object]) -> list[Measurement]:
        """Return what all weights take."""
        numbers = sum(value.numel() for value in self.reference.parameters() if value.ndim == 2)
        figures = (
            ("quantized_weight_bytes", num_bytes, "bytes"),
            ("bits_per_quantized_weight", 8 * num_bytes / numbers, "bits"),
        )
        return [
            Measurement(name=name, value=value, unit=unit, conditions=conditions)
            for name, value, unit in figures
        ]


def prepare(options: argparse.Namespace) -> Contest:
    """Return the model as it is measured, and the windows of the texts."""
    reference = load_reference(options.model)
    reference.requires_grad_(False)
    if not options.as_is:
        put_in_another_order(reference)
    text = prepare_text(reference, options.text, options.tokens)
    texts, learned = {"": text.measured}, [text.learned]
    assert reference.tokenizer is not None
    for file in options.calibrate:
        tokens = reference.tokenizer.encode(read_corpus(file).text)
        learned.append(split(tokens, len(tokens) // WINDOW)[0])
    if options.other is not None:
        other = reference.tokenizer.encode(read_corpus(options.other).text)
        texts[options.other.name] = split(other, options.tokens // WINDOW)[0]
    about = {
        "model": options.model if options.as_is else f"{options.model}, channels permuted",
        **text.conditions,
        "windows": len(text.measured),
        "window_tokens": WINDOW,
        "calibration_samples": min(SAMPLES, sum(map(len, learned))),
        "calibration_files": [file.name for file in options.calibrate],
        "interval": "Student's over windows; of a share, Wilson at the effective number of tokens",
    }
    return Contest(reference, texts, learned, about)


def run(options: argparse.Namespace, bar: Progress) -> list[Measurement]:
    """Return the figures of the model and of each way to a grid.

    Raises:
        BackendError: a program that is asked for is not installed.
    """
    check_installed(options.others)
    contest = prepare(options)
    reference = contest.reference
    own = score(reference, functools.partial(log_chances, reference), contest.texts[""])
    found = model_figures(reference, own, contest.about)
    for name in options.recipes:
        task = bar.add_task(name, total=1.0)
        found += recipe(
            contest, name, lambda _, share, task=task: bar.update(task, completed=share or 0.0)
        )
    if options.others:
        found += other_programs(contest, options.others)
    if options.llama_quantize is not None:
        found += llama_files(contest, options.llama_quantize)
    return found


def recipe(contest: Contest, name: str, report: Report) -> list[Measurement]:
    """Return the figures of one of our own ways."""
    model, stage = copy.deepcopy(contest.reference), RECIPES[name]
    conditions = {**contest.about, "scheme": name, "threads": torch.get_num_threads()}
    with tempfile.TemporaryDirectory(prefix="deepseek-quantize-") as place:
        folder = Path(place)
        work = Work(model=model, start=folder, folder=folder, seed=SEED, report=report)
        with timed(conditions) as found:
            outcome = quantize(stage, work, contest.samples(stage))
    found += [
        dataclasses.replace(each, conditions={**each.conditions, **conditions}) for each in outcome
    ]
    return found + contest.losses(functools.partial(log_chances, model), conditions)


@contextlib.contextmanager
def timed(conditions: Mapping[str, object]) -> Iterator[list[Measurement]]:
    """Give a list that holds what the block took, once it is done."""
    began, used = time.perf_counter(), time.process_time()
    found: list[Measurement] = []
    yield found
    took = {
        "quantizing_s": time.perf_counter() - began,
        "quantizing_processor_s": time.process_time() - used,
    }
    found += [
        Measurement(name=name, value=value, unit="s", conditions=conditions)
        for name, value in took.items()
    ]


def other_programs(contest: Contest, names: Sequence[str]) -> list[Measurement]:
    """Return the figures of what other programs make of a model."""
    found: list[Measurement] = []
    samples = contest.samples(RECIPES["round-int4"])
    with tempfile.TemporaryDirectory(prefix="deepseek-others-") as folder:
        path = save(contest.reference, Path(folder) / "model").path
        for name in names:
            conditions = {**contest.about, "scheme": name, "threads": torch.get_num_threads()}
            with timed(conditions) as took:
                peer = quantized_by_other(name, path, samples)
            found += [*took, *contest.sizes(peer.num_bytes, conditions)]
            found += contest.losses(peer.log_chances, conditions)
    return found


def llama_files(contest: Contest, program: Path) -> list[Measurement]:
    """Return the figures of what llama.cpp makes of a model."""
    found: list[Measurement] = []
    for peer in quantized_by_llama(program, contest.reference):
        conditions = {**contest.about, "scheme": peer.name}
        found += contest.sizes(peer.num_bytes, conditions)
        found += contest.losses(functools.partial(log_chances, peer.model), conditions)
    return found


def show(found: Sequence[Measurement]) -> None:
    """Print the table."""
    figures = {(each.conditions.get("scheme"), each.name): each for each in found}
    perplexity, error = figures[None, "perplexity"], figures[None, "int4_rounding_error"]
    about = perplexity.conditions
    title = (
        f"{about['model']}: perplexity {perplexity.value:.3f} in float32 over {about['windows']} "
        f"windows of {WINDOW} tokens of {about['text']}; rounding to int4 changes the layers' "
        f"weights by {100 * error.value:.2g} %"
    )
    table = Table(
        "recipe", "perplexity ratio", "95 %", "KL, nats", "same top", "other text", "bits", "MB",
        "s",
        title=escape(title), title_justify="left", box=None, pad_edge=False,
    )  # fmt: skip
    for name in dict.fromkeys(scheme for scheme, _ in figures if scheme is not None):
        ratio, other = (
            figures[name, "perplexity_ratio"],
            figures.get((name, "perplexity_ratio_other")),
        )
        seconds = figures.get((name, "quantizing_s"))
        assert ratio.spread is not None
        table.add_row(
            name,
            f"{ratio.value:.4f}",
            f"{ratio.spread.low:.4f} … {ratio.spread.high:.4f}",
            f"{figures[name, 'kl_divergence'].value:.5f}",
            f"{100 * figures[name, 'top1_agreement'].value:.1f} %",
            "" if other is None else f"{other.value:.4f}",
            f"{figures[name, 'bits_per_quantized_weight'].value:.2f}",
            f"{figures[name, 'quantized_weight_bytes'].value / 1e6:.1f}",
            "" if seconds is None else f"{seconds.value:.0f}",
        )
    Console(highlight=False).print(table)


def gate(word: str) -> tuple[str, float]:
    """Return recipe and largest perplexity ratio out of `RECIPE=RATIO`.

    Raises:
        argparse.ArgumentTypeError: it is not of that form.
    """
    name, _, ratio = word.partition("=")
    try:
        if name in RECIPES and float(ratio) > 0:
            return name, float(ratio)
    except ValueError:
        pass
    must = f"RECIPE=RATIO, such as learned-int4=1.03, a recipe one of {', '.join(RECIPES)}"
    raise argparse.ArgumentTypeError(f"must be {must}; got {word!r}")


def read_options(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the options; ends the program at those that do not fit together."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m", help="name or folder")
    parser.add_argument("--as-is", action="store_true", help="leave the channels in their order")
    parser.add_argument("--recipes", nargs="*", choices=RECIPES, default=[*RECIPES])
    parser.add_argument(
        "--others", nargs="+", choices=OTHERS, default=[], help="other programs, if installed"
    )
    parser.add_argument("--tokens", type=positive, default=8192, help="to measure on (8192)")
    parser.add_argument(
        "--text", type=Path, nargs="+", default=[], metavar="FILE",
        help="UTF-8 files in place of the documentation inside Python",
    )  # fmt: skip
    parser.add_argument(
        "--calibrate", type=Path, nargs="+", default=[], metavar="FILE",
        help="texts to learn from too, none of them measured",
    )  # fmt: skip
    parser.add_argument("--other", type=Path, metavar="FILE", help="measure on this text too")
    parser.add_argument("--gate", type=gate, action="append", default=[], metavar="RECIPE=RATIO")
    parser.add_argument(
        "--llama-quantize", type=Path, metavar="PROGRAM", help="a peer, measured too"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    if unused := sorted({name for name, _ in options.gate} - set(options.recipes)):
        parser.error(f"--gate for what is not measured: {', '.join(unused)}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print a table or one JSON object; 1 when a gate is exceeded, 2 for a mistake."""
    words = sys.argv[1:] if arguments is None else arguments
    options = read_options(words)
    command = shlex.join(["python", "-m", "benchmarks.compress_quantize", *words])
    gates = dict(options.gate)
    try:
        console = Console(stderr=True)
        with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
            found = [dataclasses.replace(each, command=command) for each in run(options, bar)]
    except DeepseekError as error:
        print(f"compress_quantize: {error}", file=sys.stderr)
        return 2
    over = over_gates(found, gates)
    if options.json:
        figures = [item.to_dict() for item in found]
        print(json.dumps({"gates": gates, "over_gates": over, "measurements": figures}, indent=2))
    else:
        show(found)
    for line in over:
        print(f"compress_quantize: {line}", file=sys.stderr)
    return 1 if over else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("stopped: nothing was kept")
