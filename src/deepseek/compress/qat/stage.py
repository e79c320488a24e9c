"""Quantization-aware training: weights move until what they are rounded to predicts as before."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from deepseek.compress.distil.imitation import Imitation, ImitationLoss
from deepseek.compress.learning import Learning, learn, open_teacher
from deepseek.compress.qat.fake import fake_quantize, quantize_on
from deepseek.compress.qat.grid import Grid, fitted, read_grids, write_grids
from deepseek.compress.quantize.stage import Quantize
from deepseek.compress.stage import Stage, kind_of
from deepseek.compress.work import Outcome, Work
from deepseek.errors import ConfigError, describe
from deepseek.models import Decoder, Encoder
from deepseek.ops.quantized import QuantizedWeight
from deepseek.records import Measurement
from deepseek.train import Objective, Part

SCALES = "scales"
"""Name of the list of scales that stands in the model while it learns."""
_GRIDS = "grids.safetensors"
_EMBEDDINGS = ("model.embed_tokens.weight", "embeddings.word_embeddings.weight", "lm_head.weight")


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizeAware(Learning):
    """Puts weights on a grid and trains them there to imitate the float model.

    Behind a stage that quantized, bits, groups and zero points stay, and codes and scales move.
    """

    puts_on_grid: ClassVar[bool] = True
    keeps_grid: ClassVar[bool] = True

    kind: Literal["qat"] = "qat"
    grid: Grid = dataclasses.field(default_factory=Grid)
    """Of the layers' matrices; not used where weights lie on one already."""
    embedding: Grid | None = dataclasses.field(
        default_factory=lambda: Grid(bits=8, group=None, is_symmetric=True)
    )
    """Of the embedding of the tokens and of the head, likewise; None to leave them as they are."""
    scales: Literal["learned", "fixed"] = "learned"
    imitation: Imitation = dataclasses.field(default_factory=Imitation)
    """What of the teacher, with which weights."""
    steps: int = 200

    def why_not_after(self, before: Sequence[Stage]) -> str | None:
        """Return why it cannot follow these stages, or None where it can."""
        if any(isinstance(stage, Quantize) and stage.rotate for stage in before):
            return "the grid is rotated by then, and this stage trains on none that is"
        return super().why_not_after(before)


def quantize_aware(stage: QuantizeAware, work: Work) -> Outcome:
    """Train the model of `work` on its grid and leave it there; a killed stage goes on in the
    folder of `work` and ends with the same bits.

    Raises:
        ConfigError: as `distil`, groups that do not divide a matrix, or grids that are rotated.
        FormatError: as `distil`.
        CapacityError: as `distil`.
        Interrupted: as `distil`.
    """
    if any(each.is_rotated for each in work.quantized.values()):
        must, step = "not rotated", "Quantize it with rotate: false"
        raise ConfigError(describe("grid", kind_of(stage), must, "rotated", step))
    teacher = open_teacher(stage, work)
    start = dict(work.quantized) or first_grids(work.model, stage)
    path = work.folder / _GRIDS
    learning = OnGrid(
        ImitationLoss(stage.imitation, teacher, work.seed),
        start,
        learns_scales=stage.scales == "learned",
        path=path,
    )
    found = learn(stage, work, learning, teacher)
    grids = {
        name: dataclasses.replace(grid, input_scale=start[name].input_scale)
        for name, grid in read_grids(path).items()
    }
    work.set_quantized(grids)
    moved = sum(int((grids[name].codes != each.codes).sum()) for name, each in start.items())
    share = Measurement(
        name="moved_codes",
        value=moved / sum(each.codes.numel() for each in start.values()),
        unit="1",
        conditions={"steps": stage.steps, "scales": stage.scales},
    )
    return (*found, share)


def first_grids(model: Decoder | Encoder, stage: QuantizeAware) -> dict[str, QuantizedWeight]:
    """Return the weights that a stage puts on grids, on those with which it begins.

    Raises:
        ConfigError: a stage's groups do not divide a matrix.
    """
    linear = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not name.endswith("head_gate")
    }
    found = {}
    for name, value in model.named_parameters():
        grid = stage.embedding if name in _EMBEDDINGS else stage.grid
        if grid is not None and (name in linear or name in _EMBEDDINGS):
            found[name] = fitted(value.detach(), grid)
    return found


class OnGrid:
    """The objective of a model whose weights are rounded in every pass."""

    def __init__(
        self,
        inner: Objective,
        start: Mapping[str, QuantizedWeight],
        *,
        learns_scales: bool,
        path: Path,
    ) -> None:
        """Prepare it.

        Args:
            inner: what is lowered.
            start: the grids, by names of parameters.
            learns_scales: whether their scales are trained.
            path: the file that gets the grids at the end.
        """
        self._inner, self._start, self._path = inner, start, path
        self._learns = learns_scales

    def begin(self, model: Decoder | Encoder) -> None:
        """Give the model the scales that it learns."""
        self._inner.begin(model)
        self._rounded = _Rounded(model, self._inner)
        if self._learns:
            # flat, so that no optimizer takes them for matrices that decay
            values = (nn.Parameter(each.scale.flatten()) for each in self._start.values())
            model.add_module(SCALES, nn.ParameterList(values))

    def loss(self, model: Decoder | Encoder, part: Part) -> Tensor:
        """Return what the inner objective gives with rounded weights."""
        values = {
            f"model.{name}": fake_quantize(model.get_parameter(name), scale, grid.zero, grid.bits)
            for name, (grid, scale) in self._grids(model).items()
        }
        loss: Tensor = torch.func.functional_call(self._rounded, values, (part,))
        return loss

    def end(self, model: Decoder | Encoder) -> None:
        """Put the weights where they are rounded to, and write the grids."""
        with torch.no_grad():
            found = {
                name: quantize_on(model.get_parameter(name), scale, grid.zero, grid.bits)
                for name, (grid, scale) in self._grids(model).items()
            }
            for name, weight in found.items():
                model.get_parameter(name).copy_(weight.values())
        write_grids(self._path, found)
        if self._learns:
            delattr(model, SCALES)
        self._inner.end(model)

    def _grids(self, model: Decoder | Encoder) -> dict[str, tuple[QuantizedWeight, Tensor]]:
        """Return the grid that each weight began with, and its scales as they are now."""
        if not self._learns:
            return {name: (grid, grid.scale) for name, grid in self._start.items()}
        learned = getattr(model, SCALES)
        return {
            name: (grid, scale.view_as(grid.scale))
            for (name, grid), scale in zip(self._start.items(), learned, strict=True)
        }


class _Rounded(nn.Module):
    """A model and what is asked of it as one module, whose weights can be put in for a call."""

    def __init__(self, model: Decoder | Encoder, inner: Objective) -> None:
        super().__init__()
        self.model, self._inner = model, inner

    def forward(self, part: Part) -> Tensor:
        return self._inner.loss(self.model, part)
