"""What tokens that leave early save and lose: layers, agreement, perplexity, tokens/s.

    python benchmarks/early_exit.py
    python benchmarks/early_exit.py --model FOLDER --layers 12 18 24 --text FILE --json
    python benchmarks/early_exit.py --criterion cosine --thresholds 0.999 0.99 0.98 --new-tokens 0

A curve over thresholds, from the whole model (1) down. Disagreement with the whole model, layers
and perplexity are taken on the first tokens of the documents of a text, which goes on as it is,
with the cache that exits leave behind. Tokens/s are those of greedy generation at batch size 1, all
through PyTorch, the whole model and every threshold in turns; each round gives a ratio of its own.
The share of the weights that a token is multiplied with says what could be saved where weights are
all that counts: the head at every place it was asked is in it, and the keys and values of layers
that a token did not go through.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import deepseek
from deepseek.cli.models import positive
from deepseek.errors import ConfigError, DeepseekError, describe
from deepseek.evaluate import default_corpus, read_corpus, score_exits
from deepseek.evaluate.exit_calibration import THRESHOLDS, first_tokens
from deepseek.generate import Completion, Exits, generate
from deepseek.models import Decoder
from deepseek.models.layers import Attention, LatentAttention
from deepseek.records import Measurement, summarize

COMMAND = shlex.join(["python", "benchmarks/early_exit.py", *sys.argv[1:]])


def places(num_layers: int) -> tuple[int, ...]:
    """Return the places that are asked where none are named: a half, two thirds, five sixths."""
    return tuple(sorted({num_layers * n // 6 for n in (3, 4, 5)} - {0}))


def load_decoder(source: str, dtype: str) -> Decoder:
    """Return a model that runs through PyTorch.

    Raises:
        ConfigError: it is no decoder.
    """
    model = deepseek.load(source, dtype=dtype)
    if not isinstance(model, Decoder):
        raise ConfigError(describe("model", "the benchmark of early exit", "a decoder", source))
    return model


def weights_share(model: Decoder, exits: Exits, depths: Sequence[int]) -> float:
    """Return the share of the weights that tokens are multiplied with, of those of a whole pass.

    Args:
        model: the decoder; experts are counted as if all of a layer's were used.
        exits: where it asks.
        depths: layers that each token went through.
    """
    sizes = [size(layer) for layer in model.model.layers]
    kept = [size_kept(layer.self_attn) for layer in model.model.layers]
    head, total = size(model.lm_head), 0
    for depth in depths:
        asked = sum(layer <= depth for layer in exits.layers)
        heads = 1 if exits.criterion == "cosine" else asked + (depth == len(sizes))
        total += sum(sizes[:depth]) + sum(kept[depth:]) + heads * head
    return total / len(depths) / (sum(sizes) + head)


def size_kept(attention: nn.Module) -> int:
    """Return the number of weights that make the keys and values of a layer."""
    if isinstance(attention, Attention):
        return size(attention.k_proj) + size(attention.v_proj)
    assert isinstance(attention, LatentAttention)
    return size(attention.kv_a_proj_with_mqa)


def size(module: nn.Module) -> int:
    """Return the number of a module's weights."""
    return sum(parameter.numel() for parameter in module.parameters())


def run(model: Decoder, prompt: list[int], count: int, exits: Exits | None) -> tuple[float, list]:
    """Return tokens/s behind the first token, and layers of each of these tokens."""
    times_s: list[float] = []
    result = generate(
        model,
        prompt,
        max_tokens=count,
        ignore_eos=True,
        exits=exits,
        on_piece=lambda _: times_s.append(time.perf_counter()),
    )
    assert isinstance(result, Completion)
    rate = (len(times_s) - 1) / (times_s[-1] - times_s[0])
    return rate, list(result.depths or [])[1:]


