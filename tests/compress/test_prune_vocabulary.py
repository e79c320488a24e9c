"""A vocabulary without the tokens that texts never use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from deepseek.compress import Distil, Work
from deepseek.compress.distil.stage import distil
from deepseek.compress.learning import open_teacher
from deepseek.compress.prune import PruneVocabulary, vocabulary
from deepseek.compress.prune.vocabulary import cut_tokenizer
from deepseek.data import Tokenizer
from deepseek.errors import ConfigError
from deepseek.hub import load, save
from deepseek.models import Decoder, Encoder
from deepseek.optim import AdamW
from deepseek.train import Source
from tests.compress.prune import BERT, LLAMA, made, work_of
from tests.hub.tiny import TEXT
from tests.tolerances import assert_logits_equal

SHORT = "The quick brown fox, isn't it? 深度\n"


def bpe() -> Tokenizer:
    """Return a byte-level tokenizer with many merges, an end, and a token around texts."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([TEXT * 3], trainer)
    backend.add_special_tokens(["<pad>", "<s>", "</s>"])  # behind all that may go
    backend.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
            ),
        ]
    )
    return Tokenizer(
        backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", eos_token_ids=[300]
    )


def wordpiece() -> Tokenizer:
    """Return a tokenizer as BERT has it."""
    backend = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=300,
        special_tokens=["[PAD]", "[UNK]"],
        show_progress=False,
    )
    backend.train_from_iterator([TEXT * 3], trainer)
    backend.add_special_tokens(["[CLS]", "[SEP]"])
    cls, sep = (backend.token_to_id(token) for token in ("[CLS]", "[SEP]"))
    backend.post_processor = processors.BertProcessing(("[SEP]", sep), ("[CLS]", cls))
    return Tokenizer(
        backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        other_tokens={"cls_token": "[CLS]", "sep_token": "[SEP]"},
    )


KINDS = {"bpe": bpe(), "wordpiece": wordpiece()}


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(sorted(KINDS)),
    start=st.integers(0, len(TEXT) - 1),
    length=st.integers(0, 60),
)
def test_the_texts_are_encoded_as_before(kind: str, start: int, length: int) -> None:
    tokenizer = KINDS[kind]
    text = TEXT[start : start + length]
    ids = tokenizer.encode(text)
    smaller, kept = cut_tokenizer(tokenizer, ids)
    assert [kept[each] for each in smaller.encode(text)] == ids
    assert smaller.decode(smaller.encode(text)) == tokenizer.decode(ids)
    assert smaller.vocab_size == len(kept) <= tokenizer.vocab_size


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_that_are_not_used_go(kind: str) -> None:
    tokenizer = KINDS[kind]
    smaller, kept = cut_tokenizer(tokenizer, tokenizer.encode(SHORT))
    assert len(kept) < tokenizer.vocab_size - 20
    for new, old in enumerate(kept):
        assert smaller.id_to_token(new) == tokenizer.id_to_token(old)


def test_any_text_can_still_be_encoded() -> None:
    tokenizer = KINDS["bpe"]
    smaller, _ = cut_tokenizer(tokenizer, tokenizer.encode(SHORT))
    for text in (TEXT, "völlig anders 🙂 \x00 тест"):
        assert smaller.decode(smaller.encode(text)) == text
    words = KINDS["wordpiece"]
    smaller, _ = cut_tokenizer(words, words.encode(SHORT))
    assert words.unk_token_id in words.encode("ж")
    assert smaller.unk_token_id not in smaller.encode("jumps over lazy")


def test_special_tokens_have_their_new_numbers() -> None:
    tokenizer = KINDS["bpe"]
    smaller, kept = cut_tokenizer(tokenizer, [290])
    assert smaller.bos_token_id != tokenizer.bos_token_id
    assert kept[smaller.encode("x")[0]] == tokenizer.bos_token_id
    assert [kept[each] for each in smaller.eos_token_ids] == [
        each for each in tokenizer.eos_token_ids if each in kept
    ]
    words, kept = cut_tokenizer(KINDS["wordpiece"], [])
    ids = words.encode("x")
    assert [words.id_to_token(each) for each in (ids[0], ids[-1])] == ["[CLS]", "[SEP]"]


def texts_of(folder: Path) -> tuple[str, ...]:
    path = folder / "seen.txt"
    path.write_text(SHORT * 3, encoding="utf-8")
    chat = folder / "chat.jsonl"
    turns = [
        {"role": "user", "content": "lazy dog"},
        {"role": "assistant", "content": "squared"},
    ]
    chat.write_text(json.dumps({"messages": turns}) + "\n", encoding="utf-8")
    return str(path), str(chat)


