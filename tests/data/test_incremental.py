"""Pieces of text join to the text of all ids, and never end inside a character."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from deepseek.data import IncrementalDecoder, Tokenizer

TEXTS = [
    "Hello world",
    "你好，世界。日本語 한국어",
    "👩‍👩‍👧 family 🇫🇷 🏳️‍🌈",
    "e\u0301a\u0308 combined \u200d joiner",
    "   leading and  double   spaces\n\n\tend ",
    "replacement \ufffd sign \ufffd\ufffd",
]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
WORDS = ["▁", "▁▁", "▁he", "llo", "▁wor", "ld", "a", "b", "你", "▁你", "\ufffd", ".", ",", "!"]


def byte_level() -> tokenizers.Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def byte_level_in_sequence() -> tokenizers.Tokenizer:
    backend = byte_level()
    backend.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Fuse()])
    return backend


def byte_fallback() -> tokenizers.Tokenizer:
    """Return a tokenizer in Llama 2's manner: ▁ for a space, byte tokens for what has no token."""
    vocab = {token: i for i, token in enumerate(["<unk>", *BYTES, *WORDS])}
    backend = tokenizers.Tokenizer(
        models.BPE(vocab, [], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return backend


def metaspace() -> tokenizers.Tokenizer:
    vocab = [("<unk>", 0.0), *((token, -1.0 - i) for i, token in enumerate(WORDS))]
    backend = tokenizers.Tokenizer(models.Unigram(vocab, unk_id=0, byte_fallback=False))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return backend


def word_piece() -> tokenizers.Tokenizer:
    tokens = ["[UNK]", "do", "##ing", "n", "'", "t", ".", ",", "!", "he", "##llo", "s", "re"]
    vocab = {token: i for i, token in enumerate(tokens)}
    backend = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    return backend


def no_decoder() -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 2}, unk_token="a"))


KINDS = {
    "byte level": byte_level,
    "byte level in a sequence": byte_level_in_sequence,
    "byte fallback": byte_fallback,
    "metaspace": metaspace,
    "word piece": word_piece,
    "none": no_decoder,
}


def with_special(kind: str, *, cleans_up_spaces: bool = False) -> Tokenizer:
    backend = KINDS[kind]()
    backend.add_tokens([AddedToken("<end>", special=True), AddedToken("été", normalized=False)])
    return Tokenizer(backend, eos_token="<end>", cleans_up_spaces=cleans_up_spaces)


TOKENIZERS = {kind: with_special(kind) for kind in KINDS}
TOKENIZERS["word piece, cleaned up"] = with_special("word piece", cleans_up_spaces=True)
CHARACTERS = st.one_of(
    st.characters(max_codepoint=0x7F),
    st.integers(0x80, 0x10FFFF).filter(lambda code: not 0xD800 <= code < 0xE000).map(chr),
    st.sampled_from("你好é\u0301👩\u200d👧🇫🇷"),
)
QUICK = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def pieces(tokenizer: Tokenizer, ids: list[int], *, skip: bool = True) -> list[str]:
    decoder = IncrementalDecoder(tokenizer, skip_special_tokens=skip)
    return [*(decoder.push(token_id) for token_id in ids), decoder.flush()]


@pytest.mark.parametrize("kind", TOKENIZERS)
@QUICK
@given(data=st.data())
def test_pieces_of_any_ids_join_to_the_whole(kind: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[kind]
    # two past the end: ids without a token add nothing
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 1), max_size=40))
    for skip in (True, False):
        whole = tokenizer.decode(ids, skip_special_tokens=skip)
        assert "".join(pieces(tokenizer, ids, skip=skip)) == whole


@pytest.mark.parametrize("kind", ["byte level", "byte level in a sequence", "byte fallback"])
@QUICK
@given(text=st.lists(CHARACTERS, max_size=30).map("".join))
def test_pieces_of_any_text_are_whole_characters(kind: str, text: str) -> None:
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer.encode(text)
    parts = pieces(tokenizer, ids, skip=False)
    assert "".join(parts) == tokenizer.decode(ids, skip_special_tokens=False)
    if "\ufffd" not in text and tokenizer.unk_token_id not in ids:
        assert all("\ufffd" not in part for part in parts)


@pytest.mark.parametrize("text", TEXTS)
def test_smollm2_streams_whole_characters(smollm2_folder: Path, text: str) -> None:
    tokenizer = Tokenizer.from_folder(smollm2_folder)
    assert tokenizer is not None
    ids = tokenizer.encode(text)
    parts = pieces(tokenizer, ids)
    assert "".join(parts) == text
    if "\ufffd" not in text:
        assert all("\ufffd" not in part for part in parts)


def test_a_character_comes_with_its_last_byte() -> None:
    tokenizer = TOKENIZERS["byte level"]
    assert pieces(tokenizer, tokenizer.encode("a你")) == ["a", "", "", "你", ""]


def test_leading_space_of_a_word_comes_with_the_word() -> None:
    tokenizer = TOKENIZERS["byte fallback"]
    ids = [tokenizer.token_to_id(token) or 0 for token in ("▁he", "llo", "▁wor", "ld")]
    assert pieces(tokenizer, ids) == ["he", "llo", " wor", "ld", ""]


def test_broken_bytes_come_out_at_the_end() -> None:
    tokenizer = TOKENIZERS["byte level"]
    assert pieces(tokenizer, tokenizer.encode("你")[:2]) == ["", "", "\ufffd"]


def test_flush_starts_anew() -> None:
    for tokenizer in TOKENIZERS.values():
        decoder = IncrementalDecoder(tokenizer)
        first = [decoder.push(1), decoder.push(2), decoder.flush()]
        assert [decoder.push(1), decoder.push(2), decoder.flush()] == first


@pytest.mark.parametrize("kind", ["byte level", "byte fallback", "metaspace"])
def test_cost_does_not_grow_with_the_length(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]
    ids = [tokenizer.vocab_size // 2 + i % 5 for i in range(4000)]

    def seconds(count: int) -> float:
        start = time.perf_counter()
        pieces(tokenizer, ids[:count])
        return time.perf_counter() - start

    short, long = (min(seconds(count) for _ in range(3)) for count in (500, 4000))
    assert long < 8 * 5 * short
