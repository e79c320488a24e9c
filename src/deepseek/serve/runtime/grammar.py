"""Answers that must have a form: what may come next, token by token, through llguidance."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import numpy as np

from deepseek.data import Tokenizer
from deepseek.errors import CapacityError, ConfigError, describe, missing_extra
from deepseek.serve.generation import Grammar

if TYPE_CHECKING:
    from llguidance import LLMatcher

MAX_GRAMMARS = 64
"""Compiled grammars that are kept for the next request of the same form."""
# Where any white space may stand, a small model writes nothing else.
_JSON_FORM: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_OBJECT = '{"type": "object"}'


class Grammars:
    """Compiles grammars for one tokenizer and keeps the last ones.

    Args:
        tokenizer: of the model.
        vocab_size: of its logits.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        """Read the vocabulary; takes about a second.

        Raises:
            MissingExtra: llguidance is not installed.
        """
        try:
            import llguidance
        except ImportError as error:
            raise missing_extra("llguidance", "serve", "for answers of a given form") from error
        self._vocab_size = vocab_size
        self._tokenizer = llguidance.LLTokenizer(
            tokenizer.backend.to_str(), n_vocab=vocab_size, eos_token=list(tokenizer.eos_token_ids)
        )
        # Past these a grammar is refused when it is compiled, or the answer ends on the way.
        self._limits = llguidance.LLParserLimits(
            max_items_in_row=1000,
            initial_lexer_fuel=500_000,
            step_lexer_fuel=100_000,
            step_max_items=20_000,
            max_lexer_states=20_000,
            max_grammar_size=200_000,
        )
        self._compiled: OrderedDict[Grammar, LLMatcher] = OrderedDict()
        self._lock = threading.Lock()

    def matcher(self, grammar: Grammar) -> Matcher:
        """Return what follows one answer of this form. May be called from any thread.

        Raises:
            ConfigError: the grammar cannot be compiled, or only at too high a cost.
        """
        with self._lock:
            found = self._compiled.pop(grammar, None)
        found = found or self._compile(grammar)
        with self._lock:
            self._compiled[grammar] = found
            while len(self._compiled) > MAX_GRAMMARS:
                self._compiled.popitem(last=False)
        return Matcher(found.deep_copy(), self._vocab_size)

    def _compile(self, grammar: Grammar) -> LLMatcher:
        from llguidance import LLMatcher

        try:
            text = _as_llguidance(grammar)
        except (ValueError, RecursionError) as error:
            raise _refused(grammar, str(error)) from error
        matcher = LLMatcher(self._tokenizer, text, log_level=0, limits=self._limits)
        if matcher.is_error():
            raise _refused(grammar, matcher.get_error())
        return matcher


def _as_llguidance(grammar: Grammar) -> str:
    from llguidance import LLMatcher

    if grammar.kind == "regex":
        return LLMatcher.grammar_from_regex(grammar.text)
    if grammar.kind == "lark":
        return LLMatcher.grammar_from_lark(grammar.text)
    schema = _OBJECT if grammar.kind == "json_object" else grammar.text
    return LLMatcher.grammar_from_json_schema(schema, defaults=_JSON_FORM)


def _refused(grammar: Grammar, why: str) -> ConfigError:
    name = grammar.kind.replace("_", " ")
    return ConfigError(describe(name, "the request", "one that can be compiled", _first_line(why)))


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0] if text.strip() else "no reason given"


class Matcher:
    """Where one answer stands in its grammar."""

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self._matcher: Any = matcher
        self._mask = np.zeros((1, -(-vocab_size // 32)), np.int32)

    def mask(self, logits: np.ndarray) -> None:
        """Set the logits [V] of tokens that may not come next to minus infinity.

        Raises:
            CapacityError: the grammar became too costly on the way.
        """
        from llguidance.numpy import fill_next_token_bitmask

        fill_next_token_bitmask(self._matcher, self._mask)
        if self._matcher.is_error():
            must, got = "cheap enough to follow", _first_line(self._matcher.get_error())
            raise CapacityError(describe("grammar", "the request", must, got))
        bits = np.unpackbits(self._mask.view(np.uint8), bitorder="little")[: len(logits)]
        logits[bits == 0] = -np.inf

    def take(self, token: int) -> None:
        """Go on behind a token that was allowed."""
        self._matcher.consume_token(token)

    @property
    def is_complete(self) -> bool:
        """True where nothing but the end may come."""
        return self._matcher.is_stopped() and not self._matcher.is_error()
