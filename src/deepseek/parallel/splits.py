"""Split tables: how each part of a model is divided along the mesh, as data.

A table is a list of rules, read from the top; the first whose pattern matches the name of a module
says what becomes of it. Every module that has parameters must be named: one that nobody thought of
would be computed whole on every process, and be wrong in silence behind a divided one.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Mapping, Sequence
from typing import Literal

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)

from deepseek.errors import ConfigError, describe
from deepseek.parallel.experts import split_experts
from deepseek.parallel.mesh import Grid

How = Literal[
    "column", "row", "vocab", "experts", "heads", "whole", "entry", "forked", "behind a fork"
]
MEANINGS: Mapping[How, str] = {
    "column": "a linear layer by its outputs, which stay where they are computed",
    "row": "a linear layer by its inputs; its outputs are added up, and then whole",
    "vocab": "an embedding or head by the words of the vocabulary",
    "experts": "stacked weights by their first dimension, the experts",
    "heads": "not divided, but applied to divided heads: its gradient is added up",
    "whole": "not divided, and computed alike on every process",
    "entry": "a module without parameters of its own whose columns read one input: its gradient is "
    "added up once for all of them",
    "forked": "not divided, but its outputs go to divided heads; their gradient is added up",
    "behind a fork": "as a column whose input comes from a fork, where its gradient is added up",
}


_COLUMNS = ("column", "behind a fork")


@dataclasses.dataclass(frozen=True)
class Rule:
    """How the modules whose names match a pattern are divided."""

    pattern: str
    """As a shell's: `*` stands for anything, dots included."""
    how: How


SplitTable = Sequence[Rule]


def how_of(table: SplitTable, name: str) -> How | None:
    """Return what a table says of a module; None where it does not name it."""
    for rule in table:
        if fnmatch.fnmatchcase(name, rule.pattern):
            return rule.how
    return None


def split_model(model: nn.Module, table: SplitTable, grid: Grid) -> dict[str, tuple[str, ...]]:
    """Divide a model in place along the axes `tensor` and `expert`.

    Divided parameters become DTensors, whose `full_tensor()` is the whole; parameters that were one
    stay one. Every process must hold the same weights before.

    Args:
        model: whole.
        table: of its modules.
        grid: the mesh.

    Returns:
        For each parameter the axes along which its gradient is still to be added up.

    Raises:
        ConfigError: a module has parameters and no rule, or one that its shape does not allow.
    """
    hows = _hows(model, table, grid)
    ties = _ties(model)
    if grid.size("tensor") > 1:
        for name, how in hows.items():
            _hook(model.get_submodule(name), how, grid)
        plan = {name: style for name, how in hows.items() if (style := _style(model, name, how))}
        parallelize_module(model, grid.along("tensor"), plan, src_data_rank=None)
    for name, how in hows.items():
        if how == "experts":
            split_experts(model.get_submodule(name), grid)
    for first, *others in ties:
        for other in others:
            _assign(model, other, model.get_parameter(first))
    return {name: _axes_of(hows[name.rpartition(".")[0]]) for name, _ in model.named_parameters()}


def _axes_of(how: How) -> tuple[str, ...]:
    if how == "experts":
        return ("data",)
    return ("data", "expert", "tensor") if how == "heads" else ("data", "expert")


def _hows(model: nn.Module, table: SplitTable, grid: Grid) -> dict[str, How]:
    found: dict[str, How] = {}
    for name, module in model.named_modules():
        how = how_of(table, name)
        if not any(True for _ in module.parameters()):
            continue  # another stage has it
        if how is not None:
            found[name] = how
        elif any(True for _ in module.parameters(recurse=False)):
            step = "Train it with a mesh of data and shard alone"
            raise ConfigError(describe(name, "the split table", "a name that it has", name, step))
    for name, how in found.items():
        _check(model.get_submodule(name), name, how, grid)
    return found


def _check(module: nn.Module, name: str, how: How, grid: Grid) -> None:
    """Refuse what a rule does not fit."""
    tensor, both = grid.size("tensor"), grid.size("tensor") * grid.size("expert")
    kinds = {each: nn.Linear for each in (*_COLUMNS, "row", "forked")}
    kinds |= {"vocab": (nn.Linear, nn.Embedding)}
    if how in kinds and not isinstance(module, kinds[how]):
        must = f"a linear layer to be split by {how!r}"
        raise ConfigError(describe(name, "the model", must, type(module).__name__))
    if how in (*_COLUMNS, "row"):
        assert isinstance(module, nn.Linear)
        count = module.in_features if how == "row" else module.out_features
        if count % tensor:
            must = f"of a number of channels that {tensor} processes can share"
            raise ConfigError(describe(name, "the model", must, count, "Take another mesh"))
    if how == "experts":
        for weight in module.parameters(recurse=False):
            if weight.shape[0] % both:
                must = f"of a number of experts that {both} processes can share"
                raise ConfigError(describe(name, "the model", must, weight.shape[0]))


def _style(model: nn.Module, name: str, how: How) -> ParallelStyle | None:
    if how in _COLUMNS:
        return ColwiseParallel()
    if how == "row":
        return RowwiseParallel()
    if how != "vocab":
        return None
    if isinstance(model.get_submodule(name), nn.Embedding):
        return RowwiseParallel(input_layouts=Replicate())
    return ColwiseParallel(output_layouts=Replicate())


def _hook(module: nn.Module, how: How, grid: Grid) -> None:
    """Set where the gradients of inputs or outputs are added up, if not in each column."""
    mesh = grid.along("tensor")
    whole, parts = [Replicate()], [Partial()]

    def enter(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[object, ...]:
        return DTensor.from_local(inputs[0], mesh, whole, run_check=False), *inputs[1:]

    def enter_behind(_: nn.Module, inputs: tuple[Tensor, ...]) -> DTensor:
        return DTensor.from_local(inputs[0], mesh, whole, run_check=False, grad_placements=parts)

    def fork(_: nn.Module, inputs: object, output: Tensor) -> Tensor:
        entered = DTensor.from_local(output, mesh, whole, run_check=False)
        return entered.to_local(grad_placements=parts)

    if how == "entry":
        module.register_forward_pre_hook(enter)
    elif how == "behind a fork":
        module.register_forward_pre_hook(enter_behind)
    elif how == "forked":
        module.register_forward_hook(fork)


def _ties(model: nn.Module) -> list[list[str]]:
    """Return the names of each parameter that has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [each for each in names.values() if len(each) > 1]


def _assign(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, last = name.rpartition(".")
    model.get_submodule(owner).register_parameter(last, parameter)
