"""The token loop: read the prompts, then choose, emit and append one token per row and step."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from deepseek.errors import ConfigError, describe
from deepseek.generate.batch import Batch, EngineBatch
from deepseek.generate.completion import Completion, FinishReason, Piece
from deepseek.generate.engine import Engine
from deepseek.generate.memory import Memory
from deepseek.generate.prompt import read_prompts
from deepseek.generate.stop import TextStream
from deepseek.models.exits import Exits
from deepseek.ops.sampling.config import Sampling

if TYPE_CHECKING:
    from deepseek.generate.prompt import Prompts
    from deepseek.models import Decoder


def generate(
    model: Decoder | Engine,
    prompts: Prompts,
    *,
    max_tokens: int = 256,
    sampling: Sampling | None = None,
    stop: str | Sequence[str] = (),
    stop_token_ids: Sequence[int] = (),
    ignore_eos: bool = False,
    memory: Memory | None = None,
    exits: Exits | None = None,
    on_piece: Callable[[Piece], None] | None = None,
) -> Completion | list[Completion]:
    """Return the model's continuation of one prompt, or of each of several.

    Args:
        model: a decoder or an engine; text needs its `tokenizer`, token ids do not.
        prompts: text, token ids or a 1-D tensor; or a list of these, or a 2-D tensor.
        max_tokens: most tokens to generate for a prompt; less where the context ends earlier and
            there is no memory.
        sampling: how tokens are chosen; None is greedy. Row i uses seed + i.
        stop: strings that end the text and are not part of it.
        stop_token_ids: ids that end the text, besides the model's own.
        ignore_eos: go on behind the model's own end tokens.
        memory: what is kept of a text that is longer than it, in constant bytes; None to keep all,
            as far as the context reaches.
        exits: where tokens may leave the model early; runs through PyTorch. None to go through all
            layers.
        on_piece: called with each piece as it comes.

    Returns:
        A Completion for one prompt, a list for several.

    Raises:
        ConfigError: an argument that cannot be used.
        CapacityError: a prompt leaves no room in the context, or memory for the cache is short.
        BackendError: the model's logits are not finite.
    """
    start_s = time.perf_counter()
    ids, is_single = read_prompts(model, prompts, memory)
    _check_exits(model, exits)
    ends = _Ends.of(model, max_tokens, stop, stop_token_ids, ignore_eos)
    texts: list[list[str]] = [[] for _ in ids]
    tokens: list[list[int]] = [[] for _ in ids]
    first_s, last_s = [0.0] * len(ids), [0.0] * len(ids)
    reasons: list[FinishReason] = ["length"] * len(ids)
    depths: list[list[int]] = [[] for _ in ids]
    for piece in _run(model, ids, _read_sampling(sampling), ends, memory, exits):
        row, now_s = piece.row, time.perf_counter() - start_s
        if not tokens[row]:
            first_s[row] = now_s
        texts[row].append(piece.text)
        tokens[row].append(piece.token_id)
        last_s[row], reasons[row] = now_s, piece.finish_reason or "length"
        if piece.depth is not None:
            depths[row].append(piece.depth)
        if on_piece is not None:
            on_piece(piece)
    completions = [
        Completion(
            text="".join(texts[row]),
            token_ids=tuple(tokens[row]),
            finish_reason=reasons[row],
            num_prompt_tokens=len(ids[row]),
            first_token_s=first_s[row],
            total_s=last_s[row],
            depths=None if exits is None else tuple(depths[row]),
        )
        for row in range(len(ids))
    ]
    return completions[0] if is_single else completions


def stream(
    model: Decoder | Engine,
    prompts: Prompts,
    *,
    max_tokens: int = 256,
    sampling: Sampling | None = None,
    stop: str | Sequence[str] = (),
    stop_token_ids: Sequence[int] = (),
    ignore_eos: bool = False,
    memory: Memory | None = None,
    exits: Exits | None = None,
) -> Iterator[Piece]:
    """Yield the pieces of the continuations as they come: each step one per unfinished row.

    The arguments and errors are those of `generate`, checked at the call. The pieces of a row join
    to its text. Leaving the loop early is fine: nothing of the run outlives the iterator.
    """
    ids, _ = read_prompts(model, prompts, memory)
    _check_exits(model, exits)
    ends = _Ends.of(model, max_tokens, stop, stop_token_ids, ignore_eos)
    return _run(model, ids, _read_sampling(sampling), ends, memory, exits)


@dataclasses.dataclass(frozen=True)
class _Ends:
    """What ends a row."""

    max_tokens: int
    strings: tuple[str, ...]
    token_ids: frozenset[int]

    @classmethod
    def of(
        cls,
        model: Decoder | Engine,
        max_tokens: int,
        stop: str | Sequence[str],
        stop_token_ids: Sequence[int],
        ignore_eos: bool,
    ) -> _Ends:
        if isinstance(max_tokens, bool) or not isinstance(max_tokens, int) or max_tokens < 1:
            must = "a whole number, at least 1"
            raise ConfigError(describe("max_tokens", "generate", must, max_tokens))
        if not isinstance(stop, str | Sequence):
            raise ConfigError(describe("stop", "generate", "a list of strings", stop))
        if not isinstance(stop_token_ids, Sequence):
            must = "a list of token ids"
            raise ConfigError(describe("stop_token_ids", "generate", must, stop_token_ids))
        strings = (stop,) if isinstance(stop, str) else tuple(stop)
        if not all(isinstance(string, str) and string for string in strings):
            raise ConfigError(describe("stop", "generate", "strings that are not empty", stop))
        if strings and model.tokenizer is None:
            step = "Use stop_token_ids"
            raise ConfigError(describe("stop", "generate", "empty without a tokenizer", stop, step))
        ids = set(stop_token_ids)
        if not all(isinstance(token, int) for token in ids):
            raise ConfigError(describe("stop_token_ids", "generate", "token ids", stop_token_ids))
        if not ignore_eos:
            ids.update(_eos_token_ids(model))
        return cls(max_tokens, strings, frozenset(ids))


def _read_sampling(sampling: Sampling | None) -> Sampling:
    if sampling is None:
        return Sampling()
    if not isinstance(sampling, Sampling):
        step = "Use Sampling(temperature=…)"
        raise ConfigError(describe("sampling", "generate", "a Sampling", sampling, step))
    return sampling


def _check_exits(model: Decoder | Engine, exits: Exits | None) -> None:
    if exits is None:
        return
    if not isinstance(exits, Exits):
        step = "Use Exits(layers=…, threshold=…)"
        raise ConfigError(describe("exits", "generate", "an Exits", exits, step))
    if isinstance(model, Engine):
        step = "Give a model of deepseek.load, which runs through PyTorch"
        raise ConfigError(describe("exits", "generate", "None on an engine", exits, step))
    exits.check(model.config.num_layers)


def _eos_token_ids(model: Decoder | Engine) -> tuple[int, ...]:
    if model.tokenizer is not None:
        return model.tokenizer.eos_token_ids
    ids = model.config.eos_token_id
    if ids is None:
        return ()
    return ids if isinstance(ids, tuple) else (ids,)


class _Row:
    """One prompt's answer while it grows."""

    def __init__(
        self,
        model: Decoder | Engine,
        number: int,
        prompt: list[int],
        ends: _Ends,
        memory: Memory | None,
    ) -> None:
        self.number, self.prompt, self.ends = number, prompt, ends
        self.tokens_left = ends.max_tokens
        if memory is None:
            self.tokens_left = min(ends.max_tokens, model.config.max_positions - len(prompt))
        self.is_finished = False
        tokenizer = model.tokenizer
        self._text = None if tokenizer is None else TextStream(tokenizer, ends.strings)

    def take(self, token: int, depth: int | None) -> Piece:
        """Return the piece of the row's next token."""
        self.tokens_left -= 1
        text, reason = "", None
        if token in self.ends.token_ids:
            reason = "stop"
        elif self._text is not None:
            text = self._text.push(token)
        if reason is None and self.tokens_left == 0:
            reason = "length"
        if self._text is not None:
            if reason is not None and self._text.stopped_by is None:
                text += self._text.flush()
            if self._text.stopped_by is not None:
                reason = "stop"
        self.is_finished = reason is not None
        return Piece(self.number, text, token, reason, depth)


