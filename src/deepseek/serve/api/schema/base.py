"""What the bodies of completions and of chat have in common."""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    StringConstraints,
    model_validator,
)

from deepseek.serve.api.errors import bad_request
from deepseek.serve.api.strict_json import find_problem

MAX_SCHEMA_DEPTH = 32
MAX_SCHEMA_BYTES = 64 * 2**10
MAX_SCHEMA_VALUES = 5_000
MAX_TOKEN_ID = 2**32 - 1
MAX_TOKENS = 10_000_000
"""Above any context; what the context leaves is checked against the model."""


class Body(BaseModel):
    """The base of request bodies.

    Types are not converted (`"5"` is no number), null is the same as absent, and unknown fields
    are ignored. Fields of other servers that would change the answer and that this one does not
    have are refused, so that no wish is skipped in silence.
    """

    model_config = ConfigDict(strict=True, extra="ignore", populate_by_name=True)
    REFUSED: ClassVar[dict[str, str]] = {}
    """Field -> what to do instead."""

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, values: Any) -> Any:
        for name, step in cls.REFUSED.items():
            if isinstance(values, dict) and values.get(name) not in (None, False):
                text = f"{name} is not supported by this server. {step}".strip()
                raise bad_request(text, name, "unsupported_parameter")
        return values


def _bounded(value: Any) -> Any:
    problem = find_problem(value, MAX_SCHEMA_DEPTH, MAX_SCHEMA_VALUES)
    if problem:
        raise ValueError(f"the schema {problem}")
    if len(json.dumps(value)) > MAX_SCHEMA_BYTES:
        raise ValueError(f"the schema is longer than {MAX_SCHEMA_BYTES} bytes")
    return value


BoundedSchema = Annotated[dict[str, JsonValue], AfterValidator(_bounded)]
"""A JSON schema of bounded depth and size; whether it can be enforced is the engine's to say."""
GrammarText = Annotated[str, StringConstraints(min_length=1, max_length=MAX_SCHEMA_BYTES)]
Name = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
TokenId = Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)]
StopText = Annotated[str, StringConstraints(min_length=1, max_length=256)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Choice = Annotated[str, StringConstraints(min_length=1, max_length=4096)]


class StreamOptions(Body):
    """How a stream is sent."""

    include_usage: bool | None = None
    """Whether a last chunk tells the numbers of tokens."""


class TextFormat(Body):
    """Any text."""

    type: Literal["text"]


class JsonObjectFormat(Body):
    """Some JSON object."""

    type: Literal["json_object"]


class NamedSchema(Body):
    """A JSON schema with its name."""

    name: Name
    description: Annotated[str, Field(max_length=4096)] | None = None
    schema_: Annotated[BoundedSchema, Field(alias="schema")]
    strict: bool | None = None
    """Makes no difference: the schema is always enforced."""


class JsonSchemaFormat(Body):
    """JSON of a schema."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


ResponseFormat = Annotated[
    TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")
]


class StructuredOutputs(Body):
    """What an answer must look like, as vLLM says it: one of these."""

    json_: Annotated[BoundedSchema | GrammarText | None, Field(alias="json")] = None
    json_object: bool | None = None
    regex: GrammarText | None = None
    grammar: GrammarText | None = None
    """In llguidance's variant of Lark."""
    choice: Annotated[list[Choice], Field(min_length=1, max_length=256)] | None = None

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        wishes = (self.json_, self.json_object, self.regex, self.grammar, self.choice)
        if sum(wish not in (None, False) for wish in wishes) != 1:
            raise ValueError("give exactly one of json, json_object, regex, grammar, choice")
        return self


class GenerationBody(Body):
    """How an answer is made: OpenAI's fields, and below them those of this server."""

    model: Annotated[str, Field(max_length=256)] | None = None
    """The served model or one of its adapters; absent for the model."""
    n: Annotated[int, Field(ge=1, le=16)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=4)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logit_bias: (
        Annotated[
            dict[
                Annotated[str, StringConstraints(pattern=r"^[0-9]{1,10}$")],
                Annotated[float, Field(ge=-100, le=100)],
            ],
            Field(max_length=300),
        ]
        | None
    ) = None
    user: Annotated[str, Field(max_length=512)] | None = None
    """Ignored: a key says who asks."""
    response_format: ResponseFormat | None = None

    structured_outputs: StructuredOutputs | None = None
    top_k: Annotated[int, Field(ge=-1, le=MAX_TOKENS)] | None = None
    """0 and -1 for all tokens."""
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = None
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=64)] | None = None
    deadline_ms: Annotated[int, Field(ge=1, le=86_400_000)] | None = None
    """Milliseconds from now after which nobody wants the answer."""
    priority: Annotated[int, Field(ge=0, le=1000)] | None = None
    """0 is usual, above it is later; nobody can raise their own."""


REFUSED_ANYWHERE = {
    "prompt_embeds": "Give text or token ids.",
    "guided_json": "Use structured_outputs.",
    "guided_regex": "Use structured_outputs.",
    "guided_grammar": "Use structured_outputs.",
    "guided_choice": "Use structured_outputs.",
    "use_beam_search": "",
}
"""Fields of other servers that are refused in completions and in chat."""
