"""Training in few bits: counted bytes, losses within noise, overflow, roundings right in the
mean."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from deepseek.errors import ConfigError
from deepseek.models import Decoder
from deepseek.optim import MixedPrecisionTrainer
from deepseek.optim.mixed_precision import kept_bytes
from deepseek.optim.scale import LossScale
from deepseek.optim.storage import Storage, keep, stochastic
from tests.generate.conftest import TINY

STORAGES: list[Storage] = ["float16", "bfloat16", "float8"]
LEVEL = {"float16": 2**-10, "bfloat16": 2**-7, "float8": 2**-3}
"""Largest step between neighbours, relative."""


def decoder() -> Decoder:
    torch.manual_seed(0)
    return Decoder(TINY)


def adamw(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95))


def batch(step: int) -> Tensor:
    """Return rows that can be learned: each counts up from a random start."""
    generator = torch.Generator().manual_seed(step)
    starts = torch.randint(0, 200, (8, 1), generator=generator)
    return starts + torch.arange(16)


def train(model: Decoder, trainer: MixedPrecisionTrainer, steps: int) -> list[float]:
    return [trainer.step(lambda at=at: model.loss(batch(at), batch(at))) for at in range(steps)]


@pytest.mark.parametrize("storage", STORAGES)
@given(scale=st.integers(-10, 6), seed=st.integers(0, 100))
@settings(max_examples=20, deadline=None)
def test_what_is_kept_is_near(storage: Storage, scale: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(7, 50, generator=generator) * 2.0**scale
    found = keep(values, storage, generator).read()
    bound = LEVEL[storage] * values.abs()
    if storage == "float8":
        bound = bound + values.abs().max() / 448 * 2**-6
    assert found.shape == values.shape
    assert bool(((found - values).abs() <= bound + 1e-7).all())


@pytest.mark.parametrize("storage", STORAGES)
def test_roundings_are_right_in_the_mean(storage: Storage) -> None:
    """Where rounding to the nearest would always give the same level."""
    values = torch.full((1 << 16,), 1.0 + LEVEL[storage] / 8)
    values[::128] = 448.0 if storage == "float8" else values[0]
    found = keep(values, storage, torch.Generator().manual_seed(0)).read()
    inner = found[1::128]
    assert inner.unique().numel() == 2
    assert inner.mean().item() == pytest.approx(values[1].item(), rel=LEVEL[storage] / 8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_levels_and_what_is_no_number_stay(dtype: torch.dtype) -> None:
    values = torch.tensor([0.0, -0.0, 1.0, -2.0, float("inf"), float("-inf"), float("nan")])
    found = stochastic(values, dtype, None).float()
    assert torch.equal(found[:-1], values[:-1]) and bool(found[-1].isnan())


@pytest.mark.parametrize(
    "patterns,most",
    [
        ({"fp16_params": ["*"]}, 0.5),
        ({"bf16_params": ["*"]}, 0.5),
        ({"fp8_params": ["*"]}, 0.42),
        ({"fp16_params": ["layers.*.weight"]}, 0.8),
    ],
)
def test_bytes_are_counted(patterns: dict, most: float) -> None:
    model = decoder()
    trainer = MixedPrecisionTrainer(model=model, optimizer=adamw(model), **patterns)
    train(model, trainer, 1)
    count = sum(value.numel() for value in model.parameters())
    # AdamW counts the steps of each parameter
    counters = 4 * len(list(model.parameters()))
    assert trainer.num_bytes - counters <= most * 16 * count
    predicted = sum(kept_bytes(each.storage, each.num_values) for each in trainer.decisions)
    assert trainer.num_bytes - counters == predicted


@pytest.mark.parametrize("patterns", [{"fp16_params": ["*"]}, {"bf16_params": ["*"]},
                                      {"fp8_params": ["*weight"]}])  # fmt: skip
def test_it_learns_as_float32_does(patterns: dict) -> None:
    losses = {}
    for name, rules in (("float32", {}), ("kept", patterns)):
        model = decoder()
        trainer = MixedPrecisionTrainer(model=model, optimizer=adamw(model), **rules)
        losses[name] = sum(train(model, trainer, 60)[-10:]) / 10
    assert losses["float32"] < 3.5, "it starts at 8"
    assert losses["kept"] == pytest.approx(losses["float32"], rel=0.15)


def test_without_patterns_it_is_the_optimizer() -> None:
    ours, theirs = decoder(), decoder()
    trainer = MixedPrecisionTrainer(model=ours, optimizer=adamw(ours), loss_scale=1.0)
    optimizer = adamw(theirs)
    for at in range(3):
        trainer.step(lambda at=at: ours.loss(batch(at), batch(at)))
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            theirs.loss(batch(at), batch(at)).backward()
        optimizer.step()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_the_scale_does_not_show_in_the_step() -> None:
    """With SGD, to which the size of a gradient matters."""
    models = [decoder(), decoder()]
    for model, scale in zip(models, (1.0, 1024.0), strict=True):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        trainer = MixedPrecisionTrainer(model=model, optimizer=optimizer, loss_scale=scale)
        trainer.step(lambda model=model: model.loss(batch(0), batch(0)))
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_overflow_leaves_the_weights_and_halves_the_scale() -> None:
    model = decoder()
    trainer = MixedPrecisionTrainer(model=model, optimizer=adamw(model), fp16_params=["*"])
    before = copy.deepcopy(model.state_dict())
    names = [name for name, _ in model.named_parameters()]
    trainer.step(lambda: model.loss(batch(0), batch(0)) * 1e6)
    assert [name for name, _ in model.named_parameters()] == names
    assert trainer.loss_scale == 2.0**15
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_dynamic_scale_grows_and_shrinks() -> None:
    scale = LossScale("dynamic", start=4.0, patience=2)
    for overflowed, expected in ((False, 4), (False, 8), (True, 4), (False, 4), (False, 8)):
        scale.update(overflowed)
        assert scale.value == expected
    fixed = LossScale(3.0)
    fixed.update(True)
    assert fixed.value == 3.0


def test_it_goes_on_in_the_same_bits() -> None:
    model = decoder()
    trainer = MixedPrecisionTrainer(model=model, optimizer=adamw(model), fp16_params=["*"])
    train(model, trainer, 2)
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(trainer.state_dict())
    train(model, trainer, 2)
    other = decoder()
    again = MixedPrecisionTrainer(model=other, optimizer=adamw(other), fp16_params=["*"])
    other.load_state_dict(weights)
    again.load_state_dict(state)
    train(other, again, 2)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


def test_auto_keeps_what_is_sensitive() -> None:
    """A weight that bfloat16 rounds away decides the loss; the others hardly matter."""

    class Toy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fine = nn.Parameter(torch.tensor([1.0 + 2.0**-9]))
            self.finer = nn.Parameter(torch.tensor([1.0 + 2.0**-13]))
            self.coarse = nn.Parameter(torch.tensor([1.0]))

        def forward(self) -> Tensor:
            found = self.coarse + 1e4 * (self.fine - 1) + 1e4 * (self.finer - 1)
            return found.sum()

    model = Toy()
    optimizer = torch.optim.AdamW(model.parameters())
    trainer = MixedPrecisionTrainer(
        model=model, optimizer=optimizer, fp16_params="auto", sample=model.forward
    )
    chosen = {each.name: each.storage for each in trainer.decisions}
    assert chosen == {"fine": "float16", "finer": "float32", "coarse": "bfloat16"}
    assert [row[2] for row in trainer.table()] == ["float16", "float32", "bfloat16"]


def test_mistakes_say_what_is_wrong() -> None:
    model = decoder()

    def make(**settings: object) -> MixedPrecisionTrainer:
        values: dict = {"model": model, "optimizer": adamw(model), **settings}
        return MixedPrecisionTrainer(**values)

    with pytest.raises(ConfigError, match="a pattern that matches"):
        make(fp16_params=["layer.*.weight"])
    with pytest.raises(ConfigError, match="sample"):
        make(fp16_params="auto")
    with pytest.raises(ConfigError, match="loss_scale"):
        make(loss_scale=0.0)
    with pytest.raises(ConfigError, match="over parameters of the model"):
        make(optimizer=adamw(decoder()))
    stepped = adamw(model)
    model.loss(batch(0), batch(0)).backward()
    stepped.step()
    with pytest.raises(ConfigError, match="before its first step"):
        make(optimizer=stepped)
    make(bf16_params=["*"])
    with pytest.raises(ConfigError, match="float32"):
        make()
