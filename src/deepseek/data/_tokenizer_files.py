"""Reading the files beside `tokenizer.json`, in the styles of all years."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers

from deepseek.errors import FormatError, describe

_NAMED = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerFiles:
    """What the files beside `tokenizer.json` say."""

    special_tokens: Mapping[str, str]
    """Named special tokens: `bos_token`, `eos_token`, ..."""
    added_tokens: tuple[tokenizers.AddedToken, ...]
    """Tokens that the vocabulary must have, in the order to add the missing ones."""
    chat_templates: Mapping[str, str]
    model_max_length: int | None
    cleans_up_spaces: bool
    eos_token_ids: tuple[int, ...]


def read_tokenizer_files(folder: Path) -> TokenizerFiles:
    """Return the settings of the tokenizer in `folder`.

    Raises:
        FormatError: a file is not JSON, or a field has a type that no version wrote.
    """
    config = _read_json(folder / "tokenizer_config.json")
    if "added_tokens_decoder" not in config:
        # files written before transformers 4.34 keep the tokens beside the config, and those win
        config = config | _read_json(folder / "special_tokens_map.json")
    tokens = {name: _token(config[name], name) for name in _NAMED if config.get(name) is not None}
    return TokenizerFiles(
        special_tokens={name: token.content for name, token in tokens.items()},
        added_tokens=(*_listed_tokens(config), *tokens.values(), *_extra_tokens(config)),
        chat_templates=_chat_templates(folder, config),
        model_max_length=_max_length(config.get("model_max_length", config.get("max_len"))),
        cleans_up_spaces=config.get("clean_up_tokenization_spaces") is True,
        eos_token_ids=_eos_token_ids(folder),
    )


def load_backend(path: Path, files: TokenizerFiles) -> tokenizers.Tokenizer:
    """Return the backend of a `tokenizer.json`, with the tokens that only the files beside it know.

    Raises:
        FormatError: the file is truncated, corrupt or of an unknown kind.
    """
    try:
        backend = tokenizers.Tokenizer.from_buffer(path.read_bytes())
    except BaseException as error:
        # the library reports most faults as a bare Exception, and some as a panic, not even that
        if isinstance(error, OSError) or not (
            isinstance(error, Exception) or type(error).__name__ == "PanicException"
        ):
            raise
        step = "Fetch the model again"
        raise FormatError(
            describe("tokenizer.json", str(path.parent), "a tokenizers file", str(error), step)
        ) from error
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    missing = [token for token in files.added_tokens if token.content not in known]
    backend.add_tokens(missing)
    return backend


def _read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file, empty when there is no file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise FormatError(
            describe(path.name, str(path.parent), "JSON", str(error), "Fetch it again")
        ) from error
    if not isinstance(content, dict):
        raise FormatError(
            describe(path.name, str(path.parent), "a JSON object", content, "Fetch it again")
        )
    return content


def _token(value: Any, name: str) -> tokenizers.AddedToken:
    if isinstance(value, str):
        return tokenizers.AddedToken(value, special=True, normalized=False)
    if isinstance(value, Mapping) and isinstance(value.get("content"), str):
        known = ("single_word", "lstrip", "rstrip", "normalized")
        flags = {flag: bool(value[flag]) for flag in known if flag in value}
        return tokenizers.AddedToken(
            value["content"], special=bool(value.get("special", True)), **flags
        )
    must = "text or an object with 'content'"
    raise FormatError(describe(name, "tokenizer_config.json", must, value))


def _listed_tokens(config: Mapping[str, Any]) -> list[tokenizers.AddedToken]:
    listed = config.get("added_tokens_decoder") or {}
    try:
        ordered = sorted(listed.items(), key=lambda item: int(item[0]))
    except (AttributeError, ValueError) as error:
        must = "an object of ids and tokens"
        raise FormatError(
            describe("added_tokens_decoder", "tokenizer_config.json", must, listed)
        ) from error
    return [_token(value, "added_tokens_decoder") for _, value in ordered]


def _extra_tokens(config: Mapping[str, Any]) -> list[tokenizers.AddedToken]:
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    values = list(extra.values()) if isinstance(extra, Mapping) else extra
    if not isinstance(values, list):
        must = "a list of tokens, or an object of names and tokens"
        raise FormatError(describe("extra_special_tokens", "tokenizer_config.json", must, extra))
    return [_token(value, "extra_special_tokens") for value in values]


def _chat_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Return the templates by name; files of their own win over the entry in the config."""
    found: dict[str, str] = {}
    if (folder / "chat_template.jinja").is_file():
        found["default"] = _read_text(folder / "chat_template.jinja")
    for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        found[path.stem] = _read_text(path)
    if found:
        return found
    entry = config.get("chat_template") or {}
    if isinstance(entry, str):
        return {"default": entry}
    try:
        named = (
            entry
            if isinstance(entry, Mapping)
            else {item["name"]: item["template"] for item in entry}
        )
        return {str(name).replace("/", "_"): str(template) for name, template in named.items()}
    except (TypeError, KeyError) as error:
        must = "text, or a list of objects with 'name' and 'template'"
        raise FormatError(
            describe("chat_template", "tokenizer_config.json", must, entry)
        ) from error


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(
            describe(path.name, str(path.parent), "UTF-8 text", str(error))
        ) from error


def _max_length(value: Any) -> int | None:
    # transformers writes 10**30 for "no limit"
    return int(value) if isinstance(value, int | float) and 0 < value < 10**9 else None


def _eos_token_ids(folder: Path) -> tuple[int, ...]:
    """Return the ids that end a text, from `generation_config.json` or else `config.json`."""
    for name in ("generation_config.json", "config.json"):
        value = _read_json(folder / name).get("eos_token_id")
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        if not all(
            isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in ids
        ):
            raise FormatError(describe("eos_token_id", name, "an id or a list of ids", value))
        return tuple(ids)
    return ()
