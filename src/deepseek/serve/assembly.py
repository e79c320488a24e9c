"""Puts a server's engine together: pages, scheduler, executor, grammars, guesses."""

from __future__ import annotations

import functools
from collections.abc import Callable

from deepseek.errors import ConfigError, describe
from deepseek.generate import Engine
from deepseek.serve.automatic import Asked, Values, choose_values
from deepseek.serve.core.drafting import PromptLookup
from deepseek.serve.core.pages import PagePool
from deepseek.serve.core.request import Step
from deepseek.serve.core.scheduler import Scheduler, SchedulerConfig
from deepseek.serve.executor import Matcher
from deepseek.serve.generation import Grammar
from deepseek.serve.runtime.engine_executor import EngineExecutor
from deepseek.serve.runtime.grammar import Grammars
from deepseek.serve.service import Service


def build_service(
    engine: Engine,
    asked: Asked,
    *,
    guesses: bool = True,
    on_step: Callable[[Step, float], None] | None = None,
    on_death: Callable[[BaseException], None] | None = None,
) -> tuple[Service, Values]:
    """Return a service on an engine, not started, and the values that were chosen for it.

    Args:
        engine: with a tokenizer.
        asked: values that the user gave.
        guesses: guess ahead by what the text said before, where that pays.
        on_step, on_death: as of `Service`.

    Raises:
        ConfigError: the model has no tokenizer.
        CapacityError: there is no room for one request of full length.
    """
    tokenizer = engine.tokenizer
    if tokenizer is None:
        step = "Use a model folder that has tokenizer.json"
        raise ConfigError(describe("MODEL", "the server", "one with a tokenizer", None, step))
    values = choose_values(engine, asked)
    executor = EngineExecutor(engine, values.pages.value)
    config = SchedulerConfig(
        context=executor.context,
        max_running=values.max_running.value,
        max_step_tokens=values.step_tokens.value,
        max_waiting=values.max_waiting.value,
    )
    pool = PagePool(executor.num_pages, executor.page_size)
    scheduler = Scheduler(config, pool, PromptLookup() if guesses else None)
    vocab_size = engine.config.vocab_size

    @functools.cache
    def grammars() -> Grammars:
        return Grammars(tokenizer, vocab_size)

    def compile_grammar(grammar: Grammar) -> Matcher:
        return grammars().matcher(grammar)

    service = Service(
        scheduler,
        executor,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        compile_grammar=compile_grammar,
        on_step=on_step,
        on_death=on_death,
    )
    return service, values
