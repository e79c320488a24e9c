"""The tools of a request: what the model is told of them, and what its answer is held to."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any, Literal

from deepseek.serve.api.errors import bad_request
from deepseek.serve.api.grammars import answer_grammar, call_grammar, calls_grammar, free_grammar
from deepseek.serve.api.schema.chat import ChatBody, Function, NamedTool, Tool
from deepseek.serve.api.tool_calls import CLOSING, OPENING, ToolCallParser
from deepseek.serve.generation import Grammar

ToolMode = Literal["none", "auto", "required", "named"]

INSTRUCTIONS = f"""You can call functions. These are the functions, one a line, as JSON:
<tools>
{{tools}}
</tools>
To call one, write this, once for each call, and nothing behind it:
{OPENING}
{{{{"name": "the name", "arguments": {{{{"the argument": "its value"}}}}}}}}
{CLOSING}
What a function gives back comes to you in <tool_response> and </tool_response>."""
"""What stands in the system message where the model's chat template does not know tools."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToolPlan:
    """How a request's tools are used."""

    mode: ToolMode
    shown: tuple[dict[str, Any], ...]
    """The tools that the model is told of, in OpenAI's form."""
    names: frozenset[str]
    """Functions whose calls are looked for."""
    grammar: Grammar | None
    """What the answer is held to: by the tools, or by the request's own format."""
    takes_bare: bool
    is_parallel: bool

    def parser(self) -> ToolCallParser | None:
        """Return a parser for one answer, or None where no calls are looked for."""
        if not self.names:
            return None
        most = None if self.is_parallel else 1
        return ToolCallParser(self.names, takes_bare=self.takes_bare, max_calls=most)


def plan_tools(body: ChatBody) -> ToolPlan:
    """Return how a request's tools are used.

    Raises:
        ApiError: 400: a tool that is not there, two of a name, or forms that exclude one another.
    """
    tools, chosen = body.tools or [], body.tool_choice
    functions = _functions(tools)
    own = answer_grammar(body)
    mode: ToolMode = "named" if isinstance(chosen, NamedTool) else chosen or "auto"
    if not tools:
        if mode in ("required", "named"):
            raise bad_request("tool_choice asks for a tool, and tools is empty.", "tool_choice")
        mode = "none"
    if mode != "none" and own is not None:
        text = "A format of the answer and tools exclude one another; set tool_choice to 'none'."
        raise bad_request(text, "response_format")
    is_parallel = body.parallel_tool_calls is not False
    wanted = [_named(functions, chosen)] if isinstance(chosen, NamedTool) else functions
    grammar, takes_bare = own, True
    if mode == "named":
        grammar = call_grammar(wanted[0])
    elif mode == "required":
        grammar = calls_grammar(wanted, parallel=is_parallel)
    elif mode == "auto" and any(function.strict for function in functions):
        grammar, takes_bare = free_grammar(functions), False
    return ToolPlan(
        mode=mode,
        shown=() if mode == "none" else tuple(_shown(tool) for tool in tools),
        names=frozenset() if mode == "none" else frozenset(item.name for item in wanted),
        grammar=grammar,
        takes_bare=takes_bare,
        is_parallel=is_parallel and mode != "named",
    )


def instructions(shown: Sequence[dict[str, Any]]) -> str:
    """Return what tells a model of tools whose chat template does not."""
    lines = [json.dumps(tool["function"], ensure_ascii=False) for tool in shown]
    return INSTRUCTIONS.format(tools="\n".join(lines))


def show_tools(tools: Sequence[Tool]) -> tuple[dict[str, Any], ...]:
    """Return tools as a chat template takes them."""
    return tuple(_shown(tool) for tool in tools)


def _shown(tool: Tool) -> dict[str, Any]:
    function = tool.function.model_dump(exclude_none=True, exclude={"strict"})
    return {"type": "function", "function": function}


def _functions(tools: Sequence[Tool]) -> list[Function]:
    functions = [tool.function for tool in tools]
    if len({function.name for function in functions}) < len(functions):
        raise bad_request("Two tools have the same name.", "tools")
    return functions


def _named(functions: Sequence[Function], chosen: NamedTool) -> Function:
    for function in functions:
        if function.name == chosen.function.name:
            return function
    raise bad_request("tool_choice names a function that is not among the tools.", "tool_choice")
