"""What is known of a request beside its body: its id, its tenant, its path."""

from __future__ import annotations

from starlette.types import Scope

from deepseek.serve.api.tenants import Tenant

_ID = "deepseek.request_id"
_TENANT = "deepseek.tenant"


def set_request_id(scope: Scope, request_id: str) -> None:
    """Note the id that the server gave to a request."""
    scope[_ID] = request_id


def request_id_of(scope: Scope) -> str:
    """Return the id that the server gave to a request."""
    return scope[_ID]


def set_tenant(scope: Scope, tenant: Tenant) -> None:
    """Note who asks."""
    scope[_TENANT] = tenant


def tenant_of(scope: Scope) -> Tenant:
    """Return who asks; only behind a route that is not public."""
    return scope[_TENANT]


def find_tenant(scope: Scope) -> Tenant | None:
    """Return who asks, or None on a public route."""
    return scope.get(_TENANT)


def header(scope: Scope, name: str) -> str:
    """Return the first value of a header, or an empty text.

    Args:
        scope: of the request.
        name: in lower case.
    """
    wanted = name.encode()
    return next((v.decode("latin-1") for key, v in scope["headers"] if key == wanted), "")


def route_path(scope: Scope) -> str:
    """Return the path as the router sees it: without the `root_path` that a proxy put before it."""
    path, root = scope["path"], scope.get("root_path", "")
    if root and (path == root or path.startswith(f"{root}/")):
        return path[len(root) :]
    return path
