"""What a client may send to /v1/responses: every field bounded, what is not listed refused as by
OpenAI."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

MOST_LETTERS = 4 * 2**20
MOST_ITEMS = 4096
MOST_TOOLS = 128

Text = Annotated[str, Field(max_length=MOST_LETTERS)]
Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
Handle = Annotated[str, Field(min_length=1, max_length=128)]
ItemStatus = Literal["in_progress", "completed", "incomplete"]


class _Item(BaseModel):
    """A part of the input. Clients send back what they were sent, with fields we do not need."""

    model_config = ConfigDict(extra="ignore")
    id: Handle | None = None
    status: ItemStatus | None = None


class TextPart(BaseModel):
    """A text within a message."""

    model_config = ConfigDict(extra="ignore")
    type: Literal["input_text", "output_text"]
    text: Text


class RefusalPart(BaseModel):
    """What an earlier answer refused with."""

    model_config = ConfigDict(extra="ignore")
    type: Literal["refusal"]
    refusal: Text


Part = Annotated[TextPart | RefusalPart, Field(discriminator="type")]
Parts = Annotated[list[Part], Field(max_length=MOST_ITEMS)]


class MessageItem(_Item):
    """What somebody said."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Text | Parts


class FunctionCallItem(_Item):
    """A call that the model made earlier."""

    type: Literal["function_call"]
    call_id: Handle
    name: Name
    arguments: Text


class FunctionOutputItem(_Item):
    """What a called function gave."""

    type: Literal["function_call_output"]
    call_id: Handle
    output: Text | Parts


class ReasoningItem(_Item):
    """What another model thought; taken, and not shown to ours."""

    type: Literal["reasoning"]


def _kind(item: Any) -> str | None:
    found = item.get("type", "message") if isinstance(item, dict) else getattr(item, "type", None)
    return found if isinstance(found, str) else None


InputItem = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[FunctionCallItem, Tag("function_call")]
    | Annotated[FunctionOutputItem, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")],
    Discriminator(_kind),
]


class FunctionTool(BaseModel):
    """A function that the model may call."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["function"]
    name: Name
    description: Annotated[str, Field(max_length=2**16)] | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FunctionChoice(BaseModel):
    """The one function that must be called."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["function"]
    name: Name


class PlainFormat(BaseModel):
    """Any text, or any JSON object."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["text", "json_object"]


class SchemaFormat(BaseModel):
    """JSON after a schema."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)
    type: Literal["json_schema"]
    name: Name
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    description: Annotated[str, Field(max_length=2**16)] | None = None
    strict: bool | None = None


class TextConfig(BaseModel):
    """What the text of the answer must look like."""

    model_config = ConfigDict(extra="forbid")
    format: Annotated[PlainFormat | SchemaFormat, Field(discriminator="type")] | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class Reasoning(BaseModel):
    """Taken, and without effect on a model that does not reason apart."""

    model_config = ConfigDict(extra="forbid")
    effort: Annotated[str, Field(max_length=16)] | None = None
    summary: Annotated[str, Field(max_length=16)] | None = None


class StreamOptions(BaseModel):
    """Taken, and without effect: nothing is padded here."""

    model_config = ConfigDict(extra="forbid")
    include_obfuscation: bool | None = None


class ResponseRequest(BaseModel):
    """The body of POST /v1/responses."""

    model_config = ConfigDict(extra="forbid")
    model: Annotated[str, Field(min_length=1, max_length=256)]
    input: Text | Annotated[list[InputItem], Field(min_length=1, max_length=MOST_ITEMS)]
    background: bool | None = None
    include: Annotated[list[Annotated[str, Field(max_length=64)]], Field(max_length=16)] | None = (
        None
    )
    instructions: Text | None = None
    max_output_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    max_tool_calls: Annotated[int, Field(ge=1, le=MOST_TOOLS)] | None = None
    metadata: (
        Annotated[
            dict[
                Annotated[str, Field(min_length=1, max_length=64)],
                Annotated[str, Field(max_length=512)],
            ],
            Field(max_length=16),
        ]
        | None
    ) = None
    parallel_tool_calls: bool | None = None
    previous_response_id: Annotated[str, Field(max_length=128)] | None = None
    prompt_cache_key: Annotated[str, Field(max_length=256)] | None = None
    reasoning: Reasoning | None = None
    safety_identifier: Annotated[str, Field(max_length=256)] | None = None
    service_tier: Literal["auto", "default", "flex", "priority"] | None = None
    store: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    text: TextConfig | None = None
    tool_choice: Literal["none", "auto", "required"] | FunctionChoice | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=MOST_TOOLS)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    truncation: Literal["auto", "disabled"] | None = None
    user: Annotated[str, Field(max_length=256)] | None = None

    @property
    def is_stored(self) -> bool:
        """Whether the response is kept; OpenAI's default is yes."""
        return self.store is not False

    @property
    def wants_logprobs(self) -> bool:
        """Whether each token comes with its logprob."""
        return "message.output_text.logprobs" in (self.include or ())
