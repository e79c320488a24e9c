"""A classifier of texts goes through the same pipeline: on a grid, judged by its labels, loaded."""

from __future__ import annotations

import csv
import random
from pathlib import Path

import pytest
import torch

from deepseek import hub
from deepseek.compress import LabelGate, Pipeline, Quantize, SizeGate, TextGate, compress
from deepseek.data import read_labelled
from deepseek.errors import ConfigError
from deepseek.face import load, load_encoder_engine
from deepseek.models import Encoder
from deepseek.ops.cpu import why_missing
from deepseek.optim import AdamW
from deepseek.train import ClassifierSettings, fit_classifier
from tests.generate.encoders import begun_and_ended, tiny_encoder


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file of texts whose label is the letter that they hold."""
    path, draw = tmp_path_factory.mktemp("labels") / "letters.csv", random.Random(5)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for _ in range(200):
            letter = draw.choice("ab")
            writer.writerow([letter * draw.randint(3, 12), letter])
    return path


@pytest.fixture(scope="module")
def classifier(labelled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the bundle of an encoder that was trained on them."""
    torch.manual_seed(0)
    model = Encoder(tiny_encoder().config.replace(hidden_size=64, intermediate_size=96))
    model.tokenizer = begun_and_ended()
    quick = ClassifierSettings(epochs=6, batch=8, optimizer=AdamW(rate=3e-3), max_tokens=40)
    fit_classifier(model, read_labelled(labelled)[:64], quick)
    return hub.save(model.eval(), tmp_path_factory.mktemp("start") / "letters").path


def pipeline(start: Path, **settings: object) -> Pipeline:
    stage = Quantize(bits=8, group=None, method="round", calibration=_few(start))
    return Pipeline(model=str(start), stages=(stage,), **settings)  # type: ignore[arg-type]


def _few(start: Path) -> object:
    from deepseek.compress import Calibration

    return Calibration(samples=4, length=32)


def test_a_classifier_is_quantized_and_judged(
    classifier: Path, labelled: Path, tmp_path: Path
) -> None:
    gates = (LabelGate(data=str(labelled), most_loss=0.05), SizeGate(most_share=1.0))
    done = compress(pipeline(classifier, gates=gates), tmp_path / "run")
    assert not done.is_refused, [verdict.words for verdict in done.verdicts]
    texts = [each.text for each in read_labelled(labelled)]
    whole, small = load(classifier), load(done.bundle.path)
    assert isinstance(whole, Encoder) and isinstance(small, Encoder)
    expected = whole.classify(texts)
    assert sum(a == b for a, b in zip(expected, small.classify(texts), strict=True)) > 190
    if why_missing() is None:
        engine = load_encoder_engine(done.bundle.path)
        found = engine.classify(texts)
        assert sum(a == b for a, b in zip(expected, found, strict=True)) > 190


def test_damage_is_seen(classifier: Path, labelled: Path, tmp_path: Path) -> None:
    model = hub.load(classifier)
    assert isinstance(model, Encoder) and model.classifier is not None
    with torch.no_grad():
        model.classifier.weight.neg_()
        model.classifier.bias.neg_()
    broken = hub.save(model, tmp_path / "broken").path
    from deepseek.compress.gates import Contest, judge

    gate = LabelGate(data=str(labelled))
    whole = hub.load(classifier)
    verdict = judge(gate, Contest(hub.load(broken), whole, whole, 1, 1), lambda words, share: None)
    assert not verdict.holds


def test_gates_of_a_decoder_are_told(classifier: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="of a decoder"):
        compress(pipeline(classifier, gates=(TextGate(),)), tmp_path / "run")
