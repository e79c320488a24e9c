"""From an admitted request to the outputs of its answers."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import time
from collections.abc import AsyncGenerator, Callable
from typing import cast

from deepseek.errors import ConfigError
from deepseek.records import Event
from deepseek.serve.api.answer_record import AnswerRecord
from deepseek.serve.api.errors import ApiError, bad_request, not_ready
from deepseek.serve.api.limits import Charge, Clock, Quotas
from deepseek.serve.api.metrics import Metrics
from deepseek.serve.api.settings import ApiSettings
from deepseek.serve.api.tenants import Tenant
from deepseek.serve.api.waiting import BegunStream, fan_in
from deepseek.serve.generation import (
    DeadlineError,
    EngineError,
    GenerationRequest,
    Generator,
    Output,
    QueueFull,
)

_log = logging.getLogger(__name__)

EventSink = Callable[[Event], None]
Outputs = BegunStream[tuple[int, Output]]
"""Outputs of all answers of a request, each with the number of its answer."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A request that was read: the answers that are wanted."""

    route: str
    request_id: str
    tenant: Tenant
    model: str
    """The name that the client reads."""
    requests: tuple[GenerationRequest, ...]
    """One for each answer; `num_choices` in a row have the same prompt."""
    num_choices: int = 1
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    @property
    def prompts(self) -> tuple[tuple[int, ...], ...]:
        """The prompts, each once."""
        return tuple(request.prompt for request in self.requests[:: self.num_choices])

    @property
    def cost(self) -> int:
        """Most tokens that it can use: for each answer its prompt and `max_tokens`."""
        return sum(len(request.prompt) + request.max_tokens for request in self.requests)


class Runner:
    """Admits jobs, runs their answers on the engine, and notes how they went."""

    def __init__(
        self,
        generator: Generator,
        settings: ApiSettings,
        *,
        quotas: Quotas,
        metrics: Metrics,
        on_event: EventSink,
        clock: Clock,
    ) -> None:
        """Run jobs on `generator`."""
        self._generator = generator
        self._settings = settings
        self._quotas = quotas
        self._metrics = metrics
        self._on_event = on_event
        self._clock = clock

    def without_limits(self) -> Runner:
        """Return one that runs on the same engine, and charges nobody."""
        return Runner(
            self._generator,
            self._settings,
            quotas=Quotas(self._clock),
            metrics=self._metrics,
            on_event=self._on_event,
            clock=self._clock,
        )

    def start(self, job: Job) -> Outputs:
        """Begin a job; the stream that is returned must be closed.

        Raises:
            ApiError: 503, 429 or 400: it is not admitted.
        """
        charge = self.admit(job)
        self._metrics.observe("vllm:request_params_n", job.num_choices)
        self._metrics.observe("vllm:request_params_max_tokens", job.requests[0].max_tokens)
        return BegunStream(self._run(job, charge))

    def admit(self, job: Job) -> Charge:
        """Charge a job to its tenant, to be settled when it has ended.

        Raises:
            ApiError: 503, 429 or 400: it is not admitted.
        """
        if not self._generator.is_ready():
            self._metrics.observe("vllm:admission_rejections", label="not_ready")
            raise not_ready(self._generator.retry_after_s())
        most = self._settings.max_request_tokens
        if job.cost > most:
            text = f"The request may use {job.cost} tokens, of at most {most} a request."
            raise bad_request(f"{text} Lower max_tokens or n.", "max_tokens")
        return self.charge(job.tenant, job.cost)

    def charge(self, tenant: Tenant, tokens: int) -> Charge:
        """Charge a tenant the most tokens that a request can use; to be settled.

        Raises:
            ApiError: 429: that is more than it may use now.
        """
        try:
            return self._quotas.charge(tenant, tokens)
        except ApiError:
            self._metrics.observe("vllm:admission_rejections", label="rate_limit")
            raise

    async def _run(self, job: Job, charge: Charge) -> AsyncGenerator[tuple[int, Output]]:
        records = [
            AnswerRecord(
                request,
                self._metrics,
                self._clock,
                keeps_text=self._settings.events_have_text,
            )
            for request in job.requests
        ]
        sources = [self._answer(job, choice, record) for choice, record in enumerate(records)]
        try:
            async with contextlib.aclosing(fan_in(sources)) as outputs:
                async for number, output in outputs:
                    yield number, output
        finally:
            prompts = sum(len(record.request.prompt) for record in records)
            charge.settle(prompts + sum(record.num_tokens for record in records))
            self._note_prompts(job, records)

    async def _answer(self, job: Job, choice: int, record: AnswerRecord) -> AsyncGenerator[Output]:
        """Yield the outputs of one answer, and note its end however it comes."""
        started, is_refused = time.time(), False
        self._metrics.running(1)
        generated = cast("AsyncGenerator[Output]", self._generator.generate(record.request))
        try:
            async with contextlib.aclosing(generated) as outputs:
                async for output in outputs:
                    record.take(output)
                    _refuse_failure(output)
                    yield output
                    if output.finish_reason:
                        return
            raise EngineError("The engine's outputs ended before the answer did.")
        except QueueFull:
            self._metrics.observe("vllm:admission_rejections", label="overloaded")
            is_refused = True
            raise
        except ConfigError:
            is_refused = True
            raise
        except DeadlineError:
            record.finish_reason = "deadline"
            self._metrics.observe("vllm:admission_rejections", label="deadline")
            raise
        except ApiError:
            raise
        except Exception:
            record.finish_reason = "error"
            raise
        finally:
            self._metrics.running(-1)
            if not is_refused:
                record.end()
                self._emit(job, choice, record, started)

    def _note_prompts(self, job: Job, records: list[AnswerRecord]) -> None:
        for record in records[:: job.num_choices]:
            num_tokens = len(record.request.prompt)
            self._metrics.observe("vllm:prompt_tokens", num_tokens)
            self._metrics.observe("vllm:request_prompt_tokens", num_tokens)
            self._metrics.observe("vllm:prompt_tokens_cached", record.num_cached_tokens)

    def _emit(self, job: Job, choice: int, record: AnswerRecord, started: float) -> None:
        has_text, tokenizer = self._settings.events_have_text, self._generator.tokenizer
        prompt = record.request.prompt
        event = Event(
            request_id=job.request_id,
            choice=choice,
            tenant=job.tenant.id,
            model=job.model,
            answered_by=record.request.adapter or self._settings.model,
            route=job.route,
            started=started,
            first_token_s=record.first_token_s,
            total_s=record.total_s,
            num_prompt_tokens=len(prompt),
            num_cached_tokens=record.num_cached_tokens,
            num_tokens=record.num_tokens,
            finish_reason=record.finish_reason,
            mean_logprob=record.mean_logprob,
            mean_entropy=record.mean_entropy,
            prompt=tokenizer.decode(prompt, skip_special_tokens=False) if has_text else None,
            text=record.text if has_text else None,
        )
        try:
            self._on_event(event)
        except Exception:
            # whoever listens must not be able to take an answer from a user
            _log.exception(json.dumps({"request_id": job.request_id, "error": "event sink"}))


def _refuse_failure(output: Output) -> None:
    if output.finish_reason == "error":
        text = "The model failed on this request; its numbers were not finite."
        raise ApiError(500, text, code="generation_failed")
    if output.finish_reason == "deadline":
        raise DeadlineError("The deadline has passed.")
    if output.finish_reason == "cancelled":
        raise ApiError(503, "The server stopped this request.", code="cancelled", retry_after_s=5)
