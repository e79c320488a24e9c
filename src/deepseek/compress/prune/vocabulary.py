"""The stage that drops tokens which given texts never use, from tokenizer, embedding and head
together."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import tokenizers
import torch
from tokenizers.pre_tokenizers import ByteLevel

from deepseek.compress.calibration import PYTHON_TOPICS
from deepseek.compress.prune.cut import rebuilt
from deepseek.compress.stage import Stage
from deepseek.compress.work import Outcome, Work
from deepseek.data import Tokenizer, read_texts, text_files
from deepseek.errors import ConfigError, VerifyError, describe
from deepseek.evaluate import default_corpus
from deepseek.models import Decoder, DecoderConfig, Encoder
from deepseek.records import Measurement

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_EMBEDDINGS = (
    "model.embed_tokens.weight",
    "lm_head.weight",
    "embeddings.word_embeddings.weight",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PruneVocabulary(Stage):
    """Drop the tokens that texts never use.

    Those texts are encoded and decoded as before, in new numbers. Any other text can still be
    encoded, by more tokens: bytes, single characters and special tokens are kept.
    """

    kind: Literal["prune_vocabulary"] = "prune_vocabulary"
    texts: tuple[str, ...] = (PYTHON_TOPICS,)
    """Files or folders of text, or `python-topics`; conversations are read as what they hold."""

    def __post_init__(self) -> None:
        if not self.texts:
            raise ConfigError(describe("texts", "PruneVocabulary", "at least one", self.texts))


def apply(stage: PruneVocabulary, work: Work) -> Outcome:
    """Put a model of fewer tokens in the place of the work's, with its tokenizer.

    Raises:
        ConfigError: no tokenizer, or one that is neither BPE nor WordPiece.
        VerifyError: a text is not encoded as before; the model is as it was.
    """
    model = work.model
    if model.tokenizer is None:
        raise ConfigError(describe("tokenizer", "PruneVocabulary", "there", None))
    texts = [text for source in stage.texts for text in _texts(source)]
    used: set[int] = set()
    encoded = []
    for place, text in enumerate(texts):
        work.goes_on()
        work.report("tokens of the texts", place / len(texts))
        encoded.append(model.tokenizer.encode(text))
        used.update(encoded[-1])
    smaller, kept = cut_tokenizer(model.tokenizer, used)
    places = {old: new for new, old in enumerate(kept)}
    for text, ids in zip(texts, encoded, strict=True):
        if smaller.encode(text) != [places[each] for each in ids]:
            must = "encoded as before"
            raise VerifyError(describe("text", "PruneVocabulary", must, text[:60]))
    before = model.config.vocab_size
    parameters = sum(each.numel() for each in model.parameters())
    work.model = cut_rows(model, smaller, kept)
    after = sum(each.numel() for each in work.model.parameters())
    counted = {
        "vocabulary_before": before,
        "vocabulary_after": len(kept),
        "parameters_before": parameters,
        "parameters_after": after,
        "parameters_kept": after / parameters,
    }
    conditions = {"texts": list(stage.texts), "tokens": sum(map(len, encoded))}
    return tuple(
        Measurement(name=name, value=value, unit="1", conditions=conditions)
        for name, value in counted.items()
    )


def _texts(source: str) -> list[str]:
    if source == PYTHON_TOPICS:
        return [default_corpus().text]
    found = []
    for record in read_texts(text_files(Path(source))):
        if isinstance(record, str):
            found.append(record)
        else:
            found.extend(str(message["content"]) for message in record)
    return found


def cut_rows(
    model: Decoder | Encoder, tokenizer: Tokenizer, kept: Sequence[int]
) -> Decoder | Encoder:
    """Return a model with the embeddings and the head of some tokens.

    Args:
        model: stays as it is.
        tokenizer: of those tokens, which it is given.
        kept: their numbers in the model, by their new ones.
    """
    rows = torch.tensor(kept)
    places = {old: new for new, old in enumerate(kept)}
    state = {
        name: value.detach()[rows] if name in _EMBEDDINGS else value.detach().clone()
        for name, value in model.state_dict().items()
    }
    changes: dict[str, Any] = {"vocab_size": len(kept), "pad_token_id": None}
    if model.config.pad_token_id is not None:
        changes["pad_token_id"] = places.get(model.config.pad_token_id)
    if isinstance(model.config, DecoderConfig):
        changes["bos_token_id"] = places.get(model.config.bos_token_id or 0)
        if model.config.bos_token_id is None:
            changes["bos_token_id"] = None
        ends = model.config.eos_token_id
        if isinstance(ends, tuple):
            changes["eos_token_id"] = tuple(places[each] for each in ends if each in places)
        elif ends is not None:
            changes["eos_token_id"] = places.get(ends)
    smaller = rebuilt(model, model.config.replace(**changes), state)
    smaller.tokenizer = tokenizer
    return smaller


def tokens_within(model: Decoder | Encoder, whole: Decoder | Encoder) -> list[int] | None:
    """Return the numbers that a model's tokens have in another one of more tokens; None where it
    has no more of them, or not all."""
    if model.tokenizer is None or whole.tokenizer is None:
        return None
    ours, theirs = model.tokenizer.backend.get_vocab(), whole.tokenizer.backend.get_vocab()
    is_smaller = model.config.vocab_size == len(ours) < len(theirs)
    if not is_smaller or not ours.keys() <= theirs.keys():
        return None
    return [theirs[token] for token in sorted(ours, key=ours.__getitem__)]


def cut_tokenizer(tokenizer: Tokenizer, used: Iterable[int]) -> tuple[Tokenizer, list[int]]:
    """Return a tokenizer of the tokens that are used and of those it cannot do without, and their
    old numbers by new ones.

    Kept are also bytes, single characters and added tokens, and of BPE the tokens that a kept one
    is merged of, with every merge between kept ones. What is dropped was merged in none of the
    texts, so these are cut as before.

    Args:
        tokenizer: stays as it is.
        used: numbers of tokens.

    Raises:
        ConfigError: it is neither BPE nor WordPiece.
    """
    form = json.loads(tokenizer.backend.to_str())
    model = form["model"]
    kind = model.get("type")
    if kind not in ("BPE", "WordPiece"):
        must = "BPE or WordPiece"
        raise ConfigError(describe("tokenizer", "PruneVocabulary", must, kind))
    vocabulary: dict[str, int] = model["vocab"]
    added = {token["id"]: token["content"] for token in form["added_tokens"]}
    names = {number: token for token, number in vocabulary.items()} | added
    wanted = {names[number] for number in used if number in names}
    wanted |= {token for token in vocabulary if _is_basic(token)} | set(added.values())
    wanted |= {model["unk_token"]} if model.get("unk_token") else set()
    merges = [_pair(merge) for merge in model.get("merges", [])]
    if kind == "BPE":
        wanted = _with_parts(wanted, merges)
    kept = [number for number in sorted(names) if names[number] in wanted]
    places = {names[number]: new for new, number in enumerate(kept)}
    model["vocab"] = {token: places[token] for token in vocabulary if token in wanted}
    if kind == "BPE":
        model["merges"] = [
            [left, right]
            for left, right in merges
            if {left, right, left + right} <= set(model["vocab"])
        ]
    for token in form["added_tokens"]:
        token["id"] = places[token["content"]]
    form["post_processor"] = _renumbered(form.get("post_processor"), places)
    return _dressed(tokenizer, form, {old: new for new, old in enumerate(kept)}), kept


def _is_basic(token: str) -> bool:
    """Tell whether a token is a byte or a single character."""
    is_byte = token in _ALPHABET or _BYTE.fullmatch(token) is not None
    return is_byte or len(token.removeprefix("##")) == 1


_ALPHABET = frozenset(ByteLevel.alphabet())


def _pair(merge: str | Sequence[str]) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _with_parts(wanted: set[str], merges: Sequence[tuple[str, str]]) -> set[str]:
    """Return tokens and all that they are merged of, in any way."""
    sources: dict[str, list[str]] = {}
    for left, right in merges:
        sources.setdefault(left + right, []).extend((left, right))
    found, open_ = set(wanted), list(wanted)
    while open_:
        for part in sources.get(open_.pop(), ()):
            if part not in found:
                found.add(part)
                open_.append(part)
    return found


def _renumbered(processor: Any, places: Mapping[str, int]) -> Any:
    """Return a post-processor whose special tokens have their new numbers."""
    if not isinstance(processor, dict):
        return processor
    changed = dict(processor)
    if processor.get("type") == "Sequence":
        changed["processors"] = [_renumbered(each, places) for each in processor["processors"]]
    elif processor.get("type") == "TemplateProcessing":
        changed["special_tokens"] = {
            name: {**token, "ids": [places[each] for each in token["tokens"]]}
            for name, token in processor["special_tokens"].items()
        }
    else:
        for name in ("sep", "cls"):
            if name in processor:
                changed[name] = [processor[name][0], places[processor[name][0]]]
    return changed


def _dressed(tokenizer: Tokenizer, form: dict[str, Any], places: Mapping[int, int]) -> Tokenizer:
    named = dict(tokenizer.special_tokens)
    return Tokenizer(
        tokenizers.Tokenizer.from_str(json.dumps(form, ensure_ascii=False)),
        bos_token=named.pop("bos_token", None),
        eos_token=named.pop("eos_token", None),
        pad_token=named.pop("pad_token", None),
        unk_token=named.pop("unk_token", None),
        other_tokens=named,
        eos_token_ids=[places[each] for each in tokenizer.eos_token_ids if each in places],
        chat_template=tokenizer.chat_templates,
        model_max_length=tokenizer.model_max_length,
        cleans_up_spaces=tokenizer.cleans_up_spaces,
    )
