"""Seconds that a whole model takes on this machine, predicted from its config.

A decoder's are the engine's: of a prompt and of the tokens behind it. An encoder's are those of its
modules in PyTorch, on one text. A few models of other sizes with weights left to chance are run,
and what a step reads, computes and starts is fitted to their seconds.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from deepseek.compress.prune.shape import AnyConfig, resized, shape_of
from deepseek.config import Config
from deepseek.errors import ConfigError, describe
from deepseek.generate import Engine, build_engine
from deepseek.generate.cost import cost_of_step
from deepseek.generate.engine import MAX_STEP_TOKENS, PAGE_SIZE, Rows, Weights
from deepseek.generate.flat import decoder_program, why_not_flat
from deepseek.models import Decoder, DecoderConfig, Encoder, EncoderConfig
from deepseek.models.families import build_model
from deepseek.ops.cpu import default_threads, why_missing
from deepseek.ops.scheme import Scheme

_DECODED = 8
"""Tokens that are timed for one of them."""
_REPEATS = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload(Config):
    """What the seconds of a model are counted for."""

    prompt_tokens: int = 512
    """Of a decoder's prompt; an encoder's text."""
    new_tokens: int = 128
    """Behind a decoder's prompt; an encoder has none."""
    scheme: str = "bfloat16"
    """How the engine stores a decoder's weights; an encoder's are float32."""
    threads: int | None = None
    """None for the cores that this process may use."""

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(describe(name, "Workload", "at least 1", value))
        if self.new_tokens < 0:
            raise ConfigError(describe("new_tokens", "Workload", "from 0 on", self.new_tokens))


def why_no_clock(config: AnyConfig) -> str | None:
    """Return why a model's seconds cannot be predicted here, or None where they can."""
    return None if isinstance(config, EncoderConfig) else why_not_flat(config) or why_missing()


@dataclasses.dataclass(frozen=True)
class LatencyModel:
    """Seconds by what a pass reads, computes and starts."""

    workload: Workload
    prompt: tuple[float, ...]
    """Seconds of each feature of the pass over the prompt."""
    token: tuple[float, ...]
    """Of a step of one token; empty for an encoder."""
    error: float
    """Largest relative error on the models that it was fitted to."""

    def seconds(self, config: AnyConfig) -> float:
        """Return the seconds of the workload."""
        first = float(np.dot(self.prompt, prompt_features(config, self.workload)))
        step = float(np.dot(self.token, token_features(config, self.workload)))
        return first + self.workload.new_tokens * step


def fit_latency(config: AnyConfig, workload: Workload) -> LatencyModel:
    """Return the latency model of models like one of a config, from runs of about a second each.

    Raises:
        ConfigError: `why_no_clock` gives a reason.
    """
    reason = why_no_clock(config)
    if reason is not None:
        must = "one that the engine runs"
        raise ConfigError(describe("model", "the latency model", must, reason))
    configs = neighbours(config)
    timed = [measure(each, workload) for each in configs]
    prompt = _fit([prompt_features(c, workload) for c in configs], [t.prompt_s for t in timed])
    token: tuple[float, ...] = ()
    if isinstance(config, DecoderConfig):
        rows = [token_features(each, workload) for each in configs]
        token = _fit(rows, [each.token_s for each in timed])
    model = LatencyModel(workload, prompt, token, 0.0)
    errors = [
        abs(model.seconds(each) / t.seconds(workload) - 1)
        for each, t in zip(configs, timed, strict=True)
    ]
    return dataclasses.replace(model, error=max(errors))


