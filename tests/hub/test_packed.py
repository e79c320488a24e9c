"""Packed weights on the disk: used when they fit, made anew when they do not, never in the way."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import deepseek
from deepseek.errors import ConfigError, FormatError
from deepseek.face import load_engine
from deepseek.generate import Engine
from deepseek.hub import packed
from deepseek.ops.cpu import why_missing
from tests.models.zoo import ours, reference

pytestmark = pytest.mark.skipif(why_missing() is not None, reason=str(why_missing()))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    deepseek.save(ours(reference("qwen2")), tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("deepseek.hub.packed.packed_folder", lambda: tmp_path / "packed")
    return tmp_path / "packed"


def open_engine(folder: Path, **settings: object) -> Engine:
    engine = load_engine(folder, **settings)
    assert engine is not None
    return engine


def logits(engine: Engine) -> np.ndarray:
    table = np.arange(1)[None]
    return engine.step(engine.new_pages(1), [3, 1, 4], range(3), [0] * 3, table, range(3))


@pytest.mark.parametrize("scheme", ["float32", "bfloat16", "int8", "int4", "int4-g128"])
def test_the_second_start_reads_what_the_first_packed(folder: Path, scheme: str) -> None:
    first = open_engine(folder, scheme=scheme)
    second = open_engine(folder, scheme=scheme)
    assert not first.was_packed and second.was_packed
    assert np.array_equal(logits(first), logits(second))
    assert first.weight_bytes == second.weight_bytes


def test_schemes_and_instruction_sets_have_their_own(
    folder: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for isa in ("plain", None):
        if isa:
            monkeypatch.setenv("DEEPSEEK_ISA", isa)
        else:
            monkeypatch.delenv("DEEPSEEK_ISA")
        for scheme in ("int8", "int8-kv8", "int4"):
            open_engine(folder, scheme=scheme)
    assert len(list(store.iterdir())) == 4, "the storage of the cache is no part of the weights"


def test_changed_weights_are_packed_again_and_replace_the_old(folder: Path, store: Path) -> None:
    before = logits(open_engine(folder, scheme="int8"))
    model = deepseek.load(folder)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(3)
    deepseek.save(model, folder)
    changed = open_engine(folder, scheme="int8")
    assert not changed.was_packed
    assert not np.array_equal(before, logits(changed))
    assert len(list(store.iterdir())) == 1


@pytest.mark.parametrize("damage", ["cut", "empty", "header", "another model"])
def test_a_damaged_file_is_made_anew(folder: Path, store: Path, damage: str) -> None:
    expected = logits(open_engine(folder, scheme="int8"))
    (path,) = store.iterdir()
    whole = path.read_bytes()
    if damage == "another model":
        other = folder.with_name("other")
        deepseek.save(ours(reference("llama")), other)
        open_engine(other, scheme="int8")
        (stranger,) = (each for each in store.iterdir() if each != path)
        damaged = stranger.read_bytes()
    else:
        damaged = {"cut": whole[:-1], "empty": b"", "header": b"x" * 100 + whole[100:]}[damage]
    path.write_bytes(damaged)
    assert np.array_equal(logits(open_engine(folder, scheme="int8")), expected)
    assert path.read_bytes() == whole


@pytest.mark.parametrize("place", [0.1, 0.5, 0.9])
def test_other_bytes_are_never_computed_with(
    folder: Path, store: Path, place: float, caplog: pytest.LogCaptureFixture
) -> None:
    expected = logits(open_engine(folder, scheme="int8"))
    (path,) = store.iterdir()
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    at = start + int(place * (len(whole) - start)) // 8 * 8
    at = next(i for i in range(at, len(whole)) if whole[i])
    path.write_bytes(whole[:at] + bytes(1) + whole[at + 1 :])
    found = open_engine(folder, scheme="int8")
    assert not found.was_packed and np.array_equal(logits(found), expected)
    assert "made anew" in caplog.text and path.read_bytes() == whole


def test_displaced_blocks_are_seen() -> None:
    block = 8 * packed._SUMMED_WORDS
    data = np.random.default_rng(0).bytes(3 * block + 64)
    moved = data[block : 2 * block] + data[:block] + data[2 * block :]
    sums = [packed._checksum(memoryview(each)) for each in (data, moved, data[:-8] + bytes(8))]
    assert len(set(sums)) == 3


def test_a_file_that_is_cut_while_it_is_read_is_one_error(folder: Path, store: Path) -> None:
    open_engine(folder, scheme="int8")
    (path,) = store.iterdir()
    parts = packed.read_packed(path)
    assert parts is not None
    os.truncate(path, path.stat().st_size - 1)
    *_, last = parts.values()
    with pytest.raises(FormatError, match="Delete the file"):
        last.read_into(memoryview(bytearray(last.entry.num_bytes)))
    with pytest.raises(FormatError, match="Delete the file"):
        last.read_into(memoryview(bytearray(5)))


def test_a_file_that_is_removed_while_it_is_read_is_read_to_its_end(
    folder: Path, store: Path
) -> None:
    open_engine(folder, scheme="int8")
    (path,) = store.iterdir()
    parts = packed.read_packed(path)
    assert parts is not None
    path.unlink()
    for each in parts.values():
        each.read_into(memoryview(bytearray(each.entry.num_bytes)))


def test_what_was_not_used_for_longest_goes(
    folder: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for scheme in ("int8", "int4", "bfloat16"):
        open_engine(folder, scheme=scheme)
    kept = packed.kept_weights()
    assert len(kept) == 3 and {each.folder for each in kept} == {str(folder)}
    for age, each in enumerate(kept):
        os.utime(each.path, ns=(0, (10 - age) * 10**9))
    oldest, wanted = kept[-1], kept[0]
    total = sum(each.size_bytes for each in kept)
    monkeypatch.setenv("DEEPSEEK_PACKED_BYTES", str(total))
    open_engine(folder, scheme="int4-g64")
    left = {each.path for each in packed.kept_weights()}
    assert oldest.path not in left and wanted.path in left
    assert sum(path.stat().st_size for path in left) <= total


def test_reading_counts_as_use(folder: Path, store: Path) -> None:
    open_engine(folder, scheme="int8")
    (path,) = store.iterdir()
    os.utime(path, ns=(0, 0))
    open_engine(folder, scheme="int8")
    assert packed.kept_weights()[0].used_s > 1e9


@pytest.mark.parametrize("bound", ["0", "1000"])
def test_what_is_larger_than_the_bound_is_not_kept(
    folder: Path, store: Path, monkeypatch: pytest.MonkeyPatch, bound: str
) -> None:
    monkeypatch.setenv("DEEPSEEK_PACKED_BYTES", bound)
    open_engine(folder, scheme="int8")
    assert not store.exists()


def test_a_bound_that_is_no_number_is_one_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEEPSEEK_PACKED_BYTES", "8 GB")
    with pytest.raises(ConfigError, match="whole number of bytes"):
        open_engine(folder, scheme="int8")


def test_what_a_killed_writer_left_goes_and_what_a_live_one_writes_stays(
    folder: Path, store: Path
) -> None:
    store.mkdir()
    dead, live = (store / f".{name}.safetensors.new-00" for name in ("dead", "live"))
    dead.write_bytes(b"half")
    with live.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        open_engine(folder, scheme="int8")
        assert not dead.exists() and live.exists()


def test_a_full_disk_is_told_and_no_error(
    folder: Path, store: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> bytes:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(packed, "_header", full)
    expected = logits(open_engine(folder, scheme="int8"))
    assert "No space left" in caplog.text and list(store.iterdir()) == []
    monkeypatch.undo()
    assert np.array_equal(logits(open_engine(folder, scheme="int8", keep=False)), expected)


def test_processes_that_start_at_once_get_the_same_answer(folder: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from deepseek.face import load_engine\n"
        "from deepseek.generate import generate\n"
        "engine = load_engine(sys.argv[1], scheme='int8')\n"
        "print(generate(engine, [5, 7, 11], max_tokens=12, ignore_eos=True).token_ids)"
    )
    environment = os.environ | {"DEEPSEEK_HOME": str(tmp_path / "home")}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(folder)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    found = [each.communicate(timeout=120) for each in started]
    assert len(set(found)) == 1 and found[0][1] == "" and found[0][0]
    assert len(list((tmp_path / "home" / "packed").iterdir())) == 1


def test_a_store_that_cannot_be_written_is_no_error(folder: Path, store: Path) -> None:
    store.write_text("a file where the folder should be")
    assert open_engine(folder, scheme="int8").was_packed is False


def test_nothing_is_kept_when_not_asked(folder: Path, store: Path) -> None:
    open_engine(folder, scheme="int8", keep=False)
    assert not store.exists()


def test_files_of_models_that_are_gone_are_removed(folder: Path, store: Path) -> None:
    open_engine(folder, scheme="int8")
    (gone,) = store.iterdir()
    other = folder.with_name("other")
    shutil.copytree(folder, other)
    shutil.rmtree(folder)
    open_engine(other, scheme="int8")
    assert not gone.exists() and len(list(store.iterdir())) == 1


def test_no_half_written_file_stays(
    folder: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(packed.os, "replace", fail)
    open_engine(folder, scheme="int8")
    assert list(store.iterdir()) == []
