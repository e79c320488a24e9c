"""What is noted of one answer while it comes: for metrics, usage and its event."""

from __future__ import annotations

import json

from deepseek.serve.api.limits import Clock
from deepseek.serve.api.metrics import Metrics
from deepseek.serve.core.request import FinishReason
from deepseek.serve.generation import GenerationRequest, Output


class AnswerRecord:
    """The numbers of one answer."""

    def __init__(
        self, request: GenerationRequest, metrics: Metrics, clock: Clock, *, keeps_text: bool
    ) -> None:
        """Begin at the answer's admission."""
        self.request = request
        self._metrics = metrics
        self._clock = clock
        kind = request.grammar.kind if request.grammar else ""
        self._must_be_json = kind in ("json_schema", "json_object")
        self._parts: list[str] | None = [] if keeps_text or self._must_be_json else None
        self._began = clock()
        self._last = self._began
        self._logprobs: list[float] = []
        self._entropies: list[float] = []
        self.first_token_s: float | None = None
        self.num_tokens = 0
        self.num_cached_tokens = 0
        self.finish_reason: FinishReason = "cancelled"

    @property
    def text(self) -> str:
        """The answer so far, where it is kept."""
        return "".join(self._parts or ())

    @property
    def mean_logprob(self) -> float | None:
        """Mean logprob of the tokens that have one, in nats."""
        return _mean(self._logprobs)

    @property
    def mean_entropy(self) -> float | None:
        """Mean entropy of what they were chosen from, in nats."""
        return _mean(self._entropies)

    @property
    def total_s(self) -> float:
        """Seconds since the admission."""
        return self._clock() - self._began

    def take(self, output: Output) -> None:
        """Note one more part of the answer."""
        self.num_cached_tokens = max(self.num_cached_tokens, output.num_cached_tokens)
        if self._parts is not None:
            self._parts.append(output.text)
        if output.tokens:
            self._take_tokens(output)
        if output.finish_reason:
            self.finish_reason = output.finish_reason

    def _take_tokens(self, output: Output) -> None:
        now, count = self._clock(), len(output.tokens)
        for token in output.tokens:
            if token.logprob is not None:
                self._logprobs.append(token.logprob)
            if token.entropy is not None:
                self._entropies.append(token.entropy)
        if self.first_token_s is None:
            self.first_token_s = now - self._began
            self._metrics.observe("vllm:time_to_first_token_seconds", self.first_token_s)
        else:
            for _ in range(count):
                gap = (now - self._last) / count
                self._metrics.observe("vllm:inter_token_latency_seconds", gap)
        self._last = now
        self.num_tokens += count

    def end(self) -> None:
        """Export the numbers of the whole answer."""
        observe, total_s = self._metrics.observe, self.total_s
        self._metrics.finished(self.finish_reason)
        observe("vllm:e2e_request_latency_seconds", total_s)
        observe("vllm:generation_tokens", self.num_tokens)
        observe("vllm:request_generation_tokens", self.num_tokens)
        if self.first_token_s is not None:
            decode_s = self._last - self._began - self.first_token_s
            observe("vllm:request_decode_time_seconds", decode_s)
            if self.num_tokens > 1:
                per_token_s = decode_s / (self.num_tokens - 1)
                observe("vllm:request_time_per_output_token_seconds", per_token_s)
        if self.mean_logprob is not None:
            observe("deepseek:token_logprob", -self.mean_logprob)
        if self.mean_entropy is not None:
            observe("deepseek:token_entropy", self.mean_entropy)
        if self._must_be_json and self.finish_reason in ("stop", "length") and not self._is_json():
            observe("deepseek:invalid_json")

    def _is_json(self) -> bool:
        try:
            json.loads(self.text)
        except (ValueError, RecursionError):
            return False
        return True


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None
