"""Tokenizers out of GGUF metadata give the ids that transformers and llama.cpp give."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from deepseek.errors import FormatError
from deepseek.hub.gguf import read_gguf
from deepseek.hub.gguf_tokenizer import SPLITS, read_tokenizer, score_merges
from tests.hub.tiny import TEXT, add_value, finish, tiny_tokenizer

TEXTS = [
    TEXT,
    "",
    " ",
    "Hello, world! It's a test: don't PANIC; we'LL see.",
    "def f(x):\n    if x: return {'a': [1, 2]}\n\t\telse:\r\n",
    "深度求索是一家公司。你好！",
    "😀👩‍👩‍👧 naïve café 🇩🇪",
    "   many    spaces\n\n\n  end   ",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    "x<|mark|>y <|mark|>",
    "\x00\x01 \ufeff",
]
DIGITS = ["a  12 b   345", "\n\n 7", "² ١٢ Ⅳ", "1234567 12,345.678"]


def write_bpe(path: Path, pre: str | None = "gpt-2", **changes: object) -> Path:
    """Write the tiny tokenizer as GGUF metadata, with one token of the user's own."""
    backend = tiny_tokenizer().backend
    vocab = backend.get_vocab()
    tokens = [*sorted(vocab, key=lambda token: vocab[token]), "<|mark|>"]
    types = [3 if token.startswith("<|") else 1 for token in tokens]
    types[-1] = 4
    merges = json.loads(backend.to_str())["model"]["merges"]
    values: dict[str, object] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [" ".join(merge) for merge in merges],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.chat_template": "{{ messages[0]['content'] }}<|im_end|>",
        "llama.context_length": 128,
    }
    return write_metadata(path, {**values, **changes})


def write_metadata(path: Path, values: dict[str, object]) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in values.items():
        if value is not None:
            add_value(writer, key, value)
    finish(writer)
    return path


@pytest.mark.parametrize("pre", SPLITS)
def test_byte_level_ids_are_those_of_transformers(tmp_path: Path, pre: str) -> None:
    transformers = pytest.importorskip("transformers")
    path = write_bpe(tmp_path / "a.gguf", pre)
    ours = read_tokenizer(read_gguf(path))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="a.gguf")
    assert ours is not None
    texts = TEXTS + DIGITS
    if SPLITS[pre].single_digits:
        texts = [text for text in TEXTS if not any(letter.isnumeric() for letter in text)]
    for text in texts:
        ids = ours.encode(text, add_special_tokens=False)
        expected = theirs.encode(text, add_special_tokens=False)
        assert ids == expected, text
        assert ours.decode(ids, skip_special_tokens=False) == text
    named = ours.special_tokens
    assert (named["bos_token"], named["eos_token"]) == (theirs.bos_token, theirs.eos_token)


