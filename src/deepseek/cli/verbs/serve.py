"""Serve a model over HTTP, as OpenAI's API.

It listens on this machine alone unless told otherwise. Keys are made by --add-key, or taken from
DEEPSEEK_API_KEYS: words with commas between them; DEEPSEEK_ADMIN_KEY opens the admin routes.
SIGTERM or Ctrl-C finish what is under way, a second one does not wait.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from deepseek.cli.models import (
    add_attention_argument,
    add_scheme_argument,
    positive,
    ready,
)
from deepseek.cli.output import Output
from deepseek.cli.serve_beside import Beside, load_adapters
from deepseek.errors import ConfigError, describe, missing_extra

if TYPE_CHECKING:
    from deepseek.generate import Engine
    from deepseek.records import Event
    from deepseek.serve.adapters import AdapterRegistry
    from deepseek.serve.api import Tenant
    from deepseek.serve.automatic import Values
    from deepseek.serve.durable import DurableState
    from deepseek.serve.embedding import Embedder
    from deepseek.serve.service import Service
    from deepseek.serve.state.keys import ApiKey

EXAMPLE = "deepseek serve smollm2-135m --scheme int8 --port 8000"
KEYS_VARIABLE, ADMIN_VARIABLE = "DEEPSEEK_API_KEYS", "DEEPSEEK_ADMIN_KEY"
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `deepseek serve`."""
    parser.add_argument("model", metavar="MODEL", help="a name (smollm2-135m), a folder")
    add_scheme_argument(parser)
    add_attention_argument(parser)
    parser.add_argument("--context", type=positive, help="stretch the context to so many tokens")
    parser.add_argument("--threads", type=positive, help="threads to compute with (all cores)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    parser.add_argument("--port", type=_port, default=8000, help="0 for any free one (8000)")
    parser.add_argument("--name", help="what clients call the model (MODEL)")
    parser.add_argument(
        "--allow-host", action="append", default=[], help="a Host header that is answered too"
    )
    add_engine_arguments(parser)
    add_state_arguments(parser)
    parser.add_argument(
        "--drain-seconds",
        type=_not_negative,
        default=30.0,
        help="for what is under way at the end (30)",
    )
    parser.add_argument(
        "--explain", action="store_true", help="say why each value was chosen, and end"
    )
    parser.set_defaults(verb="serve")


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what decides how requests share the machine."""
    group = parser.add_argument_group("the engine (what is not given is chosen, see --explain)")
    group.add_argument("--pages", type=positive, help="pages of 64 tokens for keys and values")
    group.add_argument("--max-running", type=positive, help="requests that run together")
    group.add_argument("--max-waiting", type=positive, help="requests that wait; others get 503")
    group.add_argument("--step-tokens", type=positive, help="most tokens of a step")
    group.add_argument("--no-guesses", action="store_true", help="do not guess tokens ahead")
    group.add_argument(
        "--draft",
        metavar="MODEL",
        help="a small model of the same tokenizer that guesses ahead (what the text said before)",
    )
    group.add_argument(
        "--audit", type=positive, metavar="N", help="read one answer in N again, and compare"
    )
    group.add_argument(
        "--audit-scheme",
        metavar="NAME",
        help="scheme of the reference that audits compute (the one that serves)",
    )
    group.add_argument(
        "--price-per-hour",
        type=_not_negative,
        metavar="PRICE",
        help="of the machine, for cost a request",
    )


def add_state_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what is kept between runs, and what is served beside the model."""
    group = parser.add_argument_group("state and what is beside the model")
    group.add_argument(
        "--state",
        metavar="FOLDER",
        help="where keys, usage, files, batches and responses are kept; 'none' for nothing "
        "($DEEPSEEK_HOME/serve/NAME)",
    )
    group.add_argument("--database", metavar="URL", help="of PostgreSQL, in place of SQLite")
    group.add_argument("--events", metavar="FILE", help="append the event of every answer as JSON")
    group.add_argument(
        "--embeddings",
        metavar="MODEL",
        help="an encoder for /v1/embeddings and /v1/rerank (the model's own states)",
    )
    group.add_argument(
        "--embeddings-scheme",
        default="bfloat16",
        metavar="NAME",
        help="how that encoder is stored and computed (bfloat16)",
    )
    group.add_argument(
        "--pooling",
        choices=("mean", "last"),
        default="mean",
        help="which of the model's own states make a text's vector (mean)",
    )
    group.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="NAME=FOLDER",
        help="a low-rank adapter that can be asked for by its name",
    )
    keys = parser.add_argument_group("keys (does that alone, and ends)")
    keys.add_argument("--add-key", metavar="NAME", help="make a key, shown once")
    keys.add_argument("--key-admin", action="store_true", help="it opens the admin routes")
    keys.add_argument("--key-requests", type=positive, metavar="N", help="a minute, for that key")
    keys.add_argument("--key-tokens", type=positive, metavar="N", help="a minute, for that key")
    keys.add_argument("--key-concurrency", type=positive, metavar="N", help="at once, for that key")
    keys.add_argument("--revoke-key", metavar="ID", help="refuse a key from now on")
    keys.add_argument("--list-keys", action="store_true", help="show all keys and what they used")


def _port(word: str) -> int:
    if not word.isdecimal() or int(word) > 65_535:
        raise argparse.ArgumentTypeError(f"must be a number from 0 to 65535; got {word!r}")
    return int(word)


def _not_negative(word: str) -> float:
    try:
        value = float(word)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError(f"must be a number of at least 0; got {word!r}")
    return value


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
    engine = _engine(args, out, args.model, args.scheme)
    state = _state(args)
    try:
        return _run(args, engine, state, out)
    finally:
        if state is not None:
            state.close()


