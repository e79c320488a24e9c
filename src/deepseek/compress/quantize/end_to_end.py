"""Scales that are learned together, by what the whole model says."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from deepseek.compress.calibration import Batch
from deepseek.compress.quantize.experts import stacked
from deepseek.compress.quantize.targets import Model
from deepseek.compress.quantize.walk import Precision, computing
from deepseek.config import Config
from deepseek.errors import ConfigError, describe
from deepseek.models import Encoder
from deepseek.ops.distillation import linear_divergence
from deepseek.ops.quantized import QuantizedWeight, short_scale


@dataclasses.dataclass(frozen=True, kw_only=True)
class EndToEnd(Config):
    """How scales are learned together once every weight has its codes."""

    steps: int = 100
    rate: float = 5e-4
    """Of Adam, in shares of each scale; falls to 0 in a line."""
    batch: int = 2
    """Samples of a step, at most those of `Learned.batch`."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch"):
            if getattr(self, name) < 1:
                raise ConfigError(describe(name, "EndToEnd", "at least 1", getattr(self, name)))
        if not 0 < self.rate <= 0.1:
            must = "above 0 and at most 0.1"
            raise ConfigError(describe("rate", "EndToEnd", must, self.rate))


class Scaled(torch.autograd.Function):
    """Levels times their scales [N, K]; keeps the levels, and not the product, for the gradient."""

    @staticmethod
    def forward(ctx: Any, scale: Tensor, levels: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the numbers of levels int16 [N, groups, width] and scales [N, groups]."""
        ctx.save_for_backward(levels)
        return (levels * scale[..., None].to(dtype)).flatten(-2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """Return the scales' gradient, float32."""
        (levels,) = ctx.saved_tensors
        slope = gradients[0].unflatten(-1, levels.shape[1:])
        return (slope * levels).sum(-1, dtype=torch.float32), None, None


class _Final(nn.Module):
    """What the head reads, or an encoder's states, as the output of a module."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> Tensor:
        """Return the states of the tokens that are no padding [tokens, hidden]."""
        if isinstance(self.model, Encoder):
            states, mask = self.model(*batch).last_hidden_state, batch.attention_mask
            return states.flatten(0, 1) if mask is None else states[mask.bool()]
        return self.model.final_states(batch.input_ids).flatten(0, 1)


def learn_scales(
    model: Model,
    teacher: Model,
    quantized: Mapping[str, QuantizedWeight],
    batches: Sequence[Batch],
    settings: EndToEnd,
    precision: Precision,
    seed: int,
    goes_on: Callable[[float], None] = lambda share: None,
) -> dict[str, QuantizedWeight]:
    """Return weights of the same codes, with scales by which the model is nearer to its teacher.

    A decoder learns from the divergence of its predictions, an encoder from the squared error of
    its states.

    Source: Chen et al., "EfficientQAT" (2407.11062), section 3.3 (E2E-QP: step sizes alone are
    trained, codes stay); deviations: the teacher is the model before it was rounded, and scales are
    rounded to `short_scale` with the gradient passed straight through.

    Args:
        model: holds the numbers of `quantized`; is not changed.
        teacher: the model as it was.
        quantized: the weights whose scales are learned.
        batches: samples.
        settings: steps and rate.
        precision: of products.
        seed: of the order of the batches.
        goes_on: called before each step with the share that is done; may raise.
    """
    student, taught = _Final(model), _Final(teacher)
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    levels = {
        name: (each.codes.short() - each.zero.short().repeat_interleave(each.group, 1))
        .unflatten(-1, (-1, each.group)).to(torch.int8 if each.bits == 4 else torch.int16)
        for name, each in quantized.items()
    }  # fmt: skip
    logs = {name: torch.zeros_like(each.scale).requires_grad_() for name, each in quantized.items()}
    optimizer = torch.optim.Adam(list(logs.values()), lr=settings.rate, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(seed)
    parts = [part for batch in batches for part in _split(batch, settings.batch)]
    order: list[int] = []
    for step in range(settings.steps):
        goes_on(step / settings.steps)
        order = order or torch.randperm(len(parts), generator=generator).tolist()
        batch = parts[order.pop()]
        values = {
            f"model.{name}": Scaled.apply(_short(each.scale, logs[name]), levels[name], dtype)
            for name, each in quantized.items()
        }
        with computing(precision):
            with torch.no_grad():
                wanted = taught(batch)
            found = functional_call(student, stacked(student, values), (batch,))
            loss = _loss(model, teacher, found, wanted)
        slopes = torch.autograd.grad(loss, list(logs.values()))
        for log, slope in zip(logs.values(), slopes, strict=True):
            log.grad = slope
        for group in optimizer.param_groups:
            group["lr"] = settings.rate * (1 - step / settings.steps)
        optimizer.step()
    return {
        name: dataclasses.replace(each, scale=_short(each.scale, logs[name]).detach())
        for name, each in quantized.items()
    }


def _split(batch: Batch, size: int) -> list[Batch]:
    """Return a batch in parts of at most so many rows."""
    ids, mask = batch
    masks = [None] * len(ids) if mask is None else mask.split(size)
    return [Batch(*part) for part in zip(ids.split(size), masks, strict=False)]


def _short(scale: Tensor, change: Tensor) -> Tensor:
    """Return `scale * exp(change)` as it is stored; the gradient passes straight through."""
    exact = scale * change.exp()
    return exact + (short_scale(exact.detach()) - exact.detach())


def _loss(model: Model, teacher: Model, states: Tensor, wanted: Tensor) -> Tensor:
    """Return the divergence per token, or the squared error per number, of two models' states."""
    if isinstance(model, Encoder) or isinstance(teacher, Encoder):
        return (states.float() - wanted.float()).square().mean()
    counts = torch.ones(len(states), dtype=torch.bool)
    ours, theirs = model.lm_head.weight.detach(), teacher.lm_head.weight.detach()
    return linear_divergence(states, ours, wanted, theirs.to(states.dtype), counts) / len(states)
