"""Tiny decoders of several families, trained whole and divided, and the difference."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor, nn

from deepseek.models import Decoder, DecoderConfig, ExpertsConfig, GateConfig, LatentConfig
from deepseek.models.divided import DividedDecoder
from deepseek.ops.cross_entropy import IGNORED
from deepseek.optim import AdamW, OptimizerConfig, build_optimizers
from deepseek.parallel import GradientSum, Grid, Mesh, World, gradient_of, whole_state
from tests.tolerances import assert_close

SIZES = {
    "vocab_size": 97,  # an odd number: no mesh divides it
    "hidden_size": 24,
    "num_layers": 4,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "intermediate_size": 36,
    "max_positions": 64,
    "init_std": 0.2,
}
EXPERTS = ExpertsConfig(num_experts=8, num_active=2, width=12, dense_layers=(1,))
LATENT = LatentConfig(query_rank=12, kv_rank=10, nope_dim=8, rope_dim=6, value_dim=10)
V3 = EXPERTS.replace(num_shared=1, score="sigmoid", num_groups=4, num_active_groups=2)
FAMILIES: dict[str, DecoderConfig] = {
    "llama-tied": DecoderConfig(**SIZES, tie_embeddings=True),
    "llama-biased": DecoderConfig(**SIZES, qkv_bias=True, output_bias=True, mlp_bias=True),
    "qwen3": DecoderConfig(**SIZES, qk_norm=True, window=5, window_layers=(1, 2)),
    "qwen3-moe": DecoderConfig(**SIZES, qk_norm=True, experts=EXPERTS),
    "deepseek-v3": DecoderConfig(
        **SIZES | {"num_kv_heads": 4, "head_dim": 14}, latent=LATENT, experts=V3
    ),
    "gated": DecoderConfig(**SIZES, gates=GateConfig()),
    "gated-latent": DecoderConfig(
        **SIZES | {"num_kv_heads": 4, "head_dim": 14}, latent=LATENT, gates=GateConfig()
    ),
}
ROWS, LENGTH, PARTS = 8, 11, 2
STEPS = 3
# A step is a smooth function of the gradient, so that rounding stays rounding.
OPTIMIZER = AdamW(rate=1e-2, eps=1e-3)


@dataclasses.dataclass
class Outcome:
    """What training gave."""

    losses: list[float]
    norms: list[float]
    gradients: dict[str, Tensor]
    """Of the first step, whole."""
    weights: dict[str, Tensor]
    """After the last, whole."""


def made(config: DecoderConfig) -> Decoder:
    """Return the same decoder in every process."""
    torch.manual_seed(0)
    model = Decoder(config)
    with torch.no_grad():
        for value in [*model.parameters(), *model.buffers()]:
            if value.ndim == 1:
                value.add_(0.1 * torch.randn_like(value))
    return model


def samples() -> tuple[Tensor, Tensor]:
    """Return tokens and labels; some do not count, in one row none does."""
    drawn = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, SIZES["vocab_size"], (ROWS, LENGTH), generator=drawn)
    labels = tokens.masked_fill(torch.rand(tokens.shape, generator=drawn) < 0.2, IGNORED)
    labels[4] = IGNORED
    return tokens, labels


def num_targets(labels: Tensor) -> int:
    """Return the tokens that are predicted."""
    return int((labels[:, 1:] != IGNORED).sum())


def trained_whole(config: DecoderConfig, optimizer: OptimizerConfig = OPTIMIZER) -> Outcome:
    """Train by nothing but the model's logits and PyTorch's cross-entropy."""
    model, (tokens, labels) = made(config), samples()
    parameters = list(model.named_parameters())
    optimizers = build_optimizers(optimizer, parameters)
    found = Outcome([], [], {}, {})
    for step in range(STEPS):
        model.zero_grad()
        logits = model(tokens).logits[:, :-1]
        targets = labels[:, 1:]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
        if step == 0:
            found.gradients = {name: gradient_of(value) for name, value in parameters}
        found.norms.append(_norm([gradient_of(value) for _, value in parameters]))
        found.losses.append(loss.item())
        for each in optimizers:
            each.step()
    found.weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
    return found


def _norm(gradients: list[Tensor]) -> float:
    return math.sqrt(sum(gradient.double().square().sum().item() for gradient in gradients))


def trained_divided(
    world: World, config: DecoderConfig, mesh: Mesh, optimizer: OptimizerConfig = OPTIMIZER
) -> Outcome:
    """Train over a mesh; gradients and weights are given on the first process alone."""
    grid = Grid(mesh, world)
    divided = DividedDecoder(made(config), grid)
    tokens, labels = samples()
    count = num_targets(labels)
    share = ROWS // grid.reader.size
    num_parts = min(share, max(PARTS, grid.size("pipeline")))
    own = slice(grid.reader.rank * share, (grid.reader.rank + 1) * share)
    parameters = divided.named_parameters()
    optimizers = build_optimizers(optimizer, parameters)
    total = GradientSum(grid, parameters, divided.axes)
    found = Outcome([], [], {}, {})
    for step in range(STEPS):
        for _, value in parameters:
            value.grad = None
        loss = divided.backward(tokens[own], labels[own], num_parts, 1 / count)
        grid.sum([loss], ("pipeline", "data", "expert", "shard"))
        gradients = [gradient_of(value) for _, value in parameters]
        total(gradients)
        for (_, value), gradient in zip(parameters, gradients, strict=True):
            value.grad = gradient
        if step == 0:
            found.gradients = whole_gradients(divided, grid)
        found.norms.append(total.norm(gradients).item())
        found.losses.append(loss.item())
        for each in optimizers:
            each.step()
    found.weights = _copied(whole_state(divided.decoder, grid))
    return found


def whole_gradients(divided: DividedDecoder, grid: Grid) -> dict[str, Tensor]:
    """Return the gradients whole on the first process, by way of the weights' places."""
    kept = [(value, value.detach().clone()) for _, value in divided.named_parameters()]
    with torch.no_grad():
        for value, _ in kept:
            value.copy_(gradient_of(value))
        found = _copied(whole_state(divided.decoder, grid))
        for value, weights in kept:
            value.copy_(weights)
    return found


