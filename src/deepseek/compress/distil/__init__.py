"""Learning from a larger model: students, what they imitate, and teachers that learn with them."""

from __future__ import annotations

from deepseek.compress.distil.imitation import Imitation, ImitationLoss
from deepseek.compress.distil.progressive import Progressive, progress
from deepseek.compress.distil.stage import Distil, distil
from deepseek.compress.distil.student import Student, make_student, student_of

__all__ = [
    "Distil",
    "Imitation",
    "ImitationLoss",
    "Progressive",
    "Student",
    "distil",
    "make_student",
    "progress",
    "student_of",
]
