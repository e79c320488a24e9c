"""What a request says of an answer's form, as one grammar for the engine."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from deepseek.serve.api.errors import bad_request
from deepseek.serve.api.schema.base import (
    GenerationBody,
    JsonObjectFormat,
    JsonSchemaFormat,
    StructuredOutputs,
)
from deepseek.serve.api.schema.chat import Function
from deepseek.serve.generation import Grammar

MAX_CALLS = 16
"""Most calls of one answer whose calls are enforced."""


def answer_grammar(body: GenerationBody) -> Grammar | None:
    """Return the form that a request's answer must have, or None.

    Raises:
        ApiError: 400: two forms at once.
    """
    wished = body.structured_outputs
    chosen = body.response_format
    if isinstance(chosen, JsonObjectFormat | JsonSchemaFormat):
        if wished is not None:
            text = "response_format and structured_outputs cannot be given together."
            raise bad_request(text, "structured_outputs")
        if isinstance(chosen, JsonObjectFormat):
            return Grammar(kind="json_object", text="")
        return _schema(chosen.json_schema.schema_)
    return None if wished is None else _structured(wished)


def _structured(wished: StructuredOutputs) -> Grammar:
    if wished.json_object:
        return Grammar(kind="json_object", text="")
    if wished.regex is not None:
        return Grammar(kind="regex", text=wished.regex)
    if wished.grammar is not None:
        return Grammar(kind="lark", text=wished.grammar)
    if wished.choice is not None:
        choices = " | ".join(_lark_text(choice) for choice in wished.choice)
        return Grammar(kind="lark", text=f"start: {choices}\n")
    schema = wished.json_
    return Grammar(kind="json_schema", text=schema) if isinstance(schema, str) else _schema(schema)


def calls_grammar(functions: Sequence[Function], *, parallel: bool) -> Grammar:
    """Return the grammar of an answer that is nothing but calls: a list of them as JSON."""
    schema = _call_schema(functions)
    definitions = schema.pop("$defs")
    most = MAX_CALLS if parallel else 1
    listed = {"type": "array", "minItems": 1, "maxItems": most, "items": schema}
    return _schema({**listed, "$defs": definitions})


def call_grammar(function: Function) -> Grammar:
    """Return the grammar of an answer that is one call of one function, as JSON."""
    return _schema(_call_schema([function]))


def free_grammar(functions: Sequence[Function]) -> Grammar:
    """Return the grammar of an answer that is text, calls, or text and then calls.

    Within `<tool_call>` and `</tool_call>` a call is held to its schema, and the opening tag can
    stand before a call only.
    """
    call = json.dumps(_call_schema(functions))
    lines = [
        "start: call* TEXT",
        # the lexer takes the longest token, so that the text up to a tag must be one with the tag
        'call: OPENING WS json WS "</tool_call>"',
        r"OPENING: /(?s:.*)<tool_call>/ & ~/(?s:.*)<tool_call>(?s:.+)/",
        r"TEXT: /(?s:.*)/ & ~/(?s:.*)<tool_call>(?s:.*)/",
        r"WS: /[ \n]{0,4}/",
        f"json: %json {call}",
    ]
    return Grammar(kind="lark", text="\n".join(lines) + "\n")


def _call_schema(functions: Sequence[Function]) -> dict[str, Any]:
    """Return the schema of a call of one of `functions`."""
    kinds: list[dict[str, Any]] = []
    definitions: dict[str, Any] = {}
    for number, function in enumerate(functions):
        place = f"arguments_{number}"
        parameters = function.parameters or {"type": "object"}
        definitions[place] = _moved({"type": "object", **parameters}, f"#/$defs/{place}")
        properties = {
            "name": {"const": function.name},
            "arguments": {"$ref": f"#/$defs/{place}"},
        }
        kind = {"type": "object", "properties": properties, "required": ["name", "arguments"]}
        kinds.append({**kind, "additionalProperties": False})
    chosen = kinds[0] if len(kinds) == 1 else {"anyOf": kinds}
    return {**chosen, "$defs": definitions}


def _moved(value: Any, place: str) -> Any:
    """Return a schema whose references from its root still lead where they led, now that it stands
    at `place` of another."""
    if isinstance(value, list):
        return [_moved(item, place) for item in value]
    if not isinstance(value, dict):
        return value
    moved = {key: _moved(item, place) for key, item in value.items()}
    target = value.get("$ref")
    if isinstance(target, str) and (target == "#" or target.startswith("#/")):
        moved["$ref"] = place + target[1:]
    return moved


def _schema(schema: Any) -> Grammar:
    return Grammar(kind="json_schema", text=json.dumps(schema))


def _lark_text(text: str) -> str:
    """Return a text as a Lark string: JSON's escapes are Lark's."""
    return json.dumps(text, ensure_ascii=False)
