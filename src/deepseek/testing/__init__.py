"""Contract checks that we ship: with them a stranger's backend, execution of attention, planner
or exporter proves itself, in its own tests."""

from deepseek.testing.backend import check_backend
from deepseek.testing.executions import AttentionProof, check_attention
from deepseek.testing.exporter import ExporterProof, check_exporter
from deepseek.testing.planners import PlannerProof, check_planner
from deepseek.testing.proof import Proof

__all__ = [
    "AttentionProof",
    "ExporterProof",
    "PlannerProof",
    "Proof",
    "check_attention",
    "check_backend",
    "check_exporter",
    "check_planner",
]
