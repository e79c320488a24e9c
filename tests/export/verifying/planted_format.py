"""A format for tests, as a stranger's package would add one: its file names a bundle, and how the
reader misbehaves."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import numpy as np

from deepseek import hub
from deepseek.errors import FormatError
from deepseek.export.formats import Floats, Format, Ids
from deepseek.export.verifying.source import ModelReader

FORMAT = Format(
    "planted",
    "for tests",
    writer="tests.export.verifying.planted_format:write",
    reader="tests.export.verifying.planted_format:read",
    suffix=".planted",
)
REPO = Path(__file__).resolve().parents[3]


def install(folder: Path) -> str:
    """Make the format known to processes with this folder on their path; return that path."""
    package = folder / "planted-1.dist-info"
    package.mkdir(parents=True)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: planted\nVersion: 1\n")
    points = "[deepseek.formats]\nplanted = tests.export.verifying.planted_format:FORMAT\n"
    (package / "entry_points.txt").write_text(points)
    return os.pathsep.join([str(folder), str(REPO)])


def write(folder: Path, bundle: Path, bug: str = "none", width: int = 17) -> Path:
    """Write an export of a bundle, whose reader misbehaves on batches of a width."""
    folder.mkdir(exist_ok=True)
    content = {"bundle": str(bundle), "bug": bug, "width": width}
    (folder / "model.planted").write_text(json.dumps(content))
    return folder


def read(folder: Path, threads: int | None = None) -> ModelReader:
    """Return the reader of an export, which misbehaves as its file says."""
    try:
        content = json.loads((folder / "model.planted").read_text())
    except ValueError as error:
        raise FormatError("file of planted must be whole; got less.") from error
    if content["bug"] == "dies while opening":
        os.kill(os.getpid(), signal.SIGSEGV)
    return _Reader(hub.load(content["bundle"], dtype="float32"), content["bug"], content["width"])


class _Reader(ModelReader):
    def __init__(self, model: object, bug: str, width: int) -> None:
        super().__init__(model)  # type: ignore[arg-type]
        self.bug, self.width = bug, width

    def forward(self, ids: Ids, mask: Ids) -> Floats:
        """Answer, or misbehave on batches of one width."""
        if ids.shape[1] == self.width and self.bug != "none":
            print("noise on standard output")
            if self.bug == "dies":
                os.kill(os.getpid(), signal.SIGSEGV)
            if self.bug == "hangs":
                time.sleep(60)
            if self.bug == "raises":
                raise RuntimeError("[ONNXRuntimeError] : 2 : INVALID_ARGUMENT : shape {1,17}")
        if self.bug == "always dies":
            os.kill(os.getpid(), signal.SIGABRT)
        if self.bug == "off by a little":
            return super().forward(ids, mask) * np.float32(1.02)
        return super().forward(ids, mask)
