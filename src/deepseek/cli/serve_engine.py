"""The engine that `deepseek serve` computes with: packed weights, or a model's modules."""

from __future__ import annotations

import argparse
import dataclasses
from typing import TYPE_CHECKING

from deepseek.cli.edge import edge_profile, load_for_edge
from deepseek.cli.models import ready
from deepseek.cli.output import Output
from deepseek.errors import ConfigError, describe

if TYPE_CHECKING:
    from deepseek.export import EdgePlan
    from deepseek.serve.stepping import StepEngine

_SERVER_BYTES = 128 * 2**20
"""What a server takes beside its engine: libraries, connections, state, grammars."""


@dataclasses.dataclass(frozen=True)
class Served:
    """A model ready for steps."""

    engine: StepEngine
    slow_because: str | None
    """Why it runs through its modules; None on packed weights."""
    edge: EdgePlan | None = None
    """Within which limits; None without `--target edge`."""


def served_engine(args: argparse.Namespace, out: Output, model: str, scheme: str | None) -> Served:
    """Return the engine of a model, without torch where the model allows.

    Raises:
        ConfigError: the model is no decoder, the kernels were not built, or a scheme was asked for
            and the model runs through its modules.
    """
    from deepseek.face import load_engine
    from deepseek.ops.cpu import why_missing

    missing = why_missing()
    if missing is not None:
        raise ConfigError(describe("kernels", "deepseek serve", "built", missing))
    profile = edge_profile(args, _SERVER_BYTES)
    if profile is not None:
        edge = load_for_edge(model, profile, out)
        return Served(edge.engine, None, edge.plan)
    name = ready(model, out)
    with out.progress() as progress:
        engine = load_engine(
            name,
            scheme=scheme,
            attention=args.attention,
            threads=args.threads,
            context=args.context,
            progress=lambda share: progress("packing weights", share),
        )
    return _by_modules(args, name, scheme) if engine is None else Served(engine, None)


def _by_modules(args: argparse.Namespace, name: str, scheme: str | None) -> Served:
    import torch

    from deepseek.face import load
    from deepseek.generate.modules import engine_of, why_no_engine
    from deepseek.models import Decoder
    from deepseek.serve.runtime.module_engine import ModuleEngine

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    model = load(name, scheme=scheme, attention=args.attention, context=args.context)
    if not isinstance(model, Decoder):
        must, step = "a decoder", "An encoder goes beside one, by --embeddings"
        raise ConfigError(describe("MODEL", "deepseek serve", must, name, step))
    engine = engine_of(model)  # a .gguf file has one, once torch has read it
    if engine is not None:
        return Served(engine, None)
    return Served(ModuleEngine(model), why_no_engine(model))
