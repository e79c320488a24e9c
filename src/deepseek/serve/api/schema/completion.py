"""The bodies of /v1/completions, /tokenize and /detokenize."""

from __future__ import annotations

from typing import Annotated, ClassVar, Self

from pydantic import Field, StringConstraints, model_validator

from deepseek.serve.api.schema.base import (
    MAX_TOKENS,
    REFUSED_ANYWHERE,
    Body,
    GenerationBody,
    TokenId,
)
from deepseek.serve.api.schema.chat import Messages, TemplateOptions, Tools

MAX_PROMPTS = 64
MAX_PROMPT_TOKENS = 2**20

PromptText = Annotated[str, StringConstraints(min_length=1)]
PromptIds = Annotated[list[TokenId], Field(min_length=1, max_length=MAX_PROMPT_TOKENS)]
Prompt = (
    PromptText
    | PromptIds
    | Annotated[list[PromptText], Field(min_length=1, max_length=MAX_PROMPTS)]
    | Annotated[list[PromptIds], Field(min_length=1, max_length=MAX_PROMPTS)]
)


class CompletionBody(GenerationBody):
    """What a client asks of /v1/completions."""

    REFUSED: ClassVar[dict[str, str]] = REFUSED_ANYWHERE | {
        "suffix": "The model continues a text; it does not fill one in.",
        "tools": "Use /v1/chat/completions.",
        "messages": "Use /v1/chat/completions.",
        "prompt_logprobs": "Use echo and logprobs.",
    }

    prompt: Prompt
    max_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = None
    """0 only with echo: the prompt alone."""
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    best_of: Annotated[int, Field(ge=1, le=16)] | None = None
    """Must equal n: all answers are given back."""
    add_special_tokens: bool | None = None
    """Whether a text is begun with what the model expects there; true where absent."""


class TokenizeBody(Body):
    """What a client asks of /tokenize: a text, or a conversation as a chat would see it."""

    model: Annotated[str, Field(max_length=256)] | None = None
    prompt: str | None = None
    messages: Messages | None = None
    tools: Tools | None = None
    chat_template_kwargs: TemplateOptions | None = None
    add_special_tokens: bool | None = None
    """For a text; true where absent."""
    add_generation_prompt: bool | None = None
    """For a conversation; true where absent."""
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self


class DetokenizeBody(Body):
    """What a client asks of /detokenize."""

    model: Annotated[str, Field(max_length=256)] | None = None
    tokens: Annotated[list[TokenId], Field(max_length=MAX_PROMPT_TOKENS)]