def _copied(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in state.items()}


Case = tuple[str, Mesh]
"""A family and what it is divided over."""


def train_each(world: World, cases: list[Case]) -> list[Outcome]:
    """Return what each case gives in this process."""
    return [trained_divided(world, FAMILIES[family], mesh) for family, mesh in cases]


def assert_each_same(found: list[list[Outcome]], cases: list[Case]) -> None:
    """Fail unless every case gave in all processes what the whole gives."""
    for number, (family, mesh) in enumerate(cases):
        expected = trained_whole(FAMILIES[family])
        try:
            assert_same([each[number] for each in found], expected)
        except AssertionError as error:
            raise AssertionError(f"{family} over {mesh}: {error}") from error


def assert_each_differs(found: list[list[Outcome]], cases: list[Case]) -> None:
    """Fail where a planted fault did not show."""
    for case, each in zip(cases, zip(*found, strict=True), strict=True):
        with pytest.raises(AssertionError):
            assert_each_same([[one] for one in each], [case])


def assert_same(outcomes: list[Outcome], expected: Outcome) -> None:
    """Fail unless losses and norms of all processes, gradients and weights are the whole's."""
    for each in outcomes:
        assert_close(torch.tensor(each.losses), torch.tensor(expected.losses))
        assert_close(torch.tensor(each.norms), torch.tensor(expected.norms))
    first = outcomes[0]
    assert set(expected.weights) == set(first.weights)
    assert set(expected.gradients) <= set(first.gradients)
    for name, value in expected.gradients.items():
        assert_close(first.gradients[name], value)
    for name, value in expected.weights.items():
        assert_close(first.weights[name], value)
