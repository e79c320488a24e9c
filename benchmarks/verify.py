"""What `deepseek verify` catches of bugs that are planted on purpose, and how long it takes.

    python -m benchmarks.verify
    python -m benchmarks.verify --model smollm2-135m --cases 50 --longest 1100 --beyond 1024
    python -m benchmarks.verify --model smollm2-135m --bugs "eps" "rope" --json

Without a model: two random models of two layers, one of which has biases and a head of its own. Of
each bug: whether a case departs, how small the smallest is, and whether the layer that is named is
where the bug was planted.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
import time
from collections.abc import Sequence

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks.planted_bugs import Bug, usual_bugs
from deepseek.cli.models import positive
from deepseek.errors import ConfigError, DeepseekError, describe
from deepseek.evaluate.intervals import wilson
from deepseek.export import verify
from deepseek.hub import load
from deepseek.models import Decoder, DecoderConfig
from deepseek.records import Measurement

COMMAND = shlex.join(["python", "-m", "benchmarks.verify", *sys.argv[1:]])
SMALL = DecoderConfig(
    vocab_size=330,
    hidden_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    intermediate_size=96,
    max_positions=128,
    norm_eps=1e-5,
    tie_embeddings=True,
)


@dataclasses.dataclass(frozen=True)
class Found:
    """What `verify` found of one planted bug."""

    bug: str
    source: str
    is_caught: bool
    departed: int
    asked: int
    smallest_tokens: int | None
    is_located: bool
    """Whether the layer that is named is where the bug is; none where no layer's pass shows it."""
    where: str
    seconds: float


def small_model(config: DecoderConfig) -> Decoder:
    """Return a decoder whose numbers have a usual size: neither vanish beside eps nor drown it."""
    torch.manual_seed(1)
    model = Decoder(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.normal_(parameter, 1.0, 0.1)
        else:
            nn.init.normal_(parameter, std=0.1 if parameter.dim() == 1 else 0.08)
    return model


def sources(name: str | None) -> dict[str, Decoder]:
    """Return the models that bugs are planted into, by name.

    Raises:
        ConfigError: a model that is no decoder.
    """
    if name is None:
        own = SMALL.replace(tie_embeddings=False, qkv_bias=True)
        return {"tied": small_model(SMALL), "biased": small_model(own)}
    model = load(name, dtype="float32")
    if not isinstance(model, Decoder):
        raise ConfigError(describe("--model", "benchmarks.verify", "a decoder", name))
    return {name: model}


def search(model: Decoder, name: str, bug: Bug, args: argparse.Namespace) -> Found:
    """Return what `verify` finds of a bug that is planted into a model."""
    started = time.perf_counter()
    found = verify(model, bug.plant(model), cases=args.cases, seed=args.seed, longest=args.longest)
    smallest = found.smallest[0] if found.smallest else None
    last = model.config.num_layers - 1
    layer = bug.layer if bug.layer is None or bug.layer >= 0 else last + 1 + bug.layer
    return Found(
        bug.name,
        name,
        not found.holds,
        len(found.departed),
        len(found.outcomes),
        None if smallest is None else smallest.smallest.num_tokens,
        smallest is not None and smallest.location.layer == layer,
        "" if smallest is None else smallest.location.words,
        time.perf_counter() - started,
    )


def measurements(found: Sequence[Found], args: argparse.Namespace) -> list[Measurement]:
    """Return the shares of bugs that were caught and located, and the seconds of a search."""
    conditions = {"model": args.model or "small", "cases": args.cases, "seed": args.seed}
    conditions |= {"bugs": len(found), "longest": args.longest}
    made = []
    shares = {
        "bugs_caught": sum(each.is_caught for each in found),
        "bugs_located": sum(each.is_located for each in found),
    }
    for name, count in shares.items():
        spread = wilson(count, len(found))
        made.append(
            Measurement(
                name=name,
                value=count / len(found),
                unit="1",
                spread=spread,
                conditions=conditions,
                command=COMMAND,
            )
        )
    seconds = sorted(each.seconds for each in found)[len(found) // 2]
    made.append(
        Measurement(name="seconds", value=seconds, unit="s", conditions=conditions, command=COMMAND)
    )
    return made


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="a decoder: a name or folder (two small ones)")
    parser.add_argument("--bugs", nargs="+", help="only those whose name has one of these words")
    parser.add_argument("--cases", type=positive, default=200, help="cases a bug (200)")
    parser.add_argument("--longest", type=positive, default=2048, help="most tokens (2048)")
    parser.add_argument("--beyond", type=positive, default=64, help="where positions stop (64)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def main() -> int:
    """Plant every bug, search for it, and print what was found."""
    args = parser().parse_args()
    found: list[Found] = []
    try:
        for name, model in sources(args.model).items():
            for bug in usual_bugs(model, args.beyond):
                words = args.bugs or [""]
                if any(word in bug.name for word in words):
                    found.append(search(model, name, bug, args))
                    print(f"{found[-1].bug}: {found[-1].where}", file=sys.stderr, flush=True)
        if not found:
            raise ConfigError(describe("--bugs", "benchmarks.verify", "a bug's", args.bugs))
    except DeepseekError as error:
        print(f"benchmarks.verify: {error}", file=sys.stderr)
        return 2
    figures = measurements(found, args)
    if args.json:
        whole = [dataclasses.asdict(each) for each in found]
        print(json.dumps({"bugs": whole, "measurements": [each.to_dict() for each in figures]}))
        return 0
    table = Table("bug", "source", "caught", "departed", "smallest", "located", "s", box=None)
    for each in found:
        share = f"{each.departed}/{each.asked}"
        marks = ["yes" if value else "NO" for value in (each.is_caught, each.is_located)]
        row = (each.bug, each.source, marks[0], share, str(each.smallest_tokens), marks[1])
        table.add_row(*row, f"{each.seconds:.1f}")
    Console().print(table)
    for figure in figures:
        print(f"{figure.name} {figure.value:.3f} {figure.unit}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
