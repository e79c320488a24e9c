"""Chat templates: jinja2 text that came with a model, so untrusted: sandboxed and bounded."""

from __future__ import annotations

import contextvars
import datetime
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from deepseek.errors import ConfigError, describe

MAX_CHARACTERS = 16 * 2**20
"""Longest text a template may produce, and longest value that one `+`, `*` or `**` may make."""
MAX_STEPS = 200_000
"""Most loop rounds and macro calls of one rendering."""
MAX_SECONDS = 2.0
"""Longest time of one rendering, looked at in every loop round and macro call."""
OPTIONS = frozenset({"enable_thinking"})
"""Variables that a caller may set beside the conversation's own; others could change what a
template takes for granted."""

_steps_left: contextvars.ContextVar[list[int]] = contextvars.ContextVar(
    "steps left in this rendering"
)
_render_until: contextvars.ContextVar[float] = contextvars.ContextVar(
    "time.monotonic() at which this rendering is given up"
)


class ChatTemplate:
    """One compiled chat template, following transformers' conventions.

    The sandbox gives no access to Python objects or files. Four bounds keep a hostile or broken
    template from hanging the process: on the length of the output, on the number and the time of
    loop rounds and macro calls, and on the size of what `+`, `*` and `**` make. Not bounded is the
    memory of other ways to grow a text inside a template (`~`, `join`, the width in a format); a
    service that renders templates of strangers needs a memory limit of its own.
    """

    def __init__(self, source: str) -> None:
        """Compile `source`.

        Raises:
            ConfigError: the template is not valid jinja2.
        """
        self.source = source
        environment = _Environment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationTag, jinja2.ext.loopcontrols],
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            tree = environment.parse(source)
            self._variables = jinja2.meta.find_undeclared_variables(environment.parse(source))
            _count_steps(tree, environment)
            code = environment.compile(tree)
            self._template = jinja2.Template.from_code(
                environment, code, environment.make_globals(None)
            )
        except (jinja2.TemplateError, RecursionError, OverflowError, SyntaxError) as error:
            step = (
                "Use a model whose chat template can be compiled, or give the prompt as plain text"
            )
            raise ConfigError(
                describe("chat_template", "tokenizer", "valid jinja2", str(error), step)
            ) from error

    def takes(self, variable: str) -> bool:
        """Return whether the template looks at a variable, such as `tools`."""
        return variable in self._variables

    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        add_generation_prompt: bool,
        special_tokens: Mapping[str, str],
        tools: Sequence[Mapping[str, object]] | None = None,
        options: Mapping[str, object] | None = None,
    ) -> str:
        """Return the prompt text of a conversation.

        Args:
            messages: each with a `role` and plain JSON values.
            add_generation_prompt: end with the header that opens the assistant's answer.
            special_tokens: `bos_token`, `eos_token`, ... as the template's variables.
            tools: functions that may be called, as JSON values in OpenAI's form.
            options: further variables, of those in `OPTIONS`.

        Raises:
            ConfigError: the messages are malformed, an option is not one, the template refuses
                them, or a bound is passed.
        """
        unknown = sorted(set(options or {}) - OPTIONS)
        if unknown:
            must = f"some of {', '.join(sorted(OPTIONS))}"
            raise ConfigError(describe("options", "apply_chat_template", must, unknown))
        variables = dict(
            special_tokens,
            **(options or {}),
            messages=_plain_messages(messages),
            tools=json.loads(json.dumps(list(tools))) if tools else None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
        )
        token = _steps_left.set([MAX_STEPS])
        until = _render_until.set(time.monotonic() + MAX_SECONDS)
        try:
            return _join_within(self._template.generate(variables), MAX_CHARACTERS)
        except (
            jinja2.TemplateError,
            ArithmeticError,
            LookupError,
            MemoryError,
            RecursionError,
        ) as error:
            raise _render_error(error) from error
        except (TypeError, ValueError, AttributeError) as error:
            raise _render_error(error) from error
        finally:
            _steps_left.reset(token)
            _render_until.reset(until)


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The sandbox, with `+`, `*` and `**` held to results of a bounded size."""

    intercepted_binops = frozenset(["+", "*", "**"])

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**":
            size = (
                len(str(left)) * abs(right)
                if isinstance(left, int) and isinstance(right, int)
                else 0
            )
        elif operator == "+":
            size = _size(left) + _size(right)
        else:
            size = max(_repeated_size(left, right), _repeated_size(right, left))
        if size > MAX_CHARACTERS:
            raise jinja2.exceptions.SecurityError(f"the result of {operator!r} is too large")
        return super().call_binop(context, operator, left, right)


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's part for training; for a prompt it is a scope."""

    tags = {"generation"}  # noqa: RUF012  jinja2 declares it as an instance attribute

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


