"""Tokens and their logprobs in OpenAI's two forms."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from deepseek.data import IncrementalDecoder, Tokenizer
from deepseek.data.incremental import decoder_kinds, token_bytes
from deepseek.serve.api.schema.answers import (
    CompletionLogprobs,
    TokenLogprob,
    TopLogprob,
)
from deepseek.serve.generation import TokenChoice

_LEAST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON does not have; OpenAI's own number."""


class TokenTexts:
    """The texts of single tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Read tokens of `tokenizer`."""
        self._tokenizer = tokenizer
        self._is_byte_level = "ByteLevel" in decoder_kinds(tokenizer)
        self.bytes_of = functools.lru_cache(maxsize=65_536)(self._bytes_of)

    def text_of(self, token_id: int) -> str:
        """Return the text of a token; `bytes:\\xe4` where it is not whole characters, so that two
        such tokens do not look alike."""
        data = self.bytes_of(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def _bytes_of(self, token_id: int) -> bytes:
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        if self._is_byte_level:
            return token_bytes(token)
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes.fromhex(token[3:5])
        return token.replace("▁", " ").encode()


def chat_logprobs(texts: TokenTexts, tokens: Sequence[TokenChoice]) -> list[TokenLogprob]:
    """Return the tokens of a chat's answer, or of a part of it."""
    return [
        TokenLogprob(
            token=texts.text_of(token.token_id),
            logprob=_finite(token.logprob),
            bytes=list(texts.bytes_of(token.token_id)),
            top_logprobs=[
                TopLogprob(
                    token=texts.text_of(token_id),
                    logprob=_finite(logprob),
                    bytes=list(texts.bytes_of(token_id)),
                )
                for token_id, logprob in token.top
            ],
        )
        for token in tokens
    ]


class CompletionTokens:
    """The tokens of a text as they come, with their places in it."""

    def __init__(self, texts: TokenTexts, tokenizer: Tokenizer) -> None:
        """Begin at the start of the text."""
        self._texts = texts
        self._decoder = IncrementalDecoder(tokenizer, skip_special_tokens=False)
        self._length = 0

    def push(self, tokens: Sequence[TokenChoice]) -> CompletionLogprobs:
        """Return the next tokens."""
        offsets: list[int] = []
        for token in tokens:
            offsets.append(self._length)
            self._length += len(self._decoder.push(token.token_id))
        return CompletionLogprobs(
            text_offset=offsets,
            token_logprobs=[
                None if token.logprob is None else _finite(token.logprob) for token in tokens
            ],
            tokens=[self._texts.text_of(token.token_id) for token in tokens],
            top_logprobs=[self._top(token) for token in tokens],
        )

    def _top(self, token: TokenChoice) -> dict[str, float] | None:
        """Return the most probable tokens and the chosen one; of two that read alike, the more
        probable."""
        if token.logprob is None:
            return None
        top: dict[str, float] = {}
        for token_id, logprob in (*token.top, (token.token_id, token.logprob)):
            text = self._texts.text_of(token_id)
            top[text] = max(top.get(text, _LEAST_LOGPROB), _finite(logprob))
        return top


def _finite(logprob: float | None) -> float:
    """Return a logprob that JSON has."""
    return _LEAST_LOGPROB if logprob is None or not logprob > _LEAST_LOGPROB else logprob
