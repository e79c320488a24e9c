"""What training gives back of what compression takes: perplexity before, in between and after.

    python benchmarks/recovery.py qat smollm2-135m --steps 200
    python benchmarks/recovery.py distil smollm2-135m --layers 24 --intermediate 1152 --steps 500

`qat`: the weights are rounded to four bits in groups of 32, embedding and head to eight, and then
trained on that grid. `distil`: a student is cut out of the model, and then trained to predict what
the model does. Both learn from the model itself, on the first nine tenths of a text, and are
measured on the last twentieth. Weights that come from a file of four bits, as those of
smollm2-135m, lie on such a grid already: rounding them proves nothing; give a model that was
trained since.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from deepseek import hub
from deepseek.cli.models import positive
from deepseek.compress import Work
from deepseek.compress.distil import Distil, Imitation, Student, distil, make_student
from deepseek.compress.qat import Grid, QuantizeAware, quantize_aware
from deepseek.compress.qat.stage import first_grids
from deepseek.errors import ConfigError, DeepseekError, describe
from deepseek.evaluate import default_corpus, perplexity, read_corpus
from deepseek.hub.store import resolve
from deepseek.models import Decoder
from deepseek.ops.memory import keep_freed_memory
from deepseek.optim import AdamW, Cosine
from deepseek.records import Measurement
from deepseek.train import Source

COMMAND = shlex.join(["python", "benchmarks/recovery.py", *sys.argv[1:]])


def decoder(name: str) -> Decoder:
    """Return a model in float32.

    Raises:
        ConfigError: it is no decoder.
    """
    model = hub.load(name, dtype="float32")
    if not isinstance(model, Decoder):
        raise ConfigError(describe("model", "the benchmark", "a decoder", name))
    return model


def split(text: Path | None, folder: Path) -> tuple[Path, Path]:
    """Write nine tenths of a text, and its last twentieth, into a folder; return the files."""
    whole = (default_corpus() if text is None else read_corpus(text)).text
    learned, held_out = folder / "learned.txt", folder / "held-out.txt"
    learned.write_text(whole[: len(whole) * 9 // 10], encoding="utf-8")
    held_out.write_text(whole[len(whole) * 19 // 20 :], encoding="utf-8")
    return learned, held_out


def common(learned: Path, args: argparse.Namespace) -> dict[str, object]:
    """Return the settings of both stages."""
    return {
        "data": (Source(path=str(learned)),),
        "steps": args.steps,
        "length": args.length,
        "batch": args.batch,
        "micro_batch": args.micro_batch,
        "optimizer": AdamW(rate=args.rate, weight_decay=0.0),
        "schedule": Cosine(warmup_steps=max(1, args.steps // 20), floor=0.05),
    }


def rounded(work: Work, learned: Path, args: argparse.Namespace) -> Callable[[], object]:
    """Round the model of `work`, and return what trains it."""
    grid = Grid(bits=4, group=args.group, is_symmetric=args.symmetric)
    stage = QuantizeAware(**common(learned, args), grid=grid, scales=args.scales)  # type: ignore[arg-type]
    work.set_quantized(first_grids(work.model, stage))
    taken = decoder(args.model)

    def train() -> object:
        # from the weights as they were: behind rounding most would start in the middle of a step
        work.model.load_state_dict(taken.state_dict())
        return quantize_aware(stage, work)

    return train


def cut(work: Work, learned: Path, args: argparse.Namespace) -> Callable[[], object]:
    """Put a student in the place of the model of `work`, and return what trains it."""
    sizes = {"num_layers": args.layers, "intermediate_size": args.intermediate}
    sizes |= {"hidden_size": args.hidden}
    make_student(Student(**sizes), work)
    imitation = Imitation(hidden=args.hidden_weight)
    stage = Distil(**common(learned, args), imitation=imitation)  # type: ignore[arg-type]
    return lambda: distil(stage, work)


def measured(folder: Path, args: argparse.Namespace) -> list[Measurement]:
    """Compress, train and measure in a folder."""
    learned, held_out = split(args.text, folder)
    corpus = read_corpus(held_out)
    found: list[Measurement] = []

    def note(when: str, value: float, name: str = "perplexity", unit: str = "1") -> None:
        conditions = {key: str(each) for key, each in vars(args).items() if key != "json"}
        about: dict[str, object] = {**conditions, "when": when}
        found.append(
            Measurement(name=name, value=value, unit=unit, conditions=about, command=COMMAND)
        )
        print(f"{when}: {name} {value:.4f}", file=sys.stderr)

    def perplexity_of(model: Decoder) -> float:
        kept = perplexity(model, corpus, max_tokens=args.max_tokens).measurements
        return next(item.value for item in kept if item.name == "perplexity")

    model = decoder(args.model)
    before = perplexity_of(model)
    note("before", before)
    work = Work(model=model, start=resolve(args.model), folder=folder / "stage")
    work.report = lambda words, share: print(words, file=sys.stderr)
    train = (rounded if args.stage == "qat" else cut)(work, learned, args)
    assert isinstance(work.model, Decoder)
    note("compressed", perplexity_of(work.model))
    start = time.perf_counter()
    train()
    note("trained", time.perf_counter() - start, "seconds", "s")
    after = perplexity_of(work.model)
    note("trained", after)
    note("trained", after / before, "perplexity_ratio")
    return found


def main() -> int:
    """Compress, train, measure, and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("stage", choices=("qat", "distil"))
    parser.add_argument("model", help="a bundle: a name or folder")
    parser.add_argument("--text", type=Path, help="(the language reference inside Python)")
    parser.add_argument("--steps", type=positive, default=200)
    parser.add_argument("--batch", type=positive, default=8)
    parser.add_argument("--micro-batch", type=positive)
    parser.add_argument("--length", type=positive, default=512, help="tokens of a sample")
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--max-tokens", type=positive, default=8192, help="of a measurement")
    parser.add_argument("--group", type=positive, default=32, help="of qat")
    parser.add_argument("--symmetric", action="store_true", help="of qat")
    parser.add_argument("--scales", choices=("learned", "fixed"), default="learned", help="of qat")
    parser.add_argument("--layers", type=positive, help="of distil")
    parser.add_argument("--hidden", type=positive, help="width, of distil")
    parser.add_argument("--intermediate", type=positive, help="of distil")
    parser.add_argument("--hidden-weight", type=float, default=0.0, help="of distil")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        found = measured(Path(folder), args)
    if args.json:
        print(json.dumps({"measurements": [item.to_dict() for item in found]}, indent=2))
        return 0
    table = Table("when", "what", "value")
    for item in found:
        table.add_row(str(item.conditions["when"]), item.name, f"{item.value:.4f}")
    Console().print(table)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except DeepseekError as error:
        sys.exit(f"recovery: {error}")
    except KeyboardInterrupt:
        sys.exit("recovery: stopped")
