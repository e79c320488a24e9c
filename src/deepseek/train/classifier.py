"""Training of a classifier of texts: a pretrained encoder, a head, and labelled texts."""

from __future__ import annotations

import dataclasses
import math
import random
import time
from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F

from deepseek.config import Config
from deepseek.data import LabelledText, label_names
from deepseek.errors import ConfigError, describe
from deepseek.models import Encoder
from deepseek.models.config import cut
from deepseek.optim import AdamW, Cosine, ScheduleConfig, build_optimizers
from deepseek.train.stopping import Interrupted, StopRequest

_SORTED_BATCHES = 16
"""Batches whose texts are sorted by length, so that those of a batch need little padding."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassifierSettings(Config):
    """How `fit_classifier` trains.

    Source: the rates, epochs and warmup of Devlin et al. (1810.04805), appendix A.3. Deviation: no
    dropout.
    """

    epochs: int = 3
    batch: int = 32
    """Texts of a step."""
    optimizer: AdamW = dataclasses.field(
        default_factory=lambda: AdamW(rate=5e-5, betas=(0.9, 0.999), weight_decay=0.01)
    )
    schedule: ScheduleConfig = dataclasses.field(default_factory=lambda: Cosine(floor=0.0))
    warmup_share: float = 0.1
    """Share of all steps in which the rate rises, before the schedule's own."""
    max_tokens: int = 128
    """Longer texts are cut."""
    clip_norm: float = 1.0
    """Largest norm of the gradient."""
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    """Of products; weights and sums stay as they are."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch", "max_tokens"):
            if getattr(self, name) < 1:
                value = getattr(self, name)
                raise ConfigError(describe(name, "ClassifierSettings", "at least 1", value))
        if not 0 <= self.warmup_share < 1:
            must = "from 0 to below 1"
            raise ConfigError(
                describe("warmup_share", "ClassifierSettings", must, self.warmup_share)
            )


@dataclasses.dataclass(frozen=True)
class ClassifierProgress:
    """Where a training stands behind a step."""

    step: int
    num_steps: int
    loss: float
    """Cross-entropy of the step's texts, in nats."""
    seconds: float
    """Since the training began."""


def fit_classifier(
    model: Encoder,
    texts: Sequence[LabelledText],
    settings: ClassifierSettings | None = None,
    *,
    on_step: Callable[[ClassifierProgress], None] | None = None,
) -> list[float]:
    """Train an encoder with a classifier on labelled texts, in place; return each step's loss.

    A model without labels, or with others than the texts have, gets a fresh classifier of the
    texts' labels in alphabetical order. The same settings, texts, threads and machine give the same
    weights. SIGINT and SIGTERM end it behind the step that runs.

    Args:
        model: with a tokenizer, float32.
        texts: at least one.
        settings: None for the defaults.
        on_step: called behind every step.

    Raises:
        ConfigError: no texts, no tokenizer, weights that are not float32, or a loss that is not
            finite.
        Interrupted: it was asked to stop; the model is as the last step left it.
    """
    settings = settings or ClassifierSettings()
    encoded, targets = _prepared(model, texts, settings)
    steps_per_epoch = math.ceil(len(texts) / settings.batch)
    num_steps = settings.epochs * steps_per_epoch
    (optimizer,) = build_optimizers(settings.optimizer, model.named_parameters())
    warmup = round(settings.warmup_share * num_steps)
    start_s, losses = time.monotonic(), []
    was_training, stop = model.training, StopRequest()
    model.train()
    try:
        with stop.listening():
            for epoch in range(settings.epochs):
                for chosen in batches([len(ids) for ids in encoded], settings, epoch):
                    step = len(losses)
                    rate = min(1.0, (step + 1) / (warmup + 1))
                    rate *= settings.schedule.factor(step, num_steps)
                    loss = _step(model, optimizer, encoded, targets, chosen, settings, rate)
                    losses.append(loss)
                    if on_step is not None:
                        seconds = time.monotonic() - start_s
                        on_step(ClassifierProgress(step + 1, num_steps, loss, seconds))
                    if stop.is_made:
                        raise Interrupted(f"stopped behind step {step + 1} of {num_steps}")
    finally:
        model.train(was_training)
    return losses


def _prepared(
    model: Encoder, texts: Sequence[LabelledText], settings: ClassifierSettings
) -> tuple[list[list[int]], torch.Tensor]:
    """Return the ids and classes of texts, for which the model has a classifier then."""
    if not texts:
        raise ConfigError(describe("texts", "fit_classifier", "at least one", "none"))
    if model.tokenizer is None or model.dtype != torch.float32:
        must = "a float32 encoder with a tokenizer"
        got = "no tokenizer" if model.tokenizer is None else str(model.dtype)
        raise ConfigError(describe("model", "fit_classifier", must, got))
    labels = label_names(texts)
    if not set(labels) <= set(model.config.labels):
        torch.manual_seed(settings.seed)
        model.use_labels(labels)
    numbers = {label: number for number, label in enumerate(model.config.labels)}
    limit = min(settings.max_tokens, model.config.max_positions)
    encoded = model.tokenizer.encode_batch([each.text for each in texts])
    targets = torch.tensor([numbers[each.label] for each in texts], device=model.device)
    return [cut(ids, limit) for ids in encoded], targets


def batches(lengths: Sequence[int], settings: ClassifierSettings, epoch: int) -> list[list[int]]:
    """Return the texts of each step of an epoch, by number: every text once, in a random order
    where those of like length are near one another.

    Args:
        lengths: of the texts, in tokens.
        settings: its batch and seed.
        epoch: counted from 0; each has an order of its own.
    """
    generator = random.Random(f"{settings.seed} {epoch}")
    order = list(range(len(lengths)))
    generator.shuffle(order)
    together = settings.batch * _SORTED_BATCHES
    found: list[list[int]] = []
    for start in range(0, len(order), together):
        part = sorted(order[start : start + together], key=lambda place: lengths[place])
        found += [part[i : i + settings.batch] for i in range(0, len(part), settings.batch)]
    generator.shuffle(found)
    return found


def _step(
    model: Encoder,
    optimizer: torch.optim.Optimizer,
    encoded: Sequence[Sequence[int]],
    targets: torch.Tensor,
    chosen: Sequence[int],
    settings: ClassifierSettings,
    rate: float,
) -> float:
    for group in optimizer.param_groups:
        group["lr"] = settings.optimizer.rate * rate
    input_ids, mask = model.padded([encoded[place] for place in chosen])
    is_narrow = settings.precision == "bfloat16"
    with torch.autocast(model.device.type, torch.bfloat16, enabled=is_narrow):
        logits = model(input_ids, mask).logits
    loss = F.cross_entropy(logits.float(), targets[list(chosen)])
    value = float(loss.detach())
    if not math.isfinite(value):
        raise ConfigError(describe("loss", "fit_classifier", "finite", value, "Lower the rate"))
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return value
