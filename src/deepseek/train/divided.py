"""Training of a model that is divided over the workers: its steps, and the whole for its bundle."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from deepseek.data import Samples, Windows
from deepseek.errors import ConfigError, describe
from deepseek.models import Decoder
from deepseek.models.divided import DividedDecoder
from deepseek.models.splits import check_mesh
from deepseek.ops.cross_entropy import IGNORED
from deepseek.ops.hardware import products_in
from deepseek.parallel import Exact, GradientSum, Grid, World, gradient_of, local_of, whole_state
from deepseek.train.config import Run, Stage
from deepseek.train.step import StepResult, choose_parameters, take_step


def divide(run: Run, model: Decoder, world: World) -> DividedDecoder | None:
    """Divide a model in place as a run's mesh says; None where every worker keeps the whole.

    Raises:
        ConfigError: the mesh does not fit the workers, the model or the run's stages.
    """
    mesh = run.mesh.sized(world.size)
    if not mesh.is_divided:
        return None
    check_mesh(model.config, mesh)
    for stage in run.stages:
        _check_stage(stage)
    return DividedDecoder(model, Grid(mesh, world))


def _check_stage(stage: Stage) -> None:
    """Refuse what divided models cannot do yet."""
    owner, step = f"stage {stage.name!r} over a mesh", "Leave the mesh out"
    if stage.adapter is not None:
        raise ConfigError(describe("adapter", owner, "left out", stage.adapter, step))
    if any(source.target == "teacher" for source in stage.data):
        raise ConfigError(describe("target", owner, "'tokens'", "teacher", step))
    if stage.exit_loss is not None:
        raise ConfigError(describe("exit_loss", owner, "left out", stage.exit_loss, step))
    if stage.gate_penalty:
        raise ConfigError(describe("gate_penalty", owner, "0", stage.gate_penalty, step))
    if stage.start_share:
        raise ConfigError(describe("start_share", owner, "0", stage.start_share, step))
    if not isinstance(stage.transport, Exact):
        raise ConfigError(describe("transport", owner, "exact", stage.transport.kind, step))


def choose_divided(
    divided: DividedDecoder, patterns: Sequence[str]
) -> list[tuple[str, nn.Parameter]]:
    """Return this worker's part of the parameters that are trained, by name; maybe none.

    Raises:
        ConfigError: a pattern matches nothing in the whole model.
    """
    names = {name for name, _ in choose_parameters(divided.whole, patterns)}
    # Between stages, and in what FSDP gathers, a gradient must flow whatever is trained.
    flows = divided.grid.size("pipeline") * divided.grid.size("shard") > 1
    for name, value in divided.named_parameters():
        value.requires_grad_(flows or name in names)
    return [(name, value) for name, value in divided.named_parameters() if name in names]


def whole_decoder(divided: DividedDecoder) -> Decoder:
    """Return the whole model on the first worker, and this worker's part on the others; all call it
    together."""
    part = divided.decoder
    state = whole_state(part, divided.grid)
    if not state:
        return part
    with torch.device("meta"):
        whole = Decoder(part.config, planner=part.planner)
    whole.load_state_dict(state, assign=True)
    if part.config.tie_embeddings:
        whole.lm_head.weight = whole.model.embed_tokens.weight
    whole.tokenizer, whole.bundle = part.tokenizer, part.bundle
    return whole.eval()


class DividedStep:
    """Steps of one stage on one worker of a mesh: what `BatchStep` is where each has the whole."""

    def __init__(
        self,
        divided: DividedDecoder,
        parameters: Sequence[tuple[str, nn.Parameter]],
        optimizers: Sequence[Optimizer],
        stage: Stage,
        windows: Windows,
    ) -> None:
        """Prepare the steps; every worker does so together.

        Args:
            divided: its decoder in training mode.
            parameters: this worker's part of those that are trained.
            optimizers: of them.
            stage: its batch, precision and schedule.
            windows: its data.

        Raises:
            ConfigError: the batch cannot be shared out in equal parts.
        """
        self._divided, self._optimizers = divided, optimizers
        self._stage, self._windows = stage, windows
        self._values = [value for _, value in parameters]
        self._sums = GradientSum(divided.grid, parameters, divided.axes)
        self._share, self._num_parts = self._divide()
        divided.stage.products = products_in(stage.precision)

    def _divide(self) -> tuple[int, int]:
        """Return this worker's samples of a batch, and in how many parts it runs them."""
        grid, batch = self._divided.grid, self._stage.batch
        readers, stages = grid.reader.size, grid.size("pipeline")
        if batch % readers:
            must = f"a multiple of the {readers} workers that read samples of their own"
            raise ConfigError(describe("batch", "the stage", must, batch))
        share = batch // readers
        size = self._stage.micro_batch or max(1, share // stages)
        if share % size or share // size < stages:
            must = f"a divisor of a worker's {share} samples, into at least {stages} parts"
            step = "Take a larger batch or a smaller micro_batch"
            raise ConfigError(describe("micro_batch", "the stage", must, size, step))
        return share, share // size

    def run(self, step: int, num_steps: int) -> StepResult:
        """Do a step.

        Args:
            step: of the stage, from 0.
            num_steps: of the stage, for the schedule.
        """
        first, grid = step * self._stage.batch, self._divided.grid
        samples = self._windows.read(first + grid.reader.rank * self._share, self._share)
        num_targets = self._windows.num_targets(first, self._stage.batch)
        if num_targets == 0:
            must = "some tokens to predict in every batch"
            raise ConfigError(describe("batch", f"step {step}", must, 0, "Take a larger batch"))
        loss, gradients = self._gradients(samples, num_targets)
        norm = self._apply(gradients, self._stage.schedule.factor(step, num_steps))
        return StepResult(loss, norm, num_targets, samples)

    def close(self) -> None:
        """Do nothing: nothing works in the background."""

    def _gradients(self, samples: Samples, num_targets: int) -> tuple[float, list[Tensor]]:
        """Return the loss of the batch, and the gradients as this worker holds them."""
        tokens = torch.from_numpy(samples.tokens)
        labels = torch.where(torch.from_numpy(samples.targets), tokens, IGNORED)
        loss = self._divided.backward(tokens, labels, self._num_parts, 1 / num_targets)
        gradients = [gradient_of(value) for value in self._values]
        for _, value in self._divided.named_parameters():
            value.grad = None
        self._sums(gradients)
        self._divided.grid.sum([loss], ("pipeline", "data", "expert", "shard"))
        return loss.item(), gradients

    def _apply(self, gradients: Sequence[Tensor], factor: float) -> float:
        """Take the step and return the norm of the gradient; leave all as it is where that is not
        finite."""
        norm, longest = self._sums.norm(gradients).item(), self._stage.max_grad_norm
        if not math.isfinite(norm):
            return norm
        for value, gradient in zip(self._values, gradients, strict=True):
            if longest is not None and norm > longest:
                local_of(gradient).mul_(longest / (norm + 1e-6))
            value.grad = gradient
        take_step(self._optimizers, self._stage.optimizer.rate * factor)
        return norm
