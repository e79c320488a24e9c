"""A decoder of PyTorch modules in the token loop: through an engine where it has one, or else
through its own forward pass.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from deepseek.errors import ConfigError, describe
from deepseek.generate import flat
from deepseek.generate.batch import Batch, EngineBatch, RowLike, row_generator
from deepseek.generate.engine import Engine, Rows, Weights, build_engine, forms_as_stored
from deepseek.generate.memory import Memory
from deepseek.generate.prefill import make_room, prefill
from deepseek.models.decoder import Decoder, DecoderLayer, DecoderStack
from deepseek.models.early_exit import check_exits, forward_with_exits
from deepseek.models.exits import Exits
from deepseek.models.layers import (
    Attention,
    Experts,
    ExpertWeights,
    FeedForward,
    RMSNorm,
    Router,
)
from deepseek.models.planner import WindowPlanner
from deepseek.models.routed import RoutedPlanner
from deepseek.models.single_weights import weight_of
from deepseek.ops.cpu import why_missing
from deepseek.ops.grid import GridSource, why_inexact
from deepseek.ops.linear import Linear
from deepseek.ops.sampling import Sampling, TokenHistory, choose, choose_greedy
from deepseek.ops.scheme import Scheme

_LOG = logging.getLogger(__name__)
E = TypeVar("E")
_KNOWN = frozenset(
    {
        Attention,
        Decoder,
        DecoderLayer,
        DecoderStack,
        ExpertWeights,
        Experts,
        FeedForward,
        Linear,
        RMSNorm,
        Router,
        nn.Embedding,
        nn.ModuleList,
    }
)
"""The very classes whose mathematics the program writes out; a subclass may compute another."""


def module_batch(
    model: Decoder,
    rows: Sequence[RowLike],
    sampling: Sampling,
    memory: Memory | None = None,
    exits: Exits | None = None,
) -> Batch:
    """Return the batch of a model's rows, on its engine where it has one and no token leaves early.

    Raises:
        ConfigError: the model asks for a scheme that only the engine knows, and has none; or it
            cannot have these exits.
    """
    if exits is not None:
        check_exits(model, exits)
        if asked := vars(model).get("scheme"):
            must = "None where tokens leave early, which the engine does not do"
            step = "Load it without a scheme"
            raise ConfigError(describe("scheme", "the model", must, asked.name, step))
        _LOG.info("generation runs through the modules: the engine lets no token leave early")
        return _ModuleBatch(model, rows, sampling, memory, exits)
    engine = engine_of(model)
    return (
        _ModuleBatch(model, rows, sampling, memory)
        if engine is None
        else EngineBatch(engine, rows, sampling, memory)
    )


class EngineSlot(Generic[E]):
    """Holds the engine of a model beside it; left behind when the model is copied or pickled."""

    def __init__(self) -> None:
        """Start without an engine."""
        self.key: object = None
        self.engine: E | None = None
        self.why_no_grid: str | None = None
        """Empty where there is no reason, None where nobody has looked."""

    def get(self, key: object, build: Callable[[], E]) -> E:
        """Return the engine of a key, built where the last one had another."""
        if self.engine is None or self.key != key:
            self.engine, self.key = None, None  # its memory goes before the next takes its own
            self.engine, self.key = build(), key
        return self.engine

    def __reduce__(self) -> tuple[type[EngineSlot[E]], tuple[()]]:
        return EngineSlot, ()


def engine_of(model: nn.Module) -> Engine | None:
    """Return the engine of a model, packed anew when a weight, the scheme or the threads changed.

    A change of a weight is seen by its version, which optimizers and in-place operations raise;
    writing through `.data` is not seen.

    Returns:
        None where `why_no_engine` gives a reason.

    Raises:
        ConfigError: the model has a scheme (`load(scheme=…)`) that nothing but the engine knows,
            and `why_no_engine` gives a reason.
    """
    asked: Scheme | None = vars(model).get("scheme")
    reason = why_no_engine(model)
    if reason is not None or not isinstance(model, Decoder):
        if asked is not None:
            must = "one that the engine runs"
            step = "Load it without a scheme, or give another model"
            raise ConfigError(describe("model", f"scheme {asked.name!r}", must, reason, step))
        _LOG.info("generation runs through the modules: %s", reason)
        return None
    slot: EngineSlot[Engine] = vars(model).setdefault("engine_slot", EngineSlot())
    threads = torch.get_num_threads()
    versions = [
        (each.data_ptr(), each._version) for each in (*model.parameters(), *model.buffers())
    ]
    routing = model.planner.routing if isinstance(model.planner, RoutedPlanner) else None
    key = (asked, threads, model.config, routing, tuple(versions))

    def build() -> Engine:
        grids = grids_kept(model) if asked is None else {}
        return build_engine(
            model.config,
            weights_of(model, grids),
            asked or usual_scheme(model, has_grids=bool(grids)),
            tokenizer=model.tokenizer,
            bundle=model.bundle,
            threads=threads,
            routing=routing,
        )

    return slot.get(key, build)


def usual_scheme(model: Decoder, *, has_grids: bool) -> Scheme:
    """Return the scheme of a model that was asked for none."""
    dtype = str(model.dtype).removeprefix("torch.")
    scheme = Scheme(as_stored=True) if has_grids else Scheme.named(dtype)
    return scheme if model.kv is None else scheme.replace(kv=model.kv)


def grids_kept(model: Decoder) -> dict[str, GridSource]:
    """Return the weights that a model's folder holds on a grid, or none where the model's numbers
    are not those of the folder any more: the weights of a folder are read for it."""
    for name, grid in model.grids.items():
        value = weight_of(model, name)
        stored = torch.from_numpy(grid.read().values()).to(value.dtype)
        if not torch.equal(value, stored):
            _LOG.info("%s was changed since it was loaded: no weight keeps its grid", name)
            return {}
    return dict(model.grids)


def why_no_engine(model: nn.Module) -> str | None:
    """Return why a model runs through its modules, or None if it runs on an engine."""
    if type(model) is not Decoder:
        return f"{type(model).__name__} is not a plain Decoder"
    reason = flat.why_not_flat(model.config)
    if reason is not None:
        return reason
    planner = model.planner
    if type(planner) is RoutedPlanner:
        planner = planner.windows
    if planner is not None:
        if type(planner) is not WindowPlanner:
            return f"the planner {type(planner).__name__} may read queries and keys"
        if (planner.window, tuple(planner.layers)) != (
            model.config.window,
            model.config.window_layers,
        ):
            return "its windows are not those of its config"
    if model.impl != "auto":
        return f"the execution {model.impl!r} of attention was asked for by name"
    return why_not_plain(model, _KNOWN) or why_missing() or _why_no_grid(model)


def why_not_plain(model: nn.Module, known: frozenset[type[nn.Module]]) -> str | None:
    """Return why a model may compute something else than its config says, or has weights that the
    engine does not take; None if neither.

    Args:
        model: its modules and weights are looked at.
        known: the classes whose mathematics the engine knows.
    """
    for name, module in model.named_modules():
        if type(module) not in known:
            return f"{name} is a {type(module).__name__}"
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            return f"{name or 'the model'} has forward hooks"
    kinds = {(parameter.dtype, parameter.device.type) for parameter in model.parameters()}
    if kinds not in ({(torch.float32, "cpu")}, {(torch.bfloat16, "cpu")}):
        found = ", ".join(sorted(f"{dtype} on {device}" for dtype, device in kinds))
        return f"the weights are {found}; the engine takes float32 or bfloat16 on the CPU"
    return None


def _why_no_grid(model: Decoder) -> str | None:
    """Return why the engine cannot hold the grids of a model that keeps them; found out once."""
    if not model.grids or vars(model).get("scheme") is not None:
        return None
    slot = vars(model).setdefault("engine_slot", EngineSlot())
    if slot.why_no_grid is None:
        program = flat.decoder_program(model.config)
        forms = forms_as_stored(program, weights_of(model, model.grids))
        slot.why_no_grid = flat.why_mixed(program, forms) or why_inexact(model.grids) or ""
    return slot.why_no_grid or None


def weights_of(model: nn.Module, grids: Mapping[str, GridSource] | None = None) -> Weights:
    """Return what gives the weights of a model to `build_engine`, in place.

    Args:
        model: the decoder or encoder.
        grids: weights that keep their grid; the other matrices are then given in bfloat16 where it
            holds them, as they lie beside those in a folder.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())

    def rows(name: str) -> Rows | GridSource | None:
        if grids and name in grids:
            return grids[name]
        tensor = parameters.get(name)
        if tensor is None:
            return None
        values = tensor.detach()
        if grids and values.dim() > 1 and _is_held(short := values.bfloat16(), values):
            values = short
        if values.stride(-1) != 1 or values.dim() > 2:
            values = values.contiguous()
        stride = values.stride(0) * values.element_size()
        dtype = str(values.dtype).removeprefix("torch.")
        return Rows(values.data_ptr(), dtype, tuple(values.shape), stride, values)

    return rows


