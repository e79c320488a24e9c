"""Conversations: the template's tokens, of which only the assistant's are learned."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deepseek.data import Tokenizer, conversation, read_texts, tokenized
from deepseek.errors import ConfigError, FormatError
from tests.generate.conftest import byte_tokenizer

TEMPLATE = (
    "{% for m in messages %}<begin>{{ m['role'] }}:{{ m['content'] }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<begin>assistant:{% endif %}"
)
ASKED = {"role": "user", "content": "one and two?"}
SAID = {"role": "assistant", "content": "three"}


def chat_tokenizer(template: str = TEMPLATE) -> Tokenizer:
    return byte_tokenizer(
        bos_token="<begin>",
        eos_token="<end>",
        chat_template=template,
    )


def learned(messages: list[dict[str, str]], tokenizer: Tokenizer) -> list[str]:
    """Return the runs of tokens that are learned, as text."""
    document = conversation(messages, tokenizer)
    assert document.targets is not None
    runs: list[list[int]] = [[]]
    for token, is_learned in zip(document.tokens, document.targets, strict=True):
        if is_learned:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(run, skip_special_tokens=False) for run in runs if run]


def test_answers_and_their_ends_are_learned() -> None:
    tokenizer = chat_tokenizer()
    assert learned([ASKED, SAID], tokenizer) == ["three<end>"]
    assert learned([ASKED, SAID, ASKED, SAID], tokenizer) == ["three<end>"] * 2
    assert learned([SAID, ASKED, SAID], tokenizer) == ["three<end>"]


def test_the_tokens_are_those_of_the_template() -> None:
    tokenizer = chat_tokenizer()
    messages = [ASKED, SAID, ASKED]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=False)
    found = conversation(messages, tokenizer)
    assert list(found.tokens) == tokenizer.encode(text, add_special_tokens=False)


def test_nothing_to_learn_and_a_template_that_rewrites_are_refused() -> None:
    with pytest.raises(ConfigError, match="the assistant answers"):
        conversation([ASKED], chat_tokenizer())
    forgets = "{{ messages[-1]['content'] }}{% if add_generation_prompt %}>{% endif %}"
    with pytest.raises(ConfigError, match="keeps what was said"):
        conversation([ASKED, SAID, ASKED, SAID], chat_tokenizer(forgets))
    with pytest.raises(ConfigError, match="chat_template"):
        conversation([ASKED, SAID], byte_tokenizer(eos_token="<end>"))


def test_lines_with_messages_are_conversations(tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": [ASKED, SAID]}) + "\n")
    (found,) = tokenized(read_texts([path]), chat_tokenizer())
    assert found.targets is not None and any(found.targets)


@pytest.mark.parametrize("messages", ['"hello"', "[3]", '[{"content": "x"}]'])
def test_bad_messages_are_named(tmp_path: Path, messages: str) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text('{"messages": ' + messages + "}\n")
    with pytest.raises(FormatError, match="line 1"):
        list(read_texts([path]))


def test_the_real_template(smollm2_folder: Path) -> None:
    tokenizer = Tokenizer.from_folder(smollm2_folder)
    assert tokenizer is not None
    messages = [ASKED, SAID, ASKED, {"role": "assistant", "content": "Three, again."}]
    assert learned(messages, tokenizer) == ["three<|im_end|>", "Three, again.<|im_end|>"]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=False)
    assert list(conversation(messages, tokenizer).tokens) == tokenizer.encode(
        text, add_special_tokens=False
    )
