"""Training of a classifier of texts."""

from __future__ import annotations

import os
import random
import signal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deepseek.data import LabelledText
from deepseek.errors import ConfigError
from deepseek.models import Encoder
from deepseek.optim import AdamW
from deepseek.train import ClassifierSettings, Interrupted, fit_classifier
from deepseek.train.classifier import ClassifierProgress, batches
from tests.generate.encoders import begun_and_ended, tiny_encoder

QUICK = ClassifierSettings(epochs=6, batch=8, optimizer=AdamW(rate=3e-3), max_tokens=40)


def encoder() -> Encoder:
    """A fresh one, with the small weights that training starts from."""
    torch.manual_seed(0)
    model = Encoder(tiny_encoder().config)
    model.tokenizer = begun_and_ended()
    return model


def texts(count: int = 64) -> list[LabelledText]:
    """Which of two letters a text holds."""
    draw = random.Random(5)
    letters = [draw.choice("ab") for _ in range(count)]
    return [LabelledText(letter * draw.randint(3, 12), letter) for letter in letters]


def test_it_learns_and_repeats() -> None:
    data, runs = texts(), []
    for _ in range(2):
        model = encoder()
        seen: list[ClassifierProgress] = []
        losses = fit_classifier(model, data, QUICK, on_step=seen.append)
        assert [each.loss for each in seen] == losses
        assert (seen[-1].step, seen[-1].num_steps) == (48, 48) == (len(losses), len(losses))
        runs.append(losses)
    assert model.config.labels == ("a", "b")
    assert sum(runs[0][-8:]) < 0.5 * sum(runs[0][:8])
    found = model.classify([each.text for each in data])
    assert sum(a == b.label for a, b in zip(found, data, strict=True)) > 60
    assert runs[0] == runs[1]


def test_a_classifier_that_fits_goes_on() -> None:
    model = encoder()
    model.use_labels(["b", "a", "c"])
    before = model.classifier
    fit_classifier(model, texts(8), QUICK.replace(epochs=1))
    assert model.classifier is before and model.config.labels == ("b", "a", "c")


def test_ctrl_c_ends_it_behind_a_step() -> None:
    model, seen = encoder(), []

    def on_step(progress: ClassifierProgress) -> None:
        seen.append(progress)
        if progress.step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    model.eval()
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match="behind step 3 of 48"):
        fit_classifier(model, texts(), QUICK, on_step=on_step)
    assert len(seen) == 3 and not model.training
    assert signal.getsignal(signal.SIGINT) is before


def test_bad_uses_are_refused() -> None:
    with pytest.raises(ConfigError, match="texts of fit_classifier"):
        fit_classifier(encoder(), [])
    with pytest.raises(ConfigError, match="model of fit_classifier"):
        fit_classifier(encoder().bfloat16(), texts(4))
    model = encoder()
    model.tokenizer = None
    with pytest.raises(ConfigError, match="no tokenizer"):
        fit_classifier(model, texts(4))
    broken = encoder()
    with torch.no_grad():
        broken.embeddings.LayerNorm.weight.fill_(float("nan"))
    with pytest.raises(ConfigError, match="loss of fit_classifier must be finite"):
        fit_classifier(broken, texts(4), QUICK)
    for wrong in ({"epochs": 0}, {"batch": 0}, {"warmup_share": 1.0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            ClassifierSettings(**wrong)


@given(st.lists(st.integers(1, 50), max_size=300), st.integers(1, 9), st.integers(0, 3))
def test_every_text_is_in_one_batch(lengths: list[int], size: int, epoch: int) -> None:
    settings = ClassifierSettings(batch=size)
    found = batches(lengths, settings, epoch)
    assert sorted(place for each in found for place in each) == list(range(len(lengths)))
    assert len(found) == -(-len(lengths) // size)
    assert found == batches(lengths, settings, epoch)
