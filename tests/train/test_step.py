"""One step: parts equal the whole, context does not count, workers share a batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from deepseek.data import Document, Windows, write_corpus
from deepseek.errors import ConfigError
from deepseek.models import Decoder, next_token_loss
from deepseek.optim import AdamW, Constant, build_optimizers
from deepseek.parallel import TreeSum, World
from deepseek.train import ExitLoss, Source, Stage
from deepseek.train.speed import flops_per_token, peak_flops
from deepseek.train.step import BatchStep, choose_parameters
from tests.generate.conftest import TINY


@pytest.fixture
def windows(tmp_path: Path) -> Windows:
    """Windows of which some tokens are context, unevenly."""
    torch.manual_seed(3)
    tokens = torch.randint(0, 258, (900,)).tolist()
    targets = [(index // 40) % 3 != 0 for index in range(900)]
    corpus = write_corpus(
        tmp_path / "corpus",
        [Document(tokens, targets)],
        name="toy",
        vocab_size=258,
        tokenizer_sha256="x",
    )
    return Windows([corpus], length=24, seed=1)


def stage(**changes: object) -> Stage:
    values = {"name": "one", "data": (Source(path="x"),), "steps": 1, "batch": 8}
    values |= {"precision": "float32", "schedule": Constant(), "length": 24}
    return Stage(**{**values, **changes})


def take_step(
    windows: Windows, settings: Stage, *, dtype: torch.dtype = torch.float64, num_layers: int = 2
) -> Decoder:
    torch.manual_seed(0)
    model = Decoder(TINY.replace(num_layers=num_layers)).to(dtype).train()
    parameters = choose_parameters(model, settings.trains)
    optimizers = build_optimizers(AdamW(rate=1e-2), parameters)
    world = World()
    step = BatchStep(
        model,
        parameters,
        optimizers,
        settings,
        windows,
        world=world,
        transport=TreeSum(world),
        seed=0,
    )
    result = step.run(0, 1)
    model.result = result  # type: ignore[assignment]
    return model


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 4])
def test_parts_equal_the_whole_batch(windows: Windows, micro_batch: int) -> None:
    whole = take_step(windows, stage())
    parts = take_step(windows, stage(micro_batch=micro_batch))
    assert parts.result.loss == pytest.approx(whole.result.loss, rel=1e-6)
    for ours, theirs in zip(parts.parameters(), whole.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-7, rtol=0)


def test_the_loss_is_the_mean_over_counted_tokens(windows: Windows) -> None:
    found = take_step(windows, stage(micro_batch=1)).result
    torch.manual_seed(0)
    model = Decoder(TINY).double()
    samples = windows.read(0, 8)
    logits = model(torch.from_numpy(samples.tokens)).logits.log_softmax(-1)
    targets = torch.from_numpy(samples.tokens)[:, 1:, None]
    losses = -logits[:, :-1].gather(2, targets)[..., 0]
    counted = torch.from_numpy(samples.targets)[:, 1:]
    assert found.num_targets == int(counted.sum())
    assert found.loss == pytest.approx(losses[counted].mean().item(), rel=1e-6)


def test_gradients_are_shortened_together(windows: Windows) -> None:
    short = take_step(windows, stage(max_grad_norm=1e-3)).result
    assert short.gradient_norm == take_step(windows, stage(max_grad_norm=None)).result.gradient_norm
    assert short.gradient_norm > 1e-3


def test_a_batch_without_targets_is_refused(tmp_path: Path) -> None:
    document = Document([1] * 40, [False] * 40)
    corpus = write_corpus(
        tmp_path / "c", [document], name="toy", vocab_size=258, tokenizer_sha256="x"
    )
    with pytest.raises(ConfigError, match="some tokens to predict"):
        take_step(Windows([corpus], length=8), stage(length=8))


def test_patterns_choose_and_must_match() -> None:
    model = Decoder(TINY)
    chosen = choose_parameters(model, ("*.mlp.*", "model.norm.weight"))
    names = {name for name, _ in chosen}
    assert names == {n for n, p in model.named_parameters() if p.requires_grad}
    assert all(".mlp." in name or name == "model.norm.weight" for name in names)
    with pytest.raises(ConfigError, match="a name's pattern"):
        choose_parameters(model, ("*", "model.layer.*"))


@pytest.mark.parametrize("size", [2, 3, 4])
def test_workers_share_a_batch(windows: Windows, size: int) -> None:
    model = Decoder(TINY)
    parameters = choose_parameters(model, ("*",))
    taken: list[tuple[int, int]] = []
    for rank in range(size):
        step = BatchStep(
            model, parameters, [], stage(micro_batch=2), windows,
            world=World(rank, size), transport=TreeSum(World()), seed=0,
        )  # fmt: skip
        taken += step._parts
    assert taken == [(0, 2), (2, 4), (4, 6), (6, 8)]
    with pytest.raises(ConfigError, match="one a worker"):
        BatchStep(
            model, parameters, [], stage(micro_batch=4), windows,
            world=World(0, 3), transport=TreeSum(World()), seed=0,
        )  # fmt: skip


def test_products_of_a_token_are_counted() -> None:
    """Against a count of the matrices by hand."""
    model = Decoder(TINY)
    layer = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48
    expected = 3 * (2 * (2 * layer + 258 * 32) + 2 * 2 * 4 * 8 * 100)
    assert flops_per_token(model, 100) == expected
    assert peak_flops(torch.float32, torch.get_num_threads()) > 1e8


def test_the_exit_loss_is_the_weighted_sum_of_losses_behind_layers(windows: Windows) -> None:
    """Loss and gradients, against passes of models that end at the layer."""
    exits = ExitLoss(layers=(2, 3), scale=0.5)
    weights = {2: 0.5 * 1, 3: 0.5 * (1 + 2), 4: 3 + 0.5 * (1 + 2)}
    torch.manual_seed(0)
    model = Decoder(TINY.replace(num_layers=4)).double()
    samples = windows.read(0, 3)
    tokens, counted = torch.from_numpy(samples.tokens), torch.from_numpy(samples.targets)
    labels = torch.where(counted, tokens, -100)
    found = model.loss(tokens, labels, exits.weights(4))
    gradients = torch.autograd.grad(found, list(model.parameters()))
    hidden = model(tokens, output_hidden_states=True).hidden_states
    assert hidden is not None
    normed = [*map(model.model.norm, hidden[:-1]), hidden[-1]]
    losses = {layer: next_token_loss(model.lm_head(normed[layer]), labels) for layer in weights}
    expected = sum(weights[layer] * losses[layer] for layer in weights) / sum(weights.values())
    assert isinstance(expected, torch.Tensor)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    wanted = torch.autograd.grad(expected, list(model.parameters()))
    for one, other in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_a_step_takes_the_exit_loss(windows: Windows) -> None:
    exits = ExitLoss(layers=(2,))
    found = take_step(windows, stage(exit_loss=exits, micro_batch=2), num_layers=3).result
    torch.manual_seed(0)
    model = Decoder(TINY.replace(num_layers=3)).double()
    samples = windows.read(0, 8)
    tokens, counted = torch.from_numpy(samples.tokens), torch.from_numpy(samples.targets)
    expected = model.loss(tokens, torch.where(counted, tokens, -100), exits.weights(3))
    assert found.loss == pytest.approx(expected.item(), rel=1e-6)
    with pytest.raises(ConfigError, match="below the model's 2 layers"):
        take_step(windows, stage(exit_loss=exits))
