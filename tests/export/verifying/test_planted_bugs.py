"""Every planted bug is caught, shown by a small case and found where it is."""

from __future__ import annotations

import functools

import pytest

from benchmarks.planted_bugs import Bug, of_encoder_bugs, usual_bugs
from deepseek.export import verify
from deepseek.export.verifying.source import ModelReader
from deepseek.models import Decoder
from tests.export.verifying.small import small_decoder, small_encoder

BEYOND = 64
CASES = 200


@functools.cache
def decoder(kind: str) -> Decoder:
    """Return a source: its head is its embedding, or it has biases and a head of its own."""
    if kind == "tied":
        return small_decoder()
    return small_decoder(attention_bias=True, tie_word_embeddings=False)


def bugs() -> list[tuple[str, Bug]]:
    """Return every bug of a tied model, and those of the other that it lacks."""
    tied = [("tied", bug) for bug in usual_bugs(decoder("tied"), BEYOND)]
    names = {bug.name for _, bug in tied}
    others = usual_bugs(decoder("biased"), BEYOND)
    return tied + [("biased", bug) for bug in others if bug.name not in names]


def test_a_copy_holds() -> None:
    for kind in ("tied", "biased"):
        found = verify(decoder(kind), ModelReader(small_copy(kind)), cases=CASES)
        assert found.holds
        assert found.positions.difference.max() < 1e-4


def small_copy(kind: str) -> Decoder:
    """Return a model of the same weights, in float64: another rounding, no bug."""
    import copy

    return copy.deepcopy(decoder(kind)).double()


@pytest.mark.parametrize(("kind", "bug"), [pytest.param(*each, id=each[1].name) for each in bugs()])
def test_a_planted_bug_is_caught(kind: str, bug: Bug) -> None:
    model = decoder(kind)
    found = verify(model, bug.plant(model), cases=CASES)
    assert not found.holds
    assert found.departed
    kinds = {outcome.case.kind for outcome in found.departed}
    assert kinds & bug.kinds or not bug.kinds
    if bug.beyond:
        assert all(outcome.case.width > bug.beyond for outcome in found.departed)
    smallest = found.smallest[0]
    assert smallest.smallest.num_tokens <= max(12, bug.beyond + 6, 17)
    last = model.config.num_layers - 1
    layer = bug.layer if bug.layer is None or bug.layer >= 0 else last + 1 + bug.layer
    assert smallest.location.layer == layer
    assert smallest.location.differences


@pytest.mark.parametrize("labels", [(), ("yes", "no", "perhaps")], ids=["encoder", "classifier"])
def test_bugs_of_encoders(labels: tuple[str, ...]) -> None:
    model = small_encoder(labels=labels)
    assert verify(model, ModelReader(model), cases=100).holds
    for bug in of_encoder_bugs(model):
        found = verify(model, bug.plant(model), cases=100)
        assert found.departed, bug.name
        assert {outcome.case.kind for outcome in found.departed} & bug.kinds or not bug.kinds