def speeds(
    model: Decoder, prompt: list[int], tried: Sequence[Exits], args: argparse.Namespace
) -> list[Measurement]:
    """Return tokens/s of the whole model and of every threshold, and the ratio of each round."""
    model.impl = "sdpa"  # asked for by name, so that the whole model runs through PyTorch too
    contenders: list[Exits | None] = [None, *tried]
    rates: dict[Exits | None, list[float]] = {each: [] for each in contenders}
    depths: dict[Exits | None, list[int]] = {}
    for turn in range(args.rounds + 1):
        for each in contenders:
            rate, depths[each] = run(model, prompt, args.new_tokens, each)
            if turn:  # the first round warms up
                rates[each].append(rate)
    found = []
    for each in contenders:
        conditions = {
            **about(args),
            "threshold": "whole model" if each is None else each.threshold,
            "prompt_tokens": len(prompt),
            "new_tokens": args.new_tokens,
        }
        rest = {"conditions": conditions, "command": COMMAND}
        found.append(summarize("decode_tokens_per_s", rates[each], "tokens/s", **rest))
        if each is not None:
            ratios = [one / whole for one, whole in zip(rates[each], rates[None], strict=True)]
            found.append(summarize("decode_speedup", ratios, "1", **rest))
            mean = sum(depths[each]) / len(depths[each])
            found.append(
                Measurement(name="mean_layers_generated", value=mean, unit="layers/token", **rest)
            )
    return found


def about(args: argparse.Namespace) -> dict[str, object]:
    """Return what holds for every figure."""
    return {
        "model": args.model,
        "dtype": args.dtype,
        "exit_layers": list(args.layers),
        "criterion": args.criterion,
        "threads": torch.get_num_threads(),
    }


def show(found: list[Measurement]) -> None:
    """Print a line for each threshold."""
    names = list(dict.fromkeys(item.name for item in found))
    table = Table("threshold", *(name.replace("_", "\n") for name in names))
    for threshold in dict.fromkeys(item.conditions["threshold"] for item in found):
        cells = {item.name: item for item in found if item.conditions["threshold"] == threshold}
        table.add_row(
            str(threshold),
            *(f"{cells[name].value:.4g}" if name in cells else "" for name in names),
        )
    Console().print(table)


def main() -> int:
    """Measure, show or print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", default="smollm2-135m", help="name or folder")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--text", type=Path, help="(the language reference inside Python)")
    parser.add_argument("--layers", type=positive, nargs="+", help="(1/2, 2/3, 5/6 of them)")
    parser.add_argument("--criterion", default="margin", choices=tuple(THRESHOLDS))
    parser.add_argument("--thresholds", type=float, nargs="+", help="(those of a calibration)")
    parser.add_argument("--texts", type=positive, default=40, help="documents of the text")
    parser.add_argument("--prompt-tokens", type=positive, default=32)
    parser.add_argument("--tokens", type=positive, default=96, help="of each text, behind these")
    parser.add_argument("--new-tokens", type=int, default=64, help="generated; 0: no speeds")
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    model = load_decoder(args.model, args.dtype)
    args.layers = tuple(args.layers or places(model.config.num_layers))
    tried = [
        Exits(layers=args.layers, criterion=args.criterion, threshold=threshold)
        for threshold in [1.0, *(args.thresholds or THRESHOLDS[args.criterion])]
    ]
    corpus = default_corpus() if args.text is None else read_corpus(args.text)
    texts = first_tokens(model, corpus.documents(), args.prompt_tokens + args.tokens)[: args.texts]
    if not texts:
        must = f"with a document of at least {args.prompt_tokens + args.tokens} tokens"
        raise ConfigError(describe("text", "the benchmark of early exit", must, corpus.name))
    found = []
    for scores in score_exits(model, texts, tried, num_prompt_tokens=args.prompt_tokens):
        conditions = {**about(args), "text": corpus.name, "prompt_tokens": args.prompt_tokens}
        shown = scores.measurements(conditions, COMMAND)
        share = weights_share(model, scores.exits, scores.depths.flatten().tolist())
        facts = {"conditions": shown[0].conditions, "command": COMMAND}
        found += [*shown, Measurement(name="weights_share", value=share, unit="1", **facts)]
    if args.new_tokens > 1:
        found += speeds(model, texts[0][: args.prompt_tokens], tried, args)
    if args.json:
        print(json.dumps({"measurements": [item.to_dict() for item in found]}, indent=2))
    else:
        show(found)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except DeepseekError as error:
        sys.exit(f"early exit: {error}")
    except KeyboardInterrupt:
        sys.exit("early exit: stopped")
