"""Token corpora: read back as written in any piece, whole or not there, damage named."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek.data import Document, TokenCorpus, Windows, write_corpus
from deepseek.data import corpus as corpus_module
from deepseek.errors import CapacityError, ConfigError, FormatError

DOCUMENTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9], [10, 11]]


def write(folder: Path, documents=DOCUMENTS, targets=None, **settings: object) -> TokenCorpus:
    made = [
        Document(tokens, None if targets is None else targets[number])
        for number, tokens in enumerate(documents)
    ]
    values: dict = {"name": "toy", "vocab_size": 100, "tokenizer_sha256": "x", **settings}
    return write_corpus(folder, iter(made), **values)


@given(data=st.data(), shard=st.integers(1, 12))
@settings(max_examples=40, deadline=None)
def test_any_piece_reads_as_it_was_written(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, shard: int
) -> None:
    folder = tmp_path_factory.mktemp("corpus") / "toy"
    tokens = st.lists(st.integers(0, 99), min_size=0, max_size=9)
    documents = [*data.draw(st.lists(tokens, max_size=6)), [7]]
    corpus = write(folder, documents, shard_tokens=shard)
    flat = [token for document in documents for token in document]
    assert corpus.num_tokens == len(flat)
    start = data.draw(st.integers(0, len(flat) - 1))
    count = data.draw(st.integers(1, len(flat) - start))
    assert corpus.read(start, count).tolist() == flat[start : start + count]
    assert corpus.read(start, count, "targets").tolist() == [1] * count
    corpus.verify()


def test_targets_are_kept_beside_the_tokens(tmp_path: Path) -> None:
    targets = [[index % 2 == 0 for index, _ in enumerate(tokens)] for tokens in DOCUMENTS]
    corpus = write(tmp_path / "toy", targets=targets, shard_tokens=4)
    flat = [int(each) for part in targets for each in part]
    assert corpus.has_targets
    assert corpus.read(0, len(flat), "targets").tolist() == flat


def test_a_large_vocabulary_takes_four_bytes(tmp_path: Path) -> None:
    corpus = write(tmp_path / "toy", [[99_999]], vocab_size=100_000)
    assert corpus.read(0, 1).tolist() == [99_999]


@pytest.mark.parametrize("damage", ["cut", "flipped", "gone", "card", "other array"])
def test_damage_is_one_error(tmp_path: Path, damage: str) -> None:
    folder = write(tmp_path / "toy").folder
    shard = folder / "tokens-00000.npy"
    whole = bytearray(shard.read_bytes())
    if damage == "cut":
        shard.write_bytes(whole[:-1])
    elif damage == "flipped":
        whole[-1] ^= 1
        shard.write_bytes(whole)
    elif damage == "gone":
        shard.unlink()
    elif damage == "card":
        (folder / "corpus.json").write_text("{")
    else:
        np.save(shard, np.arange(3, dtype=np.uint16))
    with pytest.raises(FormatError, match="Write the corpus again"):
        TokenCorpus.open(folder).read(0, 3)


def test_bad_corpora_say_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="tokens from 0 to 99"):
        write(tmp_path / "a", [[100]])
    with pytest.raises(ConfigError, match="at least one token"):
        write(tmp_path / "b", [])
    with pytest.raises(ConfigError, match="every document or for none"):
        write(tmp_path / "c", [[1], [2]], targets=[[True], None])
    assert list(tmp_path.iterdir()) == [], "nothing half written stays"
    write(tmp_path / "d")
    with pytest.raises(ConfigError, match="new"):
        write(tmp_path / "d")
    with pytest.raises(ConfigError, match=r"corpus\.json"):
        TokenCorpus.open(tmp_path)


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(corpus_module.np, "save", full)
    with pytest.raises(CapacityError, match="No space left"):
        write(tmp_path / "toy")
    assert list(tmp_path.iterdir()) == []


def test_every_token_but_the_first_is_predicted_once(tmp_path: Path) -> None:
    tokens = list(range(1, 100))
    windows = Windows([write(tmp_path / "toy", [tokens])], length=8, seed=1)
    samples = windows.read(0, windows.num_windows)
    predicted = sorted(samples.tokens[samples.targets].tolist())
    assert predicted == tokens[1 : 1 + 7 * windows.num_windows]
    assert not samples.targets[:, 0].any()
    assert windows.num_targets(0, 5) == 35


def test_context_is_not_predicted(tmp_path: Path) -> None:
    targets = [[False, True, False, True, True]]
    corpus = write(tmp_path / "toy", [[1, 2, 3, 4, 5]], targets=targets)
    windows = Windows([corpus], length=5)
    samples = windows.read(0, 1)
    assert samples.tokens[samples.targets].tolist() == [2, 4, 5]
    assert windows.num_targets(0, 1) == 3


def test_windows_longer_than_the_text_are_refused(tmp_path: Path) -> None:
    corpus = write(tmp_path / "toy")
    with pytest.raises(ConfigError, match="at least 50 tokens"):
        Windows([corpus], length=50)
    with pytest.raises(ConfigError, match="at least 2"):
        Windows([corpus], length=1)


def test_the_card_says_what_it_was_made_from(tmp_path: Path) -> None:
    folder = write(tmp_path / "toy", source_sha256="abc").folder
    card = json.loads((folder / "corpus.json").read_text())
    assert card["source_sha256"] == "abc" and card["num_documents"] == 4
