"""Serve a model over HTTP, as OpenAI's API.

It listens on this machine alone unless told otherwise, and takes keys from DEEPSEEK_API_KEYS: words
with commas between them. SIGTERM or Ctrl-C finish what is under way, a second one does not wait.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
from typing import TYPE_CHECKING

from deepseek.cli.models import (
    add_attention_argument,
    add_scheme_argument,
    positive,
    ready,
)
from deepseek.cli.output import Output
from deepseek.errors import ConfigError, describe, missing_extra

if TYPE_CHECKING:
    from deepseek.generate import Engine
    from deepseek.serve.api import Tenant
    from deepseek.serve.automatic import Values
    from deepseek.serve.service import Service

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
    parser.add_argument("--port", type=int, default=8000, help="0 for any free one (8000)")
    parser.add_argument("--name", help="what clients call the model (MODEL)")
    parser.add_argument(
        "--allow-host", action="append", default=[], help="a Host header that is answered too"
    )
    add_engine_arguments(parser)
    parser.add_argument(
        "--drain-seconds", type=float, default=30.0, help="for what is under way at the end (30)"
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
    group.add_argument("--max-waiting", type=positive, help="requests that wait; others get 429")
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
        "--price-per-hour", type=float, metavar="PRICE", help="of the machine, for cost a request"
    )


def run(args: argparse.Namespace, out: Output) -> int:
    """Serve until a signal comes; or explain the values."""
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise missing_extra("fastapi", "serve", "to serve over HTTP") from error
    _check_host(args)
    engine = _engine(args, out, args.model, args.scheme)
    service, values = _service(args, engine, out)
    if args.explain:
        return _explain(values, out)
    received = asyncio.run(_serve(args, service, out))
    return 130 if received is signal.SIGINT else out.finish({"model": args.model})


def _check_host(args: argparse.Namespace) -> None:
    if args.host not in LOOPBACK and not os.environ.get(KEYS_VARIABLE):
        must = "an address of this machine alone while there are no keys"
        step = f"Set {KEYS_VARIABLE}, or leave --host away"
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


def _service(args: argparse.Namespace, engine: Engine, out: Output) -> tuple[Service, Values]:
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


async def _serve(args: argparse.Namespace, service: Service, out: Output) -> signal.Signals:
    from deepseek.serve.api import (
        ApiSettings,
        MemoryKeyStore,
        OpenKeyStore,
        create_app,
        make_server,
    )
    from deepseek.serve.running import run_server

    settings = ApiSettings(
        model=args.name or args.model, hosts=(*ApiSettings.hosts, *args.allow_host)
    )
    holders = _holders()
    keys = MemoryKeyStore(holders) if holders else OpenKeyStore()
    app = create_app(service, settings=settings, keys=keys, metrics=service.metrics)
    config = make_server(app, settings, host=args.host, port=args.port).config
    host = f"[{args.host}]" if ":" in args.host else args.host

    def told(port: int) -> None:
        out.note(f"{settings.model} answers on http://{host}:{port}/v1 (Ctrl-C to end)")

    return await run_server(
        config, service, drain_s=args.drain_seconds, on_start=told, on_drain=out.note
    )


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
