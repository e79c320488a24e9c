"""From a checked body to what the engine is asked: the rules that need the model to be known."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from deepseek.errors import BackendError, describe
from deepseek.ops.sampling.config import Sampling
from deepseek.records import Asked
from deepseek.serve.api.errors import ApiError, bad_request
from deepseek.serve.api.prompts import Prompts
from deepseek.serve.api.schema.base import GenerationBody
from deepseek.serve.api.settings import ApiSettings
from deepseek.serve.generation import GenerationRequest, Generator, Grammar

Adapters = Callable[[], Collection[str]]
"""Names of the adapters that can be asked for now."""

Router = Callable[[Asked], str]
"""Returns the name of the model or adapter that shall answer."""

_NUM_SEEDS = 2**62
_LEAST_TEMPERATURE = 1e-4


class Reader:
    """Knows what a model can be asked."""

    def __init__(
        self,
        generator: Generator,
        settings: ApiSettings,
        adapters: Adapters,
        router: Router | None = None,
    ) -> None:
        """Read requests for `generator`; `router` chooses who answers, None for who was asked."""
        self._router = router
        self._generator = generator
        self._settings = settings
        self._adapters = adapters
        self.prompts = Prompts(generator.tokenizer, generator.context)

    def model_names(self) -> list[str]:
        """Return the names that can be asked for, the model's own first."""
        return [self._settings.model, *sorted(self._adapters())]

    def adapter(self, model: str | None) -> str | None:
        """Return the adapter that a model's name stands for, None for the model itself.

        Raises:
            ApiError: 404: there is no such model.
        """
        if model is None or model == self._settings.model:
            return None
        if model not in self._adapters():
            text = "There is no such model here; see /v1/models."
            raise ApiError(404, text, code="model_not_found", param="model")
        return model

    def requests(
        self,
        body: GenerationBody,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int | None,
        tenant: str,
        grammar: Grammar | None,
        logprobs: int | None,
        prompt_logprobs: int | None = None,
        param: str = "prompt",
    ) -> tuple[GenerationRequest, ...]:
        """Return what the engine is asked: for each prompt `body.n` answers.

        Args:
            body: what the client asks.
            prompts: as token ids.
            max_tokens: as the client wishes; 0 for a prompt alone, None for what is left.
            tenant: who asks.
            grammar: what the answers are held to.
            logprobs: as in `GenerationRequest`.
            prompt_logprobs: likewise.
            param: the field that the prompts came from.

        Raises:
            ApiError: 400: something does not fit the model, or one field another; 404: no such
                model.
        """
        self._check(body)
        adapter, count = self._answering(body, tenant), body.n or 1
        made: list[GenerationRequest] = []
        for prompt in prompts:
            length = self._max_tokens(len(prompt), max_tokens)
            self.prompts.check(prompt, length, param)
            if (body.min_tokens or 0) > length:
                raise bad_request("min_tokens is above the answer's length.", "min_tokens")
            made += [
                GenerationRequest(
                    prompt=tuple(prompt),
                    max_tokens=length,
                    sampling=_sampling(body, choice),
                    logit_bias={int(key): bias for key, bias in (body.logit_bias or {}).items()},
                    stop=_stops(body),
                    stop_token_ids=tuple(body.stop_token_ids or ()),
                    ignore_eos=bool(body.ignore_eos),
                    min_tokens=body.min_tokens or 0,
                    logprobs=logprobs,
                    prompt_logprobs=prompt_logprobs,
                    grammar=grammar,
                    adapter=adapter,
                    tenant=tenant,
                    priority=body.priority or 0,
                    deadline_s=None if body.deadline_ms is None else body.deadline_ms / 1000,
                )
                for choice in range(count)
            ]
        return tuple(made)

    def _answering(self, body: GenerationBody, tenant: str) -> str | None:
        """Return the adapter that shall answer, None for the model itself.

        Raises:
            ApiError: 404: there is no such model.
            BackendError: the router names one that is not here.
        """
        adapter = self.adapter(body.model)
        if self._router is None:
            return adapter
        asked = body.model or self._settings.model
        chosen = self._router(Asked(tenant=tenant, model=asked, user=body.user))
        if chosen not in self.model_names():
            must = f"one of {', '.join(self.model_names())}"
            raise BackendError(describe("name", "the router", must, chosen))
        return self.adapter(chosen)

    def check_ids(self, ids: Sequence[int], param: str) -> None:
        """Refuse token ids that the model does not have.

        Raises:
            ApiError: 400.
        """
        if ids and max(ids) >= self._generator.vocab_size:
            text = f"{param} has a token id outside the vocabulary of"
            raise bad_request(f"{text} {self._generator.vocab_size} tokens.", param)

    def _check(self, body: GenerationBody) -> None:
        self.check_ids([int(key) for key in body.logit_bias or {}], "logit_bias")
        self.check_ids(body.stop_token_ids or [], "stop_token_ids")
        if body.stream_options is not None and not body.stream:
            raise bad_request("stream_options needs stream to be true.", "stream_options")

    def _max_tokens(self, num_prompt_tokens: int, wished: int | None) -> int:
        """Return the wished length, or what the context leaves under the default."""
        left = self._generator.context - num_prompt_tokens
        return max(1, min(left, self._settings.default_max_tokens) if wished is None else wished)


def _sampling(body: GenerationBody, choice: int) -> Sampling:
    """Return how the tokens of one answer are chosen; OpenAI's temperature is 1 by default.

    A temperature or `top_p` so low that one token is left is greedy.
    """
    temperature = 1.0 if body.temperature is None else body.temperature
    top_p = 1.0 if body.top_p is None else body.top_p
    is_greedy = temperature < _LEAST_TEMPERATURE or top_p == 0
    return Sampling(
        temperature=0.0 if is_greedy else temperature,
        top_k=max(0, body.top_k or 0),
        top_p=top_p or 1.0,
        min_p=body.min_p or 0.0,
        repetition_penalty=body.repetition_penalty or 1.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        presence_penalty=body.presence_penalty or 0.0,
        seed=None if body.seed is None else (body.seed + choice) % _NUM_SEEDS,
    )


def _stops(body: GenerationBody) -> tuple[str, ...]:
    if body.stop is None:
        return ()
    return (body.stop,) if isinstance(body.stop, str) else tuple(body.stop)
