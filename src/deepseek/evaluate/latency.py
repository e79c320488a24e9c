"""Speed of generation, and what it costs: latency, tokens a second, peak memory, energy."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from deepseek.errors import ConfigError, describe
from deepseek.evaluate.base import (
    CausalModel,
    Condition,
    Progress,
    TextTokenizer,
    device_of,
    max_positions_of,
    measuring,
    model_conditions,
    repeat_command,
)
from deepseek.evaluate.continuation import is_decoder, is_transformers
from deepseek.evaluate.corpus import default_corpus
from deepseek.evaluate.resources import Usage, track
from deepseek.records import Measurement, summarize

if TYPE_CHECKING:
    from deepseek.models import Decoder


@dataclasses.dataclass(frozen=True)
class Pass:
    """One timed generation."""

    arrivals_s: tuple[float, ...]
    """When each new token was there, counted from the start."""
    usage: Usage


@dataclasses.dataclass(frozen=True)
class SpeedResult:
    """What `speed` found."""

    measurements: list[Measurement]
    passes: tuple[Pass, ...]


def speed(
    model: CausalModel,
    *,
    tokenizer: TextTokenizer | None = None,
    num_prompt_tokens: int = 512,
    num_new_tokens: int = 64,
    num_repeats: int = 5,
    num_warmups: int = 1,
    seed: int = 0,
    progress: Progress | None = None,
) -> SpeedResult:
    """Measure how fast a model generates greedily, one sequence at a time.

    Our decoder runs through `deepseek.generate.stream`, a model of transformers through its own
    `generate` with a streamer, so both sides are measured as they are used, by the same clock.

    Args:
        model: our decoder, or a model with the `generate` of transformers.
        tokenizer: makes the prompt out of the default corpus; None = the model's own, or else
            tokens left to chance (speed does not depend on which tokens they are, but for experts).
        num_prompt_tokens: length of the prompt.
        num_new_tokens: tokens generated, at least 2; the end-of-text token does not stop it.
        num_repeats: timed passes, at least 1.
        num_warmups: passes before them that do not count.
        seed: of a prompt left to chance.
        progress: called after each pass.

    Returns:
        medians over the passes: `first_token_s`, `prefill_tokens_per_s` (prompt tokens over
        first-token latency, so with choosing the first token inside), `token_s` (median latency of
        a later token), `decode_tokens_per_s` (later tokens over the time after the first),
        `peak_rss_bytes`, `cpu_s_per_token`; `energy_j_per_token` only where the machine tells it;
        `peak_device_bytes` on a CUDA device. The per-token costs are a whole pass's over its new
        tokens.

    Raises:
        ConfigError: numbers out of range, or a model that cannot generate.
    """
    engines = {"": model}
    plan = _Plan(num_prompt_tokens, num_new_tokens, num_repeats, num_warmups, seed)
    passes = _interleaved(engines, tokenizer, plan, progress)[""]
    conditions = plan.conditions(model)
    command = repeat_command(model, "speed", plan.flags)
    measurements = _measurements(passes, num_prompt_tokens, conditions, command)
    if device_of(model).type == "cuda":
        measurements.append(_device_peak(model, conditions, command))
    return SpeedResult(measurements, tuple(passes))


def speed_side_by_side(
    models: Mapping[str, CausalModel],
    *,
    tokenizer: TextTokenizer | None = None,
    num_prompt_tokens: int = 512,
    num_new_tokens: int = 64,
    num_repeats: int = 5,
    num_warmups: int = 1,
    command: str = "",
    progress: Progress | None = None,
) -> list[Measurement]:
    """Measure the speed of several engines that take turns, so that a drifting machine meets all.

    Args:
        models: by the name of the engine; the first is compared with each of the others.
        tokenizer: as in `speed`; None = the first model's own.
        num_prompt_tokens, num_new_tokens, num_repeats, num_warmups, progress: as in `speed`.
        command: what repeats the measurement.

    Returns:
        per engine `first_token_s`, `prefill_tokens_per_s`, `token_s`, `decode_tokens_per_s` and
        `cpu_s_per_token`, with the condition `engine`; and the ratio of each round, first engine
        over the other: `decode_speed_ratio` and `prefill_speed_ratio`, with the condition
        `engine` "first / other". Memory is left out: the engines share one process.

    Raises:
        ConfigError: as `speed`.
    """
    plan = _Plan(num_prompt_tokens, num_new_tokens, num_repeats, num_warmups, 0)
    passes = _interleaved(models, tokenizer, plan, progress)
    found: list[Measurement] = []
    for name, model in models.items():
        conditions = {**plan.conditions(model), "engine": name}
        each = _measurements(passes[name], num_prompt_tokens, conditions, command)
        found += [item for item in each if item.name != "peak_rss_bytes"]
    first = next(iter(models))
    for other in list(models)[1:]:
        conditions = {**plan.conditions(models[first]), "engine": f"{first} / {other}"}
        pairs = list(zip(passes[first], passes[other], strict=True))
        for name, cost in (("decode_speed_ratio", _later_s), ("prefill_speed_ratio", _first_s)):
            ratios = [cost(theirs) / cost(ours) for ours, theirs in pairs]
            found.append(summarize(name, ratios, "1", conditions=conditions, command=command))
    return found


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What is timed, and how often."""

    num_prompt_tokens: int
    num_new_tokens: int
    num_repeats: int
    num_warmups: int
    seed: int

    def conditions(self, model: CausalModel) -> dict[str, Condition]:
        return {
            **model_conditions(model),
            "batch": 1,
            "decoding": "greedy",
            "prompt_tokens": self.num_prompt_tokens,
            "new_tokens": self.num_new_tokens,
            "repeats": self.num_repeats,
            "warmups": self.num_warmups,
        }

    @property
    def flags(self) -> dict[str, str | int | None]:
        """The options of the command line that repeat it."""
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "new_tokens": self.num_new_tokens,
            "repeats": self.num_repeats,
            "seed": self.seed,
        }


