"""What the HTTP face of the server allows, as data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from deepseek.errors import ConfigError, describe
from deepseek.serve.api.tenants import Tenant

SWITCHABLE = frozenset({"/health", "/ready", "/metrics"})
"""The only paths that may be opened to callers without a key."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ApiSettings:
    """Limits and keys of the HTTP face. What a request may ask at most is in the schemas."""

    model: str
    """The name under which the model is served."""
    keys: Mapping[str, Tenant] = dataclasses.field(default_factory=dict[str, Tenant])
    """Who may call: hash of a key (`auth.hash_key`) -> tenant."""
    public_paths: frozenset[str] = frozenset({"/health", "/ready"})
    """Paths that need no key: some of `/health`, `/ready` and `/metrics`."""
    hosts: tuple[str, ...] = ("localhost", "127.0.0.1", "::1")
    """Values of the `Host` header that are answered, without port; `*` answers any. Against web
    pages that reach a loopback server through a name of their own."""
    default_max_tokens: int = 2048
    """Longest answer where a request does not say, in tokens; less where the context is full."""
    max_request_tokens: int = 1_000_000
    """Most tokens that one request may cost: for each answer its prompt and `max_tokens`."""
    max_body_bytes: int = 4 * 2**20
    uploads: Mapping[str, int] = dataclasses.field(default_factory=dict[str, int])
    """Paths whose bodies may be longer, and the bytes they may have."""
    body_timeout_s: float = 30.0
    """Seconds in which a request's body must have come."""
    max_header_bytes: int = 16 * 2**10
    max_headers: int = 64
    header_timeout_s: float = 10.0
    """Seconds in which a request's headers must have come."""
    keep_alive_s: float = 15.0
    """A stream that is silent for so long gets a comment, so that proxies keep it open; so long,
    too, a stream's first output is awaited before the answer's status is sent."""
    send_timeout_s: float = 30.0
    """A client that does not take one event of its stream in this time is dropped."""
    events_have_text: bool = False
    """Whether the events of answers carry prompt and answer as text."""

    def __post_init__(self) -> None:
        """Refuse values that cannot be used.

        Raises:
            ConfigError: naming the field.
        """
        if not self.model:
            raise ConfigError(describe("model", "ApiSettings", "a name", self.model))
        if not self.public_paths <= SWITCHABLE:
            must, got = f"some of {', '.join(sorted(SWITCHABLE))}", sorted(self.public_paths)
            raise ConfigError(describe("public_paths", "ApiSettings", must, got))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int | float) and field.name != "events_have_text" and value <= 0:
                raise ConfigError(describe(field.name, "ApiSettings", "above 0", value))
