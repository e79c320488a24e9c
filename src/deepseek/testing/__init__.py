"""Contract checks that we ship: with them a stranger's backend, execution of attention or planner
proves itself, in its own tests."""

from deepseek.testing.backend import check_backend
from deepseek.testing.executions import AttentionProof, check_attention
from deepseek.testing.planners import PlannerProof, check_planner
from deepseek.testing.proof import Proof

__all__ = [
    "AttentionProof",
    "PlannerProof",
    "Proof",
    "check_attention",
    "check_backend",
    "check_planner",
]
