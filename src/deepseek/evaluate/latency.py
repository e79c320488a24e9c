"""Speed of generation, and what it costs: latency, tokens a second, peak memory, energy."""

from __future__ import annotations

import dataclasses
import itertools
import random
import statistics
import time
from collections.abc import Callable, Sequence
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
    _check(model, num_prompt_tokens, num_new_tokens, num_repeats, num_warmups)
    tokenizer = tokenizer if tokenizer is not None else getattr(model, "tokenizer", None)
    prompt = _prompt(model, tokenizer, num_prompt_tokens, seed)
    run = _runner(model, prompt, num_new_tokens)
    on_cuda = device_of(model).type == "cuda"
    passes = []
    with measuring(model):
        for number in range(num_warmups + num_repeats):
            if on_cuda:
                torch.cuda.reset_peak_memory_stats(device_of(model))
            timed = _timed(run, device_of(model))
            if number >= num_warmups:
                passes.append(timed)
            if progress is not None:
                progress("speed", (number + 1) / (num_warmups + num_repeats))
    conditions: dict[str, Condition] = {**model_conditions(model), "batch": 1, "decoding": "greedy"}
    conditions |= {"prompt_tokens": num_prompt_tokens, "new_tokens": num_new_tokens}
    conditions |= {"repeats": num_repeats, "warmups": num_warmups}
    flags = {"prompt_tokens": num_prompt_tokens, "new_tokens": num_new_tokens}
    flags |= {"repeats": num_repeats, "seed": seed}
    command = repeat_command(model, "speed", flags)
    measurements = _measurements(passes, num_prompt_tokens, conditions, command)
    if on_cuda:
        peak = torch.cuda.max_memory_allocated(device_of(model))
        facts = {**conditions, "method": "allocator's high-water mark of the last pass"}
        measurements.append(
            Measurement(
                name="peak_device_bytes",
                value=peak,
                unit="bytes",
                conditions=facts,
                command=command,
            )
        )
    return SpeedResult(measurements, tuple(passes))


def _check(model: CausalModel, prompt: int, new: int, repeats: int, warmups: int) -> None:
    for name, value, least in (
        ("num_prompt_tokens", prompt, 1),
        ("num_new_tokens", new, 2),
        ("num_repeats", repeats, 1),
        ("num_warmups", warmups, 0),
    ):
        if value < least:
            raise ConfigError(describe(name, "speed", f"at least {least}", value))
    limit = max_positions_of(model)
    if limit is not None and prompt + new > limit:
        must = f"at most {limit} together, the model's length"
        raise ConfigError(describe("prompt and new tokens", "speed", must, prompt + new))


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
    with track() as usage:
        start = time.perf_counter()
        run(lambda: arrivals.append(time.perf_counter() - start))
    return Pass(tuple(arrivals), usage)


def _measurements(
    passes: Sequence[Pass], num_prompt_tokens: int, conditions: dict[str, Condition], command: str
) -> list[Measurement]:
    first = [each.arrivals_s[0] for each in passes]
    later = [statistics.median(_gaps(each.arrivals_s)) for each in passes]
    decode = [
        (len(each.arrivals_s) - 1) / (each.arrivals_s[-1] - each.arrivals_s[0]) for each in passes
    ]
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
