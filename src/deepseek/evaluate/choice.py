"""Multiple choice by log-likelihood, in the sense of the LM Evaluation Harness."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from deepseek.errors import ConfigError, describe
from deepseek.evaluate.base import (
    CausalModel,
    Condition,
    Progress,
    TextTokenizer,
    device_of,
    max_positions_of,
    measuring,
    model_conditions,
    position_logits,
    repeat_command,
    target_scores,
    tokenizer_of,
)
from deepseek.evaluate.intervals import wilson
from deepseek.evaluate.items import ChoiceItem, items_hash
from deepseek.records import Measurement

DEFAULT_LENGTH = 2048


@dataclasses.dataclass(frozen=True)
class ScoredChoice:
    """One item with what the model said of each of its choices."""

    log_likelihoods: tuple[float, ...]
    """Of each choice after the context, in nats."""
    is_greedy: tuple[bool, ...]
    """Whether greedy decoding would have written the choice."""
    chosen: int
    """The likeliest choice."""
    chosen_by_characters: int
    """The likeliest for its length in characters (`acc_norm`)."""
    chosen_by_bytes: int
    """The likeliest for its length in bytes (`acc_bytes`)."""
    answer: int


@dataclasses.dataclass(frozen=True)
class MultipleChoiceResult:
    """What `multiple_choice` found."""

    measurements: list[Measurement]
    """`acc`, `acc_norm` and `acc_bytes`."""
    items: tuple[ScoredChoice, ...]


@dataclasses.dataclass(frozen=True)
class Request:
    """A continuation to be scored after a context, as tokens."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]

    def row(self, max_length: int) -> tuple[int, ...]:
        """Return what the model is given: all but the last token, cut from the left."""
        return (self.context + self.continuation)[-(max_length + 1) :][:-1]


def multiple_choice(
    model: CausalModel,
    items: Sequence[ChoiceItem],
    *,
    tokenizer: TextTokenizer | None = None,
    delimiter: str = " ",
    max_length: int | None = None,
    batch_size: int = 8,
    flags: Mapping[str, str | int | None] | None = None,
    progress: Progress | None = None,
) -> MultipleChoiceResult:
    """Measure how often the right continuation is the likeliest one.

    Args:
        model: see `base.CausalModel`.
        items: at least one.
        tokenizer: None = the model's own.
        delimiter: stands between context and choice; not counted in the choice's length.
        max_length: tokens the model sees, contexts are cut from the left; None = the model's
            length, or 2048.
        batch_size: rows at once, sorted by length.
        flags: options of the command line that give these items again; None = there are none.
        progress: called after each batch.

    Returns:
        `acc` (likeliest choice), `acc_norm` (by log-likelihood a character, the harness's
        `acc_norm`), `acc_bytes` (by log-likelihood a byte, the harness's `acc_bytes`), with Wilson
        intervals over the items; and every item.

    Raises:
        ConfigError: no items, no tokenizer, or a choice that is longer than the model.

    Source: EleutherAI/lm-evaluation-harness 0.4.13, `api/model.py` (`_encode_pair`,
    `loglikelihood`), `models/huggingface.py` (`_loglikelihood_tokens`) and `api/task.py`.
    Deviation: the softmax is always in fp32.
    """
    tokenizer = tokenizer_of(model, tokenizer, "multiple_choice")
    if not items:
        raise ConfigError(describe("items", "multiple_choice", "at least one", list(items)))
    requests = [
        encode_pair(tokenizer, item.context, delimiter + choice)
        for item in items
        for choice in item.choices
    ]
    max_length = max_length or max_positions_of(model) or DEFAULT_LENGTH
    scores = log_likelihoods(
        model, requests, max_length=max_length, batch_size=batch_size, progress=progress
    )
    scored, begin = [], 0
    for item in items:
        scored.append(_scored(item, scores[begin : begin + len(item.choices)]))
        begin += len(item.choices)
    conditions: dict[str, Condition] = {
        **model_conditions(model),
        "items": len(items),
        "items_sha256": items_hash(items),
    }
    conditions |= {"max_length": max_length, "interval": "Wilson over items"}
    repeatable = flags is not None
    command = repeat_command(model, "choice", flags or {}, repeatable=repeatable)
    return MultipleChoiceResult(_measurements(scored, conditions, command), tuple(scored))


def encode_pair(tokenizer: TextTokenizer, context: str, continuation: str) -> Request:
    """Return context and continuation as tokens, split where the harness splits them.

    Blanks at the end of the context go to the continuation; both are encoded as one text, and what
    exceeds the context's own tokens is the continuation. After an empty context stands the
    tokenizer's BOS (else EOS) token.

    Raises:
        ConfigError: there is nothing to score, or the tokenizer has neither BOS nor EOS for an
            empty context.
    """
    if context == "":
        request = _after_prefix_token(tokenizer, continuation)
    else:
        kept = context.rstrip()
        continuation = context[len(kept) :] + continuation
        whole = harness_encode(tokenizer, kept + continuation)
        alone = harness_encode(tokenizer, kept)
        request = Request(tuple(alone), tuple(whole[len(alone) :]))
    if not request.continuation or not request.context:
        must = "at least one token after a context of at least one"
        raise ConfigError(describe("continuation", "multiple_choice", must, continuation))
    return request


def harness_encode(tokenizer: TextTokenizer, text: str) -> list[int]:
    """Return a text as tokens, with special tokens unless it already begins with the first."""
    prefix = prefix_token(tokenizer)
    begins = prefix is not None and text.startswith(
        tokenizer.decode([prefix], skip_special_tokens=False)
    )
    return list(
        tokenizer.encode(text, add_special_tokens=False) if begins else tokenizer.encode(text)
    )


