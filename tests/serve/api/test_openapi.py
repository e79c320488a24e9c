"""The OpenAPI document, and what schemathesis finds when it believes it: nothing is filtered."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import hypothesis
import pytest
import schemathesis
from fastapi import FastAPI
from schemathesis import checks

from deepseek.serve.api.routes.admin import usage_router
from deepseek.serve.api.routes.embeddings import embeddings_router
from deepseek.serve.api.stateful import add_state
from deepseek.serve.embedding import Embeddings
from deepseek.serve.state.batches import BatchStore
from deepseek.serve.state.database import open_database
from deepseek.serve.state.files import FileStore
from deepseek.serve.state.responses import ResponseStore
from deepseek.serve.state.usage import UsageLedger
from tests.serve.api.support import HEADERS, call, make_app
from tests.serve.api.test_auth import admin_router
from tests.serve.fakes import FakeGenerator

# Left out is one check only: `positive_data_acceptance` wants every body that fits the schema to be
# taken, and no schema can say that a prompt fits the context, a token id the vocabulary, or that
# two fields exclude one another.
LEFT_OUT = {"positive_data_acceptance"}


class FakeEmbedder:
    """Gives two numbers a text."""

    name, dimensions, max_tokens = "vectors", 2, 32

    async def embed(self, texts: Sequence[str]) -> Embeddings:
        return Embeddings([[1.0, 0.0] for _ in texts], len(texts))

    def text_of(self, ids: Sequence[int]) -> str:
        return "text"


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FastAPI]:
    """Return the application with every route that there is."""
    folder = tmp_path_factory.mktemp("state")
    database = open_database(folder / "state.sqlite")
    ledger = UsageLedger(database)
    made = make_app(
        FakeGenerator(),
        routers=[embeddings_router(FakeEmbedder())],
        admin_routers=[admin_router, usage_router(ledger)],
        hosts=("localhost", "testserver"),
    )
    files = FileStore(database, folder / "files")
    add_state(made, files=files, batches=BatchStore(files), responses=ResponseStore(database))
    yield made
    ledger.close()
    database.close()


def test_every_operation_says_what_it_answers(app: FastAPI) -> None:
    document = call(app, "GET", "/openapi.json").json()
    assert len(document["paths"]) >= 20
    for path, operations in document["paths"].items():
        for operation in operations.values():
            statuses = set(operation["responses"])
            assert {"200", "400", "401", "404", "413", "429", "500", "503", "504"} <= statuses, path
            assert "422" not in statuses
            for status in statuses - {"200"}:
                content = operation["responses"][status]["content"]["application/json"]
                assert content["schema"] == {"$ref": "#/components/schemas/ErrorResponse"}
    assert document["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
    chat = document["paths"]["/v1/chat/completions"]["post"]["responses"]["200"]["content"]
    assert set(chat) == {"application/json", "text/event-stream"}


def fuzz(app: FastAPI, max_examples: int) -> None:
    """Ask everything that the document allows, and what it does not; run every check."""
    schema = schemathesis.openapi.from_asgi("/openapi.json", app, headers=HEADERS)
    chosen = [check for check in checks.CHECKS.get_all() if check.__name__ not in LEFT_OUT]
    assert len(chosen) > 8

    for result in schema.get_all_operations():
        operation = result.ok()

        @hypothesis.given(case=operation.as_strategy())
        @hypothesis.settings(
            max_examples=max_examples,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        def ask(case: Any) -> None:
            response = case.call(headers=HEADERS)
            case.validate_response(response, checks=chosen)

        ask()


def test_schemathesis_finds_nothing_in_few_examples(app: FastAPI) -> None:
    fuzz(app, 2)


@pytest.mark.slow
def test_schemathesis_finds_nothing(app: FastAPI) -> None:
    fuzz(app, 100)
