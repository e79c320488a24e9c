"""Pipeline parallelism: each process runs the stage it holds, on one part of a batch after
another."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from deepseek.errors import ConfigError, describe
from deepseek.parallel.mesh import Grid

Order = Literal["1f1b", "gpipe"]
"""Of passes: `1f1b` holds the activations of as many parts as there are stages, `gpipe` of all."""


class Pipeline:
    """Runs forward and backward passes of a model whose stages lie along the axis `pipeline`."""

    def __init__(
        self,
        stage: nn.Module,
        grid: Grid,
        *,
        shape: tuple[int, int, int],
        num_parts: int,
        order: Order = "1f1b",
    ) -> None:
        """Prepare the passes.

        Args:
            stage: this process's; takes tokens or states, and in the last stage labels, and returns
                states or, in the last stage, the sum of the losses [1].
            grid: the mesh.
            shape: rows and tokens of a part, and channels of the states between stages.
            num_parts: of a batch.
            order: of the passes.

        Raises:
            ConfigError: there are fewer parts than stages.
        """
        # It brings PyTorch's compiler along, which nobody pays for who has no pipeline.
        from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

        rows, length, _ = shape
        place, count = grid.place("pipeline"), grid.size("pipeline")
        if num_parts < count:
            must = f"at least {count}, one for each stage of the pipeline"
            step = "Take a larger batch or a smaller micro_batch"
            raise ConfigError(describe("parts", "a process's batch", must, num_parts, step))
        states = torch.empty(shape, device="meta", requires_grad=True)
        tokens = torch.empty(rows, length, dtype=torch.int64, device="meta")
        total = torch.empty(1, device="meta", requires_grad=True)
        self._is_first, self._is_last = place == 0, place == count - 1
        self._factor = 1.0
        made = PipelineStage(
            stage,
            place,
            count,
            torch.device("cpu"),
            input_args=tokens if self._is_first else states,
            output_args=total if self._is_last else states,
            group=grid.group("pipeline"),
        )
        kind = Schedule1F1B if order == "1f1b" else ScheduleGPipe
        self._schedule = kind(made, num_parts, loss_fn=self._scaled, scale_grads=False)

    def run(self, tokens: Tensor, labels: Tensor, factor: float) -> Tensor:
        """Run a batch; gradients are added to those of the parameters. Return its loss on the last
        stage, zero on the others, float32 [1].

        Args:
            tokens: int64 [parts * rows, T], alike on every stage.
            labels: int64, likewise.
            factor: of the sum of the losses.
        """
        self._factor = factor
        if not self._is_last:
            self._schedule.step(*([tokens] if self._is_first else []))
            return torch.zeros(1)
        losses: list[Tensor] = []
        self._schedule.step(target=labels, losses=losses, labels=labels)
        return torch.stack([loss.detach() for loss in losses]).sum().reshape(1)

    def _scaled(self, total: Tensor, _: Tensor) -> Tensor:
        return total.sum() * self._factor