def _interleaved(
    models: Mapping[str, CausalModel],
    tokenizer: TextTokenizer | None,
    plan: _Plan,
    progress: Progress | None,
) -> dict[str, list[Pass]]:
    """Return the timed passes of each engine; in every round each has one turn."""
    runs: dict[str, Callable[[Callable[[], None]], None]] = {}
    for name, model in models.items():
        _check(model, plan)
        own = tokenizer if tokenizer is not None else getattr(model, "tokenizer", None)
        tokenizer = own
        prompt = _prompt(model, own, plan.num_prompt_tokens, plan.seed)
        runs[name] = _runner(model, prompt, plan.num_new_tokens)
    passes: dict[str, list[Pass]] = {name: [] for name in models}
    total, done = (plan.num_warmups + plan.num_repeats) * len(models), 0
    with contextlib.ExitStack() as stack:
        for model in models.values():
            stack.enter_context(measuring(model))
        for number in range(plan.num_warmups + plan.num_repeats):
            for name, model in models.items():
                timed = _timed(runs[name], device_of(model))
                if number >= plan.num_warmups:
                    passes[name].append(timed)
                done += 1
                if progress is not None:
                    progress("speed", done / total)
    return passes


def _device_peak(model: CausalModel, conditions: dict[str, Condition], command: str) -> Measurement:
    return Measurement(
        name="peak_device_bytes",
        value=torch.cuda.max_memory_allocated(device_of(model)),
        unit="bytes",
        conditions={**conditions, "method": "allocator's high-water mark of the last pass"},
        command=command,
    )


def _first_s(timed: Pass) -> float:
    return timed.arrivals_s[0]


def _later_s(timed: Pass) -> float:
    return timed.arrivals_s[-1] - timed.arrivals_s[0]


def _check(model: CausalModel, plan: _Plan) -> None:
    for name, value, least in (
        ("num_prompt_tokens", plan.num_prompt_tokens, 1),
        ("num_new_tokens", plan.num_new_tokens, 2),
        ("num_repeats", plan.num_repeats, 1),
        ("num_warmups", plan.num_warmups, 0),
    ):
        if value < least:
            raise ConfigError(describe(name, "speed", f"at least {least}", value))
    limit, asked = max_positions_of(model), plan.num_prompt_tokens + plan.num_new_tokens
    if limit is not None and asked > limit:
        must = f"at most {limit} together, the model's length"
        raise ConfigError(describe("prompt and new tokens", "speed", must, asked))


