"""The plan of the house: which room stands on which floor. Tests enforce it; docs show it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

PACKAGE = "deepseek"
REPO = Path(__file__).resolve().parent.parent
SOURCE = REPO / "src" / PACKAGE

GROUND = 0
"""The ground floor is one room: its modules may import each other."""


@dataclasses.dataclass(frozen=True)
class Room:
    """A direct child of the package: a folder or a module."""

    floor: int
    holds: str


FLOORS: dict[str, Room] = {
    "config": Room(0, "the base of every configuration: frozen, versioned data"),
    "config_files": Room(0, "configurations from YAML, or from a function in a Python file"),
    "errors": Room(0, "every exception, and the one form of a user error"),
    "records": Room(0, "the nouns that rooms exchange: measurement, card, lineage"),
    "registry": Room(0, "names of things to the places they are found at"),
    "data": Room(1, "tokenizers, sources, packing, prompt templates"),
    "ops": Room(1, "mathematics with a meaning and several executions"),
    "optim": Room(1, "optimizers, learning-rate schedules, loss scaling"),
    "parallel": Room(1, "mesh, plan arithmetic, split tables, collectives"),
    "graph": Room(2, "capture, fusion, memory plan, ahead-of-time build"),
    "models": Room(2, "one-device modules, families and presets as data"),
    "generate": Room(3, "the token loop of one process: sampling, stopping, streaming"),
    "hub": Room(3, "load and save: bundles, safetensors, GGUF, sources"),
    "engines": Room(4, "models at rest made ready to run without torch, and held for all who ask"),
    "evaluate": Room(4, "perplexity, tasks, retrieval, divergence, speed and memory"),
    "train": Room(5, "the loop, stages, checkpoints, low-rank and continued training"),
    "tune": Room(6, "search, shared-weight architecture search, learning curves"),
    "compress": Room(7, "quantize, prune, distil, and the gates between them"),
    "export": Room(7, "other runtimes' formats, and the proof that they compute the same"),
    "advise": Room(8, "which model on which hardware, at what cost"),
    "monitor": Room(8, "drift, quality gate, review, retraining trigger"),
    "scheduler": Room(8, "machines: placement, autoscaling, drivers"),
    "serve": Room(8, "engine, API, limits, metrics"),
    "autoclasses": Room(9, "registration with the Auto classes of transformers, on demand"),
    "face": Room(9, "what the root's names stand for"),
    "cli": Room(10, "the command line"),
    "recipes": Room(10, "industry applications, small programs on the rooms below"),
    "testing": Room(10, "contract checks for a stranger's backend, planner or exporter"),
    "__main__": Room(11, "`python -m deepseek`, which is the command line"),
}

ROOT_MAY_IMPORT = frozenset({"autoclasses", "face"})
"""What `deepseek/__init__.py` may point at, besides the ground floor."""


def rooms_present(source: Path = SOURCE) -> set[str]:
    """Return the rooms that have at least one module, listed in the table or not."""
    found = {path.stem for path in source.glob("*.py")} - {"__init__"}
    for folder in source.iterdir():
        if folder.is_dir() and any(folder.rglob("*.py")):
            found.add(folder.name)
    return found


def floors_table(source: Path = SOURCE) -> str:
    """Return the Markdown table of floors, highest first; a room without code yet is said so."""
    present = rooms_present(source)
    lines = ["| floor | room | what lives there |", "| --- | --- | --- |"]
    for name, room in sorted(FLOORS.items(), key=lambda item: (-item[1].floor, item[0])):
        later = "" if name in present else " *(not built yet)*"
        lines.append(f"| {room.floor} | `{name}` | {room.holds}{later} |")
    return "\n".join(lines)
