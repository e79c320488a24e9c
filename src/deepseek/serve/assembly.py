"""Puts a server's engine together: pages, scheduler, executor, grammars, guesses."""

from __future__ import annotations

import functools
from collections.abc import Callable

from deepseek.data import Tokenizer
from deepseek.errors import ConfigError, describe
from deepseek.serve.api.metrics import Metrics
from deepseek.serve.audit import Auditor
from deepseek.serve.automatic import Asked, Values, choose_values
from deepseek.serve.core.drafting import Drafter, PromptLookup
from deepseek.serve.core.pages import PagePool
from deepseek.serve.core.scheduler import Scheduler, SchedulerConfig
from deepseek.serve.executor import Matcher
from deepseek.serve.generation import Grammar
from deepseek.serve.runtime.engine_executor import EngineExecutor
from deepseek.serve.runtime.grammar import Grammars
from deepseek.serve.runtime.model_drafter import ModelDrafter
from deepseek.serve.service import Service
from deepseek.serve.stepping import StepEngine
from deepseek.serve.telemetry import Telemetry


def build_service(
    engine: StepEngine,
    asked: Asked,
    *,
    model: str,
    guesses: bool = True,
    draft: StepEngine | None = None,
    resolve_adapter: Callable[[str], str] | None = None,
    audit_every: int | None = None,
    reference: StepEngine | None = None,
    price_per_hour: float | None = None,
) -> tuple[Service, Values]:
    """Return a service on an engine, not started, and the values that were chosen for it.

    Args:
        engine: with a tokenizer.
        asked: values that the user gave.
        model: its name in the metrics.
        guesses: guess ahead where that pays.
        draft: a small model that guesses; None for what the text said before.
        resolve_adapter: gives the id of the adapter of a name, as `AdapterRegistry.resolve`.
        audit_every: read one answer in so many again; None for none.
        reference: computes the audits; None for `engine`.
        price_per_hour: of the machine.

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
    vocab_size = engine.config.vocab_size
    drafter: Drafter | None = PromptLookup() if guesses else None
    if guesses and draft is not None:
        drafter = ModelDrafter(draft, executor.context, vocab_size)
    scheduler = _scheduler(executor, values, drafter)
    metrics = Metrics(model)
    telemetry = Telemetry(metrics, scheduler, price_per_hour=price_per_hour)
    auditor = None
    if audit_every is not None:
        auditor = Auditor(reference or engine, audit_every, telemetry.on_audit)
    service = Service(
        scheduler,
        executor,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        compile_grammar=_compiler(tokenizer, vocab_size),
        resolve_adapter=resolve_adapter,
        metrics=metrics,
        on_step=telemetry.on_step,
        auditor=auditor,
    )
    return service, values


def _scheduler(executor: EngineExecutor, values: Values, drafter: Drafter | None) -> Scheduler:
    config = SchedulerConfig(
        context=executor.context,
        max_running=values.max_running.value,
        max_step_tokens=values.step_tokens.value,
        max_waiting=values.max_waiting.value,
    )
    pool = PagePool(executor.num_pages, executor.page_size, least_copied=executor.least_copied)
    return Scheduler(config, pool, drafter)


def _compiler(tokenizer: Tokenizer, vocab_size: int) -> Callable[[Grammar], Matcher]:
    """Return what compiles grammars; the vocabulary is read when the first one comes."""

    @functools.cache
    def grammars() -> Grammars:
        return Grammars(tokenizer, vocab_size)

    return lambda grammar: grammars().matcher(grammar)