def _prompt(
    model: CausalModel, tokenizer: TextTokenizer | None, num_tokens: int, seed: int
) -> list[int]:
    if tokenizer is not None:
        ids = tokenizer.encode(default_corpus().text)
        return [ids[index % len(ids)] for index in range(num_tokens)]
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", 2)
    chance = random.Random(seed)
    return [chance.randrange(vocabulary) for _ in range(num_tokens)]


def _runner(
    model: CausalModel, prompt: Sequence[int], num_new_tokens: int
) -> Callable[[Callable[[], None]], None]:
    """Return what generates once and calls back when each new token is there."""
    if is_decoder(model):
        return _decoder_runner(model, prompt, num_new_tokens)
    if is_transformers(model):
        return _transformers_runner(model, prompt, num_new_tokens)
    must = "a deepseek Decoder or a model with the generate of transformers"
    raise ConfigError(describe("model", "speed", must, type(model).__name__))


def _decoder_runner(
    model: Decoder, prompt: Sequence[int], num_new_tokens: int
) -> Callable[[Callable[[], None]], None]:
    from deepseek.generate import stream

    def run(arrived: Callable[[], None]) -> None:
        for _ in stream(model, list(prompt), max_tokens=num_new_tokens, ignore_eos=True):
            arrived()

    return run


def _transformers_runner(
    model: CausalModel, prompt: Sequence[int], num_new_tokens: int
) -> Callable[[Callable[[], None]], None]:
    ids = torch.tensor([list(prompt)], device=device_of(model))
    generate: Callable[..., Tensor] = model.generate  # type: ignore[attr-defined]

    def run(arrived: Callable[[], None]) -> None:
        generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=num_new_tokens,
            min_new_tokens=num_new_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=0,
            streamer=_Arrivals(arrived),
        )

    return run


class _Arrivals:
    """A streamer of transformers: it is given the prompt first, then each token."""

    def __init__(self, arrived: Callable[[], None]) -> None:
        self.arrived = arrived
        self.has_prompt = False

    def put(self, value: Tensor) -> None:
        if self.has_prompt:
            self.arrived()
        self.has_prompt = True

    def end(self) -> None:
        pass


def _timed(run: Callable[[Callable[[], None]], None], device: torch.device) -> Pass:
    arrivals: list[float] = []
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    with track() as usage:
        start = time.perf_counter()
        run(lambda: arrivals.append(time.perf_counter() - start))
    return Pass(tuple(arrivals), usage)


def _measurements(
    passes: Sequence[Pass], num_prompt_tokens: int, conditions: dict[str, Condition], command: str
) -> list[Measurement]:
    first = [each.arrivals_s[0] for each in passes]
    later = [statistics.median(_gaps(each.arrivals_s)) for each in passes]
    decode = [(len(each.arrivals_s) - 1) / _later_s(each) for each in passes]
    counts = [len(each.arrivals_s) for each in passes]
    method = {"method": passes[0].usage.peak_rss_method}
    found: list[tuple[str, list[float], str, dict[str, str]]] = [
        ("first_token_s", first, "s", {}),
        ("prefill_tokens_per_s", [num_prompt_tokens / each for each in first], "tokens/s", {}),
        ("token_s", later, "s", {}),
        ("decode_tokens_per_s", decode, "tokens/s", {}),
        ("peak_rss_bytes", [float(each.usage.peak_rss_bytes) for each in passes], "bytes", method),
        (
            "cpu_s_per_token",
            [each.usage.cpu_s / count for each, count in zip(passes, counts, strict=True)],
            "s/token",
            {"method": "processor time of all threads; not energy"},
        ),
    ]
    joules = [each.usage.energy_j for each in passes]
    if all(each is not None for each in joules):
        each_token = [each / count for each, count in zip(joules, counts, strict=True) if each]
        method = {"method": "RAPL, whole processor packages, whatever else runs included"}
        found.append(("energy_j_per_token", each_token, "J/token", method))
    return [
        summarize(name, samples, unit, conditions={**conditions, **extra}, command=command)
        for name, samples, unit, extra in found
        if samples
    ]


def _gaps(arrivals_s: Sequence[float]) -> list[float]:
    return [after - before for before, after in itertools.pairwise(arrivals_s)]
