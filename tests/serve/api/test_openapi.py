"""The OpenAPI document, and what schemathesis finds when it believes it: nothing is filtered."""

from __future__ import annotations

from typing import Any

import hypothesis
import pytest
import schemathesis
from schemathesis import checks

from tests.serve.api.support import HEADERS, call, make_app
from tests.serve.api.test_auth import admin_router
from tests.serve.fakes import FakeGenerator

# Left out is one check only: `positive_data_acceptance` wants every body that fits the schema to be
# taken, and no schema can say that a prompt fits the context, a token id the vocabulary, or that
# two fields exclude one another.
LEFT_OUT = {"positive_data_acceptance"}

APP = make_app(FakeGenerator(), admin_routers=[admin_router], hosts=("localhost", "testserver"))


def test_every_operation_says_what_it_answers() -> None:
    document = call(APP, "GET", "/openapi.json").json()
    assert len(document["paths"]) >= 12
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


def fuzz(max_examples: int) -> None:
    """Ask everything that the document allows, and what it does not; run every check."""
    schema = schemathesis.openapi.from_asgi("/openapi.json", APP, headers=HEADERS)
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


def test_schemathesis_finds_nothing_in_few_examples() -> None:
    fuzz(2)


@pytest.mark.slow
def test_schemathesis_finds_nothing() -> None:
    fuzz(100)
