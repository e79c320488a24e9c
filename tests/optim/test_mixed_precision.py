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
from deepseek.optim.mixed_precision import TABLE, kept_bytes
from deepseek.optim.scale import LossScale
from deepseek.optim.storage import BLOCK, CHUNK, Noise, Storage, keep, stochastic
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


def noise(seed: int = 0) -> Noise:
    return Noise(torch.Generator().manual_seed(seed))


def train(model: Decoder, trainer: MixedPrecisionTrainer, steps: int) -> list[float]:
    return [trainer.step(lambda at=at: model.loss(batch(at), batch(at))) for at in range(steps)]


@pytest.mark.parametrize("storage", STORAGES)
@given(scale=st.integers(-10, 6), seed=st.integers(0, 100))
@settings(max_examples=20, deadline=None)
def test_what_is_kept_is_near(storage: Storage, scale: int, seed: int) -> None:
    values = torch.randn(7, 50, generator=torch.Generator().manual_seed(seed)) * 2.0**scale
    found = keep(values, storage, noise(seed)).read()
    bound = LEVEL[storage] * values.abs()
    if storage == "float8":
        bound = bound + values.abs().max() / 448 * 2**-6
    assert found.shape == values.shape
    assert bool(((found - values).abs() <= bound + 1e-7).all())


FLOAT8 = [torch.float8_e4m3fn, torch.float8_e5m2]
DTYPES = [torch.float16, torch.bfloat16, *FLOAT8]


def neighbours(value: float, dtype: torch.dtype) -> tuple[float, float]:
    """Return the levels of a type below and above a number."""
    bits = torch.arange(256 if dtype.itemsize == 1 else 65536)
    kind = torch.uint8 if dtype.itemsize == 1 else torch.uint16
    levels = bits.to(kind).view(dtype).double()
    levels = levels[levels.isfinite()]
    return levels[levels <= value].max().item(), levels[levels >= value].min().item()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [1.3, -0.77, 0.031, 3.1e-3, -4.5e-5, 1e-6])
def test_roundings_go_to_a_neighbour_and_are_right_in_the_mean(
    dtype: torch.dtype, value: float
) -> None:
    """Below the smallest normal number too; over more than a chunk, and not whole ones."""
    count = CHUNK * 3 // 2 + 1
    exact = torch.tensor(value).item()
    found = stochastic(torch.full((count,), value), dtype, noise()).double()
    low, high = neighbours(exact, dtype)
    assert set(found.unique().tolist()) == {low, high}
    share = (exact - low) / (high - low)
    deviation = (high - low) * (share * (1 - share) / count) ** 0.5
    # the bits that are dropped are finite, which is seen below the smallest normal number
    assert found.mean().item() == pytest.approx(exact, abs=5 * deviation + (high - low) * 2**-13)


def test_two_values_are_rounded_independently() -> None:
    """Neighbours, values a chunk apart, and one value in two steps."""
    half = torch.full((2 * CHUNK,), 1 + 2.0**-8)
    ups = [(stochastic(half, torch.bfloat16, noise(seed)) > 1).double() for seed in (0, 1)]
    one = ups[0]
    for other in (one.roll(1), one.roll(CHUNK), ups[1]):
        both = (one * other).mean().item()
        assert both == pytest.approx(0.25, abs=5 * 0.25 / CHUNK**0.5)


@pytest.mark.parametrize("storage", STORAGES)
def test_threads_do_not_show(storage: Storage) -> None:
    values, found = torch.randn(CHUNK + 777), []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(keep(values, storage, noise()).read())
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


def levels(dtype: torch.dtype) -> Tensor:
    """Return the finite numbers of a float8."""
    found = torch.arange(256).to(torch.uint8).view(dtype).float()
    return found[found.isfinite()]


@pytest.mark.parametrize("dtype", DTYPES)
def test_levels_and_what_is_no_number_stay(dtype: torch.dtype) -> None:
    for kind in FLOAT8 if dtype not in FLOAT8 else [dtype]:
        assert torch.equal(stochastic(levels(kind), dtype, noise()).float(), levels(kind))
    all_bits = torch.tensor([-1, 0x7FFFFFFF], dtype=torch.int32).view(torch.float32)
    assert bool(stochastic(all_bits, dtype, noise()).float().isnan().all())
    if dtype not in FLOAT8:
        ends = torch.tensor([float("inf"), float("-inf")])
        assert torch.equal(stochastic(ends, dtype, noise()).float(), ends)


def test_float8_is_read_exactly_and_odd_sizes_end_right() -> None:
    values = levels(torch.float8_e4m3fn)
    assert torch.equal(keep(values, "float8", noise()).read(), values)
    squares = levels(torch.float8_e5m2).abs().unique()[1:]
    assert torch.equal(keep(squares, "float8", noise()).read(), squares)
    for count in (1, BLOCK - 1, CHUNK + 1):
        largest = torch.full((count,), -448.0)
        assert torch.equal(keep(largest, "float8", noise()).read(), largest)
    assert torch.equal(keep(torch.zeros(5), "float8", noise()).read(), torch.zeros(5))


def test_no_mean_of_squares_is_lost() -> None:
    """A step is divided by its root: of 0 it would be thousands of times too long."""
    squares = torch.logspace(-20, 0, BLOCK * 9).view(9, BLOCK).T.reshape(-1)
    found = keep(squares, "float8", noise()).read()
    smallest = 2.0**-16 / 57344 * squares.view(-1, BLOCK).amax(1).repeat_interleave(BLOCK)
    assert bool((found >= smallest * 0.999).all())
    assert bool(((found - squares).abs() <= 0.25 * squares + smallest).all())


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
    assert trainer.loss_scale == 2.0**11
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
    """The loss grows with the square of an error, in some weights steeply."""

    class Toy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fine = nn.Parameter(torch.ones(64))
            self.finer = nn.Parameter(torch.ones(64))
            self.coarse = nn.Parameter(torch.ones(64))

        def forward(self) -> Tensor:
            errors = [(each - 1).square().sum() for each in (self.fine, self.finer, self.coarse)]
            return 1 + 10 * errors[0] + 1e3 * errors[1] + 0.1 * errors[2]

    model = Toy()
    optimizer = torch.optim.AdamW(model.parameters())
    trainer = MixedPrecisionTrainer(
        model=model, optimizer=optimizer, fp16_params="auto", sample=model.forward
    )
    chosen = {each.name: each.storage for each in trainer.decisions}
    assert chosen == {"fine": "float16", "finer": "float32", "coarse": "bfloat16"}
    rows = [dict(zip(TABLE, row, strict=True)) for row in trainer.table()]
    assert [row["storage"] for row in rows] == ["float16", "float32", "bfloat16", ""]
    assert [row["gain"] for row in rows] == ["16.67 %", "0.00 %", "16.67 %", "33.33 %"]
    assert (rows[-1]["bytes before"], rows[-1]["bytes after"]) == ("3072", "2048")


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