def neighbours(config: AnyConfig) -> list[AnyConfig]:
    """Return configs to be timed: the model's own, and each of its sizes cut to a half or so."""
    have = shape_of(config)
    dim = config.hidden_size // config.num_heads if isinstance(config, EncoderConfig) else 1
    found = [config]
    for part, size in have.sizes.items():
        half = max(1, size // 2)
        if part == "width":
            half = max(dim, half // dim * dim)
        if part == "experts" and isinstance(config, DecoderConfig) and config.experts:
            groups = config.experts.num_groups
            half = max(half, config.experts.num_active) if groups == 1 else size
        shape = have.replace(**{part: half})
        if isinstance(config, EncoderConfig):
            if part == "heads":
                continue
            assert shape.width is not None
            shape = shape.replace(heads=shape.width // dim)
        if shape != have:
            assert shape.layers is not None
            found.append(resized(config, shape, range(shape.layers)))
    return found


@dataclasses.dataclass(frozen=True)
class Timed:
    """Seconds that were measured."""

    prompt_s: float
    token_s: float
    """0 for an encoder."""

    def seconds(self, workload: Workload) -> float:
        """Return the seconds of the workload."""
        return self.prompt_s + workload.new_tokens * self.token_s


def measure(config: AnyConfig, workload: Workload) -> Timed:
    """Return the seconds of a model of a config with weights left to chance: the least of a few
    runs, so that what else the machine does counts little."""
    if isinstance(config, EncoderConfig):
        return _measure_encoder(config, workload)
    engine = build_engine(
        config, _weights(config), Scheme.named(workload.scheme), threads=workload.threads
    )
    pages = -(-(workload.prompt_tokens + _DECODED) // PAGE_SIZE)
    memory = engine.new_pages(pages)
    table = np.arange(pages, dtype=np.int32)[None]

    def prompt() -> None:
        for start in range(0, workload.prompt_tokens, MAX_STEP_TOKENS):
            count = min(MAX_STEP_TOKENS, workload.prompt_tokens - start)
            _step(engine, memory, table, start, count)

    def token() -> None:
        for place in range(_DECODED):
            _step(engine, memory, table, workload.prompt_tokens + place, 1)

    return Timed(_least(prompt), _least(token) / _DECODED)


def _step(engine: Engine, memory: object, table: np.ndarray, start: int, count: int) -> None:
    places = np.arange(start, start + count, dtype=np.int32)
    tokens = places % engine.config.vocab_size
    engine.step(memory, tokens, places, np.zeros_like(places), table, [count - 1])


def _measure_encoder(config: EncoderConfig, workload: Workload) -> Timed:
    model = build_model(config).eval()
    assert isinstance(model, Encoder)
    ids = torch.arange(workload.prompt_tokens)[None] % config.vocab_size
    threads = torch.get_num_threads()
    torch.set_num_threads(workload.threads or default_threads())
    try:
        with torch.inference_mode():
            return Timed(_least(lambda: model(ids)), 0.0)
    finally:
        torch.set_num_threads(threads)


def _least(run: Callable[[], object]) -> float:
    run()
    seconds = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def _weights(config: DecoderConfig) -> Weights:
    """Return weights left to chance, all in the memory of the largest."""
    shapes = parameter_shapes(config)
    most = max(int(np.prod(shape)) for shape in shapes.values())
    room = torch.randn(most, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()

    def rows(name: str) -> Rows | None:
        shape = shapes.get(name)
        if shape is None:
            return None
        stride = int(np.prod(shape[1:])) * room.element_size()
        return Rows(room.data_ptr(), "bfloat16", shape, stride, room)

    return rows


@functools.lru_cache(maxsize=8)
def parameter_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a decoder's weights, by name; of stacked experts also each one's."""
    with torch.device("meta"):
        model = build_model(config)
    assert isinstance(model, Decoder)
    shapes = {
        name: tuple(each.shape)
        for name, each in [*model.named_parameters(), *model.named_buffers()]
    }
    for name, shape in list(shapes.items()):
        parts = {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}.get(name.split(".")[-1])
        for index in range(shape[0] if parts else 0):
            for part in parts or ():
                height = shape[1] // len(parts or ())
                stem = name.rpartition(".")[0]
                shapes[f"{stem}.{index}.{part}_proj.weight"] = (height, shape[2])
    return shapes


def token_features(config: AnyConfig, workload: Workload) -> tuple[float, ...]:
    """Return what a step of one token costs in the middle of the answer: bytes of weights, bytes of
    keys and values, instructions. An encoder has none of it."""
    if isinstance(config, EncoderConfig):
        return ()
    context = workload.prompt_tokens + workload.new_tokens // 2
    return _features(config, workload, 1, context)[:3]


def prompt_features(config: AnyConfig, workload: Workload) -> tuple[float, ...]:
    """Return what a pass over the prompt costs: products with weights, products of attention,
    instructions."""
    if isinstance(config, EncoderConfig):
        return _encoder_features(config, workload.prompt_tokens)
    rows = workload.prompt_tokens
    _, _, starts, linear, attention = _features(config, workload, rows, max(1, rows // 2))
    return linear, attention, starts


def _features(
    config: DecoderConfig, workload: Workload, rows: int, context: int
) -> tuple[float, float, float, float, float]:
    program = decoder_program(config)
    scheme = Scheme.named(workload.scheme)
    shapes = parameter_shapes(config)
    costs = cost_of_step(program, shapes, scheme, rows=rows, context=context)
    # the head is asked for one row of a prompt
    shares = [1 / rows if cost.name == "head" else 1.0 for cost in costs]
    pairs = list(zip(costs, shares, strict=True))
    return (
        float(sum(cost.weight_bytes for cost in costs)),
        float(sum(cost.cache_bytes for cost in costs)),
        float(len(program.instructions)),
        sum(cost.products * share for cost, share in pairs if cost.name != "attention"),
        float(sum(cost.products for cost in costs if cost.name == "attention")),
    )


def _encoder_features(config: EncoderConfig, tokens: int) -> tuple[float, ...]:
    width, inner = config.hidden_size, config.intermediate_size
    linear = config.num_layers * tokens * (4 * width * width + 2 * width * inner)
    attention = config.num_layers * 2 * tokens * tokens * width
    return float(linear), float(attention), float(config.num_layers)


def _fit(features: Sequence[tuple[float, ...]], seconds: Sequence[float]) -> tuple[float, ...]:
    """Return seconds per feature, none below zero, with the least squared relative error."""
    rows = np.array(features) / np.array(seconds)[:, None]
    scale = rows.max(0)
    scale[scale == 0] = 1.0
    result = np.zeros(rows.shape[1])
    used = list(range(rows.shape[1]))
    while used:
        found, *_ = np.linalg.lstsq(rows[:, used] / scale[used], np.ones(len(rows)), rcond=None)
        if (found >= 0).all():
            result[used] = found / scale[used]
            break
        used.pop(int(found.argmin()))
    return tuple(result.tolist())