def test_digits_stand_alone_where_the_model_was_trained_so(tmp_path: Path) -> None:
    """transformers leaves this step out of GGUF tokenizers; the models' own files have it."""
    ours = read_tokenizer(read_gguf(write_bpe(tmp_path / "a.gguf", "smollm")))
    assert ours is not None
    steps = [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
    published = tokenizers.Tokenizer.from_str(ours.backend.to_str())
    published.pre_tokenizer = pre_tokenizers.Sequence(steps)
    for text in TEXTS + DIGITS:
        assert ours.encode(text) == published.encode(text).ids
    pieces = [piece for piece, _ in ours.backend.pre_tokenizer.pre_tokenize_str("a  12")]
    assert pieces == ["a", "ĠĠ", "1", "2"]


def test_settings_come_along(tmp_path: Path) -> None:
    ours = read_tokenizer(read_gguf(write_bpe(tmp_path / "a.gguf")))
    assert ours is not None
    assert ours.special_tokens == {
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
    }
    assert ours.model_max_length == 128
    assert ours.apply_chat_template([{"role": "user", "content": "hi"}]) == "hi<|im_end|>"
    assert ours.encode("a") == ours.encode("a", add_special_tokens=False)


@pytest.mark.parametrize(
    ("pre", "changes", "first", "last"),
    [
        ("llama-bpe", {}, True, False),
        ("llama-bpe", {"tokenizer.ggml.add_bos_token": False}, False, False),
        ("gpt-2", {"tokenizer.ggml.add_bos_token": True}, True, False),
        ("gpt-2", {"tokenizer.ggml.add_eos_token": True}, False, True),
    ],
)
def test_what_stands_around_a_text(
    tmp_path: Path, pre: str, changes: dict[str, object], first: bool, last: bool
) -> None:
    ours = read_tokenizer(read_gguf(write_bpe(tmp_path / "a.gguf", pre, **changes)))
    assert ours is not None
    inner = ours.encode("ab", add_special_tokens=False)
    assert ours.encode("ab") == [1] * first + inner + [2] * last


def test_no_vocabulary_is_no_tokenizer(tmp_path: Path) -> None:
    assert read_tokenizer(read_gguf(write_metadata(tmp_path / "a.gguf", {}))) is None


WRONG: dict[str, dict[str, object]] = {
    "kind": {"tokenizer.ggml.model": "bert"},
    "no pre-tokenizer": {"tokenizer.ggml.pre": None},
    "unknown pre-tokenizer": {"tokenizer.ggml.pre": "viking"},
    "no tokens": {"tokenizer.ggml.tokens": None},
    "numbers for tokens": {"tokenizer.ggml.tokens": [1, 2]},
    "double tokens": {"tokenizer.ggml.tokens": ["a", "a"], "tokenizer.ggml.token_type": None},
    "few types": {"tokenizer.ggml.token_type": [1, 1]},
    "no merges": {"tokenizer.ggml.merges": None},
    "broken merge": {"tokenizer.ggml.merges": ["ab"]},
    "merge of three": {"tokenizer.ggml.merges": ["a b c"]},
    "merge of strangers": {"tokenizer.ggml.merges": ["世 界"]},
    "id outside": {"tokenizer.ggml.eos_token_id": 100_000},
    "template of another type": {"tokenizer.chat_template": 5},
}


@pytest.mark.parametrize("case", WRONG)
def test_parts_that_do_not_fit_are_one_error(tmp_path: Path, case: str) -> None:
    path = write_bpe(tmp_path / "a.gguf", **WRONG[case])  # type: ignore[arg-type]
    with pytest.raises(FormatError, match="must be"):
        read_tokenizer(read_gguf(path))


def test_unknown_pre_tokenizers_list_the_known(tmp_path: Path) -> None:
    path = write_bpe(tmp_path / "a.gguf", "viking")
    with pytest.raises(FormatError, match=r"gpt-2, .*smollm.*; got 'viking'"):
        read_tokenizer(read_gguf(path))


def spm_metadata() -> dict[str, object]:
    words = ["▁the", "▁quick", "▁b", "▁c", "he", "th", "qu", "ick", "br", "own", "is", "▁is"]
    letters = [*"▁abcdefghijklmnopqrstuvwxyz,.!", "世"]
    pieces = ["▁t", "ic", "ck", "ro", "ow", "wn", "▁q", "▁qu", "ui", "▁▁", "▁▁▁▁", "in", "ing"]
    normal = list(dict.fromkeys([*words, *pieces]))
    control = ["<unk>", "<s>", "</s>"]
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = [*control, *byte_tokens, *normal, *letters]
    scores = [0.0] * 259 + [-float(index) for index in range(len(normal))] + [-1e4] * len(letters)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * (len(normal) + len(letters)),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "llama.context_length": 128,
    }


def test_sentence_piece_ids_are_those_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    path = write_metadata(tmp_path / "a.gguf", spm_metadata())
    ours = read_tokenizer(read_gguf(path))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="a.gguf")
    assert ours is not None
    assert ours.unk_token_id == 0
    for text in [*TEXTS, "the quick brown is thick", "the    ing", "<s>the</s> x", "世界"]:
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(
            text, add_special_tokens=False
        ), text
        assert ours.encode(text)[0] == 1
    text = "the quick é世 brown  fox!"
    assert ours.decode(ours.encode(text)) == text


def test_sentence_piece_without_leading_space(tmp_path: Path) -> None:
    values = {**spm_metadata(), "tokenizer.ggml.add_space_prefix": False}
    ours = read_tokenizer(read_gguf(write_metadata(tmp_path / "a.gguf", values)))
    assert ours is not None
    assert ours.id_to_token(ours.encode("is", add_special_tokens=False)[0]) == "is"
    assert ours.decode(ours.encode(" is")) == " is"


def test_sentence_piece_needs_scores(tmp_path: Path) -> None:
    values = {**spm_metadata(), "tokenizer.ggml.scores": [0.0, 1.0]}
    with pytest.raises(FormatError, match=r"scores"):
        read_tokenizer(read_gguf(write_metadata(tmp_path / "a.gguf", values)))


def test_merges_come_best_score_first() -> None:
    vocab = {token: index for index, token in enumerate(["a", "b", "ab", "ba", "aba"])}
    merges = score_merges(vocab, [0, 0, -2, -1, -3], [])
    assert merges == [("b", "a"), ("a", "b"), ("ab", "a"), ("a", "ba")]
    assert score_merges(vocab, [0, 0, -2, -1, -3], ["ba"]) == [("a", "b"), ("ab", "a")]


def test_composition_where_the_model_has_it(tmp_path: Path) -> None:
    ours = read_tokenizer(read_gguf(write_bpe(tmp_path / "a.gguf", "qwen2")))
    assert ours is not None
    assert isinstance(ours.backend.normalizer, normalizers.NFC)
    assert isinstance(ours.backend.decoder, decoders.ByteLevel)
    assert isinstance(ours.backend.model, models.BPE)
    assert ours.encode("e\u0301") == ours.encode("é")