def _run(
    model: Decoder | Engine,
    prompts: list[list[int]],
    sampling: Sampling,
    ends: _Ends,
    memory: Memory | None,
    exits: Exits | None,
) -> Iterator[Piece]:
    # shortest first: rows of similar length become neighbours in the cache
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    rows = [_Row(model, number, prompts[number], ends, memory) for number in order]
    batch = _batch(model, rows, sampling, memory, exits)
    tokens = batch.start()
    while True:
        depths = batch.depths or [None] * len(rows)
        pieces = [
            row.take(token, depth) for row, token, depth in zip(rows, tokens, depths, strict=True)
        ]
        yield from sorted(pieces, key=lambda piece: piece.row) if len(pieces) > 1 else pieces
        if any(row.is_finished for row in rows):
            kept = [slot for slot, row in enumerate(rows) if not row.is_finished]
            if not kept:
                return
            tokens = [tokens[slot] for slot in kept]
            rows = [rows[slot] for slot in kept]
            batch.keep(kept)
        tokens = batch.step(tokens)


def _batch(
    model: Decoder | Engine,
    rows: list[_Row],
    sampling: Sampling,
    memory: Memory | None,
    exits: Exits | None,
) -> Batch:
    if isinstance(model, Engine):
        return EngineBatch(model, rows, sampling, memory)
    from deepseek.generate.modules import module_batch

    return module_batch(model, rows, sampling, memory, exits)
