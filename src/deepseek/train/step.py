"""One optimizer step: gradients of a batch in parts, summed in one order, and applied."""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from deepseek.data import Samples, Windows
from deepseek.errors import ConfigError, describe
from deepseek.models import Decoder
from deepseek.ops.cross_entropy import IGNORED
from deepseek.parallel import TreeSum, World, pairwise_sum
from deepseek.train.config import Stage


@dataclasses.dataclass(frozen=True)
class StepResult:
    """What a step gave."""

    loss: float
    """Mean over the tokens of the batch on all workers, in nats, before the step."""
    gradient_norm: float
    """Before it was shortened."""
    num_targets: int
    """Tokens that were predicted."""
    samples: Samples
    """What this worker read."""


def choose_parameters(model: nn.Module, patterns: Sequence[str]) -> list[tuple[str, nn.Parameter]]:
    """Let the parameters that match a pattern be trained, and no others; return them by name.

    Raises:
        ConfigError: a pattern matches nothing.
    """
    named = list(model.named_parameters())
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern) for name, _ in named):
            step = f"Names look like {named[0][0]!r}"
            raise ConfigError(describe("trains", "the stage", "a name's pattern", pattern, step))
    for name, parameter in named:
        parameter.requires_grad_(any(fnmatch.fnmatchcase(name, each) for each in patterns))
    return [(name, parameter) for name, parameter in named if parameter.requires_grad]


class BatchStep:
    """Steps of one stage on one worker.

    The loss is the mean over the predicted tokens of the whole batch, however it is divided: each
    part's sum is weighted by the batch's count, which is known before. Parts are summed as leaves
    of one tree (`parallel.tree`).
    """

    def __init__(
        self,
        model: Decoder,
        parameters: Sequence[tuple[str, nn.Parameter]],
        optimizers: Sequence[Optimizer],
        stage: Stage,
        windows: Windows,
        *,
        world: World,
        total: TreeSum,
        seed: int,
    ) -> None:
        """Prepare the steps.

        Args:
            model: in training mode.
            parameters: those that are trained.
            optimizers: of them.
            stage: its batch, precision and schedule.
            windows: its data.
            world: the workers.
            total: adds up over them.
            seed: of dropout.

        Raises:
            ConfigError: there are more workers than parts of a batch.
        """
        self._model, self._optimizers, self._stage, self._windows = (
            model,
            optimizers,
            stage,
            windows,
        )
        self._values = [value for _, value in parameters]
        self._world, self._seed, self._sum = world, seed, total
        self._parts = self._divide()

    @property
    def is_exact(self) -> bool:
        """Whether another number of workers would give the same bits."""
        count = math.ceil(self._stage.batch / self._micro_batch())
        return self._sum.is_exact and count & (count - 1) == 0

    def _micro_batch(self) -> int:
        """Return the samples of a part: as asked for, or one part a worker."""
        size = self._stage.micro_batch_size
        if self._stage.micro_batch is None:
            size = max(1, size // self._world.size)
        return size

    def _divide(self) -> list[tuple[int, int]]:
        """Return first and last-plus-one sample, within a batch, of each of this worker's parts."""
        size, batch = self._micro_batch(), self._stage.batch
        count, workers = math.ceil(batch / size), self._world.size
        if count < workers:
            must = f"at least {workers} parts, one a worker"
            step = "Take a larger batch, a smaller micro_batch or fewer workers"
            raise ConfigError(describe("batch", "the stage", must, f"{count}", step))
        mine = range(count * self._world.rank // workers, count * (self._world.rank + 1) // workers)
        return [(part * size, min((part + 1) * size, batch)) for part in mine]

    def run(self, step: int, num_steps: int) -> StepResult:
        """Do a step.

        Args:
            step: of the stage, from 0.
            num_steps: of the stage, for the schedule.
        """
        first = step * self._stage.batch
        start, stop = self._parts[0][0], self._parts[-1][1]
        samples = self._windows.read(first + start, stop - start)
        num_targets = self._windows.num_targets(first, self._stage.batch)
        if num_targets == 0:
            must = "some tokens to predict in every batch"
            raise ConfigError(describe("batch", f"step {step}", must, 0, "Take a larger batch"))
        *gradients, loss = pairwise_sum(self._gradients(samples, start, step, num_targets))
        self._sum([*gradients, loss])
        norm = self._apply(gradients, self._stage.schedule.factor(step, num_steps))
        return StepResult(loss.item(), norm, num_targets, samples)

    def _gradients(
        self, samples: Samples, start: int, step: int, num_targets: int
    ) -> Iterator[list[Tensor]]:
        """Yield the gradients of each part, and last its loss."""
        for first, stop in self._parts:
            rows = slice(first - start, stop - start)
            tokens = torch.from_numpy(samples.tokens[rows])
            counted = torch.from_numpy(samples.targets[rows])
            labels = torch.where(counted, tokens, IGNORED)
            share = int(counted.sum())
            if share == 0:
                zeros = [torch.zeros_like(value) for value in self._values]
                yield [*zeros, torch.zeros(1)]
                continue
            # dropout depends on the part, not on who computes it
            torch.manual_seed((self._seed * 1_000_003 + step) * 65_537 + first)
            with torch.autocast("cpu", torch.bfloat16, enabled=self._stage.precision == "bfloat16"):
                mean = self._model.loss(tokens, labels)
            loss = mean * (share / num_targets)
            loss.backward()
            found = [
                torch.zeros_like(value) if value.grad is None else value.grad
                for value in self._values
            ]
            for value in self._values:
                value.grad = None
            yield [*found, loss.detach().reshape(1)]

    def _apply(self, gradients: Sequence[Tensor], factor: float) -> float:
        """Take the step and return the norm of the gradient; leave all as it is where that is not
        finite."""
        norm = torch.nn.utils.get_total_norm(gradients)
        if not bool(norm.isfinite()):
            return norm.item()
        for value, gradient in zip(self._values, gradients, strict=True):
            value.grad = gradient
        if self._stage.max_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self._values, self._stage.max_grad_norm, norm)
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self._stage.optimizer.rate * factor
            optimizer.step()
            optimizer.zero_grad()
        return norm.item()