def _count_steps(tree: jinja2.nodes.Template, environment: jinja2.Environment) -> None:
    """Make every loop round and macro call of a parsed template pay one step."""
    count = f"{__name__}.{_count_rounds.__name__}"
    pay = f"{__name__}.{_pay_step.__name__}"
    for loop in tree.find_all(jinja2.nodes.For):
        # the iterable pays too: a loop whose `if` filters every round away never enters its body
        loop.iter = _call(count, loop.iter)
        loop.body.insert(0, jinja2.nodes.ExprStmt(_call(pay)))
    for macro in tree.find_all((jinja2.nodes.Macro, jinja2.nodes.CallBlock)):
        macro.body.insert(0, jinja2.nodes.ExprStmt(_call(pay)))
    tree.set_environment(environment)


def _call(name: str, *arguments: Any) -> jinja2.nodes.Call:
    return jinja2.nodes.Call(jinja2.nodes.ImportedName(name), list(arguments), [], None, None)


def _pay_step() -> None:
    left = _steps_left.get()
    left[0] -= 1
    if left[0] < 0:
        raise jinja2.exceptions.SecurityError(f"it takes more than {MAX_STEPS:,} steps")
    if time.monotonic() > _render_until.get():
        raise jinja2.exceptions.SecurityError(f"it takes more than {MAX_SECONDS} seconds")


def _count_rounds(items: Iterable[Any]) -> Iterator[Any]:
    for item in items:
        _pay_step()
        yield item


def _repeated_size(sequence: Any, times: Any) -> int:
    return _size(sequence) * times if isinstance(times, int) else 0


def _size(value: Any) -> int:
    return len(value) if isinstance(value, str | list | tuple) else 0


def _join_within(parts: Iterable[str], limit: int) -> str:
    kept, size = [], 0
    for part in parts:
        size += len(part)
        if size > limit:
            raise jinja2.exceptions.SecurityError(f"it produces more than {limit:,} characters")
        kept.append(part)
    return "".join(kept)


def _plain_messages(messages: Sequence[Mapping[str, object]]) -> list[dict[str, Any]]:
    """Return a copy of the messages in JSON values; keys whose value is None are left out."""
    owner, must = "apply_chat_template", "a list of {'role': ..., 'content': ...}"
    step = "Write [{'role': 'user', 'content': 'Hello'}]"
    if (
        isinstance(messages, str | bytes | Mapping)
        or not isinstance(messages, Sequence)
        or not messages
    ):
        raise ConfigError(describe("messages", owner, must, messages, step))
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ConfigError(
                describe("message", owner, "a mapping with a 'role' of text", message, step)
            )
    try:
        plain: list[dict[str, Any]] = json.loads(
            json.dumps([dict(message) for message in messages])
        )
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(
            describe("messages", owner, "plain JSON values", str(error), step)
        ) from error
    return [
        {key: value for key, value in message.items() if value is not None} for message in plain
    ]


def _render_error(error: Exception) -> ConfigError:
    reason = str(error) or type(error).__name__
    step = "Check the roles and their order; the template came with the model"
    return ConfigError(describe("messages", "chat_template", "renderable", reason, step))


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return `value` as JSON; jinja2's own filter would escape HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
