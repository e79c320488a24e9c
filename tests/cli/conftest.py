"""A tiny bundle with a byte tokenizer and a chat template, and a way to run the command line."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from deepseek import hub
from deepseek.cli.main import main
from deepseek.data import Tokenizer
from deepseek.models import Decoder
from tests.generate.conftest import TINY, byte_tokenizer

TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def object(self) -> dict:
        """The one JSON object on standard output."""
        return json.loads(self.out)


Run = Callable[..., Ended]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Return a function that runs a command line in this process."""

    def command(*words: str) -> Ended:
        capsys.readouterr()
        code = main(words)
        captured = capsys.readouterr()
        return Ended(code, captured.out, captured.err)

    return command


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the folder of a small random decoder with a byte tokenizer and a chat template."""
    torch.manual_seed(1)
    model = Decoder(TINY).eval()
    plain = byte_tokenizer(bos_token="<begin>", eos_token="<end>")
    folder = tmp_path_factory.mktemp("tiny")
    plain.save(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    model.tokenizer = Tokenizer.from_folder(folder)
    return str(hub.save(model, folder / "bundle", name="tiny", summary="for tests").path)


@pytest.fixture(scope="session")
def silent_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a small random decoder without a tokenizer."""
    return hub.save(Decoder(TINY), tmp_path_factory.mktemp("silent") / "bundle").path