@pytest.mark.parametrize("tied", [True, False])
def test_a_decoder_loses_rows_and_nothing_else(tmp_path: Path, tied: bool) -> None:
    config = LLAMA.replace(
        vocab_size=410,
        tie_embeddings=tied,
        bos_token_id=KINDS["bpe"].bos_token_id,
        eos_token_id=KINDS["bpe"].eos_token_ids,
        pad_token_id=KINDS["bpe"].pad_token_id,
    )
    model = made(config)
    work = work_of(model, tmp_path)
    model.tokenizer = KINDS["bpe"]
    stage = PruneVocabulary(texts=texts_of(tmp_path))
    outcome = {item.name: item.value for item in vocabulary.apply(stage, work)}
    smaller = work.model
    assert isinstance(smaller, Decoder) and smaller.tokenizer is not None
    assert outcome["vocabulary_after"] == smaller.config.vocab_size == smaller.tokenizer.vocab_size
    assert smaller.config.bos_token_id == smaller.tokenizer.bos_token_id
    assert smaller.config.pad_token_id == smaller.tokenizer.pad_token_id
    old, new = KINDS["bpe"].encode("lazy dog"), smaller.tokenizer.encode("lazy dog")
    rows = [KINDS["bpe"].token_to_id(str(smaller.tokenizer.id_to_token(i))) for i in range(9)]
    with torch.no_grad():
        theirs = model(torch.tensor([old])).logits[..., rows]
        assert_logits_equal(smaller(torch.tensor([new])).logits[..., :9], theirs)
    assert (smaller.lm_head.weight is smaller.model.embed_tokens.weight) == tied


def test_an_encoder_loses_rows_and_nothing_else(tmp_path: Path) -> None:
    model = made(BERT)
    work = work_of(model, tmp_path)
    model.tokenizer = KINDS["wordpiece"]
    vocabulary.apply(PruneVocabulary(texts=texts_of(tmp_path)), work)
    assert work.model.config.vocab_size < 280
    with torch.no_grad():
        before, after = model.embed([SHORT]), work.model.embed([SHORT])  # type: ignore[union-attr]
    assert_logits_equal(after, before)


def test_a_bundle_forgets_the_old_numbers(tmp_path: Path) -> None:
    import transformers

    ids = {"bos_token_id": KINDS["bpe"].bos_token_id, "eos_token_id": KINDS["bpe"].eos_token_id}
    model = made(LLAMA.replace(hidden_size=36, vocab_size=410, **ids))
    model.tokenizer = KINDS["bpe"]
    save(model, tmp_path / "whole")
    generation = tmp_path / "whole" / "generation_config.json"
    settings_ = json.loads(generation.read_text()) | {"forced_eos_token_id": 305, "top_k": 7}
    generation.write_text(json.dumps(settings_))
    (tmp_path / "whole" / "vocab.txt").write_text("old\n")
    (tmp_path / "whole" / "bundle.json").unlink()
    work = work_of(load(tmp_path / "whole"), tmp_path)
    work.model.tokenizer = KINDS["bpe"]
    vocabulary.apply(PruneVocabulary(texts=texts_of(tmp_path)), work)
    save(work.model, tmp_path / "small")
    assert not (tmp_path / "small" / "vocab.txt").exists()
    written = json.loads((tmp_path / "small" / "generation_config.json").read_text())
    assert written["top_k"] == 7 and "forced_eos_token_id" not in written
    assert work.model.tokenizer is not None
    assert work.model.tokenizer.eos_token_id in [written["eos_token_id"], *_list(written)]
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "small")
    assert theirs(SHORT)["input_ids"] == work.model.tokenizer.encode(SHORT)
    again = load(tmp_path / "small")
    assert again.tokenizer is not None
    assert again.tokenizer.encode(SHORT) == work.model.tokenizer.encode(SHORT)


def states_of(model: Decoder | Encoder, ids: torch.Tensor) -> torch.Tensor:
    return model(ids).logits if isinstance(model, Decoder) else model(ids).last_hidden_state


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_a_teacher_of_more_tokens_speaks_of_those_that_are_left(tmp_path: Path, kind: str) -> None:
    teacher = made(LLAMA.replace(vocab_size=410) if kind == "decoder" else BERT)
    teacher.tokenizer = KINDS["bpe" if kind == "decoder" else "wordpiece"]
    save(teacher, tmp_path / "teacher")
    work = Work(load(tmp_path / "teacher"), tmp_path / "teacher", tmp_path / "stage")
    texts = texts_of(tmp_path)
    vocabulary.apply(PruneVocabulary(texts=texts), work)
    assert work.model.tokenizer is not None
    stage = Distil(
        data=(Source(path=texts[0]),),
        steps=2,
        length=16,
        batch=2,
        precision="float32",
        checkpoint_every=1,
        optimizer=AdamW(rate=1e-9),
    )
    taught = open_teacher(stage, work)
    ids = torch.tensor([work.model.tokenizer.encode(SHORT)])
    with torch.no_grad():
        assert_logits_equal(*(states_of(each, ids) for each in (taught, work.model)))
    outcome = {item.name: item.value for item in distil(stage, work)}
    assert outcome["first_training_loss"] == pytest.approx(0, abs=1e-6)


def _list(settings_: dict[str, Any]) -> list[int]:
    ends = settings_["eos_token_id"]
    return ends if isinstance(ends, list) else []


def test_other_tokenizers_are_refused(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], 0))
    with pytest.raises(ConfigError, match="must be BPE or WordPiece; got 'Unigram'"):
        cut_tokenizer(Tokenizer(backend), [1])
    work = work_of(made(LLAMA), tmp_path)
    work.model.tokenizer = None
    with pytest.raises(ConfigError, match="tokenizer of PruneVocabulary"):
        vocabulary.apply(PruneVocabulary(), work)
    with pytest.raises(ConfigError, match="at least one"):
        PruneVocabulary(texts=())
