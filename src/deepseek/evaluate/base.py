"""The seam of this room: what a model and a tokenizer must offer to be measured."""

from __future__ import annotations

import platform
import shlex
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from deepseek.errors import ConfigError, DeepseekError, ShapeError, describe

Progress = Callable[[str, float | None], None]
"""Called with what is being done and the share that is done (0 to 1, None when unknown)."""

Condition = str | int | float | bool | None
"""A value among the conditions of a Measurement."""

ROWS_PER_SLICE = 256
"""Rows of logits held in fp32 at a time: 256 x vocabulary x 4 bytes, whatever the window."""


class HasLogits(Protocol):
    """What a model returns: an object with the logits of every position."""

    logits: Tensor


class CausalModel(Protocol):
    """A callable from token ids to next-token logits.

    Our `Decoder`, a model of transformers, or a function. Contract: `input_ids` [B, T] int64 on
    the model's device gives `.logits` [B, T, V], or that tensor itself; the logits at a position
    depend on no later position; `attention_mask` [B, T] is passed only when a row is padded on its
    right. `get_output_embeddings()`, where it is there, gives the head, and only the positions
    that are wanted go through it.
    """

    def __call__(
        self, input_ids: Tensor, attention_mask: Tensor | None = None
    ) -> HasLogits | Tensor: ...


class TextTokenizer(Protocol):
    """The part of a tokenizer that is used here; ours and those of transformers have it."""

    @property
    def bos_token_id(self) -> int | None:
        """The token that begins a text, if there is one."""

    @property
    def eos_token_id(self) -> int | None:
        """The token that ends a text, if there is one."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return a text as tokens."""
        ...

    def decode(self, ids: list[int], *, skip_special_tokens: bool = True) -> str:
        """Return tokens as text."""
        ...


def tokenizer_of(model: CausalModel, given: TextTokenizer | None, owner: str) -> TextTokenizer:
    """Return the tokenizer given, or else the model's own.

    Raises:
        ConfigError: there is neither.
    """
    tokenizer = given if given is not None else getattr(model, "tokenizer", None)
    if tokenizer is None:
        step = "Pass tokenizer=..., or load a bundle that has a tokenizer.json"
        raise ConfigError(
            describe("tokenizer", owner, "given or attached to the model", None, step)
        )
    return tokenizer


