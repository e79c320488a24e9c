"""Measure speed and memory beside transformers: same weights, dtype, threads and prompt.

With the word attention in the place of MODEL: what routed attention saves, or loses. With the word
serve: what users of a server see, ours or any other that speaks OpenAI's API.
"""

from __future__ import annotations

import argparse
import importlib.util

from deepseek.cli.attention_bench import (
    WORD,
    add_attention_options,
    bench_attention,
    refuse_attention_options,
)
from deepseek.cli.models import add_model_arguments, bundle_of, load_decoder, positive
from deepseek.cli.output import Output, number
from deepseek.cli.serve_bench import (
    WORD as SERVE_WORD,
)
from deepseek.cli.serve_bench import (
    add_serve_options,
    bench_serve,
    refuse_serve_options,
)
from deepseek.errors import missing_extra

EXAMPLE = "deepseek bench smollm2-135m --dtype bfloat16 --prompt-tokens 512 --new-tokens 64"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `deepseek bench`."""
    add_model_arguments(parser)
    attended = (
        "with attention as MODEL: the model whose attention is measured (smollm2-135m); with "
        "serve: the address of the server"
    )
    parser.add_argument("attended", metavar="MODEL|URL", nargs="?", help=attended)
    parser.add_argument(
        "--prompt-tokens", type=positive, default=128, help="length of the prompt (128)"
    )
    parser.add_argument("--new-tokens", type=positive, default=64, help="tokens generated (64)")
    parser.add_argument("--repeats", type=positive, default=5, help="timed rounds (5)")
    parser.add_argument("--save", action="store_true", help="add the figures to the bundle's card")
    add_attention_options(parser)
    add_serve_options(parser)
    parser.set_defaults(verb="bench")


def run(args: argparse.Namespace, out: Output) -> int:
    """Show both engines' figures and the ratios of the rounds; or what attention costs, or what a
    server's users see."""
    if args.model == SERVE_WORD:
        return bench_serve(args, out)
    refuse_serve_options(args)
    if args.model == WORD:
        return bench_attention(args, out)
    refuse_attention_options(args)
    if importlib.util.find_spec("transformers") is None:
        raise missing_extra("transformers", "transformers", "as the peer of a benchmark")
    model = load_decoder(args, out)
    import torch
    import transformers

    from deepseek.cli.side_by_side import Contender, compare_processes, compare_speed

    bundle = bundle_of(model, "bench")
    folder = str(bundle.path)
    dtype = str(model.dtype).removeprefix("torch.")
    command = (
        f"deepseek bench {args.model} --dtype {dtype} --prompt-tokens {args.prompt_tokens} "
        f"--new-tokens {args.new_tokens} --repeats {args.repeats}"
    )
    with out.progress() as progress:
        transformers.utils.logging.disable_progress_bar()
        kind = transformers.AutoModelForCausalLM
        peer = kind.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
        found = compare_speed(
            model,
            peer,
            num_prompt_tokens=args.prompt_tokens,
            num_new_tokens=args.new_tokens,
            num_repeats=args.repeats,
            command=command,
            progress=progress,
        )
        processes = compare_processes(
            [
                Contender(name=name, engine=name, model=folder, scheme=dtype)
                for name in ("deepseek", "transformers")
            ],
            num_prompt_tokens=args.prompt_tokens,
            num_new_tokens=args.new_tokens,
            num_rounds=min(args.repeats, 3),
            command=command,
            progress=progress,
        )
        found += [
            item for item in processes if item.name in ("cold_start_s", "process_peak_rss_bytes")
        ]
    names = dict.fromkeys(item.name for item in found)
    rows = []
    for name in names:
        sides = {str(item.conditions["engine"]): item for item in found if item.name == name}
        shown = [number(sides[e].value) if e in sides else "" for e in ("deepseek", "transformers")]
        ratio = next((number(item.value) for engine, item in sides.items() if "/" in engine), "")
        unit = next(iter(sides.values())).unit
        rows.append((name, *shown, ratio, unit))
    out.table(
        f"{args.model}, {dtype}, {torch.get_num_threads()} threads, prompt {args.prompt_tokens}",
        ("measurement", "deepseek", "transformers", "ratio", "unit"),
        rows,
    )
    if args.save:
        bundle.add_measurements(found)
    return out.finish({"model": args.model, "dtype": dtype}, found)