def prefix_token(tokenizer: TextTokenizer) -> int | None:
    """Return the token that stands for an empty context: BOS, or else EOS."""
    bos = tokenizer.bos_token_id
    return bos if bos is not None else tokenizer.eos_token_id


def log_likelihoods(
    model: CausalModel,
    requests: Sequence[Request],
    *,
    max_length: int,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> list[tuple[float, bool]]:
    """Return log-likelihood (nats) and greediness of each continuation, in the order given.

    Rows are run longest first, padded on the right. Where the tokens of one request begin those of
    another (as with choices of one token, or the same context and choice twice) one row serves
    both.

    Args:
        model: see `base.CausalModel`.
        requests: what to score.
        max_length: tokens the model sees; longer rows lose their beginning.
        batch_size: rows at once.
        progress: called after each batch.

    Raises:
        ConfigError: a continuation is longer than `max_length`.
    """
    longest = max((len(request.continuation) for request in requests), default=0)
    if longest > max_length:
        must = f"at most {max_length} tokens long, the model's length"
        raise ConfigError(describe("choice", "multiple_choice", must, f"{longest} tokens"))
    rows = [request.row(max_length) for request in requests]
    groups = sorted(_shared_rows(rows).items(), key=lambda group: (-len(group[0]), group[0]))
    found: dict[int, tuple[float, bool]] = {}
    with measuring(model):
        for begin in range(0, len(groups), batch_size):
            batch = groups[begin : begin + batch_size]
            found |= _score_batch(model, batch, rows, requests)
            if progress is not None:
                progress("multiple choice", min(1.0, (begin + batch_size) / len(groups)))
    return [found[index] for index in range(len(requests))]


def _after_prefix_token(tokenizer: TextTokenizer, continuation: str) -> Request:
    prefix = prefix_token(tokenizer)
    if prefix is None:
        must = "one with a BOS or EOS token, to stand for an empty context"
        raise ConfigError(
            describe("tokenizer", "multiple_choice", must, None, "Give every item a context")
        )
    ids = tuple(tokenizer.encode(continuation, add_special_tokens=False))
    return Request(ids[:1], ids[1:]) if ids[:1] == (prefix,) else Request((prefix,), ids)


def _shared_rows(rows: Sequence[tuple[int, ...]]) -> dict[tuple[int, ...], list[int]]:
    """Return the rows that must be run, each with the requests whose own row it begins with."""
    groups: dict[tuple[int, ...], list[int]] = {}
    longest: tuple[int, ...] = ()
    for index in sorted(range(len(rows)), key=lambda index: rows[index], reverse=True):
        row = rows[index]
        if longest[: len(row)] != row:
            longest = row
        groups.setdefault(longest, []).append(index)
    return groups


def _score_batch(
    model: CausalModel,
    batch: Sequence[tuple[tuple[int, ...], list[int]]],
    rows: Sequence[tuple[int, ...]],
    requests: Sequence[Request],
) -> dict[int, tuple[float, bool]]:
    width = max(len(row) for row, _ in batch)
    ids = torch.zeros(len(batch), width, dtype=torch.int64)
    mask = torch.zeros(len(batch), width, dtype=torch.int64)
    for number, (row, _) in enumerate(batch):
        ids[number, : len(row)] = torch.tensor(row)
        mask[number, : len(row)] = 1
    first = min(
        len(rows[index]) - len(requests[index].continuation)
        for _, members in batch
        for index in members
    )
    device = device_of(model)
    is_padded = bool((mask == 0).any())
    logits = position_logits(model, ids.to(device), first, mask.to(device) if is_padded else None)
    found = {}
    for number, (_, members) in enumerate(batch):
        for index in members:
            found[index] = _score(logits[number], rows[index], requests[index].continuation, first)
    return found


def _score(
    logits: Tensor, row: tuple[int, ...], continuation: tuple[int, ...], first: int
) -> tuple[float, bool]:
    end = len(row) - first
    scores, ranks = target_scores(logits[end - len(continuation) : end], torch.tensor(continuation))
    return float(scores.sum()), bool((ranks == 0).all())


def _scored(item: ChoiceItem, scores: Sequence[tuple[float, bool]]) -> ScoredChoice:
    totals = [score for score, _ in scores]
    by_characters = [score / len(text) for score, text in zip(totals, item.choices, strict=True)]
    by_bytes = [
        score / len(text.encode("utf-8")) for score, text in zip(totals, item.choices, strict=True)
    ]
    return ScoredChoice(
        log_likelihoods=tuple(totals),
        is_greedy=tuple(greedy for _, greedy in scores),
        chosen=totals.index(max(totals)),
        chosen_by_characters=by_characters.index(max(by_characters)),
        chosen_by_bytes=by_bytes.index(max(by_bytes)),
        answer=item.answer,
    )


def _measurements(
    scored: Sequence[ScoredChoice], conditions: dict[str, Condition], command: str
) -> list[Measurement]:
    counts = {
        "acc": sum(item.chosen == item.answer for item in scored),
        "acc_norm": sum(item.chosen_by_characters == item.answer for item in scored),
        "acc_bytes": sum(item.chosen_by_bytes == item.answer for item in scored),
    }
    return [
        Measurement(
            name=name,
            value=count / len(scored),
            unit="1",
            spread=wilson(count, len(scored)),
            conditions=conditions,
            command=command,
        )
        for name, count in counts.items()
    ]
