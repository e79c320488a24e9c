"""The HTTP face of the server: OpenAI's routes on any `Generator`."""

from deepseek.serve.api.app import RouterMaker, create_app
from deepseek.serve.api.auth import KeyStore, MemoryKeyStore, OpenKeyStore, hash_key, new_key
from deepseek.serve.api.metrics import Metrics
from deepseek.serve.api.server import make_server
from deepseek.serve.api.service import Service
from deepseek.serve.api.settings import ApiSettings
from deepseek.serve.api.tenants import Tenant, TenantLimits

__all__ = [
    "ApiSettings",
    "KeyStore",
    "MemoryKeyStore",
    "Metrics",
    "OpenKeyStore",
    "RouterMaker",
    "Service",
    "Tenant",
    "TenantLimits",
    "create_app",
    "hash_key",
    "make_server",
    "new_key",
]
