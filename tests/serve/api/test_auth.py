"""Keys: no route without one, and none that a user's key should not open."""

from __future__ import annotations

import re
from typing import Any

import pytest
from fastapi import APIRouter, FastAPI
from fastapi.routing import APIRoute

from deepseek.errors import ConfigError
from deepseek.serve.api import (
    ApiSettings,
    MemoryKeyStore,
    OpenKeyStore,
    Service,
    Tenant,
    auth,
    hash_key,
    new_key,
)
from deepseek.serve.api.strict_json import StrictRoute
from tests.serve.api.support import (
    ADMIN_KEY,
    HEADERS,
    HELLO,
    KEY,
    Caller,
    call,
    chat,
    error_of,
    make_app,
    run,
)

PUBLIC = {"/health", "/ready"}


def admin_router(service: Service) -> APIRouter:
    """Return a route for admins."""
    router = APIRouter(route_class=StrictRoute)

    @router.post("/pause")
    async def pause() -> dict[str, str]:
        return {"done": service.settings.model}

    return router


def later_router(service: Service) -> APIRouter:
    """Return a route that somebody adds later."""
    router = APIRouter(route_class=StrictRoute)

    @router.get("/v1/later")
    async def later() -> dict[str, str]:
        return {"model": service.settings.model}

    return router


def full_app(**rest: Any) -> FastAPI:
    """Return an application with every kind of route."""
    return make_app(routers=[later_router], admin_routers=[admin_router], **rest)


def paths(app: FastAPI) -> list[tuple[str, str]]:
    """Return method and path of every route, with something for what is variable."""
    found = [
        (method, re.sub(r"\{.*?\}", "tiny", path))
        for path, operations in app.openapi()["paths"].items()
        for method in operations
    ]
    return [(method.upper(), path) for method, path in found] + [("GET", "/openapi.json")]


def raw(app: FastAPI, method: str, path: str, key: str | None = None, **scope: Any) -> int:
    """Return the status of a request whose path is not tidied by a client."""
    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    if key is not None:
        headers.append((b"authorization", f"Bearer {key}".encode()))
    caller = Caller(app, {}, path, method=method, **({"headers": headers} | scope))
    run(caller())
    return caller.status


def test_the_walk_sees_every_route() -> None:
    app = full_app()
    walked = {path for _, path in paths(app)}
    assert {"/v1/chat/completions", "/v1/later", "/admin/pause", "/metrics"} <= walked
    assert len(walked) >= 13
    # routes that are hidden from the document are not hidden from the guard, but name them here
    hidden = {r.path for r in app.routes if isinstance(r, APIRoute) and not r.include_in_schema}
    assert not hidden


@pytest.mark.parametrize(
    "twist",
    [
        lambda path: path,
        lambda path: f"/{path}",
        lambda path: f"{path}/",
        lambda path: path.upper(),
        lambda path: path.replace("/", "//"),
        lambda path: f"/health/..{path}",
        lambda path: f"/health{path}",
        lambda path: f"{path};/health",
        lambda path: f"{path}?/health",
        lambda path: path.replace("/v1", "/%76%31"),
        lambda path: f"{path}\n",
        lambda path: f"/./{path[1:]}",
    ],
    ids=lambda twist: twist("/v1"),
)
def test_attack_19_every_route_needs_a_key(twist: Any) -> None:
    app = full_app()
    for method, path in paths(app):
        for tried in {method, "HEAD", "OPTIONS", "PUT"}:
            twisted = twist(path)
            if twisted in PUBLIC:
                continue
            for key in (None, KEY + "x"):
                assert raw(app, tried, twisted, key) == 401, (tried, twisted, key)


@pytest.mark.parametrize("root_path", ["/proxy", "/v1", "/health", "/"])
def test_attack_19_a_root_path_opens_nothing(root_path: str) -> None:
    app = full_app()
    for method, path in paths(app):
        for tried in (path, root_path + path, f"/health{path}"):
            status = raw(app, method, tried, root_path=root_path)
            assert status == 401 or path in PUBLIC, (method, tried)
    assert raw(app, "GET", "/proxy/health", root_path="/proxy") == 200
    assert raw(app, "GET", "/proxy/v1/models", KEY, root_path="/proxy") == 200


def test_attack_19_websockets_are_refused() -> None:
    async def work() -> list[Any]:
        caller = Caller(full_app(), {}, "/v1/chat/completions", type="websocket")
        await caller()
        return caller.sent

    [message] = run(work())
    assert message["type"] == "websocket.close"


def test_a_key_is_read_as_bearer_only() -> None:
    app = full_app()
    wrong = ("", " ", "wrong", KEY.upper(), hash_key(KEY), f"{KEY} x")
    values = [*(f"Bearer {key}" for key in wrong), KEY, f"Basic {KEY}", f"Token {KEY}", "Bearer"]
    for value in values:
        response = call(app, "GET", "/v1/models", headers={"Authorization": value})
        error = error_of(response, 401)
        assert error["code"] == "invalid_api_key" and KEY not in response.text
        assert response.headers["www-authenticate"] == "Bearer"
    for value in (f"Bearer {KEY}", f"bearer {KEY}", f"BEARER  {KEY}"):
        assert call(app, "GET", "/v1/models", headers={"Authorization": value}).status_code == 200
    assert call(app, "GET", f"/v1/models?api_key={KEY}", headers={}).status_code == 401


