"""One optimizer step: gradients of a batch in parts, summed in one order, and applied."""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import functools
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from deepseek.data import Samples, Windows
from deepseek.errors import ConfigError, describe
from deepseek.models import Decoder, Encoder, GateWatch
from deepseek.ops.hardware import products_in
from deepseek.parallel import EarlySum, PairwiseSum, Transport, World
from deepseek.train.config import Stage
from deepseek.train.objective import NextTokens, Objective, Part

_NOTHING = contextlib.nullcontext()


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
    mean_gate: float | None = None
    """Mean gate of the attention heads over the same tokens; None where the stage has no gate
    penalty."""


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


@dataclasses.dataclass(frozen=True)
class _Batch:
    """What this worker has of a step's batch."""

    samples: Samples
    start: int
    """Of its first sample within the batch."""
    step: int
    num_targets: int
    """Of the whole batch."""


class BatchStep:
    """Steps of one stage on one worker.

    What is lowered is the loss and, where the stage has a penalty, its multiple of the mean gate.
    Each is the mean over the predicted tokens of the whole batch, however it is divided: each
    part's sum is weighted by the batch's count, which is known before. Parts are summed as leaves
    of one tree (`parallel.tree`).
    """

    def __init__(
        self,
        model: Decoder | Encoder,
        parameters: Sequence[tuple[str, nn.Parameter]],
        optimizers: Sequence[Optimizer],
        stage: Stage,
        windows: Windows,
        *,
        world: World,
        transport: Transport,
        seed: int,
        objective: Objective | None = None,
    ) -> None:
        """Prepare the steps.

        Args:
            model: in training mode.
            parameters: those that are trained.
            optimizers: of them.
            stage: its batch, precision and schedule.
            windows: its data.
            world: the workers.
            transport: adds up over them.
            seed: of dropout.
            objective: what is lowered; None for the loss of the tokens.

        Raises:
            ConfigError: there are more workers than parts of a batch, or a layer of the exit loss
                is not before the model's end.
        """
        self._model, self._optimizers, self._stage, self._windows = (
            model,
            optimizers,
            stage,
            windows,
        )
        self._values = [value for _, value in parameters]
        self._objective = objective or NextTokens.of(stage, model, None)
        self._taught = np.array([source.target == "teacher" for source in stage.data])
        self._world, self._seed, self._transport = world, seed, transport
        self._is_early = stage.sends_early and world.size > 1
        # what is told, loss and mean gate, goes with the gradients, last
        self._num_told = 2 if stage.gate_penalty else 1
        summed = [*self._values, torch.zeros(self._num_told)]
        self._sums = EarlySum(transport, summed, in_background=self._is_early)
        self._parts = self._divide()

    @property
    def is_exact(self) -> bool:
        """Whether another number of workers would give the same bits."""
        count = math.ceil(self._stage.batch / self._micro_batch())
        return self._transport.is_exact and count & (count - 1) == 0

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
        batch = _Batch(samples, start, step, num_targets)
        *gradients, told = self._summed(batch)
        norm = self._apply(gradients, self._stage.schedule.factor(step, num_steps))
        loss, *gates = told.tolist()
        return StepResult(loss, norm, num_targets, samples, gates[0] if gates else None)

    def close(self) -> None:
        """End what works in the background."""
        self._sums.close()

    def _summed(self, batch: _Batch) -> list[Tensor]:
        """Return the gradients, and last what is told, over all parts of all workers."""
        tree, found = PairwiseSum(), dict[int, Tensor]()
        for part in self._parts[:-1]:
            told = self._backward(part, batch)
            tree.add([*map(_taken, self._values), told])

        def give(number: int, value: Tensor) -> None:
            found[number] = tree.finish(number, value)
            self._sums.give(number, found[number])

        with _handing_over(self._values if self._is_early else (), give):
            told = self._backward(self._parts[-1], batch)
        for number, value in enumerate(self._values):
            if number not in found:
                give(number, _taken(value))
        give(len(self._values), told)
        self._sums.finish()
        return [found[number] for number in range(len(found))]

    def _backward(self, part: tuple[int, int], batch: _Batch) -> Tensor:
        """Leave a part's gradients at the parameters, none where it has no targets, and return what
        it adds to the loss and, where there is a penalty, to the mean gate [1 or 2]."""
        first, stop = part
        samples, rows = batch.samples, slice(first - batch.start, stop - batch.start)
        counted = torch.from_numpy(samples.targets[rows])
        if not bool(counted.any()):
            return torch.zeros(self._num_told)
        work = Part(
            tokens=torch.from_numpy(samples.tokens[rows]),
            counted=counted,
            is_taught=torch.from_numpy(self._taught[samples.places.source[rows]]),
            step=batch.step,
        )
        # dropout depends on the part, not on who computes it
        torch.manual_seed((self._seed * 1_000_003 + batch.step) * 65_537 + first)
        is_bf16 = products_in(self._stage.precision) == torch.bfloat16
        watch = self._watch()
        with torch.autocast("cpu", torch.bfloat16, enabled=is_bf16), watch or _NOTHING:
            loss = self._objective.loss(self._model, work) / batch.num_targets
        if watch is None:
            loss.backward()
            return loss.detach().reshape(1)
        # the gates behind a prediction are those of the token before it
        gates = watch.by_token()[:, :-1][counted[:, 1:]].sum() / batch.num_targets
        (loss + self._stage.gate_penalty * gates).backward()
        return torch.stack((loss, gates)).detach()

    def _watch(self) -> GateWatch | None:
        if not self._stage.gate_penalty:
            return None
        assert isinstance(self._model, Decoder)
        return GateWatch(self._model)

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
        take_step(self._optimizers, self._stage.optimizer.rate * factor)
        return norm.item()


def take_step(optimizers: Sequence[Optimizer], rate: float) -> None:
    """Take a step of each optimizer at a rate, and forget the gradients."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()


def _taken(value: nn.Parameter) -> Tensor:
    """Take a parameter's gradient away from it; zeros where there is none."""
    gradient, value.grad = value.grad, None
    return torch.zeros_like(value) if gradient is None else gradient


@contextlib.contextmanager
def _handing_over(
    values: Sequence[nn.Parameter], give: Callable[[int, Tensor], None]
) -> Iterator[None]:
    """Give away each parameter's gradient, with its number, once a backward pass has it."""

    def hook(number: int, value: Tensor) -> None:
        assert value.grad is not None
        gradient, value.grad = value.grad, None
        give(number, gradient)

    hooks = [
        value.register_post_accumulate_grad_hook(functools.partial(hook, number))
        for number, value in enumerate(values)
    ]
    try:
        yield
    finally:
        for each in hooks:
            each.remove()
