"""Conversations to documents of tokens in which only the assistant's words are learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from deepseek.data.corpus import Document
from deepseek.data.tokenizer import Tokenizer
from deepseek.errors import ConfigError, describe

Messages = Sequence[Mapping[str, object]]


def conversation(messages: Messages, tokenizer: Tokenizer) -> Document:
    """Return a conversation as the model's chat template writes it; targets are what the assistant
    says, and the token that ends it. What the assistant says first of all, unasked, is not learned.

    The tokens before an answer are those that the model is given when it is to answer, whatever a
    tokenizer would make of the text as a whole.

    Args:
        messages: as `Tokenizer.apply_chat_template` takes them; at least one answer.
        tokenizer: with a chat template.

    Raises:
        ConfigError: there is no template, the messages are malformed, nothing is to be learned, or
            the template rewrites what was said before.
    """
    answers = [n for n, message in enumerate(messages) if n and message.get("role") == "assistant"]
    if not answers:
        must = "a conversation in which the assistant answers"
        raise ConfigError(describe("messages", "the data", must, messages))
    whole = tokenizer.apply_chat_template(messages, add_generation_prompt=False)
    tokens: list[int] = []
    targets: list[bool] = []
    done = 0
    for answer in answers:
        start = len(tokenizer.apply_chat_template(messages[:answer]))
        said = tokenizer.apply_chat_template(messages[: answer + 1], add_generation_prompt=False)
        if not whole.startswith(said) or start > len(said) or done > start:
            must = "one that keeps what was said before"
            got = "another text after the next message"
            raise ConfigError(describe("chat_template", "the tokenizer", must, got))
        for text, is_learned in ((whole[done:start], False), (whole[start : len(said)], True)):
            ids = tokenizer.encode(text, add_special_tokens=False)
            tokens += ids
            targets += [is_learned] * len(ids)
        done = len(said)
    _drop_after_end(tokens, targets, tokenizer)
    rest = tokenizer.encode(whole[done:], add_special_tokens=False)
    return Document([*tokens, *rest], [*targets, *[False] * len(rest)])


def _drop_after_end(tokens: list[int], targets: list[bool], tokenizer: Tokenizer) -> None:
    """Take what a template writes behind the token that ends an answer, such as a line break, out
    of the targets: a model that has ended is asked for nothing more."""
    ends = set(tokenizer.eos_token_ids)
    ended = False
    for place, (token, is_learned) in enumerate(zip(tokens, targets, strict=True)):
        if not is_learned:
            ended = False
        elif ended:
            targets[place] = False
        elif token in ends:
            ended = True