def max_positions_of(model: CausalModel) -> int | None:
    """Return how many tokens the model was made for; None when its configuration is silent."""
    config = getattr(model, "config", None)
    for field in ("max_positions", "max_position_embeddings", "n_positions"):
        value = getattr(config, field, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def device_of(model: CausalModel) -> torch.device:
    """Return the device that the model's first parameter is on; the CPU for a plain function."""
    if isinstance(model, nn.Module):
        for parameter in model.parameters():
            return parameter.device
    return torch.device("cpu")


def address_of(model: CausalModel) -> str | None:
    """Return the name or folder the model came from; None for one made in memory."""
    bundle = getattr(model, "bundle", None)
    if bundle is not None:
        path = Path(bundle.path)
        return path.name if _is_stored(path) else str(path)
    address = getattr(getattr(model, "config", None), "_name_or_path", None)
    return address or None


def _is_stored(path: Path) -> bool:
    """Return whether a folder's own name is enough to find it in the store."""
    from deepseek.hub import resolve

    try:
        return resolve(path.name) == path
    except DeepseekError:
        return False


def model_conditions(model: CausalModel) -> dict[str, Condition]:
    """Return what must be known of model and machine to read a figure."""
    address = address_of(model)
    bundle = getattr(model, "bundle", None)
    conditions: dict[str, Condition] = {
        "model": bundle.card.name
        if bundle is not None
        else Path(address).name
        if address
        else type(model).__name__,
        "implementation": type(model).__module__.split(".")[0],
    }
    if isinstance(model, nn.Module):
        parameters = list(model.parameters())
        conditions["parameters"] = sum(parameter.numel() for parameter in parameters)
        if parameters:
            conditions["dtype"] = str(parameters[0].dtype).removeprefix("torch.")
    conditions["device"] = str(device_of(model))
    conditions["threads"] = torch.get_num_threads()
    conditions["torch"] = str(torch.__version__)
    conditions["machine"] = platform.machine()
    return conditions


def repeat_command(
    model: CausalModel, task: str, flags: Mapping[str, object], *, repeatable: bool = True
) -> str:
    """Return the command line that repeats a measurement.

    Args:
        model: what was measured; `MODEL` stands for one that was made in memory.
        task: the name after `--tasks`.
        flags: option names with underscores and their values; None and False leave an option out.
        repeatable: False when the data were handed over in Python and no file holds them: the
            command is empty.
    """
    if not repeatable:
        return ""
    address = address_of(model)
    words = ["deepseek", "eval", address or "MODEL", "--tasks", task]
    dtype = getattr(model, "dtype", None)
    if address is not None and dtype is not None:
        words += ["--dtype", str(dtype).removeprefix("torch.")]
    for name, value in flags.items():
        if value is None or value is False:
            continue
        words.append("--" + name.replace("_", "-"))
        if value is not True:
            words.extend(map(str, value) if isinstance(value, list | tuple) else [str(value)])
    return shlex.join(words)


@contextmanager
def measuring(model: CausalModel) -> Iterator[None]:
    """Run the body in evaluation mode without gradients, then put the mode back."""
    was_training = isinstance(model, nn.Module) and model.training
    if isinstance(model, nn.Module):
        model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        if isinstance(model, nn.Module):
            model.train(was_training)


def position_logits(
    model: CausalModel, input_ids: Tensor, first: int, attention_mask: Tensor | None = None
) -> Tensor:
    """Return the logits [B, T - first, V] of the positions from `first` on.

    Args:
        model: see `CausalModel`.
        input_ids: [B, T] int64.
        first: first position that is wanted; logits before it are not even computed where the
            model has a head of its own.
        attention_mask: [B, T], 0 = padding on the right; None when no row is padded.

    Raises:
        ShapeError: the model returned something that is not [B, T, V].
    """
    head, length = _head_of(model), input_ids.shape[1]
    if head is None:
        return _checked_logits(model, input_ids, attention_mask, length - first)

    def keep_last(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        return (inputs[0][:, first:],) if inputs[0].shape[1] == length else None

    with _before(head, keep_last):
        return _checked_logits(model, input_ids, attention_mask, length - first)


def logit_slices(model: CausalModel, input_ids: Tensor, first: int) -> Iterator[Tensor]:
    """Yield the logits [up to 256, V] that predict the tokens after `first`, row after row.

    Together they are positions `first` to T - 2 of row 0, then of row 1, and so on. The head runs
    on one slice at a time, so the memory needed does not grow with the window. Where a model does
    more after its head than the head's product (a soft cap), or hides its head, all its logits of
    these positions are computed at once and then sliced.

    Args:
        model: see `CausalModel`.
        input_ids: [B, T] int64, no padding.
        first: 0 to T - 2.

    Raises:
        ShapeError: the model returned something that is not [B, T, V].
    """
    head = _head_of(model)
    states = None if head is None else _states_before(head, model, input_ids)
    if head is None or states is None:
        logits = position_logits(model, input_ids, first)[:, :-1].flatten(0, 1)
        yield from logits.split(ROWS_PER_SLICE)
        return
    for rows in states[:, first:-1].flatten(0, 1).split(ROWS_PER_SLICE):
        yield head(rows)


def _states_before(head: nn.Module, model: CausalModel, input_ids: Tensor) -> Tensor | None:
    """Return what enters the head [B, T, hidden]; None if its product alone is not the logits."""
    seen: list[Tensor] = []

    def keep_states(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        seen.append(inputs[0])
        return (inputs[0][:, -1:],)

    with _before(head, keep_states):
        last = _checked_logits(model, input_ids, None, 1)
    if len(seen) != 1 or seen[0].shape[:2] != input_ids.shape:
        return None
    return seen[0] if torch.equal(head(seen[0][:, -1:]).to(last.dtype), last) else None


def _checked_logits(
    model: CausalModel, input_ids: Tensor, attention_mask: Tensor | None, wanted: int
) -> Tensor:
    output = model(input_ids) if attention_mask is None else model(input_ids, attention_mask)
    logits = output if isinstance(output, Tensor) else output.logits
    if logits.ndim != 3 or logits.shape[0] != input_ids.shape[0] or logits.shape[1] < wanted:
        must = f"logits [{input_ids.shape[0]}, {input_ids.shape[1]}, vocabulary]"
        raise ShapeError(describe("output", type(model).__name__, must, tuple(logits.shape)))
    return logits[:, -wanted:]


def _head_of(model: CausalModel) -> nn.Module | None:
    """Return the module that turns states into logits, by the name that transformers gave it."""
    ask = getattr(model, "get_output_embeddings", None) if isinstance(model, nn.Module) else None
    head = ask() if callable(ask) else None
    return head if isinstance(head, nn.Module) else None


@contextmanager
def _before(head: nn.Module, hook: Callable[..., tuple[Tensor, ...] | None]) -> Iterator[None]:
    handle = head.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def target_scores(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log-likelihood and the rank of each target token.

    The softmax is taken in fp32, `ROWS_PER_SLICE` rows at a time.

    Args:
        logits: [N, V].
        targets: [N] int64.

    Returns:
        log-likelihoods [N] fp64 in nats, and ranks [N] int64: how many tokens are more likely; 0 =
        the greedy choice (ties count in the target's favour only against tokens of a higher id, as
        argmax does).
    """
    scores, ranks = [], []
    for begin in range(0, len(targets), ROWS_PER_SLICE):
        rows = logits[begin : begin + ROWS_PER_SLICE].float()
        wanted = targets[begin : begin + ROWS_PER_SLICE].to(rows.device)[:, None]
        chosen = rows.gather(1, wanted)
        scores.append((chosen - rows.logsumexp(dim=1, keepdim=True)).squeeze(1).double().cpu())
        ahead = torch.arange(rows.shape[1], device=rows.device) < wanted
        ranks.append(((rows > chosen) | ((rows == chosen) & ahead)).sum(dim=1).cpu())
    if not scores:
        return torch.empty(0, dtype=torch.float64), torch.empty(0, dtype=torch.int64)
    return torch.cat(scores), torch.cat(ranks)
