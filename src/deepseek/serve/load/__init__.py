"""The load generator: users of any OpenAI-compatible server, and what they see. Nothing of ours is
needed on the other side."""

from __future__ import annotations

from deepseek.serve.load.arrivals import Load, arrival_times
from deepseek.serve.load.client import Client, Target
from deepseek.serve.load.lengths import Lengths
from deepseek.serve.load.objectives import OBJECTIVES, meets, read_objectives
from deepseek.serve.load.outcome import Outcome
from deepseek.serve.load.plot import draw_load
from deepseek.serve.load.run import Run, run_load
from deepseek.serve.load.server_process import ServerProcess
from deepseek.serve.load.summary import Cost, error_examples, summarize_run, worst_cases
from deepseek.serve.load.sweep import rates_between
from deepseek.serve.load.workload import KINDS, Dialogue, Turn, Workload, plan_dialogues

__all__ = [
    "KINDS",
    "OBJECTIVES",
    "Client",
    "Cost",
    "Dialogue",
    "Lengths",
    "Load",
    "Outcome",
    "Run",
    "ServerProcess",
    "Target",
    "Turn",
    "Workload",
    "arrival_times",
    "draw_load",
    "error_examples",
    "meets",
    "plan_dialogues",
    "rates_between",
    "read_objectives",
    "run_load",
    "summarize_run",
    "worst_cases",
]
