"""An engine without a model: it says what it is told to say, a token at a time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import llguidance
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from deepseek.data import Tokenizer
from deepseek.errors import ConfigError
from deepseek.generate.stop import TextStream
from deepseek.serve.generation import (
    GenerationRequest,
    Grammar,
    Output,
    TokenChoice,
)

SMALL_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""SmolLM2's, without its default system message: it knows no tools."""

TOOL_TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}"
    "<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "{% for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if enable_thinking %}<think>{% endif %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Like Qwen's."""


def byte_tokenizer(template: str | None = SMALL_TEMPLATE) -> Tokenizer:
    """Return a tokenizer with one id a byte, and SmolLM2's special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    backend.add_tokens([AddedToken(token, special=True) for token in special])
    return Tokenizer(
        backend, eos_token="<|im_end|>", bos_token="<|im_start|>", chat_template=template
    )


class FakeGenerator:
    """Says `text`, one token an output; deterministic logprobs; faults and delays by script."""

    def __init__(
        self,
        text: str | Callable[[GenerationRequest], str] = "Hello there.",
        *,
        tokenizer: Tokenizer | None = None,
        context: int = 4096,
    ) -> None:
        self.tokenizer = tokenizer or byte_tokenizer()
        self.context = context
        self.vocab_size = self.tokenizer.vocab_size
        self.text = text
        self.ready = True
        self.error: Exception | None = None
        """Raised before output number `error_at`."""
        self.error_at = 0
        self.gate: asyncio.Event | None = None
        """Awaited before output number `gate_at`."""
        self.gate_at = 0
        self.finish: str | None = None
        """Instead of the natural end."""
        self.num_cached = 0
        self.requests: list[GenerationRequest] = []
        self.running = 0
        self.cancelled = 0

    def is_ready(self) -> bool:
        return self.ready

    def retry_after_s(self) -> float:
        return 1.5

    async def generate(self, request: GenerationRequest) -> AsyncIterator[Output]:
        _check_grammar(request.grammar)
        self.requests.append(request)
        self.running += 1
        is_done = False
        try:
            for number, output in enumerate(self._outputs(request)):
                if self.gate is not None and number == self.gate_at:
                    await self.gate.wait()
                if self.error is not None and number == self.error_at:
                    raise self.error
                await asyncio.sleep(0)
                is_done = output.finish_reason is not None
                yield output
        except Exception:
            is_done = True
            raise
        finally:
            self.running -= 1
            self.cancelled += not is_done

    def _outputs(self, request: GenerationRequest) -> list[Output]:
        text = self.text if isinstance(self.text, str) else self.text(request)
        ids = [*self.tokenizer.encode(text, add_special_tokens=False)]
        ends = self.tokenizer.eos_token_id is not None
        stream = TextStream(self.tokenizer, request.stop)
        outputs: list[Output] = []
        if ends:
            ids.append(self.tokenizer.eos_token_id)
        for place, token_id in enumerate(ids):
            is_eos = ends and place == len(ids) - 1
            new = stream.push(token_id)
            reason = None
            if stream.stopped_by is not None or is_eos:
                reason = "stop"
            elif place + 1 >= request.max_tokens:
                reason = "length"
            if reason:
                new += stream.flush()
                reason = self.finish or reason
            outputs.append(
                Output(
                    text=new,
                    tokens=(self._choice(token_id, request.logprobs),),
                    finish_reason=reason,
                    stopped_by=stream.stopped_by,
                    num_cached_tokens=self.num_cached,
                    prompt_logprobs=self._prompt(request) if place == 0 else None,
                )
            )
            if reason:
                break
        return outputs

    def _choice(self, token_id: int, count: int | None) -> TokenChoice:
        if count is None:
            return TokenChoice(token_id)
        top = tuple(((token_id + i) % self.vocab_size, -0.5 - i) for i in range(count))
        return TokenChoice(token_id, -0.5, top)

    def _prompt(self, request: GenerationRequest) -> tuple[TokenChoice, ...] | None:
        if request.prompt_logprobs is None:
            return None
        first, *rest = request.prompt
        return (
            TokenChoice(first),
            *(self._choice(token, request.prompt_logprobs) for token in rest),
        )


def _check_grammar(grammar: Grammar | None) -> None:
    """Refuse what the engine's compiler refuses."""
    if grammar is None:
        return
    if grammar.kind == "json_object":
        return
    make = {
        "json_schema": llguidance.LLMatcher.grammar_from_json_schema,
        "regex": llguidance.LLMatcher.grammar_from_regex,
        "lark": llguidance.LLMatcher.grammar_from_lark,
    }[grammar.kind]
    try:
        problem = llguidance.LLMatcher.validate_grammar(make(grammar.text))
    except ValueError as error:
        problem = str(error)
    if problem:
        raise ConfigError("grammar of the request must be one that can be compiled.")
