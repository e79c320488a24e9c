"""Which kernel runs each operation of a model and why, and what a step reads and computes."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from deepseek.cli.models import add_scheme_argument, positive, ready
from deepseek.cli.output import Output, number, size

if TYPE_CHECKING:
    from deepseek.generate.cost import OperationCost
    from deepseek.records import Measurement

EXAMPLE = "deepseek explain smollm2-135m --scheme int4 --rows 8"
CONTEXT = 1024
"""Tokens that a row sees, unless told."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `deepseek explain`."""
    parser.add_argument(
        "model", metavar="MODEL", help="a name (smollm2-135m), a folder, a .gguf file"
    )
    add_scheme_argument(parser)
    parser.add_argument(
        "--rows", type=positive, default=1, help="rows of the step, a new token each (1)"
    )
    parser.add_argument(
        "--context",
        type=positive,
        help=f"tokens that each row sees ({CONTEXT}, or the model's context where it is shorter)",
    )


def run(args: argparse.Namespace, out: Output) -> int:
    """Show the operations of a step with their kernels, or why the engine does not run it."""
    name = ready(args.model, out)
    from deepseek.face import engine_facts
    from deepseek.generate.cost import cost_of_step
    from deepseek.generate.flat import decoder_program
    from deepseek.models.config import DecoderConfig

    facts = engine_facts(name, scheme=args.scheme)
    config, scheme = facts.config, facts.scheme
    if not isinstance(config, DecoderConfig) or scheme is None or facts.reason is not None:
        out.say(f"{args.model} runs through PyTorch: {facts.reason}")
        return out.finish({"model": args.model, "engine": False, "why": facts.reason})
    context = args.context or min(CONTEXT, config.max_positions)
    costs = cost_of_step(
        decoder_program(config),
        facts.shapes,
        scheme,
        forms=facts.forms,
        rows=args.rows,
        context=context,
    )
    conditions = {
        "model": args.model,
        "scheme": scheme.name,
        "rows": args.rows,
        "context": context,
    }
    found = totals(costs, conditions)
    rows = "one row that sees" if args.rows == 1 else f"{args.rows} rows that each see"
    show(out, f"{args.model}, {scheme.name}: a step of {rows} {number(context)} tokens", costs)
    operations = [cost.to_dict() for cost in costs]
    return out.finish({**conditions, "engine": True, "operations": operations}, found)


def totals(costs: list[OperationCost], conditions: dict[str, object]) -> list[Measurement]:
    """Return what the whole step reads and computes; exact by construction, so without spread."""
    from deepseek.ops.scheme import SCHEMES
    from deepseek.records import Measurement

    words = " --scheme {scheme}" if conditions["scheme"] in SCHEMES else ""
    command = f"deepseek explain {{model}}{words} --rows {{rows}} --context {{context}}"
    sums = {
        "weight_bytes_per_step": (sum(cost.weight_bytes for cost in costs), "bytes"),
        "cache_bytes_per_step": (sum(cost.cache_bytes for cost in costs), "bytes"),
        "products_per_step": (sum(cost.products for cost in costs), "1"),
    }
    return [
        Measurement(
            name=name,
            value=value,
            unit=unit,
            conditions=conditions,
            command=command.format(**conditions),
        )
        for name, (value, unit) in sums.items()
    ]


def show(out: Output, title: str, costs: list[OperationCost]) -> None:
    """Print the operations with their sum, then the kernels with their reasons."""
    rows = [
        (
            cost.name,
            str(cost.count),
            " × ".join(map(str, cost.shape)),
            cost.storage,
            cost.kernel.name,
            size(cost.weight_bytes + cost.cache_bytes),
            number(cost.products),
        )
        for cost in costs
    ]
    weights = sum(cost.weight_bytes for cost in costs)
    cached = sum(cost.cache_bytes for cost in costs)
    products = number(sum(cost.products for cost in costs))
    rows.append(("all", "", "", "", "", size(weights + cached), products))
    header = ("operation", "count", "shape", "storage", "kernel", "reads", "products")
    out.table(title, header, rows)
    out.say()
    out.say(f"of what it reads {size(weights)} are weights, {size(cached)} keys and values")
    out.say()
    kernels = {
        (_operation(cost), cost.storage, cost.kernel.name, cost.kernel.cost_text, cost.kernel.why)
        for cost in costs
    }
    out.table("kernels", ("for", "storage", "kernel", "cost", "why"), sorted(kernels))


def _operation(cost: OperationCost) -> str:
    return "attention" if cost.name == "attention" else "products"