def _is_held(short: Tensor, values: Tensor) -> bool:
    return torch.equal(short.to(values.dtype), values)


class _ModuleBatch:
    """Rows that run through the modules; inference mode never spans a yield of the loop."""

    def __init__(
        self,
        model: Decoder,
        rows: Sequence[RowLike],
        sampling: Sampling,
        memory: Memory | None,
        exits: Exits | None = None,
    ) -> None:
        self._model, self._sampling, self._memory = model, sampling, memory
        self._exits = exits
        self.depths: list[int] | None = None
        if exits is not None:  # a prompt is read by all layers
            self.depths = [model.config.num_layers] * len(rows)
        self._prompts = [row.prompt for row in rows]
        self._capacity = max(len(row.prompt) + row.tokens_left for row in rows)
        if memory is not None:
            self._capacity = min(self._capacity, memory.max_len)
        self._generators = [row_generator(sampling.seed, row.number) for row in rows]
        self._history: TokenHistory | None = None
        if sampling.has_penalties:
            vocabulary = model.config.vocab_size
            self._history = TokenHistory.of_prompts(self._prompts, vocabulary, model.device)
        self._is_plain_greedy = sampling.is_greedy and self._history is None

    @torch.inference_mode()
    def start(self) -> list[int]:
        """Read the prompts and return the first token of each row."""
        self._cache = self._model.new_cache(len(self._prompts), self._capacity)
        return self._choose(prefill(self._model, self._prompts, self._cache, self._memory))

    @torch.inference_mode()
    def step(self, tokens: list[int]) -> list[int]:
        """Append the newest token of each row and return the next ones."""
        if self._memory is not None:
            for row in range(len(tokens)):
                make_room(self._model, self._cache, row, self._memory)
        newest = torch.tensor(tokens, device=self._model.device)[:, None]
        if self._exits is None:
            output = self._model(newest, cache=self._cache, last_only=True)
            return self._choose(output.logits[:, -1])
        logits, depths = forward_with_exits(self._model, newest, self._cache, self._exits)
        self.depths = depths[:, -1].tolist()
        return self._choose(logits[:, -1])

    @torch.inference_mode()
    def keep(self, slots: list[int]) -> None:
        """Let the other rows leave."""
        self._generators = [self._generators[slot] for slot in slots]
        self._cache = self._cache.select(slots)
        if self._history is not None:
            self._history = self._history.select(slots)

    def _choose(self, logits: Tensor) -> list[int]:
        if self._is_plain_greedy:
            return choose_greedy(logits)
        tokens = choose(logits, self._sampling, self._generators, self._history)
        if self._history is not None:
            self._history.add(torch.tensor(tokens, device=logits.device))
        return tokens