def test_attack_19_keys_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    store = MemoryKeyStore({hash_key(f"key {n}"): Tenant(id=str(n)) for n in range(5)})
    compared: list[bytes] = []
    compare = auth.hmac.compare_digest

    def count(kept: bytes, given: bytes) -> bool:
        compared.append(given)
        return compare(kept, given)

    monkeypatch.setattr(auth.hmac, "compare_digest", count)
    for key in ("key 0", "key 4", "none", None):
        compared.clear()
        found = store.find(key)
        assert (found.id if found else None) == (key[-1] if key in ("key 0", "key 4") else None)
        assert len(compared) == 5 and len(set(compared)) == 1


def test_an_empty_key_is_none_even_if_its_hash_is_kept() -> None:
    assert MemoryKeyStore({hash_key(""): Tenant(id="x")}).find("") is None
    assert MemoryKeyStore({}).find(None) is None


def test_fresh_keys_are_long_and_differ() -> None:
    keys = {new_key() for _ in range(100)}
    assert len(keys) == 100 and min(map(len, keys)) >= 45


def test_public_paths_can_be_switched() -> None:
    closed = make_app(public_paths=frozenset())
    opened = make_app(public_paths=frozenset({"/metrics"}))
    for path in ("/health", "/ready", "/metrics"):
        assert call(closed, "GET", path, headers={}).status_code == 401
    assert call(opened, "GET", "/metrics", headers={}).status_code == 200
    assert call(opened, "GET", "/health", headers={}).status_code == 401
    with pytest.raises(ConfigError, match="public_paths of ApiSettings must be some of"):
        ApiSettings(model="x", public_paths=frozenset({"/v1/models"}))


def test_attack_20_admin_routes_need_the_admin_key() -> None:
    app = full_app()
    for twisted in ("/admin/pause", "/admin", "/admin/", "/admin/nothing"):
        assert raw(app, "POST", twisted) == 401
        assert raw(app, "POST", twisted, KEY) == 403
    for twisted in ("//admin/pause", "/Admin/pause", "/admin//pause", "/v1/../admin/pause"):
        assert raw(app, "POST", twisted, KEY) in (403, 404)
    assert raw(app, "POST", "/p/admin/pause", KEY, root_path="/p") == 403
    assert raw(app, "POST", "/admin/pause", ADMIN_KEY) == 200
    assert raw(app, "POST", "/p/admin/pause", ADMIN_KEY, root_path="/p") == 200


def test_attack_20_without_an_admin_key_there_are_no_admin_routes() -> None:
    app = full_app(admin=False)
    assert raw(app, "POST", "/admin/pause", KEY) == 404
    assert raw(app, "POST", "/admin/pause", ADMIN_KEY) == 401
    assert "/admin/pause" not in app.openapi()["paths"]


def test_attack_21_no_origin_is_allowed_and_hosts_are_known() -> None:
    app = make_app()
    origin = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    for method in ("OPTIONS", "GET"):
        response = call(app, method, "/v1/models", headers=HEADERS | origin)
        assert not [name for name in response.headers if name.startswith("access-control")]
    for host in (
        "evil.example",
        "localhost.evil.example",
        "127.0.0.1.evil.example:80",
        "",
        "[::2]",
    ):
        response = call(app, "GET", "/health", headers=HEADERS | {"Host": host})
        assert error_of(response, 421)["code"] == "invalid_host"
    for host in ("localhost", "LOCALHOST:8000", "127.0.0.1:1", "[::1]:8000"):
        response = call(app, "GET", "/v1/models", headers=HEADERS | {"Host": host})
        assert response.status_code == 200, host
    named = make_app(hosts=("llm.example",))
    assert call(named, "GET", "/health", headers={"Host": "llm.example:443"}).status_code == 200
    assert call(named, "GET", "/health").status_code == 421
    anything = make_app(hosts=("*",))
    assert call(anything, "GET", "/health", headers={"Host": "x"}).status_code == 200


def test_without_keys_everybody_is_one_tenant() -> None:
    app = make_app(keys=OpenKeyStore(), admin_routers=[admin_router])
    assert call(app, "GET", "/v1/models", headers={}).status_code == 200
    assert call(app, "POST", "/admin/pause", headers={}, json={}).status_code == 404


def test_ids_are_made_by_the_server() -> None:
    app = make_app()
    given = HEADERS | {"x-request-id": "mine"}
    first, second = (chat(app, messages=HELLO), call(app, "GET", "/v1/models", headers=given))
    ids = {first.headers["x-request-id"], second.headers["x-request-id"]}
    assert len(ids) == 2 and all(re.fullmatch("req-[0-9a-f]{32}", name) for name in ids)