def _run(args: argparse.Namespace, engine: Engine, state: DurableState | None, out: Output) -> int:
    has_keys = bool(_holders()) or (state is not None and any(_live_keys(state)))
    _check_host(args, has_keys)
    adapters = load_adapters(engine, args.adapter)
    service, values = _service(args, engine, adapters, out)
    if args.explain:
        return _explain(values, out)
    beside = Beside.of(args, state, adapters, lambda: _own_embedder(args, engine, service))
    received = asyncio.run(_serve(args, service, beside, out, has_keys=has_keys))
    return 130 if received is signal.SIGINT else out.finish({"model": args.model})


def _own_embedder(args: argparse.Namespace, engine: Engine, service: Service) -> Embedder:
    from deepseek.serve.runtime.embedder import DecoderEmbedder

    name = args.name or args.model
    return DecoderEmbedder(engine, name, service.engine.call, pooling=args.pooling)


def state_folder(args: argparse.Namespace) -> Path:
    """Return where the state of a served model is kept."""
    from deepseek.hub.store import store_folder

    if args.state is not None:
        return Path(args.state)
    name = re.sub(r"[^A-Za-z0-9._-]", "-", Path(args.name or args.model).name)
    return store_folder() / "serve" / name


def _state(args: argparse.Namespace) -> DurableState | None:
    if args.state == "none" or args.explain:
        return None
    from deepseek.serve.durable import DurableState

    return DurableState(state_folder(args), args.database)


def _live_keys(state: DurableState) -> list[ApiKey]:
    return [key for key in state.keys.list() if key.revoked_at is None]


def _check_host(args: argparse.Namespace, has_keys: bool) -> None:
    if args.host not in LOOPBACK and not has_keys:
        must = "an address of this machine alone while there are no keys"
        step = "Make one by --add-key NAME, or leave --host away"
        raise ConfigError(describe("--host", "deepseek serve", must, args.host, step))


def _engine(args: argparse.Namespace, out: Output, model: str, scheme: str | None) -> Engine:
    from deepseek.face import load_engine

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
    if engine is None:
        must = "one that the engine runs"
        step = f"See why not: deepseek explain {model}"
        raise ConfigError(describe("MODEL", "deepseek serve", must, model, step))
    return engine


def _service(
    args: argparse.Namespace, engine: Engine, adapters: AdapterRegistry, out: Output
) -> tuple[Service, Values]:
    from deepseek.serve.assembly import build_service
    from deepseek.serve.automatic import Asked

    asked = Asked(
        pages=args.pages,
        max_running=args.max_running,
        step_tokens=args.step_tokens,
        max_waiting=args.max_waiting,
    )
    reference = draft = None
    if args.audit and args.audit_scheme and not args.explain:
        reference = _engine(args, out, args.model, args.audit_scheme)
    if args.draft is not None and not args.explain:
        draft = _engine(args, out, args.draft, args.scheme)
    return build_service(
        engine,
        asked,
        model=args.name or args.model,
        guesses=not args.no_guesses,
        draft=draft,
        resolve_adapter=adapters.resolve,
        audit_every=args.audit,
        reference=reference,
        price_per_hour=args.price_per_hour,
    )


def _explain(values: Values, out: Output) -> int:
    rows = [(value.name, f"{value.value:,}", value.why) for value in values.listed()]
    out.table("How this machine would be used", ("value", "", "why"), rows)
    return out.finish(
        {"values": [{"name": name, "value": shown, "why": why} for name, shown, why in rows]}
    )


async def _serve(
    args: argparse.Namespace,
    service: Service,
    beside: Beside,
    out: Output,
    *,
    has_keys: bool,
) -> signal.Signals:
    from deepseek.serve.api import (
        ApiSettings,
        MemoryKeyStore,
        OpenKeyStore,
        create_app,
        make_server,
    )
    from deepseek.serve.durable import AllKeys
    from deepseek.serve.running import run_server

    settings = ApiSettings(
        model=args.name or args.model,
        hosts=(*ApiSettings.hosts, *args.allow_host),
        uploads=beside.uploads,
    )
    stored = None if beside.state is None else beside.state.keys
    keys = AllKeys(MemoryKeyStore(_holders()), stored) if has_keys else OpenKeyStore()
    with contextlib.ExitStack() as stack:
        app = create_app(
            service,
            settings=settings,
            keys=keys,
            metrics=service.metrics,
            on_event=_event_sink(args, beside.state, stack),
            adapters=beside.adapter_names,
            routers=beside.routers,
            admin_routers=beside.admin_routers,
        )
        batches = beside.add_state(app)
        config = make_server(app, settings, host=args.host, port=args.port).config
        host = f"[{args.host}]" if ":" in args.host else args.host

        def told(port: int) -> None:
            out.note(f"{settings.model} answers on http://{host}:{port}/v1 (Ctrl-C to end)")

        return await run_server(
            config,
            service,
            drain_s=args.drain_seconds,
            batches=batches,
            on_start=told,
            on_drain=out.note,
        )


def _event_sink(
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


def _holders() -> dict[str, Tenant]:
    """Return the holders of the keys of the environment, by the keys' hashes."""
    from deepseek.serve.api import Tenant, hash_key

    words = [word.strip() for word in os.environ.get(KEYS_VARIABLE, "").split(",")]
    holders = {
        hash_key(word): Tenant(id=f"key{number}") for number, word in enumerate(words, 1) if word
    }
    admin = os.environ.get(ADMIN_VARIABLE)
    if admin:
        holders[hash_key(admin)] = Tenant(id="admin", is_admin=True)
    return holders
