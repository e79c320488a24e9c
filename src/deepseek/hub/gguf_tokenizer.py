"""Builds a tokenizer from the vocabulary in a GGUF file's metadata.

A GGUF file names its pre-tokenizer instead of carrying it, so the splits are a table here. They are
those of the models' own `tokenizer.json`, which is also what llama.cpp follows.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from deepseek.data import Tokenizer as BundleTokenizer
from deepseek.errors import FormatError, describe
from deepseek.hub.gguf import GgufFile
from deepseek.hub.gguf_model import generation_config

UNKNOWN, CONTROL, USER_DEFINED, BYTE = 2, 3, 4, 6
"""`tokenizer.ggml.token_type`. Source: llama.h, llama_token_type."""

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclasses.dataclass(frozen=True)
class Split:
    """How text is cut before merges are applied."""

    regex: str | None = None
    """One piece per match; None is the split of GPT-2."""
    single_digits: bool = False
    """Each digit is a piece of its own, cut out before anything else."""
    whole_words_first: bool = False
    """A piece that is a token is that token, whatever the merges would make of it."""
    bos: bool = False
    """A text begins with the begin token unless the file says otherwise."""
    nfc: bool = False
    """Text is composed (Unicode NFC) first."""


_LLAMA3_SPLIT = Split(_LLAMA3, whole_words_first=True, bos=True)
SPLITS: Mapping[str, Split] = {
    "deepseek-r1-qwen": Split(_QWEN2),
    "gpt-2": Split(),
    "llama-bpe": _LLAMA3_SPLIT,
    "llama-v3": _LLAMA3_SPLIT,
    "llama3": _LLAMA3_SPLIT,
    "qwen2": Split(_QWEN2, nfc=True),
    "refact": Split(single_digits=True),
    "smollm": Split(single_digits=True),
    "starcoder": Split(single_digits=True),
    "tekken": Split(_TEKKEN, whole_words_first=True, bos=True),
}
"""By `tokenizer.ggml.pre`."""


def pre_tokenizer_name(backend: Tokenizer) -> str | None:
    """Return the name by which GGUF says how a byte-level tokenizer cuts text; None where it has no
    name for it.

    Args:
        backend: any tokenizer.
    """
    content = json.loads(backend.to_str())
    first = content["pre_tokenizer"] or {}
    steps = first.get("pretokenizers", [first])
    kinds = [step.get("type") for step in steps]
    if content["model"]["type"] != "BPE" or kinds[-1] != "ByteLevel":
        return None
    regex = next((step["pattern"].get("Regex") for step in steps if step["type"] == "Split"), None)
    digits = any(step["type"] == "Digits" and step["individual_digits"] for step in steps)
    found = Split(
        regex,
        single_digits=digits,
        whole_words_first=content["model"]["ignore_merges"],
        nfc=(content["normalizer"] or {}).get("type") == "NFC",
    )
    expected = ["Digits"] * digits + ["Split"] * (regex is not None) + ["ByteLevel"]
    if kinds != expected or steps[-1]["use_regex"] != (regex is None):
        return None
    for name in ("smollm", *SPLITS):  # of those that cut alike, the one that is best known
        if dataclasses.replace(SPLITS[name], bos=False) == found:
            return name
    return None


def read_tokenizer(file: GgufFile) -> BundleTokenizer | None:
    """Return the tokenizer in a GGUF file, or None when it has no vocabulary.

    Raises:
        FormatError: the kind of tokenizer or its pre-tokenizer is unknown, or its parts do not fit
            together.
    """
    if file.metadata.get("tokenizer.ggml.model", "none") in ("none", "no_vocab"):
        return None
    kind = file.text("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise FormatError(
            describe("metadata 'tokenizer.ggml.model'", str(file.path), "gpt2 or llama", kind)
        )
    tokens = file.strings("tokenizer.ggml.tokens")
    types = _types(file, tokens)
    if len(set(tokens)) != len(tokens):
        raise FormatError(
            describe("metadata 'tokenizer.ggml.tokens'", str(file.path), "all different", "doubles")
        )
    special = _special_tokens(file, tokens, types)
    try:
        if kind == "gpt2":
            backend, bos = _byte_level(file, tokens), _split(file).bos
        else:
            backend, bos = _sentence_piece(file, tokens, types, special["unk"]), True
        _add_tokens(backend, tokens, types)
        _add_template(file, backend, special, bos)
    except FormatError:
        raise
    except Exception as error:  # the tokenizers library raises bare Exceptions
        must = "a vocabulary and merges that fit together"
        raise FormatError(describe("tokenizer", str(file.path), must, str(error))) from error
    template = file.text("tokenizer.chat_template", "") or None
    ends = generation_config(file).get("eos_token_id")
    return BundleTokenizer(
        backend,
        bos_token=special["bos"],
        eos_token=special["eos"],
        pad_token=special["padding"],
        unk_token=special["unk"],
        eos_token_ids=ends if isinstance(ends, list) else (),
        chat_template=template,
        model_max_length=file.integer(f"{file.text('general.architecture')}.context_length", 0)
        or None,
    )


def _types(file: GgufFile, tokens: Sequence[str]) -> list[int]:
    types = file.array("tokenizer.ggml.token_type")
    if types is None:
        return [1] * len(tokens)
    if len(types) != len(tokens):
        must = f"as long as the vocabulary, {len(tokens)}"
        raise FormatError(
            describe(
                "length of metadata 'tokenizer.ggml.token_type'", str(file.path), must, len(types)
            )
        )
    return [int(kind) for kind in types]


def _special_tokens(
    file: GgufFile, tokens: Sequence[str], types: Sequence[int]
) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("padding", "padding"), ("unk", "unknown")):
        full = f"tokenizer.ggml.{key}_token_id"
        if full not in file.metadata:
            found[name] = None
            continue
        index = file.integer(full)
        if index >= len(tokens):
            must = f"below the size of the vocabulary, {len(tokens)}"
            raise FormatError(describe(f"metadata {full!r}", str(file.path), must, index))
        found[name] = tokens[index]
    if found["unk"] is None and UNKNOWN in types:
        found["unk"] = tokens[types.index(UNKNOWN)]
    return found


def _split(file: GgufFile) -> Split:
    name = file.text("tokenizer.ggml.pre", "")
    if name not in SPLITS:
        must = f"one of {', '.join(SPLITS)}"
        step = "Load the model from a folder with a tokenizer.json instead"
        raise FormatError(
            describe("metadata 'tokenizer.ggml.pre'", str(file.path), must, name or None, step)
        )
    return SPLITS[name]


def _byte_level(file: GgufFile, tokens: Sequence[str]) -> Tokenizer:
    split = _split(file)
    merges: list[tuple[str, str]] = []
    for merge in file.strings("tokenizer.ggml.merges"):
        left, _, right = merge.partition(" ")
        if not left or not right or " " in right:
            must = "two tokens with a space between"
            raise FormatError(
                describe("item of tokenizer.ggml.merges", str(file.path), must, merge)
            )
        merges.append((left, right))
    vocab = {token: index for index, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab, merges, ignore_merges=split.whole_words_first))
    steps: list[pre_tokenizers.PreTokenizer] = []
    if split.single_digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if split.regex is not None:
        steps.append(pre_tokenizers.Split(Regex(split.regex), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split.regex is None))
    backend.pre_tokenizer = steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)
    if split.nfc:
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentence_piece(
    file: GgufFile, tokens: Sequence[str], types: Sequence[int], unk: str | None
) -> Tokenizer:
    scores = file.array("tokenizer.ggml.scores")
    if scores is None or len(scores) != len(tokens):
        must = f"as long as the vocabulary, {len(tokens)}"
        got = None if scores is None else len(scores)
        raise FormatError(
            describe("length of metadata 'tokenizer.ggml.scores'", str(file.path), must, got)
        )
    vocab = {token: index for index, token in enumerate(tokens)}
    whole = {tokens[index] for index, kind in enumerate(types) if kind in (UNKNOWN, CONTROL, BYTE)}
    merges = score_merges(vocab, [float(score) for score in scores], whole)
    backend = Tokenizer(models.BPE(vocab, merges, unk_token=unk, fuse_unk=True, byte_fallback=True))
    prefix = bool(file.metadata.get("tokenizer.ggml.add_space_prefix", True))
    scheme = "first" if prefix else "never"
    backend.pre_tokenizer = pre_tokenizers.Metaspace(
        replacement="▁", prepend_scheme=scheme, split=False
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        steps.append(decoders.Strip(content=" ", left=1))
    backend.decoder = decoders.Sequence(steps)
    return backend


def score_merges(
    vocab: Mapping[str, int], scores: Sequence[float], whole: Iterable[str]
) -> list[tuple[str, str]]:
    """Return the merges of a BPE model that does what a SentencePiece model with these scores does.

    Every way to cut a token into two tokens is a merge; the best score comes first.

    Args:
        vocab: token to id, in the order of the ids.
        scores: one per id.
        whole: tokens that no merge makes or uses.

    Source: `generate_merges` of transformers, which this gives the same order as.
    """
    left_out = set(whole)
    found: list[tuple[float, int, int, str, str]] = []
    for token, score in zip(vocab, scores, strict=True):
        if token in left_out:
            continue
        cuts = ((token[:at], token[at:]) for at in range(1, len(token)))
        pairs = [
            pair
            for pair in cuts
            if pair[0] in vocab and pair[1] in vocab and not left_out & set(pair)
        ]
        pairs.sort(key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
        found.extend((score, len(left), len(right), left, right) for left, right in pairs)
    found.sort(key=lambda merge: merge[:3], reverse=True)
    return [(left, right) for *_, left, right in found]


def _add_tokens(backend: Tokenizer, tokens: Sequence[str], types: Sequence[int]) -> None:
    kinds = list(zip(tokens, types, strict=True))
    special = [
        AddedToken(token, normalized=False, special=True)
        for token, kind in kinds
        if kind == CONTROL
    ]
    plain = [
        AddedToken(token, normalized=False, special=False)
        for token, kind in kinds
        if kind == USER_DEFINED
    ]
    backend.add_special_tokens(special)
    backend.add_tokens(plain)


def _add_template(
    file: GgufFile, backend: Tokenizer, special: Mapping[str, str | None], bos: bool
) -> None:
    first = special["bos"] if file.metadata.get("tokenizer.ggml.add_bos_token", bos) else None
    last = special["eos"] if file.metadata.get("tokenizer.ggml.add_eos_token", False) else None
    if first is None and last is None:
        return
    before, after = ([token] if token else [] for token in (first, last))
    pair = [
        *before,
        "$A",
        *after,
        *(f"{token}:1" for token in before),
        "$B:1",
        *(f"{token}:1" for token in after),
    ]
    backend.post_processor = processors.TemplateProcessing(
        single=[*before, "$A", *after],
        pair=pair,
        special_tokens=[
            (token, backend.token_to_id(token)) for token in dict.fromkeys([*before, *after])
        ],
    )
