"""What a server has beside its model: state, adapters, vectors."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepseek.errors import ConfigError, describe

if TYPE_CHECKING:
    from fastapi import FastAPI

    from deepseek.records import Event
    from deepseek.serve.adapters import AdapterRegistry
    from deepseek.serve.durable import DurableState
    from deepseek.serve.embedding import Embedder
    from deepseek.serve.running import Worker
    from deepseek.serve.stepping import StepEngine


@dataclasses.dataclass
class Beside:
    """Routes beside those of the model, and what they stand on."""

    state: DurableState | None
    adapters: AdapterRegistry | None
    routers: list[Callable[[Any], Any]] = dataclasses.field(default_factory=list)
    admin_routers: list[Callable[[Any], Any]] = dataclasses.field(default_factory=list)

    @classmethod
    def of(
        cls,
        state: DurableState | None,
        adapters: AdapterRegistry | None,
        embedder: Embedder | None,
    ) -> Beside:
        """Return the routes of what is there.

        Args:
            state: what is kept.
            adapters: those that are loaded.
            embedder: gives vectors.
        """
        from deepseek.serve.api.routes.admin import adapters_router, usage_router
        from deepseek.serve.api.routes.embeddings import embeddings_router

        beside = cls(state, adapters)
        if embedder is not None:
            beside.routers.append(embeddings_router(embedder))
        if adapters is not None:
            beside.admin_routers.append(adapters_router(adapters))
        if state is not None:
            beside.admin_routers.append(usage_router(state.usage))
        return beside

    def adapter_names(self) -> list[str]:
        """Return the adapters that can be asked for now."""
        return [] if self.adapters is None else [one.name for one in self.adapters.loaded()]

    @property
    def uploads(self) -> dict[str, int]:
        """Paths that take long bodies, and how long they may be."""
        from deepseek.serve.api.stateful import upload_bytes

        return {} if self.state is None else upload_bytes(self.state.files)

    def add_state(self, app: FastAPI) -> list[Worker]:
        """Add the routes that need state to an application; return what works beside them."""
        from deepseek.serve.api.stateful import add_state

        if self.state is None:
            return []
        return add_state(
            app,
            files=self.state.files,
            batches=self.state.batches,
            responses=self.state.responses,
            routers=self.routers,
        )


def load_embedder(args: argparse.Namespace) -> Embedder:
    """Return the embedder of the encoder that `--embeddings` names, on one thread: the others are
    left to answers.

    Raises:
        ConfigError: it is no encoder, or has no tokenizer.
    """
    from deepseek.face import load_encoder_engine
    from deepseek.serve.runtime.embedder import EncoderEmbedder

    engine = load_encoder_engine(args.embeddings, scheme=args.embeddings_scheme, threads=1)
    return EncoderEmbedder(engine, Path(args.embeddings).name)


def load_adapters(
    engine: StepEngine, asked: Sequence[str], reference: StepEngine | None = None
) -> AdapterRegistry:
    """Return a registry with the adapters that `NAME=FOLDER` words name, all loaded.

    Args:
        engine: computes with them.
        asked: the words.
        reference: audits with them, where that is another one.

    Raises:
        ConfigError: a word of another form, or an adapter that does not fit.
        FormatError: a folder that holds none.
    """
    from deepseek.serve.adapters import AdapterRegistry

    registry = AdapterRegistry(engine, reference)
    for word in asked:
        name, sign, folder = word.partition("=")
        if not sign or not folder:
            raise ConfigError(describe("--adapter", "deepseek serve", "NAME=FOLDER", word))
        registry.register(name, Path(folder))
        registry.load(name)
    return registry


def event_sink(
    args: argparse.Namespace, state: DurableState | None, stack: contextlib.ExitStack
) -> Callable[[Event], None]:
    """Return what takes the events of answers: usage, and a file where one was asked for."""
    file = None
    if args.events is not None:
        path = Path(args.events)
        file = stack.enter_context(path.open("a", encoding="utf-8", buffering=1))

    def take(event: Event) -> None:
        if state is not None:
            state.count(event)
        if file is not None:
            file.write(json.dumps(event.to_dict()) + "\n")

    return take
