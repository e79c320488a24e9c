"""Training with weights, gradients and moments in few bits, chosen for each parameter."""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from deepseek.errors import ConfigError, describe
from deepseek.optim.scale import LossScale
from deepseek.optim.storage import BLOCK, Kept, Noise, Storage, keep, stochastic

BYTES: Mapping[Storage, int] = {"float32": 4, "float16": 2, "bfloat16": 2, "float8": 2}
"""Of a weight, and of its gradient. float8 keeps moments; its weights are bfloat16."""
TABLE = ("parameter", "values", "storage", "bytes before", "bytes after", "gain", "why")
"""The columns of `MixedPrecisionTrainer.table`."""


@dataclasses.dataclass(frozen=True)
class Decision:
    """How one parameter is kept, and why."""

    name: str
    num_values: int
    storage: Storage
    why: str
    loss_change: float | None = None
    """Change of the sample's loss when the weight alone is rounded; None where it was not
    measured."""

    @property
    def bytes_before(self) -> int:
        """Of weight, gradient and two moments in float32."""
        return kept_bytes("float32", self.num_values)

    @property
    def bytes_after(self) -> int:
        """Of the same as they are kept."""
        return kept_bytes(self.storage, self.num_values)


class MixedPrecisionTrainer:
    """Takes the optimizer's steps over parameters that are kept in few bits.

    A parameter kept in float16 or bfloat16 has weight, gradient and moments of two bytes each, 8 in
    place of 16; in float8 a bfloat16 weight and moments of one byte. Steps are computed in float32,
    one parameter after another, by the optimizer that is given, and rounded stochastically.
    Products run in the dtype of autocast.

    Example:
        trainer = MixedPrecisionTrainer(
            model=model, optimizer=optimizer, fp16_params=["layers.*.weight"], loss_scale="dynamic"
        )
        loss = trainer.step(lambda: model(tokens, labels=tokens).loss)
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        optimizer: Optimizer,
        fp16_params: Sequence[str] | Literal["auto"] = (),
        bf16_params: Sequence[str] = (),
        fp8_params: Sequence[str] = (),
        loss_scale: float | Literal["dynamic"] = "dynamic",
        sample: Callable[[], Tensor] | None = None,
        tolerance: float = 1e-3,
        seed: int = 0,
    ) -> None:
        """Convert the parameters in place.

        Args:
            model: its parameters are float32.
            optimizer: of them, elementwise (AdamW, SGD, …), before its first step.
            fp16_params: patterns of names, or of their ends (`layers.*.weight`); or "auto": each
                parameter takes the fewest bits at which `sample` changes little.
            bf16_params, fp8_params: likewise. Where several match, fp8 goes before bf16 before
            fp16. loss_scale: a factor, or "dynamic". sample: gives the loss of a sample; needed by
            "auto". tolerance: largest share by which rounding one parameter may change the sample's
            loss. seed: of the roundings.

        Raises:
            ConfigError: a pattern matches nothing, or the arguments do not fit together.
        """
        self._model, self._optimizer = model, optimizer
        self._scale = LossScale(loss_scale)
        self._generator = torch.Generator().manual_seed(seed)
        self._parameters = _trained(model, optimizer)
        if fp16_params == "auto":
            if sample is None:
                must = 'given with fp16_params="auto"'
                raise ConfigError(describe("sample", "MixedPrecisionTrainer", must, None))
            self.decisions = _measured(self._parameters, sample, tolerance)
        else:
            rules: list[tuple[Storage, Sequence[str]]] = [
                ("float8", fp8_params), ("bfloat16", bf16_params), ("float16", fp16_params)
            ]  # fmt: skip
            self.decisions = _matched(self._parameters, rules)
        self._storages: dict[str, Storage] = {each.name: each.storage for each in self.decisions}
        self._moments: dict[str, dict[str, Any]] = {}
        noise = Noise(self._generator)
        for name, value in self._parameters.items():
            value.data = self._rounded(name, value.data, noise)

    @property
    def loss_scale(self) -> float:
        """The factor of the next step."""
        return self._scale.value

    @property
    def num_bytes(self) -> int:
        """Bytes of weights, their gradients, and the moments that are there."""
        weights = sum(value.nbytes for value in self._parameters.values())
        return 2 * weights + sum(
            _bytes_of(state) for states in self._moments.values() for state in states.values()
        )

    def step(self, loss: Callable[[], Tensor]) -> float:
        """Take a step, unless the gradients overflow; return the loss.

        Args:
            loss: runs the model and gives its loss; called once, under autocast in bfloat16.
        """
        with _computing(self._model, self._kept_ids()), torch.autocast("cpu", torch.bfloat16):
            found = loss()
        (found * self._scale.value).backward()
        overflowed = not all(
            bool(value.grad.isfinite().all())
            for value in self._parameters.values()
            if value.grad is not None
        )
        if not overflowed:
            self._update()
        for value in self._parameters.values():
            value.grad = None
        self._scale.update(overflowed)
        return found.item()

    def table(self) -> list[tuple[str, ...]]:
        """Return the columns of `TABLE` for each decision, and for all together.

        The gain is the share of the training's bytes that a decision saves. It is of memory alone:
        each step is computed in float32, and the roundings take time.
        """
        before = sum(each.bytes_before for each in self.decisions)
        after = sum(each.bytes_after for each in self.decisions)
        rows = [
            _row(each.name, each.num_values, each.storage, (each.bytes_before, each.bytes_after),
                 before, each.why)
            for each in self.decisions
        ]  # fmt: skip
        num_values = sum(each.num_values for each in self.decisions)
        return [*rows, _row("all", num_values, "", (before, after), before, "memory, not time")]

    def state_dict(self) -> dict[str, Any]:
        """Return moments, loss scale and random state; weights are the model's."""
        return {
            "moments": {name: dict(states) for name, states in self._moments.items()},
            "scale": self._scale.state_dict(),
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        self._moments = {name: dict(states) for name, states in state["moments"].items()}
        self._scale.load_state_dict(state["scale"])
        self._generator.set_state(state["generator"])

    def _kept_ids(self) -> set[int]:
        return {
            id(value)
            for name, value in self._parameters.items()
            if self._storages[name] != "float32"
        }

    def _update(self) -> None:
        """Step each parameter in float32 by itself, and keep what comes out."""
        noise = Noise(self._generator)
        with self._alone() as groups:
            for group, names in groups:
                for name in names:
                    self._update_one(group, name, noise)

    def _update_one(self, group: dict[str, Any], name: str, noise: Noise) -> None:
        value = self._parameters[name]
        if value.grad is None:
            return
        wide = nn.Parameter(value.data.float())
        wide.grad = value.grad.float() / self._scale.value
        group["params"] = [wide]
        known = self._moments.get(name, {})
        if known:
            self._optimizer.state[wide] = {key: _read(state) for key, state in known.items()}
        self._optimizer.step()
        group["params"] = []
        states = self._optimizer.state.pop(wide, {})
        self._moments[name] = {
            key: self._kept(name, wide, each, noise) for key, each in states.items()
        }
        value.data = self._rounded(name, wide.data, noise)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[list[tuple[dict[str, Any], list[str]]]]:
        """Yield the optimizer's groups, emptied, with the names of what was in them."""
        names = {id(value): name for name, value in self._parameters.items()}
        groups = self._optimizer.param_groups
        before = [group["params"] for group in groups]
        for group in groups:
            group["params"] = []
        try:
            yield [
                (group, [names[id(value)] for value in values if id(value) in names])
                for group, values in zip(groups, before, strict=True)
            ]
        finally:
            for group, values in zip(groups, before, strict=True):
                group["params"] = values

    def _kept(self, name: str, value: Tensor, state: Any, noise: Noise) -> Any:
        """Return a moment as it is kept; counters stay as they are."""
        if not isinstance(state, Tensor) or state.shape != value.shape:
            return state
        storage = self._storages[name]
        if storage == "float16":  # too little range for squares of gradients
            storage = "bfloat16"
        return keep(state, storage, noise)

    def _rounded(self, name: str, value: Tensor, noise: Noise) -> Tensor:
        storage = self._storages[name]
        if storage == "float32":
            return value
        dtype = torch.float16 if storage == "float16" else torch.bfloat16
        return stochastic(value.float(), dtype, noise)


@contextlib.contextmanager
def _computing(model: nn.Module, kept: set[int]) -> Iterator[None]:
    """Show the modules their kept parameters in the dtype that they compute in: matrices of
    products in bfloat16, as autocast would, everything else in float32. Gradients flow to what is
    kept."""
    shown: dict[tuple[int, torch.dtype], Tensor] = {}
    hidden: list[tuple[nn.Module, dict[str, nn.Parameter | None]]] = []
    for module in model.modules():
        whole = dict(module._parameters)
        hidden.append((module, whole))
        for name, value in whole.items():
            if value is None or id(value) not in kept:
                continue
            is_product = value.ndim > 1 and not isinstance(module, nn.Embedding)
            key = (id(value), torch.bfloat16 if is_product else torch.float32)
            if key not in shown:
                shown[key] = value.to(key[1])
            del module._parameters[name]
            vars(module)[name] = shown[key]
    try:
        yield
    finally:
        for module, whole in hidden:
            for name in whole.keys() - module._parameters.keys():
                del vars(module)[name]
            # all of them anew: their order is that of `named_parameters`
            module._parameters.clear()
            module._parameters.update(whole)


def kept_bytes(storage: Storage, num_values: int) -> int:
    """Return the bytes of a parameter's weight, gradient and two moments."""
    if storage == "float8":
        return num_values * 4 + 2 * (BLOCK + 4) * -(-num_values // BLOCK)
    return 4 * BYTES[storage] * num_values


def _row(
    name: str, num_values: int, storage: str, sizes: tuple[int, int], whole: int, why: str
) -> tuple[str, ...]:
    before, after = sizes
    gain = f"{100 * (before - after) / whole:.2f} %"
    return (name, str(num_values), storage, str(before), str(after), gain, why)


def _trained(model: nn.Module, optimizer: Optimizer) -> dict[str, nn.Parameter]:
    """Return the parameters that the optimizer has, by their names in the model."""
    owned = {id(value) for group in optimizer.param_groups for value in group["params"]}
    found = {name: value for name, value in model.named_parameters() if id(value) in owned}
    if len(found) != len(owned):
        must = "over parameters of the model"
        got = f"{len(owned) - len(found)} others"
        raise ConfigError(describe("optimizer", "MixedPrecisionTrainer", must, got))
    if optimizer.state:
        must = "new, before its first step"
        raise ConfigError(describe("optimizer", "MixedPrecisionTrainer", must, "one with state"))
    for name, value in found.items():
        if value.dtype != torch.float32:
            must = "float32"
            raise ConfigError(describe(name, "MixedPrecisionTrainer", must, str(value.dtype)))
    return found


def _matched(
    parameters: Mapping[str, nn.Parameter], rules: Sequence[tuple[Storage, Sequence[str]]]
) -> list[Decision]:
    used: set[str] = set()
    decisions = []
    for name, value in parameters.items():
        storage: Storage = "float32"
        why = "no pattern matches"
        for kind, patterns in reversed(rules):
            for pattern in patterns:
                if fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"*.{pattern}"):
                    used.add(pattern)
                    storage, why = kind, f"matches {pattern!r}"
        decisions.append(Decision(name, value.numel(), storage, why))
    for pattern in (pattern for _, patterns in rules for pattern in patterns):
        if pattern not in used:
            must, step = "a pattern that matches", f"Names look like {next(iter(parameters))!r}"
            owner = "MixedPrecisionTrainer"
            raise ConfigError(describe("pattern", owner, must, pattern, step))
    return decisions


def _measured(
    parameters: Mapping[str, nn.Parameter], sample: Callable[[], Tensor], tolerance: float
) -> list[Decision]:
    """Disturb each parameter by itself, and give it the fewest bits that the sample allows."""
    with torch.no_grad():
        base = sample().item()
        decisions = []
        for name, value in parameters.items():
            decisions.append(_least(name, value, sample, base, tolerance))
        return decisions


def _least(
    name: str, value: nn.Parameter, sample: Callable[[], Tensor], base: float, tolerance: float
) -> Decision:
    whole, change = value.data, 0.0
    tried: list[tuple[Storage, torch.dtype]] = [
        ("bfloat16", torch.bfloat16), ("float16", torch.float16)
    ]  # fmt: skip
    for storage, dtype in tried:
        value.data = _disturbed(whole, dtype)
        change = sample().item() - base
        value.data = whole
        if abs(change) <= tolerance * abs(base):
            why = f"rounding it changes the loss by {change:+.1e}"
            return Decision(name, value.numel(), storage, why, change)
    why = f"16 bits change the loss by {change:+.1e}"
    return Decision(name, value.numel(), "float32", why, change)


def _disturbed(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return values moved by up to half a level and rounded.

    Rounding alone would change nothing where the weights come from a file of few bits; the first
    step takes them off its levels.
    """
    chances = torch.rand(values.shape, generator=torch.Generator().manual_seed(0))
    moved = values * (1 + (chances - 0.5) * torch.finfo(dtype).eps)
    return moved.to(dtype).float()


def _read(state: Any) -> Any:
    return state.read() if isinstance(state, Kept) else state


def _bytes_of(state: Any) -> int:
    if isinstance(state, Kept):
        return state.num_bytes
    return state.nbytes if isinstance(state, Tensor) else 0
