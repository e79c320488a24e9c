"""Tokenizers give what transformers gives on the same folder, whatever year its files are from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from deepseek.data import Tokenizer
from deepseek.errors import ConfigError, FormatError

TEXTS = [
    "",
    "Hello world",
    "  two  spaces, and\n\ttabs ",
    "你好，世界。",
    "👩‍👩‍👧 family, 🇫🇷 flag, e\u0301 combined",
    "don't , do it !",
    "<|im_start|>user\nhi<|im_end|> [CLS] [MASK]",
]


def small_backend() -> tokenizers.Tokenizer:
    """Return a byte-level tokenizer without merges: one id a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def write_folder(folder: Path, **files: object) -> Path:
    """Write `tokenizer.json` of the small backend and further JSON files by stem."""
    small_backend().save(str(folder / "tokenizer.json"))
    for stem, content in files.items():
        (folder / f"{stem}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def loaded(folder: Path) -> Tokenizer:
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer is not None
    return tokenizer


def assert_like_transformers(folder: Path) -> None:
    auto = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(folder)
    ours = loaded(folder)
    assert ours.vocab_size == len(auto)
    for name in ("bos", "eos", "pad", "unk"):
        assert getattr(ours, f"{name}_token_id") == getattr(auto, f"{name}_token_id")
    for text in TEXTS:
        for special in (True, False):
            ids = ours.encode(text, add_special_tokens=special)
            assert ids == auto.encode(text, add_special_tokens=special)
            expected = auto.decode(ids, skip_special_tokens=special)
            assert ours.decode(ids, skip_special_tokens=special) == expected
    assert ours.encode_batch(TEXTS) == [ours.encode(text) for text in TEXTS]


def test_smollm2_is_like_transformers(smollm2_folder: Path) -> None:
    assert_like_transformers(smollm2_folder)


def test_minilm_is_like_transformers(minilm_folder: Path) -> None:
    assert_like_transformers(minilm_folder)
    assert loaded(minilm_folder).encode("hi")[0] == loaded(minilm_folder).token_to_id("[CLS]")


CONVERSATIONS = [
    [{"role": "user", "content": "Hi <b>&amp;"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "你好"}],
    [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two", "tool_calls": None},
        {"role": "user", "content": "three"},
    ],
]


@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_chat_is_like_transformers(smollm2_folder: Path, messages: list[dict[str, str]]) -> None:
    auto = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(smollm2_folder)
    for prompt in (True, False):
        expected = auto.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=False)
        ours = loaded(smollm2_folder).apply_chat_template(messages, add_generation_prompt=prompt)
        assert ours == expected


ADDED = {"content": "<end>", "lstrip": False, "normalized": False, "rstrip": False}
STYLES = {
    "strings": {"tokenizer_config": {"eos_token": "<end>", "bos_token": "<begin>"}},
    "objects": {"tokenizer_config": {"eos_token": {"__type": "AddedToken", **ADDED}}},
    "map beside": {"tokenizer_config": {}, "special_tokens_map": {"eos_token": ADDED}},
    "map wins": {
        "tokenizer_config": {"eos_token": "a"},
        "special_tokens_map": {"eos_token": "<end>"},
    },
    "listed": {
        "tokenizer_config": {
            "eos_token": "<end>",
            "added_tokens_decoder": {
                "257": {**ADDED, "content": "<tool>", "single_word": False, "special": False},
                "256": {**ADDED, "single_word": False, "special": True},
            },
        }
    },
    "additional": {
        "tokenizer_config": {"eos_token": "<end>", "additional_special_tokens": ["<x>", "<y>"]}
    },
    "extra": {"tokenizer_config": {"eos_token": "<end>", "extra_special_tokens": ["<x>"]}},
}


@pytest.mark.parametrize("style", STYLES)
def test_every_style_of_config_is_read(tmp_path: Path, style: str) -> None:
    config = STYLES[style]
    config["tokenizer_config"]["tokenizer_class"] = "PreTrainedTokenizerFast"
    folder = write_folder(tmp_path, **config)
    ours = loaded(folder)
    assert ours.special_tokens["eos_token"] == "<end>"
    assert ours.eos_token_ids == (ours.eos_token_id,)
    auto = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(folder)
    text = "a<end>b<begin><tool>c<x>d<y>"
    assert ours.encode(text) == auto.encode(text)
    assert ours.decode(ours.encode(text)) == auto.decode(
        auto.encode(text), skip_special_tokens=True
    )
    assert ours.eos_token_id == auto.eos_token_id


