"""The events of an answer, in the dialects of OpenAI, vLLM, SGLang, llama.cpp, OpenVINO and ours.

Read alike: pieces that only name the role or are empty; `text` of completions and `content` of
chat; thoughts as `reasoning_content` or `reasoning`; counts in the last piece, in a piece without
choices, or in all of them; errors as an object, as a string, or as an object of the kind `error`.
"""

from __future__ import annotations

import json
from typing import Any

from deepseek.errors import FormatError, describe
from deepseek.serve.load.outcome import Outcome

DONE = "[DONE]"


def read_event(data: str, outcome: Outcome, now_s: float) -> None:
    """Write down what an event says.

    Raises:
        FormatError: it is no JSON object.
    """
    try:
        event = json.loads(data)
    except ValueError as error:
        raise FormatError(describe("event", "the server", "a JSON object", data)) from error
    if not isinstance(event, dict):
        raise FormatError(describe("event", "the server", "a JSON object", data))
    if event.get("error") or event.get("object") == "error":
        outcome.error, outcome.detail = "error_event", error_words(event)
        return
    _read_counts(event.get("usage"), outcome)
    for choice in event.get("choices") or ():
        if isinstance(choice, dict) and choice.get("index", 0) == 0:
            _read_choice(choice, outcome, now_s)


def error_words(event: dict[str, Any]) -> str:
    """Return what an error says, of any of its forms."""
    error = event.get("error") or event
    if isinstance(error, dict):
        error = error.get("message") or error.get("detail") or json.dumps(error)
    return str(error)[:200]


def _read_choice(choice: dict[str, Any], outcome: Outcome, now_s: float) -> None:
    delta = choice.get("delta")
    said = delta if isinstance(delta, dict) else choice
    pieces = [said.get(name) for name in ("reasoning_content", "reasoning", "content", "text")]
    if text := next((piece for piece in pieces if isinstance(piece, str) and piece), ""):
        outcome.piece_times_s.append(now_s)
        outcome.text += text
    if isinstance(reason := choice.get("finish_reason"), str):
        outcome.finish_reason = reason


def _read_counts(usage: object, outcome: Outcome) -> None:
    if not isinstance(usage, dict):
        return
    outcome.prompt_tokens = _count(usage.get("prompt_tokens"), outcome.prompt_tokens)
    outcome.answer_tokens = _count(usage.get("completion_tokens"), outcome.answer_tokens)
    details = usage.get("prompt_tokens_details")
    if isinstance(details, dict):
        outcome.cached_tokens = _count(details.get("cached_tokens"), outcome.cached_tokens)


def _count(value: object, otherwise: int | None) -> int | None:
    return value if isinstance(value, int) and value >= 0 else otherwise
