"""The distance from a teacher against plain references: values and gradients."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from deepseek.compress.distil import Imitation, ImitationLoss
from deepseek.compress.distil.hidden import even_pairs, hidden_error
from deepseek.compress.distil.relations import projections, relation_divergence, watched
from deepseek.errors import ConfigError
from deepseek.models import Decoder, DecoderConfig, Encoder
from deepseek.train import Part
from tests.compress.learners import decoder, encoder
from tests.tolerances import assert_close


def part_of(tokens: Tensor, counted: Tensor) -> Part:
    return Part(tokens, counted, torch.ones(len(tokens), dtype=torch.bool), 0)


def reference_relation(x: Tensor, heads: int, row: int, place: int, seen: list[int]) -> Tensor:
    """Return the chances of one token's relations [heads, seen], one product at a time."""
    parts = x[row].view(x.shape[1], heads, -1)
    scores = torch.stack(
        [(parts[place] * parts[other]).sum(-1) / math.sqrt(parts.shape[-1]) for other in seen]
    )
    return scores.softmax(0).T


@pytest.mark.parametrize("is_causal", [True, False])
def test_relations_are_those_of_the_paper(is_causal: bool) -> None:
    ours = [torch.randn(2, 5, width, requires_grad=True) for width in (8, 4, 4)]
    theirs = [torch.randn(2, 5, width) for width in (12, 12, 6)]
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()
    counts = mask & torch.tensor([[1, 0, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()
    found = relation_divergence(ours, theirs, counts, num_heads=2, mask=mask, is_causal=is_causal)
    expected = torch.zeros(())
    for own, taught in zip(ours, theirs, strict=True):
        for row, place in counts.nonzero().tolist():
            seen = [j for j in range(5) if mask[row, j] and not (is_causal and j > place)]
            target = reference_relation(taught, 2, row, place, seen)
            made = reference_relation(own, 2, row, place, seen)
            expected = expected + (target * (target / made).log()).sum() / 2
    assert_close(found, expected)
    grads = torch.autograd.grad(found, ours)
    for one, other in zip(grads, torch.autograd.grad(expected, ours), strict=True):
        assert_close(one, other)


def test_hidden_states_are_compared_token_by_token() -> None:
    ours, theirs = torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 3, 4)
    theirs[0, 0] *= 1000
    counts = torch.tensor([[1, 1, 0], [0, 1, 1]]).bool()
    found = hidden_error(ours, theirs, counts)
    expected = sum(
        ((ours[place] - theirs[place]) ** 2).sum() / (theirs[place] ** 2).sum()
        for place in map(tuple, counts.nonzero().tolist())
    )
    assert isinstance(expected, Tensor)
    assert_close(found, expected)
    (one,), (other,) = torch.autograd.grad(found, ours), torch.autograd.grad(expected, ours)
    assert_close(one, other)


def test_layers_are_spread_evenly() -> None:
    assert even_pairs(2, 4) == ((0, 0), (1, 2), (2, 4))
    assert even_pairs(4, 4) == tuple((layer, layer) for layer in range(5))
    assert even_pairs(3, 12) == ((0, 0), (1, 4), (2, 8), (3, 12))


def test_a_decoders_distance_is_the_sum_of_its_parts() -> None:
    """Of a student that is narrower, with fewer heads and layers, through the whole objective."""
    teacher = decoder(1, num_layers=4)
    student = decoder(2, hidden_size=16, num_heads=2, num_kv_heads=1, head_dim=8)
    imitation = Imitation(
        logits=0.5, temperature=2.0, tokens=0.3, hidden=0.25, relations=2.0, relation_heads=2
    )
    tokens = torch.randint(0, 258, (3, 10))
    counted = torch.rand(3, 10) > 0.3
    counted[:, 0] = False
    loss = ImitationLoss(imitation, teacher, seed=3)
    loss.begin(student)
    maps = list(student.get_submodule("lesson").parameters())
    found = loss.loss(student, part_of(tokens, counted))
    found.backward()
    assert all(value.grad is None for value in teacher.parameters())
    gradients = {name: value.grad for name, value in student.named_parameters()}
    student.zero_grad()

    ours = student(tokens, output_hidden_states=True)
    with torch.no_grad():
        theirs = teacher(tokens, output_hidden_states=True)
    at = counted[:, 1:]
    logs = (ours.logits[:, :-1] / 2).log_softmax(-1)
    target = (theirs.logits[:, :-1] / 2).log_softmax(-1)
    divergence = 4 * F.kl_div(logs, target, reduction="none", log_target=True).sum(-1)[at].sum()
    errors = [
        (F.linear(ours.hidden_states[i], maps[i]) - theirs.hidden_states[j]).square().sum(-1)
        / theirs.hidden_states[j].square().sum(-1)
        for i, j in ((0, 0), (1, 2), (2, 4))
    ]
    hidden = torch.stack(errors).mean(0)[:, :-1][at].sum()
    related = relation_divergence(
        seen(student, tokens, 2),
        seen(teacher, tokens, 4),
        F.pad(at, (0, 1)),
        num_heads=2,
        mask=None,
        is_causal=True,
    )
    losses = -ours.logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    expected = 0.5 * divergence + 0.3 * losses[at].sum() + 0.25 * hidden + 2 * related
    expected.backward()
    assert_close(found, expected)
    for name, value in student.named_parameters():
        gradient = gradients[name]
        assert value.grad is not None and gradient is not None
        assert_close(gradient / 10, value.grad / 10)
    loss.end(student)
    assert "lesson" not in dict(student.named_children())


def seen(model: Decoder | Encoder, tokens: Tensor, layer: int) -> list[Tensor]:
    with watched(projections(model, layer)) as found:
        model(tokens)
    return found


def test_an_encoder_sees_no_padding_and_not_the_next_row() -> None:
    teacher, student = encoder(1), encoder(2, num_layers=2)
    imitation = Imitation(hidden=1.0, relations=1.0)
    loss = ImitationLoss(imitation, teacher, seed=3)
    loss.begin(student)
    tokens = torch.randint(0, 256, (2, 9))
    counted = torch.tensor([[0, 1, 1, 1, 1, 0, 0, 0, 0], [0, 1, 1, 0, 0, 0, 0, 0, 0]]).bool()
    found = loss.loss(student, part_of(tokens, counted))
    alone = sum(
        loss.loss(
            student, part_of(tokens[row : row + 1, : size + 1], counted[row : row + 1, : size + 1])
        )
        for row, size in ((0, 5), (1, 3))
    )
    assert isinstance(alone, Tensor)
    assert_close(found, alone)
    with torch.no_grad():
        ours, theirs = (
            each(tokens[:1, :5], output_hidden_states=True).hidden_states
            for each in (student, teacher)
        )
    whole = torch.ones(1, 5).bool()
    errors = [hidden_error(ours[i], theirs[2 * i], whole) for i in range(3)]
    hidden = ImitationLoss(Imitation(), teacher, seed=3)
    hidden.begin(student)
    first = hidden.loss(student, part_of(tokens[:1], counted[:1]))
    assert_close(first, torch.stack(errors).mean())
    tokens[:, 5:] = 7
    assert_close(loss.loss(student, part_of(tokens, counted)), found)


LABELS = ("bird", "fish", "fox")


def classifier(seed: int, **changes: object) -> Encoder:
    model = encoder(seed, **changes)
    torch.manual_seed(seed)
    model.use_labels(LABELS)
    torch.nn.init.normal_(model.get_parameter("classifier.weight"))
    return model


def test_a_classifiers_labels_are_imitated_text_by_text() -> None:
    teacher, student = classifier(1), classifier(2, num_layers=2)
    loss = ImitationLoss(Imitation(hidden=0.0, temperature=2.0), teacher, seed=3)
    loss.begin(student)
    tokens = torch.randint(0, 256, (2, 9))
    counted = torch.tensor([[0, 1, 1, 1, 1, 0, 0, 0, 0], [0, 1, 1, 0, 0, 0, 0, 0, 0]]).bool()
    found = loss.loss(student, part_of(tokens, counted))
    expected = torch.zeros(())
    for row, size in ((0, 5), (1, 3)):
        text = tokens[row : row + 1, :size]
        ours, theirs = (each(text).logits[0] / 2 for each in (student, teacher))
        chances = theirs.detach().softmax(0)
        expected = expected + size * 4 * (chances * (chances / ours.softmax(0)).log()).sum()
    assert_close(found, expected)
    names = [name for name, _ in student.named_parameters()]
    gradients = [
        torch.autograd.grad(each, list(student.parameters()), allow_unused=True)
        for each in (found, expected)
    ]
    for name, one, other in zip(names, *gradients, strict=True):
        assert (one is None) == (other is None), name
        if one is not None and other is not None:
            assert_close(one / 10, other / 10)


def test_one_is_no_way_from_itself() -> None:
    for model in (decoder(1), encoder(1), classifier(1)):
        imitation = Imitation(hidden=1.0, relations=1.0)
        loss = ImitationLoss(imitation, model, seed=3)
        loss.begin(model)
        counted = torch.ones(2, 8).bool()
        counted[:, 0] = False
        tokens = torch.randint(0, 256, (2, 8))
        found = loss.loss(model, part_of(tokens, counted)).item()
        assert found == pytest.approx(0.0, abs=1e-4)


def test_what_cannot_be_imitated_is_said() -> None:
    def begin(imitation: Imitation, model: Decoder | Encoder, teacher: Decoder | Encoder) -> None:
        ImitationLoss(imitation, teacher, seed=0).begin(model)

    with pytest.raises(ConfigError, match=r"logits and tokens.*0 for an encoder"):
        begin(Imitation(logits=1.0), encoder(1), encoder(2))
    with pytest.raises(ConfigError, match=r"logits and tokens"):
        begin(Imitation(tokens=1.0), classifier(1), classifier(2))
    with pytest.raises(ConfigError, match=r"labels.*bird, fish, fox"):
        begin(Imitation(), classifier(1), encoder(2))
    with pytest.raises(ConfigError, match="weights"):
        begin(Imitation(hidden=0.0), encoder(1), encoder(2))
    with pytest.raises(ConfigError, match="pairs"):
        begin(Imitation(hidden=1.0, pairs=((0, 0), (3, 2))), decoder(1), decoder(2))
    with pytest.raises(ConfigError, match="related"):
        begin(Imitation(relations=1.0, related=(0, 1)), decoder(1), decoder(2))
    with pytest.raises(ConfigError, match="relation_heads"):
        begin(Imitation(relations=1.0, relation_heads=3), decoder(1), decoder(2))
    for wrong in ({"hidden": -1.0}, {"temperature": 0.0}):
        with pytest.raises(ConfigError):
            Imitation.from_dict(wrong)


def test_it_is_written_and_read() -> None:
    imitation = Imitation(hidden=1.0, pairs=((0, 0), (2, 4)), related=(2, 4))
    assert Imitation.from_dict(imitation.to_dict()) == imitation
    assert isinstance(decoder(1).config, DecoderConfig)
