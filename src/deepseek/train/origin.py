"""What a run starts from: its model, and its teacher; and the average with it."""

from __future__ import annotations

import torch

from deepseek import hub
from deepseek.errors import ConfigError, describe
from deepseek.models import Decoder, add_gates
from deepseek.models.depth import keep_layers
from deepseek.models.presets import preset
from deepseek.ops.hardware import products_in
from deepseek.train.config import Run
from deepseek.train.places import Places


def open_model(run: Run) -> Decoder:
    """Return the decoder that a run starts from, in float32.

    Raises:
        ConfigError: it is not there, or is no decoder.
        FormatError: it is damaged.
    """
    model = _without_gates(run)
    return model if run.gates is None else add_gates(model, run.gates)


def _without_gates(run: Run) -> Decoder:
    if run.model is not None:
        model = hub.load(run.model, dtype="float32")
        if not isinstance(model, Decoder):
            raise ConfigError(describe("model", "the run", "a decoder", run.model))
        return model if run.layers is None else keep_layers(model, run.layers)
    assert run.preset is not None and run.tokenizer is not None
    other = hub.load(run.tokenizer)
    if other.tokenizer is None:
        raise ConfigError(describe("tokenizer", "the run", "a bundle that has one", run.tokenizer))
    config = preset(run.preset).sized(run.size).replace(vocab_size=other.config.vocab_size)
    torch.manual_seed(run.seed)
    model = Decoder(config)
    model.tokenizer = other.tokenizer
    return model


def open_teacher(run: Run) -> Decoder | None:
    """Return the decoder that the run's sources learn from, or None where none does. It is in the
    dtype of the run's products, and is not trained.

    Raises:
        ConfigError: it is not there, or is no decoder.
        FormatError: it is damaged.
    """
    if not run.needs_teacher:
        return None
    name = run.teacher or run.model
    assert name is not None
    is_exact = torch.float32 in {products_in(stage.precision) for stage in run.stages}
    teacher = hub.load(name, dtype=torch.float32 if is_exact else torch.bfloat16)
    if not isinstance(teacher, Decoder):
        raise ConfigError(describe("teacher", "the run", "a decoder", name))
    return teacher.requires_grad_(False).eval()


def open_start(run: Run, number: int, places: Places) -> Decoder:
    """Return the decoder that a stage of a run began with, in float32.

    Args:
        run: that is done up to this stage.
        number: of the stage, from 0.
        places: the run's folder.
    """
    if number == 0:
        return open_model(run)
    model = hub.load(places.stage(run.stages[number - 1].name), dtype="float32")
    assert isinstance(model, Decoder)
    return model


@torch.no_grad()
def average_with(model: Decoder, other: Decoder, share: float) -> None:
    """Move the weights of a model in place by a share of the way to those of another.

    Source: Wortsman et al., "Robust fine-tuning of zero-shot models" (2109.01903), section 3, with
    alpha = 1 - share.
    """
    others = dict(other.named_parameters())
    for name, value in model.named_parameters():
        value.lerp_(others[name], share)
