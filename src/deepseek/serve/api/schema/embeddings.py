"""The bodies of vectors and of ranked texts."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field, StringConstraints

from deepseek.serve.api.schema.base import Body, TokenId

MAX_TEXTS = 256
EmbeddedText = Annotated[str, StringConstraints(min_length=1, max_length=64 * 2**10)]
Ids = Annotated[list[TokenId], Field(min_length=1, max_length=16_384)]


class EmbeddingsBody(Body):
    """Texts whose vectors are wanted."""

    model: Annotated[str, Field(max_length=256)] | None = None
    input: (
        EmbeddedText
        | Annotated[list[EmbeddedText], Field(min_length=1, max_length=MAX_TEXTS)]
        | Ids
        | Annotated[list[Ids], Field(min_length=1, max_length=MAX_TEXTS)]
    )
    """Texts, or token ids of the encoder's tokenizer."""
    encoding_format: Literal["float", "base64"] | None = None
    """base64: little-endian float32."""
    dimensions: Annotated[int, Field(ge=1, le=65_536)] | None = None
    """The model's own number and no other."""
    user: Annotated[str, Field(max_length=512)] | None = None


class Embedding(BaseModel):
    """The vector of one text."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingsUsage(BaseModel):
    """Numbers of tokens."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingsAnswer(BaseModel):
    """The vectors, in the order of the texts."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingsUsage


class RerankBody(Body):
    """Texts to be put in order by what they have to do with a question."""

    model: Annotated[str, Field(max_length=256)] | None = None
    query: EmbeddedText
    documents: Annotated[list[EmbeddedText], Field(min_length=1, max_length=MAX_TEXTS)]
    top_n: Annotated[int, Field(ge=1, le=MAX_TEXTS)] | None = None
    return_documents: bool | None = None


class RankedDocument(BaseModel):
    """A text again."""

    text: str


class Ranked(BaseModel):
    """How near one text is to the question."""

    index: int
    """In `documents`."""
    relevance_score: float
    """Cosine of both vectors, -1 to 1."""
    document: RankedDocument | None = None


class RerankAnswer(BaseModel):
    """The texts, the nearest first."""

    id: str
    model: str
    results: list[Ranked]
    usage: EmbeddingsUsage
