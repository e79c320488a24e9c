"""Serve a model over HTTP, as OpenAI's API.

It listens on this machine alone unless told otherwise. Keys are made by --add-key, or taken from
DEEPSEEK_API_KEYS: words with commas between them; DEEPSEEK_ADMIN_KEY opens the admin routes.
SIGTERM or Ctrl-C finish what is under way, a second one does not wait.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import re
import signal
from pathlib import Path
from typing import TYPE_CHECKING

from deepseek.cli.edge import add_target_arguments
from deepseek.cli.models import add_attention_argument, add_scheme_argument, positive
from deepseek.cli.output import Output
from deepseek.cli.serve_access import key_store
from deepseek.cli.serve_beside import Beside, event_sink, load_adapters, load_embedder
from deepseek.cli.serve_engine import served_engine
from deepseek.cli.serve_options import (
    add_engine_arguments,
    add_key_arguments,
    add_state_arguments,
    not_negative,
    port,
)
from deepseek.errors import ConfigError, describe, missing_extra

if TYPE_CHECKING:
    from deepseek.cli.serve_engine import Served
    from deepseek.serve.adapters import AdapterRegistry
    from deepseek.serve.api.auth import KeyStore
    from deepseek.serve.automatic import Values
    from deepseek.serve.durable import DurableState
    from deepseek.serve.embedding import Embedder
    from deepseek.serve.service import Service

EXAMPLE = "deepseek serve smollm2-135m --scheme int8 --port 8000"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `deepseek serve`."""
    parser.add_argument("model", metavar="MODEL", help="a name (smollm2-135m), a folder")
    add_scheme_argument(parser)
    add_attention_argument(parser)
    parser.add_argument("--context", type=positive, help="stretch the context to so many tokens")
    parser.add_argument("--threads", type=positive, help="threads to compute with (all cores)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    parser.add_argument("--port", type=port, default=8000, help="0 for any free one (8000)")
    parser.add_argument("--name", help="what clients call the model (MODEL)")
    parser.add_argument(
        "--allow-host", action="append", default=[], help="a Host header that is answered too"
    )
    add_target_arguments(parser)
    add_engine_arguments(parser)
    add_state_arguments(parser)
    add_key_arguments(parser)
    parser.add_argument(
        "--drain-seconds",
        type=not_negative,
        default=30.0,
        help="for what is under way at the end (30)",
    )
    parser.add_argument(
        "--explain", action="store_true", help="say why each value was chosen, and end"
    )
    parser.set_defaults(verb="serve")


def run(args: argparse.Namespace, out: Output) -> int:
    """Serve until a signal comes; or explain the values."""
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise missing_extra("fastapi", "serve", "to serve over HTTP") from error
    if args.list_keys or args.add_key is not None or args.revoke_key is not None:
        from deepseek.cli.serve_keys import change_keys

        if args.state == "none":
            must = "a folder where keys are kept"
            raise ConfigError(describe("--state", "deepseek serve", must, args.state))
        return change_keys(args, state_folder(args), out)
    served = served_engine(args, out, args.model, args.scheme)
    if served.slow_because is not None:
        out.note(f"{args.model} runs through its modules, which is slow: {served.slow_because}")
    if args.explain:
        return _explain(served, _service(args, served, out)[1], out)
    state = _state(args)
    try:
        keys = key_store(args, state)
        service, _, adapters = _service(args, served, out)
        embedder = _embedder(args, served, service)
        beside = Beside.of(state, adapters, embedder)
        received = asyncio.run(_serve(args, service, beside, keys, out))
    finally:
        if state is not None:
            state.close()
    return 130 if received is signal.SIGINT else out.finish({"model": args.model})


def _embedder(args: argparse.Namespace, served: Served, service: Service) -> Embedder | None:
    """Return what gives vectors: an encoder, or the states of the model itself; None where it runs
    through its modules and no encoder was named."""
    from deepseek.generate import Engine
    from deepseek.serve.runtime.embedder import DecoderEmbedder

    if args.embeddings is not None:
        return load_embedder(args)
    if not isinstance(served.engine, Engine):
        return None
    name = args.name or args.model
    return DecoderEmbedder(served.engine, name, service.engine.call, pooling=args.pooling)


def state_folder(args: argparse.Namespace) -> Path:
    """Return where the state of a served model is kept."""
    from deepseek.hub.store import store_folder

    if args.state is not None:
        return Path(args.state)
    name = re.sub(r"[^A-Za-z0-9._-]", "-", Path(args.name or args.model).name)
    return store_folder() / "serve" / name


def _state(args: argparse.Namespace) -> DurableState | None:
    if args.state == "none":
        return None
    from deepseek.serve.durable import DurableState

    return DurableState(state_folder(args), args.database)


def _service(
    args: argparse.Namespace, served: Served, out: Output
) -> tuple[Service, Values, AdapterRegistry]:
    from deepseek.serve.assembly import build_service
    from deepseek.serve.automatic import Asked

    reference = draft = None
    if args.audit and args.audit_scheme and not args.explain:
        reference = served_engine(args, out, args.model, args.audit_scheme).engine
    if args.draft is not None and not args.explain:
        draft = served_engine(args, out, args.draft, args.scheme).engine
    adapters = load_adapters(served.engine, args.adapter, reference)
    edge = served.edge
    asked = Asked(
        pages=args.pages if edge is None else edge.pages,
        max_running=args.max_running if edge is None else edge.rows,
        step_tokens=args.step_tokens,
        max_waiting=args.max_waiting,
    )
    service, values = build_service(
        served.engine,
        asked,
        model=args.name or args.model,
        guesses=not args.no_guesses,
        draft=draft,
        resolve_adapter=adapters.resolve,
        audit_every=args.audit,
        reference=reference,
        price_per_hour=args.price_per_hour,
    )
    return service, values, adapters


def _explain(served: Served, values: Values, out: Output) -> int:
    why = "packed weights and kernels of our own"
    if served.slow_because is not None:
        why = f"PyTorch, several times slower, for {served.slow_because}"
    rows = [("steps by", "modules" if served.slow_because else "engine", why)]
    rows += [(value.name, f"{value.value:,}", value.why) for value in values.listed()]
    out.table("How this machine would be used", ("value", "", "why"), rows)
    return out.finish(
        {"values": [{"name": name, "value": shown, "why": why} for name, shown, why in rows]}
    )


async def _serve(
    args: argparse.Namespace, service: Service, beside: Beside, keys: KeyStore, out: Output
) -> signal.Signals:
    from deepseek.serve.api import ApiSettings, create_app, make_server
    from deepseek.serve.running import run_server

    settings = ApiSettings(
        model=args.name or args.model,
        hosts=(*ApiSettings.hosts, *args.allow_host),
        uploads=beside.uploads,
    )
    host = f"[{args.host}]" if ":" in args.host else args.host

    def told(port: int) -> None:
        out.note(f"{settings.model} answers on http://{host}:{port}/v1 (Ctrl-C to end)")

    with contextlib.ExitStack() as stack:
        app = create_app(
            service,
            settings=settings,
            keys=keys,
            metrics=service.metrics,
            on_event=event_sink(args, beside.state, stack),
            adapters=beside.adapter_names,
            routers=beside.routers,
            admin_routers=beside.admin_routers,
        )
        workers = beside.add_state(app)
        return await run_server(
            make_server(app, settings, host=args.host, port=args.port).config,
            service,
            drain_s=args.drain_seconds,
            workers=workers,
            on_start=told,
            on_drain=out.note,
        )
