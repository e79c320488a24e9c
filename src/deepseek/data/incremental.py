"""Decoding one token at a time: text leaves as soon as it is complete, and never broken."""

from __future__ import annotations

import codecs
import json
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deepseek.data.tokenizer import Tokenizer

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_REPLACEMENT = "\ufffd"
# A UTF-8 character has at most four bytes, so a longer wait for its end is a wait for nothing.
_MAX_WAITING_TOKENS = 16


class IncrementalDecoder:
    """Turns a stream of token ids into text, piece by piece.

    The pieces of `push` and `flush` together equal `tokenizer.decode` of all ids; no piece ends
    inside a character. The cost per token does not grow with the length of the text. A byte-level
    tokenizer is decoded through its bytes. For the others the newest tokens are decoded again
    together with the ones before them, because their text depends on these (a leading space), and a
    run of byte tokens (`<0xE4>`) is held until it ends, because the decoder judges the run as a
    whole. A tokenizer that cleans up spaces afterwards gives all its text at `flush`.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        """Start an empty text.

        Args:
            tokenizer: whose ids will come.
            skip_special_tokens: leave special tokens out of the text.
        """
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_token_ids if skip_special_tokens else frozenset[int]()
        kinds = decoder_kinds(tokenizer)
        self._bytes = (
            codecs.getincrementaldecoder("utf-8")("replace") if kinds == ["ByteLevel"] else None
        )
        self._has_byte_tokens = "ByteFallback" in kinds
        self._waits_for_flush = tokenizer.cleans_up_spaces
        # ids[:read] have been emitted; they stay only as the context of the ones behind them.
        self._ids: list[int] = []
        self._read = 0
        self._context_text = ""

    def push(self, token_id: int) -> str:
        """Take one more token and return the text that is now complete, often none.

        Args:
            token_id: an id of the tokenizer; special tokens (unless kept) and unknown ids add no
                text.
        """
        if token_id in self._skipped:
            return ""
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return ""
        if self._bytes is not None:
            return self._bytes.decode(token_bytes(token))
        self._ids.append(token_id)
        if self._waits_for_flush or (self._has_byte_tokens and _BYTE_TOKEN.fullmatch(token)):
            return ""
        return self._advance(at_end=False)

    def flush(self) -> str:
        """Return the text that was still held, as it stands, and start anew."""
        if self._bytes is not None:
            text = self._bytes.decode(b"", final=True)
            self._bytes.reset()
            return text
        text = self._advance(at_end=True) if self._ids else ""
        self._ids, self._read, self._context_text = [], 0, ""
        return text

    def _advance(self, *, at_end: bool) -> str:
        text = self._tokenizer.decode(self._ids, skip_special_tokens=False)
        waiting = len(self._ids) - self._read
        is_broken = text.endswith(_REPLACEMENT) and not self._has_byte_tokens
        if not at_end and is_broken and waiting < _MAX_WAITING_TOKENS:
            return ""
        fresh = (
            text[len(self._context_text) :] if at_end or text.startswith(self._context_text) else ""
        )
        if not fresh:
            if text == self._context_text and self._read and waiting >= _MAX_WAITING_TOKENS:
                del self._ids[self._read :]
            return ""
        self._ids = self._ids[self._read :]
        self._read = len(self._ids)
        self._context_text = self._tokenizer.decode(self._ids, skip_special_tokens=False)
        return fresh


def decoder_kinds(tokenizer: Tokenizer) -> list[str]:
    """Return the kinds of the steps of the tokenizer's decoder, in order."""
    decoder = tokenizer.backend.decoder
    if decoder is None:
        return []
    return _kinds(json.loads(decoder.__getstate__()))


def _kinds(state: dict[str, Any]) -> list[str]:
    if state["type"] == "Sequence":
        return [kind for step in state["decoders"] for kind in _kinds(step)]
    return [state["type"]]


def token_bytes(token: str) -> bytes:
    """Return the bytes a byte-level token stands for; outside the alphabet, its own UTF-8.

    Source: the reversible byte alphabet of GPT-2's `bytes_to_unicode`.
    """
    try:
        return bytes(_BYTE_OF[character] for character in token)
    except KeyError:
        return token.encode()


def _byte_alphabet() -> dict[str, int]:
    shown = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    alphabet = {chr(byte): byte for byte in shown}
    hidden = (byte for byte in range(256) if byte not in set(shown))
    return alphabet | {chr(256 + index): byte for index, byte in enumerate(hidden)}


_BYTE_OF = _byte_alphabet()
