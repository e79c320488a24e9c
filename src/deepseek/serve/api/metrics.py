"""Numbers for Prometheus, under vLLM's names where vLLM has them, so that its boards work."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from deepseek.errors import ConfigError, describe
from deepseek.serve.core.request import FinishReason

Kind = Literal["counter", "gauge", "histogram"]

_FIRST_TOKEN = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5)
_FIRST_TOKEN_S = (*_FIRST_TOKEN, 10, 20, 40, 80, 160, 640, 2560)
_TOKEN_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10, 20, 40)
_REQUEST_S = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
_KL = (1e-6, 1e-5, 1e-4, 1e-3, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2)
_COST = tuple(10.0**power for power in range(-9, 1))
_CHOICES = (1, 2, 5, 10, 20)
_NATS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 1.5, 2, 3, 4, 6, 8)


@dataclasses.dataclass(frozen=True)
class Series:
    """One number that is exported."""

    kind: Kind
    help: str
    label: str = ""
    """A label beside `model_name`; its values come from `LABEL_VALUES`."""
    buckets: tuple[float, ...] = ()


LABEL_VALUES: Mapping[str, frozenset[str]] = {
    "finished_reason": frozenset(
        {"stop", "length", "repetition", "cancelled", "deadline", "error"}
    ),
    "status": frozenset({"1xx", "2xx", "3xx", "4xx", "5xx"}),
    "reason": frozenset({"rate_limit", "overloaded", "not_ready", "deadline", "too_long"}),
}
"""Values of labels. Nothing that a client sends becomes a label, so no client can add series."""

SERIES: Mapping[str, Series] = {
    "vllm:num_requests_running": Series("gauge", "Answers being made."),
    "vllm:num_requests_waiting": Series("gauge", "Answers waiting to be begun."),
    "vllm:kv_cache_usage_perc": Series("gauge", "Share of the pages that are in use, 0 to 1."),
    "vllm:prefix_cache_queries": Series("counter", "Prompt tokens looked for in the cache."),
    "vllm:prefix_cache_hits": Series("counter", "Prompt tokens found in the cache."),
    "vllm:num_preemptions": Series("counter", "Answers turned back for want of pages."),
    "vllm:prompt_tokens": Series("counter", "Tokens of prompts."),
    "vllm:prompt_tokens_cached": Series("counter", "Tokens of prompts that were not computed."),
    "vllm:generation_tokens": Series("counter", "Tokens of answers."),
    "vllm:request_success": Series("counter", "Answers that ended.", "finished_reason"),
    "vllm:time_to_first_token_seconds": Series(
        "histogram", "From admission to the first token.", buckets=_FIRST_TOKEN_S
    ),
    "vllm:inter_token_latency_seconds": Series(
        "histogram", "Between two tokens of an answer.", buckets=_TOKEN_S
    ),
    "vllm:request_time_per_output_token_seconds": Series(
        "histogram", "Mean time of an answer's tokens behind the first.", buckets=_TOKEN_S
    ),
    "vllm:e2e_request_latency_seconds": Series(
        "histogram", "From admission to the end.", buckets=_REQUEST_S
    ),
    "vllm:request_queue_time_seconds": Series(
        "histogram", "From admission to the first step.", buckets=_REQUEST_S
    ),
    "vllm:request_prefill_time_seconds": Series(
        "histogram", "From the first step to the first token.", buckets=_REQUEST_S
    ),
    "vllm:request_decode_time_seconds": Series(
        "histogram", "From the first token to the last.", buckets=_REQUEST_S
    ),
    "vllm:request_inference_time_seconds": Series(
        "histogram", "From the first step to the last token.", buckets=_REQUEST_S
    ),
    "vllm:request_prompt_tokens": Series("histogram", "Tokens of a prompt.", buckets=_TOKENS),
    "vllm:request_generation_tokens": Series("histogram", "Tokens of an answer.", buckets=_TOKENS),
    "vllm:request_params_n": Series("histogram", "Answers of a request.", buckets=_CHOICES),
    "vllm:request_params_max_tokens": Series("histogram", "max_tokens.", buckets=_TOKENS),
    "vllm:iteration_tokens_total": Series("histogram", "Tokens of a step.", buckets=_TOKENS),
    "vllm:spec_decode_num_drafts": Series("counter", "Guesses made."),
    "vllm:spec_decode_num_draft_tokens": Series("counter", "Tokens guessed."),
    "vllm:spec_decode_num_accepted_tokens": Series("counter", "Guessed tokens that were right."),
    "vllm:admission_rejections": Series("counter", "Requests turned away.", "reason"),
    "vllm:corrupted_requests": Series(
        "counter", "Answers that a fault of numbers or engine ended."
    ),
    "deepseek:kv_waste": Series(
        "gauge", "Share of the reserved places of pages that hold nothing, 0 to 1."
    ),
    "deepseek:request_compute_seconds": Series(
        "histogram", "A request's share of the engine's time, by tokens.", buckets=_REQUEST_S
    ),
    "deepseek:request_cost": Series(
        "histogram", "The same at the price of the machine.", buckets=_COST
    ),
    "deepseek:energy_joules": Series("counter", "Energy of the processor, whoever used it."),
    "deepseek:audit_kl": Series(
        "histogram", "Divergence of a served answer from its second reading.", buckets=_KL
    ),
    "deepseek:audit_tokens": Series("counter", "Tokens of answers that were read again."),
    "deepseek:audit_tokens_agreeing": Series(
        "counter", "Those of them where both readings have the same likeliest one."
    ),
    "deepseek:http_responses": Series("counter", "HTTP answers.", "status"),
    "deepseek:token_logprob": Series(
        "histogram", "Surprise: minus the mean logprob of an answer's tokens.", buckets=_NATS
    ),
    "deepseek:token_entropy": Series(
        "histogram", "Mean entropy of an answer's choices of tokens.", buckets=_NATS
    ),
    "deepseek:invalid_json": Series("counter", "Answers that had to be JSON and are not."),
    "deepseek:truncated": Series("counter", "Answers that ended at max_tokens or the context."),
    "deepseek:repetition": Series("counter", "Answers stopped because they went in circles."),
    "deepseek:slow_readers": Series("counter", "Streams dropped for a client that did not read."),
}
"""All that is exported. Counters are shown with `_total` behind the name."""


class Metrics:
    """All series of one server, in a registry of its own."""

    def __init__(self, model: str) -> None:
        """Start at zero; `model` is the label of every series."""
        self._model = model
        self._registry = CollectorRegistry()
        self._metrics = {name: self._make(name, series) for name, series in SERIES.items()}

    def observe(self, name: str, value: float = 1.0, label: str = "") -> None:
        """Add to a counter, set a gauge, or count a value in a histogram.

        Args:
            name: of `SERIES`.
            value: what to add, set or count.
            label: value of the label, for the series that has one; of `LABEL_VALUES`.

        Raises:
            ConfigError: there is no such series or label.
        """
        series = SERIES.get(name)
        if series is None:
            raise ConfigError(describe("name", "Metrics.observe", "of SERIES", name))
        if label not in LABEL_VALUES.get(series.label, frozenset({""})):
            must = f"a value of {series.label!r}" if series.label else "empty"
            raise ConfigError(describe("label", name, must, label))
        labels = (self._model, label) if series.label else (self._model,)
        metric = self._metrics[name].labels(*labels)
        if isinstance(metric, Counter):
            metric.inc(value)
        elif isinstance(metric, Gauge):
            metric.set(value)
        else:
            metric.observe(value)

    def running(self, change: int) -> None:
        """Count answers that begin (1) or end (-1)."""
        gauge = self._metrics["vllm:num_requests_running"].labels(self._model)
        assert isinstance(gauge, Gauge)
        gauge.inc(change)

    def finished(self, reason: FinishReason) -> None:
        """Count an answer that ended."""
        self.observe("vllm:request_success", label=reason)
        if reason == "length":
            self.observe("deepseek:truncated")
        elif reason == "repetition":
            self.observe("deepseek:repetition")
        elif reason == "error":
            self.observe("vllm:corrupted_requests")

    def text(self) -> bytes:
        """Return everything in Prometheus' text format."""
        return generate_latest(self._registry)

    def _make(self, name: str, series: Series) -> Counter | Gauge | Histogram:
        labels = ["model_name", *([series.label] if series.label else [])]
        if series.kind == "counter":
            return Counter(name, series.help, labels, registry=self._registry)
        if series.kind == "gauge":
            return Gauge(name, series.help, labels, registry=self._registry)
        return Histogram(name, series.help, labels, registry=self._registry, buckets=series.buckets)
