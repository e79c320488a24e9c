"""Text to token ids and back, from the tokenizer files of a model folder, without transformers."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import tokenizers

from deepseek.data._tokenizer_files import TokenizerFiles, load_backend, read_tokenizer_files
from deepseek.errors import ConfigError, describe

if TYPE_CHECKING:
    from deepseek.data.chat_template import ChatTemplate

_CLEAN_UPS = (
    (" .", "."),
    (" ?", "?"),
    (" !", "!"),
    (" ,", ","),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
)


class Tokenizer:
    """A tokenizer of the `tokenizers` library with its special tokens and chat template.

    It gives the same ids and the same text as transformers' `AutoTokenizer` on the same folder.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos_token: str | None = None,
        eos_token: str | None = None,
        pad_token: str | None = None,
        unk_token: str | None = None,
        other_tokens: Mapping[str, str] | None = None,
        eos_token_ids: Sequence[int] = (),
        chat_template: str | Mapping[str, str] | None = None,
        model_max_length: int | None = None,
        cleans_up_spaces: bool = False,
    ) -> None:
        """Join a backend with its settings; the backend's truncation and padding are switched off.

        Args:
            backend: the tokenizer proper.
            bos_token, eos_token, pad_token, unk_token: special tokens by name.
            other_tokens: further named tokens: `sep_token`, `cls_token`, `mask_token`.
            eos_token_ids: ids that end a text besides the one of `eos_token`.
            chat_template: jinja2 source, or several by name, of which "default" is used.
            model_max_length: longest input the model was made for, in tokens.
            cleans_up_spaces: take the spaces before punctuation out of decoded text (word-piece
                models only).
        """
        self.backend = backend
        backend.no_truncation()
        backend.no_padding()
        named = {
            "bos_token": bos_token,
            "eos_token": eos_token,
            "pad_token": pad_token,
            "unk_token": unk_token,
        }
        named.update(other_tokens or {})
        self.special_tokens: dict[str, str] = {
            name: token for name, token in named.items() if token is not None
        }
        self.chat_templates: dict[str, str] = (
            {"default": chat_template}
            if isinstance(chat_template, str)
            else dict(chat_template or {})
        )
        self.model_max_length = model_max_length
        self.cleans_up_spaces = cleans_up_spaces and not isinstance(
            backend.model, tokenizers.models.BPE
        )
        own_eos = () if self.eos_token_id is None else (self.eos_token_id,)
        self.eos_token_ids: tuple[int, ...] = tuple(dict.fromkeys((*own_eos, *eos_token_ids)))

    @classmethod
    def from_folder(cls, folder: str | Path) -> Tokenizer | None:
        """Return the tokenizer of a model folder, or None when the folder has no `tokenizer.json`.

        Args:
            folder: with `tokenizer.json` and, where present, `tokenizer_config.json`,
                `special_tokens_map.json`, `chat_template.jinja`, `additional_chat_templates/` and
                `generation_config.json`.

        Raises:
            FormatError: a file is not what its name says.
        """
        folder = Path(folder)
        if not (folder / "tokenizer.json").is_file():
            return None
        files: TokenizerFiles = read_tokenizer_files(folder)
        tokens = dict(files.special_tokens)
        return cls(
            load_backend(folder / "tokenizer.json", files),
            bos_token=tokens.pop("bos_token", None),
            eos_token=tokens.pop("eos_token", None),
            pad_token=tokens.pop("pad_token", None),
            unk_token=tokens.pop("unk_token", None),
            other_tokens=tokens,
            eos_token_ids=files.eos_token_ids,
            chat_template=files.chat_templates,
            model_max_length=files.model_max_length,
            cleans_up_spaces=files.cleans_up_spaces,
        )

    def save(self, folder: str | Path) -> list[str]:
        """Write the files, readable by `AutoTokenizer.from_pretrained`, and return their names.

        The ids in `eos_token_ids` belong to a model's `generation_config.json`, which is not
        written here.

        Args:
            folder: an existing folder.
        """
        folder = Path(folder)
        self.backend.save(str(folder / "tokenizer.json"), pretty=False)
        config: dict[str, object] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **self.special_tokens,
        }
        config["clean_up_tokenization_spaces"] = self.cleans_up_spaces
        if self.model_max_length is not None:
            config["model_max_length"] = self.model_max_length
        texts = {"tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False) + "\n"}
        for name, source in self.chat_templates.items():
            is_main = name == "default"
            texts[
                "chat_template.jinja" if is_main else f"additional_chat_templates/{name}.jinja"
            ] = source
        for name, text in texts.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8", newline="")
        return ["tokenizer.json", *texts]

    @property
    def vocab_size(self) -> int:
        """Number of token ids, added tokens included; a model's output may be padded to more."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @property
    def bos_token_id(self) -> int | None:
        """Id of the token that begins a text."""
        return self._named_id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        """Id of the token that ends a text; `eos_token_ids` has all of them."""
        return self._named_id("eos_token")

    @property
    def pad_token_id(self) -> int | None:
        """Id of the token that fills a batch."""
        return self._named_id("pad_token")

    @property
    def unk_token_id(self) -> int | None:
        """Id of the token for what has no token."""
        return self._named_id("unk_token")

    @functools.cached_property
    def special_token_ids(self) -> frozenset[int]:
        """Ids that `decode` leaves out unless told otherwise."""
        added = self.backend.get_added_tokens_decoder()
        return frozenset(token_id for token_id, token in added.items() if token.special)

    @property
    def chat_template(self) -> str | None:
        """Source of the chat template in use, or None."""
        return self.chat_templates.get("default")

    def token_to_id(self, token: str) -> int | None:
        """Return the id of a token, or None for one that is not in the vocabulary."""
        return self.backend.token_to_id(token)

    def id_to_token(self, token_id: int) -> str | None:
        """Return the token of an id, or None for one outside the vocabulary."""
        return self.backend.id_to_token(token_id) if 0 <= token_id < 2**32 else None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of a text.

        Args:
            text: any text; special tokens written in it are recognised as such.
            add_special_tokens: add what the model expects around a text (`[CLS] ... [SEP]`, a
                leading `<s>`).

        Raises:
            ConfigError: `text` is not text, or has half a surrogate pair in it.
        """
        return self.encode_batch([text], add_special_tokens=add_special_tokens)[0]

    def encode_batch(
        self, texts: Sequence[str], *, add_special_tokens: bool = True
    ) -> list[list[int]]:
        """Return the token ids of each text; as `encode`, in parallel for several."""
        for text in texts:
            _check_text(text)
        if len(texts) == 1:
            return [self.backend.encode(texts[0], add_special_tokens=add_special_tokens).ids]
        encodings = self.backend.encode_batch_fast(
            list(texts), add_special_tokens=add_special_tokens
        )
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of token ids; ids outside the vocabulary add nothing.

        Args:
            ids: non-negative token ids.
            skip_special_tokens: leave special tokens out of the text.

        Raises:
            ConfigError: an id is negative or not an integer.
        """
        ids = list(ids)
        try:
            text = self.backend.decode(ids, skip_special_tokens=skip_special_tokens)
        except (TypeError, OverflowError) as error:
            raise ConfigError(
                describe("ids", "decode", "integers from 0 to 2**32 - 1", ids)
            ) from error
        if self.cleans_up_spaces:
            for found, replacement in _CLEAN_UPS:
                text = text.replace(found, replacement)
        return text

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, object]] | None = None,
        options: Mapping[str, object] | None = None,
    ) -> str:
        """Return the prompt text of a conversation, special tokens written out.

        Encode it with `add_special_tokens=False`: the template has added them already.

        Args:
            messages: `[{"role": "user", "content": "..."}, ...]`.
            add_generation_prompt: end with the header that opens the assistant's answer.
            tools: functions that may be called, in OpenAI's form; a template shows them if it
                `chat_template_takes("tools")`.
            options: further variables of the template: `enable_thinking`.

        Raises:
            ConfigError: there is no template, the messages are malformed, an option is not one, or
                the template refuses them.
        """
        return self._compiled_template.render(
            messages,
            add_generation_prompt=add_generation_prompt,
            special_tokens=self.special_tokens,
            tools=tools,
            options=options,
        )

    def chat_template_takes(self, variable: str) -> bool:
        """Return whether the chat template looks at a variable, such as `tools`.

        Raises:
            ConfigError: there is no template.
        """
        return self._compiled_template.takes(variable)

    @functools.cached_property
    def _compiled_template(self) -> ChatTemplate:
        if self.chat_template is None:
            names = sorted(self.chat_templates)
            got = f"only {', '.join(names)}" if names else "no template"
            step = "Give a plain prompt, or load an instruction-tuned model"
            raise ConfigError(
                describe("chat_template", "tokenizer", "present for a chat", got, step)
            )
        # not at the top: jinja2 takes as long to import as all else here
        from deepseek.data.chat_template import ChatTemplate

        return ChatTemplate(self.chat_template)

    def _named_id(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self.backend.token_to_id(token)


def _check_text(text: object) -> None:
    if not isinstance(text, str):
        raise ConfigError(describe("text", "encode", "of type str", text))
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        must, step = "text without lone surrogates", "Decode the input with errors='replace'"
        raise ConfigError(describe("text", "encode", must, text, step))
