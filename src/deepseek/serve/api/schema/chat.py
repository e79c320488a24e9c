"""The bodies of /v1/chat/completions."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from deepseek.serve.api.schema.base import (
    MAX_TOKENS,
    REFUSED_ANYWHERE,
    Body,
    BoundedSchema,
    GenerationBody,
    Name,
)

MAX_MESSAGES = 2048
MAX_TOOLS = 128


class TextPart(Body):
    """A part of a message. Only text: nothing is fetched, and no media are decoded."""

    type: Literal["text"]
    text: str


Content = str | Annotated[list[TextPart], Field(min_length=1, max_length=MAX_MESSAGES)]


class SystemMessage(Body):
    """What the model is told to be."""

    role: Literal["system", "developer"]
    content: Content
    name: Annotated[str, Field(max_length=64)] | None = None


class UserMessage(Body):
    """What a person says."""

    role: Literal["user"]
    content: Content
    name: Annotated[str, Field(max_length=64)] | None = None


class CalledFunction(Body):
    """Which function was called, and with what."""

    name: Annotated[str, Field(min_length=1, max_length=64)]
    arguments: str
    """A JSON object as text."""


class CalledTool(Body):
    """A call that the model made in an earlier answer."""

    id: Annotated[str, Field(max_length=128)]
    type: Literal["function"]
    function: CalledFunction


class AssistantMessage(Body):
    """What the model answered earlier."""

    role: Literal["assistant"]
    content: Content | None = None
    name: Annotated[str, Field(max_length=64)] | None = None
    tool_calls: Annotated[list[CalledTool], Field(min_length=1, max_length=MAX_TOOLS)] | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.content is None and not self.tool_calls:
            raise ValueError("an assistant's message needs content or tool_calls")
        return self


class ToolMessage(Body):
    """What a tool gave back."""

    role: Literal["tool"]
    content: Content
    tool_call_id: Annotated[str, Field(max_length=128)]


Message = Annotated[
    SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")
]
Messages = Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]


class Function(Body):
    """A function that the model may call."""

    name: Name
    description: Annotated[str, Field(max_length=8192)] | None = None
    parameters: BoundedSchema | None = None
    """JSON schema of its arguments, an object."""
    strict: bool | None = None
    """Whether the arguments of a call are held to the schema."""

    @model_validator(mode="after")
    def _takes_an_object(self) -> Self:
        if self.parameters and self.parameters.get("type", "object") != "object":
            raise ValueError("parameters must have the type 'object'")
        return self


class Tool(Body):
    """A tool that the model may use."""

    type: Literal["function"]
    function: Function


class NamedFunction(Body):
    """The name of a function."""

    name: Name


class NamedTool(Body):
    """The tool that must be used."""

    type: Literal["function"]
    function: NamedFunction


class TemplateOptions(Body):
    """What a request may tell the chat template."""

    enable_thinking: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _knows_all(cls, values: Any) -> Any:
        # unlike elsewhere a stranger is refused: other names would reach a template's inside
        unknown = sorted(set(values) - set(cls.model_fields)) if isinstance(values, dict) else []
        if unknown:
            raise ValueError(f"only {', '.join(cls.model_fields)} may be given")
        return values

    model_config = Body.model_config | {"extra": "forbid"}


Tools = Annotated[list[Tool], Field(max_length=MAX_TOOLS)]


class ChatBody(GenerationBody):
    """What a client asks of /v1/chat/completions."""

    REFUSED: ClassVar[dict[str, str]] = REFUSED_ANYWHERE | {
        "chat_template": "The model's own template is used.",
        "functions": "Use tools.",
        "function_call": "Use tool_choice.",
        "audio": "",
        "prediction": "",
        "web_search_options": "",
        "best_of": "Use n.",
        "echo": "Use /v1/completions.",
        "prompt_logprobs": "Use /v1/completions with echo and logprobs.",
        "documents": "Put them in a message.",
    }

    messages: Messages
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    """The old name of max_completion_tokens."""
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Tools | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: TemplateOptions | None = None
    modalities: list[Literal["text"]] | None = None