NAMED = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]


@pytest.mark.parametrize(
    ("entry", "file", "expected"),
    [("A", None, "A"), (NAMED, None, "D"), ("A", "F", "F"), (NAMED[1:], None, None)],
)
def test_chat_template_is_found(
    tmp_path: Path, entry: object, file: str | None, expected: str | None
) -> None:
    folder = write_folder(tmp_path, tokenizer_config={"chat_template": entry})
    if file is not None:
        (folder / "chat_template.jinja").write_text(file)
    ours = loaded(folder)
    assert ours.chat_template == expected
    if expected is None:
        with pytest.raises(ConfigError, match="tool_use"):
            ours.apply_chat_template(CONVERSATIONS[0])
    else:
        assert ours.apply_chat_template(CONVERSATIONS[0]) == expected


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"generation_config": {"eos_token_id": [7, 9]}}, (7, 9)),
        ({"generation_config": {"eos_token_id": 7}, "config": {"eos_token_id": 8}}, (7,)),
        ({"config": {"eos_token_id": 8}}, (8,)),
        ({"generation_config": {}}, ()),
    ],
)
def test_eos_ids_of_the_model_count(
    tmp_path: Path, files: dict[str, object], expected: tuple[int, ...]
) -> None:
    assert loaded(write_folder(tmp_path, **files)).eos_token_ids == expected


def test_save_is_read_by_both(tmp_path: Path) -> None:
    source, target = tmp_path / "a", tmp_path / "b"
    source.mkdir()
    target.mkdir()
    config = {
        "eos_token": "<end>",
        "pad_token": "<pad>",
        "model_max_length": 77,
        "chat_template": NAMED,
        "additional_special_tokens": ["<x>"],
    }
    ours = loaded(write_folder(source, tokenizer_config=config))
    names = ours.save(target)
    written = {str(p.relative_to(target)) for p in target.rglob("*") if p.is_file()}
    assert written == set(names)
    again = loaded(target)
    assert again.chat_templates == ours.chat_templates == {"default": "D", "tool_use": "T"}
    assert (again.special_tokens, again.model_max_length) == (ours.special_tokens, 77)
    auto = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(target)
    text = "a<end>b<x>c<pad>"
    assert again.encode(text) == ours.encode(text) == auto.encode(text)
    assert auto.model_max_length == 77
    assert auto.chat_template == {"default": "D", "tool_use": "T"}


def test_a_folder_without_tokenizer_gives_none(tmp_path: Path) -> None:
    assert Tokenizer.from_folder(tmp_path) is None


@pytest.mark.parametrize(
    "content", ["", "{", "{}", "[1]", '{"model": {"type": "BPE"}}', "\x00\xff"]
)
def test_corrupt_tokenizer_json_is_one_clear_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(FormatError, match=r"^tokenizer\.json of .*; got .*\.$"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("stem", "content"),
    [
        ("tokenizer_config", "{"),
        ("tokenizer_config", "[]"),
        ("tokenizer_config", '{"eos_token": 5}'),
        ("tokenizer_config", '{"added_tokens_decoder": {"x": "a"}}'),
        ("tokenizer_config", '{"extra_special_tokens": 5}'),
        ("tokenizer_config", '{"chat_template": 5}'),
        ("special_tokens_map", "nonsense"),
        ("generation_config", '{"eos_token_id": "two"}'),
    ],
)
def test_corrupt_neighbour_is_one_clear_error(tmp_path: Path, stem: str, content: str) -> None:
    (write_folder(tmp_path) / f"{stem}.json").write_text(content)
    with pytest.raises(FormatError, match="must be"):
        Tokenizer.from_folder(tmp_path)


def test_user_errors_are_clear(tmp_path: Path) -> None:
    ours = loaded(write_folder(tmp_path))
    with pytest.raises(ConfigError, match="surrogates"):
        ours.encode("\ud83d")
    with pytest.raises(ConfigError, match="of type str"):
        ours.encode(5)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="ids of decode"):
        ours.decode([-1])
    with pytest.raises(ConfigError, match="no template"):
        ours.apply_chat_template(CONVERSATIONS[0])
    assert ours.decode([10**6]) == ""
    assert ours.id_to_token(-1) is None
    assert ours.token_to_id("nothing") is None
    assert (ours.bos_token_id, ours.eos_token_id, ours.eos_token_ids) == (None, None, ())
