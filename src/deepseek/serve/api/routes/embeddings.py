"""POST /v1/embeddings and /v1/rerank, by an encoder beside the model."""

from __future__ import annotations

import base64
from array import array
from collections.abc import Callable

from fastapi import APIRouter, Request

from deepseek.serve.api.context import request_id_of, tenant_of
from deepseek.serve.api.errors import ApiError, bad_request
from deepseek.serve.api.schema.embeddings import (
    Embedding,
    EmbeddingsAnswer,
    EmbeddingsBody,
    EmbeddingsUsage,
    Ranked,
    RankedDocument,
    RerankAnswer,
    RerankBody,
)
from deepseek.serve.api.service import Service
from deepseek.serve.api.strict_json import StrictRoute
from deepseek.serve.embedding import Embedder, Embeddings


def embeddings_router(embedder: Embedder) -> Callable[[Service], APIRouter]:
    """Return the maker of a router whose vectors come from `embedder`."""

    def make(service: Service) -> APIRouter:
        router = APIRouter(route_class=StrictRoute, tags=["embeddings"])

        @router.post("/v1/embeddings")
        async def embed(body: EmbeddingsBody, request: Request) -> EmbeddingsAnswer:
            """Return a vector for each text."""
            _check_model(embedder, body.model)
            if body.dimensions not in (None, embedder.dimensions):
                text = f"The model's vectors have {embedder.dimensions} numbers, no others."
                raise bad_request(text, "dimensions")
            found = await _embed(service, embedder, _texts(embedder, body), request)
            shown = [_shown(vector, body.encoding_format) for vector in found.vectors]
            return EmbeddingsAnswer(
                data=[Embedding(index=i, embedding=each) for i, each in enumerate(shown)],
                model=embedder.name,
                usage=_usage(found),
            )

        @router.post("/v1/rerank")
        async def rerank(body: RerankBody, request: Request) -> RerankAnswer:
            """Return texts in the order of their nearness to a question."""
            _check_model(embedder, body.model)
            found = await _embed(service, embedder, [body.query, *body.documents], request)
            query, *others = found.vectors
            scores = [sum(a * b for a, b in zip(query, each, strict=True)) for each in others]
            order = sorted(range(len(scores)), key=lambda index: (-scores[index], index))
            shows = body.return_documents is not False
            results = [
                Ranked(
                    index=index,
                    relevance_score=max(-1.0, min(1.0, scores[index])),
                    document=RankedDocument(text=body.documents[index]) if shows else None,
                )
                for index in order[: body.top_n]
            ]
            return RerankAnswer(
                id=request_id_of(request.scope),
                model=embedder.name,
                results=results,
                usage=_usage(found),
            )

        return router

    return make


def _check_model(embedder: Embedder, model: str | None) -> None:
    if model not in (None, embedder.name):
        text = f"Vectors are made by {embedder.name!r} here."
        raise ApiError(404, text, code="model_not_found", param="model")


def _texts(embedder: Embedder, body: EmbeddingsBody) -> list[str]:
    """Return the texts of a body; token ids are read back."""
    given = body.input
    if isinstance(given, str):
        return [given]
    if isinstance(given[0], int):
        given = [given]  # type: ignore[list-item]
    return [each if isinstance(each, str) else embedder.text_of(each) for each in given]  # type: ignore[arg-type]


async def _embed(
    service: Service, embedder: Embedder, texts: list[str], request: Request
) -> Embeddings:
    """Return the vectors of texts, paid for by whoever asks.

    Raises:
        ApiError: 429: more than the tenant may ask.
    """
    cost = sum(min(len(text) // 4 + 1, embedder.max_tokens) for text in texts)
    charge = service.runner.charge(tenant_of(request.scope), cost)
    num_tokens = 0
    try:
        found = await embedder.embed(texts)
        num_tokens = found.num_tokens
        return found
    finally:
        charge.settle(num_tokens)


def _shown(vector: list[float], form: str | None) -> list[float] | str:
    if form != "base64":
        return vector
    return base64.b64encode(array("f", vector).tobytes()).decode()


def _usage(found: Embeddings) -> EmbeddingsUsage:
    return EmbeddingsUsage(prompt_tokens=found.num_tokens, total_tokens=found.num_tokens)
