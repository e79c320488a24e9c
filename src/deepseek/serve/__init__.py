"""The server: many users of one model on one small machine, and whether its answers are good."""

from deepseek.serve.local import LocalServer, local_server

__all__ = ["LocalServer", "local_server"]
