"""Tiny teachers, students and texts for the stages that train."""

from __future__ import annotations

import itertools
from pathlib import Path

import torch
from tokenizers import processors

from deepseek import hub
from deepseek.compress import Work
from deepseek.data import Tokenizer
from deepseek.models import Decoder, DecoderConfig, Encoder, EncoderConfig
from tests.generate.conftest import TINY, byte_tokenizer

ENCODER = EncoderConfig(
    vocab_size=258,
    hidden_size=32,
    num_layers=4,
    num_heads=4,
    intermediate_size=48,
    max_positions=64,
    init_std=0.2,
    pad_token_id=0,
)


def decoder(seed: int, **changes: object) -> Decoder:
    """Return a random decoder with a byte tokenizer."""
    torch.manual_seed(seed)
    config: DecoderConfig = TINY.replace(**changes)
    model = Decoder(config)
    model.tokenizer = byte_tokenizer(bos_token="<begin>", eos_token="<end>")
    return model.eval()


def encoder(seed: int, **changes: object) -> Encoder:
    """Return a random encoder whose tokenizer puts a text between two marks."""
    torch.manual_seed(seed)
    model = Encoder(ENCODER.replace(**changes))
    model.tokenizer = marking_tokenizer()
    return model.eval()


def marking_tokenizer() -> Tokenizer:
    """Return a byte tokenizer that writes `<begin>` and `<end>` around a text."""
    tokenizer = byte_tokenizer(bos_token="<begin>", eos_token="<end>")
    marks = [("<begin>", 256), ("<end>", 257)]
    tokenizer.backend.post_processor = processors.TemplateProcessing(
        single="<begin> $A <end>", special_tokens=marks
    )
    return Tokenizer(tokenizer.backend, bos_token="<begin>", eos_token="<end>")


def write_sums(path: Path) -> Path:
    """Write a file of lines that can be learned, of different lengths."""
    sums = (f"{a} and {b} are {a + b}" for a, b in itertools.product(range(12), range(20)))
    path.write_text("\n".join(sums) + "\n", encoding="utf-8")
    return path


def work_of(
    model: Decoder | Encoder, teacher: Decoder | Encoder, folder: Path, name: str = "stage"
) -> Work:
    """Return what a stage takes: a model, and the teacher as the bundle that all began with."""
    start = folder / "teacher"
    if not start.is_dir():
        hub.save(teacher, start, name="teacher")
    return Work(model=model, start=start, folder=folder / name, seed=5)


class Killed(BaseException):
    """Stands for a process that is gone."""


def kill_after(work: Work, steps: int) -> Work:
    """Let the process of a stage die behind so many steps."""
    left = [steps]

    def goes_on() -> None:
        left[0] -= 1
        if left[0] == 0:
            raise Killed

    work.goes_on = goes_on
    return work
