"""Contract checks that we ship: with them a stranger's backend proves itself, in its own tests."""

from deepseek.testing.backend import check_backend
from deepseek.testing.proof import Proof

__all__ = ["Proof", "check_backend"]
