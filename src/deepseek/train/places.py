"""What stands where in the folder of a run."""

from __future__ import annotations

import dataclasses
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Places:
    """The folder of a run."""

    folder: Path

    @property
    def run(self) -> Path:
        """Its settings."""
        return self.folder / "run.json"

    @property
    def data(self) -> Path:
        """Corpora made from texts."""
        return self.folder / "data"

    @property
    def data_card(self) -> Path:
        """Which data each stage began with."""
        return self.folder / "data.json"

    @property
    def checkpoints(self) -> Path:
        """States to go on from."""
        return self.folder / "checkpoints"

    @property
    def ledger(self) -> Path:
        """What each worker read."""
        return self.folder / "ledger"

    @property
    def metrics(self) -> Path:
        """One line a step."""
        return self.folder / "metrics.jsonl"

    def stage(self, name: str) -> Path:
        """Return the bundle of a stage that is done."""
        return self.folder / "stages" / name

    def adapter(self, name: str) -> Path:
        """Return the adapters of a stage that trained some, as PEFT reads them."""
        return self.folder / "adapters" / name
