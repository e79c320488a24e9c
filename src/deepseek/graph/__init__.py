"""Programs: a model as a flat list of instructions over a static memory plan. Loads no torch."""

from deepseek.graph.program import Instruction, Program, ProgramShape, plan_memory

__all__ = ["Instruction", "Program", "ProgramShape", "plan_memory"]
